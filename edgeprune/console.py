"""The only writer to the terminal: data to stdout, narration to stderr.

``progress`` draws the engine's events as bars with the time left, or as plain lines where stderr is
no terminal. Answers are shown to people (``show``) or written for programs (``json_document``).
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from edgeprune.events import (
    Emit,
    Evaluation,
    Event,
    Note,
    Progress,
    PruneIteration,
    RunStarted,
    StageFinished,
    StageStarted,
    TrainStep,
)
from edgeprune.quantities import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

TRAINING = "training"
LINE_INTERVAL = 10.0
"""Seconds between two lines of plain progress."""

_QUIET = {
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def prepare() -> None:
    """Keep other libraries' warnings and bars off the terminal; call before they are imported.

    What the user's environment says already stays. A terminal that cannot show a sign gets a "?".
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


# ---- lines


def data(text: str) -> None:
    """Write ``text`` to stdout as it is."""
    sys.stdout.write(text.rstrip("\n") + "\n")


def json_document(value: Any) -> None:
    """Write ``value`` to stdout as one strict JSON document; what is not finite becomes null."""
    data(json.dumps(_finite(value), indent=2, default=str, allow_nan=False))


def show(drawing: RenderableType) -> None:
    """Draw an answer on stdout."""
    _out().print(drawing)


def note(text: str) -> None:
    """Write a line for people to stderr."""
    _err().print(text, markup=False, highlight=False, soft_wrap=True)


def error(text: str) -> None:
    """Write what went wrong to stderr, each line marked."""
    for line in text.splitlines() or [""]:
        _marked(_err(), "error: ", "bold red", line)


def traceback() -> None:
    """Write the traceback of the exception being handled to stderr."""
    import traceback as tracebacks

    tracebacks.print_exc()


def _marked(console: Console, mark: str, style: str, line: str) -> None:
    from rich.text import Text

    console.print(Text.assemble((mark, style), line), soft_wrap=True)


@cache
def _err() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _out() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ---- progress


@contextmanager
def progress() -> Iterator[Emit]:
    """Give a listener that draws events on stderr until the block ends."""
    if not _err().is_terminal:
        yield _Lines()
        return
    bars = _Bars(_err())
    with bars.drawing:
        yield bars


class _Pace:
    """How fast something goes since we first heard of it: a resumed stage begins in the middle."""

    def __init__(self, done: int, total: int) -> None:
        self.first, self.done, self.total = done, done, total
        self.began = self.now = time.monotonic()

    def update(self, done: int) -> None:
        self.done, self.now = done, time.monotonic()

    def left(self) -> float | None:
        """Return the seconds left, None while that cannot be told."""
        if self.total <= 0 or self.done <= self.first:
            return None
        rate = (self.now - self.began) / (self.done - self.first)
        return max(0.0, rate * (self.total - self.done) - (time.monotonic() - self.now))


