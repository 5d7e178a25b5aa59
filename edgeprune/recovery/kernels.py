"""What lies between the matrix products of a decoder layer, in as few passes over memory as it takes.

Written out by autograd, a norm, a rotation and a gate read and write their activations some forty times; with a small
hidden size that takes longer than the matrix products. Here each is one function forward and one backward, which
torch.compile fuses into one loop where a compiler is at hand; without one they run as they are written.

A module of transformers is replaced only where its code is the same as Llama's, which is what is written here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from edgeprune.recovery.loss import weight_gradient

ATTENTION = "edgeprune_blocks"
# Floating-point operations from which on the minutes of a compiler are well spent.
WORTH_COMPILING = 1.5e14
LONGEST_ATTENTION = 1024

# ---- one function a pass


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """RMS norm over the last dimension; also gives what the rows were multiplied by, float32."""
    wide = x.float()
    rate = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight * (wide * rate).to(x.dtype), rate


def _norm_back(gradient: Tensor, x: Tensor, weight: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    normed = x.float() * rate
    wide = gradient.float()
    inner = wide * weight.float()
    by_x = rate * (inner - normed * (inner * normed).mean(-1, keepdim=True))
    by_weight = (wide * normed).sum(list(range(x.ndim - 1)))
    return by_x.to(x.dtype), by_weight.to(weight.dtype)


def _gate(gate: Tensor, up: Tensor) -> Tensor:
    wide = gate.float()
    return (wide * torch.sigmoid(wide) * up.float()).to(up.dtype)


def _gate_back(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    wide, outer = gate.float(), gradient.float()
    share = torch.sigmoid(wide)
    by_gate = outer * up.float() * share * (1 + wide * (1 - share))
    return by_gate.to(gate.dtype), (outer * wide * share).to(up.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (batch, heads, length, head size), by (batch, 1, length, head size)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _rotate_back(gradient: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = (gradient * sin).chunk(2, -1)
    return gradient * cos + torch.cat((second, -first), -1)


Run = Callable[[Callable[..., Any]], Callable[..., Any]]


def _as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


@cache
def compiles(device: str) -> bool:
    """Tell whether torch.compile works for a device on this machine: it takes a C++ compiler, or Triton."""
    try:
        _compiled(_gate)(torch.ones(3, 8, device=device), torch.ones(3, 8, device=device))
    except Exception:  # compilers fail in their own ways, and none is a reason not to train
        return False
    return True


# ---- with their gradients


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, run: Run) -> Tensor:
        y, rate = run(_norm)(x, weight, epsilon)
        ctx.save_for_backward(x, weight, rate)
        ctx.run = run
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.run(_norm_back)(gradient, *ctx.saved_tensors), None, None)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, run: Run) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.run = run
        return run(_gate)(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.run(_gate_back)(gradient, *ctx.saved_tensors), None)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, run: Run) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.run = run
        return run(_rotate)(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.run(_rotate_back)(gradient, *ctx.saved_tensors), None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.nn.functional.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_weight = None
        if ctx.needs_input_grad[1]:  # frozen ones have none
            by_weight = weight_gradient(gradient.flatten(0, -2), x.flatten(0, -2))
        return gradient @ weight, by_weight


# Rows of attention at a time: what a row may not see because it comes later is not computed, but for the last block.
QUERY_ROWS = 128


class _Attention(torch.autograd.Function):
    """Causal attention as plain matrix products over blocks of queries.

    torch's own for CPUs goes backward at a seventh of the speed of these. The probabilities are kept, which is
    quadratic in the length: not for long sequences.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
    ) -> Tensor:
        """Return (batch, length, heads, head size).

        Args:
            query: (batch, heads, length, head size).
            key: (batch, KV heads, length, head size).
            value: as ``key``.
            mask: (batch, 1, length, length), to be added; causal.
            scale: of the scores.
        """
        batch, heads, length, size = query.shape
        kv_heads = key.shape[1]
        key, value = (each.reshape(batch * kv_heads, length, size) for each in (key, value))
        query = query.reshape(batch, kv_heads, heads // kv_heads, length, size) * scale
        out = query.new_empty(batch, length, heads, size)
        kept, queries = [], []
        for rows in _blocks(length):
            end = rows.stop
            q = query[:, :, :, rows].reshape(batch * kv_heads, -1, size)
            scores = q @ key[:, :end].transpose(1, 2)
            scores.view(batch, heads, -1, end).add_(mask[:, :, rows, :end])
            probability = torch.softmax(scores, -1)
            o = probability @ value[:, :end]
            out[:, rows] = o.view(batch, heads, -1, size).transpose(1, 2)
            kept.append(probability)
            queries.append(q)
        ctx.save_for_backward(key, value, out, *queries, *kept)
        ctx.scale, ctx.shape = scale, (batch, heads, kv_heads, length, size)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        batch, heads, kv_heads, length, size = ctx.shape
        key, value, out, *rest = ctx.saved_tensors
        blocks = _blocks(length)
        by_query = gradient.new_empty(batch, heads, length, size)
        by_key, by_value = (torch.zeros_like(key, dtype=torch.float32) for _ in (0, 1))
        inner = (gradient.float() * out).sum(-1).to(gradient.dtype).transpose(1, 2)
        for rows, q, probability in zip(blocks, rest, rest[len(blocks) :], strict=False):
            end = rows.stop
            o = gradient[:, rows].transpose(1, 2).reshape(batch * kv_heads, -1, size)
            by_value[:, :end] += probability.transpose(1, 2) @ o
            by_score = o @ value[:, :end].transpose(1, 2)
            by_score.sub_(inner[:, :, rows].reshape(batch * kv_heads, -1, 1)).mul_(probability)
            by_key[:, :end] += by_score.transpose(1, 2) @ q
            found = by_score @ key[:, :end]
            by_query[:, :, rows] = found.mul_(ctx.scale).view(batch, heads, -1, size)
        by_key, by_value = (
            each.to(key.dtype).view(batch, kv_heads, length, size) for each in (by_key, by_value)
        )
        return by_query, by_key, by_value, None, None


def _blocks(length: int) -> list[slice]:
    return [slice(start, min(start + QUERY_ROWS, length)) for start in range(0, length, QUERY_ROWS)]


# ---- in a model of transformers


@contextmanager
def fused(
    model: Any, length: int, dtype: torch.dtype, *, compiled: bool, attention: bool = True
) -> Iterator[None]:
    """Run a model that computes in bfloat16 with what is written here, for as long as the context is open.

    In float32, matrix products take so long that nothing else matters, and the model is left as it is.

    Args:
        model: of transformers.
        length: of the sequences to come.
        dtype: to compute in; the parameters' own is another where they are spread over processes.
        compiled: fuse the passes with torch.compile: takes a minute or two at the first use on a machine.
        attention: replace attention too, where that is quicker for going backward.
    """
    device = next(model.parameters()).device.type
    undo: list[Callable[[], None]] = []
    if dtype != torch.float32:
        run: Run = _compiled if compiled and compiles(device) else _as_written
        undo = [*_replace_modules(model, run), *_replace_rotary(model, run)]
        if attention and device == "cpu" and length <= LONGEST_ATTENTION:
            undo += _replace_attention(model)
    try:
        yield
    finally:
        for each in undo:
            each()


def _replace_modules(model: Any, run: Run) -> Iterator[Callable[[], None]]:
    from transformers.models.llama import modeling_llama as llama

    def norm(self: Any, hidden_states: Tensor) -> Tensor:
        return _Norm.apply(hidden_states, self.weight, self.variance_epsilon, run)

    def mlp(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(_Gate.apply(self.gate_proj(x), self.up_proj(x), run))

    def linear(self: Any, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.weight)

    for module in model.modules():
        forward: Any = None
        if type(module) is torch.nn.Linear and module.bias is None:
            forward = linear
        elif _same(type(module), llama.LlamaRMSNorm):
            forward = norm
        elif run is _compiled and _same(type(module), llama.LlamaMLP) and _is_silu(module.act_fn):
            forward = mlp  # as written it makes more passes than torch's own two
        if forward is not None:
            module.forward = forward.__get__(module)
            yield partial(delattr, module, "forward")


def _is_silu(activation: Any) -> bool:
    from transformers.activations import ACT2FN

    return isinstance(activation, torch.nn.SiLU | type(ACT2FN["silu"]))


def _replace_rotary(model: Any, run: Run) -> Iterator[Callable[[], None]]:
    from transformers.models.llama import modeling_llama as llama

    def rotary(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return _Rotate.apply(q, cos, sin, run), _Rotate.apply(k, cos, sin, run)

    name = "apply_rotary_pos_emb"
    for place in {sys.modules[type(layer.self_attn).__module__] for layer in model.model.layers}:
        stock = getattr(place, name, None)
        if stock is not None and _code(stock) == _code(llama.apply_rotary_pos_emb):
            setattr(place, name, rotary)
            yield partial(setattr, place, name, stock)


def _replace_attention(model: Any) -> Iterator[Callable[[], None]]:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    configs = [model.config, *(layer.self_attn.config for layer in model.model.layers)]
    for config in {id(each): each for each in configs}.values():
        before = config._attn_implementation
        config._attn_implementation = ATTENTION
        yield partial(setattr, config, "_attn_implementation", before)


def _attention(
    _module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_others: Any,
) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value, attention_mask, scaling), None


def _same(kind: type, model: type) -> bool:
    forward = getattr(kind, "forward", None)
    return forward is not None and _code(forward) == _code(getattr(model, "forward"))  # noqa: B009


def _code(function: Any) -> Any:
    """Return what a function does, and what the functions of its module do that it calls, to be compared."""
    code = getattr(function, "__code__", None)
    if code is None:
        return function
    called = (function.__globals__.get(name) for name in code.co_names)
    own = tuple(_code(each) for each in called if inspect.isfunction(each))
    return code.co_code, code.co_names, code.co_consts, own
