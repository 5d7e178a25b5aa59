"""Compensation in closed form: the output projections refitted to inputs of which some are gone.

A layer that lost heads or channels writes something else into the residual stream. ``o_proj`` and ``down_proj`` are
linear in what is left, so the weights that come nearest to what the dense layer wrote are a ridge regression, and cost
nothing at run time:

    W = W_K + D (H + l d I)^-1,   H = sum of w x x^T,  D = sum of w (t - W_K x) x^T,  d = mean diagonal of H

with x the kept inputs of a token, t the target, W_K the dense columns that are kept, w the token's weight. With
t the dense output this is W_K + W_P H_PK (H_KK + l d I)^-1, the form of SparseGPT (arXiv 2301.00774), OSSCAR (arXiv
2403.12983) and others. Two things are added here, both measured in benchmarks/RESULTS.md:

- the target also takes in a share of what the layers before have already got wrong: the difference of the dense
  model's residual stream and this one's;
- a token counts by the inverse square of its residual stream, as the norm that reads the sum divides by it. A few
  tokens with huge activations would else decide everything.

Layers are repaired in order, each on the activations that the repaired layers before it produce.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from edgeprune.blocks import Block, Ends, Weights
from edgeprune.families import Family, Half, residual_scale
from edgeprune.groups import HALVES, Kept, LayerGroups, part_index

Columns = dict[Half, Tensor]

OUTPUT: dict[Half, str] = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}
# Share of the residual stream's error that a projection is asked to make up for; 0, 0.3, 0.6 and 1 were tried.
MIX = 0.3
# Candidates for the ridge, in units of the mean diagonal of H.
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
# Rows of the weight that the ridge is chosen on: the inputs are the same for all of them.
RIDGE_ROWS = 64


class Moments:
    """Second moments of a projection's inputs x and of what they must make up for, over two halves of the sequences.

    H = sum of w x x^T is (inputs, inputs) and D = sum of w t x^T - W H (outputs, inputs), float32. They are
    gathered as such when there are more tokens than inputs. With fewer, as in large models, the tokens themselves are
    kept, and D (H + r I)^-1 is taken as E^T (X X^T + r I)^-1 X, with a row of X and of the errors E for each token.

    Args:
        weight: the weight before the repair, (outputs, inputs), float32.
        tokens: how many there will be.
    """

    def __init__(self, weight: Tensor, tokens: int) -> None:
        self._weight = weight
        self._few = tokens <= weight.shape[1]
        self._sequences = 0
        self._rows: tuple[list[tuple[Tensor, Tensor]], ...] = ([], [])
        inputs = 0 if self._few else weight.shape[1]
        self._second, self._wanted = (
            [weight.new_zeros(rows, inputs) for _ in (0, 1)]
            for rows in (inputs, 0 if self._few else len(weight))
        )

    def add(self, inputs: Tensor, targets: Tensor, weight: Tensor) -> None:
        """Add a micro batch.

        Args:
            inputs: (batch, length, inputs).
            targets: (batch, length, outputs).
            weight: of each token, (batch, length, 1), float32.
        """
        root = weight.sqrt()
        for half in (0, 1):
            # by the sequence's number, so that the micro batch does not matter
            rows = slice((half + self._sequences) % 2, None, 2)
            x = (inputs[rows].float() * root[rows]).flatten(0, -2)
            wanted = (targets[rows].float() * root[rows]).flatten(0, -2)
            if self._few:
                self._rows[half].append((x, wanted.addmm_(x, self._weight.T, alpha=-1)))
                continue
            with _products_of(inputs.dtype):
                self._second[half].addmm_(x.T, x)
                self._wanted[half].addmm_(wanted.T, x)
        self._sequences += len(inputs)

    def refit(self) -> tuple[Tensor, float]:
        """Return the repaired weight, (outputs, inputs), float32, and the ridge that was chosen for it."""
        ridge = _least(self._held_out_error()) if self._sequences > 1 else RIDGES[-1]
        if self._few:
            x, error = (
                torch.cat(each) for each in zip(*(self._rows[0] + self._rows[1]), strict=True)
            )
            solved, ridge = _solve(x @ x.T, error, ridge, x.shape[1])
            return self._weight + solved.T @ x, ridge
        # added up in place: of an 8B model each of them takes 0.8 GB
        second, missing = (
            self._second[0].add_(self._second[1]),
            self._wanted[0].add_(self._wanted[1]),
        )
        self._second.clear()
        self._wanted.clear()
        missing.addmm_(self._weight, second, alpha=-1)
        solved, ridge = _solve(second, missing.T, ridge, len(second))
        return self._weight + solved.T, ridge

    def _held_out_error(self) -> Callable[[float], float]:
        """Return what gives a ridge's squared error on one half of the sequences when fitted on the other."""
        outputs = len(self._weight)
        pick = torch.linspace(0, outputs - 1, min(RIDGE_ROWS, outputs), device=self._weight.device)
        pick = pick.long()
        if self._few:
            (x, fitted), (other, held_out) = (
                (torch.cat([a for a, _ in rows]), torch.cat([e[:, pick] for _, e in rows]))
                for rows in self._rows
            )
            kernel, across = x @ x.T, other @ x.T
            return lambda ridge: float(
                (held_out - across @ _solve(kernel, fitted, ridge, x.shape[1])[0]).square().sum()
            )
        first, second = self._second
        fitted, held_out = (
            (wanted[pick] - self._weight[pick] @ moments).T
            for wanted, moments in zip(self._wanted, self._second, strict=True)
        )

        def error(ridge: float) -> float:
            step, _ = _solve(first, fitted, ridge, len(first))
            return float(((second @ step) * step).sum() - 2 * (held_out * step).sum())

        return error


