"""Measure exported models on a board, over SSH: the same runner in the same turns as on this machine."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from edgeprune.errors import BadInput, EdgepruneError
from edgeprune.events import Emit, Progress, ignore
from edgeprune.profiles import far_board, runner
from edgeprune.profiles import profile as here
from edgeprune.profiles.profile import Threads
from edgeprune.quantities import format_bytes
from edgeprune.remote import environment, far_store, transfer
from edgeprune.remote.connection import LineProcess, Link, Unreachable, connect
from edgeprune.remote.hosts import Host

STAGE = "send"
RUNNER = "runner.py"


def measure(
    host: Host,
    export: str | PathLike[str],
    against: str | PathLike[str] | None = None,
    *,
    prompt: int = 128,
    generate: int = 128,
    repeats: int = 5,
    threads: Threads = None,
    sustained: float = 0.0,
    connect: Callable[[Host], Link] = connect,
    emit: Emit = ignore,
) -> dict[str, Any]:
    """Measure the folder ``export`` on ``host``, in turns with the folder ``against``, as ``profile`` does here.

    The exports are sent unless they are there from an earlier time, and stay there; what else the measurement needs of
    the board's disk is given back. Returns the document of ``profile``, with the host's name as ``device.name``.

    Raises:
        BadInput: as ``profile``; or the board's memory or disk does not suffice, or its runtime cannot be set up.
        Unreachable: the board does not answer, or the link broke; the message says what to type again.
        EdgepruneError: a measuring process failed.
    """
    folders = [Path(export), *([Path(against)] if against is not None else [])]
    here.check(folders, prompt, generate, repeats, threads, sustained)
    options: dict[str, Any] = {"prompt": prompt, "generate": generate, "repeats": repeats}
    options |= {"threads": threads, "sustained": sustained}
    try:
        with connect(host) as link:
            _check_memory(link, folders, prompt, generate, emit)
            python = _python(link, folders, emit)
            with _inputs(link, folders, emit) as places, _said_by(host, places):
                start = partial(_start, link, python, places)
                found = here.measurement(folders, start, **options, emit=emit)
    except Unreachable as error:
        again = _command(host, folders, options)
        raise Unreachable(f"{error}; type again: {again}") from error
    return {**found, "device": {"name": host.name, **found["device"]}}


def _command(host: Host, folders: Sequence[Path], options: dict[str, Any]) -> str:
    """Return what to type to measure again; what is as by default is left out."""
    usual = measure.__kwdefaults__ or {}
    words = ["edgeprune", "profile", str(folders[0])]
    for folder in folders[1:]:
        words += ["--against", str(folder)]
    words += ["--on", host.name]
    for name, value in options.items():
        if value != usual[name]:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


# ---- before


def _check_memory(
    link: Link, folders: Sequence[Path], prompt: int, generate: int, emit: Emit
) -> None:
    """Raise BadInput if the board cannot hold the models at once."""
    name = link.host.name
    emit(Progress(stage=STAGE, done=0, total=0, note=f"looking at {name}"))
    needed = sum(here.session(each, prompt, generate).memory_needed() for each in folders)
    free = link.far(runner, "available_memory")
    if free is None or needed <= free:
        return
    one_by_one = ", or measure one at a time, without --against" if len(folders) > 1 else ""
    models = " and ".join(folder.resolve().name for folder in folders)
    raise BadInput(
        f"{name} has {format_bytes(free)} of memory free, and running {models} needs about "
        f"{format_bytes(round(needed))}; nothing was sent: close programs there{one_by_one}"
    )


def _python(link: Link, folders: Sequence[Path], emit: Emit) -> str:
    """Return the interpreter there that measures; llama-bench needs no packages beside it."""
    if all(folder.suffix == ".gguf" for folder in folders):
        return link.host.python
    return environment.board(link, emit)


@contextmanager
def _inputs(link: Link, folders: Sequence[Path], emit: Emit) -> Iterator[dict[Path, str]]:
    """Bring the runner and the exports to the board; give where each is there, until the block ends."""
    script = Path(runner.__file__)
    sent = transfer.send(link, [script, *folders], emit, STAGE)
    names = {script: RUNNER}
    names |= {path: f"{index}/{path.resolve().name}" for index, path in enumerate(folders)}
    entries = [
        ["/".join(filter(None, (names[path], name))), sha256]
        for path, files in sent.items()
        for name, sha256 in files
    ]
    run = f"profile-{secrets.token_hex(4)}"
    try:
        place = link.far(far_store, "link_inputs", run=run, entries=entries)
        yield {path: f"{place}/{name}" for path, name in names.items()}
    finally:
        with suppress(EdgepruneError):  # the next measurement removes it
            link.far(far_board, "remove", run=run)


# ---- the processes


def _start(
    link: Link, python: str, places: dict[Path, str], folder: Path, arguments: Sequence[str]
) -> FarProcess:
    script = places[Path(runner.__file__)]
    # -I: only what is in the environment, whatever else lies about there.
    return FarProcess(link.open([python, "-I", script, places[folder], *arguments]))


class FarProcess:
    """A runner on a board, as ``profile.Process`` has it. Every method raises Unreachable if the link breaks."""

    def __init__(self, process: LineProcess) -> None:
        self._process = process

    def write_line(self, line: str) -> None:
        """Give it a line; nothing happens if it has ended."""
        try:
            self._process.write_line(line)
        except Unreachable:
            raise
        except EdgepruneError:
            return

    def read_line(self, timeout: float) -> str:
        """Return its next line, "" if it has ended. TimeoutError after ``timeout`` seconds."""
        return self._process.read_line(timeout)

    def ending(self) -> str:
        """Wait for its end, so that all it said is known."""
        self._process.close()
        return ""

    def stderr_tail(self) -> str:
        """Return the end of what it said on stderr."""
        return self._process.stderr_tail()

    def close(self) -> None:
        """Kill it."""
        self._process.close()


@contextmanager
def _said_by(host: Host, places: dict[Path, str]) -> Iterator[None]:
    """Let errors name the board, and the exports as they are called here."""
    try:
        yield
    except Unreachable:
        raise
    except EdgepruneError as error:
        text = str(error)
        for path, place in places.items():
            text = text.replace(place, str(path))
        raise type(error)(f"{host.name}: {text.removeprefix(f'{host.name}: ')}") from error
