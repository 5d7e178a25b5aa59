"""A training in a process of its own that is killed by SIGKILL after a given step, for ``test_trainer.py``.

Usage: killed_trainer.py FOLDER STEP. The checkpoints are in FOLDER, where the training goes on if there are any. With
STEP 0 it is not killed, and compares what came out with a training that was never stopped.
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

machine.compute_dtype = lambda *_: torch.bfloat16
SETTINGS = Training(
    tokens=8 * 4 * 32, length=32, batch=4, micro_batch=2, learning_rate=1e-3, min_learning_rate=1e-4
)


def train(
    folder: Path | None, last: int
) -> tuple[list[tuple[int, float, float]], dict[str, torch.Tensor]]:
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


def main(folder: Path, last: int) -> None:
    told, weights = train(folder, last)
    whole, expected = train(None, 0)
    same = told == whole[-len(told) :] and len(told) < len(whole)
    same &= all(torch.equal(weights[name], expected[name]) for name in expected)
    print("the same" if same else f"different: {told} {whole}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
