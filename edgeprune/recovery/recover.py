"""Training that wins back what pruning cost: of a model as it is, or in turns with pruning (Adapt-Accel).

Both leave an ordinary checkpoint. What is unfinished is in a work folder, from which the same call goes on: the
trainer's checkpoints, and for each stage the model before and after its training.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeprune import checkpoint, machine, pruner, sources, state_file
from edgeprune.errors import BadInput
from edgeprune.events import Emit, Evaluation, Event, Note, PruneIteration, ignore
from edgeprune.groups import Kept, cut, describe_layers
from edgeprune.locations import own_name
from edgeprune.options import Effort, Options
from edgeprune.recovery import checkpoints, memory, teacher_cache
from edgeprune.recovery.mixture import HELD_OUT, parse_sources
from edgeprune.recovery.objective import check_vocabularies
from edgeprune.recovery.packing import Packed, prepare
from edgeprune.recovery.settings import Training
from edgeprune.recovery.stages import Spacing, Stage, plan
from edgeprune.recovery.trainer import Trainer, is_fsdp, launched
from edgeprune.sources import Source
from edgeprune.target import Target

TRAINING, KEPT = "training", "kept.safetensors"
LOSSES = "held_out_losses"


def cache_folder() -> Path:
    """Return where packed training data is kept."""
    return Path.home() / ".cache" / "edgeprune" / "data"


def recover(
    model: str | Path | Source,
    output: str | Path,
    *,
    data: Sequence[str],
    training: Training,
    teacher: str | Path | None = None,
    held_out: int = HELD_OUT,
    work: Path | None = None,
    minutes: float = 10.0,
    cache: Path | None = None,
    force: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    emit: Emit = ignore,
) -> dict[str, Any]:
    """Train ``model`` and write it to the folder ``output``.

    Args:
        model: Hub id, folder, .gguf file or ``wheel:`` name, pruned or not.
        output: a folder that does not exist yet or is empty.
        data: texts with weights; see ``mixture.parse_sources``.
        training: how to train.
        teacher: the model to distill from, where ``training.distill`` is above 0.
        held_out: tokens to measure the loss on, 0 for none.
        work: a folder for checkpoints: the same call goes on from it, and removes it at the end.
        minutes: between two checkpoints.
        cache: for the packed data; by default ``cache_folder()``.
        force: train even though the memory seems too small.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run code of the model's repository.
        emit: hears progress.

    Returns:
        The content of the checkpoint's ``edgeprune.json``.

    Raises:
        BadInput: what was given cannot be used; nothing was written.
        EdgepruneError: the training failed on its way; says what to go on from.
    """
    output = Path(output)
    checkpoint.check_output(output)
    source = _resolved(model, revision, trust_remote_code, emit)
    dtype = _stored_type(source)
    tokenizer = sources.load_tokenizer(source)
    accelerator = launched()
    measured = _Evaluations(emit if accelerator.is_main_process else ignore)
    taught = _teacher_source(teacher, training, trust_remote_code, emit)
    config, teaches = sources.load_config(source), taught and sources.load_config(taught)
    _check_memory(config, teaches, training, 0, accelerator, is_fsdp(accelerator), force)
    packed = packed_data(data, tokenizer, training, held_out, cache, emit)
    started = time.monotonic()
    packed, teaching = _taught(packed, taught, config, training, accelerator, force, emit)
    trainer = Trainer(
        sources.load_model(source, dtype=_loaded_type(training, accelerator), emit=emit),
        training,
        packed[0],
        teacher=teaching,
        held_out=packed[1],
        folder=work / TRAINING if work else None,
        minutes=minutes,
        force=force,
        emit=measured,
        accelerator=accelerator,
    )
    if work and checkpoints.latest(work / TRAINING):
        trainer.load(work / TRAINING)
    measured.follow(trainer)
    trainer.evaluate_at(0)
    trainer.run()
    measured.warn_if_worse(since=0)
    made = {
        "recovery": _described(training, data, measured, started) | {"teacher": _named(teacher)}
    }
    record = _write(trainer, source, dtype, tokenizer, output, made, accelerator)
    _remove(work, accelerator)
    return record


def prune_and_recover(
    model: str | Path | Source,
    output: str | Path,
    *,
    target: Mapping[str, Any],
    pruning: Mapping[str, Any],
    precision: str = "int4",
    data: Sequence[str],
    training: Training,
    interleavings: int,
    spacing: Spacing = "geometric",
    keep_moments: bool = True,
    held_out: int = HELD_OUT,
    work: Path,
    minutes: float = 10.0,
    cache: Path | None = None,
    sharded: bool | None = None,
    force: bool = False,
    emit: Emit = ignore,
) -> dict[str, Any]:
    """Prune ``model`` to a target in stages, train after each (Adapt-Accel), and write it to the folder ``output``.

    The learning rate has one course over all stages. The iterations of the pruning are shared among the stages.

    Args:
        model: the dense model, which also teaches where ``training.distill`` is above 0.
        output: a folder that does not exist yet or is empty.
        target: one of ``sparsity``, ``params`` and ``memory``, as ``prune`` takes it.
        pruning: the other options of ``prune``.
        precision: of the export that ``memory`` means.
        data: texts with weights; see ``mixture.parse_sources``.
        training: how to train, over all stages.
        interleavings: how many stages; 1 is to prune and then to train.
        spacing: of the stages' targets.
        keep_moments: AdamW goes on with its moments of what is kept, instead of anew after each cut.
        held_out: tokens to measure the loss on, 0 for none.
        work: a folder for what is unfinished: the same call goes on from it, and removes it at the end.
        minutes: between two checkpoints.
        cache: for the packed data; by default ``cache_folder()``.
        sharded: spread what is trained over the processes (FSDP2); by default as ``accelerate`` was configured.
        force: train even though the memory seems too small.
        emit: hears progress.

    Returns, Raises: as ``recover``.
    """
    output = Path(output)
    checkpoint.check_output(output)
    source = _resolved(model, None, False, emit)
    config = sources.load_config(source)
    goal = Target.of(
        config, target.get("sparsity"), target.get("params"), target.get("memory"), precision
    )
    decoder = sum(g.parameters for g in describe_layers(config))
    stages = plan(decoder, goal.removed, training.steps, interleavings, spacing)
    tokenizer = sources.load_tokenizer(source)
    accelerator = launched()
    measured = _Evaluations(emit if accelerator.is_main_process else ignore)
    sharded = is_fsdp(accelerator) if sharded is None else sharded
    _check_memory(config, config, training, stages[0].removed, accelerator, sharded, force)
    started = time.monotonic()
    packed = packed_data(data, tokenizer, training, held_out, cache, emit)
    taught = source if training.distill else None
    packed, teaching = _taught(packed, taught, config, training, accelerator, force, emit)
    run = _Interleaved(
        source=source,
        stages=stages,
        target=dict(target) | ({"precision": precision} if "memory" in target else {}),
        pruning=dict(pruning),
        training=training,
        tokenizer=tokenizer,
        keep_moments=keep_moments,
        work=work,
        measured=measured,
        accelerator=accelerator,
        new_trainer=partial(
            Trainer,
            settings=training,
            data=packed[0],
            teacher=teaching,
            held_out=packed[1],
            folder=work / TRAINING,
            minutes=minutes,
            sharded=sharded,
            force=force,
            emit=measured,
            accelerator=accelerator,
        ),
    )
    trainer, cut_record = run.through()
    made = cut_record["made"] | {
        "target": goal.to_json(),
        "recovery": _described(training, data, measured, started)
        | {"interleavings": interleavings, "spacing": spacing, "keep_moments": keep_moments},
    }
    dtype = _stored_type(source)
    record = _write(trainer, source, dtype, tokenizer, output, made, accelerator)
    _remove(work, accelerator)
    return record


@dataclass
class _Interleaved:
    """The stages of one run; ``work`` holds ``stage-NN/pruned``, ``stage-NN/trained`` and the trainer's checkpoints."""

    source: Source
    stages: list[Stage]
    target: dict[str, Any]
    pruning: dict[str, Any]
    training: Training
    tokenizer: Any
    keep_moments: bool
    work: Path
    measured: _Evaluations
    accelerator: Any
    new_trainer: Callable[[Any], Trainer]

    def through(self) -> tuple[Trainer, dict[str, Any]]:
        """Do what is left; return the trainer with the trained model, and the last cut's ``edgeprune.json``."""
        last = checkpoints.latest(self.work / TRAINING)
        done = int(checkpoints.describe(last)["notes"]["stage"]) if last else 0
        trainer = None
        if last:
            trainer = self.new_trainer(self._model(done))
            trainer.load(last)
            self._train(trainer, done)
        for number in range(done + 1, len(self.stages) + 1):
            kept = self._pruned(number)
            if trainer is None:
                trainer = self.new_trainer(self._model(number))
            else:
                carry = None  # LoRA's additions are part of the weights by now, and new ones begin
                if self.keep_moments and not self.training.lora_rank:
                    carry = _carrier(trainer.model.config, kept)
                trainer.replace_model(self._model(number), carry)
            self._train(trainer, number)
        assert trainer is not None
        record = checkpoint.read_provenance(self._folder(len(self.stages)) / "pruned")
        assert record is not None
        return trainer, record

    def _folder(self, number: int) -> Path:
        return self.work / f"stage-{number:02}"

    def _model(self, number: int) -> Any:
        """Load a stage's model as it was cut, in the precision that it is trained in."""
        return sources.load_model(
            sources.resolve(self._folder(number) / "pruned"),
            dtype=_loaded_type(self.training, self.accelerator),
        )

    def _pruned(self, number: int) -> list[Kept]:
        """Prune what the stage before has trained; return what is kept of it. One process does, the others wait."""
        folder = self._folder(number)
        if self.accelerator.is_main_process and not (folder / KEPT).is_file():
            self._prune(number, folder)
        self.accelerator.wait_for_everyone()
        return state_file.read_kept(folder / KEPT)

    def _prune(self, number: int, folder: Path) -> None:
        self.measured(Note(text=f"stage {number} of {len(self.stages)}: pruning"))
        before = self.source
        if number > 1:
            before = sources.resolve(self._folder(number - 1) / "trained")
        shutil.rmtree(folder, ignore_errors=True)  # what is there has no list of what it kept
        folder.mkdir(parents=True)
        pruner.prune(
            before,
            folder / "pruned",
            **self._goal(number),
            **self._options(number),
            state=folder / "prune-state.safetensors",
            kept=folder / KEPT,
            emit=self._of_the_whole(number, sources.load_config(before)),
        )

    def _of_the_whole(self, number: int, before: Any) -> Emit:
        """Count iterations over all stages, and what is removed from the dense model."""
        iterations, stages = self._options(number)["iterations"], len(self.stages)
        dense = [g.parameters for g in describe_layers(sources.load_config(self.source))]
        left = [g.parameters / d for g, d in zip(describe_layers(before), dense, strict=True)]

        def pass_on(event: Event) -> None:
            if isinstance(event, PruneIteration):
                event = replace(
                    event,
                    iteration=(number - 1) * iterations + event.iteration,
                    of=stages * iterations,
                    layer_sparsity=[
                        1 - (1 - s) * share
                        for s, share in zip(event.layer_sparsity, left, strict=True)
                    ],
                )
            self.measured(event)

        return pass_on

    def _goal(self, number: int) -> dict[str, Any]:
        """The target of a stage's pruning, of whatever the stage before left."""
        if number == len(self.stages) and "memory" in self.target:
            return self.target
        config = sources.load_config(self.source)
        whole = sum(p.numel() for p in sources.build_on_meta(config).parameters())
        return {"params": whole - self.stages[number - 1].removed}

    def _start(self, number: int) -> int:
        """Return how many updates are made before a stage."""
        return self.stages[number - 2].until if number > 1 else 0

    def _options(self, number: int) -> dict[str, Any]:
        effort: Effort = self.pruning.get("effort") or "balanced"
        iterations = self.pruning.get("iterations") or Options.of(effort).iterations
        shared = max(1, round(iterations / len(self.stages)))
        seed = int(self.pruning.get("seed") or 0)
        return {**self.pruning, "iterations": shared, "seed": seed + number - 1}

    def _train(self, trainer: Trainer, number: int) -> None:
        """Train to the end of a stage, and leave its model for the next one to prune."""
        self.measured.follow(trainer, stage=number)
        begun, last = trainer.step, number == len(self.stages)
        if last:  # those before are cut again, which no loss can be compared over
            trainer.evaluate_at(self._start(number))
        trained = self._folder(number) / "trained"
        written = (
            trained.exists()
        )  # asked before the processes meet: later one may be at writing it
        trainer.run(self.stages[number - 1].until)
        if (
            trainer.step == begun
        ):  # it was at its end: what goes on from there must find this stage's model
            trainer.save(self.work / TRAINING)
        if last:
            self.measured.warn_if_worse(since=self._start(number))
        elif not written:
            pruned = sources.resolve(self._folder(number) / "pruned")
            tokenizer, dtype = self.tokenizer, torch.float32
            _write(trainer, pruned, dtype, tokenizer, trained, {}, self.accelerator)
        if self.accelerator.is_main_process:
            shutil.rmtree(self._folder(number - 1), ignore_errors=True)
        self.accelerator.wait_for_everyone()


