"""Compensation: what a cut layer writes comes nearer to what the dense one wrote, and it can be interrupted."""

from __future__ import annotations

import pytest
import torch

import edgeprune
from edgeprune import machine, pruner
from edgeprune.blocks import Ends, Waiting
from edgeprune.families import family_of
from edgeprune.groups import Kept, describe_layers
from edgeprune.importance import ranked
from edgeprune.layers import CutLayers
from edgeprune.repair import OUTPUT, Moments, kept_columns, repair
from edgeprune.scratch import Scratch
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    monkeypatch.setattr(machine, "compute_dtype", lambda *_: torch.float32)


def tokens_for(sequences, seed=0):
    return torch.randint(3, 300, (sequences, 16), generator=torch.Generator().manual_seed(seed))


def half_of(groups):
    """Keep every second FFN channel, and all KV heads but one where there are several."""
    return [
        Kept(torch.arange(max(1, g.count["attention"] - 1)), torch.arange(0, g.count["mlp"], 2))
        for g in groups
    ]


def repaired(model, kept, tokens, micro_batch=8, streams=None):
    """Return the repaired projections of each layer and the residual stream after the last."""
    groups = describe_layers(model.config)
    cut, whole = (
        CutLayers(model, groups, k, torch.float32, CPU)
        for k in (kept, [g.everything() for g in groups])
    )
    ends = Ends(model, torch.float32, CPU)
    batches = list(tokens.split(micro_batch))
    family = family_of(model.config)
    columns = [kept_columns(family, g, k, CPU) for g, k in zip(groups, kept, strict=True)]
    found = list(repair(ends, batches, whole.block, cut.block, columns, streams))
    return [fixed for fixed, _ in found], found


