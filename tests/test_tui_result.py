"""The results of a finished run on the screen, and what they come to as text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import made_runs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pilots import FixedAnswers, piloted, seen, told, until
from textual.pilot import Pilot

from edgeprune import report, worker
from edgeprune.tui import figures
from edgeprune.tui.app import EdgepruneApp
from edgeprune.tui.screens import result
from edgeprune.tui.screens.chat import ChatScreen
from edgeprune.tui.screens.compare import CompareScreen
from edgeprune.tui.screens.export import ExportScreen
from edgeprune.tui.screens.result import ResultScreen
from edgeprune.tui.widgets.bars import LayerWidths

SIZES = ((80, 24), (200, 60))


async def opened(pilot: Pilot[Any], folder: Path) -> ResultScreen:
    """Open the results in ``folder`` as the app does, and wait for the plots."""
    pilot.app.open_run(folder)  # type: ignore[attr-defined]
    await until(pilot, lambda: len(pilot.app.screen.query("#result-plots Chart")) == 2)
    assert isinstance(pilot.app.screen, ResultScreen)
    return pilot.app.screen


# ---- as text


def test_the_table_is_aligned_and_says_what_is_better_in_words() -> None:
    rows = report.results_table(made_runs.results(speed=80.2))
    heading, *lines = figures.table(rows)
    assert heading.split() == ["dense", "pruned", "change"]
    assert max(map(len, lines)) <= 76
    by_label = dict(zip((row.label for row in rows), lines, strict=True))
    assert by_label["File size, int4 ONNX"].endswith("−17.8 %  ▲ better")
    assert by_label["Perplexity per token"].endswith("× 2.30  ▼ worse")
    assert by_label["Decode (tokens/s)"].endswith("× 1.00  = same")
    ends = {line.index(row.change) + len(row.change) for row, line in zip(rows, lines, strict=True)}
    assert len(ends) == 1


def test_a_figure_that_is_missing_has_no_verdict() -> None:
    results = made_runs.results()
    results["pruned"]["word_perplexity"] = results["ratios"]["word_perplexity"] = None
    (line,) = (x for x in figures.table(report.results_table(results)) if "per word" in x)
    assert line.endswith("–")


def test_the_markdown_has_every_figure_and_no_folder_of_this_machine() -> None:
    results = made_runs.results(model="/home/ada/mod|els/smol")
    text = figures.markdown(results)
    assert "/home/ada" not in text
    assert "| Decode (tokens/s) | 80 ± 5 % | 100 ± 5 % | × 1.25 |" in text
    assert text.count("\n|") == len(report.QUANTITIES) - 1 + 2  # the energy is not known
    assert "Perplexity over 9,000 tokens" in text


@given(st.integers(30, 200), st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_bars_are_as_long_as_the_share_that_is_kept(width: int, kept: list[int]) -> None:
    dense = [{"intermediate_size": 900, "num_attention_heads": 9}] * len(kept)
    pruned = [{"intermediate_size": 100 * k, "num_attention_heads": k} for k in kept]
    _, *lines = figures.layer_lines(dense, pruned, width)
    assert len(lines) == len(kept)
    assert len({len(line) for line in lines}) == 1
    assert max(map(len, lines)) <= max(width, 41)
    for line, count in zip(lines, kept, strict=True):
        length = (line.count(figures.FULL) + line.count(figures.GONE)) // 2
        assert line.count(figures.FULL) == 2 * max(1 if count else 0, round(count / 9 * length))
        assert ("removed" in line) == (count == 0)


TIMES = st.lists(st.floats(0.1, 1000), min_size=1, max_size=60)


@given(TIMES, TIMES)
def test_the_distribution_counts_every_token(dense: list[float], pruned: list[float]) -> None:
    middles, counts = figures.distribution({"dense": dense, "pruned": pruned}, bins=8)
    assert len(middles) == 8
    assert middles == sorted(middles)
    assert (sum(counts["dense"]), sum(counts["pruned"])) == (len(dense), len(pruned))


def test_a_browser_is_opened_only_where_it_is_seen() -> None:
    assert result.has_browser({"DISPLAY": ":0"}, "linux")
    assert result.has_browser({"WAYLAND_DISPLAY": "w"}, "linux")
    assert result.has_browser({}, "darwin")
    assert not result.has_browser({}, "linux")
    assert not result.has_browser({"DISPLAY": ":10", "SSH_CONNECTION": "a b"}, "linux")


# ---- on the screen


@pytest.mark.parametrize("size", SIZES)
def test_all_of_it_can_be_seen(tmp_path: Path, size: tuple[int, int]) -> None:
    folder = made_runs.finished(tmp_path / "run")

    async def act(pilot: Pilot[Any]) -> None:
        screen = await opened(pilot, folder)
        await until(pilot, lambda: "▼ worse" in seen(pilot.app))
        assert "24% of the parameters" in seen(pilot.app)
        parts: set[str] = set()
        wanted = {"1024/1536", "removed", "during 2 of the 10", "of each repetition", "slowest 1 %"}

        def all_seen() -> bool:
            parts.update(text for text in wanted if text in seen(pilot.app))
            screen.query_one("#result").scroll_relative(y=10, animate=False)
            return parts == wanted

        await until(pilot, all_seen)
        bars = screen.query_one(LayerWidths)
        assert bars.region.right <= size[0]

    piloted(act, size=size)


SUSTAINED = {
    "minutes": 5.0,
    "samples": [],
    "first_minute": 12.0,
    "last_minute": 8.0,
    "ratio": 2 / 3,
}


def test_three_devices_are_read_by_scrolling(tmp_path: Path) -> None:
    board = made_runs.document(speed=12.0, dense_speed=8.0, sustained=SUSTAINED)
    devices = {"local": made_runs.document(), "pi5": board, "nano-on-the-desk": board}
    rows = report.results_table(made_runs.results(devices=devices))
    lines = "\n".join(figures.table(rows)).splitlines()
    assert max(map(len, lines)) <= 76
    folder = made_runs.finished(tmp_path / "run", devices=devices)

    async def act(pilot: Pilot[Any]) -> None:
        screen = await opened(pilot, folder)
        wanted = {line.strip() for line in lines[1:]} | {"Time between tokens on local, as plotted"}
        found: set[str] = set()

        def all_seen() -> bool:
            found.update(text for text in wanted if text in seen(pilot.app))
            screen.query_one("#result").scroll_relative(y=10, animate=False)
            return found == wanted

        await until(pilot, all_seen)

    piloted(act)


def test_what_was_not_timed_has_no_plots(tmp_path: Path) -> None:
    folder = made_runs.finished(tmp_path / "run", devices={})

    async def act(pilot: Pilot[Any]) -> None:
        pilot.app.open_run(folder)  # type: ignore[attr-defined]
        await until(pilot, lambda: "KL of the export" in seen(pilot.app))
        pilot.app.screen.query_one("#result").scroll_end(animate=False)
        await until(pilot, lambda: "not measured." in seen(pilot.app))
        assert not pilot.app.screen.query("#result-plots Chart")
        assert "tokens/s" not in seen(pilot.app)

    piloted(act)


def test_the_screens_of_results_import_nothing_heavy() -> None:
    code = (
        "from edgeprune.tui.screens import chat, compare, export, result\n"
        "from edgeprune.tui import figures, partner\n"
        "from edgeprune.tui.widgets import bars, charts, chat_pane\n"
        "import sys\n"
        "heavy = 'torch', 'transformers', 'numpy', 'onnxruntime', 'onnxruntime_genai', 'matplotlib'\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (found.stdout, found.stderr) == ("[]\n", "")


def test_from_the_results_to_the_other_screens(tmp_path: Path) -> None:
    folder = made_runs.finished(tmp_path / "run")

    async def act(pilot: Pilot[Any]) -> None:
        await opened(pilot, folder)
        await pilot.press("c")
        await until(pilot, lambda: "no other finished run" in told(pilot.app))
        made_runs.finished(tmp_path / "other")
        for key, screen in (("c", CompareScreen), ("e", ExportScreen), ("t", ChatScreen)):
            await pilot.press(key)
            await until(pilot, lambda screen=screen: isinstance(pilot.app.screen, screen))
            await pilot.press("escape")
            await until(pilot, lambda: isinstance(pilot.app.screen, ResultScreen))
        await pilot.press("escape")
        await until(pilot, lambda: not isinstance(pilot.app.screen, ResultScreen))

    piloted(act)


def test_the_table_is_copied_and_the_report_told_where_no_browser_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made_runs.finished(tmp_path / "run")
    monkeypatch.setitem(os.environ, "SSH_CONNECTION", "here there")

    async def act(pilot: Pilot[Any]) -> None:
        await opened(pilot, folder)
        await pilot.press("y")
        assert pilot.app.clipboard == figures.markdown(made_runs.results())
        await pilot.press("o")
        await until(pilot, lambda: pilot.app.clipboard == str(folder / worker.REPORT))
        (folder / worker.REPORT).unlink()
        await pilot.press("o")
        await until(pilot, lambda: "report.html is gone" in told(pilot.app))

    piloted(act, size=(200, 60))


def test_the_report_is_opened_by_the_browser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened_pages: list[str] = []
    monkeypatch.setattr(result, "has_browser", lambda *_: True)
    monkeypatch.setattr("webbrowser.open", lambda page: opened_pages.append(page) or True)
    folder = made_runs.finished(tmp_path / "run")

    async def act(pilot: Pilot[Any]) -> None:
        await opened(pilot, folder)
        await pilot.press("o")
        await until(pilot, lambda: opened_pages == [(folder / worker.REPORT).as_uri()])

    piloted(act)


def _without_profile(path: Path) -> None:
    results = json.loads(path.read_text("utf-8"))
    del results["devices"]
    path.write_text(json.dumps(results), "utf-8")


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_text("{"), _without_profile]
)
def test_damaged_results_are_told_with_the_command_that_makes_them_again(
    tmp_path: Path, damage: Any
) -> None:
    folder = made_runs.finished(tmp_path / "run")
    damage(folder / worker.RESULTS)

    async def act(pilot: Pilot[Any]) -> None:
        pilot.app.open_run(folder)  # type: ignore[attr-defined]
        await until(pilot, lambda: "damaged" in seen(pilot.app))
        assert "edgeprune run --resume" in seen(pilot.app)
        for key in ("y", "o"):
            await pilot.press(key)

    piloted(act, EdgepruneApp(FixedAnswers()), size=(200, 60))
