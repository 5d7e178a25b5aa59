"""The wizard's last step: what the engine checks before a run, and the start."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType

from edgeprune.tui import wording
from edgeprune.tui.answers import AnswerFailed
from edgeprune.tui.lists import Page
from edgeprune.tui.screens.wizard import WizardScreen
from edgeprune.tui.widgets.pairs import Pairs

if TYPE_CHECKING:
    from edgeprune.tui.app import EdgepruneApp


class PreflightScreen(WizardScreen):
    """A list that ticks. Enter starts the run if nothing failed."""

    STEP = 4
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "go_on", "Start", id="wizard.go_on", priority=True),
        Binding("r", "check", "Check again", id="preflight.check"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._list = Pairs("checks")
        self._page = Page()
        self._checks: list[dict[str, Any]] = []
        self._done = False
        self._starting = False

    def body(self) -> ComposeResult:
        """Make the list."""
        with self._page:
            yield self._list

    def on_mount(self) -> None:
        """Begin to check."""
        self._page.focus()
        self.action_check()

    # ---- checks

    def action_check(self) -> None:
        """Check from the beginning."""
        if not self._starting:
            self._checks, self._done = [], False
            self._recipe = self.app.choice.toml()
            self._folder = self.app.choice.run_folder().absolute()
            self._list.show([("", "Asking the engine ...")])
            self.tell("Checking ...")
            self.check()

    @work(exclusive=True, group="check")
    async def check(self) -> None:
        """Ask the engine, and tick as its checks come."""
        mine = self._checks

        def part(check: dict[str, Any]) -> None:
            mine.append(check)
            if mine is self._checks and self.is_attached:
                self._show_checks()

        try:
            await self.app.answers.ask(
                "preflight",
                part,
                recipe=self._recipe,
                folder=str(self._folder),
            )
        except AnswerFailed as error:
            self.warn(f"The checks broke off: {error}\nPress r to check again")
            return
        self._done = True
        self._conclude()

    def _show_checks(self) -> None:
        self._list.show([wording.check_pair(check) for check in self._checks])

    @property
    def failed(self) -> int:
        """How many checks failed."""
        return sum(check["state"] == "failed" for check in self._checks)

    def _conclude(self) -> None:
        if self.failed:
            what = "1 check" if self.failed == 1 else f"{self.failed} checks"
            self.warn(f"{what} failed: do what stands there, then press r to check again")
        else:
            from edgeprune.worker import shown

            self.tell(f"✓ Ready. Enter starts the run in {shown(self._folder.absolute())}")

    # ---- the start

    def action_go_on(self) -> None:
        """Start the run unless a check failed."""
        if self._starting:
            return
        if not self._done:
            self.tell("Still checking; Enter starts the run when that is done")
        elif self.failed:
            self._conclude()
        else:
            self._starting = True
            self.tell("Starting ...")
            # Of the app, for it is also told how the start went when this screen has been left.
            self.app.run_worker(start(self.app, self, self._recipe, self._folder))

    def action_back(self) -> None:
        """Go back; a start goes on, and its run will be in the list."""
        if self._starting:
            self.notify("The run is being started; it will be in the list of runs")
            self.app.action_home()
        else:
            super().action_back()

    def start_failed(self, error: AnswerFailed) -> None:
        """Say why the run did not start."""
        self._starting = False
        self.warn(f"{error}\nPress r to check again, Escape to change the recipe")


async def start(app: EdgepruneApp, screen: PreflightScreen, recipe: str, folder: Path) -> None:
    """Start the run and open it, unless the user is elsewhere by then."""

    def note(text: object) -> None:
        if screen.is_attached:
            screen.tell(f"Starting: {text}")

    try:
        answer = await app.answers.ask("start", note, recipe=recipe, folder=str(folder))
    except AnswerFailed as error:
        if screen.is_attached:
            screen.start_failed(error)
        else:
            app.show_error(error, "The run did not start")
        return
    if screen.is_current or (screen.is_attached and app.screen.is_modal):
        app.action_home()
        app.open_run(Path(answer["folder"]))
    else:
        app.notify(f"Started: {answer['folder']}")
