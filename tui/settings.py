"""What the user of the app has chosen to keep: the theme, and keys of their own.

``app.toml`` in the user's config directory::

    theme = "nord"

    [keys]                      # the ids are listed by F1
    "run.pause" = "space"
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from edgeprune.locations import config_folder


@dataclass(frozen=True)
class Settings:
    """The choices, and what was wrong in the file."""

    theme: str = ""
    keys: dict[str, str] = field(default_factory=dict)
    problem: str = ""


def path() -> Path:
    """Return where the file is."""
    return config_folder() / "app.toml"


def load() -> Settings:
    """Return the settings; a file that cannot be read is told of and otherwise ignored."""
    try:
        data = tomllib.loads(path().read_text("utf-8"))
    except FileNotFoundError:
        return Settings()
    except (OSError, ValueError, RuntimeError) as error:
        return Settings(problem=f"{path()}: not read: {error}")
    theme, keys = data.get("theme", ""), data.get("keys", {})
    if not isinstance(theme, str) or not isinstance(keys, dict):
        return Settings(problem=f'{path()}: theme must be a name and [keys] pairs of id = "key"')
    wrong = [key for key, value in keys.items() if not isinstance(value, str)]
    problem = f'{path()}: keys must be names such as "space": {", ".join(wrong)}' if wrong else ""
    return Settings(theme, {k: v for k, v in keys.items() if isinstance(v, str)}, problem)


def save_theme(theme: str) -> str:
    """Keep ``theme`` and leave the rest of the file alone; return what went wrong, or nothing."""
    import tomli_w

    file = path()
    try:
        data = tomllib.loads(file.read_text("utf-8")) if file.exists() else {}
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(tomli_w.dumps(data | {"theme": theme}), "utf-8")
        temporary.replace(file)
    except (OSError, ValueError, RuntimeError) as error:
        return f"{file}: the theme was not kept: {error}"
    return ""
