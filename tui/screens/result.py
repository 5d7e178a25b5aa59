"""The results of a finished run: what was won, what was lost, and where to go from here."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.content import Content
from textual.screen import Screen
from textual.widgets import Header, Static

from edgeprune.tui.lists import Page
from edgeprune.tui.widgets.footer import KeyFooter

if TYPE_CHECKING:
    from edgeprune.report import Row
    from edgeprune.tui.app import EdgepruneApp
    from edgeprune.tui.figures import Measured

STYLES = {True: "$text-success", False: "$text-error", None: ""}


class ResultScreen(Screen[None]):
    """Shows the results of the run in ``folder``, read when the screen is there."""

    app: EdgepruneApp
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (140, "-wide")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("t", "chat", "Try", id="result.chat", tooltip="Talk to both models"),
        Binding("c", "compare", "Compare", id="result.compare", tooltip="With the other runs"),
        Binding("o", "report", "Report", id="result.report", tooltip="Open report.html"),
        Binding("e", "export", "Export", id="result.export", tooltip="In another precision"),
        Binding(
            "y",
            "copy",
            "Copy",
            show=False,  # there is no room for it in 80 columns
            id="result.copy",
            tooltip="Copy the table as Markdown",
        ),
        Binding("escape", "app.pop_screen", "Back", id="result.back"),
    ]

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = Path(folder).absolute()
        self._measured: Measured | None = None

    def compose(self) -> ComposeResult:
        """Make the page: it is filled when the results are read."""
        yield Header()
        with Page(id="result"):
            yield Static("Reading the results …", id="result-summary", markup=False)
            with Container(id="result-figures"):
                yield Static(id="result-table", markup=False)
            yield Static(id="result-conditions", markup=False)
            yield Container(id="result-plots")
        yield KeyFooter()

    def on_mount(self) -> None:
        """Begin to read."""
        self.sub_title = self._folder.name
        self.query_one(Page).focus()
        self.read()

    @work(thread=True, exclusive=True, group="read")
    def read(self) -> None:
        """Read the results, and import what plots them, off the screen's thread."""
        from edgeprune.errors import EdgepruneError
        from edgeprune.tui import figures

        try:
            found = figures.read(self._folder)
        except EdgepruneError as error:
            self.app.call_from_thread(self._say, str(error))
            return
        from edgeprune.tui.widgets import charts  # noqa: F401

        self.app.call_from_thread(self._show, found)

    def _say(self, problem: str) -> None:
        if self.is_attached:
            self.query_one("#result-summary", Static).update(f"✗ {problem}")

    def _show(self, found: Measured) -> None:
        if not self.is_attached:
            return  # the user has left
        from edgeprune.tui import figures
        from edgeprune.tui.widgets import charts
        from edgeprune.tui.widgets.bars import LayerWidths

        self._measured = found
        self.query_one("#result-summary", Static).update(found.summary)
        self.query_one("#result-table", Static).update(_table(found.rows))
        bars = LayerWidths(found.layers["dense"], found.layers["pruned"])
        self.query_one("#result-figures").mount(bars)
        said = found.conditions
        if found.between:
            said += f"\n{figures.latency_line(found.between, found.device)}"
            plots = charts.decode(found.decode), charts.latency(found.between)
            self.query_one("#result-plots").mount(*plots)
        self.query_one("#result-conditions", Static).update(said)

    # ---- where to go

    def action_chat(self) -> None:
        """Talk to both models."""
        from edgeprune.tui.screens.chat import ChatScreen

        self.app.push_screen(ChatScreen(self._folder))

    def action_export(self) -> None:
        """Export the pruned model once more."""
        from edgeprune.tui.screens.export import ExportScreen

        self.app.push_screen(ExportScreen(self._folder))

    @work(thread=True, exclusive=True, group="compare")
    def action_compare(self) -> None:
        """Put this run beside all other finished ones."""
        from edgeprune import runs

        finished = [info.folder for info in runs.list_runs() if info.pruned is not None]
        others = [folder for folder in finished if folder != self._folder]
        self.app.call_from_thread(self._compare, others)

    def _compare(self, others: list[Path]) -> None:
        from edgeprune.tui.screens.compare import CompareScreen

        if not self.is_current:
            return
        if others:
            self.app.push_screen(CompareScreen([self._folder, *others]))
        else:
            self.notify("There is no other finished run to compare with")

    def action_copy(self) -> None:
        """Copy the table as Markdown."""
        if self._measured is not None:
            self.app.copy_to_clipboard(self._measured.markdown)
            self.notify("Copied the table as Markdown")

    def action_report(self) -> None:
        """Open the report, or tell where it is if there is no browser here."""
        from edgeprune import worker

        page = self._folder / worker.REPORT
        if not page.is_file():
            command = worker.resume_command(self._folder)
            self.notify(f"{page} is gone; make it again with: {command}", severity="warning")
        elif has_browser(os.environ, sys.platform):
            self.browse(page)
        else:
            self._tell_of(page)

    @work(thread=True, exclusive=True, group="browse")
    def browse(self, page: Path) -> None:
        """Let the system's browser open ``page``."""
        import webbrowser

        if not webbrowser.open(page.as_uri()):
            self.app.call_from_thread(self._tell_of, page)

    def _tell_of(self, page: Path) -> None:
        self.app.copy_to_clipboard(str(page))
        self.notify(f"No browser can be opened from here. Copied the path:\n{page}", timeout=15)


def has_browser(environment: Mapping[str, str], platform: str) -> bool:
    """Tell whether a browser opened here would be seen: not over SSH, nor without a display."""
    if environment.get("SSH_CONNECTION") or environment.get("SSH_TTY"):
        return False
    if platform.startswith("linux"):
        return bool(environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY"))
    return True


def _table(rows: list[Row]) -> Content:
    from edgeprune.tui import figures

    heading, *lines = figures.table(rows)
    parts: list[Content | tuple[str, str]] = [(heading, "dim")]
    for row, line in zip(rows, lines, strict=True):
        word = figures.verdict(row)
        kept = line.removesuffix(word)
        parts += [(f"\n{kept}", ""), (word, STYLES[row.better])]
    return Content.assemble(*parts)
