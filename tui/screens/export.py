"""Export the pruned model of a run once more, in another precision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, Label, OptionList, ProgressBar, Static
from textual.widgets.option_list import Option

from edgeprune.tui.lists import Options
from edgeprune.tui.widgets.footer import KeyFooter

if TYPE_CHECKING:
    from edgeprune.tui.app import EdgepruneApp

PRECISIONS = {
    "int4": "int4   smallest",
    "int8": "int8   twice as large, nearer to the checkpoint",
    "fp16": "fp16   half precision, not quantized",
    "fp32": "fp32   full precision, largest",
}
HINT = "Up and down: precision. Tab: folder. Enter: export."


class ExportScreen(ModalScreen[None]):
    """Asks for precision and folder, exports to ONNX, and tells how it goes."""

    app: EdgepruneApp
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "export", "Export", id="export.export", priority=True),
        Binding("escape", "dismiss", "Back", id="export.back", tooltip="An export goes on"),
    ]

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = Path(folder).absolute()
        self._suggested = ""
        self._at_work = False

    def compose(self) -> ComposeResult:
        """Make the dialog."""
        with Vertical(classes="dialog"):
            yield Label(classes="dialog-title", markup=False)
            choices = [Option(text, id=name) for name, text in PRECISIONS.items()]
            yield Options(*choices, compact=True)
            yield Label("Folder", classes="hint")
            yield Input(id="export-output")
            yield ProgressBar(id="export-progress", show_eta=False)
            yield Static(HINT, id="export-state", markup=False)
        yield KeyFooter()

    def on_mount(self) -> None:
        """Begin with int8: int4 is what most runs have."""
        self.query_one(ProgressBar).display = False
        self.query_one(Options).highlighted = list(PRECISIONS).index("int8")
        self.query_one(Options).focus()

    @property
    def _precision(self) -> str:
        return list(PRECISIONS)[self.query_one(Options).highlighted or 0]

    @on(OptionList.OptionHighlighted)
    def suggest(self) -> None:
        """Show the precision, and name the folder after it unless that was typed."""
        title = f"Export the pruned model of {self._folder.name} to ONNX, {self._precision}"
        self.query_one(".dialog-title", Label).update(title)
        output = self.query_one(Input)
        if output.value == self._suggested:
            self._suggested = str(from_here(self._folder) / f"export-pruned-{self._precision}")
            output.value = self._suggested

    @on(OptionList.OptionSelected)
    @on(Input.Submitted)
    def action_export(self) -> None:
        """Export, unless the folder is taken."""
        if self._at_work:
            return
        output = Path(self.query_one(Input).value.strip()).expanduser().absolute()
        if output.exists():
            self._say(f"✗ {output} exists: name a new folder")
            return
        self._at_work = True
        # The app's worker, not this screen's: the export goes on when the dialog is closed.
        self.app.run_worker(self._export(self._precision, output), exit_on_error=False)

    async def _export(self, precision: str, output: Path) -> None:
        from edgeprune.quantities import format_bytes
        from edgeprune.tui.answers import AnswerFailed

        self._say("The engine begins …")
        try:
            made = await self.app.answers.ask(
                "export",
                on_part=self._follow,
                folder=str(self._folder),
                precision=precision,
                output=str(output),
            )
        except AnswerFailed as error:
            self._end(f"✗ {error}", "error")
            return
        finally:
            self._at_work = False
        size = format_bytes(made["file_bytes"])
        self._end(f"✓ {size} of {precision} in {made['folder']}", "information")

    def _follow(self, part: dict[str, Any]) -> None:
        if not self.is_attached:
            return
        bar = self.query_one(ProgressBar)
        bar.display = True
        bar.update(total=part["total"], progress=part["done"])
        self._say(part["note"] or "Exporting …")

    def _end(self, text: str, severity: Any) -> None:
        if self.is_attached:
            self.query_one(ProgressBar).display = False
            self._say(text)
        else:
            self.app.notify(text, severity=severity, timeout=15)

    def _say(self, text: str) -> None:
        if self.is_attached:
            self.query_one("#export-state", Static).update(text)


def from_here(folder: Path) -> Path:
    """Return ``folder`` as short as it can be typed here: a long path would not be seen to its end."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder
