"""The iterations of a pruning run and the repair at its end: what is decided, and the passes that it rests on."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgeprune import calibration as texts
from edgeprune import machine
from edgeprune.blocks import EAGER_UP_TO, Ends, Pass
from edgeprune.budget import (
    LayerChoice,
    Limits,
    choose,
    layer_targets,
    limits,
    removable_parameters,
)
from edgeprune.events import Emit, Note, Progress, PruneIteration, ignore
from edgeprune.families import Half, family_of
from edgeprune.final_norm import refit_norm
from edgeprune.footprint import Room
from edgeprune.groups import HALVES, Kept, LayerGroups, describe_layers
from edgeprune.importance import ImportanceWatcher, normalised, ranked
from edgeprune.layers import CutLayers
from edgeprune.options import Options
from edgeprune.repair import kept_columns, repair
from edgeprune.scratch import Scratch
from edgeprune.target import Target
from edgeprune.waiting import Waiting

STAGE = "prune"
# How much of the importance measured in earlier iterations counts on. Each iteration draws fresh text, so that a mean
# over several is less noisy than one alone.
MEMORY = 0.8


@dataclass
class PruneRun:
    """One pruning run: what is planned, and what is decided so far.

    ``memory[half][i]`` holds the importance of all *dense* groups of layer i over the past iterations, discounted;
    ``layer_memory`` the same for layers, and ``weight`` the sum of the discounts. ``planned`` is how many parameters
    each layer should have lost so far.
    """

    options: Options
    target: Target
    groups: list[LayerGroups]
    limits: list[Limits]
    kept: list[Kept]
    memory: dict[Half, list[Tensor]]
    layer_memory: list[float]
    planned: list[float]
    losses: list[float]
    weight: float = 0.0
    # how the memory is divided; None: there is enough for everything
    room: Room | None = None

    @staticmethod
    def plan(config: Any, options: Options, target: Target) -> PruneRun:
        """Describe the model's groups from its config alone, and check that the target can be met."""
        groups = describe_layers(config)
        multiple = options.width_multiple
        bounds = [limits(g, multiple, i in options.skip_layers) for i, g in enumerate(groups)]
        run = PruneRun(
            options=options,
            target=target,
            groups=groups,
            limits=bounds,
            kept=[g.everything() for g in groups],
            memory={half: [torch.zeros(g.count[half]) for g in groups] for half in HALVES},
            layer_memory=[0.0] * len(groups),
            planned=[0.0] * len(groups),
            losses=[],
        )
        target.check(config, run.groups, run.most())
        return run

    def most(self) -> list[int]:
        """Parameters that each layer may lose."""
        return [removable_parameters(g, b) for g, b in zip(self.groups, self.limits, strict=True)]

    # ---- the iterations

    def steps(
        self,
        dense: Any,
        tokenizer: Any,
        corpus: texts.Calibration,
        scratch: Scratch,
        emit: Emit = ignore,
    ) -> Iterator[PruneIteration]:
        """Run the iterations that are left, one each time the next is asked for.

        What of a pass does not fit in the memory waits in ``scratch``, and a pass that was killed goes on from there.
        """
        options = self.options
        device, dtype = machine.pick_device(), machine.compute_dtype()
        with _attention(dense, options.length):
            layers = CutLayers(dense, self.groups, self.kept, dtype, device)
            walk = Pass(layers, Ends(dense, dtype, device), options.micro_batch)
            for iteration in range(len(self.losses) + 1, options.iterations + 1):
                started = time.monotonic()
                tokens = corpus.draw(
                    tokenizer, options.samples, options.length, f"{options.seed}-{iteration}"
                )
                waiting = self._waiting(scratch, iteration, emit)
                self._remember(self._measure(walk, tokens, iteration, waiting, emit))
                self._decide(dense.config, iteration)
                layers.cut(self.kept)
                yield self._event(iteration, time.monotonic() - started)
                waiting.clear()  # not before the caller has saved what the pass led to

    def repair(
        self,
        dense: Any,
        tokenizer: Any,
        corpus: texts.Calibration,
        scratch: Scratch,
        emit: Emit = ignore,
    ) -> None:
        """Refit the output projections and the final norm to what the dense model does, into ``scratch``."""
        options, config = self.options, dense.config
        device, dtype = machine.pick_device(), machine.compute_dtype()
        samples = self._repair_samples(emit)
        tokens = corpus.draw(tokenizer, samples, options.length, f"{options.seed}-repair")
        family, everything = family_of(config), [g.everything() for g in self.groups]
        with _attention(dense, options.length):
            cut_layers, whole_layers = (
                CutLayers(dense, self.groups, kept, dtype, device)
                for kept in (self.kept, everything)
            )
            ends, streams = Ends(dense, dtype, device), scratch.streams(samples)
            steps = repair(
                ends,
                list(tokens.split(options.micro_batch)),
                whole_layers.block,
                cut_layers.block,
                [
                    kept_columns(family, g, k, device)
                    for g, k in zip(self.groups, self.kept, strict=True)
                ],
                streams,
            )
            for fixed, streams in steps:
                scratch.keep(fixed, streams, dense.dtype)
                emit(self._repaired(streams.layer))
            assert streams is not None
            scratch.keep_norm(refit_norm(ends, streams), dense.dtype)
            ends.release()
            emit(self._repaired(len(self.groups) + 1))

    def _repaired(self, done: int) -> Progress:
        total = len(self.groups) + 1  # the final norm takes as long as some layers
        note = "final norm" if done + 1 == total else "repair"
        return Progress(stage=STAGE, done=done, total=total, unit="layers repaired", note=note)

    def _repair_samples(self, emit: Emit) -> int:
        """As many sequences as were asked for, or what their activations leave room for."""
        wanted = self.options.repair_samples
        most = self.room.repair_samples if self.room else wanted
        if wanted <= most:
            return wanted
        text = f"repairing with {most} sequences instead of {wanted}: more do not fit in the memory budget"
        emit(Note(text=text, level="warning"))
        return most

    def _waiting(self, scratch: Scratch, iteration: int, emit: Emit) -> Waiting:
        # the figures of a pass follow from these and from what the scratch belongs to
        kept = hashlib.sha256(json.dumps([k.to_json() for k in self.kept]).encode()).hexdigest()
        dtype, batch = machine.compute_dtype(), self.options.micro_batch
        which = f"iteration {iteration} in {dtype} by {batch}, kept {kept}"
        return scratch.waiting(self.room.hold if self.room else None, which, emit)

    def _measure(
        self, walk: Pass, tokens: Tensor, iteration: int, waiting: Waiting, emit: Emit
    ) -> ImportanceWatcher:
        options = self.options
        watcher = ImportanceWatcher(
            self.groups, self.kept, options.layer_importance, options.element_importance
        )
        steps = 2 * len(self.groups) * math.ceil(len(tokens) / walk.micro_batch)

        def tick(done: int) -> None:
            emit(
                Progress(
                    stage=STAGE,
                    done=(iteration - 1) * steps + done,
                    total=options.iterations * steps,
                    unit="layer passes",
                    note=f"iteration {iteration} of {options.iterations}",
                )
            )

        with waiting:
            self.losses.append(walk.run(tokens, watcher, tick, waiting))
        return watcher

    def _remember(self, measured: ImportanceWatcher) -> None:
        self.weight = MEMORY * self.weight + 1
        for i, kept in enumerate(self.kept):
            self.layer_memory[i] = MEMORY * self.layer_memory[i] + measured.by_layer[i]
            for half in HALVES:
                memory = self.memory[half][i]
                memory *= MEMORY
                memory[kept.of(half)] += measured.by_group[half][i]

    def layer_importance(self) -> list[float]:
        """Normalised importance of the layers that may be pruned; 0 for those left alone."""
        free = [i for i in range(len(self.groups)) if i not in self.options.skip_layers]
        result = [0.0] * len(self.groups)
        scale = ranked if self.options.method == "adapt" else normalised
        for i, x in zip(free, scale([self.layer_memory[i] for i in free]), strict=True):
            result[i] = x
        return result

    def _decide(self, config: Any, iteration: int) -> None:
        options = self.options
        total = self.target.removed * iteration / options.iterations
        prunable = [g.prunable for g in self.groups]
        amplitude = 0.0 if options.method == "uniform" else options.amplitude
        if options.method == "adapt":
            amplitude *= self.target.removed / sum(prunable) / options.iterations
        self.planned = layer_targets(
            self.planned,
            prunable,
            self.most(),
            self.layer_importance(),
            amplitude,
            total,
        )
        multiple = options.width_multiple
        if iteration < options.iterations:
            self.kept = choose(self._choices(), self.planned, multiple)
        else:
            self.kept = self.target.settle(
                config, lambda whole: choose(self._choices(), self.planned, multiple, whole)
            )

    def _choices(self) -> list[LayerChoice]:
        return [
            LayerChoice.of(
                g, bound, k, {h: self.memory[h][i][k.of(h)] / self.weight for h in HALVES}
            )
            for i, (g, bound, k) in enumerate(zip(self.groups, self.limits, self.kept, strict=True))
        ]

    def _event(self, iteration: int, seconds: float) -> PruneIteration:
        removed = [g.removed_parameters(k) for g, k in zip(self.groups, self.kept, strict=True)]
        whole = [g.parameters for g in self.groups]
        return PruneIteration(
            iteration=iteration,
            of=self.options.iterations,
            loss=self.losses[-1],
            decoder_parameters=sum(whole) - sum(removed),
            layer_importance=self.layer_importance(),
            layer_sparsity=[r / w for r, w in zip(removed, whole, strict=True)],
            num_key_value_heads=[len(k.attention) for k in self.kept],
            intermediate_size=[len(k.mlp) for k in self.kept],
            seconds=seconds,
        )


@contextmanager
def _attention(model: Any, length: int) -> Iterator[None]:
    """Use the attention implementation that is quickest for sequences of this length."""
    before = model.config._attn_implementation
    model.config._attn_implementation = "eager" if length <= EAGER_UP_TO else "sdpa"
    try:
        yield
    finally:
        model.config._attn_implementation = before
