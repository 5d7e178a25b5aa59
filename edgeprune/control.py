"""Runs at work, seen from another process: follow one to its end, stop it, pause it.

What is at work is told by the run's lock and log; what is asked of it goes by a file or a signal. Nothing here
needs to have started the run.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from edgeprune import lock, machine, worker
from edgeprune.errors import BadInput, EdgepruneError, Interrupted
from edgeprune.events import (
    Emit,
    Event,
    Note,
    Progress,
    RunFailed,
    RunFinished,
    RunStarted,
    StageFinished,
    StageStarted,
    ignore,
)
from edgeprune.log import LogReader, LogWriter, follow, last_session, read_kinds
from edgeprune.remote import address

End = RunFinished | RunFailed


# ---- following


def attach(folder: str | Path, emit: Emit = ignore) -> dict[str, Any]:
    """Pass on how the run in ``folder`` stands and what its worker tells, until it ends; return its results.

    Of a run that has ended, only the end is told. The run does not notice, nor when this is interrupted.

    Raises:
        BadInput: there is no run in ``folder``, or what was asked of it could not be done.
        EdgepruneError: the run failed; the message names the command to go on with.
        Interrupted: the run was stopped.
    """
    folder = Path(folder).absolute()
    worker.read_state(folder)
    reader = LogReader(folder / worker.EVENTS)
    past = last_session(reader.poll())
    end = end_of(past)
    if lock.is_held(folder):  # one that has ended is perhaps just being resumed
        for event in standing(past) if end is None else ():
            emit(event)
        end = _follow(folder, reader.offset, end, emit)
    return outcome(folder, end)


def _follow(folder: Path, offset: int, end: End | None, emit: Emit) -> End | None:
    log = folder / worker.EVENTS
    for event in follow(log, offset, ended=lambda: not lock.is_held(folder)):
        emit(event)
        if isinstance(event, RunStarted):
            end = None
        if isinstance(event, RunFinished | RunFailed):
            return event
    return end


def standing(session: Iterable[Event]) -> list[Event]:
    """Return those of a worker's events that tell how its run stands: what a later one overtook is left out.

    That is each stage and its end, all warnings, and of the stage at work the last event of each kind and unit.
    """
    kept: list[Event] = []
    latest: dict[tuple[str, str], Event] = {}
    for event in session:
        warning = isinstance(event, Note) and event.level != "info"
        if isinstance(event, StageStarted | StageFinished):
            latest.clear()
        if warning or isinstance(event, RunStarted | StageStarted | StageFinished):
            kept.append(event)
        else:
            key = (event.kind, event.unit if isinstance(event, Progress) else "")
            latest.pop(key, None)  # the order is that of the last ones
            latest[key] = event
    return [*kept, *latest.values()]


# ---- how a run ended


def end_of(session: Iterable[Event]) -> End | None:
    """Return how a worker said that it ended; None if it did not."""
    return next((e for e in session if isinstance(e, RunFinished | RunFailed)), None)


def outcome(folder: Path, end: End | None, code: int | None = None) -> dict[str, Any]:
    """Return the results of a run that ended so, or raise what ``failure`` returns."""
    if not isinstance(end, RunFinished):
        raise failure(folder, end, code)
    return worker.read_results(folder)


def failure(folder: Path, end: RunFailed | None, code: int | None = None) -> EdgepruneError:
    """Return the error for a run that ended so; ``code`` is the worker's exit code where it is known."""
    far = address.read(folder)
    if end is None and far is not None:
        again = f"edgeprune attach {worker.shown(folder)}"
        return Interrupted(
            f"nothing here watches the run any more; on {far.host} it may go on: {again}"
        )
    return _died(code, folder) if end is None else _error(end.exit_code, end.error, folder)


def _error(exit_code: int, text: str, folder: Path) -> EdgepruneError:
    resume = worker.resume_command(folder)
    if exit_code == worker.INTERRUPTED:
        return Interrupted(f"{text}; go on with: {resume}")
    if exit_code == BadInput.exit_code:
        return BadInput(text)
    return EdgepruneError(f"{text}\ngo on with: {resume}")


def _died(code: int | None, folder: Path) -> EdgepruneError:
    """Return the error for a worker that ended without a word."""
    if machine.disk_free(folder) < 1_000_000:
        return _error(BadInput.exit_code, f"the disk of {folder} is full: free some space", folder)
    if code is None:
        how = "is gone without a word (out of memory? the machine was restarted?)"
    else:
        how = (
            f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        )
        how += " (out of memory?)" if "SIGKILL" in how else ""
    last = last_words(folder)
    said = f"; its last words: {last}" if last else ""
    return _error(1, f"the run's worker process {how}{said}", folder)