def _carrier(config: Any, kept: list[Kept]) -> Callable[[str, Tensor], Tensor]:
    """Return what cuts a tensor that is shaped like a weight of a model of ``config`` to what is kept."""
    groups = describe_layers(config)
    layers = "model.layers."

    def carry(name: str, tensor: Tensor) -> Tensor:
        if not name.startswith(layers):
            return tensor
        number, _, own = name.removeprefix(layers).partition(".")
        return cut({own: tensor}, groups[int(number)], kept[int(number)])[own]

    return carry


# ---- the parts


def _resolved(
    model: str | Path | Source, revision: str | None, trust_remote_code: bool, emit: Emit
) -> Source:
    if isinstance(model, Source):
        return model
    return sources.resolve(model, revision=revision, trust_remote_code=trust_remote_code, emit=emit)


def _stored_type(source: Source) -> torch.dtype:
    found = sources.load_config(source).dtype
    return found if isinstance(found, torch.dtype) else torch.float32


def _loaded_type(training: Training, accelerator: Any) -> torch.dtype:
    """Return the type to load in what is trained: float32, or what is computed in where LoRA leaves it as it is."""
    return machine.compute_dtype(accelerator.device) if training.lora_rank else torch.float32


def packed_data(
    data: Sequence[str],
    tokenizer: Any,
    training: Training,
    held_out: int = HELD_OUT,
    cache: Path | None = None,
    emit: Emit = ignore,
) -> tuple[Packed, Packed | None]:
    """Return what to train on, as much as the updates take, and what to measure on.

    ``held_out`` and ``cache`` are as ``recover`` takes them.

    Raises:
        BadInput: as ``packing.prepare``; the settings cannot be used.
    """
    training.check()
    first, second = prepare(
        parse_sources(data),
        tokenizer,
        tokens=training.steps * training.batch * training.length,
        length=training.length,
        held_out=held_out,
        cache=cache or cache_folder(),
        seed=training.seed,
        emit=emit,
    )
    return first, second if held_out else None


