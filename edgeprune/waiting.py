"""The layers' inputs while they wait for a pass's way back, and where the pass stands if its process is killed."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from edgeprune import tensor_files
from edgeprune.events import Emit, Note, ignore

MARK = "mark.safetensors"


@dataclass
class Mark:
    """Where a pass stands, layer by layer.

    ``done`` counts layers, forward and then backward; ``streams`` are what the next one gets, (batch, length, hidden
    size) a micro batch: hidden states on the way forward and gradients on the way back. ``loss`` is the sum over all
    tokens, known once the way back begins. ``figures`` are what the pass's watcher has found so far.
    """

    done: int
    streams: list[Tensor]
    loss: float = 0.0
    figures: dict[str, Tensor] = field(default_factory=dict)


class Waiting:
    """A stack of lists of tensors, in memory up to ``hold`` bytes and beyond that in files.

    One with a name outlives the process: now and then (``keep``) all of it is in the folder, with a mark of where the
    pass stands, from which ``resume`` goes on. ``clear`` removes that; nothing else does.

    Args:
        hold: bytes to hold in memory; None: all.
        folder: for the files, made when it is needed; by default a temporary one.
        what: names the pass; None: nothing outlives the process.
        every: seconds between two marks at least.
        emit: hears of files that cannot be used.
    """

    def __init__(
        self,
        hold: int | None = None,
        folder: Path | None = None,
        what: str | None = None,
        *,
        every: float = 0.0,
        emit: Emit = ignore,
    ) -> None:
        self._room, self._folder, self._what = hold, folder, what
        self._every, self._emit = every, emit
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._stack: list[list[Tensor] | None] = []  # None: in its file alone
        self._written: set[int] = set()
        self._kept = time.monotonic()

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()
        elif self._what is None:
            self.clear()

    def push(self, tensors: list[Tensor]) -> None:
        """Put a list on top. The tensors must not change afterwards."""
        size = sum(t.nbytes for t in tensors)
        if self._room is None or size <= self._room:
            if self._room is not None:
                self._room -= size
            self._stack.append(list(tensors))
            return
        self._write(len(self._stack), tensors)
        self._stack.append(None)

    def pop(self) -> list[Tensor]:
        """Take the list on top; on the CPU if it comes from a file."""
        held, number = self._stack.pop(), len(self._stack)
        if held is not None:
            return held
        try:
            return _listed(tensor_files.read(self._file(number), self._what or ""))
        except tensor_files.UnusableError as error:
            raise OSError(f"{self._file(number)} {error}") from error

    def due(self) -> bool:
        """Whether it is time for another mark."""
        return self._what is not None and time.monotonic() - self._kept >= self._every

    def keep(self, mark: Mark) -> None:
        """Have all that waits on the disk, and ``mark`` beside it."""
        for number, held in enumerate(self._stack):
            if number not in self._written and held is not None:
                self._write(number, held)
        numbers = {"done": mark.done, "loss": mark.loss, "waiting": len(self._stack)}
        tensors = {f"stream.{n}": each for n, each in enumerate(mark.streams)}
        tensors |= {f"number.{name}": _float64(value) for name, value in numbers.items()}
        tensors |= {f"figure.{name}": each for name, each in mark.figures.items()}
        tensor_files.write(self._place() / MARK, tensors, self._what or "")
        self._kept = time.monotonic()

    def resume(self) -> Mark | None:
        """Return where a process before this one stood in this very pass, and take its stack; None if nowhere.

        What is there of another pass, or damaged, is removed.
        """
        if self._what is None or self._folder is None or not self._folder.is_dir():
            return None
        at = marked = self._folder / MARK
        try:
            found = tensor_files.read(at, self._what)
            waiting = int(found["number.waiting"])
            for number in range(waiting):
                at = self._file(number)
                tensor_files.check(at, self._what)
        except tensor_files.UnusableError as error:
            if marked.exists():  # a process may also have been killed before its first mark
                self._emit(Note(text=f"{at} {error}; the iteration starts anew", level="warning"))
            self.clear()
            return None
        self._stack, self._written = [None] * waiting, set(range(waiting))
        done = int(found["number.done"])
        self._emit(Note(text=f"going on after {done} layer passes of the iteration"))
        return Mark(
            done,
            _listed(_under("stream.", found)),
            float(found["number.loss"]),
            _under("figure.", found),
        )

    def clear(self) -> None:
        """Remove what is in the folder."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, number: int, tensors: list[Tensor]) -> None:
        content = {str(n): each for n, each in enumerate(tensors)}
        tensor_files.write(self._file(number), content, self._what or "")
        self._written.add(number)

    def _file(self, number: int) -> Path:
        return self._place() / f"inputs-{number:04}.safetensors"

    def _place(self) -> Path:
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory()
            self._folder = Path(self._temporary.name)
        return self._folder


def _float64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _listed(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [tensors[str(n)] for n in range(len(tensors))]
