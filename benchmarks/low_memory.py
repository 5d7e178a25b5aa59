"""Peak memory and time of what can be done with a model that does not fit in memory.

python benchmarks/low_memory.py [FOLDER] [--memory-budget 4GB]

FOLDER is what benchmarks/make_big.py wrote; without it, 2 layers of that are made and removed again.
Every command runs in a process of its own. Peak memory is what the process filled at most (VmHWM),
mapped files included; Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import make_big

from edgeprune.quantities import format_bytes, format_seconds

MEASURE = """
import json, sys, time
started = time.monotonic()
from edgeprune import cli, console
cli.app(sys.argv[1:], standalone_mode=False)
from edgeprune import mapped
print(json.dumps({"peak": mapped.peak_resident(), "seconds": time.monotonic() - started}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="a checkpoint")
    parser.add_argument("--memory-budget", default="4GB", metavar="SIZE", help="default 4GB")
    options = parser.parse_args()
    beside = Path(options.folder).resolve().parent if options.folder else None
    with tempfile.TemporaryDirectory(dir=beside) as place:
        table(options.folder or small(Path(place) / "small"), place, options.memory_budget)


def small(folder: Path) -> str:
    """Make a checkpoint of 2 layers."""
    folder.mkdir()
    make_big.write(make_big.shape(2), folder)
    return str(folder)


def table(model: str, place: str, memory: str) -> None:
    """Measure the commands and print a row for each."""
    budget = ["--memory-budget", memory]
    windows = ["--window", "512", "--max-tokens", "1024"]
    export = ["export", model, "--onnx", "--precision", "int4", "-o"]
    commands = {
        "inspect": ["inspect", model],
        "ppl, 2 windows of 512": ["ppl", model, *windows, *budget],
        "export int4": [*export, f"{place}/plain", "--no-check", *budget],
        "export int4, compared": [*export, f"{place}/compared", *budget],
    }
    print("| command | peak memory | seconds |\n|---|---:|---:|")
    for name, command in commands.items():
        print(f"| {name} | {' | '.join(measured(command))} |", flush=True)


def measured(command: list[str]) -> tuple[str, str]:
    """Return peak memory and duration of one command."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *command, "--json"], capture_output=True, text=True
    )
    if done.returncode:
        return "failed", done.stderr.strip().splitlines()[-1]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return format_bytes(found["peak"]), format_seconds(found["seconds"])


if __name__ == "__main__":
    main()