def last_words(folder: Path) -> str:
    """Return the last line that the libraries printed in the run."""
    try:
        lines = (folder / worker.OUTPUT).read_text("utf-8", errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def record_stop(folder: Path, since: float = 0.0) -> End:
    """Return how the worker, which is gone, said since then that it ended; else say in the log that it was stopped.

    The worker of a run on another machine that said nothing has left it at work.
    """
    session = _milestones(folder)
    end = end_of(session)
    if end is not None and end.time >= since:
        return end
    if session and end is None and address.read(folder) is None:
        say_stopped(folder)
    return _stopped(folder)


def say_stopped(folder: Path) -> None:
    """Say in the log of a run without a worker that it was stopped."""
    with suppress(OSError, EdgepruneError), LogWriter(folder / worker.EVENTS) as emit:
        emit(_stopped(folder))


def _stopped(folder: Path) -> RunFailed:
    resume = worker.resume_command(folder)
    return RunFailed(error="stopped", exit_code=worker.INTERRUPTED, next=resume)


def _milestones(folder: Path) -> list[Any]:
    return last_session(read_kinds(folder / worker.EVENTS, RunStarted, RunFinished, RunFailed))


# ---- stopping


def stop(folder: str | Path, emit: Emit = ignore) -> bool:
    """Tell the worker at work in ``folder`` to stop, and wait for its end; what is finished stays.

    A worker that does not stop by itself within ``worker.PATIENCE`` is ended. Returns False if none was at work.

    Raises:
        BadInput: if there is no run in ``folder``, or nothing can be written there.
    """
    folder = Path(folder).absolute()
    worker.read_state(folder)
    if not lock.is_held(folder):
        return False
    emit(Note(text="stopping ..."))
    asked = time.time()
    while lock.is_held(folder) and not _ended_since(asked, folder):
        _ask_to_stop(folder)  # again and again: one that is just starting forgets earlier words
        if time.time() > asked + worker.PATIENCE + 5:
            _kill(folder)
        time.sleep(0.1)
    worker.remove(folder / worker.STOP)
    record_stop(folder)
    return True


def _ended_since(asked: float, folder: Path) -> bool:
    """Tell whether the worker has ended, though its parent, which may be suspended, holds the lock still."""
    session = _milestones(folder)
    end = end_of(session)
    return end is not None and end.time >= asked and not lock.is_alive(session[0].pid)


def _ask_to_stop(folder: Path) -> None:
    pid = pid_of(folder)
    try:
        (folder / worker.STOP).touch()
    except OSError as error:
        raise BadInput(
            f"{folder}: cannot be told to stop: {error.strerror}; type: kill {pid or 'its process'}"
        ) from None
    if pid:
        wake(pid)


def _kill(folder: Path) -> None:
    """End the worker and all that it started; only what holds the run's lock can be meant."""
    pid = pid_of(folder)
    if pid is None:
        raise EdgepruneError(f"{folder}: does not stop, and its process is not known")
    with suppress(ProcessLookupError, PermissionError, psutil.Error):
        if hasattr(os, "killpg"):
            os.killpg(pid, signal.SIGKILL)
        else:
            psutil.Process(pid).kill()


# ---- pausing


def pause(folder: str | Path) -> None:
    """Let the worker at work in ``folder`` and what it started stand still until ``unpause``.

    It keeps its memory and, should it be an attached run, its terminal. A paused run can be stopped.

    Raises:
        BadInput: if no worker is at work there, or this system cannot pause one.
    """
    _signal(Path(folder).absolute(), "SIGSTOP")


def unpause(folder: str | Path) -> None:
    """Let a paused run go on; nothing if it was not paused. Raises as ``pause``."""
    _signal(Path(folder).absolute(), "SIGCONT")


def is_paused(pid: int) -> bool:
    """Tell whether the worker ``pid`` stands still."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False


def wake(pid: int) -> None:
    """Let the worker ``pid`` hear what it is told, should it be paused."""
    if hasattr(signal, "SIGCONT"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGCONT)


def _signal(folder: Path, name: str) -> None:
    worker.read_state(folder)
    far = address.read(folder)
    if far is not None:
        stop = f"edgeprune stop {worker.shown(folder)}"
        raise BadInput(
            f"{folder}: a run on {far.host} cannot be paused; stop it, to go on later: {stop}"
        )
    pid = pid_of(folder)
    if pid is None:
        raise BadInput(f"{folder}: no run is at work there; see: edgeprune runs")
    if not hasattr(signal, name):
        raise BadInput(
            f"{folder}: this system cannot pause a process; type: edgeprune stop {worker.shown(folder)}"
        )
    try:
        os.killpg(pid, getattr(signal, name))  # the worker leads a group of its own
    except ProcessLookupError:
        raise BadInput(f"{folder}: the run has just ended; see: edgeprune runs") from None


def pid_of(folder: Path) -> int | None:
    """Return the process id of the worker at work in ``folder``; None if there is none (yet)."""
    session = _milestones(folder)
    if not session or end_of(session) or not lock.is_held(folder):
        return None
    pid = session[0].pid
    return pid if pid and lock.is_alive(pid) else None
