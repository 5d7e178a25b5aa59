"""What the four steps to a run share: the line of steps, going on and back, and a look at the recipe."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.screen import Screen
from textual.widgets import Header, Static

from edgeprune.tui.widgets.footer import KeyFooter
from edgeprune.tui.widgets.steps import Steps

if TYPE_CHECKING:
    from edgeprune.tui.app import EdgepruneApp


class WizardScreen(Screen[None]):
    """A step. What is chosen is kept in the app's ``choice`` as soon as it can be used."""

    app: EdgepruneApp
    STEP: ClassVar[int]
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (110, "-wide")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        # Before the widgets: Enter goes on from inputs and lists, too.
        Binding("enter", "go_on", "Go on", id="wizard.go_on", priority=True),
        Binding("escape", "back", "Back", id="wizard.back"),
        Binding(
            "ctrl+o", "show", "Recipe", id="wizard.show", tooltip="The recipe and its command line"
        ),
    ]

    # A step holds on to its widgets: what comes late may find a screen without children.

    def __init__(self) -> None:
        super().__init__()
        self._line = Static(id="told", markup=False)

    def compose(self) -> ComposeResult:
        """Put the step's own part between the line of steps and what there is to say."""
        yield Header()
        yield Steps(self.STEP)
        with Container(id="step"):
            yield from self.body()
        yield self._line
        yield KeyFooter()

    def body(self) -> ComposeResult:
        """Make what is this step's own."""
        raise NotImplementedError

    def choose(self, **changes: Any) -> None:
        """Keep a choice."""
        self.app.choice = replace(self.app.choice, **changes)

    def tell(self, text: str) -> None:
        """Say in a line how it stands; nothing clears the line."""
        self._tell(text, wrong=False)

    def warn(self, problem: object) -> None:
        """Say what is wrong, and what to do."""
        self._tell(f"✗ {problem}", wrong=True)

    def _tell(self, text: str, wrong: bool) -> None:
        self._line.set_class(wrong, "-wrong")
        self._line.update(text)
        self._line.display = bool(text)

    # ---- keys

    def action_go_on(self) -> None:
        """Take what is chosen here and go to the next step."""
        raise NotImplementedError

    def action_back(self) -> None:
        """Go to the step before; what was chosen stays."""
        self.dismiss()

    def action_show(self) -> None:
        """Show the recipe as it stands."""
        from edgeprune.tui.screens.show import ShowScreen

        self.app.push_screen(ShowScreen(self.app.choice))
