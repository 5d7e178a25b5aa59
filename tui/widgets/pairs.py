"""Facts: labels with their texts, which are wrapped below each other."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

from textual.widgets import Static


class Pairs(Static):
    """A column of labels and one of texts."""

    def __init__(self, id: str) -> None:
        super().__init__(id=id, markup=False)
        self._pairs: list[tuple[str, str]] = []

    def show(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Show these."""
        self._pairs = list(pairs)
        self.on_resize()

    def on_resize(self) -> None:
        """Wrap to the width there is."""
        self.update(laid_out(self._pairs, self.size.width or 76))


def laid_out(pairs: Sequence[tuple[str, str]], width: int) -> str:
    """Return the pairs as lines of at most ``width``."""
    indent = max((len(label) + 2 for label, _ in pairs if label), default=0)
    return "\n".join(line for pair in pairs for line in _lines(*pair, indent, width))


def _lines(label: str, text: str, indent: int, width: int) -> list[str]:
    room = max(20, width - indent)
    wrapped = [
        line
        for paragraph in text.splitlines()
        for line in wrap(paragraph, room, break_on_hyphens=False)
    ]
    first, *rest = wrapped or [""]
    return [f"{label:<{indent}}{first}", *(" " * indent + line for line in rest)]
