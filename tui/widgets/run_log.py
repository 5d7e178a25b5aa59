"""The log of a run, for people: it follows as lines come, unless one has scrolled up to read."""

from __future__ import annotations

import time
from typing import ClassVar

from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.widgets import RichLog

from edgeprune.tui.picture import LINES, Line, Picture

MARKS = {"info": "", "warning": "warning: ", "error": "error: "}


class RunLog(RichLog):
    """Shows the lines of a picture."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"run-log--warning", "run-log--error", "run-log--time"}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "scroll_down", "Down", show=False, id="list.down"),
        Binding("k", "scroll_up", "Up", show=False, id="list.up"),
        Binding("g", "scroll_home", "First", show=False, id="list.first"),
        Binding("G", "scroll_end", "Last", show=False, id="list.last"),
    ]

    def __init__(self, id: str, classes: str) -> None:
        super().__init__(id=id, classes=classes, wrap=True, max_lines=4 * LINES, min_width=20)
        self._picture = Picture()
        self._shown = 0
        self._width = 0

    def show(self, picture: Picture) -> None:
        """Write what is new of ``picture``, which only grows; another one is written from its beginning."""
        if picture is not self._picture:
            self._picture = picture
            self._empty()
        new = min(picture.told - self._shown, len(picture.lines))
        if new <= 0:
            return
        self._shown = picture.told
        at_end = self.is_vertical_scroll_end
        for line in list(picture.lines)[-new:]:
            # expand: else no wider than Rich takes the terminal to be, which may be 80 columns.
            self.write(self._text(line), expand=True, scroll_end=at_end)

    def on_resize(self, event: events.Resize) -> None:
        """Wrap anew: what is written keeps its width."""
        if event.size.width != self._width:
            self._width = event.size.width
            self._empty()
            self.show(self._picture)

    def _empty(self) -> None:
        self.clear()
        self._shown = 0

    def _text(self, line: Line) -> Text:
        clock = time.strftime("%H:%M:%S", time.localtime(line.time))
        style = None
        if line.level != "info":
            style = self.get_component_rich_style(f"run-log--{line.level}")
        return Text.assemble(
            (f"{clock}  ", self.get_component_rich_style("run-log--time")),
            (f"{MARKS[line.level]}{line.text}", style or ""),
        )
