"""A training in a process of its own that is killed by SIGKILL after a given step, for ``test_trainer.py``.

Usage: killed_trainer.py FOLDER STEP. The checkpoints are in FOLDER.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from edgeprune import machine
from edgeprune.events import TrainStep
from edgeprune.recovery import checkpoints
from edgeprune.recovery.settings import Training
from edgeprune.recovery.trainer import Trainer
from tests import tiny
from tests.packed import packed

SETTINGS = Training(
    tokens=8 * 4 * 32, length=32, batch=4, micro_batch=2, learning_rate=1e-3, min_learning_rate=1e-4
)


def train(
    folder: Path | None, last: int = 0
) -> tuple[list[tuple[int, float, float]], dict[str, torch.Tensor]]:
    """Return what was told of each step, and the weights; goes on where checkpoints in ``folder`` end."""
    told = []

    def emit(event) -> None:
        if isinstance(event, TrainStep):
            told.append((event.step, event.loss, event.gradient_norm))
            if event.step == last:
                os.kill(os.getpid(), signal.SIGKILL)

    # a checkpoint after each step: minutes=0
    trainer = Trainer(
        tiny.model("llama"), SETTINGS, packed(), folder=folder, minutes=0.0, emit=emit
    )
    if folder is not None and checkpoints.latest(folder):
        trainer.load(folder)
    trainer.run()
    return told, trainer.weights()


if __name__ == "__main__":
    machine.compute_dtype = lambda *_: torch.bfloat16
    train(Path(sys.argv[1]), int(sys.argv[2]))
