"""How long a person waits for `edgeprune --help`, against an empty Python.

python benchmarks/start_up.py [--repeats 10]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "edgeprune --help": [sys.executable, "-m", "edgeprune", "--help"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=10)
    repeats = parser.parse_args().repeats
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(repeats + 1):
        for name, command in COMMANDS.items():
            started = time.monotonic()
            subprocess.run(command, check=True, capture_output=True)
            if turn:  # the first is the warm-up
                seconds[name].append(time.monotonic() - started)
    print("| command | median s | min | max |")
    print("|---|---|---|---|")
    for name, found in seconds.items():
        print(f"| {name} | {statistics.median(found):.2f} | {min(found):.2f} | {max(found):.2f} |")


if __name__ == "__main__":
    main()
