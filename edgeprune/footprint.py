"""How much memory a pruning run takes, worked out before anything is read.

Each figure adds up what the code holds at one of its peaks, so that a memory budget can be refused or kept. What is
left of a budget goes to activations: layer inputs of the pass, sequences of the repair. ``benchmarks/RESULTS.md`` has
measured peaks beside these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from edgeprune import machine, mapped
from edgeprune.blocks import HEAD_ROWS
from edgeprune.errors import BadInput
from edgeprune.families import head_dim
from edgeprune.final_norm import TOKENS as NORM_TOKENS
from edgeprune.groups import LayerGroups
from edgeprune.options import Options
from edgeprune.quantities import format_bytes
from edgeprune.sources import Source, weight_bytes, weight_width

# What the process takes beyond what it takes before its first matrix product: kernels made for this processor, and
# memory that was freed in pieces too small to give back. 0.3 GB were measured.
LIBRARIES = 400_000_000
# The first is the fewest that a ridge can be chosen with (``Moments.refit``).
FEWEST_SEQUENCES = 2


@dataclass(frozen=True)
class Footprint:
    """What a run is made of; its methods return bytes.

    Args:
        config: of the dense model.
        groups: of its layers.
        samples: sequences of an iteration.
        repair: sequences to repair with.
        length: tokens of each.
        micro_batch: sequences at once.
        stored: bytes of a weight as stored.
        computed: bytes of a weight to compute with.
        process: bytes that the process fills already.
        streamed: the weights stay in their files, instead of the model in memory.
        unpacked: from a GGUF, which is made into ordinary weights first.
    """

    config: Any
    groups: list[LayerGroups]
    samples: int
    repair: int
    length: int
    micro_batch: int
    stored: int
    computed: int
    process: int
    streamed: bool
    unpacked: bool = False

    # ---- the parts

    @cached_property  # the weights are counted on a model that is built for it
    def base(self) -> int:
        """Everything that is there all the time."""
        held = 0 if self.streamed else weight_bytes(self.config, self.stored)
        return self.process + LIBRARIES + held

    @property
    def layer(self) -> int:
        """Parameters of the largest decoder layer."""
        return max(g.parameters for g in self.groups)

    @property
    def table(self) -> int:
        """Parameters of the embedding, or of the head."""
        return int(self.config.vocab_size * self.hidden)

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def inputs(self) -> int:
        """Inputs of the widest output projection."""
        heads = int(self.config.num_attention_heads) * head_dim(self.config)
        return max(heads, *(g.count["mlp"] for g in self.groups))

    @property
    def weights(self) -> int:
        """Bytes of one layer to compute with: what is whole are pages of its file, what is cut are copies."""
        return self.layer * self.computed

    @property
    def activations(self) -> int:
        """Bytes that a layer keeps of a micro batch for its backward, and that this adds."""
        values = (8 * self.inputs + 24 * self.hidden) * self.computed
        scores = 12 * int(self.config.num_attention_heads) * self.length
        return min(self.micro_batch, self.samples) * self.length * (values + scores)

    @property
    def boundaries(self) -> int:
        """Bytes of the residual streams of all sequences that there are at once: a layer's input, output, gradient."""
        return 3 * self.samples * self.length * self.hidden * self.computed

    # ---- the peaks

    def opening(self) -> int:
        """Checking the largest tensor of a mapped model; one of a GGUF is made in float32 twice."""
        each = 13 if self.unpacked else self.stored if self.streamed else 0
        return self.base + self.table * each

    def cutting(self) -> int:
        """A layer's pages, what is cut of them as stored, and to compute with."""
        return self.base + self.layer * (2 * self.stored + self.computed) + self.boundaries

    def loss(self) -> int:
        """The head, the last layer, and some rows of logits."""
        logits = HEAD_ROWS * self.config.vocab_size * (3 * self.computed + 4)
        rows = 8 * self.micro_batch * self.length * self.hidden * 4
        head = self.table * self.computed
        return self.base + head + self.weights + logits + rows + self.boundaries

    def backward(self) -> int:
        """A layer, its gradients in float32, those of a micro batch, and three streams."""
        gradients = self.layer * (4 + self.computed)
        return self.base + self.weights + gradients + self.activations + self.boundaries

    def repairing(self, sequences: int) -> int:
        """A layer whole and cut, all activations of its projections, and their moments (``repair.Moments``)."""
        if not sequences:
            return 0
        tokens = sequences * self.length
        streams = tokens * (6 * self.hidden + self.inputs) * self.computed
        projection = self.inputs * self.hidden * 4
        if tokens <= self.inputs:
            rows = tokens * (self.inputs + self.hidden) * 4
            moments = 2 * rows + 3 * tokens**2 * 4 + tokens * self.hidden * 4
        else:
            moments = 4 * self.inputs**2 * 4 + 3 * projection
        held = 2 * self.weights + streams + self.activations + moments + 3 * projection
        return self.base + max(held, self._predicting(tokens))

    def _predicting(self, tokens: int) -> int:
        """The last layer, the head, some rows of logits, and what the final norm is fitted to."""
        logits = HEAD_ROWS * self.config.vocab_size * (2 * self.computed + 4)
        fitted = 4 * min(tokens, NORM_TOKENS) * self.hidden * 4
        streams = 2 * tokens * self.hidden * self.computed
        return 2 * self.weights + self.table * self.computed + logits + fitted + streams

    def writing(self) -> int:
        """What the repair's last layer left, and the largest tensor beside it, or two layers as stored and cut."""
        layer = self.layer * max(self.stored, self.computed)
        table = self.table * self.stored if self.streamed else 0
        return self.base + self.activations + max(layer + table, 4 * layer)

    # ---- the budget

    def needed(self) -> int:
        """What the run takes at least, with the fewest sequences to repair with."""
        fewest = self.repairing(min(self.repair, FEWEST_SEQUENCES))
        ends = max(self.opening(), self.writing())
        return max(ends, self.cutting(), self.loss(), self.backward(), fewest)

    def hold(self, budget: int) -> int:
        """What layer inputs may take in memory."""
        return budget - max(self.cutting(), self.loss(), self.backward())

    def repair_samples(self, budget: int) -> int:
        """How many sequences of the repair fit."""
        fewest = min(self.repair, FEWEST_SEQUENCES)
        fitting = (n for n in range(self.repair, fewest, -1) if self.repairing(n) <= budget)
        return next(fitting, fewest)


