"""What would become of a model, before anything is done: what it is, what it takes, and what a target would make of it.

Nothing is read but the config. Sizes are computed with the engine's own rules; speed, time and quality come from
measurements (``experience``), each with what it rests on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from edgeprune import experience, machine, mapped, sources
from edgeprune.budget import (
    LayerChoice,
    Limits,
    limits,
    removable_parameters,
    round_width,
    trim,
)
from edgeprune.errors import BadInput
from edgeprune.events import ignore
from edgeprune.experience import PastRun, Pruning
from edgeprune.exporters.sizes import file_bytes
from edgeprune.exporters.storage import STORAGE
from edgeprune.footprint import Footprint, fit
from edgeprune.groups import HALVES, Kept, LayerGroups, describe_layers, pruned_config
from edgeprune.inspection import inspect
from edgeprune.options import Effort, Options
from edgeprune.quantities import format_bytes
from edgeprune.recipe import TARGETS, RecoverSection
from edgeprune.recovery.memory import estimate, fitting_micro_batch, free_memory
from edgeprune.recovery.peak import matmul_peak
from edgeprune.recovery.settings import Training, training_for
from edgeprune.sources import Source
from edgeprune.target import Target

# What a card supposes of a training of which nothing is said yet.
SUPPOSED_TOKENS = 20_000_000


@dataclass(frozen=True)
class Known:
    """A model as its config tells it."""

    source: Source
    config: Any
    inspection: dict[str, Any]
    groups: list[LayerGroups]
    limits: list[Limits]

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return int(self.inspection["parameters"])

    @property
    def decoder(self) -> int:
        """Parameters in the decoder layers."""
        return int(self.inspection["decoder_parameters"])

    @property
    def most(self) -> list[int]:
        """Parameters that each layer may lose."""
        return [removable_parameters(*each) for each in zip(self.groups, self.limits, strict=True)]


def find(model: str | Path, trust_remote_code: bool = False) -> Source:
    """Find a model, its weights left alone: once in the life of a process, unless its files change.

    Raises as ``sources.resolve``. This is the part that may have to wait for the Hub.
    """
    return _find(str(model), trust_remote_code, _changed(model))


def know(model: str | Path, trust_remote_code: bool = False) -> Known:
    """Read a model's config, as often as ``find``. Raises as ``inspect``."""
    return _know(find(model, trust_remote_code), _changed(model))


def _changed(model: str | Path) -> int:
    path = Path(model).expanduser()
    file = path / "config.json" if path.is_dir() else path
    return file.stat().st_mtime_ns if file.is_file() else 0


@lru_cache(maxsize=32)
def _find(model: str, trust_remote_code: bool, _changed: int) -> Source:
    return sources.resolve(model, trust_remote_code=trust_remote_code, weights=False)


@lru_cache(maxsize=32)
def _know(source: Source, _changed: int) -> Known:
    return of_source(source)


def of_source(source: Source) -> Known:
    """Read the config of a model that was found."""
    config = sources.load_config(source)
    groups = describe_layers(config)
    bounds = [limits(each, Options.width_multiple, skipped=False) for each in groups]
    return Known(source, config, inspect(source), groups, bounds)


# ---- the card