def _teacher_source(
    teacher: str | Path | None, training: Training, trust_remote_code: bool, emit: Emit
) -> Source | None:
    if not training.distill:
        return None
    if teacher is None:
        raise BadInput("distilling needs the dense model: name it with --teacher MODEL")
    return _resolved(teacher, None, trust_remote_code, emit)


def _taught(
    packed: tuple[Packed, Packed | None],
    teacher: Source | None,
    config: Any,
    training: Training,
    accelerator: Any,
    force: bool,
    emit: Emit,
) -> tuple[tuple[Packed, Packed | None], Any]:
    """Return what to train a model of ``config`` on, and the teacher unless it was recorded: one process does."""
    if teacher is None:
        return packed, None
    if not training.teacher_top_k:
        return packed, sources.load_model(teacher, dtype=machine.compute_dtype(), emit=emit)
    check_vocabularies(sources.load_config(teacher).vocab_size, config.vocab_size)

    def recorded() -> Packed:
        return teacher_cache.prepare(
            packed[0], teacher, training, device=accelerator.device, force=force, emit=emit
        )

    made = recorded() if accelerator.is_main_process else None
    accelerator.wait_for_everyone()
    return (made or recorded(), packed[1]), None


def _check_memory(
    config: Any,
    teacher: Any,
    training: Training,
    removed: int,
    accelerator: Any,
    sharded: bool,
    force: bool,
) -> None:
    """Refuse what will not fit before anything is read: the model of ``config`` less ``removed`` parameters."""
    processes = int(accelerator.num_processes)
    memory.fitting_micro_batch(
        config,
        training,
        teacher if training.distill else None,
        accelerator.device,
        machine.compute_dtype(accelerator.device),
        processes,
        removed=removed,
        shards=processes if sharded else 1,
        force=force,
        emit=ignore,  # the trainer tells
    )


