"""Both models beside each other on the screen, and the dialog that exports once more."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made_runs
import psutil
import pytest
from pilots import FixedAnswers, piloted, seen, told, until
from test_chat import LONG, with_search
from textual.pilot import Pilot
from textual.widgets import Input

from edgeprune import machine, worker
from edgeprune.profiles import chat
from edgeprune.tui.answers import AnswerFailed
from edgeprune.tui.app import EdgepruneApp
from edgeprune.tui.partner import ChatFailed, Partner, fit_together
from edgeprune.tui.screens.chat import ChatScreen
from edgeprune.tui.screens.export import ExportScreen
from edgeprune.tui.widgets import chat_pane
from edgeprune.tui.widgets.chat_pane import ChatPane

SIZES = ((80, 24), (200, 60))


@pytest.fixture
def folder(tiny_export: Path, tmp_path: Path) -> Path:
    """A finished run whose models speak until they are stopped, or for ``MAX_TOKENS``."""
    made = made_runs.finished(tmp_path / "run")
    for name in (worker.EXPORT_DENSE, worker.EXPORT_PRUNED):
        with_search(tiny_export, made / name, min_length=LONG)
    return made


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    below = psutil.Process().children(recursive=True)
    assert [p.pid for p in below if chat.__file__ in p.cmdline()] == []


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_TOKENS", 8)


async def opened(pilot: Pilot[Any], folder: Path) -> dict[str, ChatPane]:
    pilot.app.push_screen(ChatScreen(folder))
    await until(pilot, lambda: len(pilot.app.screen.query(ChatPane)) == 2)
    return {pane.model: pane for pane in pilot.app.screen.query(ChatPane)}


async def loaded(pilot: Pilot[Any], folder: Path) -> dict[str, ChatPane]:
    panes = await opened(pilot, folder)
    await until(pilot, lambda: seen(pilot.app).count("loaded in") == 2)
    return panes


async def say(pilot: Pilot[Any], text: str) -> None:
    pilot.app.screen.query_one(Input).value = text
    await pilot.press("enter")


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("size", SIZES)
def test_both_answer_one_after_the_other(folder: Path, size: tuple[int, int]) -> None:
    async def act(pilot: Pilot[Any]) -> None:
        panes = await loaded(pilot, folder)
        assert "dense, 7" in seen(pilot.app)  # kB
        await say(pilot, "Hello")
        await until(pilot, lambda: seen(pilot.app).count("8 tokens, ") == 2)
        assert seen(pilot.app).count("You: Hello") == 2
        assert seen(pilot.app).count("first token after") == 2
        await say(pilot, "Again")
        await until(pilot, lambda: len(panes["pruned"]._history) == 4)
        roles = [message["role"] for message in panes["dense"]._history]
        assert roles == ["user", "assistant"] * 2
        await until(pilot, lambda: "tokens of prompt" in seen(pilot.app))
        await pilot.press("ctrl+l")
        await until(pilot, lambda: "You:" not in seen(pilot.app))
        assert panes["dense"]._history == []
        await pilot.press("escape")
        await until(pilot, lambda: not isinstance(pilot.app.screen, ChatScreen))

    piloted(act, size=size)


def test_escape_stops_the_answer_and_the_turn(folder: Path) -> None:
    async def act(pilot: Pilot[Any]) -> None:
        panes = await loaded(pilot, folder)
        chat_screen = pilot.app.screen
        assert isinstance(chat_screen, ChatScreen)
        partner = panes["dense"].partner
        assert partner.pid is not None
        os.kill(partner.pid, signal.SIGSTOP)  # so that it is still speaking
        await say(pilot, "Hello")
        await until(pilot, lambda: chat_screen._speaking is panes["dense"])
        await say(pilot, "and")
        await until(pilot, lambda: "still speaking" in told(pilot.app))
        await pilot.press("ctrl+l")
        assert pilot.app.screen.query_one(Input).value == "and"
        await pilot.press("escape")
        os.kill(partner.pid, signal.SIGCONT)
        await until(pilot, lambda: "stopped, " in seen(pilot.app))
        await until(pilot, lambda: not chat_screen._answering)
        assert panes["pruned"]._history == []
        assert [m["role"] for m in panes["dense"]._history] == ["user", "assistant"]
        assert pilot.app.screen is chat_screen

    piloted(act)


@pytest.mark.usefixtures("short")
def test_a_model_killed_in_mid_sentence_is_told_and_starts_again(folder: Path) -> None:
    async def act(pilot: Pilot[Any]) -> None:
        panes = await loaded(pilot, folder)
        screen = pilot.app.screen
        assert isinstance(screen, ChatScreen)
        pid = panes["dense"].partner.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        await say(pilot, "Hello")
        await until(pilot, lambda: screen._speaking is panes["dense"])
        os.kill(pid, signal.SIGKILL)
        await until(pilot, lambda: "its process has ended (signal 9)" in seen(pilot.app))
        assert "^r starts it again" in seen(pilot.app)
        await until(pilot, lambda: len(panes["pruned"]._history) == 2)  # the other goes on
        assert panes["dense"]._history == []
        await pilot.press("ctrl+r")
        await until(pilot, lambda: "loaded in" in seen(pilot.app))
        await say(pilot, "Hello")
        await until(pilot, lambda: len(panes["pruned"]._history) == 4)
        assert len(panes["dense"]._history) == 2

    piloted(act, size=(200, 60))


def test_a_model_that_dies_in_silence_is_told(folder: Path) -> None:
    async def act(pilot: Pilot[Any]) -> None:
        panes = await loaded(pilot, folder)
        for pane in panes.values():
            assert pane.partner.pid is not None
            os.kill(pane.partner.pid, signal.SIGKILL)
        await until(pilot, lambda: all(pane.failed for pane in panes.values()))
        await until(pilot, lambda: seen(pilot.app).count("(signal 9)") == 2)
        await say(pilot, "Hello")
        await until(pilot, lambda: "Neither model is there" in told(pilot.app))

    piloted(act, size=(200, 60))


def test_an_export_that_is_gone_is_told_in_its_pane(tmp_path: Path) -> None:
    folder = made_runs.finished(tmp_path / "run")

    async def act(pilot: Pilot[Any]) -> None:
        await opened(pilot, folder)
        await until(pilot, lambda: seen(pilot.app).count("is gone; make it again with") == 2)
        assert "edgeprune run --resume" in seen(pilot.app)

    piloted(act, size=(200, 60))


@pytest.mark.usefixtures("short")
def test_without_memory_for_both_each_is_loaded_for_its_turn(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(2**30, 1000))

    async def act(pilot: Pilot[Any]) -> None:
        panes = await opened(pilot, folder)
        await until(pilot, lambda: "not enough free memory for both" in seen(pilot.app))
        assert [pane.partner.pid for pane in panes.values()] == [None, None]
        await say(pilot, "Hello")
        await until(pilot, lambda: len(panes["pruned"]._history) == 2)
        assert panes["dense"].partner.pid is None
        assert panes["pruned"].partner.pid is not None
        assert not panes["dense"].failed

    piloted(act, size=(200, 60))


def test_models_are_loaded_together_only_where_there_is_room() -> None:
    assert fit_together([100, 100], 300)
    assert not fit_together([100, 101], 300)


def test_how_fast_an_answer_came() -> None:
    done = {
        "tokens": 42,
        "prompt_tokens": 57,
        "tokens_per_second": 35.12,
        "time_to_first_token_seconds": 0.12,
        "stopped": True,
    }
    assert chat_pane.figures(done) == (
        "stopped, 42 tokens, 35.1 tokens/s, first token after 120 ms, 57 tokens of prompt"
    )
    nothing = {**done, "tokens_per_second": None, "time_to_first_token_seconds": None}
    assert chat_pane.figures(nothing) == "stopped, 42 tokens, 57 tokens of prompt"


def test_leaving_while_it_loads_and_a_process_that_does_not_end(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeprune.tui.answers.GRACE", 0.05)

    async def run() -> None:
        partner = Partner(folder / worker.EXPORT_DENSE, tmp_path / "log", lambda _: None)
        await partner.start()
        assert partner.pid is not None
        os.kill(partner.pid, signal.SIGSTOP)
        await partner.close()
        assert partner.pid is None
        with pytest.raises(ChatFailed, match="has ended"):
            await partner.say([{"role": "user", "content": "x"}], print)
        partner.stop()

    asyncio.run(run())

    async def act(pilot: Pilot[Any]) -> None:
        await opened(pilot, folder)
        await pilot.press("escape")
        await until(pilot, lambda: not isinstance(pilot.app.screen, ChatScreen))

    piloted(act)


# ---- exporting once more


class SlowAnswers(FixedAnswers):
    """Exports seven layers, and the rest when it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = asyncio.Event()

    async def ask(self, question: str, on_part: Any = None, **args: Any) -> Any:
        assert question == "export"
        self.asked.append((question, args))
        on_part({"done": 7, "total": 30, "note": "layer 7"})
        await self.go_on.wait()
        return {"folder": args["output"], "file_bytes": 205e6}


