"""Adapt-Pruner: cut a model down to a target in steps, each with importance measured anew.

The source weights are never changed. What a run has decided so far is which groups each layer keeps; every
iteration cuts the source weights to that, and so does the end. A run that was killed goes on from those lists.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from edgeprune import calibration as texts
from edgeprune import checkpoint, machine, sources
from edgeprune.blocks import EAGER_UP_TO, Block, Ends, Pass
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
from edgeprune.families import Half
from edgeprune.groups import HALVES, Kept, LayerGroups, cut, describe_layers, pruned_config
from edgeprune.importance import ElementMeasure, ImportanceWatcher, LayerMeasure, normalised
from edgeprune.nonuniform import build_layer, class_for
from edgeprune.target import Target

Method = Literal["adapt", "uniform"]
STAGE = "prune"
# Tokens that go through a layer at once. Fixed, so that a result does not depend on the machine's memory; larger
# gains nothing on CPUs.
MICRO_BATCH_TOKENS = 1024
# How much of the importance measured in earlier iterations counts on. Each iteration draws fresh text, so that a mean
# over several is less noisy than one alone; what it wins by itself is not measured yet (benchmarks/RESULTS.md).
MEMORY = 0.8


@dataclass(frozen=True)
class Options:
    """How to prune; the defaults are the paper's (A = 0.02, T = 50, 512 x 64 tokens)."""

    method: Method = "adapt"
    iterations: int = 50
    samples: int = 512
    length: int = 64
    amplitude: float = 0.02
    width_multiple: int = 32
    seed: int = 0
    layer_importance: LayerMeasure = "cosine"
    element_importance: ElementMeasure = "taylor"
    skip_layers: tuple[int, ...] = ()

    def check(self, config: Any) -> None:
        """Raise BadInput for what cannot be done with this model."""
        for name, least in (
            ("iterations", 1),
            ("samples", 1),
            ("length", 2),
            ("width_multiple", 1),
        ):
            if getattr(self, name) < least:
                raise BadInput(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise BadInput(f"{name} is {getattr(self, name)!r}; it must be one of {known}")
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


def prune(
    model: str | Path | sources.Source,
    output: str | Path,
    *,
    sparsity: float | None = None,
    params: int | None = None,
    memory: int | None = None,
    precision: str = "int4",
    calibration: str = "builtin",
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
    chosen = Options(**options)
    chosen.check(config)
    run = PruneRun.plan(config, chosen, Target.of(config, sparsity, params, memory, precision))
    corpus = texts.read_calibration(calibration)
    tokenizer = sources.load_tokenizer(source)
    corpus.draw(tokenizer, 1, chosen.length, "is the text long enough?")
    dense = sources.load_model(source, emit=emit)
    started = time.monotonic()
    what = _fingerprint(source, config, chosen, run.target, corpus.hash)
    if state is not None and state.is_file():
        run.load(state, what, emit)
    for step in run.steps(dense, tokenizer, corpus, emit):
        if state is not None:
            run.save(state, what)
        emit(step)
    pruned = cut_model(dense, run.groups, run.kept)
    record = checkpoint.save(
        pruned,
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
        },
        source=source,
    )
    if state is not None:
        state.unlink(missing_ok=True)
    return record


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

    # ---- a state that survives the process

    def save(self, path: Path, what: str) -> None:
        """Write what is decided so far, atomically."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for half in HALVES:
            for i, kept in enumerate(self.kept):
                tensors[f"kept.{half}.{i}"] = kept.of(half).contiguous()
                tensors[f"memory.{half}.{i}"] = self.memory[half][i]
        tensors["layer_memory"] = torch.tensor(self.layer_memory, dtype=torch.float64)
        tensors["planned"] = torch.tensor(self.planned, dtype=torch.float64)
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        tensors["weight"] = torch.tensor(self.weight, dtype=torch.float64)
        unfinished = path.with_name(path.name + ".tmp")
        save_file(tensors, unfinished, metadata={"what": what})
        unfinished.replace(path)

    def load(self, path: Path, what: str, emit: Emit) -> None:
        """Go on from a state file; one of other work is not used."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("what") != what:
                    emit(Note(text=f"{path} belongs to other work; starting anew", level="warning"))
                    return
                read = file.get_tensor
                layers = range(len(self.groups))
                self.kept = [Kept(*(read(f"kept.{half}.{i}") for half in HALVES)) for i in layers]
                self.memory = {h: [read(f"memory.{h}.{i}") for i in layers] for h in HALVES}
                self.layer_memory = read("layer_memory").tolist()
                self.planned = read("planned").tolist()
                self.losses = read("losses").tolist()
                self.weight = float(read("weight"))
        except (SafetensorError, OSError) as error:
            emit(Note(text=f"{path} is damaged ({error}); starting anew", level="warning"))
            return
        emit(Note(text=f"going on after iteration {len(self.losses)} of {self.options.iterations}"))

    # ---- the iterations

    def steps(
        self, dense: Any, tokenizer: Any, corpus: texts.Calibration, emit: Emit = ignore
    ) -> Iterator[PruneIteration]:
        """Run the iterations that are left, one each time the next is asked for."""
        options = self.options
        device, dtype = machine.pick_device(), machine.compute_dtype()
        with _attention(dense, "eager" if options.length <= EAGER_UP_TO else "sdpa"):
            layers = ResidentLayers(dense, self.groups, self.kept, dtype, device)
            walk = Pass(layers, Ends(dense, dtype, device), _micro_batch(options))
            for iteration in range(len(self.losses) + 1, options.iterations + 1):
                started = time.monotonic()
                tokens = corpus.draw(
                    tokenizer, options.samples, options.length, f"{options.seed}-{iteration}"
                )
                self._remember(self._measure(walk, layers, tokens, iteration, emit))
                self._decide(dense.config, iteration)
                layers.cut(self.kept)
                yield self._event(iteration, time.monotonic() - started)

    def _measure(
        self, walk: Pass, layers: ResidentLayers, tokens: Tensor, iteration: int, emit: Emit
    ) -> ImportanceWatcher:
        options = self.options
        watcher = ImportanceWatcher(
            self.groups, self.kept, options.layer_importance, options.element_importance
        )
        if options.element_importance == "activation":
            watcher.listen(layers)
        steps = 2 * len(layers) * math.ceil(len(tokens) / walk.micro_batch)

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

        self.losses.append(walk.run(tokens, watcher, tick))
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
        for i, x in zip(free, normalised([self.layer_memory[i] for i in free]), strict=True):
            result[i] = x
        return result

    def _decide(self, config: Any, iteration: int) -> None:
        options = self.options
        total = self.target.removed * iteration / options.iterations
        amplitude = options.amplitude if options.method == "adapt" else 0.0
        self.planned = layer_targets(
            self.planned,
            [g.prunable for g in self.groups],
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
def _attention(model: Any, implementation: str) -> Iterator[None]:
    """Use one attention implementation for a while."""
    before = model.config._attn_implementation
    model.config._attn_implementation = implementation
    try:
        yield
    finally:
        model.config._attn_implementation = before


class ResidentLayers:
    """All decoder layers in memory, cut to what is kept, in the type to compute in."""

    def __init__(
        self,
        dense: Any,
        groups: list[LayerGroups],
        kept: list[Kept],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._dense, self._groups = dense, groups
        self._dtype, self._device = dtype, device
        self.cut(kept)

    def __len__(self) -> int:
        return len(self._blocks)

    def block(self, index: int) -> Block:
        """Return layer ``index``."""
        return self._blocks[index]

    def cut(self, kept: list[Kept]) -> None:
        """Cut the dense weights anew."""
        config = pruned_config(self._dense.config, kept)
        layers = self._dense.model.layers
        self._blocks = [self._cut(i, layers[i], config, kept[i]) for i in range(len(layers))]

    def _cut(self, index: int, layer: Any, config: Any, kept: Kept) -> Block:
        layer_config = config.per_layer_config[index]
        layer_config._attn_implementation = self._dense.config._attn_implementation
        with torch.device("meta"):
            module = build_layer(type(layer), layer_config, index)
        scored = {part.parameter for h in HALVES for part in self._groups[index].parts[h]}
        whole = {name: p.detach() for name, p in layer.named_parameters()}
        weights = cut(whole, self._groups[index], kept)
        return Block(
            module,
            {
                name: weights[name]
                .to(self._device, self._dtype, copy=True)
                .requires_grad_(name in scored)
                for name, _ in module.named_parameters()
            },
        )


def cut_model(dense: Any, groups: list[LayerGroups], kept: list[Kept]) -> Any:
    """Return the pruned model as an ordinary transformers model, in the source's type.

    What is whole shares its memory with ``dense``.
    """
    config = pruned_config(dense.config, kept)
    config._attn_implementation = dense.config._attn_implementation
    config.dtype = dense.dtype
    model_class = class_for(config.model_type)
    with torch.device("meta"):
        pruned = model_class(config)
    weights: dict[str, Tensor] = {}
    for name, value in dense.state_dict().items():
        if not name.startswith("model.layers."):
            weights[name] = value
    for i, layer in enumerate(dense.model.layers):
        wanted = {name for name, _ in pruned.model.layers[i].named_parameters()}
        whole = {name: p.detach() for name, p in layer.named_parameters()}
        for name, value in cut(whole, groups[i], kept[i]).items():
            if name in wanted:
                weights[f"model.layers.{i}.{name}"] = value.contiguous()
    return _filled(pruned, dense, weights)


def _filled(pruned: Any, dense: Any, weights: Mapping[str, Tensor]) -> Any:
    pruned.load_state_dict(weights, strict=True, assign=True)
    pruned.tie_weights()
    # buffers that are no weights (rotary frequencies) are not in the state; take the dense model's
    buffers = dict(dense.named_buffers())
    for name, buffer in list(pruned.named_buffers()):
        if buffer.is_meta:
            owner, _, own = name.rpartition(".")
            setattr(pruned.get_submodule(owner), own, buffers[name].clone())
    pruned.generation_config = dense.generation_config
    return pruned.eval()
