"""The commands for runs that are at work or done: attach, stop, pause, unpause, and the list of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeprune import console
from edgeprune.errors import BadInput, Interrupted

if TYPE_CHECKING:
    from edgeprune.events import Emit, RunStarted
    from edgeprune.remote.address import Far
    from edgeprune.runs import RunInfo

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder of the run.", show_default=False)
]

app = typer.Typer(rich_markup_mode=None)


def register(commands: typer.Typer) -> None:
    """Add the commands of this module to ``commands``."""
    commands.command(short_help="Watch a run that is at work, or see how it ended.")(attach)
    commands.command(short_help="Stop a run; it can go on later.")(stop)
    commands.command(short_help="Bring home what a run on a host made so far.")(fetch)
    commands.command(short_help="Remove a run from its host.")(clean)
    commands.command(short_help="Let a run stand still for a while.")(pause)
    commands.command(short_help="Let a paused run go on.")(unpause)
    commands.add_typer(app, name="runs", short_help="List the runs, compare them.")


def attach(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[DIR|NAME:RUN]",
            help="Folder of the run; default: the only one at work, else the latest. NAME:RUN: a run on a host.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="With NAME:RUN: new folder for it here; default: RUN.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Watch a run that is at work, whoever started it; shows the results at its end.

    Ctrl-C leaves the run alone, and it goes on. Of a run that has ended, shows how. A run on a host can be watched from
    any machine that knows the host; at its end its results are brought there.

    Examples:

    edgeprune attach run

    edgeprune attach

    edgeprune attach gpubox:run-1a2b3c4d -o run
    """
    from edgeprune import run as engine

    folder = adopted(target, output) if target else _the_run()
    watched(folder, as_json, lambda emit: engine.attach(folder, emit))


def stop(
    target: Annotated[
        str,
        typer.Argument(
            metavar="DIR|NAME:RUN",
            help="Folder of the run, or the run on a host.",
            show_default=False,
        ),
    ],
) -> None:
    """Stop a run that is at work, whoever started it; what is finished stays.

    Examples:

    edgeprune stop run

    edgeprune stop gpubox:run-1a2b3c4d
    """
    from edgeprune import control, runs
    from edgeprune.remote import address

    far = address.parse(target)
    if far is not None:
        _stop_far(far, None)
        return
    folder = Path(target).absolute()
    with console.progress() as emit:
        was_at_work = control.stop(folder, emit)
    info = runs.describe(folder)
    far = address.read(folder)
    if info.state == "away" and far is not None:
        _stop_far(far, folder)
        return
    if info.state == "finished":
        console.note(f"The run is finished; see it with: {info.next}")
        return
    what = "Stopped" if was_at_work else f"No process is at work on this run ({info.state})"
    console.note(f"{what}. {_kept(info)} Go on with: {info.next}")


def fetch(
    target: Annotated[
        str,
        typer.Argument(metavar="DIR|NAME:RUN", help="A run on a host.", show_default=False),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="Folder for it; default: DIR, or RUN."),
    ] = None,
) -> None:
    """Bring home what a run on a host has made so far, without waiting for its end.

    What is here already is not sent again, and what was cut off goes on where it was.

    Example:

    edgeprune fetch gpubox:run-1a2b3c4d -o run
    """
    from edgeprune.remote import box

    far = _far(target)
    folder = output or (Path(target) if Path(target).exists() else Path(far.run))
    with console.progress() as emit:
        names = box.fetch_now(far, folder, emit)
    made = f"{', '.join(names)} in {folder}" if names else "nothing is finished there yet"
    console.note(f"Brought from {far.host}: {made}.")


def clean(
    target: Annotated[
        str,
        typer.Argument(metavar="DIR|NAME:RUN", help="A run on a host.", show_default=False),
    ],
) -> None:
    """Remove a run from its host, with what was sent for it alone. What is here stays.

    Example:

    edgeprune clean gpubox:run-1a2b3c4d
    """
    from edgeprune.quantities import format_bytes
    from edgeprune.remote import box

    far = _far(target)
    freed = box.clean(far)
    console.note(f"{far.run} is gone from {far.host}: {format_bytes(freed)} free again.")


def pause(folder: Folder) -> None:
    """Let a run stand still: its process stays, and so does its memory, but it computes nothing.

    Example:

    edgeprune pause run
    """
    from edgeprune import control, worker

    control.pause(folder)
    typed = worker.shown(folder.absolute())
    console.note(f"Paused. Go on with: edgeprune unpause {typed}")


def unpause(folder: Folder) -> None:
    """Let a paused run go on.

    Example:

    edgeprune unpause run
    """
    from edgeprune import control, worker

    control.unpause(folder)
    typed = worker.shown(folder.absolute())
    console.note(f"It goes on. Watch it with: edgeprune attach {typed}")


