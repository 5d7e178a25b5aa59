"""Adapt-Pruner: cut a model down to a target in steps, each with importance measured anew.

The source weights are never changed. What a run has decided so far is which groups each layer keeps; every
iteration cuts the source weights to that, and so does the end. A run that was killed goes on from those lists.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from edgeprune import calibration as texts
from edgeprune import checkpoint, machine, mapped, sources, tensor_files
from edgeprune.blocks import EAGER_UP_TO, Ends, Pass, Weights
from edgeprune.budget import (
    LayerChoice,
    Limits,
    choose,
    layer_targets,
    limits,
    removable_parameters,
)
from edgeprune.errors import BadInput
from edgeprune.events import Emit, Note, Progress, PruneIteration, ignore
from edgeprune.families import Half, family_of
from edgeprune.footprint import Footprint, refuse
from edgeprune.groups import HALVES, Kept, LayerGroups, cut, describe_layers, pruned_config
from edgeprune.importance import (
    ElementMeasure,
    ImportanceWatcher,
    LayerMeasure,
    normalised,
    ranked,
)
from edgeprune.layers import CutLayers, skeleton, whole
from edgeprune.nonuniform import class_for
from edgeprune.repair import kept_columns, repair
from edgeprune.scratch import Scratch
from edgeprune.target import Target
from edgeprune.waiting import Waiting

Method = Literal["adapt", "adapt-pruner", "uniform"]
Effort = Literal["quick", "balanced", "best"]
STAGE = "prune"
# Tokens that go through a layer at once. Fixed, so that a result does not depend on the machine's memory; larger
# gains nothing on CPUs.
MICRO_BATCH_TOKENS = 1024
# How much of the importance measured in earlier iterations counts on. Each iteration draws fresh text, so that a mean
# over several is less noisy than one alone.
MEMORY = 0.8


@dataclass(frozen=True)
class Pace:
    """Time spent for quality: iterations, calibration sequences in each, and sequences to repair with."""

    iterations: int
    samples: int
    repair_samples: int


# Only ``best`` is measured so far (benchmarks/RESULTS.md); the other two are guesses at a half and a third of its time.
EFFORTS: dict[Effort, Pace] = {
    "quick": Pace(10, 64, 128),
    "balanced": Pace(25, 64, 256),
    "best": Pace(25, 64, 1024),
}
# Equation 6's A is a share of a layer for each iteration; the tilt of ``adapt`` is for the whole run, relative to the
# average sparsity, so that it does not depend on how many iterations there are.
AMPLITUDES: dict[Method, float] = {"adapt": 0.4, "adapt-pruner": 0.02, "uniform": 0.0}


@dataclass(frozen=True)
class Options:
    """How to prune. ``adapt-pruner`` with A = 0.02, 50 iterations and 512 x 64 tokens is the paper's setting."""

    method: Method = "adapt"
    iterations: int = EFFORTS["balanced"].iterations
    samples: int = EFFORTS["balanced"].samples
    length: int = 64
    repair_samples: int = EFFORTS["balanced"].repair_samples
    amplitude: float = AMPLITUDES["adapt"]
    width_multiple: int = 32
    seed: int = 0
    layer_importance: LayerMeasure = "cosine"
    element_importance: ElementMeasure = "taylor"
    skip_layers: tuple[int, ...] = ()

    @staticmethod
    def of(
        effort: Effort = "balanced",
        *,
        method: Method = "adapt",
        iterations: int | None = None,
        samples: int | None = None,
        repair_samples: int | None = None,
        amplitude: float | None = None,
        **others: Any,
    ) -> Options:
        """Fill in what is left open from the effort and the method. BadInput for an effort there is not."""
        for name, value, kind in (("effort", effort, Effort), ("method", method, Method)):
            _check_choice(name, value, kind)
        pace = EFFORTS[effort]
        if repair_samples is None:
            repair_samples = pace.repair_samples if method == "adapt" else 0
        return Options(
            method=method,
            iterations=pace.iterations if iterations is None else iterations,
            samples=pace.samples if samples is None else samples,
            repair_samples=repair_samples,
            amplitude=AMPLITUDES[method] if amplitude is None else amplitude,
            **others,
        )

    def check(self, config: Any) -> None:
        """Raise BadInput for what cannot be done with this model."""
        for name, least in (
            ("iterations", 1),
            ("samples", 1),
            ("length", 2),
            ("repair_samples", 0),
            ("width_multiple", 1),
        ):
            if getattr(self, name) < least:
                raise BadInput(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name, kind in _CHOICES.items():
            _check_choice(name, getattr(self, name), kind)
        if not math.isfinite(self.amplitude) or self.amplitude < 0:
            raise BadInput(f"amplitude is {self.amplitude}; it must be 0 or more")
        layers = config.num_hidden_layers
        for number in self.skip_layers:
            if not 0 <= number < layers:
                raise BadInput(
                    f"there is no decoder layer {number}: this model has 0 to {layers - 1}"
                )
        longest = getattr(config, "max_position_embeddings", None) or self.length
        if self.length > longest:
            raise BadInput(f"length is {self.length} tokens; this model takes at most {longest}")


_CHOICES: dict[str, Any] = {
    "method": Method,
    "layer_importance": LayerMeasure,
    "element_importance": ElementMeasure,
}


def _check_choice(name: str, value: Any, kind: Any) -> None:
    if value not in get_args(kind):
        raise BadInput(f"{name} is {value!r}; it must be one of {', '.join(get_args(kind))}")


def prune(
    model: str | Path | sources.Source,
    output: str | Path,
    *,
    sparsity: float | None = None,
    params: int | None = None,
    memory: int | None = None,
    precision: str = "int4",
    calibration: str = "builtin",
    effort: Effort = "balanced",
    stream: bool | None = None,
    memory_budget: int | None = None,
    state: Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    emit: Emit = ignore,
    **options: Any,
) -> dict[str, Any]:
    """Prune ``model`` and write the smaller one to the folder ``output``.

    Args:
        model: Hub id, folder, .gguf file or ``wheel:`` name.
        output: a folder that does not exist yet or is empty.
        sparsity: share of the decoder layers' parameters to remove, in (0, 1).
        params: or: parameters of the whole model to keep.
        memory: or: bytes of the ONNX export at ``precision``.
        precision: of the export that ``memory`` means: int4, int8, fp16, fp32.
        calibration: text to measure importance on; see ``texts.read_texts``.
        effort: quick, balanced or best; what ``options`` leaves open of iterations and samples.
        stream: read one decoder layer at a time from the files; by default where the memory asks for it.
        memory_budget: bytes that the run may take; by default a good part of what is free.
        state: file that makes the run resumable: the same call goes on from it, and removes it at the end.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run code of the model's repository.
        emit: hears progress.
        **options: fields of ``Options``.

    Returns:
        The content of the checkpoint's ``edgeprune.json``.

    Raises:
        BadInput: what was given cannot be used; nothing was written.
        EdgepruneError: the work failed, for instance on a full disk.
    """
    output = Path(output)
    checkpoint.check_output(output)
    source = model
    if not isinstance(source, sources.Source):
        source = sources.resolve(
            source, revision=revision, trust_remote_code=trust_remote_code, emit=emit
        )
    config = sources.load_config(source)
    chosen = Options.of(effort, **options)
    chosen.check(config)
    run = PruneRun.plan(config, chosen, Target.of(config, sparsity, params, memory, precision))
    corpus = texts.read_calibration(calibration)
    tokenizer = sources.load_tokenizer(source)
    corpus.draw(tokenizer, 1, chosen.length, "is the text long enough?")
    streamed = run.fit(source, config, stream, memory_budget)
    started = time.monotonic()
    what = _fingerprint(source, config, chosen, run.target, corpus.hash)
    with _opened(source, streamed, emit) as dense, _scratch(output, state, what) as scratch:
        if state is not None and state.is_file():
            run.load(state, what, emit)
        for step in run.steps(dense, tokenizer, corpus, emit, scratch if streamed else None):
            if state is not None:
                run.save(state, what)
            emit(step)
        if chosen.repair_samples:
            run.repair(dense, tokenizer, corpus, scratch, emit)
        record = checkpoint.save_parts(
            _settings(dense, run.kept),
            parts(dense, run.groups, run.kept, scratch.fixed if chosen.repair_samples else None),
            tokenizer,
            output,
            provenance={
                "method": chosen.method,
                "options": _plain(chosen),
                "target": run.target.to_json(),
                "calibration": {"text": calibration, "sha256": corpus.hash},
                "loss": run.losses,
                "seconds": round(time.monotonic() - started, 1),
                "compute_dtype": str(machine.compute_dtype()).removeprefix("torch."),
                "streamed": streamed,
            },
            source=source,
            generation_config=dense.generation_config,
        )
    if state is not None:
        state.unlink(missing_ok=True)
        shutil.rmtree(_scratch_folder(state), ignore_errors=True)
    return record


@contextmanager
def _opened(source: sources.Source, streamed: bool, emit: Emit) -> Iterator[Any]:
    """Give the dense model, in memory or mapped."""
    if not streamed:
        yield sources.load_model(source, emit=emit)
        return
    emit(Note(text=f"{source.title} is read from its files one decoder layer at a time"))
    with sources.unpacking_place(source) as place:
        yield sources.load_model(source, mapped=True, scratch=place, emit=emit)


def _scratch_folder(state: Path) -> Path:
    return state.with_name(state.name + ".scratch")


@contextmanager
def _scratch(output: Path, state: Path | None, what: str) -> Iterator[Scratch]:
    """Give a folder for unfinished work: beside the state, where it outlives a killed process, or a passing one."""
    if state is not None:
        yield Scratch(_scratch_folder(state), what)
        return
    # beside the output and not in /tmp, which is in memory on many systems
    place = output.absolute().parent
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{output.name}.", suffix=".scratch", dir=place
    ) as folder:
        yield Scratch(Path(folder), what, lasting=False)


