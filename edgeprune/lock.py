"""The lock of a run's folder: two workers in one would ruin it.

The worker inherits it from the process that starts it. The system drops it with the last process that holds it,
so none is ever stale. It holds the id of the process in charge: the one that watches over the worker, or the worker
itself if it was detached. Where there is no ``flock`` (Windows), the lock is held while that process is alive.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil

from edgeprune.errors import EdgepruneError
from edgeprune.events import Emit, Note

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE = "run.lock"


@contextmanager
def only_one(folder: Path, emit: Emit, patience: float) -> Iterator[IO[str]]:
    """Hold the lock of ``folder``, open for a worker to inherit.

    A worker whose parent is gone is on its way out, and waited for, at most ``patience`` seconds.

    Raises:
        EdgepruneError: if another process is in charge of the run.
    """
    with (folder / FILE).open("a+", encoding="utf-8") as lock:
        lock.seek(0)
        holder = lock.read().strip()
        if not _take(lock, holder):
            _wait_for(lock, holder, folder, emit, patience)
        hand_over(lock, os.getpid())
        yield lock
        lock.seek(0)
        if lock.read() == str(os.getpid()):
            lock.truncate(0)


def hand_over(lock: IO[str], pid: int) -> None:
    """Write into the open lock that process ``pid`` is in charge."""
    lock.truncate(0)
    lock.write(str(pid))
    lock.flush()


def clear(folder: Path) -> None:
    """Say that nobody is in charge any more."""
    with suppress(OSError):
        os.truncate(folder / FILE, 0)


def is_held(folder: Path) -> bool:
    """Tell whether a run is at work in ``folder``, or just being started."""
    try:
        with (folder / FILE).open(encoding="utf-8", errors="replace") as lock:
            if not fcntl:
                return is_alive(lock.read().strip())
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False
    except OSError:
        return False


def is_alive(pid: int | str) -> bool:
    """Tell whether there is such a process; one that has ended and only waits to be reaped is none."""
    try:
        return bool(psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE)
    except (ValueError, psutil.Error):
        return False


def inheritable(lock: IO[str]) -> tuple[int, ...]:
    """Return what a child process is to inherit, so that it holds the lock, too."""
    return (lock.fileno(),) if fcntl else ()


def _wait_for(lock: IO[str], holder: str, folder: Path, emit: Emit, patience: float) -> None:
    deadline = time.monotonic() + patience
    told = False
    while not _take(lock, holder):
        if is_alive(holder) or time.monotonic() > deadline:
            raise EdgepruneError(
                f"{folder}: process {holder} is at work on this run; wait for it, or stop it first"
            )
        if not told:
            emit(Note(text="waiting for the worker of an earlier try to end"))
            told = True
        time.sleep(0.2)


def _take(lock: IO[str], holder: str) -> bool:
    if not fcntl:
        return not is_alive(holder)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
