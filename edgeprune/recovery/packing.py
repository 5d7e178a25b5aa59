"""Packed sequences of token ids, ready to train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Sequences of token ids, all tensors int64 of shape (rows, length).

    ``labels`` are the next token at each place, -100 where that is of another document or padding; ``positions``
    restart at 0 at each document; ``documents`` number the documents within their row.
    """

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    documents: Tensor


class Packed(Protocol):
    """Where the trainer gets its sequences from."""

    length: int

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int]) -> Batch:
        """Return the sequences of these numbers."""
        ...
