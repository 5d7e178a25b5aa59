"""Files on the far machine, by their content. Sent as text and run by the Python there (3.9 or newer), nothing else.

``store/SHA256`` under the far root is a file that was sent, whole and checked; ``store/SHA256.part`` is one of which
the beginning has arrived. Runs and environments use them by hard links, so that none is there twice.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import time
from pathlib import Path
from typing import Any

CHUNK = 1 << 20
PAUSE = 0.02
"""Seconds between two looks at a file that grows."""
PART_SECONDS = 24 * 3600.0
"""How long the beginning of a file waits for its rest."""


def root() -> Path:
    """Return the folder under which everything of edgeprune's is kept here; it is this user's alone."""
    base = os.environ.get("XDG_DATA_HOME", "")
    home = Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "share"
    folder = home / "edgeprune"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def store() -> Path:
    """Return the folder of the files that were sent."""
    folder = root() / "store"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def blob(sha256: str) -> Path:
    """Return where the file with this content is, or is to be. ValueError if that is no SHA-256."""
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"{sha256!r} is not a SHA-256")
    return store() / sha256


def part(sha256: str) -> Path:
    """Return where the beginning of the file with this content is."""
    return blob(sha256).with_name(sha256 + ".part")


def have(sizes: dict[str, int]) -> dict[str, Any]:
    """Say of files, by content and size in bytes, which are here and how much of the others is.

    Returns ``store`` (its path), ``whole`` (a list), ``parts`` (bytes, of those begun) and ``free`` (bytes).
    """
    whole = [each for each, size in sizes.items() if _size(blob(each)) == size]
    parts = {each: _size(part(each)) for each in sizes if each not in whole}
    return {
        "store": str(store()),
        "whole": whole,
        "parts": {each: size for each, size in parts.items() if size >= 0},
        "free": free(str(store())),
    }


def adopt(sizes: dict[str, int], patience: float = 0.0) -> list[str]:
    """Take what arrives into the store once it is whole and what it should be; return what is not.

    A file that grows is followed until it has not grown for ``patience`` seconds; its beginning is kept. What is
    damaged is removed.
    """
    return [each for each, size in sizes.items() if not _adopted(each, size, patience)]


def _adopted(sha256: str, size: int, patience: float) -> bool:
    path = part(sha256)
    found = _digest_of_growing(path, size, 0.0 if blob(sha256).exists() else patience)
    if found is None or _size(path) < 0:
        return _size(blob(sha256)) == size  # another process that sent the same may have been first
    if _size(path) != size or found != sha256:
        path.unlink()
        return False
    path.chmod(0o444)  # whoever uses it has a link to it, not a copy
    path.replace(blob(sha256))
    return True


def _digest_of_growing(path: Path, size: int, patience: float) -> str | None:
    """Return the SHA-256 of the first ``size`` bytes of a file as they come, None if they do not all come."""
    end = time.monotonic() + patience
    while _size(path) < 0:
        if time.monotonic() >= end:
            return None
        time.sleep(PAUSE)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while file.tell() < size:
            chunk = file.read(CHUNK)
            digest.update(chunk)
            if chunk:
                end = time.monotonic() + patience
            elif time.monotonic() >= end:
                return None
            else:
                time.sleep(PAUSE)
    return digest.hexdigest()


def free(path: str) -> int:
    """Return the bytes that are free on the disk of an existing folder."""
    return shutil.disk_usage(path).free


# ---- using what is in the store


def link_inputs(run: str, entries: list[list[str]]) -> str:
    """Make ``inputs`` of a run from the store: each entry a path in there and a content. Returns the folder.

    ValueError if a path leads out of it, or a content is not in the store.
    """
    if not re.fullmatch("[a-z0-9][a-z0-9-]{0,99}", run):
        raise ValueError(f"{run!r} is not the id of a run")
    return _link_all(("runs", run, "inputs"), entries)


def link_wheels(environment: str, entries: list[list[str]]) -> str:
    """Make the folder of the wheels for an environment from the store, as ``link_inputs``."""
    if not re.fullmatch("[0-9a-f]{1,64}", environment):
        raise ValueError(f"{environment!r} is not the id of an environment")
    return _link_all(("envs", environment, "wheels"), entries)


def _link_all(place: tuple[str, ...], entries: list[list[str]]) -> str:
    for path, sha256 in entries:
        _check_relative(path)
        if _size(blob(sha256)) < 0:
            raise ValueError(
                f"{path} is not in the store any more; the same command sends it again"
            )
    folder = _real_folder(root(), place)
    for path, sha256 in entries:
        *parents, name = path.split("/")
        _link(blob(sha256), _real_folder(folder, tuple(parents)) / name)
    return str(folder)


def _check_relative(path: str) -> None:
    if path.startswith("/") or "\0" in path or not {"", ".", ".."}.isdisjoint(path.split("/")):
        raise ValueError(f"{path!r} leads out of the folder of the run")


def _real_folder(base: Path, names: tuple[str, ...]) -> Path:
    """Return a folder below ``base``, made if need be. ValueError if a link is on the way there."""
    for name in names:
        base = base / name
        base.mkdir(mode=0o700, exist_ok=True)
        if base.is_symlink():
            raise ValueError(f"{base} is a link, not a folder; remove it")
    return base


def _link(source: Path, target: Path) -> None:
    if target.exists() and not target.is_symlink() and target.samefile(source):
        return
    beside = target.with_name(f".{os.getpid()}.link")
    try:
        os.link(str(source), str(beside))
    except OSError:  # a file system without hard links
        shutil.copyfile(str(source), str(beside))
    beside.replace(target)


def clean() -> int:
    """Remove what no run uses any more, and beginnings that nobody went on with; return the bytes freed."""
    for ready in (root() / "envs").glob("*/ready"):
        shutil.rmtree(str(ready.with_name("wheels")), ignore_errors=True)
    freed = 0
    for path in store().iterdir():
        found = path.lstat()
        stale = time.time() - found.st_mtime > PART_SECONDS
        if stat.S_ISREG(found.st_mode) and (stale if path.suffix else found.st_nlink == 1):
            path.unlink()
            freed += found.st_size
    return freed


# ---- what is to be fetched


def listing(folder: str, names: list[str]) -> list[dict[str, Any]]:
    """Describe everything below these names of a folder: ``path`` (from the folder), ``kind``, ``size`` in bytes,
    ``mtime``.

    ``kind`` is "file", or what else is there ("link", "other"), which is not looked into: only files have the
    other keys. ValueError if there is no such name.
    """
    found: list[dict[str, Any]] = []
    for name in names:
        if not os.path.lexists(str(Path(folder, name))):
            raise ValueError(f"{folder} has no {name}")
        _describe(folder, name, found)
    return found


def digests(folder: str, paths: list[str]) -> dict[str, str]:
    """Return the SHA-256 of files in a folder, in hexadecimal digits."""
    return {path: _digest(Path(folder, path)) for path in paths}


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(CHUNK), b""):
            found.update(chunk)
    return found.hexdigest()


def _describe(folder: str, path: str, found: list[dict[str, Any]]) -> None:
    place = Path(folder, path)
    status = place.lstat()
    if stat.S_ISDIR(status.st_mode):
        for each in sorted(place.iterdir()):
            _describe(folder, f"{path}/{each.name}", found)
    elif stat.S_ISREG(status.st_mode):
        facts = {"size": status.st_size, "mtime": status.st_mtime}
        found.append({"path": path, "kind": "file", **facts})
    else:
        kind = "link" if stat.S_ISLNK(status.st_mode) else "other"
        found.append({"path": path, "kind": kind})


def _size(path: Path) -> int:
    """Return the size of a regular file, -1 if there is none."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1
