"""A run on a box: what is sent, how its events are told, how it is left, stopped, gone on with and brought home."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import tiny
from sshd import sshd as sshd

from edgeprune import answers, control, runs, worker
from edgeprune import recipe as recipes
from edgeprune import run as engine
from edgeprune.__main__ import main
from edgeprune.errors import BadInput, EdgepruneError
from edgeprune.events import Note, RunStarted, StageStarted
from edgeprune.log import read_events
from edgeprune.remote import address, box, hosts
from edgeprune.remote.address import Far
from tests import fake_box

FAKE = Path(fake_box.__file__)
PATIENCE = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def recipe(tmp_path, model):
    path = tmp_path / "recipe.toml"
    path.write_text(f'[source]\nmodel = "{model}"\n[prune]\nsparsity = 0.3\n')
    return path


@pytest.fixture
def folder(tmp_path, sshd, monkeypatch):
    """Where a run of the made-up stages is, here; the box is a saved host."""
    hosts.add(sshd.host)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("FAKE_PYTHON", str(python))
    monkeypatch.setattr(engine, "WORKER", (sys.executable, str(FAKE)))
    made = tmp_path / "run"
    yield made
    for pid in (control.pid_of(made), far_pid(sshd, made)):
        if pid:
            os.kill(pid, signal.SIGKILL)


def far_folder(sshd, folder):
    far = address.read(folder)
    return sshd.root / "runs" / far.run if far else None


def far_pid(sshd, folder):
    far = far_folder(sshd, folder)
    return control.pid_of(far / "run") if far and (far / "run" / worker.STATE).exists() else None


def until(condition, what):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def notes(folder):
    return [e.text for e in read_events(folder / worker.EVENTS) if isinstance(e, Note)]


def begun(recipe, folder, sshd, deed):
    """Start the run, its second stage to do ``deed`` at the box; return when it is at that."""
    started = engine.start(_on(recipe, sshd.host.name), folder)
    assert started.pid
    until(lambda: address.read(folder), "the run's id")
    far = far_folder(sshd, folder)
    until(far.is_dir, "the run's folder at the box")
    (far / "misdeed").write_text(deed)
    until(lambda: f"note {fake_box.NOTES - 1}" in notes(folder), "the second stage")
    return far


def _on(path, name):
    recipe = recipes.load(path)
    return recipe.model_copy(update={"where": recipes.WhereSection(on=name)})


def told_once(folder):
    """Each note of the far stage came, and came in order, once for each time that it was written there."""
    counted = Counter(text for text in notes(folder) if text.startswith("note "))
    assert counted == Counter(f"note {number}" for number in range(fake_box.NOTES))


# ---- from the recipe to the results


def test_a_run_is_done_at_the_box_and_ends_here(recipe, folder, sshd, capsys):
    assert main(["run", str(recipe), "-o", str(folder), "--on", sshd.host.name, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["second"] == {"value": 2}
    model = recipes.load(recipe).source.model
    assert results["source"]["source"]["name"] == results["source"]["source"]["path"] == model
    started = [e for e in read_events(folder / worker.EVENTS) if isinstance(e, StageStarted)]
    stages = ["send", "source", "second", "fetch", "profile", "report"]
    assert [(e.stage, e.index, e.of) for e in started] == [
        (s, i + 1, 6) for i, s in enumerate(stages)
    ]
    told_once(folder)
    there = far_folder(sshd, folder)
    for name in (worker.PRUNED, worker.EXPORT_DENSE, worker.EXPORT_PRUNED):
        home = (folder / name / "weights.bin").read_bytes()
        assert home == (there / "run" / name / "weights.bin").read_bytes()
    sent = recipes.load(there / "recipe.toml")
    assert Path(sent.source.model).parts[-3:-1] == ("inputs", "model")
    assert (Path(sent.source.model) / "config.json").exists()
    assert runs.describe(folder).state == "finished"


# ---- the link, and the worker here, may end at any time


def test_a_dead_link_loses_no_event_and_doubles_none(recipe, folder, sshd):
    far = begun(recipe, folder, sshd, "wait")
    sshd.stop()
    until(lambda: any("trying again" in text for text in notes(folder)), "the loss to be noticed")
    (far / "misdeed").unlink()
    until(lambda: not control.pid_of(far / "run"), "the run to end at the box, unwatched")
    sshd.start()
    control.attach(folder)
    told_once(folder)


def test_the_link_may_die_while_the_run_is_begun(recipe, folder, sshd, tmp_path):
    python = Path(os.environ["FAKE_PYTHON"])
    began, go_on = tmp_path / "began", tmp_path / "go-on"
    wait = f"touch {began}; while [ ! -e {go_on} ]; do sleep 0.02; done; exec "
    python.write_text(python.read_text().replace("exec ", wait))
    engine.start(_on(recipe, sshd.host.name), folder)
    until(began.exists, "the box's edgeprune")
    sshd.cut()
    until(lambda: any("reached again" in text for text in notes(folder)), "another try")
    go_on.touch()
    control.attach(folder)
    told_once(folder)
    starts = read_events(far_folder(sshd, folder) / "run" / worker.EVENTS)
    assert len([e for e in starts if isinstance(e, RunStarted)]) == 1


def test_the_worker_here_can_be_killed(recipe, folder, sshd, monkeypatch):
    far = begun(recipe, folder, sshd, "wait")
    psutil.Process(control.pid_of(folder)).kill()
    until(lambda: runs.describe(folder).state == "away", "the end of the worker here")
    assert runs.describe(folder).next.startswith("edgeprune attach ")
    assert far_pid(sshd, folder), "the run at the box does not notice"
    (far / "misdeed").unlink()
    engine.attach(folder)
    told_once(folder)
    assert runs.describe(folder).state == "finished"


def test_the_end_of_the_session_here_leaves_the_run_alone(recipe, folder, sshd):
    begun(recipe, folder, sshd, "wait")
    psutil.Process(control.pid_of(folder)).terminate()
    until(lambda: runs.describe(folder).state == "away", "the end of the worker here")
    assert far_pid(sshd, folder)


# ---- told from here


def test_stop_stops_the_run_at_the_box_and_resume_goes_on(recipe, folder, sshd, capsys):
    far = begun(recipe, folder, sshd, "wait")
    assert main(["stop", str(folder)]) == 0
    until(lambda: not far_pid(sshd, folder), "the end at the box")
    assert runs.describe(folder).state == "stopped"
    (far / "misdeed").unlink()
    engine.resume(folder)
    starts = [e for e in read_events(far / "run" / worker.EVENTS) if isinstance(e, RunStarted)]
    assert [e.finished for e in starts] == [[], ["source"]]
    assert runs.describe(folder).state == "finished"


@pytest.mark.parametrize("by", ["the command line", "the app"])
def test_a_run_that_nobody_here_watches_is_stopped_too(recipe, folder, sshd, by):
    begun(recipe, folder, sshd, "wait")
    psutil.Process(control.pid_of(folder)).kill()
    until(lambda: runs.describe(folder).state == "away", "the end of the worker here")
    if by == "the app":
        said = []
        line = json.dumps({"id": 1, "ask": "stop_away", "args": {"folder": str(folder)}})

        def asked():
            yield line.encode()
            until(lambda: said, "an answer")

        answers.Server(said.append, alone=True).serve(asked())
        assert said == [{"id": 1, "answer": {"told": True}}]
    else:
        assert main(["stop", str(folder)]) == 0
    until(lambda: not far_pid(sshd, folder), "the end at the box")
    assert runs.describe(folder).state == "stopped"


def test_a_run_that_has_ended_at_the_box_is_not_called_stopped(recipe, folder, sshd, capsys):
    far = begun(recipe, folder, sshd, "wait")
    psutil.Process(control.pid_of(folder)).kill()
    until(lambda: runs.describe(folder).state == "away", "the end of the worker here")
    (far / "misdeed").unlink()
    until(lambda: not far_pid(sshd, folder), "the end at the box")
    assert main(["stop", str(folder)]) == 0
    assert "is not at work" in capsys.readouterr().err
    assert runs.describe(folder).state == "away"
    engine.attach(folder)
    assert runs.describe(folder).state == "finished"


def test_it_is_not_paused(recipe, folder, sshd):
    begun(recipe, folder, sshd, "wait")
    with pytest.raises(BadInput, match="cannot be paused; stop it"):
        control.pause(folder)


@pytest.mark.parametrize(
    ("deed", "error", "said"),
    [
        ("fail", EdgepruneError, "it did not work"),
        ("refuse", BadInput, "it cannot be used"),
        ("exit", EdgepruneError, "a library's last words"),
    ],
)
def test_a_failure_at_the_box_is_told_here_and_gone_on_from(
    recipe,
    folder,
    sshd,
    deed,
    error,
    said,
):
    far = begun(recipe, folder, sshd, deed)
    with pytest.raises(error, match=said):
        control.attach(folder)
    until(lambda: runs.describe(folder).state == "failed", "the end here")
    (far / "misdeed").unlink()
    (far / "run" / "misdeed").unlink()
    engine.resume(folder)
    assert runs.describe(folder).state == "finished"


# ---- from another machine


def test_another_machine_attaches_by_name(recipe, folder, sshd, tmp_path, capsys):
    far = begun(recipe, folder, sshd, "wait")
    psutil.Process(control.pid_of(folder)).kill()
    name = str(address.read(folder))
    assert main(["runs", "--on", sshd.host.name, "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (f"{sshd.host.name}:{listed['run']}", listed["state"]) == (name, "running")
    (far / "misdeed").unlink()
    other = tmp_path / "other"
    assert main(["attach", name, "-o", str(other), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["second"] == {"value": 2}
    told_once(other)
    assert (other / worker.PRUNED / "weights.bin").exists()


def test_fetch_and_clean(recipe, folder, sshd, tmp_path, capsys):
    far = begun(recipe, folder, sshd, "wait")
    name = str(address.read(folder))
    assert main(["clean", name]) == 2
    assert "is at work; stop it first" in capsys.readouterr().err
    (far / "misdeed").unlink()
    control.attach(folder)
    home = tmp_path / "home"
    assert main(["fetch", name, "-o", str(home)]) == 0
    assert (home / worker.PRUNED / "weights.bin").exists()
    until(lambda: not far_pid(sshd, folder), "the end at the box")
    assert main(["clean", str(folder)]) == 0
    assert not far.exists()
    assert not list((sshd.root / "store").iterdir()), "what only this run used is gone"
    assert (folder / worker.RESULTS).exists(), "what is here stays"
    assert main(["fetch", name, "-o", str(home)]) == 2
    assert "no run" in capsys.readouterr().err


# ---- what cannot be done is told before anything is begun


def test_an_unknown_host_is_refused_and_nothing_is_left(recipe, folder, capsys):
    assert main(["run", str(recipe), "-o", str(folder), "--on", "nobody"]) == 2
    assert "nobody" in capsys.readouterr().err
    assert not folder.exists()


def test_what_the_box_refuses_at_the_start_is_told_and_mended(recipe, folder, sshd, capsys):
    python = Path(os.environ["FAKE_PYTHON"])
    whole = python.read_text()
    python.write_text(whole.replace("exec ", "FAKE_REFUSAL='it is of no use' exec "))
    assert main(["run", str(recipe), "-o", str(folder), "--on", sshd.host.name]) == 2
    assert f"error: {sshd.host.name}: it is of no use\n" in capsys.readouterr().err
    python.write_text(whole)
    assert main(["run", "--resume", str(folder), "--json"]) == 0


def test_a_box_that_is_off_is_told(recipe, folder, sshd, capsys, monkeypatch):
    sshd.stop()
    assert main(["run", str(recipe), "-o", str(folder), "--on", sshd.host.name]) == 1
    assert sshd.host.name in capsys.readouterr().err


def test_the_recipe_can_name_the_box_and_the_command_line_another_place(recipe):
    recipe.write_text(recipe.read_text() + '[where]\non = "box"\n')
    from edgeprune.cli import _placed

    assert _placed(recipe, None).where.on == "box"
    assert _placed(recipe, "other").where.on == "other"
    assert _placed(recipe, "local").where is None


# ---- what is sent


def test_what_the_recipe_names_here_is_sent_and_named_there(tmp_path, model):
    text = tmp_path / "a=b.txt"
    text.write_text("text")
    data = {
        "source": {"model": str(model)},
        "prune": {"sparsity": 0.3, "calibration": str(text)},
        "recover": {"data": [f"{text}=3", "builtin=1", str(text)], "tokens": 1000},
    }
    recipe = recipes.parse(data)
    found = box.local_files(recipe)
    assert found == {"model": model, "calibration": text, "data-0": text, "data-2": text}
    there = box.far_recipe(recipe, {use: f"/far/{use}/{path.name}" for use, path in found.items()})
    assert there.source.model == f"/far/model/{model.name}"
    assert there.prune.calibration == "/far/calibration/a=b.txt"
    assert there.recover.data == ["/far/data-0/a=b.txt=3", "builtin=1", "/far/data-2/a=b.txt"]
    assert there.evaluate == recipe.evaluate
    assert there.profile.devices == []
    assert there.where is None


def test_a_model_of_the_hub_is_fetched_by_the_box():
    recipe = recipes.parse({"source": {"model": "owner/name"}, "prune": {"sparsity": 0.3}})
    assert box.local_files(recipe) == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "box",
        "box:",
        ":run-1",
        "box:../run-1",
        "box:RUN-1",
        "box:a/b-1",
        "b;x:run-1",
        "-o:run-1",
        "box:run",
        "ssh://me@host:22",
    ],
)
def test_what_is_no_run_on_a_host(text):
    assert address.parse(text) is None


def test_a_run_on_a_host_is_named_by_both(tmp_path, monkeypatch):
    assert address.parse("pi-5.local:run-1a2b") == Far("pi-5.local", "run-1a2b")
    assert address.parse("ssh://me@host:22:run-1a2b") == Far("ssh://me@host:22", "run-1a2b")
    monkeypatch.chdir(tmp_path)
    Path("box:run-1a2b").mkdir()
    assert address.parse("box:run-1a2b") is None, "a folder of that name is meant"


@pytest.mark.parametrize("name", ["Run 1; rm -rf $HOME", "../..", "é", "-"])
def test_an_id_is_made_of_harmless_letters_alone(name, tmp_path):
    made = box._new_id(tmp_path / name)
    assert made == "".join(c for c in made if c in "abcdefghijklmnopqrstuvwxyz0123456789-")
    assert not made.startswith("-")


def test_a_log_that_ends_in_the_middle_of_a_line_is_gone_on_with(tmp_path):
    whole = json.dumps(Note(text="a", far_offset=17).to_json())
    (tmp_path / worker.EVENTS).write_text(f'{whole}\n{{"kind": "note", "far_offset": 3')
    assert box.told(tmp_path) == 17
    assert box.told(tmp_path / "nowhere") == 0