@pytest.mark.parametrize("size", SIZES)
def test_exported_in_another_precision(tmp_path: Path, size: tuple[int, int]) -> None:
    run = made_runs.finished(tmp_path / "run")
    (run / "export-pruned-int8").mkdir()
    output = str(run / "export-pruned-fp16")
    answers = SlowAnswers()

    async def act(pilot: Pilot[Any]) -> None:
        pilot.app.push_screen(ExportScreen(run))
        await until(pilot, lambda: "ONNX, int8" in seen(pilot.app))
        await pilot.press("enter")
        await until(pilot, lambda: "exists:" in seen(pilot.app))
        await pilot.press("j")
        await until(pilot, lambda: pilot.app.screen.query_one(Input).value == output)
        await pilot.press("enter")
        await until(pilot, lambda: "layer 7" in seen(pilot.app))
        await pilot.press("enter")  # it is at work
        answers.go_on.set()
        await until(pilot, lambda: "✓ 205.0 MB of fp16 in" in seen(pilot.app))
        wanted = {"folder": str(run), "precision": "fp16", "output": output}
        assert answers.asked == [("export", wanted)]

    piloted(act, EdgepruneApp(answers), size=size)


def test_an_export_goes_on_when_its_dialog_is_closed(tmp_path: Path) -> None:
    run = made_runs.finished(tmp_path / "run")
    answers = SlowAnswers()

    async def act(pilot: Pilot[Any]) -> None:
        pilot.app.push_screen(ExportScreen(run))
        await until(pilot, lambda: "ONNX, int8" in seen(pilot.app))
        await pilot.press("enter")
        await until(pilot, lambda: answers.asked)
        await pilot.press("escape")
        await until(pilot, lambda: not isinstance(pilot.app.screen, ExportScreen))
        answers.go_on.set()
        await until(pilot, lambda: "✓ 205.0 MB of int8 in" in told(pilot.app))

    piloted(act, EdgepruneApp(answers))


def test_an_export_that_fails_is_told_and_a_typed_folder_is_kept(tmp_path: Path) -> None:
    run = made_runs.finished(tmp_path / "run")
    answers = FixedAnswers(export=AnswerFailed("the disk is full; free space on it"))

    async def act(pilot: Pilot[Any]) -> None:
        pilot.app.push_screen(ExportScreen(run))
        await until(pilot, lambda: pilot.app.screen.query_one(Input).value)
        pilot.app.screen.query_one(Input).value = str(tmp_path / "mine")
        await pilot.press("j", "enter")
        await until(pilot, lambda: "the disk is full" in seen(pilot.app))
        assert answers.asked[0][1]["output"] == str(tmp_path / "mine")

    piloted(act, EdgepruneApp(answers))
