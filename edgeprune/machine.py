"""What this machine is: processor, memory, disk, and the device and number type to compute with.

Only ``pick_device``, ``compute_dtype`` and ``accelerators`` import torch; the rest reads what the
operating system says, which is cheap. Sizes are bytes.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path("/")

# The features that decide how fast a language model runs, in the names that Linux gives them.
SPEED_FEATURES = (
    "amx_bf16",
    "amx_int8",
    "avx512_bf16",
    "avx512_fp16",
    "avx512_vnni",
    "avx512f",
    "avx_vnni",
    "avx2",
    "bf16",
    "i8mm",
    "asimddp",
    "asimd",
    "sve",
)
# A processor without one of these emulates bf16, and float32 is faster there.
BF16_FEATURES = frozenset({"amx_bf16", "avx512_bf16", "bf16"})

_ARM_ON_MACOS = {
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.AdvSIMD": "asimd",
}


@dataclass(frozen=True)
class Memory:
    """Bytes that this process may use: in all, and what is free of it now."""

    total: int
    available: int


@dataclass(frozen=True)
class Accelerator:
    """A GPU that torch can use; ``memory`` in bytes."""

    name: str
    device: str
    memory: int
    bf16: bool


# ---- processor


def cpu_model(root: Path = ROOT) -> str:
    """Return the processor's name as its maker writes it, or its architecture."""
    for line in _lines(root / "proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware") and value.strip():
            return value.strip()
    if platform.system() == "Darwin" and root == ROOT:
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def cpu_features(root: Path = ROOT) -> frozenset[str]:
    """Return the instruction sets of the processor, named as in Linux's /proc/cpuinfo.

    Empty where the system does not say (Windows): ``compute_dtype`` asks torch there.
    """
    for line in _lines(root / "proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    if platform.system() == "Darwin" and root == ROOT:
        return frozenset(name for key, name in _ARM_ON_MACOS.items() if _sysctl(key) == "1")
    return frozenset()


def cores(root: Path = ROOT) -> int:
    """Return how many cores this process may keep busy: affinity and container quota counted."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _cpu_quota(root)
    return max(1, min(allowed or 1, quota or allowed or 1))


# ---- memory and disk


def memory(root: Path = ROOT) -> Memory:
    """Return the memory that this process may use: the machine's, or its container's if less."""
    import psutil

    physical = psutil.virtual_memory()
    total, available = physical.total, physical.available
    for limit, used in _cgroup_memory(root):
        if limit < physical.total:
            total = min(total, limit)
            available = min(available, max(0, limit - used))
    return Memory(total, available)


def disk_free(path: Path) -> int:
    """Return the free bytes of the file system that ``path`` is on, or will be on once created."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


# ---- compute


def pick_device() -> torch.device:
    """Return the device to compute on: CUDA, else Apple's GPU, else the processor."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def compute_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """Return bfloat16 where ``device`` computes in it, float32 where it would be emulated.

    ``device`` defaults to ``pick_device()``.
    """
    import torch

    kind = torch.device(device).type if device is not None else pick_device().type
    return torch.bfloat16 if _has_bf16(kind, torch) else torch.float32


def accelerators() -> list[Accelerator]:
    """Return the GPUs that torch can use, empty on a machine without one."""
    import torch

    if torch.backends.mps.is_available():
        limit = int(torch.mps.recommended_max_memory())
        return [Accelerator("Apple GPU", "mps", limit, _has_bf16("mps", torch))]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bf16 = _has_bf16("cuda", torch)
        found.append(
            Accelerator(properties.name, f"cuda:{index}", int(properties.total_memory), bf16)
        )
    return found


def _has_bf16(kind: str, torch: Any) -> bool:
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if kind == "mps":
        return bool(torch.backends.mps.is_macos_or_newer(14, 0))
    return kind == "cpu" and _cpu_has_bf16(torch)


def _cpu_has_bf16(torch: Any) -> bool:
    if platform.system() == "Darwin":
        return False  # torch has no bf16 matrix product for Apple's cores, whatever they can do
    features = cpu_features()
    if features:
        return bool(features & BF16_FEATURES)
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


# ---- what the operating system says


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """Return the number in a control file, None where there is none or it says "max"."""
    lines = _lines(path)
    try:
        return int(lines[0])
    except (IndexError, ValueError):
        return None


@cache
def _sysctl(name: str) -> str:
    try:
        found = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Return the control folders that bind this process, its own first, then each parent.

    Version 2 has one tree and an empty controller name in /proc/self/cgroup; version 1 has one tree
    a controller. Inside a container the path may be the host's, not visible: the mount still is.
    """
    folders = []
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if names and controller not in names.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if names else "")
        own = mount / path.strip("/")
        while own != mount:
            folders.append(own)
            own = own.parent
        folders.append(mount)
    return folders


def _cgroup_memory(root: Path) -> list[tuple[int, int]]:
    """Return (limit, used) in bytes of each control folder that sets a limit.

    The page cache that the kernel gives back on demand does not count as used.
    """
    names = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    found = []
    for folder in _cgroup_folders(root, "memory"):
        for limit_name, used_name in names:
            limit, used = _number(folder / limit_name), _number(folder / used_name)
            if limit is not None and used is not None:
                found.append((limit, max(0, used - _reclaimable(folder))))
    return found


def _reclaimable(folder: Path) -> int:
    for line in _lines(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        if name in ("total_inactive_file", "inactive_file"):
            return int(value)
    return 0


def _cpu_quota(root: Path) -> int | None:
    """Return the container's limit in whole cores, rounded up; None without one."""
    quotas = []
    for folder in _cgroup_folders(root, "cpu"):
        both = (_lines(folder / "cpu.max") or [""])[0].split()
        if len(both) == 2 and both[0].isdigit():
            quotas.append(-(-int(both[0]) // int(both[1])))
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota is not None and period and quota > 0:
            quotas.append(-(-quota // period))
    return min(quotas, default=None)
