"""The final norm, refitted so that a pruned model predicts as nearly as it can what the dense one predicts.

What is cut leaves noise in the last residual stream, which makes the pruned model too sure of itself. The norm before
the head multiplies each channel by a weight; logits are linear in those weights, so that the divergence from the dense
model's next-token distribution

    mean over tokens of KL(p || softmax(W (y * g))),  y the normed stream, W the head, p the dense distribution

is convex in the factors g, one a channel. It costs nothing at run time, and needs no labels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from edgeprune.blocks import HEAD_ROWS, Ends
from edgeprune.families import norm_offset
from edgeprune.repair import Streams

TOKENS = 16_384
# Few steps on purpose: going on, or scaling the channels so that it goes faster, fits the tokens and not the text.
STEPS = 10
# Part of the tokens that the factors are judged on, not fitted to.
HELD_OUT = 4


def refit_norm(ends: Ends, streams: Streams) -> Tensor | None:
    """Return the final norm's new weight, (hidden size), float32; None if the old one is as good on held-out tokens
    or there are too few to tell.

    Args:
        ends: of the dense model.
        streams: the residual streams of both models after the last layer.
    """
    with torch.no_grad():
        goal = _Goal.of(ends, streams)
        if len(goal.inputs) < HELD_OUT:
            return None
        fitted, held_out = goal.split(HELD_OUT)
        factors = torch.ones(goal.inputs.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([factors], max_iter=STEPS, line_search_fn="strong_wolfe")

        def closure() -> float:
            loss, factors.grad = fitted.loss(factors)
            return loss

        optimizer.step(closure)
        factors = factors.detach()
        if not held_out.loss(factors)[0] < held_out.loss(torch.ones_like(factors))[0]:
            return None
        offset = norm_offset(ends.model.config)
        old = ends.model.model.norm.weight.detach().float().cpu()
        return factors * (old + offset) - offset


class _Goal:
    """What the dense model predicts for some tokens, and what the pruned model's head reads at them.

    ``inputs`` are (tokens, hidden size), float32; ``expected``, of the same shape and type, is the mean of the head's
    rows under the dense distribution: all that the divergence needs of it, but for a constant.
    """

    def __init__(self, ends: Ends, inputs: Tensor, expected: Tensor) -> None:
        self._ends = ends
        self.inputs, self.expected = inputs, expected

    @staticmethod
    def of(ends: Ends, streams: Streams) -> _Goal:
        """Take as many sequences as hold ``TOKENS`` tokens."""
        inputs, dense = (
            _normed(ends, each)[:TOKENS].to(ends.device) for each in (streams.pruned, streams.dense)
        )
        expected = [_mean_row(ends, rows.to(ends.dtype))[0] for rows in dense.split(HEAD_ROWS)]
        return _Goal(ends, inputs, torch.cat(expected))

    def split(self, parts: int) -> tuple[_Goal, _Goal]:
        """Give all but one of so many parts of the tokens, and that one."""
        own = len(self.inputs) - len(self.inputs) // parts
        return (
            _Goal(self._ends, self.inputs[:own], self.expected[:own]),
            _Goal(self._ends, self.inputs[own:], self.expected[own:]),
        )

    def loss(self, factors: Tensor) -> tuple[float, Tensor]:
        """Return the mean divergence in nats, less a constant, and its gradient by ``factors``."""
        total = 0.0
        gradient = torch.zeros_like(factors)
        scale = factors.detach().to(self._ends.device)
        for inputs, expected in zip(
            self.inputs.split(HEAD_ROWS), self.expected.split(HEAD_ROWS), strict=True
        ):
            scaled = inputs * scale
            mean, logsum = _mean_row(self._ends, scaled.to(self._ends.dtype))
            total += float(logsum.sum() - (expected * scaled).sum() / self._ends.divisor)
            missing = (mean - expected) * inputs / self._ends.divisor
            gradient += missing.sum(0).to(gradient.device)
        count = len(self.inputs)
        return total / count, gradient / count


def _normed(ends: Ends, streams: list[Tensor]) -> Tensor:
    """The first tokens of a residual stream after the final norm, (tokens, hidden size), float32.

    Rounded to bf16 they would stay where they are when multiplied by a factor near 1.
    """
    enough: list[Tensor] = []
    weights = {name: weight.float() for name, weight in ends.norm.items()}
    for hidden in streams:
        normed = functional_call(ends.model.model.norm, weights, (hidden.float(),))
        enough.append(normed.flatten(0, -2))
        if sum(map(len, enough)) >= TOKENS:
            break
    return torch.cat(enough)


def _mean_row(ends: Ends, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the head's mean row under the next-token distribution of each input, and the log of its sum, float32."""
    logits = torch.nn.functional.linear(inputs, ends.head, ends.head_bias)
    if ends.divisor != 1.0:
        logits /= ends.divisor
    # in float32: the line search compares sums that differ in the fifth digit
    logsum = torch.logsumexp(logits.float(), dim=-1)
    return (torch.softmax(logits, dim=-1) @ ends.head).float(), logsum
