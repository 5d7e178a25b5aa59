"""What one of several processes does that prune and train in turns, for ``test_distributed.py``."""

from pathlib import Path

import torch

from edgeprune import machine
from edgeprune.recovery import recover
from edgeprune.recovery.settings import Training

TRAINING = Training(
    tokens=4 * 4 * 32,
    length=32,
    batch=4,
    micro_batch=1,
    learning_rate=1e-3,
    min_learning_rate=1e-4,
    distill=0.3,
    evaluations=1,
)


def interleave(folder: Path, name: str, **others) -> dict:
    """Prune and train in two stages; return what is said of the result."""
    return recover.prune_and_recover(
        folder / "dense",
        folder / name,
        target={"sparsity": 0.4},
        pruning={
            "iterations": 2,
            "samples": 4,
            "length": 16,
            "repair_samples": 4,
            "width_multiple": 8,
        },
        data=["builtin"],
        training=TRAINING,
        interleavings=2,
        held_out=100,
        work=folder / f"{name}-work",
        cache=folder / "cache",
        **others,
    )


def main(folder: Path) -> None:
    """Prune FOLDER/dense to FOLDER/replicated and FOLDER/sharded, one after the other."""
    machine.compute_dtype = lambda *_: torch.float32
    interleave(folder, "replicated")
    interleave(folder, "sharded", sharded=True)
