"""The dashboard of a run: what it shows as the run goes, ends, dies or vanishes, and what its keys do."""

import itertools
import json
import os
import random
import shutil
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from pilots import FixedAnswers, piloted, seen, told, until

from edgeprune import control, lock, runs, worker
from edgeprune import recipe as recipes
from edgeprune import run as engine
from edgeprune.errors import BadInput
from edgeprune.events import (
    Evaluation,
    Note,
    Progress,
    PruneIteration,
    RunFailed,
    RunFinished,
    RunStarted,
    StageFinished,
    StageStarted,
    TrainStep,
    ignore,
)
from edgeprune.log import LogWriter
from edgeprune.remote import address
from edgeprune.tui.app import EdgepruneApp
from edgeprune.tui.screens import start
from edgeprune.tui.screens.message import MessageScreen
from edgeprune.tui.screens.question import StopScreen
from edgeprune.tui.screens.run import RunScreen
from edgeprune.tui.watching import Watcher
from edgeprune.tui.widgets import run_text
from edgeprune.tui.widgets.run_log import RunLog

RECIPE = recipes.parse_toml('[source]\nmodel = "some/model"\n[prune]\nsparsity = 0.3\n')
FAKE = Path(__file__).with_name("fake_worker.py")
NAMES = [stage.name for stage in worker.STAGES]
LAYERS = 30
WIDE = (200, 60)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / worker.RECIPE).write_text(RECIPE.to_toml())
    worker.write_state(folder, {})
    return folder


@contextmanager
def at_work(folder):
    """Hold the run's lock as its worker does; release it with the block or by ``stack.close()``."""
    with ExitStack() as stack:
        stack.enter_context(lock.only_one(folder, ignore, 0.0))
        yield stack


def write(folder, *events):
    with LogWriter(folder / worker.EVENTS) as emit:
        for event in events:
            emit(event)


def beginning():
    layer = {"num_key_value_heads": 3, "intermediate_size": 1536}
    result = {"inspection": {"layers": [layer] * LAYERS}}
    return [
        RunStarted(folder="run", stages=NAMES, pid=os.getpid()),
        StageStarted(stage="source", title="Check the source model"),
        StageFinished(stage="source", seconds=2.0, result=result),
        StageStarted(stage="prune", title="Prune", index=2, of=7),
    ]


def iteration(number):
    rng = random.Random(number)
    return PruneIteration(
        iteration=number,
        of=8,
        loss=3.0 + number / 10,
        decoder_parameters=100_000_000 - number,
        layer_importance=[rng.uniform(-1, 1) for _ in range(LAYERS)],
        layer_sparsity=[number / 20] * LAYERS,
        num_key_value_heads=[2] * LAYERS,
        intermediate_size=[1024 - 32 * number] * LAYERS,
        seconds=1.0,
    )


def passes(done):
    return Progress(stage="prune", done=done, total=800, unit="layer passes", note="iteration")


def update(step, of=1000):
    return TrainStep(
        step=step,
        of=of,
        loss=3.5,
        lm_loss=3.5,
        learning_rate=1e-4,
        gradient_norm=1.0,
        tokens=step,
        tokens_per_second=1234.0,
        peak_share=0.3,
        seconds_left=60.0,
    )


def show(folder, act, size=(80, 24), **replies):
    """Open the run at ``folder`` on top of the list, and ``act`` once its state is known."""

    async def run(pilot):
        screen = RunScreen(folder)
        pilot.app.push_screen(screen)
        await until(pilot, lambda: screen.info is not None)
        await act(pilot, screen)

    piloted(run, EdgepruneApp(FixedAnswers(**replies)), size)


async def until_seen(pilot, *texts):
    looks = itertools.count()

    def condition():  # drawing the whole screen costs more than what is waited for
        return next(looks) % 8 == 0 and all(text in seen(pilot.app) for text in texts)

    await until(pilot, condition, str(texts))


# ---- at work