@contextmanager
def _products_of(dtype: torch.dtype) -> Iterator[None]:
    """Multiply float32 matrices as fast as ``dtype`` has it, and still add up in float32.

    Activations come in ``dtype``, so that a bf16 product of them loses nothing but the last bits of their weighting.
    """
    backend: Any = torch.backends.mkldnn  # its types know no matmul
    settings = backend.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if dtype == torch.bfloat16 else before
    try:
        yield
    finally:
        settings.fp32_precision = before


def _least(error: Callable[[float], float]) -> float:
    """The ridge of least error, walking from the middle: the error falls towards one least value."""
    known = cache(error)
    best = len(RIDGES) // 2
    while True:
        near = [n for n in (best, best - 1, best + 1) if 0 <= n < len(RIDGES)]
        now, best = best, min(near, key=lambda n: known(RIDGES[n]))
        if best == now:
            return RIDGES[best]


def _solve(matrix: Tensor, right: Tensor, ridge: float, inputs: int) -> tuple[Tensor, float]:
    """Solve ``(matrix + ridge d I) x = right`` by Cholesky, d = trace / inputs; the ridge is raised if that fails."""
    scale = float(matrix.diagonal().sum()) / inputs or 1.0
    while True:
        damped = matrix.clone()
        damped.diagonal().add_(ridge * scale)
        factor, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not int(failed):
            return torch.cholesky_solve(right, factor), ridge
        ridge *= 10


def kept_columns(family: Family, groups: LayerGroups, kept: Kept, device: torch.device) -> Columns:
    """Return which inputs of a layer's dense output projections are kept, where they are what they were in it."""
    found: Columns = {}
    for half in HALVES:
        # a norm over all heads together gives other values when some are gone
        if not (half == "attention" and family.wide_qk_norm) and groups.count[half]:
            index = part_index(groups.parts[half], kept.of(half))
            found[half] = index[f"{OUTPUT[half]}.weight", 1].to(device)
    return found


@dataclass
class Streams:
    """Where a repair stands: the next layer, and the residual streams before it, (batch, length, hidden size) each."""

    layer: int
    pruned: list[Tensor]
    dense: list[Tensor]


def repair(
    ends: Ends,
    batches: list[Tensor],
    dense_block: Callable[[int], Block],
    cut_block: Callable[[int], Block],
    columns: Sequence[Columns],
    streams: Streams | None = None,
) -> Iterator[tuple[Weights, Streams]]:
    """Repair layer after layer: yield the new output projections of each, float32, and where the work stands.

    Args:
        ends: of the dense model.
        batches: token ids, (sequences, length) each.
        dense_block: gives a whole decoder layer.
        cut_block: gives it cut to what is kept.
        columns: of each layer, the inputs of the dense projections that are kept (``kept_columns``).
        streams: go on from here.
    """
    with torch.no_grad():
        started = [ends.start(tokens) for tokens in batches]
        arguments = [each for _, each in started]
        if streams is None:
            first = [hidden for hidden, _ in started]
            streams = Streams(0, first, first)
        del started
        scale = residual_scale(ends.model.config)
        for i in range(streams.layer, len(columns)):
            one = _Layer(
                cut_block(i), dense_block(i), [each[i] for each in arguments], scale, columns[i]
            )
            fixed, streams = one.run(streams)
            yield fixed, streams


class _Enough(Exception):
    """Ends a forward pass where nothing more of it is wanted."""


