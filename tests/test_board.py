"""Measuring on a board over a real OpenSSH server, and on several devices one after the other."""

from __future__ import annotations

import ast
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import wheelhouse
from exports import spoil
from sshd import Sshd, wait_until
from sshd import sshd as sshd

from edgeprune import recipe, worker
from edgeprune.__main__ import main
from edgeprune.errors import BadInput, EdgepruneError
from edgeprune.events import Note, Progress
from edgeprune.profiles import board, devices, far_board, runner
from edgeprune.profiles import profile as module
from edgeprune.profiles.profile import table
from edgeprune.remote import environment, hosts, transfer
from edgeprune.remote.connection import Link, Unreachable, connect
from edgeprune.remote.hosts import Host

SHORT = {"prompt": 8, "generate": 6, "repeats": 1, "threads": 1}


@pytest.fixture
def far(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> Sshd:
    """A board on which what measures is installed already."""
    monkeypatch.setattr(environment, "board", lambda link, emit: sys.executable)
    return sshd


def left(sshd: Sshd) -> list[Path]:
    """Return what measurements have left on the board, but for the exports."""
    return [*sshd.processes(str(sshd.root / "runs")), *(sshd.root / "runs").glob("*")]


# ---- on a board


def test_a_board_measures_as_this_machine_does(far, tiny_export, tmp_path, monkeypatch):
    other = tmp_path / "it's; touch $HOME/x"  # reaches no shell unquoted
    shutil.copytree(tiny_export, other)
    result = board.measure(far.host, tiny_export, other, **{**SHORT, "repeats": 2})
    assert result["device"]["name"] == "far"
    assert result["device"]["cpu"] == runner.device()["cpu"]
    assert [run["name"] for run in result["runs"]] == ["tiny", other.name]
    assert [run["folder"] for run in result["runs"]] == [str(tiny_export), str(other)]
    assert [len(run["repetitions"]) for run in result["runs"]] == [2, 2]
    assert [entry["turn"] for entry in result["runs"][0]["repetitions"]] == [0, 3]
    assert result["settings"]["repeats"] == 2
    assert result["settings"]["threads"] == 1
    assert result["ratios"]["file_bytes"]["median"] == 1
    assert result.keys() == module.profile(tiny_export, **SHORT).keys()
    assert table(result)[0] == ["", "tiny", other.name, "ratio"]
    assert left(far) == []

    monkeypatch.setattr(Link, "upload", None)  # nothing is sent a second time
    board.measure(far.host, tiny_export, **SHORT)
    store = far.root / "store"
    contents = {path.read_bytes() for path in tiny_export.iterdir() if path.is_file()}
    assert len(list(store.iterdir())) == len(contents) + 1  # each once, and the runner


def test_threads_are_swept_and_speed_sustained_on_the_board(far, tiny_export, monkeypatch):
    monkeypatch.setattr(module, "thread_counts", lambda *cores: [1, 2])
    options = {**SHORT, "threads": "sweep", "sustained": 0.005}
    result = board.measure(far.host, tiny_export, **options)
    assert [entry["threads"] for entry in result["sweep"]] == [1, 2]
    assert result["settings"]["threads"] in (1, 2)
    assert result["sustained"]["samples"]
    assert left(far) == []


def test_the_runtime_is_installed_on_a_board_without_a_network(sshd, tiny_export, tmp_path):
    host = replace(sshd.host, wheelhouse=str(wheelhouse.make(tmp_path / "wheels")))
    result = board.measure(host, tiny_export, **SHORT)
    assert result["runs"][0]["summary"]["decode_tokens_per_second"]["mean"] > 0
    (python,) = (sshd.root / "envs").glob("*/venv/bin/python")
    assert python.exists()


def test_memory_is_looked_at_before_anything_is_sent(far, tiny_export, monkeypatch):
    monkeypatch.setattr(runner, "MEMORY_FACTOR", 1e9)
    with pytest.raises(BadInput, match=r"^far has .*B of memory free, .* needs about .*B; nothing"):
        board.measure(far.host, tiny_export, tiny_export, **SHORT)
    assert not (far.root / "store").exists()


def test_the_disk_is_looked_at_before_anything_is_sent(far, tiny_export, monkeypatch):
    monkeypatch.setattr(transfer, "ROOM", 10**18)
    with pytest.raises(BadInput, match=r"^far: its disk has no room: .*B are to be sent"):
        board.measure(far.host, tiny_export, **SHORT)
    assert list((far.root / "store").iterdir()) == []


def test_what_is_no_export_is_refused_before_connecting(tiny_export, tmp_path):
    nowhere = Host(name="nowhere", address="127.0.0.1", port=1)
    with pytest.raises(BadInput, match="edgeprune export MODEL --onnx"):
        board.measure(nowhere, spoil(tiny_export, tmp_path / "export", "no graph"), **SHORT)


def test_errors_of_the_board_name_it_and_the_folder_here(far, tiny_export, tmp_path):
    spoilt = spoil(tiny_export, tmp_path / "export", "graph cut short")
    with pytest.raises(BadInput) as caught:
        board.measure(far.host, spoilt, **SHORT)
    assert str(caught.value).startswith(f"far: {spoilt} cannot be loaded")
    assert str(far.root) not in str(caught.value)
    assert left(far) == []


def test_a_process_that_ends_there_is_an_error(far, tiny_export):
    def kill(event):
        if event.unit == "repetitions" and event.done == 1:
            for process in far.processes(f"{far.root}/runs"):
                process.kill()

    with pytest.raises(EdgepruneError, match=r"^far: the process that measured tiny ended: "):
        board.measure(far.host, tiny_export, **SHORT, emit=kill)
    assert left(far) == []


def test_an_interrupt_leaves_nothing_there(far, tiny_export):
    def interrupt(event):
        if event.unit == "repetitions" and event.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        board.measure(far.host, tiny_export, **SHORT, emit=interrupt)
    assert left(far) == []


def test_a_link_that_dies_says_what_to_type_and_ends_the_measuring(far, tiny_export):
    def cut(event):
        if event.unit == "repetitions" and event.done == 1:
            assert far.processes(f"{far.root}/runs")
            far.cut()

    options = {**SHORT, "generate": 400, "repeats": 1000}
    with pytest.raises(Unreachable) as caught:
        board.measure(far.host, tiny_export, **options, emit=cut)
    command = f"edgeprune profile {tiny_export} --on far --prompt 8 --generate 400 --repeats 1000"
    assert str(caught.value).endswith(f"type again: {command} --threads 1")
    wait_until(lambda: not far.processes(f"{far.root}/runs"))

    (folder,) = (far.root / "runs").iterdir()
    os.utime(folder, (0, 0))
    board.measure(far.host, tiny_export, **SHORT)
    assert left(far) == []


# ---- what is left there


def test_only_measurements_are_removed(far):
    runs = far.root / "runs"
    for name in ("profile-aa", "profile-bb", "mine-1234"):
        (runs / name / "inputs").mkdir(parents=True)
    os.utime(runs / "mine-1234", (0, 0))
    with connect(far.host) as link:
        link.far(far_board, "remove", run="profile-aa")
        with pytest.raises(BadInput, match="not the id of a measurement"):
            link.far(far_board, "remove", run="../mine-1234")
    assert sorted(path.name for path in runs.iterdir()) == ["mine-1234", "profile-bb"]


def test_the_far_module_is_python_3_9_and_needs_nothing():
    tree = ast.parse(Path(far_board.__file__).read_text(), feature_version=(3, 9))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert names <= sys.stdlib_module_names


# ---- several devices


def test_progress_names_the_device_where_there_are_several(monkeypatch):
    def measure(*_: object, emit, **__: object) -> dict:
        emit(Progress(stage="profile", done=0, total=1, note="warm-up"))
        emit(Note(text="local: it is hot"))
        return {}

    monkeypatch.setattr(module, "check", lambda *_: None)
    monkeypatch.setattr(module, "profile", measure)
    monkeypatch.setattr(board, "measure", measure)
    hosts.add(Host(name="pi5", address="pi"))
    events = []
    devices.measure("x", None, ["local", "pi5"], **SHORT, emit=events.append)
    assert [getattr(event, "note", None) or event.text for event in events] == [
        "local: warm-up",
        "local: it is hot",
        "pi5: warm-up",
        "pi5: local: it is hot",
    ]


def test_the_others_are_measured_when_one_cannot_be_reached(far, tiny_export):
    hosts.add(far.host)
    hosts.add(replace(far.host, name="gone", address="127.0.0.1", port=1))
    events = []
    with pytest.raises(devices.NotAllMeasured) as caught:
        devices.measure(tiny_export, None, ["gone", "far"], **SHORT, emit=events.append)
    assert str(caught.value).startswith("not measured: gone: ")
    assert list(caught.value.measured) == ["far"]
    (note,) = (event for event in events if isinstance(event, Note) and "gone" in event.text)
    assert note.level == "warning"


def test_a_resumed_run_measures_only_the_devices_that_it_has_not(tmp_path, monkeypatch):
    asked: list[str] = []

    def measure(host: Host, *_: object, **__: object) -> dict[str, str]:
        asked.append(host.name)
        if host.name == "off" and asked.count("off") == 1:
            raise Unreachable("off: does not answer")
        return {"host": host.name}

    monkeypatch.setattr(module, "check", lambda *_: None)
    monkeypatch.setattr(board, "measure", measure)
    for name in ("off", "on"):
        hosts.add(Host(name=name, address=name))
    settings = {"source": {"model": "m"}, "prune": {"sparsity": 0.1}}
    settings |= {"profile": {"devices": ["off", "on"]}}
    events = []
    work = worker.Work(tmp_path, recipe.parse(settings), {}, events.append)
    (profile,) = (stage for stage in worker.STAGES if stage.name == "profile")
    with pytest.raises(devices.NotAllMeasured, match="off: does not answer"):
        profile.do(work)
    assert profile.do(work) == {"devices": {"off": {"host": "off"}, "on": {"host": "on"}}}
    assert asked == ["off", "on", "off"]
    assert events[-1].text == "on was measured before"
    assert list(tmp_path.iterdir()) == []


def test_the_only_device_fails_as_itself(tiny_export, sshd):
    hosts.add(Host(name="gone", address="127.0.0.1", port=1))
    with pytest.raises(Unreachable, match=r"edgeprune profile .* --on gone"):
        devices.measure(tiny_export, None, ["gone"], **SHORT)


def test_an_unknown_device_is_refused_before_anything_is_measured(tiny_export):
    events = []
    with pytest.raises(BadInput, match="nonsense: no such host"):
        devices.measure(tiny_export, None, ["local", "nonsense"], **SHORT, emit=events.append)
    assert events == []


# ---- the command


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run a command line in this process; return its exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


QUICK = ("--prompt", 8, "--generate", 6, "--repeats", 1)


def test_several_devices_have_a_table_each_and_one_document(call, far, tiny_export, monkeypatch):
    hosts.add(far.host)
    measured = []
    measure = devices.measure
    monkeypatch.setattr(
        devices, "measure", lambda *a, **b: measured.append(measure(*a, **b)) or measured[0]
    )
    on = ("--on", "local", "--on", "far")
    code, out, err = call("profile", tiny_export, *on, *QUICK, "--threads", 1)
    assert code == 0, err
    assert out.count("Decode (tokens/s)") == 2
    assert out.index("local: ") < out.index("far: ")

    monkeypatch.setattr(devices, "measure", lambda *a, **b: measured[0])
    code, out, err = call("profile", tiny_export, *on, *QUICK, "--json")
    assert code == 0, err
    assert json.loads(out) == {"devices": measured[0]}


def test_one_device_is_the_document_itself(call, far, tiny_export):
    code, out, err = call("profile", tiny_export, "--on", far.url, *QUICK, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["device"]["name"] == far.url
    assert len(document["runs"]) == 1


def test_what_was_measured_is_shown_before_the_error(call, far, tiny_export):
    hosts.add(replace(far.host, name="gone", address="127.0.0.1", port=1))
    on = ("--on", "gone", "--on", "local")
    code, out, err = call("profile", tiny_export, *on, *QUICK)
    assert code == 1
    assert "Decode (tokens/s)" in out
    assert "error: not measured: gone: " in err


@pytest.mark.parametrize("threads", ["0", "-1", "few", "1.5"])
def test_threads_are_a_number_or_sweep(call, threads, tmp_path):
    code, out, err = call("profile", tmp_path, f"--threads={threads}")
    assert (code, out) == (2, "")
    assert f'--threads: "{threads}" is neither' in err
