"""A streamed iteration that was killed goes on inside it, to the very same figures and weights."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import edgeprune
from edgeprune import machine
from edgeprune.blocks import Ends, Pass
from edgeprune.events import Note, Progress, PruneIteration
from edgeprune.groups import HALVES, describe_layers
from edgeprune.importance import ImportanceWatcher
from edgeprune.layers import CutLayers
from edgeprune.pruner import prune
from edgeprune.waiting import Waiting
from tests import tiny

CPU = torch.device("cpu")
OPTIONS = {
    "sparsity": 0.4,
    "iterations": 2,
    "samples": 8,
    "repair_samples": 8,
    "length": 256,
    "width_multiple": 8,
    "stream": True,
}
# 3 layers forward and back, 8 sequences of 256 tokens in 2 micro batches
PASSES = 2 * 3 * 2


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(machine, "compute_dtype", lambda *_: torch.float32)
    monkeypatch.setattr("edgeprune.scratch.INTERVAL", 0.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.save("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def straight(source, tmp_path_factory):
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("straight") / "pruned"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "compute_dtype", lambda *_: torch.float32)
        record = prune(source, folder, **OPTIONS)
    return record, edgeprune.load(folder).state_dict()


def same(found, folder, straight):
    record, weights = straight
    assert found["layers"] == record["layers"]
    assert found["made"]["loss"] == record["made"]["loss"]
    again = edgeprune.load(folder).state_dict()
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def killing(at):
    def emit(event):
        if isinstance(event, Progress) and event.unit == "layer passes" and event.done == at:
            raise Killed

    return emit


def measured(model, waiting, element="taylor", stop_at=None):
    groups = describe_layers(model.config)
    kept = [g.everything() for g in groups]
    layers = CutLayers(model, groups, kept, torch.float32, CPU)
    watcher = ImportanceWatcher(groups, kept, element_measure=element)
    tokens = torch.randint(3, 300, (5, 16), generator=torch.Generator().manual_seed(0))

    def tick(done):
        if done == stop_at:
            raise Killed

    with waiting:
        walk = Pass(layers, Ends(model, torch.float32, CPU), 3)
        loss = walk.run(tokens, watcher, tick, waiting)
    return loss, watcher.by_layer, [t for half in HALVES for t in watcher.by_group[half]]


@pytest.mark.parametrize(
    ("hold", "element"), [(None, "taylor"), (0, "activation"), (20_000, "taylor")]
)
def test_a_pass_goes_on_from_every_block(tmp_path, hold, element):
    model = tiny.model("llama")
    loss, by_layer, by_group = measured(model, Waiting(), element)
    assert all(float(t.sum()) > 0 for t in by_group)
    for stop_at in range(1, 2 * 4 * 2 + 1):
        folder = tmp_path / str(stop_at)
        with pytest.raises(Killed):
            measured(model, Waiting(hold, folder, "this"), element, stop_at)
        notes = []
        waiting = Waiting(hold, folder, "this", emit=notes.append)
        again = measured(model, waiting, element)
        assert again[:2] == (loss, by_layer)
        assert all(torch.equal(a, b) for a, b in zip(again[2], by_group, strict=True))
        # two micro batches a layer; the layer that was interrupted is done again
        expected = f"after {(stop_at - 1) // 2} layer" if stop_at > 2 else None
        assert [n.level for n in notes] == (["info"] if expected else [])
        assert not expected or expected in notes[0].text


def test_a_run_goes_on_wherever_it_is_killed(source, straight, tmp_path):
    """One run, killed again and again, in both iterations and in both directions."""
    state, notes = tmp_path / "state", []
    for at in (2, 4, 9, 9, PASSES, PASSES + 1, PASSES + 5, PASSES + 11):
        with pytest.raises(Killed):
            prune(source, tmp_path / "out", state=state, emit=killing(at), **OPTIONS)
    record = prune(source, tmp_path / "out", state=state, emit=notes.append, **OPTIONS)
    assert any("going on after 5 layer passes" in getattr(n, "text", "") for n in notes)
    assert [e.iteration for e in notes if isinstance(e, PruneIteration)] == [2]
    same(record, tmp_path / "out", straight)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_run_killed_by_the_system_goes_on(source, straight, tmp_path):
    state, notes = tmp_path / "state", []
    words = [PASSES + 8, source, tmp_path / "out", state, json.dumps(OPTIONS)]
    script = Path(__file__).with_name("killed_prune.py")
    done = subprocess.run([sys.executable, script, *map(str, words)], check=False)
    assert done.returncode == -signal.SIGKILL
    record = prune(source, tmp_path / "out", state=state, emit=notes.append, **OPTIONS)
    assert any("going on after 3 layer passes" in getattr(n, "text", "") for n in notes)
    same(record, tmp_path / "out", straight)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("fault", ["mark", "inputs", "inputs gone", "other work"])
def test_what_cannot_be_used_is_not_used_and_said(source, straight, tmp_path, fault):
    state, notes = tmp_path / "state", []
    other = {"seed": 1} if fault == "other work" else {}
    with pytest.raises(Killed):
        prune(source, tmp_path / "out", state=state, emit=killing(8), **OPTIONS | other)
    folder = tmp_path / "state.scratch" / "pass"
    at = folder / ("mark.safetensors" if fault == "mark" else "inputs-0001.safetensors")
    if fault == "inputs gone":
        at.unlink()
    elif fault != "other work":
        at.write_bytes(at.read_bytes()[:-100])
    record = prune(source, tmp_path / "out", state=state, emit=notes.append, **OPTIONS)
    warnings = [n.text for n in notes if isinstance(n, Note) and n.level == "warning"]
    assert len(warnings) == 1
    assert "starts anew" in warnings[0]
    same(record, tmp_path / "out", straight)


def test_marks_are_rare_and_only_where_there_is_a_state(source, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(Waiting, "keep", lambda self, mark: kept.append(mark.done))
    prune(source, tmp_path / "without", **OPTIONS)
    monkeypatch.setattr("edgeprune.scratch.INTERVAL", 1000.0)
    prune(source, tmp_path / "rare", state=tmp_path / "state", **OPTIONS)
    assert kept == []
    assert {p.name for p in tmp_path.iterdir()} == {"without", "rare"}


def test_what_a_killed_run_without_a_state_left_is_removed(source, tmp_path):
    left = tmp_path / ".out.4194305.scratch"  # no process has this number
    left.mkdir()
    (left / "layer-0000.safetensors").write_bytes(b"")
    prune(source, tmp_path / "out", **OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_activation_measure_is_the_same_streamed(source, tmp_path):
    made = []
    for name, stream in (("resident", False), ("streamed", True)):
        wanted = OPTIONS | {"stream": stream, "element_importance": "activation"}
        made.append((prune(source, tmp_path / name, **wanted), tmp_path / name))
    (record, folder), (other, streamed) = made
    same(other, streamed, (record, edgeprune.load(folder).state_dict()))