def test_all_four_views_fit_a_small_terminal(folder):
    write(folder, *beginning(), passes(100), iteration(1), passes(200))
    write(folder, update(1), Evaluation(step=1, loss=3.0, perplexity=20.0, tokens=9))
    write(folder, Note(text="mind [the] gap", level="warning"))

    async def act(pilot, screen):
        await until_seen(pilot, "▶ running", "✓source ▶prune", "·report", "5 stages", "memory")
        assert "some/model · 30% sparsity" in seen(pilot.app)
        await until_seen(pilot, "✓ Check the source model     2.0 s", "· Report  ", "waiting")
        await pilot.press("2")
        await until_seen(pilot, "KV heads of 3 and MLP channels of 1,536", "iteration 1 of 8")
        text = seen(pilot.app)
        assert all(f" {index} █" in text for index in range(LAYERS))
        assert text.count("992") == LAYERS
        await pilot.press("3")
        await until_seen(pilot, "┤", "Training and held-out loss", "share of peak 30%")
        await pilot.press("4")
        await until_seen(pilot, "warning: mind [the] gap", "iteration 1 of 8: loss 3.10")
        assert "✓source ▶prune" in seen(pilot.app)
        await pilot.press("escape")
        await until(pilot, lambda: pilot.app.screen is not screen and screen._left.is_set())
        assert lock.is_held(folder)

    with at_work(folder):
        show(folder, act)


def test_a_large_terminal_shows_all_at_once_and_a_resize_changes_over(folder):
    write(folder, *beginning(), passes(100), iteration(1), update(1))

    async def act(pilot, screen):
        await until_seen(pilot, "1 Stages ─", "2 Layers ─", "3 Curves ─", "4 Log ─", "┤")
        await until_seen(pilot, "  29 █", "5% cut", "iteration 1 of 8: loss")
        await pilot.press("2")
        await until(pilot, lambda: screen.focused is not None and screen.focused.id == "layers")
        await pilot.resize_terminal(80, 24)
        await until_seen(pilot, "1 Stages  2 Layers  3 Curves  4 Log", "  14 █", "  29 █")
        assert "4 Log ─" not in seen(pilot.app)
        await pilot.resize_terminal(40, 12)
        await until_seen(pilot, "running")
        await pilot.resize_terminal(*WIDE)
        await until_seen(pilot, "4 Log ─", "5% cut", "iteration 1 of 8: loss")

    with at_work(folder):
        show(folder, act, WIDE)


def test_it_follows_the_run_to_its_end_and_opens_the_results(folder, monkeypatch):
    opened = []
    monkeypatch.setattr(EdgepruneApp, "open_run", lambda _app, path: opened.append(path))
    write(folder, *beginning())

    async def act(pilot, screen):
        await until_seen(pilot, "time left unknown", "Stages")
        await pilot.press("2")
        await until_seen(pilot, "not pruned yet")
        write(folder, passes(200), passes(400), iteration(4))
        await until_seen(pilot, "50%", "400/800 layer passes", "after iteration 4 of 8")
        write(folder, iteration(5))
        await until_seen(pilot, "after iteration 5 of 8", " 864 ")
        await pilot.press("enter")
        assert not opened
        write(folder, *[StageFinished(stage=name, seconds=1.0) for name in NAMES[1:]])
        write(folder, RunFinished(results="results.json", report="report.html", seconds=9.0))
        await until_seen(pilot, "Finished: press Enter for the results", "✓report")
        await pilot.press("enter")
        await until(pilot, lambda: opened == [folder] and pilot.app.screen is not screen)

    with at_work(folder):
        show(folder, act)


def test_a_log_of_20000_events_is_taken_in_at_once(folder):
    write(folder, *beginning(), iteration(1))
    line = json.dumps(update(0, 20_000).to_json())
    lines = (line.replace('"step": 0', f'"step": {n}') for n in range(1, 20_001))
    with (folder / worker.EVENTS).open("a") as log:
        log.writelines(f"{line}\n" for line in lines)

    async def act(pilot, screen):
        assert screen.picture.training_loss.points[-1][0] == 20_000
        assert screen._events == 1
        await pilot.press("3")
        await until_seen(pilot, "20,000/20,000 updates", "┤")

    with at_work(folder):
        show(folder, act)


def test_a_run_that_has_ended_is_not_drawn_again(folder):
    write(folder, *beginning(), RunFailed(error="the disk is full: free some space", exit_code=2))
    watcher = Watcher(folder)
    assert watcher.first().info.state == "failed"
    watcher._looked -= 10
    assert watcher.look() is None


