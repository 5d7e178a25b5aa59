"""Prune a model larger than the memory budget: one iteration, the repair and the final write.

    python benchmarks/make_big.py llama8b
    python benchmarks/big_prune.py llama8b [--memory-budget 6GB] [--samples 64] [--repair-samples 64]

Runs the pruning in a process of its own; prints its peak resident memory (mapped files included) and its
seconds against the floor: 6 x parameters x tokens over this machine's own bf16 matrix speed, plus the bytes
of the weights over the speed at which the disk gives them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from speed import matrix_speed

from edgeprune import mapped, prune, sources
from edgeprune.events import Event, Progress
from edgeprune.quantities import format_bytes, parse_bytes


def main() -> None:
    options = arguments()
    if options.alone:
        print(json.dumps(alone(options)))
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--alone"]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    config = sources.load_config(sources.resolve(options.folder))
    parameters = sources.weight_bytes(config, 1)
    matrices, disk = matrix_speed(), disk_speed(Path(options.folder))
    tokens = options.samples * options.length
    compute, reading = 6 * parameters * tokens / matrices, sources.weight_bytes(config, 2) / disk
    print(
        f"{parameters / 1e9:.2f}B parameters, {options.samples} x {options.length} tokens, repaired with "
        f"{options.repair_samples} x {options.length}; budget {options.memory_budget}\n"
    )
    print("| | seconds |")
    print("|---|---|")
    for name, seconds in found["seconds"].items():
        print(f"| {name} | {seconds:.0f} |")
    print(f"| floor of an iteration: arithmetic at {matrices / 1e12:.2f} TFLOP/s | {compute:.0f} |")
    print(f"| floor: reading the weights once at {disk / 1e9:.2f} GB/s | {reading:.0f} |")
    one = found["seconds"]["iteration"]
    print(f"\npeak resident memory {format_bytes(found['peak'])}")
    print(f"iteration / floor: {one / (compute + reading):.2f}; ten of them: {one / 360:.1f} hours")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--memory-budget", default="6GB")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--repair-samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--sparsity", type=float, default=0.1)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def alone(options: argparse.Namespace) -> dict[str, object]:
    marks = {"start": time.monotonic()}

    def listen(event: Event) -> None:
        if isinstance(event, Progress):
            name = {"layer passes": "iteration", "layers repaired": "repair"}.get(
                event.unit, "opening"
            )
            marks.setdefault(f"{name} begins", time.monotonic())
            marks[f"{name} ends"] = time.monotonic()
            print(f"\r{name} {event.done}/{event.total} ", end="", file=sys.stderr)

    with tempfile.TemporaryDirectory(dir=Path(options.folder).absolute().parent) as place:
        prune(
            options.folder,
            Path(place) / "pruned",
            sparsity=options.sparsity,
            iterations=1,
            samples=options.samples,
            length=options.length,
            repair_samples=options.repair_samples,
            stream=True,
            memory_budget=parse_bytes(options.memory_budget),
            emit=listen,
        )
        end = time.monotonic()
    seconds = {
        "opening, tokenizer, check of all weights": marks["iteration begins"] - marks["start"],
        "iteration": marks["iteration ends"] - marks["iteration begins"],
        "repair": marks["repair ends"] - marks["iteration ends"],
        "final write": end - marks["repair ends"],
    }
    return {"seconds": seconds, "peak": mapped.peak_resident()}


def disk_speed(folder: Path) -> float:
    """Bytes a second of the first weight file, after asking the system to forget it."""
    path = min(folder.glob("*.safetensors"))
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started, size = time.monotonic(), 0
        while chunk := file.read(1 << 24):
            size += len(chunk)
    return size / (time.monotonic() - started)


if __name__ == "__main__":
    main()
