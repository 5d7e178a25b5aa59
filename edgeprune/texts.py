"""Texts to calibrate on and to measure with: files, data sets of the Hub, or Python's own help.

A text is read as documents, one after the other: data sets, JSON lines and parquet are streamed.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from edgeprune.errors import BadInput, EdgepruneError, one_line

BUILTIN, BUILTIN_HELD_OUT = "builtin", "builtin-heldout"
COLUMNS = ("text", "page", "content")
FORMATS = (".txt", ".jsonl", ".json", ".parquet")
# what a file, compressed or not, raises when it is damaged or may not be read
UNREADABLE = (OSError, EOFError, zlib.error)


def read_texts(spec: str | Path) -> Iterator[str]:
    """Yield the documents of a text, none of them blank.

    ``spec`` is a file (.txt, .jsonl, .json, .parquet, or one of them with .gz), a data set of the
    Hub as ``name[:config][:split]``, ``builtin`` for the English help texts inside every Python
    (the even ones, to calibrate on) or ``builtin-heldout`` (the odd ones, to measure with). A plain
    text is one document. BadInput if there is no such text, or it is empty, binary, damaged or
    without a text column.
    """
    documents = (d for d in _documents(str(spec)) if d.strip())
    first = next(documents, None)
    if first is None:
        raise BadInput(f"{spec} is empty: it holds no text; give another text")
    return itertools.chain([first], documents)


def text_hash(documents: Iterable[str]) -> str:
    """Return the SHA-256 of documents in their order, as hexadecimal digits."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.encode("utf-8", errors="replace") + b"\0")
    return digest.hexdigest()


def _documents(spec: str) -> Iterator[str]:
    if spec in (BUILTIN, BUILTIN_HELD_OUT):
        return _builtin(odd=spec == BUILTIN_HELD_OUT)
    path = Path(spec).expanduser()
    if path.is_file():
        return _file(path)
    if path.is_dir():
        raise BadInput(f"{spec} is a folder; give one text file in it ({', '.join(FORMATS)})")
    if path.suffix in (*FORMATS, ".gz") or spec.startswith((".", "/", "~")) or "\\" in spec:
        raise BadInput(f"there is no file {spec}; check the path, or use {BUILTIN}")
    return _data_set(spec)


# ---- what every Python carries


def _builtin(*, odd: bool) -> Iterator[str]:
    from pydoc_data import topics

    # topics repeat each other in part or whole; a paragraph stays in the longest one that has it
    seen: set[str] = set()
    own: dict[str, str] = {}
    for name in sorted(topics.topics, key=lambda name: (-len(topics.topics[name]), name)):
        paragraphs = [p for p in topics.topics[name].split("\n\n") if p not in seen]
        seen.update(paragraphs)
        own[name] = "\n\n".join(paragraphs)
    names = sorted(name for name, text in own.items() if text)
    return (own[name] for name in names[int(odd) :: 2])


# ---- files


def _file(path: Path) -> Iterator[str]:
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if path.stat().st_size == 0:
        raise BadInput(f"{path} is empty; give a file with text in it")
    if kind == ".parquet":
        return _parquet(path)
    _refuse_binary(path)
    if kind == ".jsonl":
        return _json_lines(path)
    if kind == ".json":
        return _json(path)
    return iter([_whole(path)])


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _refuse_binary(path: Path) -> None:
    try:
        with _open(path) as file:
            start = file.read(65536)
    except UNREADABLE as error:
        raise BadInput(f"{path} cannot be read: {one_line(error)}") from error
    # a character may be cut at the end of the sample, never before it
    text = start.decode("utf-8", errors="replace")[:-4]
    odd = sum(c == "\ufffd" or (c < " " and c not in "\t\n\r\f\x1b") for c in text)
    if "\0" in text or odd > len(text) / 100:
        raise BadInput(
            f"{path} is binary, not text in UTF-8; give one of {', '.join(FORMATS)}, or .gz of it"
        )


def _whole(path: Path) -> str:
    try:
        with _open(path) as file:
            return file.read().decode("utf-8", errors="replace")
    except UNREADABLE as error:
        raise BadInput(f"{path} cannot be read: {one_line(error)}") from error


def _json_lines(path: Path) -> Iterator[str]:
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _text_of(_parsed(line, f"{path}, line {number}"), path)
    except UNREADABLE as error:
        raise BadInput(f"{path} cannot be read: {one_line(error)}") from error


def _json(path: Path) -> Iterator[str]:
    value = _parsed(_whole(path).encode(), str(path))
    if isinstance(value, dict) and not any(column in value for column in COLUMNS):
        # one level down, as in {"data": [...]}
        lists = [rows for rows in value.values() if isinstance(rows, list)]
        value = lists[0] if lists else [value]
    for row in value if isinstance(value, list) else [value]:
        yield _text_of(row, path)


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadInput(f"{where}: not valid JSON ({one_line(error)})") from error


def _text_of(row: Any, path: Path) -> str:
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        for column in COLUMNS:
            if isinstance(row.get(column), str):
                return str(row[column])
    has = (
        f"it has {', '.join(map(str, row))}" if isinstance(row, dict) else "its rows are no objects"
    )
    raise BadInput(f"{path} has no text column ({', '.join(COLUMNS)}): {has}; rename one")


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _open(path) as file:
            table = pq.ParquetFile(file)
            column = _column(table.schema_arrow.names, str(path))
            for batch in table.iter_batches(columns=[column], batch_size=256):
                yield from (str(text) for text in batch.column(0).to_pylist() if text)
    except (pa.ArrowException, *UNREADABLE) as error:
        raise BadInput(f"{path} cannot be read as parquet: {one_line(error)}") from error


def _column(names: Iterable[str], what: str) -> str:
    names = list(names)
    for column in COLUMNS:
        if column in names:
            return column
    raise BadInput(
        f"{what} has no text column ({', '.join(COLUMNS)}): it has {', '.join(names)}; rename one"
    )


# ---- data sets of the Hub


def _data_set(spec: str) -> Iterator[str]:
    """Stream ``name[:config][:split]``; of two parts the second is a split if it is called so."""
    from datasets import exceptions, load_dataset
    from datasets.utils import logging

    name, config, split = _split_spec(spec)
    logging.disable_progress_bar()
    try:
        rows = load_dataset(name, config, split=split, streaming=True)
        names = rows.column_names or list(next(iter(rows)))
    except EdgepruneError:
        raise
    except (exceptions.DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise BadInput(
            f"no such text: '{name}' is neither a file nor a data set of the Hub within reach; "
            f"check the spelling and the network, or use {BUILTIN}"
        ) from error
    except Exception as error:  # the builder of a data set fails in its own way
        raise BadInput(f"the data set '{spec}' cannot be read: {one_line(error)}") from error
    column = _column(names, f"the data set '{spec}'")
    return (str(row[column]) for row in rows if row[column])


def _split_spec(spec: str) -> tuple[str, str | None, str]:
    name, *rest = spec.split(":")
    if not name or len(rest) > 2:
        raise BadInput(f"'{spec}' names no text; write a file, {BUILTIN}, or name[:config][:split]")
    splits = ("train", "validation", "test")
    if len(rest) == 1 and rest[0].partition("[")[0] in splits:
        return name, None, rest[0]
    return name, rest[0] if rest else None, rest[1] if len(rest) == 2 else "train"
