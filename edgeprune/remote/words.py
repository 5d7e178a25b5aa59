"""What another machine said, made fit for a terminal here."""

from __future__ import annotations

import re
from typing import Any

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def harmless(said: Any) -> Any:
    """Return a JSON value with "?" for every control character in its texts but tabs and ends of lines.

    Those could tell the terminal to show something else than what was said.
    """
    if isinstance(said, str):
        return _CONTROL.sub("?", said)
    if isinstance(said, list):
        return [harmless(each) for each in said]
    if isinstance(said, dict):
        return {harmless(key): harmless(value) for key, value in said.items()}
    return said
