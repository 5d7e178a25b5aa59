"""What a measurement leaves on a board. Sent as text and run by the Python there (3.9 or newer), nothing else."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

LEFT_SECONDS = 24 * 3600.0
"""After this time nobody measures any more with what a broken link left behind."""


def root() -> Path:
    """Return the folder under which everything of edgeprune's is kept here."""
    base = os.environ.get("XDG_DATA_HOME", "")
    home = Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "share"
    return home / "edgeprune"


def remove(run: str) -> None:
    """Remove the folder of the measurement ``run``, and those that earlier ones left. ValueError if it is none."""
    if not re.fullmatch("profile-[0-9a-f]+", run):
        raise ValueError(f"{run!r} is not the id of a measurement")
    for folder in (root() / "runs").glob("profile-*"):
        if folder.name == run or time.time() - folder.stat().st_mtime > LEFT_SECONDS:
            shutil.rmtree(str(folder), ignore_errors=True)
