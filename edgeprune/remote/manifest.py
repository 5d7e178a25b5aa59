"""What another machine says it has, judged before anything of it is written here.

Whoever holds that machine could name any path. One entry that could lead out of the folder that it is meant for, or
that stands for something other than a file, is reason to take none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.errors import BadInput

LONGEST_NAME = 255
"""Bytes of a file name."""
LATEST = 2.0**36
"""Seconds since the epoch that every file system can keep."""

_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """A file there: ``path`` from the folder that was asked for, ``size`` in bytes, ``mtime`` in seconds."""

    path: str
    size: int
    mtime: float

    @property
    def top(self) -> str:
        """The first name of the path."""
        return self.path.partition("/")[0]


def read(answer: Any, names: Sequence[str], where: str) -> list[Entry]:
    """Return the files that ``answer`` describes, all of them below ``names``.

    Raises:
        BadInput: naming the first entry that is no harmless description of a file; the text begins with ``where``.
    """
    if not isinstance(answer, list):
        raise BadInput(f"{where}: what it answered is no list of files")
    return [_entry(each, names, where) for each in answer]


def _entry(said: Any, names: Sequence[str], where: str) -> Entry:
    said = said if isinstance(said, dict) else {}
    path = said.get("path")
    reason = why_unsafe(path) or _why_wrong(said)
    if not reason and str(path).partition("/")[0] not in names:
        reason = "was not asked for"
    if reason:
        raise BadInput(f"{where}: {path!r:.200} {reason}; nothing was fetched")
    return Entry(str(path), said["size"], float(said["mtime"]))


def why_unsafe(path: Any) -> str:
    """Return what is wrong with a path, from "/" to "/", below which something is to be written; empty if nothing."""
    if not isinstance(path, str) or not path:
        return "is no path"
    if path.startswith(("/", "\\")) or re.match("[A-Za-z]:", path):
        return "is an absolute path"
    if re.search(r"[\x00-\x1f\x7f\\:]", path):
        return "has a character that file names do not have everywhere"
    return next(filter(None, map(_why_unsafe_name, path.split("/"))), "")


def _why_unsafe_name(name: str) -> str:
    if name in ("", ".", ".."):
        return "leads elsewhere"
    if _RESERVED.fullmatch(name) or name.endswith((" ", ".")):
        return "has a name that some systems reserve"
    try:
        return "has too long a name" if len(name.encode()) > LONGEST_NAME else ""
    except UnicodeEncodeError:
        return "is no text"


def _why_wrong(said: dict[str, Any]) -> str:
    size, mtime = said.get("size"), said.get("mtime")
    if said.get("kind") != "file":
        return f"is no file, but a {said.get('kind')!r:.20}"
    if type(size) is not int or size < 0:
        return f"has no size: {size!r:.20}"
    if type(mtime) not in (int, float) or not 0 <= mtime < LATEST:  # type: ignore[operator]
        return f"has no time: {mtime!r:.20}"
    return ""


# ---- in a folder here


def check_places(entries: Iterable[Entry], folder: Path, where: str) -> None:
    """See to it that the files can be put below ``folder`` without touching anything else.

    Raises:
        BadInput: if two of them would be one, or a link or something else is in the place of one.
    """
    seen: dict[str, tuple[str, bool]] = {}
    same = _fold if folds_case(folder) else str
    for entry in entries:
        reason = _why_twice(entry.path, seen, same) or _why_taken(folder, entry.path)
        if reason:
            raise BadInput(f"{where}: {entry.path!r:.200} {reason}; nothing was fetched")


def _why_twice(path: str, seen: dict[str, tuple[str, bool]], same: Callable[[str], str]) -> str:
    parts = path.split("/")
    for depth in range(1, len(parts) + 1):
        spelled, is_file = "/".join(parts[:depth]), depth == len(parts)
        earlier = seen.get(same(spelled))
        if earlier and (is_file or earlier != (spelled, False)):
            return f"would be the same as {earlier[0]!r:.200} here"
        seen[same(spelled)] = spelled, is_file
    return ""


def _why_taken(folder: Path, path: str) -> str:
    *parents, name = path.split("/")
    for parent in parents:
        folder /= parent
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            return f"cannot be put here: {folder} is no folder"
    target = folder / name
    if target.is_symlink() or (target.exists() and not target.is_file()):
        return f"cannot be put here: {target} is no file"
    return ""


def folds_case(folder: Path) -> bool:
    """Tell whether the file system of ``folder`` takes "a" and "A" for the same; nothing is written for that."""
    for place in (folder.absolute(), *folder.absolute().parents):
        other = place.with_name(place.name.swapcase()) if place.name else place
        if place.exists() and other != place:
            return other.exists() and other.samefile(place)
    return False


def _fold(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