def test_the_log_stays_where_one_reads(folder):
    write(folder, *beginning(), *[Note(text=f"note {n}") for n in range(100)])

    async def act(pilot, screen):
        await pilot.press("4")
        await until_seen(pilot, "note 99")
        await pilot.press("g")
        await until_seen(pilot, "note 3")
        write(folder, Note(text="a new one"))
        await until(pilot, lambda: screen.query_one(RunLog)._shown == screen.picture.told == 104)
        assert "a new one" not in seen(pilot.app)
        await pilot.press("G")
        await until_seen(pilot, "a new one")
        write(folder, Note(text="and another"))
        await until_seen(pilot, "and another")

    with at_work(folder):
        show(folder, act)


# ---- what goes wrong


def test_a_failed_run_says_what_why_and_what_to_do(folder):
    (folder / worker.OUTPUT).write_text("chatter\nterminate called: std::bad_alloc\n\n")
    write(folder, *beginning(), RunFailed(error="RuntimeError: bug", next="x"))

    async def act(pilot, screen):
        await until_seen(
            pilot,
            "✗ failed",
            "Failed: Prune: RuntimeError: bug",
            "Likely cause: out of memory",
            "What to do: close other programs",
            "Last words: terminate called: std::bad_alloc",
            "✗prune",
        )
        keys = {active.binding.id for active in screen.active_bindings.values() if active.enabled}
        assert "run.resume" in keys
        assert not keys & {"run.stop", "run.pause", "run.results"}
        await pilot.press("y")
        assert pilot.app.clipboard == worker.resume_command(folder)

    show(folder, act)


def test_a_worker_killed_from_outside_is_told(folder):
    write(folder, *beginning(), passes(10))

    async def act(pilot, screen):
        await until_seen(pilot, "▶ running")
        stack.close()
        await until_seen(pilot, "✗ died", "Likely cause: killed from outside", "Press r to go on")
        await until_seen(pilot, "✓source ✗prune ·export")

    with at_work(folder) as stack:
        show(folder, act)


def test_a_folder_that_vanishes_is_told(folder):
    write(folder, *beginning())

    async def act(pilot, screen):
        await until_seen(pilot, "▶ running")
        shutil.rmtree(folder)
        await until_seen(pilot, "? missing", "no such", "Then: edgeprune runs forget")
        folder.mkdir()
        (folder / worker.RECIPE).write_text(RECIPE.to_toml())
        worker.write_state(folder, {})
        write(folder, RunStarted(folder="run", stages=["source", "other"], pid=1))
        await until_seen(pilot, "·source ·other", "some/model")

    with at_work(folder) as stack:
        show(folder, act)
        stack.pop_all()  # its file is gone


def test_a_damaged_log_and_one_that_is_missing(folder):
    write(folder, *beginning())
    with (folder / worker.EVENTS).open("ab") as log:
        log.write(b'{"kind": "progress", "sta\x00\xff\n[1]\n')
    write(folder, passes(10), Progress(stage="prune", done="x", total=3), iteration(1))

    async def damaged(pilot, screen):
        await until_seen(pilot, "Log: 3 lines were damaged", "Pruning: iteration 1 of 8")

    with at_work(folder):
        show(folder, damaged)
    (folder / worker.EVENTS).unlink()
    worker.write_state(folder, {"source": {"seconds": 3.0, "result": {}}})

    async def missing(pilot, screen):
        await until_seen(pilot, "✓source ·prune", "✓ Check the source model     3.0 s")

    show(folder, missing)


# ---- keys


def test_pause_go_on_and_stop_a_real_worker(folder, monkeypatch):
    monkeypatch.setattr(engine, "WORKER", (sys.executable, str(FAKE)))
    (folder / "misdeed").write_text("hang")
    engine.restart(folder)

    async def act(pilot, screen):
        await until_seen(pilot, "▶ running")
        await pilot.press("p")
        await until_seen(pilot, "‖ paused")
        await until(pilot, lambda: not screen._doing)
        await pilot.press("p")
        await until_seen(pilot, "▶ running")
        await until(pilot, lambda: not screen._doing)
        await pilot.press("s")
        await until(pilot, lambda: isinstance(pilot.app.screen, StopScreen))
        await until_seen(pilot, "Stop this run?", "edgeprune run --resume")
        await pilot.press("escape")
        await until(pilot, lambda: pilot.app.screen is screen)
        assert lock.is_held(folder)
        await pilot.press("s")
        await until(pilot, lambda: isinstance(pilot.app.screen, StopScreen))
        await pilot.press("enter")
        await until_seen(pilot, "■ stopped", "Stopped; what is finished is kept. Press r")
        await until(pilot, lambda: not screen._doing)
        assert any(line.text == "stopping ..." for line in screen.picture.lines)

    try:
        show(folder, act)
        assert not lock.is_held(folder)
    finally:
        control.stop(folder)


