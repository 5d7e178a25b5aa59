"""Bringing files to another machine and home from there: each content once, checked, from where the last try ended."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from threading import Thread
from typing import TypeVar

from edgeprune import machine
from edgeprune.errors import BadInput, EdgepruneError
from edgeprune.events import Emit, Progress
from edgeprune.quantities import format_bytes
from edgeprune.remote import far_store, manifest
from edgeprune.remote.connection import Link
from edgeprune.remote.manifest import Entry

UNFINISHED = "unfinished-fetch"
"""The folder in which files wait until all that belongs together has come."""
CHUNK = 1 << 20
INTERVAL = 0.1
"""Seconds between two reports of progress."""
PATIENCE = 60.0
"""Seconds for which the far machine waits for more of a file that is being sent, before it gives up checking it."""
BEGIN = 0.3
"""Seconds in which what is done meanwhile has begun: only then does the end of the link end it, too."""
ROOM = 50 * 10**6
"""Bytes of a disk that are left free for others."""

T = TypeVar("T")


def send(
    link: Link, paths: Sequence[Path], emit: Emit, stage: str
) -> dict[Path, list[tuple[str, str]]]:
    """Bring files and folders into the store of the far machine, of which only what is not there yet is sent.

    Returns for each of ``paths`` its files as (path below it, SHA-256); a file has the path "". In folders, links to
    files are followed, and names that begin with a dot are left out. Bytes are reported as ``Progress`` of ``stage``.
    After an error, the same call goes on from where it ended.

    Raises:
        BadInput: there is no such path, nothing in it, or something that cannot be sent; or the far disk has no room.
        Unreachable: the link broke.
        EdgepruneError: a file changed meanwhile.
    """
    try:
        found = {path: _files_of(path) for path in paths}
        files = {file: None for each in found.values() for file in each.values()}
        digests = _digests(list(files), emit, stage)
    except OSError as error:
        raise BadInput(f"{error.filename}: cannot be read: {error.strerror}") from error
    _bring(link, {sha256: file for file, sha256 in digests.items()}, emit, stage)
    return {
        path: [(name, digests[file]) for name, file in files.items()]
        for path, files in found.items()
    }


def _files_of(path: Path) -> dict[str, Path]:
    """Return the files of a path by what they are called below it."""
    if path.is_file():
        return {"": path}
    if not path.is_dir():
        raise BadInput(f"{path}: no such file or folder; nothing was sent")
    found = dict(_walk(path, path))
    if not found:
        raise BadInput(f"{path}: an empty folder; nothing was sent")
    return found


def _walk(folder: Path, top: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.iterdir()):
        name = path.relative_to(top).as_posix()
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path, top)
        elif path.is_file() and not manifest.why_unsafe(name):
            yield name, path
        else:
            reason = manifest.why_unsafe(name) or "is neither a file nor a folder of its own"
            raise BadInput(f"{top}: {name!r} {reason}; move it away, or give another folder")


def _digests(files: Sequence[Path], emit: Emit, stage: str) -> dict[Path, str]:
    meter = _Meter(emit, stage, sum(file.stat().st_size for file in files))
    return {file: _digest(file, partial(meter.add, f"reading {file.name}")) for file in files}


def _digest(path: Path, progress: Callable[[int], None] | None = None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            if progress:
                progress(len(chunk))
    return digest.hexdigest()


def _bring(link: Link, files: dict[str, Path], emit: Emit, stage: str) -> None:
    """Send the files, here by their contents, that are not in the far store; what arrives damaged, twice."""
    sizes = {sha256: file.stat().st_size for sha256, file in files.items()}
    damaged: list[str] = list(files)
    for _ in range(2):
        there = link.far(far_store, "have", sizes=sizes)
        missing = {sha256: size for sha256, size in sizes.items() if sha256 not in there["whole"]}
        parts = {
            sha256: min(there["parts"].get(sha256, 0), size) for sha256, size in missing.items()
        }
        needed = sum(missing.values()) - sum(parts.values())
        _check_far_room(link, there["store"], there["free"], needed)
        meter = _Meter(emit, stage, sum(sizes.values()), done=sum(sizes.values()) - needed)
        adopt = partial(link.far, far_store, "adopt", sizes=missing, patience=PATIENCE)
        with _meanwhile(adopt if missing else list) as adopted:
            for sha256, offset in parts.items():
                if offset < sizes[sha256] or not offset:
                    far = f"{there['store']}/{sha256}.part"
                    told = _File(meter, files[sha256].name, sizes[sha256], offset)
                    link.upload(files[sha256], far, offset=offset, progress=told)
                    told.end()
            meter.tell(f"checking on {link.host.name}")
            damaged = adopted.result()
        if not damaged:
            return
    raise EdgepruneError(
        f"{files[damaged[0]]}: did not arrive whole at {link.host.name}; did it change while it was sent? try again"
    )


@contextmanager
def _meanwhile(work: Callable[[], T]) -> Iterator[Future[T]]:
    """Let work over there go on during the block; it is not waited for, and ends with the link at the latest."""
    future: Future[T] = Future()

    def do() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=do, daemon=True).start()
    try:
        yield future
    except BaseException:
        wait([future], timeout=BEGIN)
        raise


def _check_far_room(link: Link, store: str, free: int, needed: int) -> None:
    if needed and free < needed + ROOM:
        raise BadInput(
            f"{link.host.name}: its disk has no room: {format_bytes(needed)} are to be sent to {store}, and "
            f"{format_bytes(free)} are free; free some space there"
        )


class _Meter:
    """The bytes of several files as one Progress, told at most every ``INTERVAL``."""

    def __init__(self, emit: Emit, stage: str, total: int, done: int = 0) -> None:
        self._emit, self._stage, self._total, self._done = emit, stage, total, done
        self._told = 0.0

    def add(self, note: str, count: int) -> None:
        """Count bytes of what ``note`` names."""
        self._done += count
        if time.monotonic() - self._told >= INTERVAL:
            self.tell(note)

    def tell(self, note: str) -> None:
        """Report what was counted so far."""
        self._told = time.monotonic()
        self._emit(
            Progress(stage=self._stage, done=self._done, total=self._total, unit="bytes", note=note)
        )


class _File:
    """Counts one file of a meter's as it comes: called with how many bytes are there."""

    def __init__(self, meter: _Meter, name: str, size: int, counted: int = 0) -> None:
        self._meter, self._name, self.size, self._counted = meter, name, size, counted

    def __call__(self, there: int) -> None:
        if there > self.size:
            raise EdgepruneError(f"{self._name} grows while it is transferred; try again later")
        self._meter.add(self._name, there - self._counted)
        self._counted = there

    def end(self) -> None:
        """Say that there is no more of it. EdgepruneError if something is missing."""
        if self._counted < self.size:
            raise EdgepruneError(f"{self._name} shrank while it was transferred; try again later")


