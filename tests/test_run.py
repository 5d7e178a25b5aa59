import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from edgeprune import lock, report, worker
from edgeprune import recipe as recipes
from edgeprune import run as runs
from edgeprune.errors import BadInput, EdgepruneError, Interrupted
from edgeprune.events import (
    Note,
    RunFailed,
    RunFinished,
    RunStarted,
    StageFinished,
    StageStarted,
    TrainStep,
)
from edgeprune.log import LogWriter, read_events
from tests import killed_worker, scalars

RECIPE = recipes.parse_toml('[source]\nmodel = "m"\n[prune]\nsparsity = 0.3\n')
FAKE = Path(__file__).with_name("fake_worker.py")
RESULTS = {"first": {"value": 1}, "second": {"value": 2}}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def fake(monkeypatch):
    """Let the stages of ``fake_worker.py`` do the work, on a model that need not exist."""
    monkeypatch.setattr(runs, "_source_problems", lambda source: [])
    monkeypatch.setattr(runs, "WORKER", (sys.executable, str(FAKE)))
    monkeypatch.setattr(worker, "PATIENCE", 2.0)


@pytest.fixture
def misdeed(fake, folder):
    """Prepare a run whose second stage misbehaves, and return a function that lets it go."""

    def go(deed, emit=lambda event: None):
        folder.mkdir()
        (folder / worker.RECIPE).write_text(RECIPE.to_toml())
        worker.write_state(folder, {})
        (folder / "misdeed").write_text(deed)
        return runs.resume(folder, emit)

    return go


def mend(folder):
    (folder / "misdeed").unlink()


def leftovers(folder):
    return (folder / worker.UNFINISHED).exists()


# ---- a run that goes well


def test_a_run_tells_its_stages_and_returns_its_results(fake, folder):
    seen = []
    assert runs.run(RECIPE, folder, seen.append) == RESULTS
    kinds = [type(event) for event in seen]
    assert kinds[0] is RunStarted
    assert kinds[-1] is RunFinished
    assert [(e.stage, e.index, e.of) for e in seen if isinstance(e, StageStarted)] == [
        ("first", 1, 3),
        ("second", 2, 3),
        ("last", 3, 3),
    ]
    assert [e.stage for e in seen if isinstance(e, StageFinished)] == ["first", "second", "last"]
    assert read_events(folder / worker.EVENTS) == seen
    assert recipes.load(folder / worker.RECIPE) == RECIPE
    assert not leftovers(folder)


def test_a_finished_run_resumed_does_nothing_again(fake, folder):
    runs.run(RECIPE, folder)
    seen = []
    assert runs.resume(folder, seen.append) == RESULTS
    assert [type(event) for event in seen] == [RunStarted, RunFinished]


def test_an_artefact_that_is_gone_is_made_again_with_all_that_follows(fake, folder):
    runs.run(RECIPE, folder)
    (folder / "two").unlink()
    seen = []
    runs.resume(folder, seen.append)
    assert [e.stage for e in seen if isinstance(e, StageStarted)] == ["second", "last"]


# ---- runs that do not


def test_killed_then_resumed_gives_the_same(misdeed, folder):
    with pytest.raises(EdgepruneError, match=r"SIGKILL.*\n.*edgeprune run --resume") as caught:
        misdeed("kill")
    assert caught.value.exit_code == 1
    assert leftovers(folder)
    assert not (folder / "two").exists()
    mend(folder)
    seen = []
    assert runs.resume(folder, seen.append) == RESULTS
    assert seen[0].finished == ["first"]
    assert [e.stage for e in seen if isinstance(e, StageStarted)] == ["second", "last"]
    assert (folder / "two").read_text() == "whole"
    assert not leftovers(folder)


def test_a_worker_that_ends_without_a_word_is_quoted(misdeed):
    with pytest.raises(EdgepruneError, match="code 3; its last words: a library's last words"):
        misdeed("exit")


@pytest.mark.parametrize(
    ("deed", "exit_code", "said"),
    [
        ("fail", 1, "it did not work"),
        ("refuse", 2, "it cannot be used"),
        ("bug", 1, "KeyError: 'bug'"),
        ("fill the disk", 2, "the disk is full"),
    ],
)
def test_the_workers_error_is_raised_here(misdeed, folder, deed, exit_code, said):
    seen = []
    with pytest.raises(EdgepruneError, match=said) as caught:
        misdeed(deed, seen.append)
    assert caught.value.exit_code == exit_code
    assert isinstance(seen[-1], RunFailed)
    assert seen[-1].next == f"edgeprune run --resume {folder}"
    mend(folder)
    assert runs.resume(folder) == RESULTS