def test_resume_asks_the_engine_and_a_refusal_is_shown(folder, monkeypatch):
    def refuse(_folder):
        raise BadInput("this system cannot pause a process")

    monkeypatch.setattr(control, "pause", refuse)
    write(folder, *beginning(), RunFailed(error="stopped", exit_code=130))
    asked = []

    def resume(on_part, folder):
        asked.append(folder)
        write(Path(folder), RunStarted(folder=folder, stages=NAMES, finished=["source"], pid=1))
        return {}

    async def act(pilot, screen):
        await until_seen(pilot, "■ stopped")
        await pilot.press("r")
        await until_seen(pilot, "▶ running", "✓source ·prune")
        assert asked == [str(folder)]
        await pilot.press("4")
        await until_seen(pilot, "going on after: Check the source model", "p Pause")
        await until(pilot, lambda: not screen._doing)
        await pilot.press("p")
        await until(pilot, lambda: isinstance(pilot.app.screen, MessageScreen))
        await until_seen(pilot, "this system cannot pause a process")

    with at_work(folder):
        show(folder, act, resume=resume)


@pytest.fixture
def away(folder):
    """A run at work on another machine, which nothing here watches."""
    address.write(folder, address.Far("lab", "run-1"))
    worker.write_state(folder, {"send": {"seconds": 1.0, "result": {}}})
    started = RunStarted(folder="run", stages=["send", *NAMES], finished=["send"], pid=1)
    write(folder, started, StageStarted(stage="source", title="Check the source model"))
    return folder


def test_a_run_that_goes_on_elsewhere_is_attached_to_again(away):
    runs.remember(away)
    asked = []

    def resume(on_part, folder):
        asked.append(folder)
        write(Path(folder), RunStarted(folder=folder, stages=["send", *NAMES], pid=1))
        return {}

    async def act(pilot, screen):
        await until_seen(pilot, "→ away", "on lab", "▶source", "Press a to attach again")
        await until_seen(pilot, "edgeprune attach", "a Attach")
        assert not {"p Pause", "r Resume"} & set(seen(pilot.app).split("  "))
        await pilot.press("escape")
        await until_seen(pilot, "→ away")
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(pilot.app.screen, RunScreen))
        await until_seen(pilot, "a Attach")
        with at_work(away):
            await pilot.press("a")
            await until_seen(pilot, "▶ running", "s Stop")
            assert "Pause" not in seen(pilot.app)  # what another machine does cannot stand still
        assert asked == [str(away)]

    show(away, act, resume=resume)


def test_a_state_that_only_a_newer_engine_knows_is_shown(folder):
    write(folder, *beginning())
    info = replace(runs.describe(folder), state="asleep")
    assert "? asleep" in run_text.about(info, "").plain
    assert start.sign(info.state) == "? asleep"


def test_other_themes_and_no_colour(folder, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    write(folder, *beginning(), iteration(1), update(1), update(2))

    async def act(pilot, screen):
        await pilot.press("3")
        for theme in ("textual-light", "ansi-dark"):
            pilot.app.theme = theme
            write(folder, update(3))
            await until_seen(pilot, "┤", "▶ running", "✓source ▶prune")

    with at_work(folder):
        show(folder, act)


@pytest.mark.parametrize("was_at_work", [True, False])
def test_a_run_that_goes_on_elsewhere_is_stopped_from_here(away, was_at_work):
    asked = []

    def stop_away(on_part, folder):
        asked.append(folder)
        if was_at_work:
            control.say_stopped(Path(folder))
        return {"told": was_at_work}

    async def act(pilot, screen):
        await until_seen(pilot, "→ away", "on lab", "s Stop")
        await pilot.press("s")
        await until(pilot, lambda: isinstance(pilot.app.screen, StopScreen))
        await pilot.press("enter")
        said = "Stopped on lab" if was_at_work else "lab has ended it already"
        await until(pilot, lambda: said in told(pilot.app))
        await until_seen(pilot, "r Resume" if was_at_work else "a Attach")
        assert asked == [str(away)]

    show(away, act, stop_away=stop_away)
