"""What every key does on the screen in front, with the ids by which keys can be changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen, Screen
from textual.widgets import Label, Static

from edgeprune.tui import settings
from edgeprune.tui.lists import Table
from edgeprune.tui.widgets.footer import KeyFooter

if TYPE_CHECKING:
    from textual.screen import ActiveBinding


class KeysScreen(ModalScreen[None]):
    """Lists the keys of ``of``, its own first."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,enter,f1", "dismiss", "Close", id="keys.close")
    ]

    def __init__(self, of: Screen[Any]) -> None:
        super().__init__()
        self._active = sorted(of.active_bindings.values(), key=_is_general)

    def compose(self) -> ComposeResult:
        """Make the table."""
        with Vertical(classes="dialog"):
            yield Label("Keys", classes="dialog-title")
            yield Table(cursor_type="row", zebra_stripes=True)
            yield Static(
                f'Change a key under \\[keys] in {settings.path()}: "id" = "key"', classes="hint"
            )
        yield KeyFooter()

    def on_mount(self) -> None:
        """Fill the table: a line for each key that does something here."""
        table = self.query_one(Table)
        table.add_columns("Key", "Id", "What it does")
        for row in self._rows():
            table.add_row(*row)
        table.focus()

    def _rows(self) -> list[tuple[str, str, str]]:
        """Return a line for each thing that keys do, with all its keys."""
        keys: dict[tuple[str, str], list[str]] = {}
        for active in self._active:
            found = keys.setdefault(_meaning(active), [])
            key = self.app.get_key_display(active.binding)
            if key not in found:
                found.append(key)
        return [(", ".join(found), name, what) for (name, what), found in keys.items()]


def _is_general(active: ActiveBinding) -> tuple[bool, bool]:
    """Put the keys of the screen before the app's, and both before a widget's own movements."""
    name = active.binding.id or ""
    return not name or name.startswith("list."), name.startswith("app.")


def _meaning(active: ActiveBinding) -> tuple[str, str]:
    binding = active.binding
    what = active.tooltip or binding.tooltip or binding.description or binding.action
    return binding.id or "", what
