"""Which run of which box a run's folder stands for. Imports nothing heavy: lists of runs ask this of every folder."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "remote.json"


@dataclass(frozen=True)
class Far:
    """A run on a box: the box's saved name or ssh:// address, and the run's id there."""

    host: str
    run: str

    def __str__(self) -> str:
        return f"{self.host}:{self.run}"


def parse(text: str) -> Far | None:
    """Return the run that ``NAME:RUN`` or ``ssh://user@host:RUN`` names; None if the text is neither, or a folder.

    The id of a run has a hyphen in it, and so is never a port.
    """
    found = re.fullmatch(r"([A-Za-z0-9][\w.-]+|ssh://\S+?):([a-z0-9]+(?:-[a-z0-9]+)+)", text)
    return Far(*found.groups()) if found and not Path(text).exists() else None


def read(folder: Path) -> Far | None:
    """Return the run on a box that the run in ``folder`` is; None if it is none."""
    try:
        found = json.loads((folder / FILE).read_text("utf-8"))
        return Far(str(found["host"]), str(found["run"]))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def write(folder: Path, far: Far) -> None:
    """Keep which run of which box the run in ``folder`` is."""
    temporary = folder / f"{FILE}.tmp"
    temporary.write_text(json.dumps(asdict(far)), "utf-8")
    temporary.replace(folder / FILE)
