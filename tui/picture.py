"""What the events of a run come to: the picture that its dashboard draws, and what can be said about its end.

Nothing here knows a screen. Applied one after the other, the events of a log give the same picture however they
came: all at once, or as the log grew. Times are the events' own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from edgeprune import worker
from edgeprune.events import (
    Evaluation,
    Event,
    Note,
    Progress,
    PruneIteration,
    RunFailed,
    RunFinished,
    RunStarted,
    StageFinished,
    StageStarted,
    TrainStep,
)
from edgeprune.quantities import format_bytes, format_count, format_seconds

POINTS = 2000
"""The most that a series holds."""
LINES = 500
"""The most lines for people that are kept."""
TITLES = {stage.name: stage.title for stage in worker.STAGES}

State = Literal["waiting", "at work", "done", "failed", "stopped"]
Level = Literal["info", "warning", "error"]
Point = tuple[float, float]
Number = TypeVar("Number", int, float)


@dataclass
class Gauge:
    """How far a part of a stage has come: ``done`` of ``total``, which is 0 where it is not known."""

    done: int
    total: int
    unit: str
    note: str
    first: int
    """What was done when we first heard of it: a resumed stage begins in the middle."""
    began: float
    at: float
    told: float | None = None
    """Seconds left then, where the engine says so itself."""

    @property
    def share(self) -> float | None:
        """From 0 to 1."""
        return min(1.0, self.done / self.total) if self.total > 0 else None

    def left(self, now: float) -> float | None:
        """Return the seconds left, None while that cannot be told."""
        left = self.told
        if left is None:
            if self.total <= 0 or self.done <= self.first:
                return None
            rate = (self.at - self.began) / (self.done - self.first)
            left = rate * (self.total - self.done)
        return max(0.0, left - max(0.0, now - self.at))

    @property
    def amount(self) -> str:
        """As people read it: "12/30 layers"."""
        if self.unit.lower() in ("b", "bytes"):
            done, total = format_bytes(self.done), format_bytes(self.total)
            return f"{done} of {total}" if self.total else done
        done = f"{self.done:,}/{self.total:,}" if self.total else f"{self.done:,}"
        return f"{done} {self.unit}".rstrip()


@dataclass
class Stage:
    """A stage of the run."""

    name: str
    title: str
    state: State = "waiting"
    seconds: float | None = None
    """It took, once it is done."""
    started: float | None = None
    gauges: dict[str, Gauge] = field(default_factory=dict)
    """By unit: pruning and training alternate in a stage, each at its own pace."""
    unit: str = ""
    """Of the gauge that moved last."""

    @property
    def gauge(self) -> Gauge | None:
        """What moved last."""
        return self.gauges.get(self.unit)


@dataclass
class Series:
    """Points of a curve in the order of x. It never has many more than ``POINTS``, spread evenly over x."""

    points: list[Point] = field(default_factory=list)
    gap: float = 0.0
    """The least distance in x between two points that are kept; the last point is always there."""

    def add(self, x: float, y: float) -> None:
        """Append a point. What is there of x and later came from a worker whose work was lost."""
        while self.points and self.points[-1][0] >= x:
            self.points.pop()
        if not math.isfinite(x + y):
            return
        self._put((x, y))
        if len(self.points) > POINTS:
            self._thin_out()

    def _put(self, point: Point) -> None:
        points = self.points
        if len(points) > 1 and points[-1][0] - points[-2][0] < self.gap:
            points[-1] = point
        else:
            points.append(point)

    def _thin_out(self) -> None:
        points, self.points = self.points, []
        self.gap = 2 * (points[-1][0] - points[0][0]) / POINTS
        for point in points:
            self._put(point)

    @property
    def last(self) -> float | None:
        """The y of the last point."""
        return self.points[-1][1] if self.points else None


@dataclass(frozen=True)
class Layer:
    """A decoder layer: what is left of it; ``dense`` figures and those of pruning are None where not known."""

    index: int
    heads: int
    dense_heads: int | None
    channels: int
    dense_channels: int | None
    importance: float | None
    sparsity: float | None


@dataclass(frozen=True)
class Line:
    """A line for people."""

    time: float
    text: str
    level: Level = "info"


@dataclass
class Widths:
    """KV heads and intermediate size, layer by layer."""

    heads: list[int]
    channels: list[int]


@dataclass
class Picture:
    """How a run stands."""

    stages: list[Stage] = field(default_factory=list)
    dense: Widths | None = None
    present: Widths | None = None
    importance: list[float] = field(default_factory=list)
    sparsity: list[float] = field(default_factory=list)
    decoder_parameters: int | None = None
    iteration: int = 0
    iterations: int = 0
    training_loss: Series = field(default_factory=Series)
    held_out_loss: Series = field(default_factory=Series)
    perplexity: Series = field(default_factory=Series)
    learning_rate: Series = field(default_factory=Series)
    speed: Series = field(default_factory=Series)
    """Tokens per second by update."""
    peak_share: Series = field(default_factory=Series)
    pruning_loss: Series = field(default_factory=Series)
    """By iteration."""
    lines: deque[Line] = field(default_factory=lambda: deque(maxlen=LINES))
    told: int = 0
    """Lines so far: also those that are kept no more."""
    gaps: int = 0
    """Lines of the log that could not be read."""
    end: RunFinished | RunFailed | None = None
    last: float = 0.0
    """When the worker last told of its work."""

    # ---- made of events

    def apply(self, event: Event) -> None:
        """Take in what an event says. One that holds nonsense is counted as a gap."""
        try:
            getattr(self, f"_{event.kind}", lambda _event: None)(event)
            if not isinstance(event, Note):  # those about damage are of the reader's time
                self.last = max(self.last, float(event.time))
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            self.gaps += 1
            self._say(self.last, f"an event of the log was skipped: {error}", "warning")

    def recall(self, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Fill in what the log does not say, from ``state.json``: {stage: {"seconds", "result"}}."""
        if not self.stages:
            self.stages = [
                Stage(n, t, "done" if n in results else "waiting") for n, t in TITLES.items()
            ]
        for stage in self.stages:
            entry = results.get(stage.name)
            if entry is not None and stage.state == "done":
                with suppress(TypeError, ValueError, LookupError, AttributeError):
                    self._recall(stage, entry)

    def _recall(self, stage: Stage, entry: Mapping[str, Any]) -> None:
        if stage.seconds is None:
            stage.seconds = float(entry["seconds"])
        unknown = {"source": self.dense is None, "prune": self.present is None}
        if unknown.get(stage.name):
            self._learn(stage.name, entry["result"])

    def _run_started(self, event: RunStarted) -> None:
        finished, known = set(event.finished), {stage.name: stage for stage in self.stages}
        stages = []
        for name in event.stages:
            stage = known.get(name) if name in finished else None
            stage = stage or Stage(name, title_of(name))
            stage.state = "done" if name in finished else "waiting"
            stages.append(stage)
        self.stages, self.end = stages, None
        if finished:
            titles = ", ".join(stage.title for stage in stages if stage.state == "done")
            self._say(event.time, f"going on after: {titles}")

    def _stage_started(self, event: StageStarted) -> None:
        for stage in self.stages:
            if stage.state == "at work":  # its end is not in the log
                stage.state = "done"
        stage = self._stage(event.stage)
        stage.title = str(event.title or stage.title)
        stage.state, stage.started, stage.seconds = "at work", float(event.time), None
        stage.gauges, stage.unit = {}, ""
        self._say(event.time, f"{stage.title} ...")

    def _stage_finished(self, event: StageFinished) -> None:
        stage = self._stage(event.stage)
        stage.state, stage.seconds = "done", float(event.seconds)
        self._say(event.time, f"{stage.title}: done in {format_seconds(event.seconds)}")
        self._learn(event.stage, event.result)

    def _run_finished(self, event: RunFinished) -> None:
        self.end = event
        self._say(event.time, f"finished: {format_seconds(event.seconds)} of work")

    def _run_failed(self, event: RunFailed) -> None:
        self.end = event
        stopped = event.exit_code == worker.INTERRUPTED
        for stage in self.stages:
            if stage.state == "at work":
                stage.state = "stopped" if stopped else "failed"
                stage.seconds = max(0.0, event.time - (stage.started or event.time))
        self._say(event.time, event.error, "info" if stopped else "error")

    def _progress(self, event: Progress) -> None:
        self._move(event.stage, int(event.done), int(event.total), event)

    def _train_step(self, event: TrainStep) -> None:
        step = int(event.step)
        of = {
            "training_loss": event.loss,
            "learning_rate": event.learning_rate,
            "speed": event.tokens_per_second,
            "peak_share": event.peak_share,
        }
        for name, value in of.items():
            if value is not None:
                getattr(self, name).add(step, float(value))
        at_work = self.at_work
        if at_work is not None:
            gauge = self._move(at_work.name, step, int(event.of), event)
            gauge.told = float(event.seconds_left)

    def _evaluation(self, event: Evaluation) -> None:
        self.held_out_loss.add(int(event.step), float(event.loss))
        self.perplexity.add(int(event.step), float(event.perplexity))
        text = f"after update {event.step:,}: held-out perplexity {event.perplexity:.4g}"
        self._say(event.time, text)

    def _prune_iteration(self, event: PruneIteration) -> None:
        loss, left = float(event.loss), int(event.decoder_parameters)
        widths = Widths(
            [int(n) for n in event.num_key_value_heads], [int(n) for n in event.intermediate_size]
        )
        importance = [float(x) for x in event.layer_importance]
        self.sparsity = [float(x) for x in event.layer_sparsity]
        self.present, self.importance, self.decoder_parameters = widths, importance, left
        self.iteration, self.iterations = int(event.iteration), int(event.of)
        self.pruning_loss.add(self.iteration, loss)
        text = f"iteration {event.iteration} of {event.of}: loss {loss:.2f}, "
        self._say(event.time, f"{text}{format_count(left)} left")

    def _note(self, event: Note) -> None:
        warning = event.level != "info"
        if warning and "the line at byte" in event.text:  # of log.LogReader
            self.gaps += 1
        self._say(event.time, event.text, "warning" if warning else "info")

    def _say(self, time: float, text: str, level: Level = "info") -> None:
        self.lines.append(Line(float(time), str(text), level))
        self.told += 1

    def _stage(self, name: str) -> Stage:
        """Return a stage; one that the log did not announce is added."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        self.stages.append(Stage(name, title_of(name)))
        return self.stages[-1]

    def _move(self, name: str, done: int, total: int, event: Progress | TrainStep) -> Gauge:
        stage = self._stage(name)
        if isinstance(event, Progress):
            unit, note = event.unit, event.note
        else:
            unit = "updates"
            note = f"loss {event.loss:.2f}, {event.tokens_per_second:,.0f} tokens/s"
        at, old = float(event.time), stage.gauges.get(unit)
        if old is None or old.total != total or done < old.done:
            stage.gauges[unit] = Gauge(done, total, unit, note, done, at, at)
        else:
            old.done, old.note, old.at = done, note, at
        stage.unit = unit
        return stage.gauges[unit]

    def _learn(self, stage: str, result: Mapping[str, Any]) -> None:
        """Take the layers' widths from a stage's result: of the dense model, or of the pruned one."""
        if stage not in ("source", "prune") or "inspection" not in result:
            return
        layers = result["inspection"]["layers"]
        widths = Widths(
            [int(layer["num_key_value_heads"]) for layer in layers],
            [int(layer["intermediate_size"]) for layer in layers],
        )
        if stage == "source":
            self.dense = widths
        else:
            self.present = widths

    # ---- what it shows

    @property
    def at_work(self) -> Stage | None:
        """The stage at work."""
        return next((stage for stage in self.stages if stage.state == "at work"), None)

    @property
    def waiting(self) -> int:
        """How many stages are still to begin."""
        return sum(stage.state == "waiting" for stage in self.stages)

    def worked(self, now: float) -> float:
        """Return the seconds of work so far: finished stages, and that at work or ended early until ``now``."""
        done = sum(stage.seconds or 0.0 for stage in self.stages)
        stage = self.at_work
        if stage is None or stage.started is None:
            return done
        return done + max(0.0, now - stage.started)

    def left(self, now: float) -> float | None:
        """Return the seconds that are known to be left: no fewer will be; None if nothing is known."""
        stage = self.at_work
        if stage is None or stage.gauge is None:
            return None
        return stage.gauge.left(now)

    @property
    def layers(self) -> list[Layer]:
        """The decoder layers as they are now; none before the model is known."""
        present, dense = self.present or self.dense, self.dense
        if present is None:
            return []
        return [
            Layer(
                index,
                heads,
                _at(dense.heads if dense else [], index),
                channels,
                _at(dense.channels if dense else [], index),
                _at(self.importance, index),
                _at(self.sparsity, index),
            )
            for index, (heads, channels) in enumerate(
                zip(present.heads, present.channels, strict=False)
            )
        ]


def picture_of(events: Iterable[Event]) -> Picture:
    """Return what ``events`` come to."""
    picture = Picture()
    for event in events:
        picture.apply(event)
    return picture


def title_of(stage: str) -> str:
    """Return a stage's name for people."""
    words = str(stage).replace("-", " ").replace("_", " ")
    return TITLES.get(stage, words[:1].upper() + words[1:])


