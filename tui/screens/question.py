"""Questions that are answered by yes or no."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Label, Static

from edgeprune.tui.lists import Page
from edgeprune.tui.widgets.footer import KeyFooter


class Question(ModalScreen[bool]):
    """Says ``what`` a yes comes to; its answer is whether to."""

    ASKED: ClassVar[str]
    HINT: ClassVar[str]

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what

    def compose(self) -> ComposeResult:
        """Make the dialog."""
        with Vertical(classes="dialog"):
            yield Label(self.ASKED, classes="dialog-title")
            with Page():
                yield Static(self._what, markup=False)
            yield Label(self.HINT, classes="hint")
        yield KeyFooter()

    def action_answer(self, yes: bool) -> None:
        """Close, and tell the answer."""
        self.dismiss(yes)


class StopScreen(Question):
    """Asked before a run is stopped: what stays, and how to go on."""

    ASKED = "Stop this run?"
    HINT = "Enter stops it, Escape lets it run."
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "answer(True)", "Stop the run", id="stop.stop"),
        Binding("escape", "answer(False)", "Let it run", id="stop.cancel"),
    ]


class RemoveScreen(Question):
    """Asked before a host is taken off the list."""

    ASKED = "Take this host off the list?"
    HINT = "Enter takes it off, Escape keeps it."
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "answer(True)", "Take it off", id="remove.remove"),
        Binding("escape", "answer(False)", "Keep it", id="remove.cancel"),
    ]


class TrustScreen(Question):
    """Asked before the key of a host is accepted: not by Enter, which is pressed too easily."""

    ASKED = "Is this the key of that machine?"
    HINT = "y accepts this key and no other, Escape does not."
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Yes, accept it", id="trust.accept"),
        Binding("escape", "answer(False)", "No", id="trust.refuse"),
    ]
