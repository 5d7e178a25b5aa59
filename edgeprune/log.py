"""The event log of a run: one JSON object a line, in a file that only grows.

One process writes; any number read, at once or later, here or on a copy of the file.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from edgeprune.errors import EdgepruneError
from edgeprune.events import Event, Note, RunStarted, StageFinished, event_from_json


class LogWriter:
    """Appends events to the log at ``path``; an instance is an ``Emit``.

    Each event is one write of one whole line, so that a reader sees it complete or not at all, and
    the end of a stage is flushed to the disk before the call returns.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._end_a_cut_line()

    def __call__(self, event: Event) -> None:
        """Append ``event``. EdgepruneError if the disk is full."""
        self._write(json.dumps(event.to_json()).encode() + b"\n")
        if isinstance(event, StageFinished):
            os.fsync(self._file)

    def close(self) -> None:
        """Flush to the disk and close."""
        os.fsync(self._file)
        os.close(self._file)

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()

    def _end_a_cut_line(self) -> None:
        # A writer that died in the middle of a line must not spoil the next one.
        size = os.fstat(self._file).st_size
        if size:
            os.lseek(self._file, size - 1, os.SEEK_SET)
            if os.read(self._file, 1) != b"\n":
                self._write(b"\n")

    def _write(self, line: bytes) -> None:
        while line:
            try:
                line = line[os.write(self._file, line) :]
            except OSError as error:
                raise EdgepruneError(f"{self.path}: cannot be written: {error.strerror}") from error


class LogReader:
    """Reads the log at ``path`` from byte ``offset`` on, each event once."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self.offset = offset

    def poll(self) -> list[Event]:
        """Return the events appended since the last call; a line still being written waits.

        A damaged line becomes a warning in its place. A log that does not exist yet is empty.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                new = file.read()
        except FileNotFoundError:
            return []
        lines = new.splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        events = []
        for line in lines:
            events.append(self._event(line))
            self.offset += len(line)
        return events

    def _event(self, line: bytes) -> Event:
        try:
            return event_from_json(json.loads(line))
        except (ValueError, TypeError, AttributeError) as error:
            text = f"{self.path.name}: the line at byte {self.offset} was skipped: {error}"
            return Note(text=text, level="warning")


def read_events(path: Path) -> list[Event]:
    """Return every complete event of the log at ``path``; none if there is no such file."""
    return LogReader(path).poll()


def read_kinds(path: Path, *kinds: type[Event]) -> list[Event]:
    """Return the complete events of these kinds alone, the damaged left out: quick on a long log."""
    starts = tuple(b'{"kind": "%s"' % kind.kind.encode() for kind in kinds)
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError:
        return []
    events = []
    for line in lines:
        if line.startswith(starts):
            with suppress(ValueError, TypeError, AttributeError):
                events.append(event_from_json(json.loads(line)))
    return events


def last_session(events: Sequence[Event]) -> list[Event]:
    """Return what the last worker of a run told: ``events`` from the last RunStarted on."""
    starts = [index for index, event in enumerate(events) if isinstance(event, RunStarted)]
    return list(events[starts[-1] :]) if starts else []


def follow(
    path: Path, offset: int = 0, *, ended: Callable[[], bool], interval: float = 0.1
) -> Iterator[Event]:
    """Yield the events of a growing log from byte ``offset`` on, none lost and none twice.

    Looks every ``interval`` seconds until ``ended()`` is true and all that was written is read.
    """
    reader = LogReader(path, offset)
    while True:
        last = ended()  # asked before reading: what was written before the end is still read
        yield from reader.poll()
        if last:
            return
        time.sleep(interval)