def card(model: str | Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return what a model is and whether this machine can prune and train it. Raises as ``inspect``."""
    known = know(model, trust_remote_code)
    memory = machine.memory()
    return {
        "inspection": known.inspection,
        "machine": {
            "processor": machine.cpu_model(),
            "cores": machine.cores(),
            "memory_bytes": memory.total,
            "available_bytes": memory.available,
            "device": str(machine.pick_device()),
        },
        "prune": asdict(memory_to_prune(known, Options())),
        "train": _without_stream(memory_to_train(known, training_for(SUPPOSED_TOKENS))),
    }


@dataclass(frozen=True)
class Needed:
    """Memory that a work takes: whether this machine has it, and a line with the figure."""

    possible: bool
    bytes: int
    text: str
    streamed: bool = False
    """The weights stay in their files until they are used."""


def _without_stream(needed: Needed) -> dict[str, Any]:
    return {key: value for key, value in asdict(needed).items() if key != "streamed"}


def memory_to_prune(
    known: Known, options: Options, stream: bool | None = None, budget: int | None = None
) -> Needed:
    """Return what a pruning takes of the memory, by the rules of ``footprint.fit``."""
    sizes = _footprint(known, options)
    free = f"{format_bytes(machine.memory().available)} are free"
    try:
        room = fit(known.source, known.config, known.groups, options, stream, budget)
    except BadInput:
        least = replace(sizes, streamed=stream is not False).needed()
        limit = f"memory_budget is {format_bytes(budget)}" if budget else free
        text = f"pruning takes at least {format_bytes(least)} of memory, and {limit}"
        return Needed(False, least, text, stream is not False)
    needed = replace(sizes, streamed=room.streamed).needed()
    takes = (
        f"at least {format_bytes(needed)} of memory, as the weights stay in their files"
        if room.streamed
        else f"about {format_bytes(needed)} of memory"
    )
    return Needed(True, needed, f"pruning takes {takes}; {free}", room.streamed)


def _footprint(known: Known, options: Options) -> Footprint:
    return Footprint(
        known.config,
        known.groups,
        samples=options.samples,
        repair=options.repair_samples,
        length=options.length,
        micro_batch=options.micro_batch,
        stored=sources.weight_width(known.config),
        computed=machine.compute_dtype().itemsize,
        process=mapped.resident(),
        streamed=False,
        unpacked=known.source.gguf_file is not None,
    )


def settings_of(recover: RecoverSection) -> Training:
    """Return how a recipe's section ``[recover]`` trains. BadInput if that cannot be."""
    names = {field.name for field in fields(Training)} - {"tokens"}
    chosen = recover.model_dump(include=names)
    return training_for(recover.tokens, **chosen)


def memory_to_train(
    known: Known, settings: Training, removed: int = 0, processes: int = 1, sharded: bool = False
) -> Needed:
    """Return what a training takes of the device's memory, by the rules of ``recovery.memory``.

    Where it does not fit, the text says what would.

    Args:
        known: the model.
        settings: how to train.
        removed: parameters that will be cut off before.
        processes: that train together.
        sharded: whether the weights are spread over them.
    """
    device = machine.pick_device()
    dtype = machine.compute_dtype(device)
    teacher = known.config if settings.distill else None
    shards = processes if sharded else 1
    try:
        rows = fitting_micro_batch(
            known.config,
            settings,
            teacher,
            device,
            dtype,
            processes,
            removed=removed,
            shards=shards,
            emit=ignore,
        )
    except BadInput as error:
        rows, refused = settings.micro_batch or 1, str(error)
    else:
        refused = ""
    needed = estimate(
        known.config, settings, rows, dtype, teacher, shards, device.type, removed
    ).total
    return Needed(not refused, needed, refused or _to_train(settings, rows, needed, device))


def _to_train(settings: Training, rows: int, needed: int, device: torch.device) -> str:
    sequences = "1 sequence" if rows == 1 else f"{rows} sequences"
    what = f"LoRA of rank {settings.lora_rank}" if settings.lora_rank else settings.optimizer
    return (
        f"training takes about {format_bytes(needed)} on {device} with {what} and {sequences} of "
        f"{settings.length} tokens at once; {format_bytes(free_memory(device))} are free"
    )


# ---- the outlook


def outlook(
    model: str | Path,
    target: Mapping[str, float],
    precision: str = "int4",
    effort: Effort = "balanced",
    tokens: int = 0,
    interleavings: int = 1,
) -> dict[str, Any]:
    """Return what a target would make of a model; what is not known is None, and each guess has its basis.

    Args:
        model: as ``sources.resolve`` takes it.
        target: one of ``sparsity`` (a share), ``params`` (a number), ``memory`` (bytes), ``decode`` (tokens a second).
        precision: of the exports.
        effort: of the pruning.
        tokens: to train on afterwards.
        interleavings: stages of pruning and training.

    Raises:
        BadInput: the model cannot be used, or the target not be reached.
    """
    if precision not in STORAGE:
        raise BadInput(f"no precision '{precision}'; give one of {', '.join(STORAGE)}")
    known, past = know(model), experience.past_runs()
    speed, speed_basis = experience.decode_speed(past, known.source, precision)
    dense_bytes = file_bytes(known.config, precision)
    given = _checked(target)
    if "decode" in given:
        given = {"memory": _bytes_for(given["decode"], speed, speed_basis, known, precision)}
    elif "sparsity" not in given:
        given = {name: int(value) for name, value in given.items()}
    goal = Target.of(known.config, **dict.fromkeys(TARGETS) | given, precision=precision)
    goal.check(known.config, known.groups, known.most)
    kept = goal.settle(known.config, lambda removed: uniform(known, removed))
    removed = sum(g.removed_parameters(k) for g, k in zip(known.groups, kept, strict=True))
    size = file_bytes(pruned_config(known.config, kept), precision)
    sparsity = removed / known.decoder
    layers, layers_basis = _layers(known, past, sparsity)
    seconds, seconds_basis = _seconds(known, past, removed, effort, tokens, interleavings)
    return {
        "sparsity": sparsity,
        "parameters": known.parameters - removed,
        "decoder_parameters": known.decoder - removed,
        "file_bytes": size,
        "dense": {
            "parameters": known.parameters,
            "file_bytes": dense_bytes,
            "decode_tokens_per_second": speed.tokens_per_second(dense_bytes) if speed else None,
        },
        "decode_tokens_per_second": speed.tokens_per_second(size) if speed else None,
        "speed_basis": speed_basis,
        "recipe_target": {"sparsity": round(sparsity, 4)} if "decode" in target else given,
        "limits": {"sparsity_max": sum(known.most) / known.decoder},
        "layers": layers,
        "layers_basis": layers_basis,
        "seconds": seconds,
        "seconds_basis": seconds_basis,
        "quality": experience.quality(past, known.source, sparsity, effort, tokens),
    }


def _checked(target: Mapping[str, float]) -> dict[str, Any]:
    names = (*TARGETS, "decode")
    if len(target) != 1 or not set(target) <= set(names):
        raise BadInput(f"give exactly one target of {', '.join(names)}")
    ((name, value),) = target.items()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadInput(f"the target {name} is {value!r}; it must be a number")
    return {name: value}


def _bytes_for(
    wanted: float,
    speed: experience.DecodeSpeed | None,
    basis: str,
    known: Known,
    precision: str,
) -> int:
    """Return the size of the export that decodes as fast as wanted. BadInput where there is none, or nothing to do."""
    if speed is None:
        raise BadInput(f"a speed cannot be aimed at: {basis}; give a sparsity, and run it once")
    slowest = speed.tokens_per_second(file_bytes(known.config, precision))
    smallest = pruned_config(known.config, uniform(known, sum(known.most)))
    fastest = speed.tokens_per_second(file_bytes(smallest, precision))
    if wanted <= slowest:
        raise BadInput(
            f"the dense model decodes about {slowest:.3g} tokens/s already; ask for more than that"
        )
    if wanted > fastest:
        raise BadInput(
            f"{wanted:g} tokens/s: with all that can go gone it would be about {fastest:.3g}; ask for less"
        )
    return int(speed.bytes_for(wanted))


def uniform(known: Known, removed: int) -> list[Kept]:
    """Return a cut of that many parameters which takes the same share of every layer, as far as its steps allow.

    Which groups stay says nothing here: only their numbers do.
    """
    share = removed / sum(known.most)
    choices = []
    for groups, bounds, most in zip(known.groups, known.limits, known.most, strict=True):
        choice = LayerChoice.of(groups, bounds, groups.everything(), _in_turns(groups))
        wanted = share * most
        heads = min(choice.may_go("attention"), round(share * groups.count["attention"]))
        choice.gone["attention"] = heads
        left = max(0.0, wanted - heads * groups.cost["attention"])
        channels = round(left / groups.cost["mlp"]) if groups.cost["mlp"] else 0
        choice.gone["mlp"] = min(choice.may_go("mlp"), channels)
        round_width(choice, Options.width_multiple)
        choices.append(choice)
    trim(choices, Options.width_multiple, removed)
    return [choice.result() for choice in choices]


def _in_turns(groups: LayerGroups) -> dict[Any, torch.Tensor]:
    """Score groups so that what is corrected at the end is spread over the layers and their halves."""
    return {
        half: (torch.arange(groups.count[half]) + 0.5) / groups.count[half] * groups.cost[half]
        for half in HALVES
    }


def _layers(
    known: Known, past: list[PastRun], sparsity: float
) -> tuple[list[dict[str, float]] | None, str]:
    costs = [
        (g.count["attention"] * g.cost["attention"], g.count["mlp"] * g.cost["mlp"])
        for g in known.groups
    ]
    return experience.layers(past, known.source, sparsity, costs, known.decoder)


def _seconds(
    known: Known,
    past: list[PastRun],
    removed: int,
    effort: Effort,
    tokens: int,
    interleavings: int,
) -> tuple[dict[str, float], str]:
    options = Options.of(effort)
    pruning = Pruning(
        options.iterations, options.samples, options.repair_samples * interleavings, options.length
    )
    planned = experience.work(known.parameters, known.parameters - removed, pruning, tokens)
    found, basis = experience.duration(past, known.source, planned, _peak)
    return asdict(found), basis


def _peak() -> float:
    device = machine.pick_device()
    return matmul_peak(str(device), machine.compute_dtype(device))
