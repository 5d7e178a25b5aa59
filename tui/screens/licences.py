"""The licences of the data of a mixture, before it is used."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Label, Static

from edgeprune.tui.lists import Page
from edgeprune.tui.widgets.footer import KeyFooter


class LicencesScreen(ModalScreen[bool]):
    """Shows each data set with its licence; answers whether to go on."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "answer(True)", "Train on these", id="licences.agree", priority=True),
        Binding("escape", "answer(False)", "Back", id="licences.back"),
    ]

    def __init__(self, licences: list[tuple[str, str]]) -> None:
        super().__init__()
        self._licences = licences

    def compose(self) -> ComposeResult:
        """Make the list."""
        with Vertical(classes="dialog"):
            yield Label("Data sets and their licences", classes="dialog-title")
            with Page():
                for name, licence in self._licences:
                    yield Static(name, markup=False)
                    yield Static(licence, classes="licence", markup=False)
            yield Static(
                "They are downloaded from the Hub. Whether you may use them is for you to decide.",
                classes="hint",
            )
        yield KeyFooter()

    def on_mount(self) -> None:
        """Let the list scroll."""
        self.query_one(Page).focus()

    def action_answer(self, agreed: bool) -> None:
        """Close with the answer."""
        self.dismiss(agreed)
