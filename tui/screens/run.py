"""The dashboard of a run: how far it is, what is left of each layer, its curves and its log; stop, pause, resume."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import events, on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.content import Content
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Header

from edgeprune import control, worker
from edgeprune.errors import EdgepruneError
from edgeprune.events import Event
from edgeprune.runs import AT_WORK
from edgeprune.tui.lists import Page
from edgeprune.tui.picture import Picture, kept
from edgeprune.tui.screens.question import StopScreen
from edgeprune.tui.watching import News, Watcher
from edgeprune.tui.widgets import run_text
from edgeprune.tui.widgets.footer import KeyFooter
from edgeprune.tui.widgets.layer_bars import LayerBars
from edgeprune.tui.widgets.run_curves import RunCurves
from edgeprune.tui.widgets.run_log import RunLog
from edgeprune.tui.widgets.steady import Steady

if TYPE_CHECKING:
    from edgeprune.runs import RunInfo
    from edgeprune.tui.app import EdgepruneApp

LOOK_SECONDS = 0.2
"""Between two looks at the log, and so between two redraws."""
CURVE_SECONDS = 1.0
"""Between two drawings of the curves, which cost the most."""
VIEWS = ("stages", "layers", "curves", "log")
EARLY = ("stopped", "failed", "dead")


class Told(Message):
    """What a look at the run has found."""

    def __init__(self, news: News) -> None:
        super().__init__()
        self.news = news


class Done(Message):
    """What the run was told to do is done, or was refused with ``error``."""

    def __init__(self, text: str = "", error: Exception | None = None) -> None:
        super().__init__()
        self.text = text
        self.error = error


class RunScreen(Screen[None]):
    """Follows the run in ``folder``, which goes on whether it is looked at or not."""

    app: EdgepruneApp
    AUTO_FOCUS = "#stages"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (140, "-wide")]  # noqa: RUF012
    VERTICAL_BREAKPOINTS = [(0, "-low"), (40, "-high")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "results", "Results", id="run.results", tooltip="What the run has found"),
        Binding("p", "pause", "Pause", id="run.pause", tooltip="Let it stand still, or go on"),
        Binding("s", "stop", "Stop", id="run.stop", tooltip="Stop it; what is finished stays"),
        Binding("r", "resume", "Resume", id="run.resume", tooltip="Go on where it ended"),
        Binding(
            "a",
            "attach",
            "Attach",
            id="run.attach",
            tooltip="Watch again what another machine does",
        ),
        Binding(
            "y", "copy", "Copy command", id="run.copy", tooltip="Copy the command to type next"
        ),
        *(
            Binding(
                str(n),
                f"view('{view}')",
                view.title(),
                show=False,  # it is in the line above the views, or in their borders
                id=f"run.{view}",
                tooltip=f"Show: {view}",
            )
            for n, view in enumerate(VIEWS, start=1)
        ),
        Binding("escape", "leave", "Back", id="run.leave", tooltip="Back; the run goes on"),
    ]

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder.absolute()
        self.picture = Picture()
        self.info: RunInfo | None = None
        self.box = ""
        """The machine that does it, if that is another one."""
        self.view = VIEWS[0]
        self._memory: int | None = None
        self._last_words = ""
        self._doing = ""
        self._left = threading.Event()
        self._due = False
        self._events = 0
        self._curves_drawn = 0.0
        self._views: dict[str, object] = {}
        """What each view was last drawn from."""

    def compose(self) -> ComposeResult:
        """Make the empty dashboard: the run is read off the screen's thread."""
        yield Header()
        yield Steady("reading the run ...", id="run-about")
        yield Steady(id="run-stages")
        yield Steady(id="run-now")
        yield Steady(id="run-clocks")
        with Page(id="run-end"):
            yield Steady(id="run-end-text")
        yield Steady(id="run-views")
        with Container(id="views"):
            with Page(id="stages", classes="view"):
                yield Steady(id="stage-list")
                yield Steady(id="stage-figures")
            yield RunCurves(id="curves", classes="view")
            yield LayerBars(id="layers", classes="view")
            yield RunLog(id="log", classes="view")
        yield KeyFooter()

    def on_mount(self) -> None:
        """Begin to follow."""
        self.title, self.sub_title = "edgeprune", self.folder.name
        self.query_one("#run-end").display = False
        for number, view in enumerate(VIEWS, start=1):
            self.query_one(f"#{view}").border_title = f"{number} {view.title()}"
        self.action_view(self.view)
        self._follow()

    def on_unmount(self) -> None:
        """Follow no more."""
        self._left.set()

    # ---- following

    @work(thread=True, group="follow")
    def _follow(self) -> None:
        watcher = Watcher(self.folder)
        news: News | None = watcher.first()
        while not self._left.is_set():
            if news is not None:
                self.post_message(Told(news))
            self._left.wait(LOOK_SECONDS)
            news = watcher.look()

    @on(Told)
    def _take(self, told: Told) -> None:
        news = told.news
        if news.picture is not None:
            self.picture = news.picture
        for event in news.events:
            self.picture.apply(event)
        self._events += len(news.events) + (news.picture is not None)
        if news.info is not None:
            changed = self.info is None or self.info.state != news.info.state
            self.info, self._memory, self._last_words = news.info, news.memory, news.last_words
            self.box = news.box
            if changed:
                self.refresh_bindings()
        self._draw_soon()

    def _draw_soon(self) -> None:
        """Draw once for all that has come by then."""
        if not self._due:
            self._due = True
            self.call_later(self._draw)

    # ---- drawing

    def _draw(self) -> None:
        self._due = False
        info = self.info
        if info is None or self._left.is_set():
            return
        running = info.state in AT_WORK
        alive = running or info.state == "away"
        now = time.time() if info.state == "running" else self.picture.last
        self._put("run-about", run_text.about(info, self._doing, self.box))
        self._put("run-stages", run_text.in_a_line(self.picture.stages, alive))
        self._put("run-now", run_text.at_work(self.picture, now) if running else Content(""))
        self.query_one("#run-now").display = running
        self._put("run-clocks", run_text.clocks(self.picture, now, running, self._memory, self.box))
        ending = run_text.end(info, self.picture, self._last_words, self.box)
        self._put("run-end-text", ending)
        self.query_one("#run-end").display = bool(ending)
        self._put("run-views", self._switch())
        self._put("stage-list", run_text.stages(self.picture, now, alive))
        self._put("stage-figures", run_text.figures(self.picture))
        for view in (LayerBars, RunCurves, RunLog):
            self._draw_view(view)

    def _draw_view(self, kind: type[LayerBars | RunCurves | RunLog]) -> None:
        """Draw a view that is in sight, if there is something new."""
        view = self.query_one(kind)
        new = (self._events, view.size)
        if not view.display or self._views.get(view.id or "") == new:
            return
        if kind is RunCurves and not self._curves_are_due():
            return
        self._views[view.id or ""] = new
        view.show(self.picture)

    def _curves_are_due(self) -> bool:
        """If not, they are drawn when they are."""
        wait = self._curves_drawn + CURVE_SECONDS - time.monotonic()
        if wait > 0:
            self.set_timer(wait, self._draw_soon)
            return False
        self._curves_drawn = time.monotonic()
        return True

    def _put(self, name: str, text: Content) -> None:
        self.query_one(f"#{name}", Steady).put(text)

    def _switch(self) -> Content:
        names = []
        for number, view in enumerate(VIEWS, start=1):
            text = f"[@click=screen.view('{view}')] {number} {view.title()} [/]"
            names.append(f"[reverse]{text}[/]" if view == self.view else text)
        return Content.from_markup("".join(names))

    def on_resize(self, _event: events.Resize) -> None:
        """Another view may have come into sight."""
        self.call_after_refresh(self._draw)

    # ---- keys

    def check_action(self, action: str, _parameters: tuple[object, ...]) -> bool | None:
        """Offer only what can be done with the run as it stands."""
        state = self.info.state if self.info else "missing"
        possible = {
            "pause": state in AT_WORK and not self.box,
            "stop": state in AT_WORK or state == "away",
            "resume": state in EARLY,
            "attach": state == "away",
            "results": state == "finished",
        }
        return possible.get(action, True) and not (action in possible and self._doing)

    def action_view(self, view: str) -> None:
        """Bring a view to the front; where all are in sight, into focus."""
        self.view = view
        for each in VIEWS:
            self.query_one(f"#{each}").set_class(each == view, "-current")
        self.query_one(f"#{view}").focus()
        self.call_after_refresh(self._draw)

    def action_leave(self) -> None:
        """Go back; the run goes on."""
        self.app.pop_screen()

    def action_results(self) -> None:
        """Show the results in place of this screen."""
        app = self.app
        app.pop_screen()
        app.open_run(self.folder)

    def action_copy(self) -> None:
        """Copy the command to type next, over SSH as well (OSC 52)."""
        command = self.info.next if self.info else worker.resume_command(self.folder)
        self.app.copy_to_clipboard(command)
        self.notify(f"Copied: {command}")

    def action_pause(self) -> None:
        """Let the run stand still, or go on."""
        paused = self.info is not None and self.info.state == "paused"
        self._tell("going on ..." if paused else "pausing ...")
        self._ask(control.unpause if paused else control.pause)

    def action_stop(self) -> None:
        """Say what a stop comes to, and stop if that is wanted."""
        what = "\n".join(kept(self.picture))
        command = worker.resume_command(self.folder)
        self.app.push_screen(
            StopScreen(f"{what}\n\nGo on later with r, or type:\n{command}"), self._stop
        )

    def _stop(self, wanted: bool | None) -> None:
        if not wanted:
            return
        self._tell("stopping ...")
        if self.info is not None and self.info.state == "away":
            self._stop_away()
        else:
            self._ask(self._end)

    @work(group="ask")
    async def _stop_away(self) -> None:
        try:
            answer = await self.app.answers.ask("stop_away", folder=str(self.folder))
            ended = f"{self.box} has ended it already; press a to bring home what it made"
            self.post_message(Done(f"Stopped on {self.box}" if answer["told"] else ended))
        except EdgepruneError as error:
            self.post_message(Done(error=error))

    def _end(self, folder: Path) -> str:
        if control.stop(folder, self._pass_on):
            return "Stopped"
        return "It has ended by itself"

    def _pass_on(self, event: Event) -> None:
        self.post_message(Told(News([event])))

    @work(thread=True, group="ask")
    def _ask(self, what: Callable[[Path], str | None]) -> None:
        try:
            self.post_message(Done(what(self.folder) or ""))
        except (EdgepruneError, OSError) as error:
            self.post_message(Done(error=error))

    def action_resume(self) -> None:
        """Let a worker go on where the last one ended."""
        self._tell("resuming ...")
        self._resume()

    def action_attach(self) -> None:
        """Let a worker tell again what another machine does."""
        self._tell("attaching ...")
        self._resume()

    @work(group="ask")
    async def _resume(self) -> None:
        try:
            await self.app.answers.ask("resume", self._tell, folder=str(self.folder))
            self.post_message(Done())
        except EdgepruneError as error:
            self.post_message(Done(error=error))

    @on(Done)
    def _done(self, done: Done) -> None:
        self._tell("")
        if done.error is not None:
            self.app.show_error(done.error)
        elif done.text:
            self.notify(done.text)

    def _tell(self, doing: str) -> None:
        """Show what the run was told to do, until it is done."""
        self._doing = doing
        self.refresh_bindings()
        self._draw_soon()
