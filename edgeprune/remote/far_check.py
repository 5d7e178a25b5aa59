"""What a far machine is and has. Sent as text and run by the Python there (3.9 or newer), nothing else.

Sizes are bytes. What the machine does not tell is None, or left out of a list.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

NVIDIA, DISPLAYS = "0x10de", "0x03"
"""The maker of a PCI device, and how the class of a graphics card or a processor for it begins."""
MIB = 2**20


def check(runner: str, machine: str = "/") -> dict[str, Any]:
    """Return what is there, in parts: ``system``, ``python``, ``storage``, ``graphics``, ``sensors``, and so on.

    ``runner`` is the text of profiles/runner.py, which knows the sensors: what it tells of this moment are ``device``,
    ``temperature`` and ``throttling``. Tests have the files of another ``machine`` read.
    """
    base = Path(machine)
    return {
        "system": _system(base),
        "python": _python(),
        "storage": _storage(),
        "graphics": _graphics(base),
        "sensors": {"locked": _locked_sensors(base)},
        **_told(runner),
    }


def root() -> Path:
    """Return the folder under which everything of edgeprune's is kept here; it need not be there yet."""
    base = os.environ.get("XDG_DATA_HOME", "")
    home = Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "share"
    return home / "edgeprune"


# ---- system and Python


def _system(base: Path) -> dict[str, Any]:
    names = re.findall(r'(?m)^PRETTY_NAME="?([^"\n]*)', _read(base / "etc/os-release"))
    model = _read(base / "proc/device-tree/model").strip("\0")
    return {
        "os": names[0] if names else f"{platform.system()} {platform.release()}",
        "kernel": f"{platform.system()} {platform.release()}",
        "board": model or None,
        "architecture": platform.machine(),
        "libc": _libc(),
        "features": _features(base),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _libc() -> str | None:
    """Return the version of glibc, None on a system that has another C library."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (AttributeError, ValueError, OSError):
        return None
    return version if name == "glibc" else None


def _features(base: Path) -> list[str]:
    for line in _read(base / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return value.split()
    return []


def _python() -> dict[str, Any]:
    modules = ("venv", "ensurepip")
    return {
        "version": platform.python_version(),
        "path": sys.executable,
        "venv": all(importlib.util.find_spec(name) is not None for name in modules),
    }


# ---- disk


def _storage() -> dict[str, Any]:
    place = root()
    there = place
    while not there.exists():
        there = there.parent
    return {
        "folder": str(place),
        "free_bytes": shutil.disk_usage(there).free,
        "writable": os.access(there, os.W_OK | os.X_OK),
    }


# ---- graphics


def _graphics(base: Path) -> dict[str, Any]:
    """Return the ``cards`` of NVIDIA's that work, their driver and CUDA, and whether one has no driver."""
    cards = _cards()
    header = _said("nvidia-smi")
    release = re.search(r"R(\d+) .*REVISION: ([\d.]+)", _read(base / "etc/nv_tegra_release"))
    if release and not cards:  # a Jetson's shares the memory of the board
        cards = [{"name": "NVIDIA Tegra", "memory_bytes": None, "free_bytes": None}]
    return {
        "cards": cards,
        "driver": _first(r"Driver Version: *([\d.]+)", header),
        "cuda": _first(r"CUDA Version: *([\d.]+)", header),
        "jetson": f"L4T {release[1]}.{release[2]}" if release else None,
        "without_driver": not cards and _has_nvidia_card(base),
    }


def _cards() -> list[dict[str, Any]]:
    asked = "--query-gpu=name,memory.total,memory.free"
    cards = []
    for line in _said("nvidia-smi", asked, "--format=csv,noheader,nounits").splitlines():
        name, *sizes = (part.strip() for part in line.rsplit(",", 2))
        if len(sizes) == 2:
            total, free = (int(size) * MIB if size.isdigit() else None for size in sizes)
            cards.append({"name": name, "memory_bytes": total, "free_bytes": free})
    return cards


def _has_nvidia_card(base: Path) -> bool:
    return any(
        _read(device / "vendor").strip() == NVIDIA and _read(device / "class").startswith(DISPLAYS)
        for device in base.glob("sys/bus/pci/devices/*")
    )


def _locked_sensors(base: Path) -> list[str]:
    """Return the counters of energy that are there, and that this user may not read."""
    counters = sorted(base.glob("sys/class/powercap/intel-rapl:?/energy_uj"))
    return [str(path) for path in counters if not os.access(path, os.R_OK)]


def _told(runner: str) -> dict[str, Any]:
    module = types.ModuleType("runner")
    sys.modules["runner"] = module
    exec(compile(runner, "runner.py", "exec"), module.__dict__)
    return {name: getattr(module, name)() for name in ("device", "temperature", "throttling")}


# ---- files and programs


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _said(*command: str) -> str:
    """Return what a program prints; "" if there is none, or it fails."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found[1] if found else None