def _plain(options: Options) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(options).items()
    }


def _fingerprint(
    source: sources.Source, config: Any, options: Options, target: Target, text: str
) -> str:
    """What a state file belongs to."""
    parts = {
        "source": [source.kind, source.name, source.revision],
        "config": config.to_dict(),
        "options": _plain(options),
        "target": target.to_json(),
        "calibration": text,
    }
    return json.dumps(parts, sort_keys=True, default=str)


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
    # what the memory has room for; None: any number
    hold: int | None = None
    most_repair_samples: int | None = None

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

    def fit(
        self, source: sources.Source, config: Any, stream: bool | None, memory_budget: int | None
    ) -> bool:
        """Divide the memory; return whether decoder layers are streamed. BadInput if it is too small for one.

        ``stream`` None leaves it to the memory; ``memory_budget`` None takes a good part of what is free.
        """
        options, process = self.options, mapped.resident()
        free = machine.memory().available if stream is False else mapped.budget()
        budget = memory_budget or process + free
        sizes = Footprint(
            config,
            self.groups,
            samples=options.samples,
            repair=options.repair_samples,
            length=options.length,
            micro_batch=_micro_batch(options),
            stored=sources.weight_width(config),
            computed=machine.compute_dtype().itemsize,
            process=process,
            streamed=False,
            unpacked=source.gguf_file is not None,
        )
        if stream or (stream is None and sizes.needed() > budget):
            sizes = replace(sizes, streamed=True)
        needed, given = sizes.needed(), memory_budget is not None
        if needed > budget and (sizes.streamed or given):
            raise refuse(needed, budget, given=given, streamed=sizes.streamed)
        self.hold = sizes.hold(budget)
        self.most_repair_samples = sizes.repair_samples(budget)
        return sizes.streamed

    # ---- a state that survives the process

    def save(self, path: Path, what: str) -> None:
        """Write what is decided so far, atomically."""
        tensors: dict[str, Tensor] = {}
        for half in HALVES:
            for i, kept in enumerate(self.kept):
                tensors[f"kept.{half}.{i}"] = kept.of(half)
                tensors[f"memory.{half}.{i}"] = self.memory[half][i]
        tensors["layer_memory"] = torch.tensor(self.layer_memory, dtype=torch.float64)
        tensors["planned"] = torch.tensor(self.planned, dtype=torch.float64)
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        tensors["weight"] = torch.tensor(self.weight, dtype=torch.float64)
        tensor_files.write(path, tensors, what)

    def load(self, path: Path, what: str, emit: Emit) -> None:
        """Go on from a state file; one of other work is not used."""
        try:
            found = tensor_files.read(path, what)
        except tensor_files.UnusableError as error:
            emit(Note(text=f"{path} {error}; starting anew", level="warning"))
            return
        layers = range(len(self.groups))
        self.kept = [Kept(*(found[f"kept.{half}.{i}"] for half in HALVES)) for i in layers]
        self.memory = {h: [found[f"memory.{h}.{i}"] for i in layers] for h in HALVES}
        self.layer_memory = found["layer_memory"].tolist()
        self.planned = found["planned"].tolist()
        self.losses = found["losses"].tolist()
        self.weight = float(found["weight"])
        emit(Note(text=f"going on after iteration {len(self.losses)} of {self.options.iterations}"))

    # ---- the iterations

    def steps(
        self,
        dense: Any,
        tokenizer: Any,
        corpus: texts.Calibration,
        emit: Emit = ignore,
        scratch: Scratch | None = None,
    ) -> Iterator[PruneIteration]:
        """Run the iterations that are left, one each time the next is asked for.

        With ``scratch`` one decoder layer is in memory at a time; the rest of the pass is there or waits in the
        scratch, and goes on from it.
        """
        options = self.options
        device, dtype = machine.pick_device(), machine.compute_dtype()
        with _attention(dense, options.length):
            streamed = scratch is not None
            layers = CutLayers(dense, self.groups, self.kept, dtype, device, streamed=streamed)
            ends = Ends(dense, dtype, device)
            walk = Pass(layers, ends, _micro_batch(options), recompute=streamed)
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
        """Refit the output projections of what is kept to what the dense layers wrote, into ``scratch``."""
        options, config = self.options, dense.config
        device, dtype = machine.pick_device(), machine.compute_dtype()
        samples = self._repair_samples(emit)
        tokens = corpus.draw(tokenizer, samples, options.length, f"{options.seed}-repair")
        family, everything = family_of(config), [g.everything() for g in self.groups]
        with _attention(dense, options.length):
            cut_layers, whole_layers = (
                CutLayers(dense, self.groups, kept, dtype, device, streamed=True)
                for kept in (self.kept, everything)
            )
            steps = repair(
                Ends(dense, dtype, device),
                list(tokens.split(_micro_batch(options))),
                whole_layers.block,
                cut_layers.block,
                [
                    kept_columns(family, g, k, device)
                    for g, k in zip(self.groups, self.kept, strict=True)
                ],
                scratch.streams(samples),
            )
            for fixed, streams in steps:
                scratch.keep(fixed, streams, dense.dtype)
                emit(
                    Progress(
                        stage=STAGE,
                        done=streams.layer,
                        total=len(self.groups),
                        unit="layers repaired",
                        note="repair",
                    )
                )

    def _repair_samples(self, emit: Emit) -> int:
        """As many sequences as were asked for, or what their activations leave room for."""
        wanted, most = self.options.repair_samples, self.most_repair_samples
        if most is None or wanted <= most:
            return wanted
        text = f"repairing with {most} sequences instead of {wanted}: more do not fit in the memory budget"
        emit(Note(text=text, level="warning"))
        return most

    def _waiting(self, scratch: Scratch | None, iteration: int, emit: Emit) -> Waiting:
        if scratch is None:
            return Waiting()
        # the figures of a pass follow from these and from what the scratch belongs to
        kept = hashlib.sha256(json.dumps([k.to_json() for k in self.kept]).encode()).hexdigest()
        dtype, batch = machine.compute_dtype(), _micro_batch(self.options)
        which = f"iteration {iteration} in {dtype} by {batch}, kept {kept}"
        return scratch.waiting(self.hold, which, emit)

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


