"""The course of a training as files that TensorBoard shows: ``tensorboard --logdir FOLDER``.

TensorBoard has one count of steps for all that is in a folder, and a process that went back to a checkpoint hides what
an earlier one wrote from its first step on. So updates of the training, in FOLDER, and iterations of the pruning, in
FOLDER/pruning, are apart.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeprune.errors import BadInput
from edgeprune.events import Emit, Evaluation, Event, Note, PruneIteration, TrainStep

TRAINING, PRUNING = ".", "pruning"
OF_A_STEP = (
    "loss",
    "lm_loss",
    "kl",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    "peak_share",
)


def check_folder(folder: Path, *not_in: Path | None) -> None:
    """Raise BadInput if ``folder`` is a file, or in a folder that must stay empty or is removed at the end."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; name another folder with --tensorboard DIR")
    for other in not_in:
        if other is not None and folder.resolve().is_relative_to(other.resolve()):
            raise BadInput(
                f"{folder} is in {other}, which is no place for other files; name another folder with "
                "--tensorboard DIR"
            )


@contextmanager
def recorded(folder: Path | None, emit: Emit) -> Iterator[Emit]:
    """Give an ``Emit`` that passes events on to ``emit`` and writes their figures into ``folder``, if there is one."""
    if folder is None:
        yield emit
        return
    board = TensorBoard(folder, emit)
    try:
        yield board
    finally:
        board.close()


class TensorBoard:
    """Passes events on and appends their figures to ``folder``, each with its event's time; an instance is an ``Emit``.

    By update ``train/loss``, ``train/lm_loss``, ``train/kl``, ``train/learning_rate``, ``train/gradient_norm``,
    ``train/tokens_per_second``, ``train/peak_share``, ``held_out/loss`` and ``held_out/perplexity``; by iteration
    ``prune/loss``, ``prune/sparsity`` (mean over the decoder layers) and ``prune/decoder_parameters``. Units are those
    of the events.

    A disk that fails is told in one warning, and nothing more is written: it is no reason to stop a training.
    """

    def __init__(self, folder: Path, emit: Emit) -> None:
        self._folder, self._emit = folder.absolute(), emit
        self._writers: dict[str, Any] = {}
        self._failed = False

    def __call__(self, event: Event) -> None:
        """Pass ``event`` on; write its figures."""
        self._emit(event)
        with self._forgiven():
            self._write(event)

    def close(self) -> None:
        """Flush to the disk and close."""
        with self._forgiven():
            while self._writers:
                self._writers.popitem()[1].close()

    @contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._failed = True
            self._writers.clear()
            text = (
                f"{self._folder}: cannot be written: {error.strerror}; the training goes on without"
            )
            self._emit(Note(level="warning", text=f"{text} its figures for TensorBoard"))

    def _write(self, event: Event) -> None:
        found = _figures(event)
        if found is None or self._failed:
            return
        from tensorboardX.proto.event_pb2 import Event as Record
        from tensorboardX.proto.summary_pb2 import Summary

        run, step, figures = found
        # A loss held out is measured after its update, whose own figures a process that goes on from there keeps.
        first = step + 1 if isinstance(event, Evaluation) else step
        values = [
            Summary.Value(tag=tag, simple_value=value)
            for tag, value in figures.items()
            if value is not None
        ]
        record = Record(wall_time=event.time, step=step, summary=Summary(value=values))
        writer = self._writer(run, event.time, first)
        writer.write_event(record)
        writer.flush()  # at once: the checkpoint that comes next may be what a killed run goes on from

    def _writer(self, run: str, now: float, first: int) -> Any:
        """Return what appends to a run; what is there of ``first`` and later is of a process that was ended."""
        if run in self._writers:
            return self._writers[run]
        # Not SummaryWriter: it writes in a thread, and when that dies of a full disk the training waits for it forever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event as Record
        from tensorboardX.proto.event_pb2 import SessionLog

        folder = self._folder / run
        folder.mkdir(parents=True, exist_ok=True)
        # the name has but seconds, and the file of an earlier process must not be overwritten
        writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        started = SessionLog(status=SessionLog.START)
        writer.write_event(Record(wall_time=now, step=first, session_log=started))
        self._writers[run] = writer
        return writer


def _figures(event: Event) -> tuple[str, int, dict[str, float | None]] | None:
    """Return the run and step that an event belongs to and its figures by tag; None if it has none."""
    if isinstance(event, TrainStep):
        return TRAINING, event.step, {f"train/{name}": getattr(event, name) for name in OF_A_STEP}
    if isinstance(event, Evaluation):
        figures = {"held_out/loss": event.loss, "held_out/perplexity": event.perplexity}
        return TRAINING, event.step, dict(figures)
    if isinstance(event, PruneIteration):
        sparsity = sum(event.layer_sparsity) / len(event.layer_sparsity)
        return (
            PRUNING,
            event.iteration,
            {
                "prune/loss": event.loss,
                "prune/sparsity": sparsity,
                "prune/decoder_parameters": event.decoder_parameters,
            },
        )
    return None
