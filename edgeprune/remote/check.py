"""Whether a host has what its work there needs, and what would mend what is missing."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from edgeprune import machine
from edgeprune.doctor import LITTLE_MEMORY, Problem
from edgeprune.profiles import runner
from edgeprune.quantities import format_bytes
from edgeprune.remote import far_check
from edgeprune.remote.connection import Link
from edgeprune.remote.environment import OLDEST_PYTHON
from edgeprune.remote.hosts import Host

SCHEMA_VERSION = 1
OLDEST_GLIBC = (2, 28)
"""For which these are built."""
ARCHITECTURES = ("x86_64", "aarch64", "arm64")
NEEDED_DISK = {"box": 5 * 10**9, "board": 10**9}
BUSY = 0.5
"""Of its cores at work for others: a measurement there would tell little."""


def examine(link: Link) -> dict[str, Any]:
    """Return what there is on a host as plain JSON values, in a few seconds; ``problems`` as ``doctor`` has them.

    Raises:
        BadInput: if there is no Python that can be asked.
        Unreachable: if the link breaks.
    """
    host = link.host
    found = {
        "schema_version": SCHEMA_VERSION,
        "host": {**asdict(host), "url": host.url},
        **link.far(far_check, "check", runner=inspect.getsource(runner)),
    }
    features = found["system"]["features"]
    found["system"]["features"] = [name for name in machine.SPEED_FEATURES if name in features]
    return {**found, "problems": [asdict(problem) for problem in problems(found, host)]}


def problems(found: dict[str, Any], host: Host) -> list[Problem]:
    """Return what is missing for a host's kind of work, and the command that would mend it, the required first."""
    parts = (_of_the_system, _of_python, _of_the_disk, _of_the_work)
    every = [problem for part in parts for problem in part(found, host)]
    return sorted(every, key=lambda problem: not problem.required)


def is_fit(found: dict[str, Any]) -> bool:
    """Tell whether nothing that is required is missing."""
    return not any(problem["required"] for problem in found["problems"])


# ---- what both kinds need


def _of_the_system(found: dict[str, Any], _host: Host) -> Iterator[Problem]:
    system = found["system"]
    architecture, libc = system["architecture"], system["libc"]
    if architecture not in ARCHITECTURES:
        what = f"nothing that is needed is built for {architecture}"
        yield Problem(what, "install a 64-bit system there (uname -m: aarch64 or x86_64)", True)
    if system["kernel"].startswith("Linux") and (libc is None or _version(libc) < OLDEST_GLIBC):
        has = "not glibc" if libc is None else f"glibc {libc}"
        what = f"its C library is {has}; glibc {_dotted(OLDEST_GLIBC)} or newer is needed"
        yield Problem(what, "install Debian 10, Ubuntu 20.04 or newer there", True)


def _of_python(found: dict[str, Any], host: Host) -> Iterator[Problem]:
    python = found["python"]
    major_minor = _dotted(_version(python["version"])[:2])
    if _version(python["version"]) < OLDEST_PYTHON:
        wanted = f"python{_dotted(OLDEST_PYTHON)}"
        what = f"its {host.python} is Python {python['version']}, {_dotted(OLDEST_PYTHON)} or newer is needed"
        mend = f"sudo apt install {wanted} {wanted}-venv, then here: {_add_again(host, wanted)}"
        yield Problem(what, mend, True)
    elif not python["venv"]:
        package = "python3-venv" if host.python == "python3" else f"python{major_minor}-venv"
        what = f"its {host.python} cannot make virtual environments"
        yield Problem(what, f"sudo apt install {package}", True)


def _of_the_disk(found: dict[str, Any], host: Host) -> Iterator[Problem]:
    storage, needed = found["storage"], NEEDED_DISK[host.kind]
    if not storage["writable"]:
        what = f"{storage['folder']} cannot be written"
        yield Problem(what, 'sudo chown -R "$USER" ~/.local', True)
    if storage["free_bytes"] < needed:
        has = format_bytes(storage["free_bytes"])
        what = f"only {has} of disk free there, a {host.kind} needs {format_bytes(needed)}"
        yield Problem(
            what, f"du -xh ~ | sort -h | tail (edgeprune keeps: {storage['folder']})", True
        )


# ---- what one kind needs


def _of_the_work(found: dict[str, Any], host: Host) -> Iterator[Problem]:
    yield from _of_a_box(found) if host.kind == "box" else _of_a_board(found)


def _of_a_box(found: dict[str, Any]) -> Iterator[Problem]:
    memory, graphics = found["device"]["memory_bytes"], found["graphics"]
    if memory is not None and memory < LITTLE_MEMORY:
        what = f"only {format_bytes(memory)} of memory"
        yield Problem(what, "take models of a few 100M parameters")
    if graphics["without_driver"]:
        what = "it has an NVIDIA card, but no driver that works"
        yield Problem(what, "sudo apt install nvidia-driver (Ubuntu: sudo ubuntu-drivers install)")
    elif not graphics["cards"]:
        yield Problem("no GPU: its processor does the work", "nothing, if that is fast enough")


def _of_a_board(found: dict[str, Any]) -> Iterator[Problem]:
    device, load = found["device"], found["system"]["load"]
    if load is not None and load > BUSY * (device["logical_cores"] or 1):
        what = f"other programs are at work (load {load:.1f}): its figures would be in doubt"
        yield Problem(what, "top")
    governors = device["governors"]
    if governors is not None and governors != ["performance"]:
        what = f"its clocks follow the work (governor {', '.join(governors)}): figures vary more"
        files = "/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
        yield Problem(what, f"echo performance | sudo tee {files}")
    if found["throttling"] is not None and found["throttling"]["now"]:
        what = f"it is slowed down now: {', '.join(found['throttling']['now'])}"
        yield Problem(what, "let it cool down; look at its fan and its power supply")
    if found["sensors"]["locked"]:
        what = "energy is not measured: its counter is root's alone"
        yield Problem(what, f"sudo chmod a+r {shlex.join(found['sensors']['locked'])}")


# ---- words


def _add_again(host: Host, python: str) -> str:
    name = "NAME" if "://" in host.name else host.name
    command = ["edgeprune", "hosts", "add", name, host.url, "--kind", host.kind]
    return shlex.join([*command, "--python", python, "--replace"])


def _version(text: str) -> tuple[int, ...]:
    """Return the numbers of a version: 3.12.0rc1 is at least 3.12."""
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
