"""A run watched from a thread: what is new in its log, how its process stands, and the memory that it takes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from edgeprune import control, lock, runs, worker
from edgeprune.errors import BadInput
from edgeprune.events import Event, RunFailed, RunFinished, RunStarted
from edgeprune.log import LogReader
from edgeprune.remote import address
from edgeprune.runs import RunInfo
from edgeprune.tui.picture import Picture, picture_of

STATE_SECONDS = 1.0
"""Between two looks at the lock and the process."""


@dataclass(frozen=True)
class News:
    """What a look has found."""

    events: list[Event] = field(default_factory=list)
    picture: Picture | None = None
    """All so far, in place of ``events``: at the first look."""
    info: RunInfo | None = None
    """How the run stands, if that was looked at."""
    memory: int | None = None
    """Bytes that the worker and its children take now; known with ``info`` alone."""
    last_words: str = ""
    """The libraries' last line, of a run that ended early."""
    box: str = ""
    """The machine that does the run, if that is another one; known with ``info`` alone."""


class Watcher:
    """Looks at the run in ``folder``; what it finds there never makes it raise."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._reader = LogReader(self._folder / worker.EVENTS)
        self._info: RunInfo | None = None
        self._known: tuple[Any, ...] = ()
        self._looked = 0.0

    def first(self) -> News:
        """Return all that is known of the run."""
        picture = picture_of(self._poll())
        picture.recall(_results(self._folder))
        return self._with_state([], picture)

    def look(self) -> News | None:
        """Return what is new, None if nothing is; all, if another run has taken the folder."""
        if self._is_another():
            self._reader.offset = 0
            return self.first()
        events = self._poll()
        milestone = any(isinstance(e, RunStarted | RunFinished | RunFailed) for e in events)
        if milestone or time.monotonic() - self._looked >= STATE_SECONDS:
            return self._state_news(events, milestone)
        return News(events) if events else None

    def _state_news(self, events: list[Event], anew: bool) -> News | None:
        """A run that has ended takes nothing, and stands as it stood."""
        before = self._info
        news = self._with_state(events, None, anew)
        same = news.info == before and before is not None and before.state not in runs.AT_WORK
        return None if same and not events else news

    def _poll(self) -> list[Event]:
        try:
            return self._reader.poll()
        except OSError:  # of a folder that is no more; what cannot be read now is read later
            return []

    def _is_another(self) -> bool:
        try:
            return self._reader.path.stat().st_size < self._reader.offset
        except OSError:  # what was seen of a run that is gone stays in sight
            return False

    def _with_state(self, events: list[Event], picture: Picture | None, anew: bool = False) -> News:
        self._looked = time.monotonic()
        info = self._described(anew)
        early = info.state in ("failed", "stopped", "dead")
        words = control.last_words(self._folder) if early else ""
        far = address.read(self._folder)
        return News(events, picture, info, memory_of(info.pid), words, far.host if far else "")

    def _described(self, anew: bool) -> RunInfo:
        """Read the folder only when something that can be asked cheaply has changed: a log may be long."""
        pid = self._info.pid if self._info else None
        known = (
            (self._folder / worker.STATE).exists(),
            lock.is_held(self._folder),
            pid is not None and lock.is_alive(pid),
            pid is not None and control.is_paused(pid),
        )
        if anew or self._info is None or known != self._known:
            self._info = runs.describe(self._folder)
        self._known = known
        return self._info


def memory_of(pid: int | None) -> int | None:
    """Return the bytes in memory of a process and all that it started; None if they cannot be told."""
    if pid is None:
        return None
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return None
    return sum(map(_resident, family)) or None


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def _results(folder: Path) -> dict[str, Any]:
    try:
        return worker.read_state(folder)
    except BadInput:
        return {}