@dataclass(frozen=True)
class Room:
    """How a run's memory is divided: bytes for layer inputs, and how many sequences of the repair fit."""

    streamed: bool
    hold: int
    repair_samples: int


def fit(
    source: Source,
    config: Any,
    groups: list[LayerGroups],
    options: Options,
    stream: bool | None,
    memory_budget: int | None,
) -> Room:
    """Divide the memory, or raise BadInput if it is too small for the run.

    Args:
        source: the dense model.
        config: its config.
        groups: of its layers.
        options: of the run.
        stream: leave the weights in their files; None: where the model does not fit as a whole.
        memory_budget: bytes that the process may fill; None: a good part of what is free.
    """
    process, given = mapped.resident(), memory_budget is not None
    # who says --no-stream has the whole of it
    free = machine.memory().available if stream is False else mapped.budget()
    budget = memory_budget or process + free
    sizes = Footprint(
        config,
        groups,
        samples=options.samples,
        repair=options.repair_samples,
        length=options.length,
        micro_batch=options.micro_batch,
        stored=weight_width(config),
        computed=machine.compute_dtype().itemsize,
        process=process,
        streamed=False,
        unpacked=source.gguf_file is not None,
    )
    if stream or (stream is None and sizes.needed() > budget):
        sizes = replace(sizes, streamed=True)
    if sizes.needed() > budget and (sizes.streamed or given):
        raise _too_small(sizes, budget, given)
    return Room(sizes.streamed, sizes.hold(budget), sizes.repair_samples(budget))


def _too_small(sizes: Footprint, budget: int, given: bool) -> BadInput:
    needed = sizes.needed()
    figure = f"{math.ceil(needed * 1.02 / 1e8) / 10:g}GB"  # the next process may be a little larger
    what = f"pruning this model takes at least {format_bytes(needed)} of memory"
    if not sizes.streamed:
        what += " with --no-stream"
    if given:
        return BadInput(
            f"{what}; --memory-budget is {format_bytes(budget)}: type --memory-budget {figure}"
        )
    return BadInput(
        f"{what}, and it takes no more than {format_bytes(budget)} by itself with what is free now: close other "
        f"programs, or allow more with --memory-budget {figure}"
    )
