"""Several finished runs beside each other: their figures, and which of them is worth having."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.screen import Screen
from textual.widgets import Header, Input, Static

from edgeprune.tui.lists import Page
from edgeprune.tui.widgets.footer import KeyFooter

if TYPE_CHECKING:
    from edgeprune.comparison import Comparison
    from edgeprune.tui.app import EdgepruneApp

PAGE = "compared.html"
LEGEND = """\
▲ better than its dense model, ▼ worse. On the front: no other of these runs is better in file size, decode speed or \
perplexity and as good in the other two. In the plots, D is a dense model."""


class CompareScreen(Screen[None]):
    """Compares the runs in ``folders``, read when the screen is there."""

    app: EdgepruneApp
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (140, "-wide")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "copy", "Copy", id="compare.copy", tooltip="Copy the table as Markdown"),
        Binding("w", "write", "Write page", id="compare.write", tooltip="As one HTML file"),
        Binding("escape", "back", "Back", id="compare.back"),
    ]

    def __init__(self, folders: list[Path]) -> None:
        super().__init__()
        self._folders = [Path(folder).absolute() for folder in folders]
        self._markdown = ""

    def compose(self) -> ComposeResult:
        """Make the page: it is filled when the runs are read."""
        yield Header()
        with Page(id="compare"):
            yield Static("Reading the results …", id="compare-table", markup=False)
            yield Static(id="compare-differences", markup=False)
            yield Container(id="compare-plots")
            yield Static(id="compare-legend", markup=False)
        yield Static(id="compare-written", markup=False)
        yield Input(PAGE, id="compare-path", placeholder="file to write the page to")
        yield KeyFooter()

    def on_mount(self) -> None:
        """Begin to read."""
        self.sub_title = f"{len(self._folders)} runs"
        self.query_one("#compare-path").display = False
        self.query_one("#compare-written").display = False
        self.query_one(Page).focus()
        self.read()

    @work(thread=True, exclusive=True, group="read")
    def read(self) -> None:
        """Read the runs, and import what plots them, off the screen's thread."""
        from edgeprune import comparison
        from edgeprune.errors import EdgepruneError

        try:
            found = comparison.compare(self._folders)
        except EdgepruneError as error:
            self.app.call_from_thread(self._say, str(error))
            return
        from edgeprune.tui.widgets import charts  # noqa: F401

        self.app.call_from_thread(self._show, found)

    def _say(self, problem: str) -> None:
        if self.is_attached:
            self.query_one("#compare-table", Static).update(f"✗ {problem}")

    def _show(self, found: Comparison) -> None:
        if not self.is_attached:
            return  # the user has left
        from edgeprune.tui import figures

        self._markdown = figures.comparison_markdown(found)
        self.query_one("#compare-table", Static).update("\n".join(figures.compared(found)))
        differences = self.query_one("#compare-differences", Static)
        differences.update("\n".join(f"! {text}" for text in found.differences))
        differences.display = bool(found.differences)
        self.query_one("#compare-legend", Static).update(LEGEND)
        self._plot(figures.points(found))

    def _plot(self, places: Sequence[tuple[str, float, float, float]]) -> None:
        from edgeprune.tui.widgets import charts

        if not places:
            return
        sizes = [(mark, size, perplexity) for mark, size, _, perplexity in places]
        speeds = [(mark, speed, perplexity) for mark, _, speed, perplexity in places]
        self.query_one("#compare-plots").mount(
            charts.scatter("Smaller is better", "file size, MB", sizes, "perplexity"),
            charts.scatter("Faster is better", "decode tokens/s", speeds, "perplexity"),
        )

    # ---- what can be done with it

    def action_copy(self) -> None:
        """Copy the table as Markdown."""
        if self._markdown:
            self.app.copy_to_clipboard(self._markdown)
            self.notify("Copied the table as Markdown")

    def action_write(self) -> None:
        """Ask where to write the page."""
        if self._markdown:
            path = self.query_one("#compare-path", Input)
            path.display = True
            path.focus()

    def action_back(self) -> None:
        """Put the question for a path away, or go back."""
        path = self.query_one("#compare-path", Input)
        if path.display:
            self._put_away(path)
        else:
            self.app.pop_screen()

    def _put_away(self, path: Input) -> None:
        path.display = False
        self.query_one(Page).focus()

    @on(Input.Submitted, "#compare-path")
    def write(self, event: Input.Submitted) -> None:
        """Write the page to the path that was typed."""
        path = Path(event.value.strip()).expanduser().absolute()
        if path.exists():
            self._tell(f"✗ {path} exists: name another file")
            return
        self._put_away(event.input)
        self._tell(f"Writing {path} …")
        self.write_page(path)

    @work(exclusive=True, group="write")
    async def write_page(self, path: Path) -> None:
        """Let the command line write the page: what draws its plots is too heavy for this process."""
        code, said = await run_command(
            "runs", "compare", *map(str, self._folders), "--html", str(path)
        )
        if code == 0:
            self.app.copy_to_clipboard(str(path))
            self._tell(f"✓ The page is {path} (path copied)")
        else:
            self._tell(f"✗ The page was not written: {said}")

    def _tell(self, text: str) -> None:
        line = self.query_one("#compare-written", Static)
        line.display = True
        line.update(text)


async def run_command(*arguments: str) -> tuple[int, str]:
    """Run ``edgeprune`` with ``arguments``; return its exit code and the last line that it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "edgeprune", *arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # the terminal's signals are the app's
    )
    try:
        _, said = await process.communicate()
    finally:
        if process.returncode is None:  # the user has left
            process.kill()
    lines = said.decode("utf-8", "replace").strip().splitlines()
    return process.returncode or 0, lines[-1] if lines else "it said nothing"
