"""Where things are: the folders in which edgeprune keeps what belongs to this user (XDG), and names without them."""

from __future__ import annotations

import os
from pathlib import Path


def state_folder() -> Path:
    """Return where edgeprune keeps what it remembers of this user's work."""
    return _of("XDG_STATE_HOME", "~/.local/state")


def config_folder() -> Path:
    """Return where this user's choices are."""
    return _of("XDG_CONFIG_HOME", "~/.config")


def own_name(spec: str) -> str:
    """Return a file's or folder's own name, anything else as it is: for what is passed on to others."""
    return Path(spec).name if Path(spec).is_absolute() else spec


def _of(variable: str, default: str) -> Path:
    base = os.environ.get(variable, "")
    # The specification: a relative path is to be ignored.
    home = Path(base) if Path(base).is_absolute() else Path(default).expanduser()
    return home / "edgeprune"
