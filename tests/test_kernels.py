"""The written-out norms, gates, rotations and attention are transformers' own, gradients included."""

from __future__ import annotations

import types

import pytest
import torch
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral

from edgeprune.recovery import kernels
from edgeprune.recovery.objective import Objective
from tests import tiny
from tests.packed import packed


def gradients(model, data):
    model.zero_grad()
    loss, _ = Objective(model, None, 0.0, 1.0)(data.batch(range(3)))
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_replaced_model_is_the_model(family, monkeypatch):
    """In float64, in which the model is replaced as in bfloat16, so that only the mathematics can differ."""
    monkeypatch.setattr(kernels, "QUERY_ROWS", 20)
    model, data = tiny.model(family).double(), packed(3, length=72)
    loss, wanted = gradients(model, data)
    before = {n: type(m).forward for n, m in model.named_modules()}
    with kernels.fused(model, 72, torch.float64, compiled=False):
        assert any("forward" in vars(m) for m in model.modules())
        assert model.config._attn_implementation == kernels.ATTENTION
        fused, found = gradients(model, data)
    assert fused == pytest.approx(loss, rel=1e-6)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-4, msg=name)
    assert not any("forward" in vars(m) for m in model.modules())
    assert model.config._attn_implementation != kernels.ATTENTION
    assert before == {n: type(m).forward for n, m in model.named_modules()}


def test_a_float32_model_is_left_alone():
    model = tiny.model("llama")
    with kernels.fused(model, 32, torch.float32, compiled=True):
        assert not any("forward" in vars(m) for m in model.modules())


def test_the_gate_is_silu_times_up():
    gate, up = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in (0, 1))
    gradient = torch.randn(5, 7, dtype=torch.float64)
    wanted = torch.nn.functional.silu(gate) * up
    found = kernels._Gate.apply(gate, up, kernels._as_written)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    for a, b in zip(
        *(torch.autograd.grad(y, (gate, up), gradient) for y in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_a_function_that_calls_another_of_the_same_name_is_another():
    stock = llama.apply_rotary_pos_emb
    twin = types.FunctionType(stock.__code__, dict(stock.__globals__))
    assert kernels._code(twin) == kernels._code(stock)
    other = types.FunctionType(stock.__code__, stock.__globals__ | {"rotate_half": llama.repeat_kv})
    assert kernels._code(other) != kernels._code(stock)
    assert kernels._code(mistral.apply_rotary_pos_emb) == kernels._code(stock)
