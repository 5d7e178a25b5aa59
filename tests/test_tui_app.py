"""The app around its screens: start, keys, themes, settings, the process that answers."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from pilots import FixedAnswers, piloted, seen, told, until
from textual.pilot import Pilot

from edgeprune import recipe as recipes
from edgeprune import runs, worker
from edgeprune.events import RunFailed, RunStarted
from edgeprune.log import LogWriter
from edgeprune.tui import settings
from edgeprune.tui.answers import AnswerFailed, Answers
from edgeprune.tui.app import EdgepruneApp
from edgeprune.tui.screens.keys import KeysScreen
from edgeprune.tui.screens.start import StartScreen

SIZES = ((80, 24), (200, 60))


def a_run(folder: Path, error: str = "the disk is full: free some space") -> Path:
    folder.mkdir(parents=True)
    (folder / worker.RECIPE).write_text(recipes.demo().to_toml(), "utf-8")
    worker.write_state(folder, {})
    with LogWriter(folder / worker.EVENTS) as emit:
        emit(RunStarted(folder=str(folder), stages=["source", "prune"], time=1_000_000.0))
        emit(RunFailed(error=error, time=1_000_100.0))
    runs.remember(folder)
    return folder


@pytest.mark.parametrize("size", SIZES)
def test_without_runs_it_says_how_to_begin(size: tuple[int, int]) -> None:
    async def act(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "No runs yet" in seen(pilot.app))
        await until(pilot, lambda: "New run" in seen(pilot.app))

    piloted(act, size=size)


@pytest.mark.parametrize("size", SIZES)
def test_runs_are_listed_with_their_state_and_their_error(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    a_run(tmp_path / "first")

    async def act(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "the disk is full" in seen(pilot.app))
        assert "failed" in seen(pilot.app)
        assert "30% sparsity" in seen(pilot.app)

    piloted(act, size=size)


def test_a_run_that_appears_is_shown_and_one_forgotten_is_not(tmp_path: Path) -> None:
    async def act(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "No runs yet" in seen(pilot.app))
        folder = a_run(tmp_path / "later")
        await until(pilot, lambda: "later" in seen(pilot.app))
        await pilot.press("d")
        await until(pilot, lambda: "No runs yet" in seen(pilot.app))
        assert folder.is_dir()

    piloted(act)


def test_a_damaged_list_is_no_reason_to_fail(own_state: Path) -> None:
    (own_state / "edgeprune").mkdir()
    (own_state / "edgeprune" / "runs.json").write_text("{broken")

    async def act(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "No runs yet" in seen(pilot.app))

    piloted(act)


def test_only_finished_runs_are_compared(tmp_path: Path) -> None:
    a_run(tmp_path / "one")

    async def act(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "one" in seen(pilot.app))
        await pilot.press("c")
        assert isinstance(pilot.app.screen, StartScreen)
        await until(pilot, lambda: "Mark two finished runs" in told(pilot.app))

    piloted(act)


# ---- keys and settings


def test_f1_lists_the_keys_with_the_ids_to_change_them_by() -> None:
    async def act(pilot: Pilot[None]) -> None:
        await pilot.press("f1")
        await until(pilot, lambda: isinstance(pilot.app.screen, KeysScreen))
        await until(pilot, lambda: "start.new" in seen(pilot.app))
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(pilot.app.screen, StartScreen))

    piloted(act, size=(120, 40))


def write_settings(text: str) -> None:
    settings.path().parent.mkdir(parents=True, exist_ok=True)
    settings.path().write_text(text)


def test_keys_can_be_changed() -> None:
    write_settings('[keys]\n"app.keys" = "f2"\n')

    async def act(pilot: Pilot[None]) -> None:
        await pilot.press("f1")
        assert isinstance(pilot.app.screen, StartScreen)
        await pilot.press("f2")
        await until(pilot, lambda: isinstance(pilot.app.screen, KeysScreen))

    piloted(act)


def test_the_theme_is_kept_and_the_keys_with_it() -> None:
    write_settings('[keys]\n"app.keys" = "f2"\n')

    async def act(pilot: Pilot[None]) -> None:
        await pilot.pause()
        pilot.app.theme = "nord"
        await until(pilot, lambda: settings.load().theme == "nord")

    piloted(act)
    assert settings.load() == settings.Settings("nord", {"app.keys": "f2"})
    assert EdgepruneApp(FixedAnswers()).theme == "nord"


@pytest.mark.parametrize("text", ["theme = ", "theme = 3", "keys = 1", '[keys]\n"app.keys" = 4'])
def test_damaged_settings_are_told_and_ignored(text: str) -> None:
    write_settings(text)
    assert str(settings.path()) in settings.load().problem

    async def act(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "app.toml" in told(pilot.app))

    piloted(act, size=(200, 60))


@pytest.mark.parametrize("theme", ["textual-dark", "textual-light", "ansi-dark", "ansi-light"])
def test_every_kind_of_theme_shows_the_same_words(tmp_path: Path, theme: str) -> None:
    a_run(tmp_path / "first")

    async def act(pilot: Pilot[None]) -> None:
        pilot.app.theme = theme
        await until(pilot, lambda: "failed" in seen(pilot.app))

    piloted(act)


# ---- the app's process


def test_the_app_imports_nothing_heavy() -> None:
    """Its first picture waits for nothing but Textual; the engine is in another process."""
    code = (
        "import sys, asyncio\n"
        "from edgeprune.tui.app import EdgepruneApp\n"
        "heavy = {'torch', 'transformers', 'numpy', 'onnxruntime', 'pydantic', 'typer', 'plotext', 'asyncssh'}\n"
        "async def main():\n"
        "    app = EdgepruneApp()\n"
        "    async with app.run_test() as pilot:\n"
        "        await pilot.pause()\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "asyncio.run(main())\n"
        "print(sorted((heavy - {'pydantic'}) & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]


# ---- asking the engine

ECHO = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    if asked["ask"] == "die":
        sys.exit(3)
    if asked["ask"] == "fail":
        print(json.dumps({"id": asked["id"], "error": "no such model", "exit_code": 2}), flush=True)
        continue
    print("a library's chatter", flush=True)
    print(json.dumps({"id": asked["id"], "part": 1}), flush=True)
    print(json.dumps({"id": asked["id"], "answer": asked["args"]}), flush=True)
"""