@dataclass
class _Layer:
    """The repair of one decoder layer.

    ``columns[half]`` are the dense projection's inputs that are kept, where cutting leaves them as they were; they are
    then taken from the dense layer's run, which is needed anyway.
    """

    cut: Block
    dense: Block
    arguments: list[dict[str, Any]]
    scale: float | None
    columns: Columns

    def run(self, streams: Streams) -> tuple[Weights, Streams]:
        goals, after = self._goals(streams)
        fixed: Weights = {}
        written: list[dict[Half, Tensor]] = [{} for _ in streams.pruned]
        for half in HALVES:
            name = f"{OUTPUT[half]}.weight"
            if name not in self.cut.weights:  # this half is gone as a whole
                for n, hidden in enumerate(streams.pruned):
                    written[n][half] = torch.zeros_like(hidden)
                continue
            inputs = self._refit(half, streams, goals, written, fixed)
            bias = self.cut.weights.get(f"{OUTPUT[half]}.bias")
            weight = fixed[name].to(self.cut.weights[name].dtype)
            for n, x in enumerate(inputs):
                written[n][half] = torch.nn.functional.linear(x, weight, bias)
            inputs.clear()
        pruned = [
            _forward(self.cut, hidden, self.arguments[n], written[n])
            for n, hidden in enumerate(streams.pruned)
        ]
        return fixed, Streams(streams.layer + 1, pruned, after)

    def _goals(self, streams: Streams) -> tuple[list[dict[Half, Tensor]], list[Tensor]]:
        """What the dense stream's projections write, and the stream after the layer."""
        goals, after = [], []
        for hidden, arguments in zip(streams.dense, self.arguments, strict=True):
            with _outputs(self.dense) as wrote:
                after.append(self.dense(hidden, arguments))
            goals.append(dict(wrote))
        return goals, after

    def _refit(
        self,
        half: Half,
        streams: Streams,
        goals: list[dict[Half, Tensor]],
        written: list[dict[Half, Tensor]],
        fixed: Weights,
    ) -> list[Tensor]:
        """Refit one projection into ``fixed``; return its inputs."""
        name = f"{OUTPUT[half]}.weight"
        tokens = sum(hidden.shape[:-1].numel() for hidden in streams.pruned)
        moments = Moments(self.cut.weights[name].detach().float(), tokens)
        inputs = []
        bias = self.cut.weights.get(f"{OUTPUT[half]}.bias")
        for n, hidden in enumerate(streams.pruned):
            x, wrote = _projection(self.dense, half, hidden, self.arguments[n], written[n])
            if half in self.columns:
                x = x.index_select(-1, self.columns[half])
            else:
                x, _ = _projection(self.cut, half, hidden, self.arguments[n], written[n])
            wanted = wrote.float()
            stream = hidden.float()
            if self.scale is None:
                stream = wanted  # a norm of its own reads what is written
            else:
                error = (
                    streams.dense[n].float() - hidden.float() + self.scale * goals[n][half].float()
                )
                if half == "mlp":
                    added = self.scale * written[n]["attention"].float()
                    stream = stream + added
                    error += self.scale * goals[n].get("attention", 0.0) - added
                wanted = wanted + MIX * (error / self.scale - wanted)
            if bias is not None:
                wanted = wanted - bias.float()
            weight = 1 / stream.square().mean(-1, keepdim=True).clamp_min(1e-12)
            moments.add(x, wanted, weight)
            inputs.append(x)
        fixed[name], _ = moments.refit()
        return inputs


@contextmanager
def _outputs(block: Block) -> Iterator[dict[Half, Tensor]]:
    """Catch what a block's projections write while it runs."""
    wrote: dict[Half, Tensor] = {}
    hooks = []
    for half in HALVES:
        if f"{OUTPUT[half]}.weight" in block.weights:
            projection = block.module.get_submodule(OUTPUT[half])

            def keep(_module: Any, _inputs: Any, output: Tensor, half: Half = half) -> None:
                wrote[half] = output

            hooks.append(projection.register_forward_hook(keep))
    try:
        yield wrote
    finally:
        for hook in hooks:
            hook.remove()


def _projection(
    block: Block, half: Half, hidden: Tensor, arguments: dict[str, Any], known: dict[Half, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return what a projection reads, (batch, length, inputs), and writes, (batch, length, hidden size).

    ``known`` halves are not computed again, and nothing is that comes behind.
    """
    found: list[tuple[Tensor, Tensor]] = []

    def catch(_module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append((inputs[0], output))
        raise _Enough

    hook = block.module.get_submodule(OUTPUT[half]).register_forward_hook(catch)
    try:
        _forward(block, hidden, arguments, known)
    except _Enough:
        pass
    finally:
        hook.remove()
    return found[0]


def _forward(
    block: Block, hidden: Tensor, arguments: dict[str, Any], known: dict[Half, Tensor]
) -> Tensor:
    """Run a layer with what ``known`` halves write given instead of computed."""
    module: Any = block.module
    replaced = []
    if "attention" in known:
        module.self_attn.forward = lambda *_args, **_others: (known["attention"], None)
        replaced.append(module.self_attn)
    if "mlp" in known:
        module.mlp.forward = lambda *_args, **_others: known["mlp"]
        replaced.append(module.mlp)
    try:
        return block(hidden, arguments)
    finally:
        for each in replaced:
            del each.forward
