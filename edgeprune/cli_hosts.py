"""The commands for the machines that are reached by SSH: added, listed, checked, removed."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from edgeprune import console
from edgeprune.cli_options import Json, answer, tables
from edgeprune.errors import BadInput

if TYPE_CHECKING:
    from edgeprune.remote.connection import Link, UnknownHostKey
    from edgeprune.remote.hosts import Host

Name = Annotated[str, typer.Argument(metavar="NAME", help="A saved host.", show_default=False)]

app = typer.Typer(rich_markup_mode=None)


def register(commands: typer.Typer) -> None:
    """Add the commands of this module to ``commands``."""
    commands.add_typer(app, name="hosts", short_help="Other machines: boxes and boards, by SSH.")


@app.callback(invoke_without_command=True)
def hosts(context: typer.Context) -> None:
    """Other machines, reached by SSH: a box prunes and trains, a board is what you measure on.

    Your keys, agent, jump hosts and known hosts are used as ~/.ssh/config has them. Without a command: the list.
    """
    if context.invoked_subcommand is None:
        list_saved()


@app.command(short_help="Save a machine, after a look at it.")
def add(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="What to call it: pi5.", show_default=False)
    ],
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL",
            help="ssh://user@host or ssh://user@host:port; host may be one of ~/.ssh/config.",
            show_default=False,
        ),
    ],
    kind: Annotated[
        Literal["box", "board"], typer.Option(help="box: prunes and trains; board: is measured.")
    ] = "box",
    python: Annotated[
        str, typer.Option(metavar="PATH", help="The Python there that makes environments.")
    ] = "python3",
    wheelhouse: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder here with wheels, for a machine that reaches no package index.",
            show_default=False,
        ),
    ] = None,
    accept_new_host_key: Annotated[
        bool,
        typer.Option(
            "--accept-new-host-key",
            help="Trust the key of a machine never seen before, without asking.",
        ),
    ] = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Save it without a look: it need not be on.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Save it in the place of the one called so.")
    ] = False,
) -> None:
    """Save a machine under a name, and show what it has and what is missing there.

    A key of a machine never seen before is shown, and accepted only if you say so.

    Examples:

    edgeprune hosts add gpu ssh://me@gpu.example.org

    edgeprune hosts add pi5 ssh://pi@192.168.1.20 --kind board
    """
    from edgeprune.remote import check as checks
    from edgeprune.remote import hosts as saved

    user, address, port = saved.parse_url(url)
    wheels = None if wheelhouse is None else _folder(wheelhouse)
    host = saved.Host(name, address, user, port, kind, python, wheels)
    saved.refuse(host, replace)
    if not no_check:
        with connect(host, accept_new_host_key) as link:
            found = checks.examine(link)
        answer(found, False, lambda found: tables().host(found))
    saved.add(host, replace)
    console.note(f"Saved as {name}. Look again with: edgeprune hosts check {name}")


@app.command("list", short_help="List the saved machines.")
def list_saved(as_json: Json = False) -> None:
    """List the saved machines.

    Examples:

    edgeprune hosts list

    edgeprune hosts list --json
    """
    from edgeprune.remote.hosts import list_hosts

    found = list_hosts()
    if as_json:
        console.json_document([{**asdict(host), "url": host.url} for host in found])
    elif found:
        console.show(tables().hosts(found))
    else:
        console.note("No hosts yet; add one with: edgeprune hosts add NAME ssh://user@host")


@app.command(short_help="See what a machine has, and what is missing.")
def check(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A saved host, or ssh://user@host.", show_default=False
        ),
    ],
    as_json: Json = False,
) -> None:
    """Show what a machine has, what is missing there, and the command that would mend it.

    Exit code 1 if something is missing without which nothing can be done there.

    Examples:

    edgeprune hosts check pi5

    edgeprune hosts check ssh://me@gpu.example.org --json
    """
    from edgeprune.remote import check as checks
    from edgeprune.remote.hosts import find

    with connect(find(name)) as link:
        found = checks.examine(link)
    answer(found, as_json, lambda found: tables().host(found))
    if not checks.is_fit(found):
        raise typer.Exit(1)


@app.command(short_help="Free the disk of a machine from what nothing uses.")
def clean(name: Name, as_json: Json = False) -> None:
    """Remove from a machine the Python environments in which nothing is at work, and what no run uses any more.

    Each version of edgeprune has its own there, made again when it is needed. Runs stay: edgeprune clean NAME:RUN.

    Example:

    edgeprune hosts clean gpubox
    """
    from edgeprune.quantities import format_bytes
    from edgeprune.remote import environment
    from edgeprune.remote.hosts import find

    host = find(name)
    with connect(host) as link:
        done = environment.clean(link)
    if as_json:
        console.json_document(done)
        return
    kept = f"; still in use: {done['used']}" if done["used"] else ""
    console.note(
        f"Freed {format_bytes(done['bytes'])} on {host.name}; environments removed: {done['removed']}{kept}."
    )


@app.command(short_help="Forget a machine.")
def remove(name: Name) -> None:
    """Forget a machine. Nothing is changed there.

    Example:

    edgeprune hosts remove pi5
    """
    from edgeprune.remote import hosts as saved

    saved.remove(name)
    console.note(f"Forgot {name}; nothing was changed there.")


# ---- what other commands need, too


def connect(host: Host, accept_new_host_key: bool = False) -> Link:
    """Log in to ``host``; of a key that is not known, and of a passphrase, whoever sits at the terminal is asked."""
    from edgeprune.remote import connection

    trusted = ""
    while True:
        try:
            return connection.connect(host, _asker())
        except connection.UnknownHostKey as error:
            if error.fingerprint == trusted:
                raise
            if not accept_new_host_key:
                _ask_about(error, host)
            trusted = error.fingerprint
            connection.trust(host, trusted)
            console.note(f"Added to the known hosts: {error.machine} {error.algorithm} {trusted}")


def _asker() -> Callable[[str], str] | None:
    return (lambda prompt: getpass.getpass(f"{prompt}: ")) if sys.stdin.isatty() else None


def _ask_about(error: UnknownHostKey, host: Host) -> None:
    """Show a key that is not known. BadInput unless it is accepted."""
    if not sys.stdin.isatty():
        raise BadInput(
            f"{error.shown}; if it is the right one, accept it with: edgeprune hosts add {host.name} {host.url} "
            f"--kind {host.kind} --replace --accept-new-host-key"
        )
    console.note(error.shown)
    if not typer.confirm("Is it the right one?", err=True):
        raise BadInput(f"{host.name}: the key of {error.machine} was not accepted")


def _folder(path: Path) -> str:
    folder = path.expanduser().absolute()
    if not folder.is_dir():
        raise BadInput(f"{path}: no such folder; fill one with wheels by: pip download -d {path}")
    return str(folder)
