"""Packed sequences in memory for the trainer's tests, and what they are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgeprune.recovery.packing import Batch


@dataclass
class InMemory:
    """``Packed`` from tensors: token ids and the numbers of the documents, both (sequences, length)."""

    ids: Tensor
    documents: Tensor

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows) -> Batch:
        rows = list(rows)
        ids, documents = self.ids[rows], self.documents[rows]
        labels = torch.full_like(ids, -100)
        same = documents[:, 1:] == documents[:, :-1]
        labels[:, :-1] = torch.where(same, ids[:, 1:], -100)
        positions = torch.zeros_like(ids)
        for i in range(1, ids.shape[1]):
            positions[:, i] = (positions[:, i - 1] + 1) * (documents[:, i] == documents[:, i - 1])
        return Batch(ids, labels, positions, documents)


def packed(sequences=16, length=32, seed=0, vocabulary=320) -> InMemory:
    """Sequences that can be learnt (each token follows from the one before), with two documents each."""
    chance = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (sequences, length), generator=chance)
    for i in range(1, length):
        ids[:, i] = torch.where(ids[:, i] % 4 > 0, (ids[:, i - 1] * 7 + 1) % 64 + 3, ids[:, i])
    cut = torch.randint(4, length - 4, (sequences, 1), generator=chance)
    return InMemory(ids, (torch.arange(length) >= cut).long())