def test_a_bug_leaves_its_traceback_in_the_folder_and_not_on_the_terminal(misdeed, folder, capfd):
    with pytest.raises(EdgepruneError, match=r"worker\.log"):
        misdeed("bug")
    assert "Traceback" in (folder / worker.OUTPUT).read_text()
    assert capfd.readouterr() == ("", "")


def test_an_input_refused_before_any_work_leaves_nothing_behind(fake, folder, monkeypatch):
    code = (
        "import sys; from edgeprune import worker; from edgeprune.errors import BadInput\n"
        "def refuse(work): raise BadInput('no such model')\n"
        "worker.STAGES = (worker.Stage('source', 'Source', refuse),)\n"
        "sys.exit(worker.main(worker.Path(sys.argv[1])))"
    )
    monkeypatch.setattr(runs, "WORKER", (sys.executable, "-c", code))
    with pytest.raises(BadInput, match=r"^no such model$"):
        runs.run(RECIPE, folder)
    assert not folder.exists()
    folder.mkdir()
    with pytest.raises(BadInput):
        runs.run(RECIPE, folder)
    assert list(folder.iterdir()) == []


# ---- Ctrl-C and the end of the parent


def test_ctrl_c_stops_the_worker_and_says_how_to_go_on(misdeed, folder):
    pid = []

    def interrupt(event):
        if isinstance(event, RunStarted):
            pid.append(event.pid)
        if isinstance(event, Note) and event.text == "second: hang":
            os.kill(os.getpid(), signal.SIGINT)

    began = time.monotonic()
    with pytest.raises(Interrupted, match="edgeprune run --resume") as caught:
        misdeed("hang", interrupt)
    assert time.monotonic() - began < 30
    assert caught.value.exit_code == 130
    assert not is_alive(pid[0])
    assert read_events(folder / worker.EVENTS)[-1].exit_code == 130
    mend(folder)
    assert runs.resume(folder) == RESULTS


