"""Virtual environments on the far machine. Sent as text and run by the Python there (3.9 or newer), nothing else.

``envs/ID`` under the far root holds ``venv``, and the file ``ready`` once everything is installed in there; ``wheels``,
what was sent for it; and ``lock``, held by whoever is making it.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

NEWEST_WHEELS = (34, 28, 27, 24)
"""Versions 2.x of glibc for which wheels are built, besides those for 2.17 and older (manylinux2014)."""


def root() -> Path:
    """Return the folder under which everything of edgeprune's is kept here; it is this user's alone."""
    base = os.environ.get("XDG_DATA_HOME", "")
    home = Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "share"
    folder = home / "edgeprune"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def find(key: str) -> dict[str, Any]:
    """Return which environment holds what ``key`` stands for, for the Python that runs this.

    ``environment`` is its id, ``python`` its interpreter, which works if it is ``ready``; ``version`` and ``platforms``
    are this Python's, as pip names them. ValueError if it is not ready and cannot be made.
    """
    version = platform.python_version()
    own = f"{key} {platform.python_implementation()} {version} {platform.machine()}"
    environment = hashlib.sha256(own.encode()).hexdigest()[:32]
    place = root() / "envs" / environment
    ready = (place / "ready").exists()
    if not ready and importlib.util.find_spec("ensurepip") is None:
        raise ValueError(
            f"the Python there, {sys.executable}, cannot make virtual environments; type there: "
            "sudo apt install python3-venv"
        )
    return {
        "environment": environment,
        "python": str(place / "venv" / "bin" / "python"),
        "ready": ready,
        "version": version,
        "platforms": platforms(),
    }


def platforms() -> list[str]:
    """Return for which platforms a wheel may be built to work here, the newest first."""
    minor, machine = _glibc(), platform.machine()
    if minor is None:
        return [sysconfig.get_platform().replace("-", "_").replace(".", "_")]
    newer = [f"manylinux_2_{each}_{machine}" for each in NEWEST_WHEELS if each <= minor]
    return [*newer, f"manylinux2014_{machine}"]


def _glibc() -> int | None:
    """Return the x of this system's glibc 2.x, None where there is no glibc."""
    try:
        return int((os.confstr("CS_GNU_LIBC_VERSION") or "").split(".")[1])
    except (ValueError, OSError, LookupError):
        return None


def make(environment: str, wanted: list[str], carried: bool) -> int:
    """Make an environment with what is ``wanted``: names of files in its ``wheels``, or requirements.

    Its dependencies are in ``wheels``, too, if they are ``carried``, or come from the index that pip is set to here.
    Prints what pip says and returns its exit code. Another process that makes the same is waited for.
    """
    place = root() / "envs" / environment
    (place / "wheels").mkdir(mode=0o700, parents=True, exist_ok=True)
    with (place / "lock").open("w") as lock:
        _take(lock.fileno())
        if (place / "ready").exists():
            return 0
        say("making a virtual environment")
        shutil.rmtree(str(place / "venv"), ignore_errors=True)  # of one who did not come to an end
        venv.create(str(place / "venv"), symlinks=True, with_pip=True)
        code = _install(place, wanted, carried, lock.fileno())
        if code == 0:
            (place / "ready").touch()
        return code


def _take(lock: int) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("waiting for another process that makes the same environment")
        fcntl.flock(lock, fcntl.LOCK_EX)


def _install(place: Path, wanted: list[str], carried: bool, lock: int) -> int:
    wheels = place / "wheels"
    source = ["--no-index", "--find-links", str(wheels)] if carried else []
    what = [str(wheels / each) if (wheels / each).is_file() else each for each in wanted]
    quietly = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    quickly = ["--no-compile"]  # what is imported is compiled then, and that is far from all
    patience = ["--retries", "1", "--timeout", "15"]
    python = str(place / "venv" / "bin" / "python")
    pip = subprocess.Popen(
        [python, "-m", "pip", "install", *quietly, *quickly, *patience, *source, *what],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        pass_fds=(lock,),  # it holds the lock even if this process is killed
    )
    assert pip.stdout is not None
    for line in pip.stdout:
        say(line.rstrip())
    return pip.wait()


def remove_unused() -> dict[str, int]:
    """Remove the environments in which nothing is at work; whoever needs one again makes it again.

    Returns how many were ``removed``, how many are ``used`` or being made, and the ``bytes`` freed.
    """
    lines = _command_lines()
    done = {"removed": 0, "used": 0, "bytes": 0}
    for place in filter(Path.is_dir, (root() / "envs").glob("*")):
        freed = -1 if f"{place}{os.sep}" in lines else _remove(place)
        if freed < 0:
            done["used"] += 1
        else:
            done["removed"] += 1
            done["bytes"] += freed
    return done


def _command_lines() -> str:
    """Return what all processes here were called by."""
    if Path("/proc/self/cmdline").exists():
        return "\n".join(map(_command_line, Path("/proc").glob("[0-9]*")))
    return subprocess.run(
        ["ps", "-A", "-ww", "-o", "args="], stdout=subprocess.PIPE, check=True, encoding="utf-8"
    ).stdout


def _command_line(process: Path) -> str:
    try:
        return os.fsdecode((process / "cmdline").read_bytes())
    except OSError:
        return ""


def _remove(place: Path) -> int:
    """Remove an environment and return the bytes freed, -1 if it is being made."""
    with (place / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return -1
        if (place / "ready").exists():  # first, or what is left would be taken for the whole
            (place / "ready").unlink()
        found = [path.lstat() for path in place.rglob("*")]
        shutil.rmtree(str(place))
    return sum(each.st_size for each in found if stat.S_ISREG(each.st_mode) and each.st_nlink == 1)


def say(line: str) -> None:
    """Print a line at once; if nobody listens any more, the work is completed all the same."""
    try:
        print(line, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
