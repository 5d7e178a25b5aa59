import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import tiny
from wizardry import EXAMINED

from edgeprune import machine, preflight, recipe
from edgeprune.errors import BadInput
from edgeprune.events import Note
from edgeprune.remote import check as checking
from edgeprune.remote import connection, hosts
from edgeprune.remote.connection import UnknownHostKey, Unreachable
from edgeprune.sources import Source

SHAPE = {"parameters": 1_000_000_000, "max_position_embeddings": 256}
GB = 10**9


@pytest.fixture
def check(monkeypatch, tmp_path):
    """Return a function that checks a run on a model of 1B parameters on a machine as given."""

    def run(*, disk=100 * GB, memory=(64 * GB, 64 * GB), **sections):
        source = Source("m", "folder", Path("/models/m"))
        monkeypatch.setattr(preflight.sources, "resolve", lambda *a, **k: source)
        monkeypatch.setattr(preflight, "inspect", lambda source: SHAPE)
        monkeypatch.setattr(machine, "disk_free", lambda folder: disk)
        monkeypatch.setattr(machine, "memory", lambda: machine.Memory(*memory))
        data = {"source": {"model": "m"}, "prune": {"sparsity": 0.3}}
        data |= {"profile": {"prompt": 64, "generate": 64}, "evaluate": {"window": 128}}
        notes = []
        found = preflight.check_source(recipe.parse(data | sections), tmp_path, notes.append)
        return found, notes

    return run


def test_a_run_that_fits_is_told_where_the_model_is_and_its_shape(check):
    found, notes = check()
    assert found["inspection"] == SHAPE
    assert Source(**found["source"]).kind == "folder"
    assert notes == []


