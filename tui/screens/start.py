"""The first screen: the runs of this user, and the way to a new one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import Header, Static

if TYPE_CHECKING:
    from edgeprune.runs import RunInfo
    from edgeprune.tui.app import EdgepruneApp
    from edgeprune.tui.lists import Table

# The list, with all that tables need, is imported behind the first picture.

LOOK_SECONDS = 2.0
"""Between two looks at the runs."""
COLUMNS = ("", "Run", "State", "Target", "File", "Decode", "Perplexity", "Model")
"""The model is last: in 80 columns there is no room for it beside the rest."""
NO_RUNS = """\
[b]No runs yet.[/b]

A run makes a model smaller until it fits your device, exports it, and measures it against the dense one.
Press [b]n[/b] or [b]Enter[/b]: pick a model, say how small, and Enter through the rest."""
SIGNS = {
    "running": "▶ running",
    "paused": "‖ paused",
    "finished": "✓ finished",
    "failed": "✗ failed",
    "stopped": "■ stopped",
    "dead": "✗ died",
    "away": "→ away",
    "missing": "? missing",
}


class StartScreen(Screen[None]):
    """Lists the runs; looks again from time to time, for they go on without the app."""

    app: EdgepruneApp
    AUTO_FOCUS = ""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("n", "new", "New run", id="start.new", tooltip="Pick a model and a target"),
        # Before the table, so that it is in the footer.
        Binding(
            "enter",
            "open",
            "Open",
            id="start.open",
            tooltip="Open the run, or begin one",
            priority=True,
        ),
        Binding("space", "mark", "Mark", id="start.mark", tooltip="Mark the run to compare it"),
        Binding("c", "compare", "Compare", id="start.compare", tooltip="Compare the marked runs"),
        Binding("h", "hosts", "Hosts", id="start.hosts", tooltip="Other machines, reached by SSH"),
        Binding(
            "delete,d",
            "forget",
            "Forget",
            show=False,  # there is no room for it in 80 columns
            id="start.forget",
            tooltip="Off the list; its folder stays",
        ),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._runs: list[RunInfo] | None = None
        """None before the first look."""
        self._marked: set[Path] = set()
        self._table: Table | None = None

    def compose(self) -> ComposeResult:
        """Make the title alone: the first picture waits for nothing else."""
        yield Header()

    def on_mount(self) -> None:
        """Fill the screen behind the first picture."""
        self.call_after_refresh(self._fill)

    async def _fill(self) -> None:
        from edgeprune.tui.lists import Table
        from edgeprune.tui.widgets.footer import KeyFooter

        table = Table(id="runs", cursor_type="row", zebra_stripes=True)
        table.add_columns(*COLUMNS)
        empty = Static(NO_RUNS, id="no-runs")
        table.display = empty.display = False
        await self.mount(empty, table, Static(id="about-run", markup=False), KeyFooter())
        self._table = table
        self.refresh_bindings()  # for the footer
        self.look()
        self.set_interval(LOOK_SECONDS, self.look)

    def on_screen_resume(self) -> None:
        """Look at once when a run was left."""
        if self._table is not None:
            self.look()

    @work(thread=True, exclusive=True, group="look")
    def look(self) -> None:
        """Read the runs' folders, off the screen's thread."""
        from edgeprune import runs

        found = runs.list_runs()
        if found != self._runs:
            self.app.call_from_thread(self._show, found)

    def _show(self, found: list[RunInfo]) -> None:
        self._runs = found
        self.query_one("#no-runs").display = not found
        table = self._table
        assert table is not None  # a look comes after it
        table.display = bool(found)
        cursor = table.cursor_row
        table.clear()
        for info in found:
            table.add_row(*self._row(info), key=str(info.folder))
        if found:
            table.move_cursor(row=min(cursor, len(found) - 1), animate=False)
            table.focus()
        else:
            self.set_focus(None)  # so that Enter is the screen's
        self._tell()

    def _row(self, info: RunInfo) -> list[str]:
        mark = "●" if info.folder in self._marked else " "
        return [mark, info.name, sign(info.state), info.target, *_figures(info), _model(info)]

    # ---- the run under the cursor

    @property
    def run_here(self) -> RunInfo | None:
        """The run under the cursor."""
        row = -1 if self._table is None else self._table.cursor_row
        return self._runs[row] if self._runs and 0 <= row < len(self._runs) else None

    def on_data_table_row_highlighted(self) -> None:
        """Tell of the run that the cursor came to."""
        self._tell()

    def on_data_table_row_selected(self) -> None:
        """Open the run that was clicked on."""
        self.action_open()

    def _tell(self) -> None:
        info = self.run_here
        text = "" if info is None else about(info)
        self.query_one("#about-run", Static).update(text)

    def action_open(self) -> None:
        """Open the run under the cursor; without any, begin one."""
        info = self.run_here
        if info is None:
            self.app.begin()
        elif info.state == "missing":
            self.notify(f"{info.error}; press d to take it off the list", severity="warning")
        else:
            self.app.open_run(info.folder)

    def action_new(self) -> None:
        """Put a new run together."""
        self.app.begin()

    def action_mark(self) -> None:
        """Mark the run to be compared, or take the mark away."""
        info = self.run_here
        if info is None:
            return
        if info.state != "finished":
            self.notify(f"{info.name} is {info.state}: only finished runs have figures to compare")
            return
        self._marked ^= {info.folder}
        self._show(self._runs or [])

    def action_compare(self) -> None:
        """Compare the marked runs, or all finished ones if none is marked."""
        from edgeprune.tui.screens.compare import CompareScreen

        finished = [info.folder for info in self._runs or [] if info.state == "finished"]
        chosen = [folder for folder in finished if folder in self._marked] or finished
        if len(chosen) < 2:
            self.notify("Mark two finished runs with the space bar first")
            return
        self.app.push_screen(CompareScreen(chosen))

    def action_hosts(self) -> None:
        """Show the other machines."""
        self.app.show_hosts()

    def action_forget(self) -> None:
        """Take the run off the list."""
        from edgeprune import runs
        from edgeprune.errors import EdgepruneError

        info = self.run_here
        if info is None:
            return
        if info.state in runs.AT_WORK:
            self.notify(f"{info.name} is at work: open it and stop it first", severity="warning")
            return
        try:
            runs.forget(info.folder)
        except EdgepruneError as error:
            self.app.show_error(error)
        self._marked.discard(info.folder)
        self.notify(f"Off the list; {info.folder} is still there", markup=False)
        self.look()


def sign(state: str) -> str:
    """Return how a run stands, as a sign and a word."""
    return SIGNS.get(state, f"? {state}")


def _model(info: RunInfo) -> str:
    return info.model.rstrip("/").rpartition("/")[2]


def _figures(info: RunInfo) -> tuple[str, str, str]:
    """Return size, speed and perplexity of the pruned model; what is not known is a dash."""
    from edgeprune.quantities import format_bytes

    found = info.pruned
    size, speed, perplexity = (
        (found.file_bytes, found.decode_tokens_per_second, found.token_perplexity)
        if found
        else (None, None, None)
    )
    return (
        "-" if size is None else format_bytes(size),
        "-" if speed is None else f"{speed:.0f} tok/s",
        "-" if perplexity is None else f"{perplexity:.1f}",
    )


def about(info: RunInfo) -> str:
    """Return where a run is, how far it came, and what ended it."""
    from edgeprune.quantities import format_seconds

    worked = "" if info.seconds is None else f", {format_seconds(info.seconds)} of work"
    from edgeprune.worker import shown

    lines = [f"{shown(info.folder)}{worked}"]
    if info.stage:
        lines.append(f"at: {info.stage}")
    if info.error:
        lines.append(info.error)
    return "\n".join(lines)
