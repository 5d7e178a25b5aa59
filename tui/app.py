"""The app: which screens there are, the keys that work on all of them, and the engine that they ask."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.screen import Screen

from edgeprune.tui import settings
from edgeprune.tui.answers import Answers

if TYPE_CHECKING:
    from edgeprune.tui.choice import Choice

# Screens and the engine's light modules are imported when they are needed: the first picture must not wait for them.


class EdgepruneApp(App[None]):
    """The whole app. It starts with the list of runs."""

    TITLE = "edgeprune"
    CSS_PATH = "edgeprune.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit", id="app.quit", tooltip="Leave the app; runs go on"),
        Binding("f1", "keys", "Keys", id="app.keys", tooltip="What every key does here"),
    ]

    choice: Choice
    """What the wizard is putting together."""

    def __init__(self, answers: Answers | None = None, folder: Path | None = None) -> None:
        """``folder`` is a run to open at once."""
        super().__init__()
        self.answers = answers or Answers(log_file())
        self._folder = folder
        self._settings = settings.load()
        if self._settings.theme in self.available_themes:
            self.theme = self._settings.theme

    def get_default_screen(self) -> Screen[None]:
        """Start with the runs."""
        from edgeprune.tui.screens.start import StartScreen

        return StartScreen()

    def on_mount(self) -> None:
        """Paint first, then wake the engine."""
        self.set_keymap(self._settings.keys)
        self.call_after_refresh(self._after_first_paint)

    def _after_first_paint(self) -> None:
        self.theme_changed_signal.subscribe(self, self._keep_theme)
        if self._settings.problem:
            self.notify(self._settings.problem, severity="warning", timeout=10)
        self.warm_up()
        if self._folder is not None:
            self.open_run(self._folder)

    @work(exit_on_error=False)
    async def warm_up(self) -> None:
        """Let the engine's process begin its imports."""
        await self.answers.warm_up()

    async def on_unmount(self) -> None:
        """Leave no process behind but the runs."""
        await self.answers.close()

    # ---- where to go

    def begin(self) -> None:
        """Put a new run together, from its first step."""
        from edgeprune.tui.choice import Choice
        from edgeprune.tui.screens.source import SourceScreen

        self.action_home()  # from wherever the command palette was opened
        self.choice = Choice()
        self.push_screen(SourceScreen())

    def open_run(self, folder: Path) -> None:
        """Show the run in ``folder``: its results if it is finished, else how it goes."""
        from edgeprune import runs
        from edgeprune.tui.screens.result import ResultScreen
        from edgeprune.tui.screens.run import RunScreen

        finished = runs.describe(folder).state == "finished"
        self.push_screen(ResultScreen(folder) if finished else RunScreen(folder))

    def show_hosts(self) -> None:
        """List the machines that can be reached by SSH."""
        from edgeprune.tui.screens.hosts import HostsScreen

        if not isinstance(self.screen, HostsScreen):
            self.push_screen(HostsScreen())

    def show_error(self, error: Exception, title: str = "That did not work") -> None:
        """Show what failed, why, and what to do, until it is read."""
        from edgeprune.tui.screens.message import MessageScreen

        self.push_screen(MessageScreen(title, str(error)))

    # ---- everywhere

    def action_keys(self) -> None:
        """List the keys of the screen in front."""
        from edgeprune.tui.screens.keys import KeysScreen

        if not isinstance(self.screen, KeysScreen):
            self.push_screen(KeysScreen(self.screen))

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """Add the app's own ways to the command palette."""
        yield from super().get_system_commands(screen)
        yield SystemCommand("New run", "Pick a model, a target, and prune", self.begin)
        yield SystemCommand("All runs", "Back to the list of runs", self.action_home)
        yield SystemCommand("Hosts", "Other machines to run and to measure on", self.show_hosts)

    def action_home(self) -> None:
        """Go back to the list of runs."""
        while len(self.screen_stack) > 1:
            self.pop_screen()

    def _keep_theme(self, _theme: object) -> None:
        problem = settings.save_theme(self.theme)
        if problem:
            self.notify(problem, severity="warning")


def log_file() -> Path:
    """Return where the chatter of the app's processes goes."""
    from edgeprune.locations import state_folder

    return state_folder() / "app.log"


def main(folder: Path | None = None) -> None:
    """Run the app in this terminal until the user leaves it."""
    EdgepruneApp(folder=folder).run()
