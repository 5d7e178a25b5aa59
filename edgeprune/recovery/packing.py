"""Training sequences on disk: documents tokenized once, packed one after the other, read through a memory map.

The token ids of all documents make one long row of numbers, of which sequence ``r`` is the places from ``r length`` to
``(r + 1) length``; beside it stands where each document begins. So nothing is padded but the end of the last
sequence, a document that is longer than a sequence goes on in the next, and its tokens all have their next token as
the label, also across the end of a sequence. What a token may attend to is what precedes it in its own document and
sequence.

``prepare`` writes such a pair, for training and held out, into a cache.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeprune import machine, texts
from edgeprune.errors import BadInput, EdgepruneError, one_line
from edgeprune.events import Emit, Note, Progress, ignore
from edgeprune.quantities import format_bytes
from edgeprune.recovery.loss import IGNORED
from edgeprune.recovery.mixture import DataSource, Unreachable, look_up
from edgeprune.recovery.streams import Encoder, Ids, Stream, fingerprint, repeated

VERSION = 1
TRAINING, HELD_OUT = "training", "held-out"
TOKENS, STARTS, ABOUT, MIXTURE = "tokens.npy", "starts.npy", "packed.json", "mixture.json"
# How often progress is told, over all of the work.
STEPS = 2000


@dataclass(frozen=True)
class Batch:
    """Sequences to train on; every tensor is int64 and (rows, length) unless it says otherwise.

    Padding, which only the last sequence of all has, is a document of its own without labels.
    """

    input_ids: Tensor
    labels: Tensor
    """The next token at each place, so already shifted; -100 where it is of another document, or padding."""
    positions: Tensor
    """Places since the document, or the sequence, began."""
    documents: Tensor
    """The number of the document within its sequence, from 0."""
    teacher_ids: Tensor | None = None
    """(rows, length, k), int32: the tokens that a teacher holds likeliest to come next, where they were recorded."""
    teacher_log_probabilities: Tensor | None = None
    """What it gives them among all tokens, (rows, length, k), float16."""


class Packed:
    """Sequences of token ids in a folder that ``prepare`` made: opened at once, read as asked for.

    Many processes may read one folder; pickled, it is opened anew.

    Args:
        folder: holds the token ids and where documents begin.

    Raises:
        EdgepruneError: the folder is incomplete or damaged.
    """

    length: int
    """Places of a sequence."""
    tokens: int
    """Tokens in all."""
    targets: int
    """Labels that count: every token but the first of each document."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            self.length, self._padding = int(about["length"]), int(about["padding"])
            self._tokens, self._starts = (
                np.load(folder / name, mmap_mode="r", allow_pickle=False)
                for name in (TOKENS, STARTS)
            )
            shapes = [[len(self._tokens)], [len(self._starts)]]
            if about["version"] != VERSION or shapes != [[about["tokens"]], [about["documents"]]]:
                raise ValueError("its parts do not fit together")
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise EdgepruneError(
                f"the training data in {folder} is damaged ({one_line(error)}); delete that folder, "
                "and it is made anew"
            ) from error
        self.tokens = len(self._tokens)
        self.targets = self.tokens - len(self._starts)

    def __len__(self) -> int:
        return -(-self.tokens // self.length)

    def __reduce__(self) -> tuple[type[Packed], tuple[Path, ...]]:
        return Packed, (self.folder,)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Return the sequences of these numbers, from 0; IndexError for one that is not there."""
        parts = [self._row(int(row)) for row in rows]
        columns = zip(*parts, strict=True) if parts else ([np.zeros((0, self.length))],) * 4
        whole = (torch.from_numpy(np.stack(each).astype(np.int64, copy=False)) for each in columns)
        return Batch(*(each.reshape(len(parts), self.length) for each in whole))

    def _row(self, row: int) -> tuple[Ids, Ids, Ids, Ids]:
        if not 0 <= row < len(self):
            raise IndexError(f"there is no sequence {row} among {len(self)}")
        first, length = row * self.length, self.length
        # one place more, which the last label is taken from
        held = self._tokens[first : first + length + 1].astype(np.int64)
        begins = np.zeros(length + 1, bool)
        near = np.searchsorted(self._starts, (first + 1, first + length + 1))
        begins[self._starts[near[0] : near[1]] - first] = True
        begins[len(held) : len(held) + 1] = True  # padding, if there is any
        ids = np.full(length + 1, self._padding, np.int64)
        ids[: len(held)] = held
        learnt = ~begins[1:] & (np.arange(1, length + 1) < len(held))
        labels = np.where(learnt, ids[1:], IGNORED)
        places = np.arange(length)
        positions = places - np.maximum.accumulate(np.where(begins[:-1], places, 0))
        return ids[:-1], labels, positions, np.cumsum(begins[:-1])


class _Writer:
    """Writes documents one after the other into a folder, until there are as many tokens as wanted."""

    def __init__(self, folder: Path, encode: Encoder, length: int, wanted: int) -> None:
        self.written, self.wanted = 0, wanted
        self._folder, self._encode, self._length = folder, encode, length
        self._starts = array("q")
        with disk_is_told(folder):
            folder.mkdir()
            self._file = (folder / TOKENS).open("wb")
            kind = np.lib.format.dtype_to_descr(encode.dtype)
            header = {"descr": kind, "fortran_order": False, "shape": (wanted,)}
            np.lib.format.write_array_header_1_0(self._file, header)

    def add(self, ids: Ids) -> int:
        """Write a document, cut where no more is wanted; return the tokens written."""
        ids = ids[: self.wanted - self.written]
        self._starts.append(self.written)
        with disk_is_told(self._folder):
            self._file.write(ids.tobytes())
        self.written += len(ids)
        return len(ids)

    def close(self) -> None:
        about = {
            "version": VERSION,
            "length": self._length,
            "tokens": self.written,
            "documents": len(self._starts),
            "padding": self._encode.padding,
        }
        with disk_is_told(self._folder):
            synced(self._file)
            with (self._folder / STARTS).open("wb") as file:
                np.save(file, np.frombuffer(self._starts, np.int64), allow_pickle=False)
                synced(file)
            write_json(self._folder / ABOUT, about)

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # what is not written yet may not fit
            self._file.close()


# ---- preparing


def prepare(
    sources: Sequence[DataSource],
    tokenizer: Any,
    *,
    tokens: int,
    length: int,
    held_out: int,
    cache: Path,
    seed: int = 0,
    emit: Emit = ignore,
) -> tuple[Packed, Packed]:
    """Return ``tokens`` tokens to train on and ``held_out`` others, from the cache if they were made before.

    The sources take turns so that each has its share of the tokens, to within a document. Held-out documents are drawn
    first, and no document equal to one of them is trained on. A source that runs dry begins anew, with a warning.
    What is cached is named by all that decides it: the content of the files or the commit on the Hub, the weights, the
    tokenizer, the numbers and the seed. Of several processes that ask for the same, one makes it and the others wait.

    Emits a Note with the licence of each source before it is read, and Progress of stage ``data``: bytes while files
    are compared with the cache, then tokens.

    Args:
        sources: see ``mixture.parse_sources``.
        tokenizer: a tokenizer of transformers.
        tokens: to train on, at least 2.
        length: places of a sequence, at least 2.
        held_out: tokens for validation, 0 for none.
        cache: a folder, made if absent.
        seed: of the order of documents.
        emit: hears of the work.

    Raises:
        BadInput: a source cannot be used, or is too small to hold a part of it out; the disk is full. Nothing is left.
        EdgepruneError: the Hub or the disk failed.
    """
    _check(sources, tokens, length, held_out)
    encode = Encoder(tokenizer)
    found = [_looked_up(source, cache, emit) for source in sources]
    for source, _ in found:
        emit(Note(text=f"{source.spec}: licence {source.licence or 'not known'}"))
    whole = sum(source.weight for source in sources)
    what = {
        "version": VERSION,
        "sources": [
            {"share": source.weight / whole, "content": _content(source, revision, emit)}
            for source, revision in found
        ],
        "tokenizer": encode.identity(),
        "tokens": tokens,
        "length": length,
        "held_out": held_out,
        "seed": seed,
    }
    folder = cache / hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
    ready = _opened(folder)
    if not ready:
        _check_room(cache, (tokens + held_out) * encode.dtype.itemsize)
        with alone(folder, emit):
            ready = _opened(folder)  # by the process that was waited for
            if not ready:
                _make(folder, what, found, encode, emit)
                return Packed(folder / TRAINING), Packed(folder / HELD_OUT)
    _tell_repeated(folder, [source for source, _ in found], tokens + held_out, emit)
    return ready


def _check(sources: Sequence[DataSource], tokens: int, length: int, held_out: int) -> None:
    if not sources:
        raise BadInput("there is nothing to train on; name a text")
    if length < 2:
        raise BadInput(f"sequences of {length} tokens teach nothing; use a length of 2 or more")
    if tokens < 2:
        raise BadInput(f"{tokens} tokens are too few to train on; ask for more")
    if held_out < 0:
        raise BadInput(f"{held_out} tokens cannot be held out; use 0 or more")


def _opened(folder: Path) -> tuple[Packed, Packed] | None:
    try:
        return Packed(folder / TRAINING), Packed(folder / HELD_OUT)
    except EdgepruneError:
        return None


def _make(
    folder: Path,
    what: Mapping[str, Any],
    found: Sequence[tuple[DataSource, str | None]],
    encode: Encoder,
    emit: Emit,
) -> None:
    """Read the sources into ``folder``; ``what`` names the numbers, and is kept there with what was read."""
    if folder.is_dir():
        emit(Note(level="warning", text=f"{folder} is damaged: it is made anew"))
    parts = {HELD_OUT: what["held_out"], TRAINING: what["tokens"]}
    whole, tokens = sum(source.weight for source, _ in found), sum(parts.values())
    held_out: set[bytes] = set()
    streams = [
        Stream(
            source,
            revision,
            encode,
            wanted=_wanted(source, whole, tokens),
            seed=f"{what['seed']} {n}",
            held_out=held_out,
            emit=emit,
        )
        for n, (source, revision) in enumerate(found)
    ]
    with _appearing_whole(folder) as unfinished:
        _pack(streams, encode, unfinished, what["length"], parts, emit)
        used = [
            {
                **asdict(stream.source),
                "revision": revision,
                "tokens_read": stream.tokens,
                "times_begun": stream.epochs + 1,
                "holds": stream.holds,
                "rows_skipped": stream.skipped.rows,
            }
            for (_, revision), stream in zip(found, streams, strict=True)
        ]
        write_json(unfinished / MIXTURE, {**what, "used": used})
    _tell_skipped(streams, emit)


def _pack(
    streams: Sequence[Stream],
    encode: Encoder,
    folder: Path,
    length: int,
    wanted: Mapping[str, int],
    emit: Emit,
) -> None:
    """Write each part of ``wanted``, tokens by name, into a folder of its own."""
    tell = _Teller(sum(wanted.values()), emit)
    documents = [iter(stream) for stream in streams]
    for part, tokens in wanted.items():
        writer = _Writer(folder / part, encode, length, tokens)
        given = [0] * len(streams)
        try:
            while writer.written < tokens:
                n = _turn(streams, given)
                ids = next(documents[n])
                if part == HELD_OUT:
                    streams[n].held_out.add(fingerprint(ids))
                written = writer.add(ids)
                given[n] += written
                tell(written, streams[n].source.spec)
            writer.close()
        finally:
            writer.abandon()


def _turn(streams: Sequence[Stream], given: Sequence[int]) -> int:
    """Return the number of the source that is furthest behind its weight."""
    return min(range(len(streams)), key=lambda n: given[n] / streams[n].source.weight)


def _wanted(source: DataSource, whole: float, tokens: int) -> int:
    return round(tokens * source.weight / whole)


def _tell_repeated(folder: Path, sources: Sequence[DataSource], tokens: int, emit: Emit) -> None:
    """Warn of the sources that ran dry when ``folder`` was made, as was done then."""
    try:
        used = json.loads((folder / MIXTURE).read_text(encoding="utf-8"))["used"]
        held = [each["holds"] for each in used]
    except (OSError, ValueError, KeyError, TypeError):
        return  # made by an earlier version: nothing but this warning needs the file
    whole = sum(source.weight for source in sources)
    for source, holds in zip(sources, held, strict=True):
        if holds:
            emit(repeated(source, holds, _wanted(source, whole, tokens)))


def _tell_skipped(streams: Sequence[Stream], emit: Emit) -> None:
    for stream in streams:
        if stream.skipped.rows:
            text = f"{stream.source.spec}: rows without text that were skipped: {stream.skipped.rows:,}"
            emit(Note(level="warning", text=text))


class _Teller:
    """Emits progress now and then, and at the end."""

    def __init__(self, total: int, emit: Emit) -> None:
        self._done, self._told, self._total, self._emit = 0, 0, total, emit

    def __call__(self, tokens: int, note: str) -> None:
        self._done += tokens
        if self._done - self._told >= self._total // STEPS or self._done == self._total:
            self._told = self._done
            self._emit(
                Progress(stage="data", done=self._done, total=self._total, unit="tokens", note=note)
            )


# ---- what the cache is named by


def _looked_up(source: DataSource, cache: Path, emit: Emit) -> tuple[DataSource, str | None]:
    """Return a source with its licence, and its commit: without the Hub the one that is in the cache."""
    try:
        return look_up(source)
    except Unreachable as error:
        revision = _earlier_revision(source.spec, cache)
        if revision is None:
            raise
        text = f"{error}; going on with what was prepared of its commit {revision[:12]}"
        emit(Note(level="warning", text=text))
        return source, revision


def _earlier_revision(spec: str, cache: Path) -> str | None:
    """Return the commit of a data set of the Hub that was last prepared here."""
    for path in sorted(cache.glob(f"*/{MIXTURE}"), key=os.path.getmtime, reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            for each in json.loads(path.read_text(encoding="utf-8"))["used"]:
                if each["spec"] == spec and each["revision"]:
                    return str(each["revision"])
    return None


def _content(source: DataSource, revision: str | None, emit: Emit) -> str:
    """Return what tells a source's content from any other, and how it is read."""
    if texts.is_builtin(source.spec):
        return f"{source.spec} {texts.text_hash(texts.read_texts(source.spec))}"
    path = texts.local_file(source.spec)
    if path is None:
        return f"{source.spec}@{revision}"
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    return f"{kind} {_sha256(path, emit)}"


def _sha256(path: Path, emit: Emit) -> str:
    digest, done, size = hashlib.sha256(), 0, path.stat().st_size
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
                done += len(block)
                emit(Progress(stage="data", done=done, total=size, unit="B", note=path.name))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {one_line(error)}") from error
    return digest.hexdigest()


# ---- folders


@contextmanager
def alone(folder: Path, emit: Emit) -> Iterator[None]:
    """Hold the lock of what is prepared; the system drops it with the process that holds it, so none is stale."""
    from filelock import FileLock, Timeout

    with disk_is_told(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            emit(Note(text="another process is preparing the same training data: waiting for it"))
            lock.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """Give a folder that takes the name of ``folder`` when all went well; whoever calls holds the lock."""
    unfinished = folder.with_name(f".{folder.name}.part")
    with disk_is_told(folder):
        for left in (unfinished, folder):  # of a process that was killed; damaged
            if left.exists():
                shutil.rmtree(left)
        unfinished.mkdir()
    try:
        yield unfinished
        with disk_is_told(folder):
            unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def synced(file: Any, close: bool = True) -> None:
    """Wait until the disk holds all of a file, and close it."""
    file.flush()
    os.fsync(file.fileno())
    if close:
        file.close()


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` and wait until the disk holds it; raises what ``disk_is_told`` raises."""
    with disk_is_told(path.parent), path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        synced(file)


def _check_room(cache: Path, needed: int) -> None:
    free = machine.disk_free(cache)
    if free < needed:
        raise _no_room(cache, needed, free)


@contextmanager
def disk_is_told(folder: Path) -> Iterator[None]:
    """Turn what the disk says into BadInput where it is full, else EdgepruneError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(folder, 0, machine.disk_free(folder.parent)) from error
        raise EdgepruneError(f"{folder} cannot be written: {one_line(error)}") from error


def _no_room(folder: Path, needed: int, free: int) -> BadInput:
    wants = f"needs {format_bytes(needed)} and" if needed else "does not fit, and"
    return BadInput(
        f"the disk is full: the training data in {folder} {wants} {format_bytes(free)} are free; "
        "make room, or keep it on another disk"
    )
