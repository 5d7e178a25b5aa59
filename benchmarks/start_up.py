"""How long a person waits: for `edgeprune --help`, against an empty Python; for the app, against an empty Textual app.

python benchmarks/start_up.py [--repeats 10]

The app counts as there when its first picture has reached the terminal, which is a pseudo terminal here.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable

TITLE = b"edgeprune"
EMPTY_APP = """
from textual.app import App
from textual.widgets import Static
class Empty(App):
    def compose(self):
        yield Static("edgeprune")
Empty().run()
"""
TIMED: dict[str, tuple[list[str], bool]] = {
    "python -c pass": ([sys.executable, "-c", "pass"], False),
    "edgeprune --help": ([sys.executable, "-m", "edgeprune", "--help"], False),
    "an empty Textual app": ([sys.executable, "-c", EMPTY_APP], True),
    "edgeprune": ([sys.executable, "-m", "edgeprune"], True),
}
AGAINST = {"edgeprune --help": "python -c pass", "edgeprune": "an empty Textual app"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=10)
    repeats = parser.parse_args().repeats
    seconds: dict[str, list[float]] = {name: [] for name in TIMED}
    with tempfile.TemporaryDirectory() as state:
        os.environ["XDG_STATE_HOME"] = state  # the app's list of runs is empty
        for turn in range(repeats + 1):
            for name, (command, is_app) in TIMED.items():
                found = timed(until_painted if is_app else until_ended, command)
                if turn:  # the first is the warm-up
                    seconds[name].append(found)
    print("| command | median s | min | max | of the empty one |")
    print("|---|---|---|---|---|")
    for name, found in seconds.items():
        base = AGAINST.get(name)
        ratio = [a / b for a, b in zip(found, seconds[base], strict=True)] if base else []
        shown = f"{statistics.median(ratio):.2f}" if ratio else ""
        print(
            f"| {name} | {statistics.median(found):.2f} | {min(found):.2f} | {max(found):.2f} | {shown} |"
        )


def timed(wait: Callable[[list[str]], None], command: list[str]) -> float:
    started = time.monotonic()
    wait(command)
    return time.monotonic() - started


def until_ended(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)


def until_painted(command: list[str]) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm-256color"
        os.execv(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    drawn = b""
    try:
        while TITLE not in drawn:
            drawn += os.read(terminal, 65536)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)


if __name__ == "__main__":
    main()
