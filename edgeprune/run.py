"""A whole run from a recipe: starts the worker process, passes its events on, watches its end.

The run's folder holds everything: ``recipe.toml`` as resolved, ``events.jsonl``, ``state.json``,
the pruned checkpoint, both exports, ``results.json`` and ``report.html``; where the recipe asks for
it, ``tensorboard/``. What the libraries print goes to ``worker.log``.

``run`` and ``resume`` stay until the end, and the worker ends with them; ``start`` and ``restart`` leave a worker at
work that outlives this process and its terminal: see ``control``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from edgeprune import control, lock, machine, runs, sources, worker
from edgeprune import recipe as recipes
from edgeprune.errors import BadInput, EdgepruneError
from edgeprune.events import (
    Emit,
    Note,
    RunFailed,
    RunFinished,
    RunStarted,
    StageFinished,
    ignore,
)
from edgeprune.log import follow
from edgeprune.quantities import format_bytes
from edgeprune.recipe import Recipe, SourceSection
from edgeprune.remote import address

WORKER = (sys.executable, "-m", "edgeprune.worker")
OWN_FILES = (
    worker.EVENTS,
    worker.OUTPUT,
    worker.RECIPE,
    worker.STATE,
    worker.STOP,
    worker.PRUNE_STATE,
    worker.RECOVERY,
    worker.TENSORBOARD,
    worker.UNFINISHED,
    address.FILE,
    lock.FILE,
)
FIRST_LOOK = 15.0
"""Seconds for which ``start`` waits for the worker's first stage, which finds most of what cannot be done."""
ROOM_TO_START = 50_000_000
"""Bytes of free disk without which no run is started; the source stage knows the real need."""


def run(recipe: Recipe | str | Path, folder: str | Path, emit: Emit = ignore) -> dict[str, Any]:
    """Do all that ``recipe`` says in the new or empty ``folder`` and return its results.

    ``recipe`` may be the path of a TOML file.

    One on another machine is only watched: it outlives this process, and Ctrl-C is a KeyboardInterrupt that leaves it
    alone.

    Raises:
        BadInput: what was asked cannot be done; ``folder`` is left as it was.
        EdgepruneError: the run failed on its way; the message names the command to go on with.
        Interrupted: Ctrl-C, or it was told to stop; likewise.
    """
    folder = Path(folder).absolute()
    with _prepared(recipe, folder):
        return _work(folder, emit)


def resume(folder: str | Path, emit: Emit = ignore) -> dict[str, Any]:
    """Go on with the run in ``folder`` where it ended; raises as ``run``."""
    folder = Path(folder).absolute()
    worker.read_state(folder)
    return _work(folder, emit)


def attach(folder: str | Path, emit: Emit = ignore) -> dict[str, Any]:
    """As ``control.attach``, but have a worker tell again what a run on another machine does if there is none."""
    folder = Path(folder).absolute()
    if runs.describe(folder).state == "away":
        return _work(folder, emit)
    return control.attach(folder, emit)


def start(recipe: Recipe | str | Path, folder: str | Path, emit: Emit = ignore) -> RunStarted:
    """Start the run that ``run`` does, and leave its worker at work when this process ends.

    Returns when the worker is through its first stage or has been at it for ``FIRST_LOOK`` seconds. Until then,
    raises as ``run``.
    """
    folder = Path(folder).absolute()
    with _prepared(recipe, folder):
        return _leave(folder, emit)


def restart(folder: str | Path, emit: Emit = ignore) -> RunStarted:
    """Go on with the run in ``folder`` as ``resume``, its worker left at work as by ``start``."""
    folder = Path(folder).absolute()
    worker.read_state(folder)
    return _leave(folder, emit)


@contextmanager
def _prepared(recipe: Recipe | str | Path, folder: Path) -> Iterator[None]:
    """Make ``folder`` ready for the run; if it is refused before any work, leave it as it was."""
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
        yield
    except BadInput:
        if not _has_begun(folder):
            _discard(folder, existed)
        raise


def _check(recipe: Recipe | str | Path, folder: Path) -> Recipe:
    problems = _folder_problems(folder)
    if not isinstance(recipe, Recipe):
        try:
            recipe = recipes.load(recipe)
        except BadInput as error:
            problems.insert(0, str(error))
    if isinstance(recipe, Recipe) and not (
        recipe.where and sources.is_on_the_hub(recipe.source.model)  # the box fetches it
    ):
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
    with suppress(EdgepruneError):
        runs.forget(folder)