def run(model, kept, tokens, fixed=None):
    """Return the residual stream before the final norm of the cut model, (sequences, length, hidden size)."""
    layers = CutLayers(model, describe_layers(model.config), kept, torch.float32, CPU)
    hidden, arguments = Ends(model, torch.float32, CPU).start(tokens)
    with torch.no_grad():
        for i in range(len(layers)):
            block = layers.block(i)
            if fixed:
                block.weights.update(fixed[i])
            hidden = block(hidden, arguments[i])
    return hidden


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_nothing_cut_is_nothing_repaired(family):
    model = tiny.model(family)
    kept = [g.everything() for g in describe_layers(model.config)]
    fixed, _ = repaired(model, kept, tokens_for(16))
    for layer, weights in zip(model.model.layers, fixed, strict=True):
        for name, weight in weights.items():
            torch.testing.assert_close(weight, layer.get_parameter(name), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_repaired_model_is_nearer_to_the_dense_one_on_other_text(family):
    model = tiny.model(family)
    groups = describe_layers(model.config)
    kept, other = half_of(groups), tokens_for(64, seed=1)
    fixed, _ = repaired(model, kept, tokens_for(256))
    dense = run(model, [g.everything() for g in groups], other)
    before = (run(model, kept, other) - dense).square().mean()
    after = (run(model, kept, other, fixed) - dense).square().mean()
    assert after < 0.97 * before


def test_what_the_kept_channels_can_replace_is_replaced():
    model = tiny.model("llama")
    with torch.no_grad():
        for (
            layer
        ) in model.model.layers:  # every odd channel computes what the even one before it does
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                projection.weight[1::2] = projection.weight[::2]
    groups = describe_layers(model.config)
    kept = [
        Kept(torch.arange(g.count["attention"]), torch.arange(0, g.count["mlp"], 2)) for g in groups
    ]
    tokens = tokens_for(256)
    dense = run(model, [g.everything() for g in groups], tokens)
    fixed, _ = repaired(model, kept, tokens)
    lost = (run(model, kept, tokens) - dense).norm()
    assert (run(model, kept, tokens, fixed) - dense).norm() < 0.1 * lost


def test_a_repair_does_not_depend_on_the_micro_batch():
    model = tiny.model("qwen2")
    kept = half_of(describe_layers(model.config))
    first, second = (repaired(model, kept, tokens_for(24), n)[0] for n in (3, 24))
    for a, b in zip(first, second, strict=True):
        for name, weight in a.items():
            torch.testing.assert_close(weight, b[name], atol=1e-4, rtol=1e-3)


def test_a_repair_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("edgeprune.scratch.INTERVAL", 0.0)
    model = tiny.model("llama")
    kept, tokens = half_of(describe_layers(model.config)), tokens_for(16)
    whole, steps = repaired(model, kept, tokens)
    for stopped_after in range(len(steps)):
        scratch = Scratch(tmp_path / str(stopped_after), "this")
        for fixed, streams in steps[: stopped_after + 1]:
            scratch.keep(fixed, streams, torch.float32)
        assert Scratch(tmp_path / str(stopped_after), "other").streams(16) is None
        rest, _ = repaired(model, kept, tokens, streams=scratch.streams(16))
        again = [scratch.fixed(i) for i in range(stopped_after + 1)] + rest
        for a, b in zip(whole, again, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_damaged_scratch_is_not_used(tmp_path):
    (tmp_path / "streams.safetensors").write_bytes(b"half of it")
    assert Scratch(tmp_path, "this").streams(16) is None


def test_damping_is_raised_where_the_inputs_say_nothing():
    weight = torch.ones(3, 6)
    moments = Moments(weight, 20)
    moments.add(torch.zeros(4, 5, 6), torch.ones(4, 5, 3), torch.ones(4, 5, 1))
    assert torch.equal(moments.refit()[0], weight)


@pytest.mark.parametrize("tokens", [64, 20])
def test_few_tokens_are_solved_the_other_way_round_with_the_same_result(tokens):
    chance = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(tokens // 2, 2, 32, generator=chance), torch.zeros(8, 32)
    targets = torch.randn(tokens // 2, 2, 8, generator=chance)
    weights = torch.rand(tokens // 2, 2, 1, generator=chance) + 1
    found = []
    for announced in (1, 1000):
        moments = Moments(weight, announced)
        moments.add(inputs, targets, weights)
        found.append(moments.refit())
    (first, ridge), (second, other) = found
    assert ridge == other
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


def test_a_noisy_target_gets_a_larger_ridge_than_an_exact_one():
    chance = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, 2, 32, generator=chance)
    truth = torch.randn(8, 32, generator=chance)
    noise = torch.randn(32, 2, 8, generator=chance)
    ridges = []
    for strength in (0.0, 30.0):
        moments = Moments(torch.zeros(8, 32), 64)
        moments.add(inputs, inputs @ truth.T + strength * noise, torch.ones(32, 2, 1))
        ridges.append(moments.refit()[1])
    assert ridges[0] < ridges[1]


@pytest.mark.parametrize("hold", [None, 0, 100])
def test_waiting_tensors_come_back_in_reverse(hold):
    lists = [
        [torch.randn(2, 3).to(dtype), torch.randn(4)] for dtype in (torch.float32, torch.bfloat16)
    ]
    with Waiting(hold) as stack:
        for each in lists:
            stack.push(each)
        for each in reversed(lists):
            assert all(torch.equal(a, b) for a, b in zip(stack.pop(), each, strict=True))


def test_ranks_are_even_whatever_the_outlier():
    assert ranked([3.0, -1000.0, 2.0, 1.0, 5.0]) == [0.5, -1.0, 0.0, -0.5, 1.0]
    assert ranked([7.0]) == [0.0]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3", "olmo2"])
def test_a_streamed_run_gives_the_same_model(family, tmp_path):
    source = tiny.save(family, tmp_path / "dense")
    wanted = {"sparsity": 0.4, "iterations": 3, "samples": 8, "length": 16, "width_multiple": 8}
    for name, stream in (("resident", False), ("streamed", True)):
        pruner.prune(source, tmp_path / name, stream=stream, repair_samples=8, **wanted)
    first, second = (edgeprune.load(tmp_path / n).state_dict() for n in ("resident", "streamed"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_a_run_killed_while_it_repairs_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("edgeprune.scratch.INTERVAL", 0.0)
    source = tiny.save("llama", tmp_path / "dense")
    wanted = {"sparsity": 0.4, "iterations": 2, "samples": 8, "length": 16, "width_multiple": 8}
    wanted |= {"repair_samples": 8, "state": tmp_path / "state"}
    pruner.prune(source, tmp_path / "whole", **wanted)

    def die(event):
        if getattr(event, "note", "") == "repair" and event.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pruner.prune(source, tmp_path / "again", emit=die, **wanted)
    repaired_layers = []
    keep = Scratch.keep
    monkeypatch.setattr(
        Scratch,
        "keep",
        lambda self, f, s, d: repaired_layers.append(s.layer) or keep(self, f, s, d),
    )
    pruner.prune(source, tmp_path / "again", **wanted)
    assert repaired_layers == [3, 4]
    first, second = (edgeprune.load(tmp_path / n).state_dict() for n in ("whole", "again"))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "dense", "whole"]


def test_projections_are_named_as_in_the_layers():
    names = {n for n, _ in tiny.model("phi3").model.layers[0].named_parameters()}
    assert {f"{name}.weight" for name in OUTPUT.values()} <= names
