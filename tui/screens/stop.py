"""The question before a run is stopped: what stays, and how to go on."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Label, Static

from edgeprune.tui.lists import Page
from edgeprune.tui.widgets.footer import KeyFooter


class StopScreen(ModalScreen[bool]):
    """Says ``what`` a stop comes to; its answer is whether to."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "answer(True)", "Stop the run", id="stop.stop"),
        Binding("escape", "answer(False)", "Let it run", id="stop.cancel"),
    ]

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what

    def compose(self) -> ComposeResult:
        """Make the dialog."""
        with Vertical(classes="dialog"):
            yield Label("Stop this run?", classes="dialog-title")
            with Page():
                yield Static(self._what, markup=False)
            yield Label("Enter stops it, Escape lets it run.", classes="hint")
        yield KeyFooter()

    def action_answer(self, stop: bool) -> None:
        """Close, and tell the answer."""
        self.dismiss(stop)
