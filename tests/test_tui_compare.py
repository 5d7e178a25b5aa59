"""Finished runs beside each other on the screen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import made_runs
import pytest
from pilots import piloted, seen, until
from textual.pilot import Pilot

from edgeprune import comparison, worker
from edgeprune.tui import figures
from edgeprune.tui.screens.compare import CompareScreen

SIZES = ((80, 24), (200, 60))


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [
        made_runs.finished(tmp_path / "small", size=60e6, perplexity=90.0),
        made_runs.finished(tmp_path / "good", size=90e6, perplexity=40.0),
        made_runs.finished(
            tmp_path / "it-is-beaten-by-both", size=95e6, speed=90.0, perplexity=95.0
        ),
    ]


async def opened(pilot: Pilot[Any], folders: list[Path]) -> None:
    pilot.app.push_screen(CompareScreen(folders))
    await until(pilot, lambda: len(pilot.app.screen.query("#compare-plots Chart")) == 2)
    await until(pilot, lambda: "on the front" in seen(pilot.app))


def test_the_table_has_a_mark_and_a_verdict_for_each_run(folders: list[Path]) -> None:
    found = comparison.compare(folders)
    lines = figures.compared(found)
    assert max(map(len, lines)) <= 76
    assert [line.split()[:2] for line in lines[2::3]] == [
        ["1", "small"],
        ["2", "good"],
        ["3", "…eaten-by-both"],
    ]
    assert [line.strip() for line in lines[4::3]] == [
        "on the front",
        "on the front",
        "not on front",
    ]
    assert "−49.2 %▲" in lines[3]
    assert "× 3.32▼" in lines[3]


def test_the_plots_have_every_model_and_the_dense_one_once(folders: list[Path]) -> None:
    places = figures.points(comparison.compare(folders))
    assert places[0] == ("D", 118.0, 80.0, 27.1)
    assert [place[0] for place in places] == ["D", "1", "2", "3"]


def test_the_comparison_as_markdown(folders: list[Path], tmp_path: Path) -> None:
    text = figures.comparison_markdown(comparison.compare(folders))
    assert "| small | 30% sparsity | yes | 60.0 MB (−49.2 %) | 90.00 (× 3.32) |" in text
    assert "| it-is-beaten-by-both | 30% sparsity | no |" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("size", SIZES)
def test_runs_are_compared_and_plotted(folders: list[Path], size: tuple[int, int]) -> None:
    results = json.loads((folders[0] / worker.RESULTS).read_text("utf-8"))
    results["devices"]["local"]["device"]["cpu"] = "Another"
    (folders[0] / worker.RESULTS).write_text(json.dumps(results), "utf-8")

    async def act(pilot: Pilot[Any]) -> None:
        await opened(pilot, folders)
        wanted = {"not on front", "Smaller is better", "Faster is better", "different machines"}
        parts: set[str] = set()

        def all_seen() -> bool:
            parts.update(text for text in wanted if text in seen(pilot.app))
            pilot.app.screen.query_one("#compare").scroll_relative(y=6, animate=False)
            return parts == wanted

        await until(pilot, all_seen)

    piloted(act, size=size)


def test_copied_and_written_as_a_page(folders: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"

    async def act(pilot: Pilot[Any]) -> None:
        await opened(pilot, folders)
        await pilot.press("y")
        assert "| small |" in pilot.app.clipboard
        await pilot.press("w", "escape")  # not now
        assert isinstance(pilot.app.screen, CompareScreen)
        for text in (str(tmp_path), str(page)):  # the first exists
            await pilot.press("w")
            pilot.app.screen.query_one("#compare-path").value = text  # type: ignore[attr-defined]
            await pilot.press("enter")
            if text != str(page):
                await until(pilot, lambda: "exists: name another" in seen(pilot.app))
                await pilot.press("escape")
        await until(pilot, lambda: "✓ The page is" in seen(pilot.app))
        assert "<svg" in page.read_text("utf-8")
        (folders[0] / worker.RESULTS).unlink()
        await pilot.press("w")
        pilot.app.screen.query_one("#compare-path").value = f"{page}2"  # type: ignore[attr-defined]
        await pilot.press("enter")
        await until(pilot, lambda: "✗ The page was not written" in seen(pilot.app))
        assert "gone or damaged" in seen(pilot.app)

    piloted(act, size=(200, 60))


def test_a_run_that_is_not_finished_is_told(folders: list[Path]) -> None:
    (folders[1] / worker.RESULTS).unlink()

    async def act(pilot: Pilot[Any]) -> None:
        pilot.app.push_screen(CompareScreen(folders))
        await until(pilot, lambda: "gone or damaged" in seen(pilot.app))
        await pilot.press("y", "w", "escape")
        await until(pilot, lambda: not isinstance(pilot.app.screen, CompareScreen))

    piloted(act, size=(200, 60))


def test_runs_that_were_not_timed_have_no_plots(tmp_path: Path) -> None:
    folders = [made_runs.finished(tmp_path / name, devices={}) for name in ("one", "other")]

    async def act(pilot: Pilot[Any]) -> None:
        pilot.app.push_screen(CompareScreen(folders))
        await until(pilot, lambda: "not on front" in seen(pilot.app))
        assert "–" in seen(pilot.app)
        assert not pilot.app.screen.query("#compare-plots Chart")

    piloted(act)