def _work(folder: Path, emit: Emit) -> dict[str, Any]:
    """Let a worker do what is left of the run in ``folder``."""
    if runs.is_elsewhere(folder):
        _leave(folder, ignore, first_look=0.0)
        return control.attach(folder, emit)
    with _in_charge(folder, emit) as held:
        offset = _log_size(folder)
        process = _spawn(folder, held)
        end = _watch(process, folder, offset, emit)
    return control.outcome(folder, end, process.returncode)


def _leave(folder: Path, emit: Emit, first_look: float = FIRST_LOOK) -> RunStarted:
    """As ``_work``, but only until the worker can be left alone, or has been at it for ``first_look`` seconds."""
    with _in_charge(folder, emit) as held:
        offset = _log_size(folder)
        process = _spawn(folder, held, detached=True)
        lock.hand_over(held, process.pid)
        started = _watch_the_start(process, folder, offset, emit, first_look)
    # Whoever stays alive reaps the worker when it ends.
    threading.Thread(target=process.wait, daemon=True).start()
    return started


@contextmanager
def _in_charge(folder: Path, emit: Emit) -> Iterator[IO[str]]:
    """Hold the run's lock; what an earlier worker was told is forgotten, and the run is listed."""
    with lock.only_one(folder, emit, worker.PATIENCE + 5) as held:
        worker.remove(folder / worker.STOP)
        try:
            runs.remember(folder)
        except EdgepruneError as error:  # a list is no reason not to work
            emit(Note(text=str(error), level="warning"))
        yield held


def _log_size(folder: Path) -> int:
    log = folder / worker.EVENTS
    return log.stat().st_size if log.exists() else 0


def _spawn(folder: Path, held: IO[str], detached: bool = False) -> subprocess.Popen[bytes]:
    # A session (on Windows a group, and no console) of its own: neither the terminal's Ctrl-C nor its end reaches it.
    flags = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
    if detached:
        flags |= getattr(subprocess, "DETACHED_PROCESS", 0)
    with (folder / worker.OUTPUT).open("ab") as output:
        return subprocess.Popen(
            [*WORKER, str(folder), *([worker.DETACHED] if detached else [])],
            stdin=subprocess.DEVNULL if detached else subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
            creationflags=flags,
            pass_fds=lock.inheritable(held),
        )


def _watch(
    process: subprocess.Popen[bytes], folder: Path, offset: int, emit: Emit
) -> control.End | None:
    """Pass on the worker's events until it ends, which it does when we are interrupted, too.

    Returns how it said that it ended; None if it did not come to that.
    """
    end: control.End | None = None
    began = time.time()
    try:
        for event in follow(
            folder / worker.EVENTS, offset, ended=lambda: process.poll() is not None
        ):
            if isinstance(event, RunFinished | RunFailed):
                end = event
            emit(event)
    except KeyboardInterrupt:
        return _stopped(process, folder, began, emit)
    finally:
        _stop(process, folder)
    return end


def _watch_the_start(
    process: subprocess.Popen[bytes], folder: Path, offset: int, emit: Emit, first_look: float
) -> RunStarted:
    """Pass on the worker's events until it can be left alone; what ends it before is raised, Ctrl-C as well."""
    started: RunStarted | None = None
    failed: RunFailed | None = None
    began = time.time()
    deadline = time.monotonic() + first_look

    def over() -> bool:
        return process.poll() is not None or (started is not None and time.monotonic() > deadline)

    try:
        for event in follow(folder / worker.EVENTS, offset, ended=over):
            emit(event)
            if isinstance(event, RunStarted):
                started = event
            elif isinstance(event, RunFailed):
                failed = event
            if started and (started.finished or isinstance(event, StageFinished)):
                return started
        if started and not failed and process.poll() is None:
            return started
    except KeyboardInterrupt:
        end = _stopped(process, folder, began, emit)
        if started and isinstance(end, RunFinished):
            return started
        failed = end if isinstance(end, RunFailed) else None
    except BaseException:
        _stop(process, folder)
        raise
    raise control.failure(folder, failed, process.wait())


def _stopped(
    process: subprocess.Popen[bytes], folder: Path, began: float, emit: Emit
) -> control.End:
    emit(Note(text="stopping ... (Ctrl-C again ends it at once)"))
    _stop(process, folder)
    return control.record_stop(folder, since=began)


def _stop(process: subprocess.Popen[bytes], folder: Path) -> None:
    """End the worker, by itself if it can, and whatever it started."""
    if process.poll() is None:
        with suppress(OSError):
            (folder / worker.STOP).touch()
        control.wake(process.pid)
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.close()
    with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        process.wait(worker.PATIENCE + 1)
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    with suppress(OSError):
        (folder / worker.STOP).unlink(missing_ok=True)