# ---- home again


def fetch(
    link: Link, far_folder: str, folder: Path, names: Sequence[str], emit: Emit, stage: str
) -> None:
    """Bring files and folders, these ``names`` in a folder of the far machine, into ``folder`` here.

    A name appears when all of it has come and is what it is there, and what is here already is not fetched again.
    Files here that are not there stay. After an error, the same call goes on from where it ended.

    Raises:
        BadInput: something there is no plain file, or its name leads elsewhere; or the disk here has no room. Nothing
            was written.
        Unreachable: the link broke.
        EdgepruneError: a file changed meanwhile.
    """
    where = link.host.name
    listed = link.far(far_store, "listing", folder=far_folder, names=list(names))
    entries = manifest.read(listed, names, where)
    manifest.check_places(entries, folder, where)
    paths = [entry.path for entry in entries]
    waiting = folder / UNFINISHED
    with (
        _room_is_told(folder),
        _meanwhile(partial(_sums, link, far_folder, paths)) as sums,
    ):
        new = [entry for entry in entries if not _is_here(entry, folder, sums)]
        _check_room(new, waiting)
        waiting.mkdir(parents=True, exist_ok=True)
        meter = _Meter(emit, stage, sum(entry.size for entry in new))
        for name, some in groupby(sorted(new, key=lambda entry: entry.path), lambda each: each.top):
            files = list(some)
            for entry in files:
                _get(link, far_folder, entry, waiting, meter, sums)
            _let_appear(name, files, folder, waiting)
        meter.tell("")
        shutil.rmtree(waiting)


Sums = Future[dict[str, str]]
"""The contents of the files there by their paths, once the far machine has read them all."""


