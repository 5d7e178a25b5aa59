"""Measure exported models on several machines, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from edgeprune.errors import EdgepruneError, Interrupted
from edgeprune.events import Emit, Event, Note, Progress, ignore
from edgeprune.profiles import board
from edgeprune.profiles import profile as here
from edgeprune.profiles.profile import Threads
from edgeprune.remote import hosts
from edgeprune.remote.connection import Link, connect
from edgeprune.remote.hosts import Host

Measure = Callable[..., dict[str, Any]]
Documents = dict[str, dict[str, Any]]


class NotAllMeasured(EdgepruneError):
    """Some devices could not be measured; ``measured`` has the documents of the others by their names."""

    def __init__(self, failures: dict[str, EdgepruneError], measured: Documents):
        reasons = "; ".join(
            f"{name}: {str(error).removeprefix(f'{name}: ')}" for name, error in failures.items()
        )
        super().__init__(f"not measured: {reasons}")
        self.measured = measured


def measure(
    export: str | PathLike[str],
    against: str | PathLike[str] | None,
    devices: Sequence[str],
    *,
    prompt: int = 128,
    generate: int = 128,
    repeats: int = 5,
    threads: Threads = None,
    sustained: float = 0.0,
    connect: Callable[[Host], Link] = connect,
    known: Documents | None = None,
    keep: Callable[[Documents], object] = lambda _documents: None,
    emit: Emit = ignore,
) -> Documents:
    """Return ``profile``'s document of each device by its name: "local", or a host as ``hosts.find`` takes it.

    ``connect`` links to a host. Devices with a document in ``known`` are not measured again; ``keep`` is called with
    all documents whenever there is one more. Where there are several devices, what is told names the device.

    Raises:
        BadInput: an export cannot be measured, or there is no such host; nothing was measured.
        NotAllMeasured: some of several devices failed; the others were measured first.
        EdgepruneError: the only device failed, as ``profile`` and ``board.measure`` have it.
    """
    folders = [Path(export), *([Path(against)] if against is not None else [])]
    here.check(folders, prompt, generate, repeats, threads, sustained)
    options = {
        "against": against,
        "prompt": prompt,
        "generate": generate,
        "repeats": repeats,
        "threads": threads,
        "sustained": sustained,
    }
    ways = {name: _way(name, connect) for name in devices}
    measured = {name: document for name, document in (known or {}).items() if name in ways}
    failures: dict[str, EdgepruneError] = {}
    for name, way in ways.items():
        if name in measured:
            emit(Note(text=f"{name} was measured before"))
            continue
        try:
            listener = emit if len(ways) == 1 else _naming(name, emit)
            measured[name] = way(export, **options, emit=listener)
            keep(measured)
        except EdgepruneError as error:
            if len(ways) == 1 or isinstance(error, Interrupted):
                raise
            failures[name] = error
            emit(Note(text=f"{name} was not measured: {error}", level="warning"))
    if failures:
        raise NotAllMeasured(failures, measured)
    return {name: measured[name] for name in ways}


def _way(name: str, connect: Callable[[Host], Link]) -> Measure:
    """Return what measures on the device."""
    if name == hosts.LOCAL:
        return here.profile
    host = hosts.find(name)
    return lambda export, **options: board.measure(host, export, connect=connect, **options)


def _naming(name: str, emit: Emit) -> Emit:
    """Return a listener that says of what it tells on which device it is."""

    def tell(event: Event) -> None:
        if isinstance(event, Progress):
            event = replace(event, note=_named(name, event.note))
        elif isinstance(event, Note):
            event = replace(event, text=_named(name, event.text))
        emit(event)

    return tell


def _named(name: str, text: str) -> str:
    return f"{name}: {text.removeprefix(f'{name}: ')}" if text else name
