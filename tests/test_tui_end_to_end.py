"""The whole way through the app with the real engine, on a tiny model: from the list of runs to the results."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from pilots import piloted, seen, until
from textual.pilot import Pilot

from edgeprune import runs
from edgeprune.tui.app import EdgepruneApp
from edgeprune.tui.screens.preflight import PreflightScreen
from edgeprune.tui.screens.recipe import RecipeScreen
from edgeprune.tui.screens.result import ResultScreen
from edgeprune.tui.screens.run import RunScreen
from edgeprune.tui.screens.source import SourceScreen
from edgeprune.tui.screens.start import StartScreen
from edgeprune.tui.screens.target import TargetScreen


def test_enter_goes_through_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine is mocked: the answers, the worker, the exports and the measuring are what a user gets."""
    monkeypatch.chdir(tmp_path)
    tiny.save("llama", tmp_path / "little", num_hidden_layers=2)

    async def act(pilot: Pilot[None]) -> None:
        app = pilot.app

        def at(screen: type) -> bool:
            return isinstance(app.screen, screen)

        await until(pilot, lambda: "No runs yet" in seen(app))
        await pilot.press("enter")
        await until(pilot, lambda: at(SourceScreen), "the first step")
        await pilot.press(*"little")
        await until(pilot, lambda: "Llama" in seen(app), "the model's card")
        await pilot.press("enter")
        await until(pilot, lambda: at(TargetScreen), "the target")
        await until(pilot, lambda: "first iteration" in seen(app), "the preview")
        await pilot.press("enter")
        await until(pilot, lambda: at(RecipeScreen), "the recipe")
        await pilot.press("enter")
        await until(pilot, lambda: at(PreflightScreen), "the preflight")
        await until(pilot, lambda: "Enter starts" in seen(app), "the checks")
        await pilot.press("enter")
        await until(pilot, lambda: at(RunScreen), "the run")
        # Left alone, it goes on; and is found again in the list.
        await pilot.press("escape")
        await until(pilot, lambda: at(StartScreen), "the list")
        await until(pilot, lambda: "little" in seen(app), "the run in the list")
        await pilot.press("enter")
        await until(pilot, lambda: not at(StartScreen), "the run again")
        await until(pilot, lambda: at(ResultScreen) or "results" in seen(app), "its end", 600)
        if at(RunScreen):
            await pilot.press("enter")
        await until(pilot, lambda: at(ResultScreen), "the results")
        await until(pilot, lambda: "Decode" in seen(app), "the table")

    piloted(act, EdgepruneApp(), size=(200, 60))
    (info,) = runs.list_runs()
    assert info.state == "finished"
    assert info.pruned is not None
    assert (info.folder / "recipe.toml").is_file()