def _micro_batch(options: Options) -> int:
    return max(1, MICRO_BATCH_TOKENS // options.length)


@contextmanager
def _attention(model: Any, length: int) -> Iterator[None]:
    """Use the attention implementation that is quickest for sequences of this length."""
    before = model.config._attn_implementation
    model.config._attn_implementation = "eager" if length <= EAGER_UP_TO else "sdpa"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _settings(dense: Any, kept: list[Kept]) -> Any:
    config = pruned_config(dense.config, kept)
    config.dtype = dense.dtype
    return config


def parts(
    dense: Any,
    groups: list[LayerGroups],
    kept: list[Kept],
    fixed: Callable[[int], Weights] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yield the pruned model's parameters, in the source's type: those around the decoder layers, then layer by layer.

    ``fixed`` gives the repaired weights of a layer, under their names in it.
    """
    layers = "model.layers."
    for name, parameter in dense.named_parameters():
        if not name.startswith(layers):
            yield {name: parameter.detach()}
            mapped.release(parameter)
    config = pruned_config(dense.config, kept)
    for i, layer in enumerate(dense.model.layers):
        wanted = skeleton(layer, config, i, dense.config._attn_implementation)
        weights = cut(whole(layer), groups[i], kept[i]) | (fixed(i) if fixed else {})
        yield {
            f"{layers}{i}.{name}": weights[name].contiguous()
            for name, _ in wanted.named_parameters()
        }
        mapped.release(layer)


def cut_model(dense: Any, groups: list[LayerGroups], kept: list[Kept]) -> Any:
    """Return the pruned model as an ordinary transformers model, in the source's type and without repair.

    What is whole shares its memory with ``dense``.
    """
    config = _settings(dense, kept)
    config._attn_implementation = dense.config._attn_implementation
    with torch.device("meta"):
        pruned = class_for(config.model_type)(config)
    weights = {name: w for part in parts(dense, groups, kept) for name, w in part.items()}
    pruned.load_state_dict(weights, strict=False, assign=True)
    pruned.tie_weights()
    # buffers that are no weights (rotary frequencies) are not in the state; take the dense model's
    buffers = dict(dense.named_buffers())
    for name, buffer in list(pruned.named_buffers()):
        if buffer.is_meta:
            owner, _, own = name.rpartition(".")
            setattr(pruned.get_submodule(owner), own, buffers[name].clone())
    pruned.generation_config = dense.generation_config
    return pruned.eval()
