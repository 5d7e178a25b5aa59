"""A whole run from a recipe: starts the worker process, passes its events on, watches its end.

The run's folder holds everything: ``recipe.toml`` as resolved, ``events.jsonl``, ``state.json``,
the pruned checkpoint, both exports, ``results.json`` and ``report.html``; where the recipe asks for
it, ``tensorboard/``. What the libraries print goes to ``worker.log``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

import psutil

from edgeprune import machine, sources, worker
from edgeprune import recipe as recipes
from edgeprune.errors import BadInput, EdgepruneError, Interrupted
from edgeprune.events import Emit, Note, RunFailed, RunFinished, ignore
from edgeprune.log import follow
from edgeprune.quantities import format_bytes
from edgeprune.recipe import Recipe, SourceSection

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

WORKER = (sys.executable, "-m", "edgeprune.worker")
LOCK = "run.lock"
OWN_FILES = (
    worker.EVENTS,
    worker.OUTPUT,
    worker.RECIPE,
    worker.STATE,
    worker.PRUNE_STATE,
    worker.RECOVERY,
    worker.TENSORBOARD,
    worker.UNFINISHED,
    LOCK,
)
ROOM_TO_START = 50_000_000
"""Bytes of free disk without which no run is started; the source stage knows the real need."""


def run(recipe: Recipe | str | Path, folder: str | Path, emit: Emit = ignore) -> dict[str, Any]:
    """Do all that ``recipe`` says in the new or empty ``folder`` and return its results.

    ``recipe`` may be the path of a TOML file.

    Raises:
        BadInput: what was asked cannot be done; ``folder`` is left as it was.
        EdgepruneError: the run failed on its way; the message names the command to go on with.
        Interrupted: Ctrl-C; likewise.
    """
    folder = Path(folder).absolute()
    recipe = _check(recipe, folder)
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / worker.RECIPE).write_text(recipe.to_toml(), "utf-8")
        worker.write_state(folder, {})
    except OSError as error:
        raise BadInput(
            f"{folder}: cannot be written: {error.strerror}; name another with -o DIR"
        ) from error
    try:
        return _work(folder, emit)
    except BadInput:
        if not _has_begun(folder):
            _discard(folder, existed)
        raise


def resume(folder: str | Path, emit: Emit = ignore) -> dict[str, Any]:
    """Go on with the run in ``folder`` where it ended; raises as ``run``."""
    folder = Path(folder).absolute()
    worker.read_state(folder)
    return _work(folder, emit)


def _check(recipe: Recipe | str | Path, folder: Path) -> Recipe:
    problems = _folder_problems(folder)
    if not isinstance(recipe, Recipe):
        try:
            recipe = recipes.load(recipe)
        except BadInput as error:
            problems.insert(0, str(error))
    if isinstance(recipe, Recipe):
        problems += _source_problems(recipe.source)
    if problems or not isinstance(recipe, Recipe):
        raise BadInput("\n".join(problems))
    return recipe


def _source_problems(source: SourceSection) -> list[str]:
    """Look at the model without fetching it; the worker's first stage looks closer."""
    try:
        sources.resolve(
            source.model,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            weights=False,
        )
    except BadInput as error:
        return [str(error)]
    return []


def _folder_problems(folder: Path) -> list[str]:
    problems = []
    if folder.is_dir() and (folder / worker.STATE).exists():
        problems.append(
            f"{folder}: holds a run already; go on with it by: {worker.resume_command(folder)}"
        )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        problems.append(f"{folder}: not an empty folder; name another with -o DIR")
    free = machine.disk_free(folder)
    if free < ROOM_TO_START:
        problems.append(f"{folder}: only {format_bytes(free)} free there; name another with -o DIR")
    return problems


def _has_begun(folder: Path) -> bool:
    """Tell whether there is work in ``folder`` that a resumed run would not have to do again."""
    return bool(set(worker.read_state(folder)) - {"source"}) or any(
        (folder / name).exists() for name in (worker.PRUNE_STATE, worker.RECOVERY, worker.PRUNED)
    )