def thinned(points: list[Point], most: int) -> list[Point]:
    """Return at most about ``most`` of ``points``, the last among them: no more than a screen can show."""
    step = max(1, math.ceil(len(points) / max(1, most)))
    kept = points[::step]
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def _at(values: list[Number], index: int) -> Number | None:
    return values[index] if index < len(values) else None


# ---- its end


UNKNOWN = ("unknown", "read worker.log in the run's folder, then resume")
CAUSES = (
    (
        ("disk is full", "no space left"),
        "the disk is full",
        "free some space, then resume: what is finished is kept",
    ),
    (
        ("--memory-budget",),
        "the model needs more memory than this run may take",
        "close other programs, or begin a new run with the budget that the message names",
    ),
    (
        (
            "out of memory",
            "sigkill",
            "cannot allocate memory",
            "can't allocate memory",
            "memoryerror",
            "bad_alloc",
        ),
        "out of memory",
        "close other programs and resume; if it comes again, begin a new run with a smaller memory_budget "
        "under [prune], or micro_batch = 1 under [recover]",
    ),
    (
        ("is not a number", "exploded"),
        "the training became unstable",
        "go back as the message says, with a lower learning_rate under [recover]",
    ),
    (
        ("is gated",),
        "the model's terms are not accepted",
        "accept them on its page on the Hub, run `hf auth login`, then resume",
    ),
    (
        ("hub cannot be reached", "hub did not deliver", "downloading '", "hf_hub_offline is set"),
        "the Hugging Face Hub cannot be reached",
        "check the network and HF_HUB_OFFLINE, then resume: the download goes on where it was",
    ),
    (
        ("cannot be reached", "does not answer within", "the link broke"),
        "another machine cannot be reached",
        "see what is wrong with it under Hosts, then resume: it goes on where it was",
    ),
    (
        ("is not known yet:", "has changed:", "accepts no key of yours", "no such host"),
        "another machine is not known, or does not know you",
        "do what the message says, check the machine under Hosts, then resume",
    ),
    (
        (
            "no such model",
            "not a causal language model",
            "quantized already",
            "pickles are never loaded",
            "cannot be loaded",
            "holds no model",
            "no model_type",
            "cannot be pruned yet",
            "has no tokenizer",
            "cut short",
            "config.json is not valid",
        ),
        "the model was refused",
        "do what the message says, or begin a new run with another model",
    ),
    (
        ("gone without a word", "was ended by sig"),
        "killed from outside: for want of memory, by somebody, or as the machine went down",
        "see that memory is free, then resume: what is finished is kept",
    ),
)
"""What an error says, why it probably came, and what to do. The first that fits counts."""


def cause(error: str, last_words: str) -> tuple[str, str]:
    """Return the likely cause of a run's end and what to do, from its error and its libraries' last line."""
    for said in (error.lower(), last_words.lower()):
        for words, why, remedy in CAUSES:
            if any(word in said for word in words):
                return why, remedy
    return UNKNOWN


def kept(picture: Picture) -> list[str]:
    """Return in lines what stays of a run that is stopped now, and what is to be done again."""
    done = [stage.title for stage in picture.stages if stage.state == "done"]
    lines = [f"Finished stages stay: {', '.join(done)}." if done else "No stage is finished yet."]
    stage = picture.at_work
    if stage is None:
        return lines
    if stage.name != "prune":
        return [*lines, f'"{stage.title}" begins anew when the run goes on.']
    if picture.iteration:
        of = f"{picture.iteration} of {picture.iterations}"
        lines.append(f"Pruning iterations stay: {of}, and of the one at work what is on disk.")
    else:
        lines.append("Of the pruning iteration at work, what is on disk stays.")
    if picture.training_loss.points:
        lines.append(
            "Training goes on from its last checkpoint; updates after it are made again "
            "(minutes under [recover] in the recipe is the time between two)."
        )
    return lines