class _Titles:
    """What people are told beside the figures: the names of the stages, and how pruning stands."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        self.standing = ""

    def learn(self, event: StageStarted) -> str:
        title = event.title or self.of(event.stage)
        if event.of > 1:
            title = f"{event.index}/{event.of} {title}"
        self._known[event.stage] = title
        self.standing = ""
        return title

    def note(self, event: Progress) -> str:
        return ", ".join(part for part in (event.note, self.standing) if part)

    def of(self, stage: str) -> str:
        words = stage.replace("-", " ").replace("_", " ")
        return self._known.get(stage, words[:1].upper() + words[1:])


def _came_to(event: PruneIteration) -> str:
    return f"loss {event.loss:.2f}, {format_count(event.decoder_parameters)} left"


def _trained(event: TrainStep) -> Progress:
    note = f"loss {event.loss:.2f}, {event.tokens_per_second:,.0f} tokens/s"
    return Progress(stage=TRAINING, done=event.step, total=event.of, unit="updates", note=note)


def _held_out(event: Evaluation) -> str:
    return f"held-out perplexity {event.perplexity:.4g}"


def _resumed(event: RunStarted) -> str:
    return f"going on after: {', '.join(event.finished)}" if event.finished else ""


def _amount(event: Progress) -> str:
    if event.unit.lower() in ("b", "bytes"):
        done, total = format_bytes(event.done), format_bytes(event.total)
        return f"{done} of {total}" if event.total else done
    done, total = f"{event.done:,}", f"{event.total:,}"
    return f"{done}/{total} {event.unit}".rstrip() if event.total else f"{done} {event.unit}"


def _short_amount(event: Progress) -> str:
    if event.total and event.unit.lower() not in ("b", "bytes"):
        return f"{event.done / event.total:.0%}"
    return _amount(event)


def _left(seconds: float) -> str:
    return f"{seconds:.0f} s left" if seconds < 10 else f"{format_seconds(seconds)} left"


class _Bars:
    """Draws events as bars: one for each stage and unit at work."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as Drawing
        from rich.table import Column

        self.drawing = Drawing(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=14),
            TextColumn("{task.fields[amount]}", markup=False),
            _left_column(),
            TextColumn(
                "{task.fields[note]}",
                style="dim",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            expand=True,
            console=console,
            transient=True,
        )
        self._titles = _Titles()
        self._tasks: dict[tuple[str, str], Any] = {}
        self._paces: dict[tuple[str, str], _Pace] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, PruneIteration):
            self._titles.standing = _came_to(event)
        elif isinstance(event, Evaluation):
            self._titles.standing = _held_out(event)
        elif isinstance(event, TrainStep):
            self._advance(_trained(event))
        elif isinstance(event, StageStarted):
            self._drop()
            self._add((event.stage, ""), self._titles.learn(event))
        elif isinstance(event, Progress):
            self._advance(event)
        elif isinstance(event, StageFinished):
            self._drop()
            took = format_seconds(event.seconds)
            self.drawing.console.print(
                f"[green]✓[/] {self._titles.of(event.stage)}  [dim]{took}[/]", highlight=False
            )
        elif isinstance(event, RunStarted) and _resumed(event):
            self._say(_resumed(event))
        elif isinstance(event, Note):
            self._say(event.text, warning=event.level == "warning")

    def _say(self, text: str, warning: bool = False) -> None:
        _marked(self.drawing.console, "warning: " if warning else "", "yellow", text)

    def _advance(self, event: Progress) -> None:
        key = (event.stage, event.unit)
        self._drop_done_but(key)
        pace = self._paces.get(key)
        if pace is None or pace.total != event.total or event.done < pace.done:
            self._drop((event.stage, ""), key)
            self._add(key, self._titles.of(event.stage))
            self._paces[key] = pace = _Pace(event.done, event.total)
        pace.update(event.done)
        self.drawing.update(
            self._tasks[key],
            completed=event.done,
            total=event.total or None,
            amount=_short_amount(event),
            note=self._titles.note(event),
            pace=pace,
        )

    def _add(self, key: tuple[str, str], title: str) -> None:
        self._tasks[key] = self.drawing.add_task(title, total=None, amount="", note="", pace=None)

    def _drop_done_but(self, key: tuple[str, str]) -> None:
        done = [k for k, pace in self._paces.items() if k != key and 0 < pace.total <= pace.done]
        self._drop(*done) if done else None

    def _drop(self, *keys: tuple[str, str]) -> None:
        """Take the bars of ``keys`` off the screen, or all."""
        for key in keys or tuple(self._tasks):
            self._paces.pop(key, None)
            task = self._tasks.pop(key, None)
            if task is not None:
                self.drawing.remove_task(task)


def _left_column() -> Any:
    from rich.progress import ProgressColumn, Task
    from rich.text import Text

    class Left(ProgressColumn):
        def render(self, task: Task) -> Text:
            pace = task.fields.get("pace")
            left = pace.left() if pace else None
            return Text("" if left is None else _left(left), style="cyan")

    return Left()


class _Lines:
    """Writes events as plain lines, seldom enough for a log."""

    def __init__(self) -> None:
        self._titles = _Titles()
        self._paces: dict[tuple[str, str], _Pace] = {}
        self._last = time.monotonic()  # what is done within an interval needs no line

    def __call__(self, event: Event) -> None:
        if isinstance(event, PruneIteration):
            self._titles.standing = _came_to(event)
        elif isinstance(event, Evaluation):
            self._titles.standing = _held_out(event)
        elif isinstance(event, TrainStep):
            self._advance(_trained(event))
        elif isinstance(event, StageStarted):
            self._paces.clear()
            note(f"{self._titles.learn(event)} ...")
        elif isinstance(event, StageFinished):
            note(f"{self._titles.of(event.stage)}: done in {format_seconds(event.seconds)}")
        elif isinstance(event, Progress):
            self._advance(event)
        elif isinstance(event, RunStarted) and _resumed(event):
            note(_resumed(event))
        elif isinstance(event, Note):
            note(event.text if event.level == "info" else f"{event.level}: {event.text}")

    def _advance(self, event: Progress) -> None:
        key = (event.stage, event.unit)
        pace = self._paces.get(key)
        if pace is None or pace.total != event.total or event.done < pace.done:
            self._paces[key] = pace = _Pace(event.done, event.total)
        pace.update(event.done)
        if time.monotonic() - self._last < LINE_INTERVAL:
            return
        self._last = time.monotonic()
        left = pace.left()
        parts = [_amount(event), self._titles.note(event), "" if left is None else _left(left)]
        note(f"{self._titles.of(event.stage)}: {', '.join(part for part in parts if part)}")
