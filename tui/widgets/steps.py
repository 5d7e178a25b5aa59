"""Where in the wizard the user is."""

from __future__ import annotations

from textual.content import Content
from textual.widgets import Static

STEPS = ("Source", "Target", "Recipe", "Preflight")


class Steps(Static):
    """The steps in a line: those done are ticked, the current one stands in brackets."""

    def __init__(self, current: int) -> None:
        """``current`` counts from 1."""
        super().__init__(_line(current))


def _line(current: int) -> Content:
    steps = [_step(number, title, current) for number, title in enumerate(STEPS, 1)]
    return Content(" > ").join(steps)


def _step(number: int, title: str, current: int) -> Content:
    text = f"{number} {title}"
    if number == current:
        return Content.styled(f"[{text}]", "bold reverse")
    return Content.styled(f"✓ {text}" if number < current else text, "dim")
