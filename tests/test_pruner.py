"""Pruning as a whole, on tiny models: budgets, seeds, resuming, options, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

import edgeprune
from edgeprune import machine
from edgeprune.blocks import Ends, Pass
from edgeprune.errors import BadInput
from edgeprune.events import Note, PruneIteration
from edgeprune.exporters.sizes import file_bytes
from edgeprune.groups import describe_layers
from edgeprune.importance import ImportanceWatcher, normalised
from edgeprune.layers import CutLayers
from edgeprune.pruner import prune
from edgeprune.sources import load_config, resolve
from tests import tiny

QUICK = {"iterations": 3, "samples": 6, "repair_samples": 4, "length": 16, "width_multiple": 8}
SIZES = {"num_hidden_layers": 4, "intermediate_size": 256}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("llama"), **SIZES)


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    monkeypatch.setattr(machine, "compute_dtype", lambda *_: torch.float32)


def weights_of(folder):
    return edgeprune.load(folder).state_dict()


def same_weights(a, b):
    first, second = weights_of(a), weights_of(b)
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def widths(record):
    return [
        (layer["num_key_value_heads"], layer["intermediate_size"]) for layer in record["layers"]
    ]


# ---- the calibration pass


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_pass_gives_the_loss_and_the_gradients_of_the_whole_model(family):
    model = tiny.model(family)
    model.config._attn_implementation = "eager"
    groups = describe_layers(model.config)
    kept = [g.everything() for g in groups]
    tokens = torch.randint(3, 300, (5, 24), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    expected = model(tokens, labels=tokens).loss
    expected.backward()

    class Compare(ImportanceWatcher):
        def gradients(self, index, block, gradients):
            own = dict(model.model.layers[index].named_parameters())
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, own[name].grad, atol=1e-5, rtol=1e-3)
            self.seen = getattr(self, "seen", 0) + 1

    device = torch.device("cpu")
    for micro_batch in (5, 2):
        layers = CutLayers(model, groups, kept, torch.float32, device)
        watcher = Compare(groups, kept)
        walk = Pass(layers, Ends(model, torch.float32, device), micro_batch)
        assert walk.run(tokens, watcher) == pytest.approx(float(expected), rel=1e-5)
        assert watcher.seen == len(groups)


@pytest.mark.parametrize("measure", ["cosine", "euclidean", "manhattan"])
def test_a_layer_that_changes_more_is_more_important(measure):
    model = tiny.model("llama")
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        for name, parameter in model.model.layers[2].named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_(30.0)
        for name, parameter in model.model.layers[1].named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
    groups = describe_layers(model.config)
    kept = [g.everything() for g in groups]
    device = torch.device("cpu")
    watcher = ImportanceWatcher(groups, kept, layer_measure=measure)
    layers = CutLayers(model, groups, kept, torch.float32, device)
    Pass(layers, Ends(model, torch.float32, device), 4).run(
        torch.arange(3, 67).view(4, 16), watcher
    )
    importance = normalised(watcher.by_layer)
    assert max(importance) == importance[2]
    assert min(importance) == importance[1]
    assert max(abs(x) for x in importance) == pytest.approx(1)
    assert sum(importance) == pytest.approx(0, abs=1e-9)


# ---- the whole


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_is_pruned_to_its_target_and_loads_again(family, tmp_path):
    source = tiny.save(family, tmp_path / "dense")
    record = prune(source, tmp_path / "pruned", sparsity=0.4, **QUICK)
    count = record["parameters"]
    assert count["decoder"] <= 0.6 * count["dense_decoder"]
    model = edgeprune.load(tmp_path / "pruned")
    assert model.num_parameters() == count["total"]
    with torch.no_grad():
        assert model(torch.arange(3, 20)[None]).logits.isfinite().all()


@pytest.mark.parametrize("sparsity", [0.1, 0.35, 0.6])
@pytest.mark.parametrize("method", ["adapt", "adapt-pruner", "uniform"])
def test_the_budget_is_met_closely(folder, tmp_path, sparsity, method):
    record = prune(
        folder, tmp_path / "out", sparsity=sparsity, method=method, **QUICK | {"width_multiple": 1}
    )
    decoder, dense = record["parameters"]["decoder"], record["parameters"]["dense_decoder"]
    assert decoder <= (1 - sparsity) * dense
    assert (1 - sparsity) * dense - decoder <= 0.003 * dense


def test_a_number_of_parameters_is_a_target(folder, tmp_path):
    dense = edgeprune.inspect(folder)["parameters"]
    wanted = int(dense * 0.7)
    record = prune(folder, tmp_path / "out", params=wanted, **QUICK)
    assert 0 <= wanted - record["parameters"]["total"] <= 8 * 3 * 64


@pytest.mark.parametrize("precision", ["int4", "fp16"])
def test_a_file_size_is_a_target(folder, tmp_path, precision):
    config = load_config(resolve(folder))
    limit = int(0.7 * file_bytes(config, precision))
    record = prune(folder, tmp_path / "out", memory=limit, precision=precision, **QUICK)
    assert record["made"]["target"] == {"memory": limit, "precision": precision}
    reached = file_bytes(load_config(resolve(tmp_path / "out")), precision)
    assert 0.97 * limit <= reached <= limit


def test_the_same_seed_gives_the_same_model_and_another_one_another(folder, tmp_path):
    records = [
        prune(folder, tmp_path / name, sparsity=0.5, seed=seed, **QUICK)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert widths(records[0]) == widths(records[1])
    assert not same_weights(tmp_path / "a", tmp_path / "c")


def test_more_sparsity_never_gives_more_parameters(folder, tmp_path):
    counts = [
        prune(folder, tmp_path / str(s), sparsity=s / 100, **QUICK)["parameters"]["total"]
        for s in (10, 11, 30, 50, 70)
    ]
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_run_that_was_killed_goes_on_to_the_same_model(folder, tmp_path, stop_after):
    class Killed(BaseException):
        pass

    def kill(event):
        if isinstance(event, PruneIteration) and event.iteration == stop_after:
            raise Killed

    state = tmp_path / "state"
    with pytest.raises(Killed):
        prune(folder, tmp_path / "out", sparsity=0.5, state=state, emit=kill, **QUICK)
    assert not (tmp_path / "out").exists()
    seen = []
    prune(folder, tmp_path / "out", sparsity=0.5, state=state, emit=seen.append, **QUICK)
    assert [e.iteration for e in seen if isinstance(e, PruneIteration)] == list(
        range(stop_after + 1, 4)
    )
    assert not state.exists()
    prune(folder, tmp_path / "straight", sparsity=0.5, **QUICK)
    assert same_weights(tmp_path / "out", tmp_path / "straight")


@pytest.mark.parametrize("damage", ["other work", "not a state"])
def test_a_state_that_does_not_fit_is_not_used(folder, tmp_path, damage):
    state = tmp_path / "state"

    def kill(event):
        if isinstance(event, PruneIteration):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(folder, tmp_path / "out", sparsity=0.3, state=state, emit=kill, **QUICK)
    if damage == "not a state":
        state.write_bytes(state.read_bytes()[:100])
    seen = []
    sparsity = 0.3 if damage == "not a state" else 0.5
    prune(folder, tmp_path / "out", sparsity=sparsity, state=state, emit=seen.append, **QUICK)
    assert any(isinstance(e, Note) and e.level == "warning" for e in seen)
    assert [e.iteration for e in seen if isinstance(e, PruneIteration)] == [1, 2, 3]


@pytest.mark.parametrize("element", ["taylor", "magnitude", "activation"])
@pytest.mark.parametrize("layer", ["cosine", "euclidean", "manhattan"])
def test_every_measure_of_importance_prunes(folder, tmp_path, element, layer):
    record = prune(
        folder,
        tmp_path / "out",
        sparsity=0.3,
        element_importance=element,
        layer_importance=layer,
        **QUICK,
    )
    assert record["parameters"]["decoder"] <= 0.7 * record["parameters"]["dense_decoder"]


def test_layers_to_leave_alone_are_left_alone(folder, tmp_path):
    record = prune(folder, tmp_path / "out", sparsity=0.4, skip_layers=(0, 3), **QUICK)
    assert widths(record)[0] == widths(record)[3] == (2, 256)
    assert record["parameters"]["decoder"] <= 0.6 * record["parameters"]["dense_decoder"]


def test_the_events_tell_the_widths(folder, tmp_path):
    seen = []
    record = prune(folder, tmp_path / "out", sparsity=0.4, emit=seen.append, **QUICK)
    last = [e for e in seen if isinstance(e, PruneIteration)][-1]
    assert (last.iteration, last.of) == (3, 3)
    assert list(zip(last.num_key_value_heads, last.intermediate_size, strict=True)) == widths(
        record
    )
    assert last.decoder_parameters == record["parameters"]["decoder"]
    json.dumps(last.to_json())


REFUSED = [
    ({"sparsity": 1.2}, "sparsity"),
    ({"sparsity": float("nan")}, "sparsity"),
    ({"sparsity": 0.999}, "at most"),
    ({"params": 10}, "embeddings"),
    ({"params": 10**9}, "fewer"),
    ({}, "exactly one"),
    ({"sparsity": 0.3, "params": 100_000}, "exactly one"),
    ({"sparsity": 0.3, "iterations": 0}, "iterations"),
    ({"sparsity": 0.3, "skip_layers": (9,)}, "no decoder layer 9"),
    ({"sparsity": 0.3, "length": 4096}, "at most 512"),
    ({"sparsity": 0.3, "method": "magic"}, "adapt"),
    ({"sparsity": 0.3, "calibration": "missing.txt"}, "missing.txt"),
]


@pytest.mark.parametrize(("options", "word"), REFUSED)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(folder, tmp_path, options, word):
    with pytest.raises(BadInput) as raised:
        prune(folder, tmp_path / "out", **QUICK | options)
    assert word in str(raised.value)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_text_shorter_than_a_sequence_is_refused(folder, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("too short")
    with pytest.raises(BadInput, match="no documents of 400 tokens"):
        prune(
            folder, tmp_path / "out", sparsity=0.3, calibration=str(text), **QUICK | {"length": 400}
        )
