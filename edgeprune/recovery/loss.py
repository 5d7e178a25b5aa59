"""The loss over a large vocabulary, a few rows of logits at a time, with its gradient written by hand.

Autograd would hold the logits of all tokens, their softmax and its gradient, in float32: for a vocabulary of 128k and
4096 tokens 6 GB. Here a chunk's logits become their own gradient in place and are dropped.

With logits z of the student and t of the teacher, label y, temperature T and weight w of the distillation, a token
costs

    (1 - w) CE(z, y) + w T^2 KL(softmax(t / T) || softmax(z / T))

(Hinton et al., arXiv 1503.02531), whose gradient by z is (1 - w)(softmax(z) - 1_y) + w T (softmax(z / T) -
softmax(t / T)).

Of a teacher that was recorded, only the probabilities p_j of its k likeliest tokens K are known, and that the others
have r = 1 - sum p_j. With q = softmax(z / T) and s = 1 - sum q_j over K, the KL is that of the distributions in which
all other tokens are one event, which is at most the whole one and the same with k = vocabulary:

    sum over K of p_j (log p_j - log q_j) + r (log r - log s)

Its gradient by z / T is q_j - p_j in K and q_j (1 - r / s) elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Bytes of a chunk's logits. Less makes more passes over the head's gradient, more only takes memory.
CHUNK_BYTES = 2**27
IGNORED = -100
# Outputs or inputs from which on a product with a transposed left side is the slower way, and the rows of a strip.
WIDE, STRIP = 1024, 256
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Head:
    """What makes logits: weight (vocabulary, hidden size), perhaps a bias, and what the logits are divided by."""

    weight: Tensor
    bias: Tensor | None = None
    divisor: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (tokens, vocabulary) of ``hidden`` (tokens, hidden size)."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        return logits if self.divisor == 1.0 else logits.div_(self.divisor)


@dataclass(frozen=True)
class Teaching:
    """What the teacher says of the same tokens: ``hidden`` (tokens, its hidden size) before its ``head``."""

    hidden: Tensor
    head: Head
    weight: float
    temperature: float


@dataclass(frozen=True)
class Recorded:
    """What the teacher was recorded to say of the same tokens: its k likeliest next ones, ``ids`` (tokens, k).

    ``log_probabilities`` (tokens, k) are theirs among the whole vocabulary, at the temperature.
    """

    ids: Tensor
    log_probabilities: Tensor
    weight: float
    temperature: float


def head_loss(
    hidden: Tensor, head: Head, labels: Tensor, teaching: Teaching | Recorded | None = None
) -> tuple[Tensor, Tensor]:
    """Return the sum over the labelled tokens of what a token costs, and the parts that it is made of.

    Args:
        hidden: (tokens, hidden size), after the final norm.
        head: of the student.
        labels: (tokens,), int64; ``IGNORED`` ones cost nothing.
        teaching: the teacher's side; without it the cost is the cross-entropy alone.

    Returns:
        The sum, float32, differentiable by ``hidden`` and the head's weight and bias; and the two sums
        (cross-entropy, KL divergence at the temperature) in nats, float32 (2,), without gradient. The KL is 0
        without a teacher.
    """
    return _HeadLoss.apply(hidden, head.weight, head.bias, head.divisor, labels, teaching)


@torch.no_grad()
def cross_entropy(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """Return the summed cross-entropy of the labelled tokens from float32 logits, float32, for measuring.

    Arguments are those of ``head_loss``.
    """
    rows = (labels != IGNORED).nonzero().squeeze(1)
    size = max(1, CHUNK_BYTES // (len(head.weight) * 4))
    total = torch.zeros((), device=hidden.device)
    for chunk in rows.split(size):
        logits = head.logits(hidden.index_select(0, chunk)).float()
        total += torch.nn.functional.cross_entropy(logits, labels[chunk], reduction="sum")
    return total


class _HeadLoss(torch.autograd.Function):
    """Computes the gradients along with the loss, since the logits are at hand only then."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        divisor: float,
        labels: Tensor,
        teaching: Teaching | Recorded | None,
    ) -> tuple[Tensor, Tensor]:
        head = Head(weight, bias, divisor)
        rows = (labels != IGNORED).nonzero().squeeze(1)
        size = max(1, CHUNK_BYTES // (len(weight) * weight.element_size()))
        by_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        by_weight = _Sum(weight) if ctx.needs_input_grad[1] else None
        by_bias = _Sum(bias) if bias is not None and ctx.needs_input_grad[2] else None
        parts = torch.zeros(2, device=hidden.device)
        for chunk in rows.split(size):
            inputs = hidden.index_select(0, chunk)
            gradient, found = _chunk(inputs, head, labels[chunk], teaching, chunk)
            parts += found
            if by_hidden is not None:
                by_hidden.index_copy_(0, chunk, gradient @ weight)
            if by_weight is not None:
                by_weight.add(weight_gradient(gradient, inputs))
            if by_bias is not None:
                by_bias.add(gradient.sum(0, dtype=torch.float32))
        totals = (None if each is None else each.total() for each in (by_weight, by_bias))
        ctx.save_for_backward(by_hidden, *totals)
        ctx.mark_non_differentiable(parts)
        share = teaching.weight if teaching else 0.0
        scale = teaching.temperature**2 if teaching else 1.0
        return (1 - share) * parts[0] + share * scale * parts[1], parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor, _parts: Tensor) -> tuple[Tensor | None, ...]:
        found = (None if g is None else g.mul_(outer) for g in ctx.saved_tensors)
        return (*found, None, None, None)


