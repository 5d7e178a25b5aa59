"""Makes the pictures of the README: drives the app through real runs of the bundled model, and draws its screens.

    python docs/make_pictures.py [--work DIR]

Two runs are done, of 30 % and 45 %, the second with some recovery training: about half an hour on two cores. With
``--work``, finished runs in DIR are used again. The pictures go to docs/pictures as SVG.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from textual.pilot import Pilot
from textual.widgets import Input

from edgeprune import runs
from edgeprune.tui.app import EdgepruneApp
from edgeprune.tui.choice import Choice
from edgeprune.tui.screens.chat import ChatScreen
from edgeprune.tui.screens.result import ResultScreen
from edgeprune.tui.screens.run import RunScreen
from edgeprune.tui.screens.source import SourceScreen

PICTURES = Path(__file__).resolve().parent / "pictures"
SIZE = (116, 36)
WIDE = (150, 44)  # the dashboard shows all of its views at once
PATIENCE = 3 * 3600.0
FIRST = Choice(effort="quick", folder="runs/smollm2-30pct")
SECOND = Choice(
    effort="quick", value=0.45, recovery="own", own_tokens=40_000, folder="runs/smollm2-45pct"
)
QUESTION = "What is a steam engine?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, help="Where the runs are kept.")
    work = parser.parse_args().work
    with tempfile.TemporaryDirectory() as temporary:
        folder = (work or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["XDG_STATE_HOME"] = str(folder / "state")
        os.environ["XDG_CONFIG_HOME"] = str(folder / "config")
        os.chdir(folder)
        PICTURES.mkdir(exist_ok=True)
        asyncio.run(draw_all())


async def draw_all() -> None:
    app = EdgepruneApp()
    async with app.run_test(size=SIZE) as pilot:
        await a_run(pilot, FIRST, lambda: "after iteration 6" in text(app), "run-pruning")
        await a_run(pilot, SECOND, lambda: has_trained(app), "run-training")
        await wizard(pilot)
        await shot(pilot, "start")
        app.open_run(FIRST.run_folder())
        await until(pilot, lambda: isinstance(app.screen, ResultScreen) and "Decode" in text(app))
        await shot(pilot, "result")
        await chat(pilot)
        await home(pilot)
        await pilot.press("c")
        await until(pilot, lambda: "the front" in text(app))
        await shot(pilot, "compare")


async def wizard(pilot: Pilot[Any]) -> None:
    """Draw the steps of the wizard."""
    app = pilot.app
    app.choice = Choice(effort="quick")
    app.push_screen(SourceScreen())
    await until(pilot, lambda: "Licence" in text(app))
    await shot(pilot, "source")
    await pilot.press("enter")
    await until(pilot, lambda: "[2 Target]" in text(app) and "Quality" in text(app))
    await shot(pilot, "target")
    await pilot.press("enter")
    await until(pilot, lambda: "[3 Recipe]" in text(app))
    await shot(pilot, "recipe")
    await pilot.press("ctrl+o")
    await until(pilot, lambda: "edgeprune run" in text(app))
    await shot(pilot, "toml")
    await pilot.press("escape", "enter")
    await until(pilot, lambda: "Enter starts" in text(app))
    await shot(pilot, "preflight")
    await home(pilot)


async def a_run(
    pilot: Pilot[Any], choice: Choice, moment: Callable[[], bool], picture: str
) -> None:
    """Do the run of ``choice`` if it is not done, and draw it at the ``moment``."""
    app = pilot.app
    folder = choice.run_folder().absolute()
    state = runs.describe(folder).state
    if state == "finished":
        return
    if state not in runs.AT_WORK:
        await app.answers.ask("start", recipe=choice.toml(), folder=str(folder))
    await pilot.resize_terminal(*WIDE)
    app.open_run(folder)
    await until(pilot, lambda: isinstance(app.screen, RunScreen) and moment())
    await shot(pilot, picture)
    await pilot.resize_terminal(*SIZE)
    await until(pilot, lambda: "Enter for the results" in text(app))
    await home(pilot)


def has_trained(app: Any) -> bool:
    return "tokens/s" in text(app) and "Training and held-out" in text(app)


async def chat(pilot: Pilot[Any]) -> None:
    app = pilot.app
    await pilot.press("t")
    await until(pilot, lambda: isinstance(app.screen, ChatScreen))
    await until(pilot, lambda: text(app).count("tokens/s") == 0 and "Say something" in text(app))
    app.screen.query_one("#chat-input", Input).value = QUESTION
    await pilot.press("enter")
    await until(pilot, lambda: text(app).count("tokens/s") >= 2)
    await shot(pilot, "chat")


async def home(pilot: Pilot[Any]) -> None:
    pilot.app.action_home()
    await pilot.pause(1.0)


async def shot(pilot: Pilot[Any], name: str) -> None:
    await pilot.pause(1.0)
    path = PICTURES / f"{name}.svg"
    path.write_text(pilot.app.export_screenshot(title="edgeprune"), "utf-8")
    print(path, flush=True)


async def until(pilot: Pilot[Any], condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            sys.exit(f"waited in vain:\n{text(pilot.app)}")
        await pilot.pause(0.2)


def text(app: Any) -> str:
    return "\n".join(strip.text for strip in app.screen._compositor.render_strips())


if __name__ == "__main__":
    main()
