"""What a training will take is known before it starts, and what does not fit is refused with a way out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from edgeprune.errors import BadInput
from edgeprune.recovery import kernels, memory
from edgeprune.recovery.memory import estimate, fitting_micro_batch
from edgeprune.recovery.objective import last_hidden
from edgeprune.recovery.settings import Training
from tests import tiny
from tests.packed import packed

CPU = torch.device("cpu")
SETTINGS = Training(tokens=10**6, length=512, batch=16)


def fitting(settings=SETTINGS, model=None, **others):
    model = model or tiny.model("llama")
    loaded = sum(p.nbytes for p in model.parameters())
    return fitting_micro_batch(
        model.config,
        settings,
        None,
        CPU,
        torch.float32,
        1,
        loaded=loaded,
        emit=lambda _event: None,
        **others,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_activations_are_estimated_from_above_and_nearly(dtype):
    model = tiny.model("llama")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    held: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, kernels.fused(model, 128, model.dtype, compiled=False):
        out = last_hidden(model, packed(4, length=128).batch(range(4)))
    settings = Training(tokens=1000, length=128, batch=4)
    found = estimate(model.config, settings, 4, dtype).activations
    assert out.requires_grad
    assert 0.6 * sum(held.values()) < found < 2 * sum(held.values())


def test_the_parts_are_what_they_are():
    model = tiny.model("llama")
    parameters = sum(p.numel() for p in model.parameters())
    plain = estimate(model.config, SETTINGS, 4, torch.bfloat16)
    assert (plain.weights, plain.optimizer, plain.teacher) == (6 * parameters, 8 * parameters, 0)
    assert plain.gradients >= 4 * parameters
    spread = estimate(model.config, SETTINGS, 4, torch.bfloat16, shards=4)
    assert spread.optimizer == plain.optimizer // 4
    careful = estimate(model.config, replace(SETTINGS, checkpointing=True), 4, torch.bfloat16)
    assert careful.activations < plain.activations
    assert (
        estimate(model.config, SETTINGS, 4, torch.bfloat16, model.config).teacher > 2 * parameters
    )
    assert plain.total > estimate(model.config, SETTINGS, 2, torch.bfloat16).total


def test_as_much_as_fits_goes_through_at_once(monkeypatch):
    assert fitting() == memory.MICRO_BATCH_TOKENS["cpu"] // 512
    assert fitting(replace(SETTINGS, batch=2)) == 2
    assert fitting(replace(SETTINGS, micro_batch=3)) == 3
    model = tiny.model("llama")
    small = estimate(model.config, SETTINGS, 2, torch.float32).total
    monkeypatch.setattr(memory, "free_memory", lambda _device: small)
    assert 1 <= fitting(model=model) < 8


def test_what_does_not_fit_is_refused_with_the_figure_and_a_way_out(monkeypatch):
    model, asked = tiny.model("llama"), replace(SETTINGS, micro_batch=8)
    held = sum(p.nbytes for p in model.parameters())
    careful = replace(asked, checkpointing=True)
    for settings, rows, words in (
        (asked, 1, "fits with micro_batch = 1"),
        (careful, 1, "fits with activation checkpointing and micro_batch = 1"),
        (replace(careful, length=256), 1, "and length = 256"),
    ):
        room = estimate(model.config, settings, rows, torch.float32).total - held
        monkeypatch.setattr(memory, "free_memory", lambda _device, room=room: room)
        with pytest.raises(BadInput, match=words) as refused:
            fitting(asked, model)
        assert "training takes about" in str(refused.value)
        assert "optimizer" in str(refused.value)
    monkeypatch.setattr(memory, "free_memory", lambda _device: 0)
    with pytest.raises(BadInput, match="only a smaller model"):
        fitting(asked, model)
    assert fitting(asked, model, force=True) == 8
