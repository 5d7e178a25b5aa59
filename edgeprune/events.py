"""What long work reports: typed events, one JSON object a line in an append-only log.

The engine calls ``emit(event)`` and knows no screen. The command line, the terminal app and a
remote run all read the same events, live from a callback or later from the log.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar


@dataclass(kw_only=True)
class Event:
    """Base of all events. ``time`` is seconds since the epoch.

    Of an event that another machine's log told, ``far_offset`` is the byte after it in that log; else 0.
    """

    kind: ClassVar[str] = "event"
    time: float = field(default_factory=time.time)
    far_offset: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the event as plain JSON values, ``kind`` included."""
        data = {"kind": self.kind, **asdict(self)}
        if not self.far_offset:
            del data["far_offset"]
        return data


@dataclass(kw_only=True)
class StageStarted(Event):
    """A stage of the work begins: ``index`` counts from 1 to ``of``."""

    kind: ClassVar[str] = "stage_started"
    stage: str
    title: str = ""
    index: int = 1
    of: int = 1


@dataclass(kw_only=True)
class Progress(Event):
    """``done`` of ``total`` ``unit`` in a stage; ``total`` is 0 where it is not known."""

    kind: ClassVar[str] = "progress"
    stage: str
    done: int
    total: int
    unit: str = ""
    note: str = ""


@dataclass(kw_only=True)
class PruneIteration(Event):
    """One pruning iteration is over. The lists have one entry a decoder layer."""

    kind: ClassVar[str] = "prune_iteration"
    iteration: int
    of: int
    loss: float
    decoder_parameters: int
    layer_importance: list[float]
    layer_sparsity: list[float]
    num_key_value_heads: list[int]
    intermediate_size: list[int]
    seconds: float


@dataclass(kw_only=True)
class TrainStep(Event):
    """One update of the weights is made: ``step`` of ``of``, counted from 1 over all stages.

    ``loss`` is what was minimised, nats a token, mean over the batch: ``lm_loss`` is its cross-entropy and ``kl`` the
    divergence from the teacher (None without one). ``gradient_norm`` is that before clipping. ``tokens`` were trained
    on so far, at ``tokens_per_second`` in this step. ``peak_share`` is what the matrix products that the step needs
    (6 x parameters x tokens, and 2 x for the teacher's) take of the fastest that the device was measured to do;
    None where that was not measured. ``seconds_left`` is for the steps that remain.
    """

    kind: ClassVar[str] = "train_step"
    step: int
    of: int
    loss: float
    lm_loss: float
    kl: float | None = None
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    peak_share: float | None = None
    seconds_left: float


@dataclass(kw_only=True)
class Evaluation(Event):
    """The held-out text was measured after ``step`` updates.

    ``loss`` is in nats a token, ``perplexity`` its exponential, ``tokens`` how many were predicted.
    """

    kind: ClassVar[str] = "evaluation"
    step: int
    loss: float
    perplexity: float
    tokens: int


@dataclass(kw_only=True)
class Note(Event):
    """A line for people; ``level`` is ``info`` or ``warning``."""

    kind: ClassVar[str] = "note"
    text: str
    level: str = "info"


@dataclass(kw_only=True)
class StageFinished(Event):
    """A stage is done. ``result`` holds its figures as plain JSON values."""

    kind: ClassVar[str] = "stage_finished"
    stage: str
    seconds: float
    result: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class RunStarted(Event):
    """A run's worker is at work. ``finished`` names the stages that an earlier worker completed."""

    kind: ClassVar[str] = "run_started"
    folder: str
    stages: list[str]
    finished: list[str] = field(default_factory=list)
    pid: int = 0


@dataclass(kw_only=True)
class RunFinished(Event):
    """The run is complete: ``results`` is the file of figures, ``report`` the page for people."""

    kind: ClassVar[str] = "run_finished"
    results: str
    report: str
    seconds: float


@dataclass(kw_only=True)
class RunFailed(Event):
    """The run ended early, for the one-line reason ``error``; ``next`` is the command to type."""

    kind: ClassVar[str] = "run_failed"
    error: str
    exit_code: int = 1
    next: str = ""


Emit = Callable[[Event], None]


def ignore(_event: Event) -> None:
    """Drop the event: the default listener."""


def event_from_json(data: dict[str, Any]) -> Event:
    """Return the event that ``to_json`` wrote; fields that only a newer version knows are dropped.

    Raises:
        ValueError: if ``data`` is no event of this version.
    """
    types = {cls.kind: cls for cls in Event.__subclasses__()}
    cls = types.get(data.get("kind", ""))
    if cls is None:
        raise ValueError(f"unknown kind of event: {data.get('kind')!r}")
    known = {f.name for f in fields(cls)}
    try:
        return cls(**{key: value for key, value in data.items() if key in known})
    except TypeError as error:
        raise ValueError(f"not a complete {cls.kind} event: {error}") from None