def test_a_worker_that_does_not_stop_is_ended(misdeed):
    pid = []

    def interrupt(event):
        if isinstance(event, RunStarted):
            pid.append(event.pid)
        if isinstance(event, Note) and event.text == "second: hang stubbornly":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        misdeed("hang stubbornly", interrupt)
    assert not is_alive(pid[0])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_the_worker_does_not_outlive_its_parent(misdeed, folder, how):
    with pytest.raises(EdgepruneError):
        misdeed("kill")
    (folder / "misdeed").write_text("hang")
    code = (
        "import sys; from pathlib import Path; from edgeprune import run\n"
        f"run.WORKER = (sys.executable, {str(FAKE)!r})\n"
        "run.resume(Path(sys.argv[1]))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(folder)])
    started = wait_for(lambda: started_in(folder, count=2))
    wait_for(lambda: read_events(folder / worker.EVENTS)[-1].to_json().get("text"))
    parent.send_signal(how)
    parent.wait()
    mend(folder)
    # At once, while the worker may still be on its way out: that is waited for.
    assert runs.resume(folder) == RESULTS
    assert not is_alive(started.pid)


def started_in(folder, count):
    starts = [e for e in read_events(folder / worker.EVENTS) if isinstance(e, RunStarted)]
    return starts[-1] if len(starts) == count else None


def is_alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


# ---- folders


def test_only_one_worker_in_a_folder(misdeed, folder):
    errors = []

    def second_try(event):
        if isinstance(event, Note) and event.text == "second: hang":
            with pytest.raises(EdgepruneError, match="is at work on this run") as caught:
                runs.resume(folder)
            errors.append(caught.value)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        misdeed("hang", second_try)
    assert len(errors) == 1


def test_a_stale_lock_does_not_lock(fake, folder):
    runs.run(RECIPE, folder)
    (folder / lock.FILE).write_text(str(os.getpid()))
    assert runs.resume(folder) == RESULTS


def test_a_folder_in_use_is_refused_and_left_alone(fake, folder):
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(BadInput, match="not an empty folder"):
        runs.run(RECIPE, folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_a_run_is_not_overwritten(fake, folder):
    runs.run(RECIPE, folder)
    with pytest.raises(BadInput, match=f"edgeprune run --resume {folder}"):
        runs.run(RECIPE, folder)


def test_a_folder_that_cannot_be_made_is_one_clear_line(fake, folder):
    folder.write_text("a file")
    with pytest.raises(BadInput, match=r"cannot be written: .*; name another with -o DIR"):
        runs.run(RECIPE, folder / "run")


def test_the_model_and_the_folder_are_both_told(folder):
    folder.write_text("a file")
    recipe = recipes.parse_toml(RECIPE.to_toml().replace('"m"', '"./no-such-model"'))
    with pytest.raises(BadInput) as caught:
        runs.run(recipe, folder)
    first, second = str(caught.value).splitlines()
    assert first.endswith("name another with -o DIR")
    assert "./no-such-model" in second


def test_the_command_to_go_on_is_short_where_it_can_be(folder, monkeypatch):
    assert worker.resume_command(folder) == f"edgeprune run --resume {folder}"
    monkeypatch.chdir(folder.parent)
    assert worker.resume_command(folder) == "edgeprune run --resume run"
    assert worker.resume_command(folder.parent / "a b") == "edgeprune run --resume 'a b'"


def test_the_recipe_and_the_folder_are_both_told(fake, tmp_path, folder):
    folder.write_text("a file")
    path = tmp_path / "r.toml"
    path.write_text('[source]\nmodel = "m"\n')
    with pytest.raises(BadInput) as caught:
        runs.run(path, folder)
    first, second = str(caught.value).splitlines()
    assert first.endswith("prune: missing")
    assert second.endswith("name another with -o DIR")


@pytest.mark.parametrize("state", [None, "", "[]", '{"schema_version": 1}', '{"stages": {}}'])
def test_nothing_to_resume(folder, state):
    folder.mkdir()
    if state is not None:
        (folder / worker.STATE).write_text(state)
    with pytest.raises(BadInput, match="no run to go on with"):
        runs.resume(folder)


def test_a_run_of_another_version_is_refused(folder):
    folder.mkdir()
    (folder / worker.STATE).write_text(json.dumps({"schema_version": 99, "stages": {}}))
    with pytest.raises(BadInput, match="another version"):
        runs.resume(folder)


def test_runs_leave_no_threads(fake, folder):
    before = threading.active_count()
    runs.run(RECIPE, folder)
    assert threading.active_count() == before


# ---- the real work, on a tiny model

MOMENTS = [
    ("source", "unrecorded"),
    ("prune", "iteration"),
    ("prune", "unrecorded"),
    ("export-dense", "begun"),
    ("export-pruned", "unrecorded"),
    ("evaluate", "begun"),
    ("profile", "begun"),
    ("report", "unrecorded"),
]
# A process of its own, which takes longer, is killed at these.
KILLED = [("prune", "iteration"), ("export-pruned", "unrecorded")]


@pytest.fixture(scope="module")
def tiny_recipe(tmp_path_factory):
    import tiny  # not above: it takes torch, which most of these tests do without

    folder = tmp_path_factory.mktemp("source") / "tiny-llama"
    tiny.save("llama", folder)
    return recipes.parse(
        {
            "source": {"model": str(folder)},
            "prune": {
                "sparsity": 0.3,
                "iterations": 3,
                "samples": 4,
                "repair_samples": 4,
                "length": 16,
            },
            "profile": {"prompt": 8, "generate": 4, "repeats": 2, "threads": 1},
            "evaluate": {"window": 64, "max_tokens": 500},
        }
    )


@pytest.fixture(scope="module")
def uninterrupted(tiny_recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    return folder, runs.run(tiny_recipe, folder)


def test_a_run_leaves_all_that_it_promises(uninterrupted):
    folder, results = uninterrupted
    assert results == json.loads((folder / worker.RESULTS).read_text())
    assert results["pruned"]["decoder_parameters"] <= 0.7 * results["dense"]["decoder_parameters"]
    rows = report.results_table(results)
    assert all(row.dense != "–" and row.pruned != "–" for row in rows)
    page = (folder / worker.REPORT).read_text()
    assert page.count("<svg") == 3
    assert len(page) < 1_000_000
    assert {path.name for path in folder.iterdir()} == {
        *(name for stage in worker.STAGES for name in stage.artefacts),
        *(worker.EVENTS, worker.OUTPUT, worker.RECIPE, worker.STATE),
        lock.FILE,
    }


@pytest.fixture
def recovering(tiny_recipe, folder, monkeypatch):
    """Return the recipe of a run that prunes and trains; what comes after these is left out."""
    monkeypatch.setenv("HOME", str(folder.parent))  # where the packed text is kept
    script = Path(__file__).with_name("training_worker.py")
    monkeypatch.setattr(runs, "WORKER", (sys.executable, str(script)))

    def recipe(**others):
        recover = {"data": ["builtin"], "tokens": 400, "length": 32, "batch": 2, "minutes": 0.0}
        recover |= {"interleavings": 2, "held_out": 100, **others}
        return recipes.parse(tiny_recipe.model_dump(exclude_none=True) | {"recover": recover})

    return recipe


def decoders(results):
    """Return the decoder parameters of both models."""
    return tuple(
        results[stage]["inspection"]["decoder_parameters"] for stage in ("source", "prune")
    )


def test_a_run_that_recovers_goes_on_after_a_kill_in_its_training(recovering, folder):
    def interrupt(event):
        if isinstance(event, TrainStep) and event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        runs.run(recovering(tensorboard=True), folder, interrupt)
    assert (folder / worker.RECOVERY).is_dir()
    events = []
    results = runs.resume(folder, events.append)
    steps = [event.step for event in events if isinstance(event, TrainStep)]
    assert steps[0] >= 3
    assert steps[-1] == 6
    told = results["prune"]["summary"]["made"]["recovery"]
    assert (told["interleavings"], told["data"]) == (2, ["builtin"])
    dense, pruned = decoders(results)
    assert pruned <= 0.7 * dense
    assert not leftovers(folder)
    assert not (folder / worker.RECOVERY).exists()
    assert scalars.steps(folder / worker.TENSORBOARD, "train/loss") == [1, 2, 3, 4, 5, 6]
    assert scalars.steps(folder / worker.TENSORBOARD / "pruning", "prune/loss") == [1, 2, 3, 4]


def test_two_processes_recover_and_go_on_after_an_interrupt(recovering, folder):
    def interrupt(event):
        if isinstance(event, TrainStep) and event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        runs.run(recovering(processes=2), folder, interrupt)
    results = runs.resume(folder)
    # of the log, since another update may be made before the interrupt arrives
    steps = [e.step for e in read_events(folder / worker.EVENTS) if isinstance(e, TrainStep)]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6]
    assert len(steps) <= 7, "each is told by one process"
    dense, pruned = decoders(results)
    assert pruned <= 0.7 * dense
    assert not leftovers(folder)


def test_what_one_of_several_processes_refuses_is_told_once(fake, folder, monkeypatch):
    """What the trainer refuses is in ``test_distributed.py``: it takes a while to be loaded."""
    member = (
        "import sys; from pathlib import Path; from edgeprune import worker\n"
        "from edgeprune.errors import BadInput; from edgeprune.recovery import member\n"
        "def refuse(work, output): raise BadInput('cannot be shared by 2 processes')\n"
        "worker.prune_and_recover = refuse\n"
        "sys.exit(member.main(Path(sys.argv[1]), Path(sys.argv[2])))"
    )
    code = (
        "import sys; from edgeprune import worker; from edgeprune.recovery import processes\n"
        f"processes.MEMBER = (sys.executable, '-c', {member!r})\n"
        "def train(work): processes.run(work.folder, work.folder / 'out', 2)\n"
        "worker.STAGES = (worker.Stage('prune', 'Prune', train),)\n"
        "sys.exit(worker.main(worker.Path(sys.argv[1])))"
    )
    monkeypatch.setattr(runs, "WORKER", (sys.executable, "-c", code))
    with pytest.raises(BadInput, match=r"^cannot be shared by 2 processes$"):
        runs.run(RECIPE, folder)


def test_killed_at_every_stage_and_resumed_the_result_is_the_same(
    tiny_recipe, uninterrupted, folder, monkeypatch
):
    folder.mkdir()
    (folder / worker.RECIPE).write_text(tiny_recipe.to_toml())
    worker.write_state(folder, {})
    killer = str(Path(__file__).with_name("killed_worker.py"))
    for stage, moment in MOMENTS:
        if (stage, moment) in KILLED:
            monkeypatch.setattr(runs, "WORKER", (sys.executable, killer, stage, moment))
            with pytest.raises(EdgepruneError, match="SIGKILL"):
                runs.resume(folder)
        else:
            dies_here(folder, tiny_recipe, stage, moment)
        assert read_events(folder / worker.EVENTS)[-1].to_json().get("stage", stage) == stage
    monkeypatch.undo()
    results = runs.resume(folder)
    expected_folder, expected = uninterrupted
    assert fingerprint(folder) == fingerprint(expected_folder)
    for which in ("dense", "pruned"):
        for key in ("parameters", "layers", "token_perplexity", "word_perplexity", "file_bytes"):
            assert results[which][key] == expected[which][key]
    assert not leftovers(folder)


def dies_here(folder, recipe, stage, moment):
    """Go on with a run in this process, as a worker does, until nothing more of it happens."""

    class Dead(BaseException):
        pass

    def die():
        raise Dead

    def emit(event):
        log(event)
        death.hears(event)

    death = killed_worker.Death(stage, moment, die)
    with pytest.MonkeyPatch.context() as patch, LogWriter(folder / worker.EVENTS) as log:
        patch.setattr(worker, "write_state", death.writes)
        with pytest.raises(Dead):
            worker.work_through(folder, recipe, worker.STAGES, emit)


def fingerprint(folder):
    """Return the hashes of the weights and what the exports say of their widths."""
    weights = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (folder / worker.PRUNED).glob("*.safetensors")
    }
    widths = [
        json.loads((folder / name / "edgeprune_export.json").read_text())["layers"]
        for name in (worker.EXPORT_DENSE, worker.EXPORT_PRUNED)
    ]
    assert weights
    return weights, widths
