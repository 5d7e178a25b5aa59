"""Facts about a machine, read from file trees that look like those of other machines."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from edgeprune import machine

XEON = "processor\t: 0\nmodel name\t: Some Xeon\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n"
OLD_CORE = "model name\t: Some Core\nflags\t\t: fpu sse4_2 avx2\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm bf16\n\nModel\t\t: Some Board\n"


def tree(root: Path, **files: str) -> Path:
    """Write files named with "__" for "/"."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cpuinfo", "model", "some"),
    [(XEON, "Some Xeon", "amx_bf16"), (ARM, "Some Board", "i8mm"), (OLD_CORE, "Some Core", "avx2")],
)
def test_processor(tmp_path: Path, cpuinfo: str, model: str, some: str) -> None:
    tree(tmp_path, proc__cpuinfo=cpuinfo)
    assert machine.cpu_model(tmp_path) == model
    assert some in machine.cpu_features(tmp_path)


@pytest.mark.parametrize(("cpuinfo", "real"), [(XEON, True), (ARM, True), (OLD_CORE, False)])
def test_bf16_only_where_real(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpuinfo: str, real: bool
) -> None:
    features = machine.cpu_features(tree(tmp_path, proc__cpuinfo=cpuinfo))
    monkeypatch.setattr(machine, "cpu_features", lambda: features)
    monkeypatch.setattr(machine.platform, "system", lambda: "Linux")
    assert machine.compute_dtype("cpu") == (torch.bfloat16 if real else torch.float32)


def test_bf16_asks_torch_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_features", frozenset)
    monkeypatch.setattr(machine.platform, "system", lambda: "Windows")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert machine.compute_dtype("cpu") == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert machine.compute_dtype("cpu") == torch.bfloat16


def test_device_is_one_that_torch_can_use() -> None:
    device = machine.pick_device()
    assert torch.ones(2, device=device).sum().item() == 2
    assert machine.compute_dtype() == machine.compute_dtype(device)


LIMIT = 10**9


@pytest.mark.parametrize(
    "files",
    [
        pytest.param(
            {
                "proc__self__cgroup": "0::/box\n",
                "sys__fs__cgroup__box__memory.max": f"{LIMIT}\n",
                "sys__fs__cgroup__box__memory.current": "600000000\n",
                "sys__fs__cgroup__box__memory.stat": "anon 1\ninactive_file 100000000\n",
            },
            id="v2",
        ),
        pytest.param(
            {
                "proc__self__cgroup": "0::/host/path/not/visible\n",
                "sys__fs__cgroup__memory.max": f"{LIMIT}\n",
                "sys__fs__cgroup__memory.current": "500000000\n",
            },
            id="v2 in a container",
        ),
        pytest.param(
            {
                "proc__self__cgroup": "5:cpu,cpuacct:/\n4:memory:/box\n",
                "sys__fs__cgroup__memory__box__memory.limit_in_bytes": f"{LIMIT}\n",
                "sys__fs__cgroup__memory__box__memory.usage_in_bytes": "600000000\n",
                "sys__fs__cgroup__memory__box__memory.stat": "total_inactive_file 100000000\n",
            },
            id="v1",
        ),
    ],
)
def test_memory_limit_of_a_container(tmp_path: Path, files: dict[str, str]) -> None:
    found = machine.memory(tree(tmp_path, **files))
    assert found.total == LIMIT
    assert found.available == min(LIMIT // 2, psutil.virtual_memory().available)


@pytest.mark.parametrize("limit", ["max", "9223372036854771712"])
def test_no_memory_limit(tmp_path: Path, limit: str) -> None:
    files = {"sys__fs__cgroup__memory.max": limit, "sys__fs__cgroup__memory.current": "1"}
    root = tree(tmp_path, proc__self__cgroup="0::/\n", **files)
    assert machine.memory(root).total == psutil.virtual_memory().total


def test_core_quota(tmp_path: Path) -> None:
    root = tree(
        tmp_path, proc__self__cgroup="0::/\n", **{"sys__fs__cgroup__cpu.max": "50000 100000\n"}
    )
    assert machine.cores(root) == 1
    assert 1 <= machine.cores() <= (os.cpu_count() or 1)


def test_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert machine.disk_free(tmp_path / "not" / "yet") > 0


def test_gpu_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="Some GPU", total_memory=8 * 10**9)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert machine.accelerators() == [machine.Accelerator("Some GPU", "cuda:0", 8 * 10**9, False)]
    assert machine.compute_dtype("cuda") == torch.float32
