"""Initializers that are computed when they are written, so that no graph ever holds its weights.

The builder registers them with their shape and type; onnx_ir writes one initializer after the other and
asks for the values only then. A quantized matrix is three of them, written next to each other, so that
the matrix that was quantized last is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import ceil
from typing import Any, BinaryIO

import numpy as np
import torch

from edgeprune import mapped
from edgeprune.exporters.quantize import Blocks, joined, quantize

# Values that are converted at once.
_PIECE = 1 << 24


class Deferred:
    """Values of an initializer to come: ``dtype`` is torch's, ``pieces`` yields arrays in file order."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        pieces: Callable[[], Iterator[torch.Tensor]],
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.pieces = pieces

    # what onnx_ir asks of a tensor

    def tofile(self, file: BinaryIO) -> None:
        """Write the bytes of the values."""
        for piece in self.pieces():
            file.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)

    def numpy(self) -> Any:
        """Return all values at once."""
        values = [piece.contiguous().view(-1) for piece in self.pieces()]
        return torch.cat(values).view(self.shape).numpy()

    def tobytes(self) -> bytes:
        """Return the bytes of the values."""
        return np.ascontiguousarray(self.numpy()).tobytes()


class Matrix:
    """A weight (rows, columns) made of one or more tensors, one below the other."""

    def __init__(self, *parts: torch.Tensor) -> None:
        self.parts = [part.detach() for part in parts]
        self.shape = (sum(len(part) for part in parts), parts[0].shape[1])

    def release(self) -> None:
        """Give the memory of mapped parts back."""
        for part in self.parts:
            mapped.release(part)

    def floats(self, dtype: torch.dtype, *, transposed: bool) -> Deferred:
        """Return the values in ``dtype``, (columns, rows) where ``transposed``."""
        shape = self.shape[::-1] if transposed else self.shape
        return Deferred(shape, dtype, partial(self._pieces, dtype, transposed))

    def _pieces(self, dtype: torch.dtype, transposed: bool) -> Iterator[torch.Tensor]:
        for part in self.parts:
            mapped.prefetch(part)
        rows, columns = self.shape
        if transposed:
            step = max(1, _PIECE // rows)
            for first in range(0, columns, step):
                stripes = [part[:, first : first + step].to(dtype) for part in self.parts]
                yield torch.cat(stripes).T
        else:
            for part in self.parts:
                for piece in part.split(max(1, _PIECE // columns)):
                    yield piece.to(dtype)
        self.release()


class DeferredBlocks:
    """A matrix that is quantized when its values are first asked for."""

    _latest: tuple[DeferredBlocks, Blocks] | None = None

    def __init__(self, matrix: Matrix, bits: int, block: int) -> None:
        self._matrix = matrix
        self.bits, self.block = bits, block
        self.rows, self.columns = matrix.shape
        count = ceil(self.columns / block)
        self.row_bytes = count * block * bits // 8
        self.weight = self._field("weight", (self.rows, count, block * bits // 8), torch.uint8)
        self.scales = self._field("scales", (self.rows, count), torch.float32)
        self.zeros = None
        if bits == 4:
            self.zeros = self._field("zeros", (self.rows, ceil(count / 2)), torch.uint8)

    def _field(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Deferred:
        return Deferred(shape, dtype, lambda: iter([getattr(self._blocks(), name)]))

    def _blocks(self) -> Blocks:
        latest = DeferredBlocks._latest
        if latest is None or latest[0] is not self:
            forget()
            for part in self._matrix.parts:
                mapped.prefetch(part)
            parts = [quantize(part, self.bits, self.block) for part in self._matrix.parts]
            latest = DeferredBlocks._latest = (self, joined(parts))
            self._matrix.release()
        return latest[1]


def forget() -> None:
    """Drop the matrix that was quantized last."""
    DeferredBlocks._latest = None
