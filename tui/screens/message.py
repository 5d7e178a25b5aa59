"""A dialog that tells what went wrong and what to do."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Label, Static

from edgeprune.tui.lists import Page
from edgeprune.tui.widgets.footer import KeyFooter


class MessageScreen(ModalScreen[None]):
    """Shows ``text`` under ``title`` until a key is pressed."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter,escape", "dismiss", "Close", id="message.close"),
        Binding("y", "copy", "Copy", id="message.copy", tooltip="Copy the text"),
    ]

    def __init__(self, title: str, text: str) -> None:
        super().__init__()
        self._title = title
        self.text = text

    def compose(self) -> ComposeResult:
        """Make the dialog."""
        with Vertical(classes="dialog"):
            yield Label(self._title, classes="dialog-title", markup=False)
            with Page():
                yield Static(self.text, markup=False)
        yield KeyFooter()

    def action_copy(self) -> None:
        """Copy the text, over SSH as well (OSC 52)."""
        self.app.copy_to_clipboard(self.text)
        self.notify("Copied")
