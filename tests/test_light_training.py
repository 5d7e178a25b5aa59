"""Training that takes less memory: low-rank additions, moments in 8 bits."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

import edgeprune
from edgeprune import machine
from edgeprune.errors import BadInput
from edgeprune.recovery import lora
from edgeprune.recovery.memory import estimate
from edgeprune.recovery.objective import last_hidden
from edgeprune.recovery.settings import Training, training_for
from edgeprune.recovery.trainer import Trainer
from tests import tiny
from tests.packed import packed
from tests.test_recover import interleaved, trained, training
from tests.test_trainer import pruned, steps_of

has_8bit = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
LIGHT = [{"lora_rank": 4}, pytest.param({"optimizer": "adamw-8bit"}, marks=has_8bit)]


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    monkeypatch.setattr(machine, "compute_dtype", lambda *_: torch.float32)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("light") / "dense")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def settings(steps=6, **others):
    values = {"length": 32, "batch": 4, "learning_rate": 3e-3, "min_learning_rate": 3e-4} | others
    return Training(tokens=steps * values["batch"] * 32, **values)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_merged_weights_are_the_model_that_was_trained(family):
    model, _, _ = pruned(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    events = []
    each = Trainer(model, settings(lora_rank=4), packed(), emit=events.append)
    each.run()
    losses = [event.loss for event in steps_of(events)]
    assert losses[-1] < losses[0]
    merged = each.weights()
    assert merged.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    linear = {n for n in before if n.endswith("_proj.weight")}
    assert changed == {n for n in linear if before[n].numel()}, (
        "the linear modules and nothing else"
    )
    plain, _, _ = pruned(family)
    plain.load_state_dict(merged, strict=False)
    batch = packed().batch(range(2))
    with torch.no_grad():
        torch.testing.assert_close(
            last_hidden(plain, batch), last_hidden(each.model, batch), rtol=1e-4, atol=1e-5
        )


def test_additions_of_full_rank_reach_what_full_training_reaches():
    """An addition of a whole matrix's rank can say all that training the matrix can; a sanity check of the scale."""
    low, full = [], []
    Trainer(tiny.model("llama"), settings(30, lora_rank=32), packed(), emit=low.append).run()
    Trainer(tiny.model("llama"), settings(30), packed(), emit=full.append).run()
    start = steps_of(full)[0].loss
    won = [start - steps_of(each)[-1].loss for each in (low, full)]
    assert won[0] > 0.5 * won[1]


def test_the_additions_are_counted():
    model = tiny.model("llama")
    wanted = lora.parameters(model, 4)
    each = Trainer(model, settings(lora_rank=4), packed())
    assert sum(m.numel() for m in each._weights.masters.values()) == wanted


@pytest.mark.parametrize("light", LIGHT)
def test_going_on_is_as_if_it_had_never_stopped(light, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "compute_dtype", lambda *_: torch.bfloat16)
    asked = settings(weight_decay=0.1, **light)
    first = Trainer(tiny.model("llama"), asked, packed())
    first.run()
    stopped = Trainer(tiny.model("llama"), asked, packed(), folder=tmp_path)
    stopped.run(until=4)
    torch.manual_seed(99)  # what another process would have drawn
    resumed = Trainer(tiny.model("llama"), asked, packed(), folder=tmp_path)
    resumed.load(tmp_path)
    resumed.run()
    for name, weight in first.weights().items():
        assert torch.equal(weight, resumed.weights()[name]), name


@has_8bit
def test_moments_in_8_bits_train_nearly_like_those_in_32():
    found = []
    for optimizer in ("adamw", "adamw-8bit"):
        events = []
        model = tiny.model("llama", hidden_size=64)  # so that matrices are not too small for 8 bits
        each = Trainer(model, settings(20, optimizer=optimizer), packed(), emit=events.append)
        each.run()
        found.append([event.loss for event in steps_of(events)])
    wide, narrow = found
    assert narrow != wide
    assert wide[0] - wide[-1] > 0.1
    assert narrow == pytest.approx(wide, abs=0.1 * (wide[0] - wide[-1]))


@has_8bit
def test_moments_in_8_bits_are_cut_with_the_weights():
    asked = settings(optimizer="adamw-8bit")
    each = Trainer(tiny.model("llama", hidden_size=64), asked, packed())
    each.run(until=2)
    before = each.moments()
    assert any(m.ndim == 2 and m.numel() >= 4096 for m, _ in before.values())
    each.replace_model(each.model, lambda _name, tensor: tensor)
    for name, both in each.moments().items():
        for moment, old in zip(both, before[name], strict=True):
            torch.testing.assert_close(moment, old, rtol=0.05, atol=0.02 * float(old.abs().max()))
    each.run()


@pytest.mark.parametrize("light", LIGHT)
def test_interleaved_with_pruning(light, dense, cache, tmp_path):
    record = interleaved(dense, tmp_path / "out", cache, training=replace(training(), **light))
    model = edgeprune.load(tmp_path / "out")
    assert model.num_parameters() == record["parameters"]["total"]
    assert record["made"]["recovery"]["training"].items() >= light.items()


def test_a_model_is_recovered_by_additions(dense, cache, tmp_path):
    trained(dense, tmp_path / "out", cache, training=settings(4, lora_rank=2))
    model, before = edgeprune.load(tmp_path / "out"), edgeprune.load(dense)
    assert type(model) is type(before)
    assert not any("lora" in name for name, _ in model.named_parameters())
    q = "model.layers.0.self_attn.q_proj.weight"
    change = model.get_parameter(q).float() - before.get_parameter(q).float()
    assert torch.linalg.matrix_rank(change, rtol=1e-3) == 2


def test_less_memory_is_estimated():
    config, asked = tiny.model("llama").config, Training(10**6)
    plain = estimate(config, asked, 1, torch.bfloat16)
    narrow = estimate(config, settings(optimizer="adamw-8bit"), 1, torch.bfloat16)
    assert narrow.optimizer == plain.optimizer // 4
    light = estimate(config, settings(lora_rank=2), 1, torch.bfloat16)
    parameters = sum(p.numel() for p in tiny.model("llama").parameters())
    additions = lora.parameters(tiny.model("llama"), 2)
    assert light.weights == 2 * parameters + 6 * additions
    assert (light.gradients, light.optimizer) == (4 * additions, 8 * additions)


def test_the_learning_rate_of_additions_is_higher():
    assert training_for(10**6, lora_rank=8).learning_rate == pytest.approx(
        10 * training_for(10**6).learning_rate
    )
    assert training_for(10**6, lora_rank=8, learning_rate=1e-4).learning_rate == 1e-4


@pytest.mark.parametrize("light", LIGHT)
def test_spread_weights_are_refused(light):
    with pytest.raises(BadInput, match="without FSDP"):
        Trainer(tiny.model("llama"), settings(**light), packed(), sharded=True)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(BadInput, match="adamw or adamw-8bit"):
        settings(optimizer="sgd").check()