@app.callback(invoke_without_command=True)
def list_all(
    context: typer.Context,
    on: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Those that are on this host.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the runs of this user, the latest first: how each stands, and what it made.

    Examples:

    edgeprune runs

    edgeprune runs --on gpubox

    edgeprune runs --json
    """
    if context.invoked_subcommand is not None:
        return
    if on is not None:
        _list_far(on, as_json)
        return
    from edgeprune import runs

    infos = runs.list_runs()
    if as_json:
        console.json_document([asdict(info) for info in infos])
        return
    if not infos:
        console.note("No runs yet; start one with: edgeprune demo, or: edgeprune run RECIPE -o DIR")
        return
    from edgeprune import tables

    console.show(tables.runs(infos))
    console.note("more: edgeprune attach DIR, edgeprune runs compare DIR DIR")


@app.command(short_help="Put finished runs beside each other.")
def compare(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR DIR ...", help="Folders of finished runs.", show_default=False),
    ],
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page with a plot, too.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put the figures of finished runs beside each other, each against its dense model.

    A star marks the Pareto front of file size, decode speed and perplexity: no other of these runs is better in one
    of them and as good in the others.

    Examples:

    edgeprune runs compare run-20 run-30

    edgeprune runs compare run-20 run-30 run-40 --html compared.html
    """
    from edgeprune import comparison

    found = comparison.compare(folders)
    if html is not None:
        _write(html, comparison.page(found))
    if as_json:
        console.json_document(found.to_json())
    else:
        from edgeprune import tables

        console.show(tables.comparison(found))
    for line in found.differences:
        console.note(f"warning: {line}")
    if html is not None:
        console.note(f"The page is {html}.")


@app.command(short_help="Take a run off the list.")
def forget(folder: Folder) -> None:
    """Take a run off the list. Its folder stays as it is.

    Example:

    edgeprune runs forget run
    """
    from edgeprune import runs

    if not runs.forget(folder):
        raise BadInput(f"{folder}: not in the list; see: edgeprune runs")
    if folder.exists():
        console.note(f"Off the list; {folder} is still there.")


# ---- what the commands share


def show_results(folder: Path, results: dict[str, Any], as_json: bool) -> None:
    """Show what a finished run found."""
    if as_json:
        console.json_document(results)
    else:
        from edgeprune import report, tables

        console.show(tables.results(report.results_table(results), report.summary(results)))
    console.note(f"All of it is in {folder}: results.json, report.html, the models.")


def watched(folder: Path, as_json: bool, work: Callable[[Emit], dict[str, Any]]) -> None:
    """Show a run that Ctrl-C leaves alone, and what it found at its end."""
    from edgeprune import lock, runs, worker

    try:
        with console.progress() as emit:
            results = work(emit)
    except KeyboardInterrupt:
        if not (lock.is_held(folder) or runs.describe(folder).state == "away"):
            raise
        typed = worker.shown(folder)
        raise Interrupted(
            f"left the run, which goes on; see it again with: edgeprune attach {typed}, "
            f"stop it with: edgeprune stop {typed}"
        ) from None
    show_results(folder, results, as_json)


def adopted(target: str, output: Path | None) -> Path:
    """Return the folder that ``target`` names; for NAME:RUN a new one in which that run is gone on with."""
    from edgeprune.remote import address

    far = address.parse(target)
    if far is None:
        if output is not None:
            raise BadInput(f"-o goes with NAME:RUN alone; {target} is a folder already")
        return Path(target).absolute()
    from edgeprune.remote import box

    folder = (output or Path(far.run)).absolute()
    if address.read(folder) != far:
        box.adopt(far, folder)
    return folder


def show_left(folder: Path, started: RunStarted, as_json: bool) -> None:
    """Say that a run was left at work, and how to come back to it."""
    from edgeprune import worker

    typed = worker.shown(folder.absolute())
    if as_json:
        console.json_document({"folder": str(folder.absolute()), "pid": started.pid})
    console.note(f"The run goes on by itself, as process {started.pid}.")
    console.note(f"watch it: edgeprune attach {typed}")
    console.note(f"stop it:  edgeprune stop {typed}")


def _the_run() -> Path:
    """Return the folder of the only run at work, else of the latest."""
    from edgeprune import runs

    infos = runs.list_runs()
    if not infos:
        raise BadInput("no runs yet; start one with: edgeprune run RECIPE -o DIR --detach")
    at_work = [info for info in infos if info.state in runs.AT_WORK]
    if len(at_work) > 1:
        named = ", ".join(str(info.folder) for info in at_work)
        raise BadInput(f"{len(at_work)} runs are at work; name one: {named}")
    found = at_work[0] if at_work else infos[0]
    console.note(f"run in {found.folder}")
    return found.folder.absolute()


def _far(target: str) -> Far:
    """Return the run on a host that a folder or NAME:RUN names."""
    from edgeprune.remote import address

    far = address.parse(target) or address.read(Path(target))
    if far is None:
        raise BadInput(f"{target}: no run on a host; see: edgeprune runs --on NAME")
    return far


def _stop_far(far: Far, folder: Path | None) -> None:
    from edgeprune.remote import box

    was_at_work = box.stop_unwatched(folder, far) if folder else box.stop(far)
    told = "told to stop" if was_at_work else "not at work"
    console.note(f"The run on {far.host} is {told}. Go on with: edgeprune run --resume {far}")


def _list_far(host: str, as_json: bool) -> None:
    from edgeprune.remote import box

    found = box.listing(host)
    if as_json:
        console.json_document(found)
    elif not found:
        console.note(f"No runs on {host}; start one with: edgeprune run RECIPE -o DIR --on {host}")
    else:
        from edgeprune import tables

        console.show(tables.far_runs(found))
        console.note(f"more: edgeprune attach {host}:RUN, edgeprune clean {host}:RUN")


def _kept(info: RunInfo) -> str:
    from edgeprune import worker

    finished = list(worker.read_state(info.folder))
    return f"Kept: {', '.join(finished)}." if finished else "No stage is finished yet."


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written: {error.strerror}; name another file") from error
