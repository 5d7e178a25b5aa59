"""How long the app takes to answer a key while the machine is busy: from the key to the picture in the terminal.

    python benchmarks/app_keys.py [--keys 40]

Every core computes matrix products, as pruning does, and a run reports two events ten times a second, of which the app
shows the dashboard. The key switches between the dashboard's views, 80 columns wide.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import select
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from contextlib import suppress
from pathlib import Path

from edgeprune import lock, runs, worker
from edgeprune import recipe as recipes
from edgeprune.events import Progress, RunStarted, StageStarted, TrainStep
from edgeprune.log import LogWriter

BUSY = "import torch\na = torch.rand(2048, 2048)\nwhile True: a @ a\n"
WHOLE_VIEW = 1000
"""Bytes of output that a change of the view takes at least; the dashboard's clocks are a few cells."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keys", type=int, default=40)
    keys = parser.parse_args().keys
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["XDG_STATE_HOME"] = str(folder / "state")
        os.environ["XDG_CONFIG_HOME"] = str(folder / "config")
        run = a_run(folder / "run")
        ended = threading.Event()
        with lock.only_one(run, lambda _event: None, 1.0):
            threading.Thread(target=report, args=(run, ended), daemon=True).start()
            quiet = latencies(keys)
            busy = [
                subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count() or 1)
            ]
            time.sleep(5)
            loaded = latencies(keys)
            ended.set()
            for process in busy:
                process.kill()
    print("| machine | median ms | 95 % | max |")
    print("|---|---|---|---|")
    for name, found in (("idle", quiet), ("every core busy", loaded)):
        found.sort()
        most = found[int(0.95 * (len(found) - 1))]
        print(f"| {name} | {statistics.median(found):.0f} | {most:.0f} | {found[-1]:.0f} |")


def a_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / worker.RECIPE).write_text(recipes.demo().to_toml(), "utf-8")
    worker.write_state(folder, {})
    with LogWriter(folder / worker.EVENTS) as emit:
        emit(RunStarted(folder=str(folder), stages=["source", "prune"], pid=os.getpid()))
        emit(StageStarted(stage="prune", title="Prune", index=2, of=7))
    runs.remember(folder)
    return folder


def report(folder: Path, ended: threading.Event) -> None:
    """Do as a run that trains does."""
    with LogWriter(folder / worker.EVENTS) as emit:
        for step in range(1, 1_000_000):
            if ended.wait(0.1):
                return
            emit(Progress(stage="prune", done=step, total=1_000_000, unit="updates"))
            emit(
                TrainStep(
                    step=step,
                    of=1_000_000,
                    loss=3.0 + 1 / step,
                    lm_loss=3.0,
                    learning_rate=1e-4,
                    gradient_norm=1.0,
                    tokens=2048 * step,
                    tokens_per_second=300.0,
                    seconds_left=3600.0,
                )
            )


def latencies(keys: int) -> list[float]:
    """Return the milliseconds from each key to the first output that it caused."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm-256color"
        os.execv(sys.executable, [sys.executable, "-m", "edgeprune"])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    try:
        wait_for(terminal, b"running")
        os.write(terminal, b"\r")
        wait_for(terminal, b"Stop")
        time.sleep(2)
        return [one(terminal, b"41"[number % 2 : number % 2 + 1]) for number in range(keys)]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)


def one(terminal: int, key: bytes) -> float:
    """Press ``key`` right after a picture of the run's own, so that the next output is the key's."""
    while not select.select([terminal], [], [], 2.0)[0]:
        pass
    while select.select([terminal], [], [], 0.02)[0]:
        os.read(terminal, 1 << 20)
    started = time.monotonic()
    os.write(terminal, key)
    drawn = b""
    while len(drawn) < WHOLE_VIEW:
        drawn += os.read(terminal, 1 << 20)
    return 1000 * (time.monotonic() - started)


def wait_for(terminal: int, text: bytes) -> None:
    drawn = b""
    with suppress(OSError):
        while text not in drawn:
            drawn += os.read(terminal, 1 << 20)


if __name__ == "__main__":
    main()
