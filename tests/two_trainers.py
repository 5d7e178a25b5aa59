"""One process of several that train together, for ``test_trainer_distributed.py``; started by torchrun.

Usage: two_trainers.py FOLDER. The main process writes the losses of each way to FOLDER/losses.json.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from edgeprune import machine
from edgeprune.events import Evaluation, TrainStep
from edgeprune.recovery.settings import Training
from edgeprune.recovery.trainer import Trainer
from tests import tiny
from tests.packed import packed

SETTINGS = Training(
    tokens=6 * 8 * 32,
    length=32,
    batch=8,
    micro_batch=3,
    learning_rate=1e-3,
    min_learning_rate=1e-4,
    distill=0.3,
    evaluations=1,
)


def train(accelerator=None, folder=None, stop=6, **ways):
    """Return the losses of the steps and the held-out loss at the end."""
    told = []

    def emit(event) -> None:
        if isinstance(event, TrainStep | Evaluation):
            told.append(event.loss)

    trainer = Trainer(
        tiny.model("llama"),
        SETTINGS,
        packed(),
        teacher=tiny.model("llama", seed=1),
        held_out=packed(5, seed=1),
        folder=folder,
        emit=emit,
        accelerator=accelerator,
        **ways,
    )
    if folder is not None and folder.exists():
        trainer.load(folder)
    trainer.run(until=stop)
    return told


def main(folder: Path) -> None:
    machine.compute_dtype = lambda *_: torch.float32
    accelerator = Accelerator(cpu=True)
    found = {"replicated": train(accelerator)}
    spread = train(accelerator, folder / "kept", stop=3, sharded=True)
    accelerator.wait_for_everyone()
    found["sharded"] = spread + train(accelerator, folder / "kept", sharded=True)
    if accelerator.is_main_process:
        (folder / "losses.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