def _named(teacher: str | Path | None) -> str | None:
    return None if teacher is None else str(teacher)


class _Evaluations:
    """Passes events on, and keeps the held-out losses for the record and in the trainer's checkpoints."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self.found: list[tuple[int, float]] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Evaluation):
            self.found.append((event.step, event.loss))
        self._emit(event)

    def follow(self, trainer: Trainer, **notes: Any) -> None:
        """Take over what the trainer's last checkpoint has kept, and have it keep ``notes`` and what is to come."""
        if not self.found:
            self.found += [(int(step), loss) for step, loss in trainer.notes.get(LOSSES, [])]
        trainer.notes = {**notes, LOSSES: self.found}

    def warn_if_worse(self, *, since: int) -> None:
        """Say so where the model was better after the update ``since``, on text that it was not trained on."""
        before = [loss for step, loss in self.found if step == since]
        if before and self.found[-1][1] > before[-1]:
            text = (
                f"the held-out loss went up, from {before[-1]:.3f} to {self.found[-1][1]:.3f}: the training made the "
                "model worse; name more text, or train on fewer tokens, at a lower learning rate, or with the dense "
                "model as the teacher"
            )
            self._emit(Note(text=text, level="warning"))


def _described(
    training: Training, data: Sequence[str], measured: _Evaluations, started: float
) -> dict[str, Any]:
    return {
        "data": [own_name(each) for each in data],
        "training": asdict(training),
        "held_out_loss": [{"step": step, "loss": loss} for step, loss in measured.found],
        "seconds": round(time.monotonic() - started, 1),
    }


def _write(
    trainer: Trainer,
    source: Source,
    dtype: torch.dtype,
    tokenizer: Any,
    output: Path,
    made: dict[str, Any],
    accelerator: Any,
) -> dict[str, Any]:
    """Write what is trained in the type ``dtype``; return its ``edgeprune.json``. One process does."""
    weights = trainer.each_weight()
    if accelerator.is_main_process:
        checkpoint.save_parts(
            trainer.model.config,
            ({name: weight.to("cpu", dtype).contiguous()} for name, weight in weights),
            tokenizer,
            output,
            provenance=made,
            source=source,
            generation_config=trainer.model.generation_config,
        )
    for _ in weights:  # the others hand over what they hold
        pass
    accelerator.wait_for_everyone()
    record = checkpoint.read_provenance(output)
    assert record is not None
    return record


def _remove(work: Path | None, accelerator: Any) -> None:
    if work is not None and accelerator.is_main_process:
        shutil.rmtree(work, ignore_errors=True)
