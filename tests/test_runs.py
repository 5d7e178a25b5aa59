"""Runs that outlive who started them, what is asked of them from outside, and the list of them."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import typer.main
from hypothesis import given
from hypothesis import strategies as st

from edgeprune import cli, comparison, control, lock, runs, worker
from edgeprune import recipe as recipes
from edgeprune import run as engine
from edgeprune.__main__ import main
from edgeprune.comparison import pareto_front
from edgeprune.errors import BadInput, EdgepruneError, Interrupted
from edgeprune.events import (
    Evaluation,
    Note,
    Progress,
    RunFailed,
    RunFinished,
    RunStarted,
    StageFinished,
    StageStarted,
)
from edgeprune.log import LogWriter, read_events, read_kinds
from edgeprune.runs import Figures

RECIPE = recipes.parse_toml('[source]\nmodel = "m"\n[prune]\nsparsity = 0.3\n')
FAKE = Path(__file__).with_name("fake_worker.py")
RESULTS = {"first": {"value": 1}, "second": {"value": 2}}
NEITHER = "import sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def fake(monkeypatch):
    """Let the stages of ``fake_worker.py`` do the work, on a model that need not exist."""
    monkeypatch.setattr(engine, "_source_problems", lambda source: [])
    monkeypatch.setattr(engine, "WORKER", (sys.executable, str(FAKE)))


@pytest.fixture
def detached(fake, folder):
    """Leave a run at work whose second stage does the deed given; it is ended with the test."""

    def go(deed):
        prepare(folder, deed)
        started = engine.restart(folder)
        wait_for(lambda: told(folder, f"second: {deed}"))
        return started

    yield go
    if folder.exists() and lock.is_held(folder):
        control.stop(folder)


def prepare(folder, deed):
    folder.mkdir()
    (folder / worker.RECIPE).write_text(RECIPE.to_toml())
    worker.write_state(folder, {})
    (folder / "misdeed").write_text(deed)


def told(folder, text):
    return any(e.text == text for e in read_kinds(folder / worker.EVENTS, Note))


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def resumed(folder):
    (folder / "misdeed").unlink()
    return engine.resume(folder)


# ---- detached


def test_a_detached_run_survives_who_started_it_and_can_be_watched(fake, folder):
    prepare(folder, "wait")
    code = (
        "import sys, time; from pathlib import Path; from edgeprune import run\n"
        f"run.WORKER = (sys.executable, {str(FAKE)!r})\n"
        "run.restart(Path(sys.argv[1])); print('left', flush=True); time.sleep(600)"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout.readline() == "left\n"
    starter.kill()
    starter.communicate()
    wait_for(lambda: told(folder, "second: wait"))
    info = runs.describe(folder)
    assert (info.state, info.stage) == ("running", "Second")
    assert lock.is_alive(info.pid)
    with pytest.raises(EdgepruneError, match=f"process {info.pid} is at work on this run"):
        engine.resume(folder)

    def leave(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        control.attach(folder, leave)
    assert runs.describe(folder).state == "running"

    seen = []

    def watch(event):
        seen.append(event)
        (folder / "go").touch()

    assert control.attach(folder, watch) == RESULTS
    assert [type(event) for event in seen[:4]] == [
        RunStarted,
        StageStarted,
        StageFinished,
        StageStarted,
    ]
    assert isinstance(seen[-1], RunFinished)
    wait_for(lambda: not lock.is_held(folder))
    assert runs.describe(folder).state == "finished"
    assert control.attach(folder) == RESULTS
    assert control.stop(folder) is False


def test_what_is_refused_in_the_first_stage_is_told_at_the_start(fake, folder, monkeypatch):
    code = (
        "import sys; from edgeprune import worker; from edgeprune.errors import BadInput\n"
        "def refuse(work): raise BadInput('no such model')\n"
        "worker.STAGES = (worker.Stage('source', 'Source', refuse),)\n"
        "sys.exit(worker.main(worker.Path(sys.argv[1]), detached=True))"
    )
    monkeypatch.setattr(engine, "WORKER", (sys.executable, "-c", code))
    with pytest.raises(BadInput, match=r"^no such model$"):
        engine.start(RECIPE, folder)
    assert not folder.exists()
    assert runs.list_runs() == []


def test_a_worker_that_dies_at_once_is_told_at_the_start(fake, folder, monkeypatch):
    monkeypatch.setattr(engine, "WORKER", (sys.executable, "-c", "exit('last words')"))
    with pytest.raises(EdgepruneError, match="code 1; its last words: last words"):
        engine.start(RECIPE, folder)
    assert runs.describe(folder).state == "dead"


def test_ctrl_c_while_it_starts_stops_it(fake, folder):
    prepare(folder, "wait")

    def interrupt(event):
        if isinstance(event, StageStarted):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="go on with: edgeprune run --resume"):
        engine.restart(folder, interrupt)
    assert not lock.is_held(folder)
    assert runs.describe(folder).state == "stopped"


# ---- stopping and pausing


def test_stopped_then_resumed_gives_the_same(detached, folder):
    detached("hang")
    assert control.stop(folder) is True
    info = runs.describe(folder)
    assert (info.state, info.pid, info.next) == ("stopped", None, worker.resume_command(folder))
    assert isinstance(read_events(folder / worker.EVENTS)[-1], RunFailed)
    assert not (folder / worker.STOP).exists()
    assert control.stop(folder) is False
    with pytest.raises(Interrupted, match="stopped; go on with"):
        control.attach(folder)
    assert resumed(folder) == RESULTS


def test_a_signal_stops_it_in_order(detached, folder):
    started = detached("hang")
    os.kill(started.pid, signal.SIGTERM)
    wait_for(lambda: not lock.is_held(folder))
    assert runs.describe(folder).state == "stopped"


def test_one_that_does_not_stop_is_ended_and_called_stopped(detached, folder, monkeypatch):
    started = detached("hang stubbornly")
    monkeypatch.setattr(worker, "PATIENCE", -4.0)  # and 5 seconds
    assert control.stop(folder)
    assert not lock.is_alive(started.pid)
    assert runs.describe(folder).state == "stopped"


def test_an_attached_run_is_stopped_from_elsewhere(fake, folder):
    prepare(folder, "hang")
    stoppers = []

    def stop(event):
        if isinstance(event, Note) and event.text == "second: hang":
            stoppers.append(threading.Thread(target=control.stop, args=(folder,)))
            stoppers[0].start()

    with pytest.raises(Interrupted, match="stopped; go on with"):
        engine.resume(folder, stop)
    stoppers[0].join()
    assert runs.describe(folder).state == "stopped"


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this system cannot pause a process")
def test_a_paused_run_goes_on_or_is_stopped(detached, folder):
    detached("wait")
    control.pause(folder)
    wait_for(lambda: runs.describe(folder).state == "paused")
    assert runs.describe(folder).next == f"edgeprune unpause {folder}"
    control.unpause(folder)
    wait_for(lambda: runs.describe(folder).state == "running")
    control.pause(folder)
    control.stop(folder)
    assert runs.describe(folder).state == "stopped"
    with pytest.raises(BadInput, match="no run is at work"):
        control.pause(folder)


def test_a_killed_run_is_dead_and_says_so(detached, folder):
    started = detached("hang")
    os.kill(started.pid, signal.SIGKILL)
    wait_for(lambda: not lock.is_held(folder))
    info = runs.describe(folder)
    assert (info.state, info.next) == ("dead", worker.resume_command(folder))
    with pytest.raises(EdgepruneError, match=r"gone without a word.*\n.*edgeprune run --resume"):
        control.attach(folder)
    assert resumed(folder) == RESULTS


@pytest.mark.parametrize("ask", [control.stop, control.attach, control.pause, control.unpause])
def test_no_run_there_is_bad_input(ask, tmp_path):
    with pytest.raises(BadInput, match="no run"):
        ask(tmp_path)


def test_who_comes_late_is_told_how_it_stands():
    def progress(done, unit=""):
        return Progress(stage="s", done=done, total=9, unit=unit, time=0)

    start, first, second = (
        RunStarted(folder="", stages=[]),
        StageStarted(stage="a"),
        StageStarted(stage="b"),
    )
    end, warning = StageFinished(stage="a", seconds=1), Note(text="!", level="warning")
    held_out = Evaluation(step=1, loss=1.0, perplexity=2.0, tokens=3)
    events = [start, first, progress(1), warning, Note(text="x"), end]
    events += [second, progress(1), held_out, progress(1, "B"), progress(2)]
    assert control.standing(events) == [
        *(start, first, warning, end, second),
        *(held_out, progress(1, "B"), progress(2)),
    ]


# ---- the list


def test_runs_are_listed_the_latest_first_and_once(fake, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    engine.run(RECIPE, first)
    engine.run(RECIPE, second)
    assert [info.name for info in runs.list_runs()] == ["second", "first"]
    engine.resume(first)
    assert [info.name for info in runs.list_runs()] == ["first", "second"]
    (info, _) = runs.list_runs()
    assert (info.model, info.target, info.state) == ("m", "30% sparsity", "finished")
    assert info.started is not None
    assert info.seconds < 60
    assert runs.forget(second)
    assert not runs.forget(second)
    assert [info.name for info in runs.list_runs()] == ["first"]
    assert second.exists()


@pytest.mark.parametrize("damage", [b"", b"\xff", b"[]", b"null", b'{"folders": 3}', b"[[["])
def test_a_damaged_list_is_empty_and_begun_anew(own_state, damage, folder):
    path = own_state / "edgeprune" / runs.FILE
    path.parent.mkdir()
    path.write_bytes(damage)
    assert runs.list_runs() == []
    runs.remember(folder)
    assert [info.folder for info in runs.list_runs()] == [folder]


def test_two_processes_write_the_list_at_once():
    code = (
        "import sys; from edgeprune import runs\n"
        "for i in range(25): runs.remember(f'/runs/{sys.argv[1]}{i}')"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    found = {info.name for info in runs.list_runs()}
    assert found == {f"{name}{i}" for name in "ab" for i in range(25)}


def test_a_list_that_cannot_be_written_stops_no_run(fake, folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    seen = []
    assert engine.run(RECIPE, folder, seen.append) == RESULTS
    assert "list of runs cannot be written" in seen[0].text
    assert runs.list_runs() == []


def test_a_relative_state_folder_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert runs.state_folder() == tmp_path / ".local" / "state" / "edgeprune"


def test_the_list_and_what_starts_runs_load_nothing_heavy():
    code = f"from edgeprune.__main__ import main; import edgeprune.run; main(['runs']); {NEITHER}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---- what a folder says


SPEEDS = [
    name
    for name in (field.name for field in dataclasses.fields(Figures))
    if name not in ("file_bytes", "token_perplexity")
]


def figures(size=80e6, perplexity=20.0, speed=100.0):
    return {
        "file_bytes": size,
        "token_perplexity": perplexity,
        "decode_tokens_per_second": speed,
        "prefill_tokens_per_second": 400.0,
        "time_to_first_token_seconds": 0.3,
        "peak_memory_bytes": 250e6,
    }


def finished(folder, text="builtin-heldout", timed=True, **pruned):
    """Make a folder as a finished run leaves it."""
    folder.mkdir(parents=True)
    recipe = recipes.demo()
    (folder / worker.RECIPE).write_text(recipe.to_toml())
    settings = recipe.model_dump()
    settings["evaluate"]["text"] = text
    worker.write_state(folder, {"source": {"seconds": 2.0, "result": {}}})
    results = {
        "model": {"name": "m"},
        "dense": figures(100e6, 15.0, 90.0),
        "pruned": figures(**pruned),
        "ratios": {"decode_tokens_per_second": 1.25},
        "settings": settings,
        "devices": {"local": {"device": {"cpu": "p", "physical_cores": 2}}} if timed else {},
    }
    if not timed:
        for key in SPEEDS:
            results["dense"][key] = results["pruned"][key] = None
        del results["ratios"]["decode_tokens_per_second"]
    (folder / worker.RESULTS).write_text(json.dumps(results))
    with LogWriter(folder / worker.EVENTS) as emit:
        emit(RunStarted(folder=str(folder), stages=["source"], pid=1))
        emit(RunFinished(results=worker.RESULTS, report=worker.REPORT, seconds=2.0))
    runs.remember(folder)
    return folder


def test_a_finished_run_has_its_figures(folder):
    info = runs.describe(finished(folder))
    assert info.state == "finished"
    assert (info.pruned.file_bytes, info.dense.token_perplexity) == (80e6, 15.0)
    assert info.seconds == 2.0
    assert info.pid is None


def test_a_run_that_is_just_being_resumed_is_watched(folder, monkeypatch):
    started = RunStarted(folder="", stages=[], pid=1)
    stopped = RunFailed(error="stopped", exit_code=130)

    def is_held(path, told=[]):  # noqa: B006
        if not told:
            told.append(True)
            with LogWriter(path / worker.EVENTS) as emit:
                emit(started)
                emit(stopped)
            return True
        return False

    finished(folder)
    monkeypatch.setattr(lock, "is_held", is_held)
    seen = []
    with pytest.raises(Interrupted):
        control.attach(folder, seen.append)
    assert seen == [started, stopped]


DAMAGES = [b"", b"\xff\xfe", b"[]", b'{"dense": 1, "pruned": 2}', b'{"profile": 3}']


@pytest.mark.parametrize("damage", [None, *DAMAGES])
def test_results_that_are_damaged_are_told(folder, damage):
    path = finished(folder) / worker.RESULTS
    path.unlink() if damage is None else path.write_bytes(damage)
    info = runs.describe(folder)
    assert (info.state, info.pruned, info.next) == ("finished", None, worker.resume_command(folder))
    assert "results.json: gone or damaged" in info.error


@pytest.mark.parametrize(
    "damage",
    [
        b"\xff\xfe\n",
        b'{"kind": "run_started"}\n',
        b'{"kind": "run_started", "folder": "", "stages": 3, "pid": "x", "time": "noon"}\n',
        b'{"kind": "run_failed", "error": 3, "exit_code": "x", "time": null}\n',
        b'{"kind": "run_fin',
    ],
)
def test_events_that_are_damaged_do_not_raise(folder, damage):
    log = finished(folder) / worker.EVENTS
    with log.open("ab") as file:
        file.write(damage)
    assert runs.describe(folder).name == "run"
    assert main(["runs"]) == 0


@pytest.mark.parametrize("state", ["", "[]", '{"schema_version": 1, "stages": 3}', None])
def test_a_state_that_is_damaged_or_gone_is_a_missing_run(folder, state):
    path = finished(folder) / worker.STATE
    path.unlink() if state is None else path.write_text(state)
    info = runs.describe(folder)
    assert info.state == "missing"
    assert info.next == f"edgeprune runs forget {folder}"


def test_a_folder_that_is_gone_is_a_missing_run(folder):
    runs.remember(folder)
    (info,) = runs.list_runs()
    assert (info.state, info.error) == ("missing", f"{folder}: no such folder")


def test_a_stage_that_was_ended_counts_to_its_end(folder):
    path = finished(folder) / worker.EVENTS
    path.unlink()
    with LogWriter(path) as emit:
        emit(RunStarted(folder="", stages=[], pid=1, time=100.0))
        emit(StageStarted(stage="prune", title="Prune", time=105.0))
        emit(RunFailed(error="it broke", exit_code=1, time=115.0))
    info = runs.describe(folder)
    assert (info.state, info.stage, info.error) == ("failed", "Prune", "it broke")
    assert (info.started, info.seconds) == (100.0, 12.0)


# ---- comparing

MODELS = st.lists(
    st.builds(
        Figures,
        st.sampled_from([None, 1.0, 2.0, 3.0]),
        st.sampled_from([1.0, 2.0, 3.0]),
        st.sampled_from([1.0, 2.0, 3.0]),
    ),
    min_size=1,
    max_size=6,
)


@given(MODELS)
def test_the_front_is_what_nobody_beats(models):
    def beats(one, other):
        as_good = (
            one.file_bytes <= other.file_bytes
            and one.token_perplexity <= other.token_perplexity
            and one.decode_tokens_per_second >= other.decode_tokens_per_second
        )
        return as_good and one != other

    front = pareto_front(models)
    whole = [model for model in models if model.file_bytes is not None]
    assert any(front) == bool(whole)
    for model, on_front in zip(models, front, strict=True):
        beaten = model not in whole or any(beats(other, model) for other in whole)
        assert on_front == (not beaten)


def test_runs_are_compared_with_the_dense_model_and_each_other(tmp_path):
    small = finished(tmp_path / "a" / "run", size=60e6, perplexity=30.0)
    good = finished(tmp_path / "b" / "run", size=70e6, perplexity=20.0)
    beaten = finished(tmp_path / "c", size=75e6, perplexity=25.0)
    found = comparison.compare([small, good, beaten, good])
    names = [str(Path(*path.parts[-2:])) for path in (small, good, beaten)]
    assert [run.name for run in found.runs] == names
    assert [run.on_front for run in found.runs] == [True, True, False]
    assert found.differences == ()
    assert found.runs[0].ratios.file_bytes == 0.6
    assert found.runs[0].ratios.decode_tokens_per_second == 1.25  # as measured in pairs
    size, perplexity, *_ = comparison.cells(found.runs[0])
    assert (size.value, size.change, size.better) == ("60.0 MB", "−40.0 %", True)
    assert (perplexity.value, perplexity.better) == ("30.00", False)
    page = comparison.page(found)
    assert page.count("<svg") == 1
    assert "★ a/run" in page
    assert "<script" not in page
    assert str(tmp_path) not in page


def test_what_may_not_be_compared_is_told(tmp_path):
    found = comparison.compare([finished(tmp_path / "a"), finished(tmp_path / "b", text="other")])
    assert found.differences == ("Perplexity was measured on different texts, or differently.",)


def changed(folder, change):
    path = folder / worker.RESULTS
    results = json.loads(path.read_text())
    change(results)
    path.write_text(json.dumps(results))
    return folder


def test_runs_that_were_timed_on_different_devices_are_told(tmp_path):
    def on_a_board(results):
        results["devices"] = {"pi5": {"device": {"cpu": "Cortex", "physical_cores": 4}}}

    def by_another_name(results):
        results["devices"] = {"desk": results["devices"]["local"], "pi5": {}}

    here, same = finished(tmp_path / "a"), changed(finished(tmp_path / "b"), by_another_name)
    assert comparison.compare([here, same]).differences == ()
    board = changed(finished(tmp_path / "c"), on_a_board)
    assert comparison.compare([here, board]).differences == (
        "Speed was measured on different machines.",
    )


def test_runs_that_were_not_timed_are_compared_in_the_rest(tmp_path, call):
    folders = [finished(tmp_path / "a", timed=False), finished(tmp_path / "b", timed=False)]
    found = comparison.compare(folders)
    assert found.differences == ()
    assert not any(run.on_front for run in found.runs)
    size, _, *speeds = comparison.cells(found.runs[0])
    assert size.change == "−20.0 %"
    assert {(cell.value, cell.change) for cell in speeds} == {("–", "")}
    assert "<svg" not in comparison.page(found)
    assert comparison.compare([folders[0], finished(tmp_path / "c")]).differences == ()
    assert call("runs", "compare", *folders)[0] == 0
    assert "80.0 MB, perplexity 20" in call("runs")[1]


def test_results_of_the_version_before_are_read(folder):
    def older(results):
        results["profile"] = results.pop("devices")["local"]

    changed(finished(folder), older)
    assert runs.describe(folder).pruned.decode_tokens_per_second == 100.0
    assert worker.read_results(folder)["devices"]["local"]["device"]["cpu"] == "p"
    assert "profile" not in control.attach(folder)


def test_only_finished_runs_are_compared(tmp_path):
    one, other = finished(tmp_path / "one"), finished(tmp_path / "other")
    (other / worker.RESULTS).unlink()
    with pytest.raises(BadInput, match=r"^\S*other/results.json: gone or damaged"):
        comparison.compare([one, other])
    with pytest.raises(BadInput, match="two or more"):
        comparison.compare([one, one])


# ---- the commands


@pytest.fixture
def call(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return (code, *capsys.readouterr())

    return run


def test_examples_in_the_help_can_be_typed():
    commands = typer.main.get_command(cli.app).commands
    for name in ("attach", "stop", "pause", "unpause", "runs"):
        for command in (commands[name], *getattr(commands[name], "commands", {}).values()):
            examples = [line for line in command.help.splitlines() if "edgeprune " in line[:14]]
            assert examples, command.name
            for example in examples:
                _, first, *arguments = shlex.split(example)
                assert first == name
                if command.name != name:
                    assert arguments.pop(0) == command.name
                command.make_context(command.name, arguments)


def test_the_list_for_people_and_programs(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("runs")[:2] == (0, "")
    finished(tmp_path / "a-run")
    code, out, _ = call("runs")
    assert code == 0
    assert "a-run" in out
    assert "80.0 MB, perplexity 20" in out
    assert max(map(len, out.splitlines())) <= 80
    (info,) = json.loads(call("runs", "--json")[1])
    assert info.keys() == {field.name for field in dataclasses.fields(runs.RunInfo)}
    assert info["pruned"]["file_bytes"] == 80e6
    assert call("runs", "forget", "a-run")[0] == 0
    code, _, err = call("runs", "forget", "a-run")
    assert (code, err.count("\n")) == (2, 1)


def test_compared_for_people_and_programs(call, tmp_path):
    folders = [finished(tmp_path / name, perplexity=p) for name, p in (("a", 20.0), ("b", 25.0))]
    page = tmp_path / "page.html"
    code, out, _ = call("runs", "compare", *folders, "--html", page)
    assert code == 0
    assert "★ a" in out
    assert "★ b" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert "<svg" in page.read_text()
    document = json.loads(call("runs", "compare", *folders, "--json")[1])
    assert [run["pareto"] for run in document["runs"]] == [True, False]
    code, _, err = call("runs", "compare", tmp_path / "none", tmp_path / "nothing")
    assert (code, err.count("error: ")) == (2, 2)


def test_a_run_left_at_work_from_the_command_line(fake, call, folder):
    prepare(folder, "wait")
    code, out, err = call("run", "--resume", folder, "--detach")
    assert (code, out) == (0, "")
    assert f"edgeprune attach {folder}" in err
    assert f"edgeprune stop {folder}" in err
    code, _, err = call("stop", folder)
    assert code == 0
    assert "Kept: first." in err
    assert worker.resume_command(folder) in err
    code, _, err = call("stop", folder)
    assert code == 0
    assert "No process is at work" in err
    code, _, err = call("attach")  # the latest
    assert code == 130
    assert "error: stopped; go on with" in err
    (folder / "misdeed").unlink()
    assert call("run", "--resume", folder, "--json")[0] == 0
    code, out, _ = call("attach", folder, "--json")
    assert (code, json.loads(out)) == (0, RESULTS)


def test_leaving_a_run_says_that_it_goes_on(call, folder, monkeypatch):
    def attach(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(control, "attach", attach)
    monkeypatch.setattr(lock, "is_held", lambda folder: True)
    code, _, err = call("attach", folder)
    assert code == 130
    assert f"edgeprune stop {folder}" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["stop", "attach", "pause", "unpause"])
def test_no_run_there_is_one_line(call, command, tmp_path):
    code, out, err = call(command, tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
