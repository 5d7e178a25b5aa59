"""Texts to calibrate on and to measure with: files, data sets of the Hub, or Python's own help.

A text is read as documents, one after the other: data sets, JSON lines and parquet are streamed.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from edgeprune.errors import BadInput, EdgepruneError, one_line

BUILTIN, BUILTIN_HELD_OUT = "builtin", "builtin-heldout"
COLUMNS = ("text", "page", "content")
FORMATS = (".txt", ".jsonl", ".json", ".parquet")
# characters that a row of a plain text has at most: several times what a training sequence takes
LONGEST_ROW = 32_768
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


def read_rows(
    spec: str | Path, columns: Collection[str] = COLUMNS, *, revision: str | None = None
) -> Iterator[Any]:
    """Yield the rows of a text (see ``read_texts``) as they are stored, one after the other, never all in memory.

    A row is what a line of JSON holds, or a dict of a table's columns; of a plain text it is a piece of up to
    ``LONGEST_ROW`` characters that ends with a line. ``columns`` are those that the caller understands: of a table only
    these are read, and a JSON object that has one of them is itself a row. ``revision`` is the commit of a data set of
    the Hub. BadInput as ``read_texts``, but not for rows without text; EdgepruneError if the Hub fails on the way.
    """
    spec = str(spec)
    if is_builtin(spec):
        return _builtin(odd=spec == BUILTIN_HELD_OUT)
    path = local_file(spec)
    if path is None:
        _, rows = _data_set(spec, revision)
        return rows
    kind = _kind(path)
    if kind == ".jsonl":
        return _json_lines(path)
    if kind == ".json":
        return _json(path, columns)
    if kind == ".parquet":
        return _parquet(path, lambda names: _understood(names, columns, str(path)))
    return _plain(path)


def is_builtin(spec: str) -> bool:
    """Whether a text is one of those inside every Python."""
    return spec in (BUILTIN, BUILTIN_HELD_OUT)


def local_file(spec: str) -> Path | None:
    """Return the file that ``spec`` names; None if it looks like a data set of the Hub.

    BadInput if it looks like a file and is none.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise BadInput(f"{spec} is a folder; give one text file in it ({', '.join(FORMATS)})")
    if path.suffix in (*FORMATS, ".gz") or spec.startswith((".", "/", "~")) or "\\" in spec:
        raise BadInput(f"there is no file {spec}; check the path, or use {BUILTIN}")
    return None


def split_rows(text: IO[str]) -> Iterator[str]:
    """Yield the text in pieces of up to ``LONGEST_ROW`` characters, cut after a line or else a word."""
    rest = ""
    while block := text.read(LONGEST_ROW - len(rest)):
        rest += block
        if len(rest) < LONGEST_ROW:
            continue
        half = LONGEST_ROW // 2
        cut = (rest.rfind("\n", half) + 1) or (rest.rfind(" ", half) + 1) or len(rest)
        yield rest[:cut]
        rest = rest[cut:]
    if rest:
        yield rest


def _documents(spec: str) -> Iterator[str]:
    if is_builtin(spec):
        return _builtin(odd=spec == BUILTIN_HELD_OUT)
    path = local_file(spec)
    return _file(path) if path else _texts_of_data_set(spec)


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
    kind = _kind(path)
    if kind == ".parquet":
        rows = _parquet(path, lambda names: [_column(names, str(path))])
        return (str(text) for row in rows for text in row.values() if text)
    if kind == ".jsonl":
        return (_text_of(row, path) for row in _json_lines(path))
    if kind == ".json":
        return (_text_of(row, path) for row in _json(path, COLUMNS))
    return iter([_whole(path)])


def _kind(path: Path) -> str:
    """Return the suffix that says how a file is read; BadInput if it is empty or binary."""
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if path.stat().st_size == 0:
        raise BadInput(f"{path} is empty; give a file with text in it")
    if kind != ".parquet":
        _refuse_binary(path)
    return kind


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