def asking(tmp_path: Path) -> Answers:
    return Answers(tmp_path / "logs" / "app.log", (sys.executable, "-c", ECHO))


def test_questions_are_answered_with_what_comes_before(tmp_path: Path) -> None:
    async def main() -> None:
        answers, parts = asking(tmp_path), []
        assert await answers.ask("echo", parts.append, model="x") == {"model": "x"}
        both = await asyncio.gather(answers.ask("echo", n=1), answers.ask("echo", n=2))
        assert [each["n"] for each in both] == [1, 2]
        assert parts == [1]
        await answers.close()

    asyncio.run(main())


def test_an_error_is_the_engines_own_and_a_death_is_told_and_mended(tmp_path: Path) -> None:
    async def main() -> None:
        answers = asking(tmp_path)
        with pytest.raises(AnswerFailed, match="no such model") as failed:
            await answers.ask("fail")
        assert failed.value.exit_code == 2
        with pytest.raises(AnswerFailed, match="ended \\(code 3\\)"):
            await answers.ask("die")
        assert await answers.ask("echo", n=1) == {"n": 1}
        await answers.close()

    asyncio.run(main())


def test_an_engine_that_cannot_start_is_told(tmp_path: Path) -> None:
    answers = Answers(tmp_path / "app.log", (str(tmp_path / "missing"),))
    with pytest.raises(AnswerFailed, match="does not start"):
        asyncio.run(answers.ask("echo"))


def test_closing_ends_a_process_that_does_not_listen(tmp_path: Path) -> None:
    code = "import time; print('{}', flush=True); time.sleep(600)"
    answers = Answers(tmp_path / "app.log", (sys.executable, "-c", code))

    async def main() -> None:
        await answers.warm_up()
        process = answers._process
        assert process is not None
        await answers.close()
        assert process.returncode is not None

    asyncio.run(main())