class _Sum:
    """A sum in float32, given back in its parameter's type. One term alone is not copied."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._sum: Tensor | None = None

    def add(self, product: Tensor) -> None:
        if self._sum is None:
            self._sum = product
        else:
            self._sum = self._sum.float().add_(product)

    def total(self) -> Tensor:
        if self._sum is None:
            return torch.zeros_like(self._like)
        total = self._sum.to(self._like.dtype)
        return total if total.is_contiguous() else _transposed(total.t())


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """Return gradient^T x of (tokens, outputs) and (tokens, inputs).

    CPUs multiply bfloat16 with a large transposed left side at half speed: the smaller of the two is transposed first.
    """
    sizes = (gradient.shape[1], x.shape[1])
    if gradient.device.type != "cpu" or x.dtype != torch.bfloat16 or max(sizes) < WIDE:
        return gradient.t() @ x
    if sizes[0] <= sizes[1]:
        return _transposed(gradient) @ x
    return (_transposed(x) @ gradient).t()


def _transposed(x: Tensor) -> Tensor:
    """Return x^T, contiguous: by strips, since rows a power of two apart fall onto the same lines of the cache."""
    out = x.new_empty(x.shape[1], x.shape[0])
    for rows, columns in zip(x.split(STRIP), out.split(STRIP, 1), strict=True):
        columns.copy_(rows.t())
    return out


def _chunk(
    inputs: Tensor,
    head: Head,
    labels: Tensor,
    teaching: Teaching | Recorded | None,
    chunk: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradient by what the head's weight gives (undivided), and the two summed losses of these tokens."""
    logits = head.logits(inputs)
    at = torch.arange(len(labels), device=labels.device)
    if teaching is None:
        gradient = torch.softmax(logits, dim=-1)
        loss = _cross_entropy(gradient, at, labels)
        gradient[at, labels] -= 1
        return _undivided(gradient, head), torch.stack((loss, torch.zeros_like(loss)))
    share, temperature = teaching.weight, teaching.temperature
    own = torch.softmax(logits, dim=-1)
    cross_entropy = _cross_entropy(own, at, labels)
    if isinstance(teaching, Recorded):
        recorded = (teaching.ids[chunk].long(), teaching.log_probabilities[chunk].float())
        divergence, apart = _recorded_divergence(logits, *recorded, own, temperature)
    else:
        theirs = teaching.head.logits(teaching.hidden[chunk])
        divergence, apart = _divergence(logits, theirs, own, temperature)
    own[at, labels] -= 1
    gradient = own.mul_(1 - share).add_(apart, alpha=share * temperature)
    return _undivided(gradient, head), torch.stack((cross_entropy, divergence))


def _undivided(gradient: Tensor, head: Head) -> Tensor:
    return gradient if head.divisor == 1.0 else gradient.div_(head.divisor)


def _cross_entropy(probability: Tensor, at: Tensor, labels: Tensor) -> Tensor:
    return -probability[at, labels].float().clamp_min(TINY).log().sum()


def _divergence(
    logits: Tensor, teachers: Tensor, own: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the summed KL(teacher || student) at the temperature, and softmax(student) - softmax(teacher) there.

    ``own`` is the student's softmax at temperature 1. The KL is sum of p (t - z) / T - log Z_t + log Z_z: the two
    normalisers follow from any one token's logit and probability, and the largest is the safest.
    """
    if temperature != 1.0:
        own = torch.softmax(logits / temperature, dim=-1)
    theirs = (
        torch.softmax(teachers / temperature, dim=-1)
        if temperature != 1.0
        else torch.softmax(teachers, dim=-1)
    )
    shift = _log_normaliser(logits, own, temperature) - _log_normaliser(
        teachers, theirs, temperature
    )
    gap = teachers.sub_(logits).mul_(theirs).sum(dim=-1, dtype=torch.float32) / temperature
    return (gap + shift).sum(), own - theirs


def _recorded_divergence(
    logits: Tensor, ids: Tensor, log_theirs: Tensor, own: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the summed KL(teacher || student) with all tokens but ``ids`` as one event, and its gradient by z / T.

    ``ids`` and ``log_theirs``, float32, are (tokens, k); ``own`` is the student's softmax at temperature 1.
    """
    own = torch.softmax(logits / temperature, dim=-1) if temperature != 1.0 else own.clone()
    # as they were rounded they may add up to more than 1; those of the whole vocabulary add up to it
    total = log_theirs.logsumexp(dim=-1, keepdim=True)
    log_theirs = log_theirs - (total if ids.shape[1] == own.shape[1] else total.clamp_min(0))
    theirs = log_theirs.exp()
    rest = (1 - theirs.sum(dim=-1)).clamp_min(0)
    normaliser = _log_normaliser(logits, own, temperature)
    log_own = logits.gather(1, ids).float() / temperature - normaliser[:, None]
    among = own.gather(1, ids).float() - theirs
    # the others' share is added up: 1 less the sum of the rest has no digits left where it is small
    own.scatter_(1, ids, 0)
    others = own.sum(dim=-1, dtype=torch.float32).clamp_min(TINY)
    divergence = (theirs * (log_theirs - log_own)).sum()
    divergence += (torch.xlogy(rest, rest) - rest * others.log()).sum()
    own.mul_((1 - rest / others)[:, None])
    return divergence, own.scatter_(1, ids, among.to(own.dtype))


def _log_normaliser(logits: Tensor, probability: Tensor, temperature: float) -> Tensor:
    largest, where = probability.max(dim=-1)
    top = logits.gather(1, where[:, None]).squeeze(1).float() / temperature
    return top - largest.float().log()