def _plain(path: Path) -> Iterator[str]:
    try:
        # newline="" leaves the ends of lines as they are
        with (
            _open(path) as file,
            io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="") as text,
        ):
            yield from split_rows(text)
    except UNREADABLE as error:
        raise BadInput(f"{path} cannot be read: {one_line(error)}") from error


def _json_lines(path: Path) -> Iterator[Any]:
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parsed(line, f"{path}, line {number}")
    except UNREADABLE as error:
        raise BadInput(f"{path} cannot be read: {one_line(error)}") from error


def _json(path: Path, columns: Collection[str]) -> Iterator[Any]:
    value = _parsed(_whole(path).encode(), str(path))
    if isinstance(value, dict) and not any(column in value for column in columns):
        # one level down, as in {"data": [...]}
        lists = [rows for rows in value.values() if isinstance(rows, list)]
        value = lists[0] if lists else [value]
    yield from value if isinstance(value, list) else [value]


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


def _parquet(path: Path, choose: Callable[[list[str]], list[str]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table with the columns that ``choose`` picks of its names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _open(path) as file:
            table = pq.ParquetFile(file)
            columns = choose(table.schema_arrow.names)
            for batch in table.iter_batches(columns=columns, batch_size=256):
                yield from batch.to_pylist()
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


def _understood(names: Iterable[str], columns: Collection[str], what: str) -> list[str]:
    names = list(names)
    found = [name for name in names if name in columns]
    if found:
        return found
    raise BadInput(
        f"{what} has no column that is understood: it has {', '.join(names)}; rename one to text"
    )


# ---- data sets of the Hub


def _texts_of_data_set(spec: str) -> Iterator[str]:
    names, rows = _data_set(spec)
    column = _column(names, f"the data set '{spec}'")
    return (str(row[column]) for row in rows if row[column])


def _data_set(spec: str, revision: str | None = None) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """Stream ``name[:config][:split]``: the names of its columns, and its rows."""
    from datasets import exceptions, load_dataset
    from datasets.utils import logging

    name, config, split = split_spec(spec)
    logging.disable_progress_bar()
    try:
        rows = load_dataset(name, config, split=split, revision=revision, streaming=True)
        names = rows.column_names or list(next(iter(rows)))
    except EdgepruneError:
        raise
    except (exceptions.DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        if "gated" in str(error):
            raise BadInput(
                f"'{name}' is gated: accept its terms at https://huggingface.co/datasets/{name}, "
                "then run `hf auth login`"
            ) from error
        raise BadInput(
            f"no such text: '{name}' is neither a file nor a data set of the Hub within reach; "
            f"check the spelling and the network, or use {BUILTIN}"
        ) from error
    except Exception as error:  # the builder of a data set fails in its own way
        raise BadInput(f"the data set '{spec}' cannot be read: {one_line(error)}") from error
    return names, _streamed(rows, spec)


def _streamed(rows: Iterable[dict[str, Any]], spec: str) -> Iterator[dict[str, Any]]:
    try:
        yield from rows
    except Exception as error:  # what is left when the library has tried often enough
        raise EdgepruneError(
            f"reading the data set '{spec}' failed ({one_line(error)}); check the network and begin again"
        ) from error


def split_spec(spec: str) -> tuple[str, str | None, str]:
    """Return name, config and split of a data set; of two parts the second is a split if it is called so.

    BadInput if ``spec`` names none.
    """
    name, *rest = spec.split(":")
    if not name or len(rest) > 2:
        raise BadInput(f"'{spec}' names no text; write a file, {BUILTIN}, or name[:config][:split]")
    splits = ("train", "validation", "test")
    if len(rest) == 1 and rest[0].partition("[")[0] in splits:
        return name, None, rest[0]
    return name, rest[0] if rest else None, rest[1] if len(rest) == 2 else "train"