def _sums(link: Link, far_folder: str, paths: list[str]) -> dict[str, str]:
    answer = link.far(far_store, "digests", folder=far_folder, paths=paths)
    if not isinstance(answer, dict):
        raise BadInput(f"{link.host.name}: what it answered are no checksums")
    return answer


def _is_here(entry: Entry, folder: Path, sums: Sums) -> bool:
    path = folder / entry.path
    if not path.is_file() or path.stat().st_size != entry.size:
        return False
    return _digest(path) == sums.result().get(entry.path)


def _part(entry: Entry, waiting: Path) -> Path:
    """Return where the beginning of a file is: another one if the file has changed there."""
    name = f"{entry.path} {entry.size} {entry.mtime}"
    return waiting / f"{hashlib.sha256(name.encode()).hexdigest()}.part"


def _whole(entry: Entry, waiting: Path) -> Path:
    return waiting / "whole" / entry.path


def _is_whole(entry: Entry, waiting: Path) -> bool:
    """Tell whether a file has come and was checked in an earlier try."""
    path, expected = _whole(entry, waiting), (entry.size, entry.mtime)
    return path.is_file() and (path.stat().st_size, path.stat().st_mtime) == expected


def _check_room(entries: Sequence[Entry], waiting: Path) -> None:
    if waiting.is_symlink() or (waiting.exists() and not waiting.is_dir()):
        raise BadInput(f"{waiting}: no folder; move it away")
    needed, free = sum(_missing(entry, waiting) for entry in entries), machine.disk_free(waiting)
    if needed and free < needed + ROOM:
        raise BadInput(
            f"{waiting.parent}: the disk has no room: {format_bytes(needed)} are to be fetched, and "
            f"{format_bytes(free)} are free; free some space, or give another folder"
        )


def _missing(entry: Entry, waiting: Path) -> int:
    """Return how many bytes of a file are still to come."""
    part = _part(entry, waiting)
    there = part.stat().st_size if part.exists() else 0
    return 0 if _is_whole(entry, waiting) else max(0, entry.size - there)


@contextmanager
def _room_is_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise EdgepruneError(f"{folder}: cannot be written: {error.strerror}") from error
        raise BadInput(
            f"{folder}: the disk is full; free some space, and the same command goes on from here"
        ) from error


def _get(
    link: Link, far_folder: str, entry: Entry, waiting: Path, meter: _Meter, sums: Sums
) -> None:
    """Bring one file to where it waits for the others; what arrives damaged, twice."""
    part, whole = _part(entry, waiting), _whole(entry, waiting)
    told = _File(meter, entry.path, entry.size)
    if _is_whole(entry, waiting):
        told(entry.size)
        return
    for _ in range(2):
        if part.exists() and part.stat().st_size > entry.size:
            part.unlink()
        part.touch()
        found = _downloaded(link, f"{far_folder}/{entry.path}", part, told)
        if found == sums.result().get(entry.path):
            os.utime(part, (entry.mtime, entry.mtime))
            whole.parent.mkdir(parents=True, exist_ok=True)
            part.replace(whole)
            return
        part.unlink()
    raise EdgepruneError(
        f"{link.host.name}: {entry.path} did not arrive whole; does it change there? try again later"
    )


def _downloaded(link: Link, far: str, part: Path, told: _File) -> str:
    """Complete the beginning of a file and return the SHA-256 of the whole, taken while it comes."""
    digest = hashlib.sha256()
    with part.open("rb") as file:

        def read_on(there: int) -> None:
            told(there)
            while chunk := file.read(CHUNK):
                digest.update(chunk)

        offset = part.stat().st_size
        read_on(offset)
        if offset < told.size:
            link.download(far, part, offset=offset, progress=read_on)
        read_on(part.stat().st_size)
    return digest.hexdigest()


def _let_appear(name: str, entries: Sequence[Entry], folder: Path, waiting: Path) -> None:
    """Put the files of one name in their place: a new folder at once, in an old one file by file."""
    if not (folder / name).exists():
        _remove_others(waiting / "whole" / name, {_whole(entry, waiting) for entry in entries})
        (waiting / "whole" / name).replace(folder / name)
        return
    for entry in entries:
        target = folder / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        _whole(entry, waiting).replace(target)


def _remove_others(place: Path, wanted: set[Path]) -> None:
    """Remove what an earlier try left that is not there any more."""
    for path in list(place.rglob("*")):
        if path.is_file() and path not in wanted:
            path.unlink()
