"""What a run has decided after each iteration, in a file that survives the process."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from edgeprune import tensor_files
from edgeprune.events import Emit, Note
from edgeprune.groups import HALVES, Kept
from edgeprune.iterations import PruneRun


def save(run: PruneRun, path: Path, what: str) -> None:
    """Write what is decided so far, atomically."""
    tensors: dict[str, Tensor] = {}
    for half in HALVES:
        for i, kept in enumerate(run.kept):
            tensors[f"kept.{half}.{i}"] = kept.of(half)
            tensors[f"memory.{half}.{i}"] = run.memory[half][i]
    tensors["layer_memory"] = torch.tensor(run.layer_memory, dtype=torch.float64)
    tensors["planned"] = torch.tensor(run.planned, dtype=torch.float64)
    tensors["losses"] = torch.tensor(run.losses, dtype=torch.float64)
    tensors["weight"] = torch.tensor(run.weight, dtype=torch.float64)
    tensor_files.write(path, tensors, what)


def load(run: PruneRun, path: Path, what: str, emit: Emit) -> None:
    """Go on from a state file; one of other work is not used."""
    try:
        found = tensor_files.read(path, what)
    except tensor_files.UnusableError as error:
        emit(Note(text=f"{path} {error}; starting anew", level="warning"))
        return
    layers = range(len(run.groups))
    run.kept = [Kept(*(found[f"kept.{half}.{i}"] for half in HALVES)) for i in layers]
    run.memory = {h: [found[f"memory.{h}.{i}"] for i in layers] for h in HALVES}
    run.layer_memory = found["layer_memory"].tolist()
    run.planned = found["planned"].tolist()
    run.losses = found["losses"].tolist()
    run.weight = float(found["weight"])
    emit(Note(text=f"going on after iteration {len(run.losses)} of {run.options.iterations}"))


# ---- what a finished run has kept

KEPT = "what is kept of each decoder layer"


def write_kept(path: Path, kept: list[Kept]) -> None:
    """Write the numbers of the groups that each layer keeps."""
    numbers = {f"{i}.{half}": k.of(half) for i, k in enumerate(kept) for half in HALVES}
    tensor_files.write(path, numbers, KEPT)


def read_kept(path: Path) -> list[Kept]:
    """Read what ``write_kept`` wrote. UnusableError if it is damaged."""
    found = tensor_files.read(path, KEPT)
    layers = len(found) // len(HALVES)
    return [Kept(*(found[f"{i}.{half}"] for half in HALVES)) for i in range(layers)]
