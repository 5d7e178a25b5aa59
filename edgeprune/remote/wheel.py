"""The edgeprune that is running, as a wheel for another machine, however it is installed here."""

from __future__ import annotations

import hashlib
import importlib.util
import zipfile
from base64 import urlsafe_b64encode
from importlib.metadata import Distribution, distributions
from pathlib import Path

from edgeprune.errors import EdgepruneError

PACKAGE = "edgeprune"
PARTS = ("edgeprune", "edgeprune.exporters", "edgeprune.profiles", "edgeprune.tui")
"""The packages that have folders of their own in a checkout; installed, the first holds the others."""
EARLIEST = (1980, 1, 1, 0, 0, 0)  # a zip file knows no earlier time, and this one no other
WHEEL = """Wheel-Version: 1.0
Generator: edgeprune
Root-Is-Purelib: true
Tag: py3-none-any
"""


def build(folder: Path) -> Path:
    """Write ``edgeprune-VERSION-py3-none-any.whl`` into ``folder`` and return its path.

    The same code gives the same bytes, on any machine.
    """
    installed = _installed()
    about = f"{PACKAGE}-{installed.version}.dist-info"
    content = _code() | {f"{about}/{name}": data for name, data in _about(installed).items()}
    content[f"{about}/RECORD"] = _record(content, f"{about}/RECORD")
    path = folder / f"{PACKAGE}-{installed.version}-py3-none-any.whl"
    unfinished = path.with_suffix(".tmp")
    with zipfile.ZipFile(unfinished, "w") as file:  # stored: compressors differ between machines
        for name, data in content.items():
            file.writestr(_entry(name), data)
    return unfinished.replace(path)


def _installed() -> Distribution:
    """Return what is installed, not what a build left in a checkout that is the current folder."""
    found = sorted(distributions(name=PACKAGE), key=lambda each: each.read_text("METADATA") is None)
    if not found:
        raise EdgepruneError(
            "edgeprune runs here without being installed; install it with pip first"
        )
    return found[0]


def _code() -> dict[str, bytes]:
    """Return the files of the packages, by their names in the wheel, in order."""
    found = {}
    for part in PARTS:
        spec = importlib.util.find_spec(part)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        for place in map(Path, spec.submodule_search_locations):
            for path in place.rglob("*"):
                name = path.relative_to(place).as_posix()
                if path.is_file() and not _is_left_out(name):
                    found[f"{part.replace('.', '/')}/{name}"] = path.read_bytes()
    return dict(sorted(found.items()))


def _is_left_out(name: str) -> bool:
    return any(part == "__pycache__" or part.startswith(".") for part in name.split("/"))


def _about(installed: Distribution) -> dict[str, bytes]:
    names = {
        "METADATA": installed.read_text("METADATA") or installed.read_text("PKG-INFO"),
        "WHEEL": WHEEL,
        "entry_points.txt": installed.read_text("entry_points.txt"),
        "licenses/LICENSE": installed.read_text("licenses/LICENSE"),
    }
    return {name: text.encode() for name, text in names.items() if text is not None}


def _record(content: dict[str, bytes], own: str) -> bytes:
    lines = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in content.items()]
    return "\n".join([*lines, f"{own},,", ""]).encode()


def _digest(data: bytes) -> str:
    return urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, EARLIEST)
    entry.create_system = 3  # Unix, whose permissions follow
    entry.external_attr = 0o100644 << 16
    return entry