def _discard(folder: Path, existed: bool) -> None:
    for name in OWN_FILES:
        worker.remove(folder / name)
    if not existed:
        folder.rmdir()


def _work(folder: Path, emit: Emit) -> dict[str, Any]:
    """Let a worker do what is left of the run in ``folder``."""
    with _only_one(folder, emit) as lock:
        log = folder / worker.EVENTS
        offset = log.stat().st_size if log.exists() else 0
        process = _start(folder, lock)
        end = _watch(process, log, offset, emit)
    if end is None:
        raise _died(process.returncode, folder)
    if isinstance(end, RunFailed):
        raise _error(end.exit_code, end.error, folder)
    results = json.loads((folder / worker.RESULTS).read_text("utf-8"))
    return cast("dict[str, Any]", results)


def _start(folder: Path, lock: IO[str]) -> subprocess.Popen[bytes]:
    # A session of its own: the terminal's Ctrl-C must not reach it past us.
    with (folder / worker.OUTPUT).open("ab") as output:
        return subprocess.Popen(
            [*WORKER, str(folder)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=(lock.fileno(),) if fcntl else (),
        )


def _watch(
    process: subprocess.Popen[bytes], log: Path, offset: int, emit: Emit
) -> RunFinished | RunFailed | None:
    """Pass on the worker's events until it ends, which it does when we are interrupted, too.

    Returns how it said that it ended; None if it did not come to that.
    """
    end = None
    try:
        for event in follow(log, offset, ended=lambda: process.poll() is not None):
            if isinstance(event, RunFinished | RunFailed):
                end = event
            emit(event)
    except KeyboardInterrupt:
        emit(Note(text="stopping ... (Ctrl-C again ends it at once)"))
        _stop(process)
        return RunFailed(error="stopped", exit_code=worker.INTERRUPTED)
    finally:
        _stop(process)
    return end


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the worker, by itself if it can, and whatever it started."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        process.wait(worker.PATIENCE)
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _error(exit_code: int, text: str, folder: Path) -> EdgepruneError:
    resume = worker.resume_command(folder)
    if exit_code == worker.INTERRUPTED:
        return Interrupted(f"{text}; go on with: {resume}")
    if exit_code == BadInput.exit_code:
        return BadInput(text)
    return EdgepruneError(f"{text}\ngo on with: {resume}")


def _died(code: int, folder: Path) -> EdgepruneError:
    """Return the error for a worker that ended without a word."""
    if machine.disk_free(folder) < 1_000_000:
        return _error(BadInput.exit_code, f"the disk of {folder} is full: free some space", folder)
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    if "SIGKILL" in how:
        how += " (out of memory?)"
    lines = (folder / worker.OUTPUT).read_text("utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    said = f"; its last words: {last}" if last else ""
    return _error(1, f"the run's worker process {how}{said}", folder)


@contextmanager
def _only_one(folder: Path, emit: Emit) -> Iterator[IO[str]]:
    """Hold the run's lock, which the worker inherits: two at work in one folder would ruin it.

    The system drops the lock with the last process that holds it, so none is ever stale. A worker
    whose parent is gone is on its way out, and waited for.
    """
    with (folder / LOCK).open("a+", encoding="utf-8") as lock:
        lock.seek(0)
        holder = lock.read().strip()
        if not _take(lock, holder):
            _wait_for(lock, holder, folder, emit)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield lock
        lock.truncate(0)


def _wait_for(lock: IO[str], holder: str, folder: Path, emit: Emit) -> None:
    emit(Note(text="waiting for the worker of an earlier try to end"))
    deadline = time.monotonic() + worker.PATIENCE + 5
    while not _take(lock, holder):
        if _is_alive(holder) or time.monotonic() > deadline:
            raise EdgepruneError(
                f"{folder}: process {holder} is at work on this run; wait for it, or stop it first"
            )
        time.sleep(0.2)


def _take(lock: IO[str], holder: str) -> bool:
    if not fcntl:
        return not _is_alive(holder)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_alive(holder: str) -> bool:
    try:
        return psutil.Process(int(holder)).status() != psutil.STATUS_ZOMBIE
    except (ValueError, psutil.Error):
        return False
