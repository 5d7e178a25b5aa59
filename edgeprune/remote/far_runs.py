"""Runs on the far machine, seen from there. Sent as text and run by the Python there (3.9 or newer), nothing else.

A run is a folder ``runs/ID`` under the far root: ``recipe.toml`` is what runs there, ``origin.toml`` the recipe as it
was given, ``inputs/`` what was sent for it, ``run/`` an ordinary run folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

TAIL = 200_000
"""Bytes at the end of a log in which the end of a run is sought."""


def root() -> Path:
    """Return the folder under which everything of edgeprune's is kept here; it is this user's alone."""
    base = os.environ.get("XDG_DATA_HOME", "")
    home = Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "share"
    folder = home / "edgeprune"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def folder_of(run: str) -> Path:
    """Return the folder of the run with this id. ValueError if it is none."""
    if not re.fullmatch("[a-z0-9][a-z0-9-]{0,99}", run):
        raise ValueError(f"{run!r} is not the id of a run")
    return root() / "runs" / run


def found(run: str) -> Path:
    """Return the folder of a run that is there. ValueError if it is not."""
    folder = folder_of(run)
    if not (folder / "origin.toml").is_file():
        raise ValueError(f"no run {run} here; see: edgeprune runs --on NAME")
    return folder


def prepare(run: str) -> dict[str, str]:
    """Make the folder of a new run; return where it and its inputs are."""
    folder = folder_of(run)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return {"folder": str(folder), "inputs": str(folder / "inputs")}


def write(run: str, files: dict[str, str]) -> None:
    """Write these texts (by file name) into the folder of a run."""
    for name, text in files.items():
        path = folder_of(run) / Path(name).name
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


def read(run: str) -> dict[str, str]:
    """Return the recipe as it was given, and where the run's own folder is."""
    folder = found(run)
    origin = (folder / "origin.toml").read_text(encoding="utf-8")
    return {"origin": origin, "folder": str(folder / "run")}


def is_held(folder: Path) -> bool:
    """Tell whether a worker is at work in a run's own folder (``edgeprune.lock`` says how)."""
    try:
        with (folder / "run.lock").open(encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def status(run: str) -> dict[str, Any]:
    """Return whether a worker is at work, and what the libraries printed last there."""
    folder = found(run) / "run"
    return {"at_work": is_held(folder), "last_words": last_line(folder / "worker.log")}


def start(run: str, python: str, seen: int) -> dict[str, Any]:
    """Let the edgeprune of ``python`` begin the run or go on with it, and leave it at work.

    Returns the exit code of that command and what it said last. Nothing is done where the run is at work already, or
    its log says more than the ``seen`` bytes that the caller knows: somebody else has begun it.
    """
    folder = found(run)
    with (folder / "start.lock").open("w") as lock:
        # Whoever asked before and lost the link is perhaps still beginning it: that command holds the lock, too.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_held(folder / "run") or _says_more(folder / "run" / "events.jsonl", seen):
            return {"code": 0, "said": ""}
        return _begin(folder, python, lock.fileno())


def _says_more(log: Path, seen: int) -> bool:
    try:
        with log.open("rb") as file:
            file.seek(seen)
            return b"\n" in file.read()  # a line that was cut off says nothing
    except OSError:
        return False


def _begin(folder: Path, python: str, lock: int) -> dict[str, Any]:
    begun = (folder / "run" / "state.json").exists()
    what = ["--resume", "run"] if begun else ["recipe.toml", "-o", "run"]
    done = subprocess.run(
        [python, "-m", "edgeprune", "run", *what, "--detach", "--json"],
        cwd=str(folder),
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        pass_fds=(lock,),
    )
    return {"code": done.returncode, "said": done.stderr}


def stop(run: str) -> bool:
    """Tell the worker of a run to stop; False if none is at work."""
    folder = found(run) / "run"
    at_work = is_held(folder)
    if at_work:
        (folder / "stop").touch()
    return at_work


def listing() -> list[dict[str, Any]]:
    """Return all runs here, the one that changed last first."""
    folders = [each.parent for each in (root() / "runs").glob("*/origin.toml")]
    return sorted(map(_described, folders), key=lambda each: -each["changed"])


def present(run: str, names: list[str]) -> list[str]:
    """Return those of the names that a run's own folder has."""
    folder = found(run) / "run"
    return [name for name in names if (folder / name).exists()]


def remove(run: str) -> None:
    """Remove a run and what was sent for it alone. ValueError if it is at work."""
    folder = found(run)
    if is_held(folder / "run"):
        raise ValueError(f"run {run} is at work; stop it first: edgeprune stop NAME:{run}")
    shutil.rmtree(str(folder))


def _described(folder: Path) -> dict[str, Any]:
    log = folder / "run" / "events.jsonl"
    return {
        "run": folder.name,
        "state": _state(folder / "run"),
        "changed": (log if log.exists() else folder).stat().st_mtime,
        "bytes": sum(p.lstat().st_size for p in (folder / "run").rglob("*") if p.is_file()),
        "origin": (folder / "origin.toml").read_text(encoding="utf-8"),
    }


def _state(folder: Path) -> str:
    if is_held(folder):
        return "running"
    kinds = [_kind(line) for line in _tail(folder / "events.jsonl").split(b"\n")]
    ends = [kind for kind in kinds if kind in ("run_started", "run_finished", "run_failed")]
    names = {"run_finished": "finished", "run_failed": "ended early", "run_started": "dead"}
    return names[ends[-1]] if ends else "not begun" if not folder.exists() else "dead"


def _kind(line: bytes) -> str:
    try:
        return str(json.loads(line)["kind"])
    except (ValueError, LookupError, TypeError):
        return ""


def _tail(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            return file.read()
    except OSError:
        return b""


def last_line(path: Path) -> str:
    """Return the last line of a text file that is not blank."""
    lines = _tail(path).decode("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
