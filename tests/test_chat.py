"""The process that lets an export speak: its lines, its figures, its errors, and that it ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from exports import spoil

from edgeprune.profiles import chat, runner

HELLO = [{"role": "user", "content": "Hello, café 日本語"}]
LONG = 400


class Talk:
    """A chat process and its pipes."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", chat.__file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def ask(self, **line: Any) -> None:
        self.write(json.dumps(line) + "\n")

    def write(self, lines: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(lines)
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def answer(self) -> tuple[str, dict[str, Any]]:
        text = ""
        while "text" in (heard := self.hear()):
            text += heard["text"]
        return text, heard

    def end(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(30)


@pytest.fixture
def talk() -> Iterator[Callable[[Path], Talk]]:
    talks: list[Talk] = []

    def begin(folder: Path) -> Talk:
        talks.append(Talk(folder))
        return talks[-1]

    yield begin
    for each in talks:
        with each.process:
            each.process.kill()


def with_search(export: Path, folder: Path, **search: Any) -> Path:
    """Copy ``export`` to ``folder`` with other options of the search."""
    shutil.copytree(export, folder)
    config = json.loads((folder / runner.CONFIG).read_text("utf-8"))
    config["search"] |= search
    (folder / runner.CONFIG).write_text(json.dumps(config), "utf-8")
    return folder


def test_it_answers_in_pieces_and_says_how_fast(
    tiny_export: Path, talk: Callable[[Path], Talk]
) -> None:
    one = talk(tiny_export)
    ready = one.hear()
    assert ready["ready"] > 0
    assert ready["plain"] == ""
    one.ask(say=HELLO, max_tokens=12)
    first, end = one.answer()
    done = end["done"]
    assert 1 <= done["tokens"] <= 12
    assert done["prompt_tokens"] > len("Hello, caf")
    assert done["time_to_first_token_seconds"] > 0
    assert done["stopped"] is False
    one.ask(say=HELLO, max_tokens=12)
    assert one.answer()[0] == first  # greedy, as the export says
    assert one.end() == 0


def test_characters_of_several_tokens_stay_whole(tiny_export: Path) -> None:
    speaker = chat.Speaker(tiny_export)
    speaker.load()
    text = "日本語 é 🙂"
    stream = speaker._tokenizer.create_stream()
    tokens = [int(token) for token in speaker._tokenizer.encode(text)]
    pieces = [stream.decode(token) for token in tokens]
    assert "".join(pieces) == text
    assert len(tokens) > len(text)  # so characters were really in parts
    assert "\ufffd" not in "".join(pieces)


def test_it_stops_in_the_middle_and_goes_on(
    tiny_export: Path, tmp_path: Path, talk: Callable[[Path], Talk]
) -> None:
    one = talk(with_search(tiny_export, tmp_path / "long", min_length=LONG))
    one.hear()
    # Both lines at once: the stop is there before the answer can have ended.
    one.write(f'{json.dumps({"say": HELLO, "max_tokens": LONG})}\n{{"stop": true}}\n')
    _, end = one.answer()
    assert end["done"]["stopped"] is True
    assert end["done"]["tokens"] < LONG
    one.ask(stop=True)  # of nothing
    one.ask(say=HELLO, max_tokens=5)
    assert one.answer()[1]["done"]["tokens"] == 5


def test_the_speed_leaves_the_first_token_out() -> None:
    done = chat._figures([2.0, 0.1, 0.3], prompt=7, stopped=False)
    assert done["tokens_per_second"] == pytest.approx(5.0)
    assert done["time_to_first_token_seconds"] == 2.0
    assert chat._figures([2.0], 7, True)["tokens_per_second"] is None
    assert chat._figures([], 7, True)["time_to_first_token_seconds"] is None


def test_a_model_without_a_template_gets_plain_text(tiny_export: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(tiny_export, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    speaker = chat.Speaker(plain)
    speaker.load()
    assert speaker.plain == "the model has no chat template"
    assert speaker.prompt_of([*HELLO, {"role": "assistant", "content": "B"}]) == (
        f"{HELLO[0]['content']}\nB"
    )
    *_, last = speaker.answer(HELLO, 3, threading.Event())
    assert last["done"]["tokens"] <= 3


def test_what_it_cannot_do_is_an_error_and_it_goes_on(
    tiny_export: Path, talk: Callable[[Path], Talk]
) -> None:
    one = talk(tiny_export)
    one.hear()
    one.ask(say=[{"role": "user", "content": "word " * 2000}])
    assert "begin a new one" in one.hear()["error"]
    for wrong in ({"say": []}, {"say": "x"}, {"neither": 1}, {"say": HELLO, "max_tokens": "many"}):
        one.ask(**wrong)
        assert "not understood" in one.hear()["error"]
    one.write("{\n[]\n")
    assert "error" in one.hear()
    assert "error" in one.hear()
    one.ask(say=HELLO, max_tokens=3)
    assert "done" in one.answer()[1]


def test_it_ends_with_its_input_in_the_middle_of_a_sentence(
    tiny_export: Path, tmp_path: Path, talk: Callable[[Path], Talk]
) -> None:
    one = talk(with_search(tiny_export, tmp_path / "long", min_length=LONG))
    one.ask(say=HELLO, max_tokens=LONG)
    assert one.end() == 0


@pytest.mark.parametrize("fault", ["absent", "no config", "weights cut short"])
def test_a_folder_that_cannot_be_used_is_one_line(
    tiny_export: Path, tmp_path: Path, talk: Callable[[Path], Talk], fault: str
) -> None:
    one = talk(spoil(tiny_export, tmp_path / "bad", fault))
    heard = one.hear()
    assert str(tmp_path / "bad") in heard["error"]
    assert "\n" not in heard["error"]
    assert one.process.wait(30) == 2


def test_a_damaged_tokenizer_is_one_line(
    tiny_export: Path, tmp_path: Path, talk: Callable[[Path], Talk]
) -> None:
    folder = shutil.copytree(tiny_export, tmp_path / "bad")
    (folder / "tokenizer.json").write_text("{")
    one = talk(folder)
    assert "tokenizer" in one.hear()["error"]
    assert one.process.wait(30) == 2
