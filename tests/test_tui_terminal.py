"""The app in a real terminal (tmux): typed into, read from the screen, left and come back to while a run goes on."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from edgeprune import runs

COMMAND = f"{shlex.quote(sys.executable)} -m edgeprune"


class Terminal:
    """A tmux session of its own server: types and reads."""

    def __init__(self, socket: Path) -> None:
        self._tmux = ["tmux", "-S", str(socket), "-f", "/dev/null"]

    def open(self, folder: Path, width: int = 80, height: int = 24) -> None:
        size = ["-x", str(width), "-y", str(height)]
        self._run("new-session", "-d", *size, "-c", str(folder), "sh")
        self._run("set-option", "-g", "window-size", "manual")

    def close(self) -> None:
        subprocess.run([*self._tmux, "kill-server"], capture_output=True)

    def type(self, *keys: str) -> None:
        self._run("send-keys", *keys)

    def command(self, line: str) -> None:
        self.type("-l", line)
        self.type("Enter")

    def resize(self, width: int, height: int) -> None:
        self._run("resize-window", "-x", str(width), "-y", str(height))

    def screen(self) -> str:
        return self._run("capture-pane", "-p")

    def until(self, wanted: str | tuple[str, ...], patience: float = 120.0) -> str:
        """Wait until one of the ``wanted`` texts is on the screen, and return the screen."""
        texts = (wanted,) if isinstance(wanted, str) else wanted
        end = time.monotonic() + patience
        while not any(text in (screen := self.screen()) for text in texts):
            assert time.monotonic() < end, f"{texts}: not within {patience:.0f} s:\n{screen}"
            time.sleep(0.1)
        return screen

    def _run(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self._tmux, *arguments], capture_output=True, text=True, check=True, timeout=30
        )
        return done.stdout


@pytest.fixture
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed: apt-get install tmux")
    made = Terminal(tmp_path_factory.mktemp("tmux") / "socket")
    yield made
    made.close()


def test_from_start_to_result_with_the_app_left_in_the_middle(
    terminal: Terminal, tmp_path: Path
) -> None:
    tiny.save("qwen2", tmp_path / "little", num_hidden_layers=2)
    terminal.open(tmp_path)
    terminal.command(f"{COMMAND}; echo left $((1)) time")
    terminal.until("No runs yet")
    terminal.type("n")
    terminal.until("1 Source]")
    terminal.type("-l", "little")
    terminal.until("Qwen")
    for step in ("2 Target]", "3 Recipe]", "4 Preflight]"):
        terminal.type("Enter")
        terminal.until(step)
    terminal.until("Enter starts")
    terminal.type("Enter")
    terminal.until("Stop")  # a key of the dashboard
    terminal.resize(120, 40)
    terminal.until("Prune")
    terminal.type("q")
    terminal.until("left 1 time")
    (info,) = runs.list_runs()
    assert info.state == "running"

    terminal.resize(80, 24)
    terminal.command(f"clear; {COMMAND}; echo left $((2)) times")
    terminal.until("little-30pct")
    terminal.type("Enter")
    screen = terminal.until(("Enter for the results", "Perplexity per"), 600)
    if "Enter for the results" in screen:
        terminal.type("Enter")
    terminal.until("Perplexity per")
    terminal.type("q")
    terminal.until("left 2 times")
    (info,) = runs.list_runs()
    assert info.state == "finished"


def test_nothing_but_the_app_writes_into_the_terminal_and_it_is_left_clean(
    terminal: Terminal, tmp_path: Path
) -> None:
    terminal.open(tmp_path)
    terminal.command(f"NO_COLOR=1 {COMMAND}; echo came $((1)) back")
    terminal.until("No runs yet")
    terminal.type("q")
    screen = terminal.until("came 1 back")
    assert "No runs yet" not in screen
    assert "Traceback" not in screen
