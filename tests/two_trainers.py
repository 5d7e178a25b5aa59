"""What one of several processes does that train together, for ``test_distributed.py``."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from edgeprune import machine, sources
from edgeprune.errors import BadInput
from edgeprune.events import Evaluation, TrainStep
from edgeprune.recovery import packing, teacher_cache
from edgeprune.recovery.mixture import parse_sources
from edgeprune.recovery.objective import Objective
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


RECORDED = replace(SETTINGS, teacher_top_k=16)


def recorded(folder):
    """Return sequences with the predictions of a teacher; the process that calls first makes them."""
    made, _ = packing.prepare(
        parse_sources(["builtin"]),
        tiny.tokenizer(),
        tokens=8 * 32,
        length=32,
        held_out=0,
        cache=folder / "cache",
    )
    teacher = sources.resolve(folder / "teacher")
    return teacher_cache.prepare(made, teacher, RECORDED, device=torch.device("cpu"))


def train(accelerator=None, folder=None, stop=6, settings=SETTINGS, data=None, **ways):
    """Return the losses of the steps and the held-out loss at the end."""
    told = []

    def emit(event) -> None:
        if isinstance(event, TrainStep | Evaluation):
            told.append(event.loss)

    trainer = Trainer(
        tiny.model("llama"),
        settings,
        data or packed(),
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


def is_given_as_recorded(accelerator, data) -> bool:
    """Tell whether a sharded objective that computes in bfloat16 is given float16 predictions."""
    seen = []
    teaching = Objective._teaching

    def look(self, batch):
        seen.append(batch.teacher_log_probabilities.dtype)
        return teaching(self, batch)

    Objective._teaching = look
    machine.compute_dtype = lambda *_: torch.bfloat16
    train(accelerator, stop=1, settings=RECORDED, data=data, sharded=True)
    Objective._teaching = teaching
    return set(seen) == {torch.float16}


def refusal(accelerator) -> str:
    """Return what is said of a batch that two processes cannot share."""
    try:
        train(accelerator, settings=replace(SETTINGS, batch=9))
    except BadInput as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    """Train in all ways; the main process writes the losses of each to FOLDER/losses.json."""
    machine.compute_dtype = lambda *_: torch.float32
    accelerator = Accelerator(cpu=True)
    found = {"refused": refusal(accelerator), "replicated": train(accelerator)}
    spread = train(accelerator, folder / "kept", stop=3, sharded=True)
    accelerator.wait_for_everyone()
    found["sharded"] = spread + train(accelerator, folder / "kept", sharded=True)
    data = recorded(folder)  # of both at once: one waits
    for way, sharded in (("replicated", False), ("sharded", True)):
        told = train(accelerator, settings=RECORDED, data=data, sharded=sharded)
        found[f"{way}, recorded"] = told
    found["kept in half precision"] = is_given_as_recorded(accelerator, data)
    # in one micro batch: sums over several have another order when sharded
    at_once = replace(SETTINGS, micro_batch=4)
    found["in bfloat16"] = [
        train(accelerator, settings=at_once, sharded=sharded) for sharded in (False, True)
    ]
    if accelerator.is_main_process:
        (folder / "losses.json").write_text(json.dumps(found))