def test_all_problems_are_told_at_once_with_their_figures(check, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(BadInput) as caught:
        check(
            disk=5 * GB,
            prune={"sparsity": 0.3, "calibration": str(empty)},
            evaluate={"window": 1024},
        )
    disk, window, text = str(caught.value).splitlines()
    assert "5.00 GB free, and the run may need 12.2 GB" in disk
    assert window.startswith("evaluate.window: 1024 tokens, and the model takes at most 256")
    assert str(empty) in text


def test_a_model_larger_than_memory_is_worked_on_in_pieces(check):
    _, (note,) = check(memory=(2 * GB, 1 * GB))
    assert isinstance(note, Note)
    assert "one decoder layer at a time" in note.text


# ---- a list that ticks


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def ticked(tmp_path, model):
    """Return a function that makes all checks of a run and gives them by name."""

    def make(folder=tmp_path / "run", **sections):
        data = {"source": {"model": str(model)}, "prune": {"sparsity": 0.3}}
        made = recipe.parse(data | {"evaluate": {"window": 128}} | sections)
        return {each.name: each for each in preflight.checks(made, folder)}

    return make


def test_every_check_of_a_run_that_can_be_done_is_ticked_with_its_figures(ticked):
    found = ticked(recover={"data": ["builtin"], "tokens": "50k", "length": 128})
    assert list(found) == [
        "model",
        "folder",
        "libraries",
        "target",
        "prune-memory",
        "train-memory",
        "disk",
        "lengths",
        "calibration",
        "evaluation",
        "data",
    ]
    assert {each.state for each in found.values()} == {"ok"}
    assert "parameters; its weights are here" in found["model"].text
    assert "pruning takes about" in found["prune-memory"].text
    assert "training takes about" in found["train-memory"].text
    assert {"train-memory", "data"}.isdisjoint(ticked())


def test_a_text_that_would_be_read_many_times_over_is_told(ticked):
    section = {"data": ["builtin"], "tokens": "280k", "length": 128}
    found = ticked(recover=section)["data"]
    assert found.state == "warning"
    assert "builtin can be read; " in found.text
    assert "read about 5 times" in found.text
    assert ticked(recover=section | {"held_out": 0, "tokens": "90k"})["data"].state == "ok"


def test_what_needs_a_model_is_skipped_without_one_and_the_rest_is_checked(ticked, tmp_path):
    (tmp_path / "taken").write_text("x")
    found = ticked(
        tmp_path, source={"model": str(tmp_path / "none")}, evaluate={"text": "there/is/none.txt"}
    )
    states = {name: each.state for name, each in found.items()}
    assert states == {
        "model": "failed",
        "folder": "failed",
        "libraries": "ok",
        "target": "skipped",
        "prune-memory": "skipped",
        "disk": "skipped",
        "lengths": "skipped",
        "calibration": "ok",
        "evaluation": "failed",
    }
    assert found["evaluation"].mend == "check the path, or use builtin"
    assert "another with -o DIR" in found["folder"].mend


def test_a_cut_or_a_memory_that_is_too_small_is_told_with_what_to_do(ticked, monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(GB, 1_000_000))
    found = ticked(
        prune={"sparsity": 0.999, "length": 1024},
        recover={"data": ["nowhere.jsonl"], "tokens": "100k", "length": 128},
    )
    failed = {name: each for name, each in found.items() if each.state == "failed"}
    assert list(failed) == ["target", "prune-memory", "train-memory", "lengths", "data"]
    assert "length is 1024 tokens" in failed["target"].text
    assert "training takes about" in failed["train-memory"].text
    assert "only a smaller model" in failed["train-memory"].mend
    assert failed["lengths"].mend == "ask for less"
    assert failed["data"].text == "recover.data: there is no file nowhere.jsonl"


def test_weights_on_the_hub_are_counted_and_not_fetched(ticked, monkeypatch, tmp_path, model):
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    described = Source("one/model", "hub", tmp_path, revision="a" * 40)
    monkeypatch.setattr(preflight.sources, "resolve", lambda *a, **k: described)
    asked = []

    def dry_run(name, **options):
        asked.append((name, options["revision"], options["dry_run"]))
        files = [(5 * GB, True), (GB, False)]
        return [SimpleNamespace(file_size=size, will_download=new) for size, new in files]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", dry_run)
    monkeypatch.setattr(machine, "disk_free", lambda folder: 6 * GB)
    assert "5.00 GB will be downloaded" in ticked()["model"].text
    assert asked == [("one/model", "a" * 40, True)]
    monkeypatch.setattr(machine, "disk_free", lambda folder: 4 * GB)
    found = ticked()
    assert (found["model"].state, found["target"].state) == ("failed", "skipped")
    assert "HF_HOME" in found["model"].mend

    def offline(name, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert "the Hub cannot be asked for it (no route to host)" in ticked()["model"].text


# ---- other machines

ELSEWHERE = {"where": {"on": "lab"}, "profile": {"devices": ["local", "pi5"]}}


@pytest.fixture
def far(monkeypatch):
    """Two saved hosts, "lab" and "pi5", that are as EXAMINED but for ``far.changes``; no network is used."""
    hosts.add(hosts.Host(name="lab", address="lab.example"))
    hosts.add(hosts.Host(name="pi5", address="10.0.0.7", kind="box"))
    found = SimpleNamespace(connected=[], changes={}, error=None)

    @contextmanager
    def connect(host):
        found.connected.append((host.name, host.kind))
        if found.error:
            raise found.error
        yield host

    def examine(_link):
        parts = {key: EXAMINED[key] | value for key, value in found.changes.items()}
        return {**EXAMINED, "problems": [], **parts}

    monkeypatch.setattr(connection, "connect", connect)
    monkeypatch.setattr(checking, "examine", examine)
    return found


def test_a_run_on_other_machines_is_checked_there(ticked, far, monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(GB, 1_000_000))
    found = ticked(recover={"data": ["builtin"], "tokens": "50k", "length": 128}, **ELSEWHERE)
    assert set(found) == {
        *("model", "folder", "libraries", "target", "lengths", "calibration", "evaluation"),
        *("data", "disk", "box", "device-pi5"),
    }
    assert {each.state for each in found.values()} == {"ok"}
    assert far.connected == [("lab", "box"), ("pi5", "board")]
    assert "what comes home may need" in found["disk"].text
    assert found["box"].title == "Box"
    assert found["box"].text.startswith("lab: Debian GNU/Linux 12 (bookworm), Python 3.11.2, 8.20")
    assert found["box"].text.endswith("no GPU, 21.4 GB of disk free")
    assert found["device-pi5"].title == "Device pi5"
    assert "7.40 GB free; the dense export takes about" in found["device-pi5"].text


def test_a_machine_without_room_is_told_before_anything_is_sent(ticked, far):
    far.changes = {
        "storage": {"free_bytes": 1000},
        "device": {"memory_available_bytes": 1000},
    }
    found = ticked(**ELSEWHERE)
    assert (found["box"].state, found["device-pi5"].state) == ("failed", "failed")
    assert "1.00 kB of disk free, and the run may need" in found["box"].text
    assert found["device-pi5"].mend == "close programs there, or measure elsewhere"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Unreachable("lab: lab.example does not answer within 20 s"), "does not answer"),
        (UnknownHostKey("lab", "lab.example", "ssh-rsa", "SHA256:x"), "not known yet: ssh-rsa"),
    ],
)
def test_a_machine_that_cannot_be_asked_is_told_with_what_to_do(ticked, far, error, said):
    far.error = error
    found = ticked(**ELSEWHERE)["box"]
    assert (found.state, found.mend) == ("failed", "edgeprune hosts check lab")
    assert said in found.text


