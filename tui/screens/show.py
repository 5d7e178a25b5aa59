"""The recipe as it stands, and the command line that does the same as the app."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, Label, Static

from edgeprune.errors import one_line
from edgeprune.tui.choice import IMPOSSIBLE, Choice, existing
from edgeprune.tui.lists import Page
from edgeprune.tui.widgets.footer import KeyFooter


class ShowScreen(ModalScreen[None]):
    """Shows, copies and saves a recipe."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "copy", "Copy", id="show.copy", tooltip="Copy recipe and command"),
        Binding("s", "save", "Save", id="show.save", tooltip="Save the recipe as a file"),
        Binding("escape", "close", "Close", id="show.close"),
    ]

    def __init__(self, choice: Choice) -> None:
        super().__init__()
        self._choice = choice
        self._folder = choice.run_folder()
        self._confirmed = ""

    def compose(self) -> ComposeResult:
        """Make the dialog; where to save is asked for later."""
        with Vertical(classes="dialog"):
            yield Label("The recipe, and the command that runs it", classes="dialog-title")
            with Page():
                yield Static(self.text, id="document", markup=False)
            yield Input(f"{self._folder.name}.toml", id="path", compact=True)
            yield Static(id="saving", classes="hint", markup=False)
        yield KeyFooter()

    def on_mount(self) -> None:
        """Begin with the recipe alone."""
        self.query_one("#path").display = False
        self._say("")
        self.query_one(Page).focus()

    @property
    def text(self) -> str:
        """What is shown and copied."""
        return self._choice.document(self._folder)

    def action_copy(self) -> None:
        """Copy it, over SSH as well (OSC 52)."""
        self.app.copy_to_clipboard(self.text)
        self.notify("Copied")

    def action_save(self) -> None:
        """Ask where to."""
        path = self.query_one("#path", Input)
        path.display = True
        path.focus()
        self._say("Enter saves there; Escape does not")

    def action_close(self) -> None:
        """Leave the question where to save, or all of it."""
        path = self.query_one("#path", Input)
        if not path.display:
            self.dismiss()
            return
        path.display = False
        self._say("")
        self.query_one(Page).focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Save, but not over another file without asking."""
        name = event.value.strip()
        there = existing(name)
        if there is not None and there.is_file() and name != self._confirmed:
            self._confirmed = name
            self._say(f"{name} is there already: Enter again replaces it")
            return
        problem = save(name, self._choice.document(self._folder, name))
        if problem:
            self._say(f"✗ not saved: {problem}; type another name")
            return
        self.action_close()
        self._say(f"Saved: {existing(name)}")

    def _say(self, text: str) -> None:
        line = self.query_one("#saving", Static)
        line.update(text)
        line.display = bool(text)


def save(name: str, text: str) -> str:
    """Write a file whole or not at all; return what went wrong, or nothing."""
    try:
        path = Path(name).expanduser()
        if not name or path.is_dir():
            return f"{name} is a folder" if name else "no name"
        temporary = path.with_name(f".{path.name}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, "utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except IMPOSSIBLE as error:
        return one_line(error)
    return ""