def test_a_machine_that_nobody_saved_is_told(ticked, far):
    found = ticked(profile={"devices": ["gone"]})
    assert found["device-gone"].text == "gone: no such host; saved are: lab, pi5"
    assert found["device-gone"].mend.startswith("add it with: edgeprune hosts add")
    assert far.connected == []
    assert "prune-memory" in found


@pytest.mark.parametrize(("required", "state"), [(True, "failed"), (False, "warning")])
def test_what_is_missing_on_a_machine_is_told(ticked, far, monkeypatch, required, state):
    problem = {"what": "no venv", "mend": "sudo apt install python3-venv", "required": required}
    monkeypatch.setattr(checking, "examine", lambda _link: {**EXAMINED, "problems": [problem]})
    found = ticked(where={"on": "lab"})["box"]
    assert (found.state, found.mend) == (state, "edgeprune hosts check lab")
    assert found.text.endswith("\nno venv (to mend it: sudo apt install python3-venv)")


def test_other_machines_are_asked_while_others_have_their_turn(model, tmp_path, far):
    turn = threading.Lock()
    data = {"source": {"model": str(model)}, "prune": {"sparsity": 0.3}, **ELSEWHERE}
    free = []
    far.connected = SimpleNamespace(append=lambda _host: free.append(not turn.locked()))
    list(preflight.checks(recipe.parse(data), tmp_path / "run", turn=turn))
    assert free == [True, True]


def test_a_runs_own_first_stage_asks_no_other_machine(check, far):
    check(**{**ELSEWHERE, "profile": {**ELSEWHERE["profile"], "prompt": 64, "generate": 64}})
    assert far.connected == []


def test_weights_of_the_hub_are_for_the_box_to_fetch(ticked, far, monkeypatch, tmp_path, model):
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    described = Source("one/model", "hub", tmp_path, revision="a" * 40)
    monkeypatch.setattr(preflight.sources, "resolve", lambda *a, **k: described)
    monkeypatch.setattr(preflight, "_bytes_to_download", lambda _source: 5 * GB)
    wanted = {"source": {"model": "one/model"}, "where": {"on": "lab"}}
    assert "lab downloads its weights" in ticked(**wanted)["model"].text
    carried = hosts.Host(name="lab", address="lab.example", wheelhouse="wheels")
    hosts.add(carried, replace=True)
    assert "5.00 GB will be downloaded" in ticked(**wanted)["model"].text
