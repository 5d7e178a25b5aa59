"""The wizard's first step: which model."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.content import Content
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from edgeprune.tui import wording
from edgeprune.tui.answers import AnswerFailed
from edgeprune.tui.finding import Line, lines
from edgeprune.tui.lists import Options, Page
from edgeprune.tui.screens.wizard import WizardScreen
from edgeprune.tui.widgets.pairs import Pairs

DEBOUNCE = 0.3


class SourceScreen(WizardScreen):
    """Lists the models of this machine and of the Hub; beside them the card of the one under the cursor."""

    STEP = 1
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down", "move('cursor_down')", "Down", show=False, id="source.down"),
        Binding("up", "move('cursor_up')", "Up", show=False, id="source.up"),
        Binding("pagedown", "move('page_down')", "Page down", show=False, id="source.page_down"),
        Binding("pageup", "move('page_up')", "Page up", show=False, id="source.page_up"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._input = Input(
            placeholder="Type to filter and to search the Hub; or a path, .gguf or Hub id",
            id="model",
            compact=True,
        )
        self._state = Static(id="hub", markup=False)
        self._options = Options(id="models")
        self._card = Pairs("card")
        self._local: list[dict[str, Any]] = []
        self._hub: list[dict[str, Any]] = []
        self._lines: list[Line] = []
        self._cards: dict[str, Any] = {}
        self._failed: dict[str, str] = {}
        self._looked = ""
        self._wanted = ""

    def body(self) -> ComposeResult:
        """Make the question, the list and the card."""
        yield self._input
        yield self._state
        with Container(id="models-and-card"):
            yield self._options
            with Page(id="card-page"):
                yield self._card

    def on_mount(self) -> None:
        """Begin with what was chosen before; the rest comes when the engine has looked."""
        self._say("Looking for models on this machine ...")
        self._list([Line(f"{self.app.choice.model}", self.app.choice.model)])
        self._input.focus()
        self.find_models()

    @property
    def text(self) -> str:
        """What was typed."""
        return self._input.value.strip()

    @property
    def spec(self) -> str:
        """The model under the cursor, as it is typed."""
        row = self._options.highlighted
        return "" if row is None or row >= len(self._lines) else self._lines[row].spec

    # ---- the list

    @work(exclusive=True, group="models")
    async def find_models(self) -> None:
        """Ask for the models of this machine."""
        try:
            self._local = await self.app.answers.ask("models")
        except AnswerFailed as error:
            self._say(f"The models of this machine are not known: {error}")
        else:
            self._say("")
        self._refresh()

    @on(Input.Changed, "#model")
    def _typed(self) -> None:
        self._hub = []
        self._wanted = ""
        self.tell("")
        self._refresh(first=True)
        self.search(self.text)

    @work(exclusive=True, group="search")
    async def search(self, text: str) -> None:
        """Ask the Hub; a newer text ends the question before."""
        if not text:
            self._say("")
            return
        await asyncio.sleep(DEBOUNCE)
        self._say("Searching the Hub ...")
        try:
            self._hub = await self.app.answers.ask("search", text=text)
        except AnswerFailed as error:
            text = str(error)
            self._say(text[:1].upper() + text[1:])
            return
        self._say("" if self._hub else "The Hub has no model of a known family by that name")
        self._refresh()

    def _say(self, text: str) -> None:
        self._state.update(text)
        self._state.display = bool(text)

    def _refresh(self, first: bool = False) -> None:
        """List anew; the cursor stays on its model unless it is to go to the first."""
        found = lines(self.text, self._local, self._hub)
        known = {line.spec for line in found}
        if not self.text and self.app.choice.model not in known:
            found.insert(0, Line(self.app.choice.model, self.app.choice.model))
        self._list(found, "" if first and self.text else self.spec or self.app.choice.model)

    def _list(self, found: list[Line], cursor: str = "") -> None:
        self._lines = found
        self._options.set_options([_option(line) for line in found])
        rows = [row for row, line in enumerate(found) if line.spec]
        there = next((row for row in rows if found[row].spec == cursor), None)
        self._options.highlighted = there if there is not None else (rows[0] if rows else None)
        self._highlighted()

    def action_move(self, how: str) -> None:
        """Move in the list while the text has the focus."""
        getattr(self._options, f"action_{how}")()

    # ---- the card

    @on(OptionList.OptionHighlighted)
    def _highlighted(self) -> None:
        spec = self.spec
        if spec == self._looked:
            return
        self._looked, self._wanted = spec, ""
        if spec:
            self.look(spec)
        else:
            self._show([("", "No such model here; a path or Hub id may be typed in full")])

    @work(exclusive=True, group="card")
    async def look(self, spec: str) -> None:
        """Ask for the card of a model; Enter asks again for one that failed."""
        if spec not in self._cards and spec not in self._failed:
            self._show([("", f"Looking at {spec} ...")])
            await asyncio.sleep(DEBOUNCE)
            try:
                self._cards[spec] = await self.app.answers.ask("card", model=spec)
            except AnswerFailed as error:
                self._failed[spec] = str(error)
        if spec in self._failed:
            self._show([("", f"✗ {self._failed[spec]}")])
            self.tell("")
            self._wanted = ""
            return
        self._show(wording.card_lines(self._cards[spec]))
        if self._wanted == spec:
            self._take(spec)

    def _show(self, pairs: list[tuple[str, str]]) -> None:
        self._card.show(pairs)

    # ---- on

    def action_go_on(self) -> None:
        """Take the model under the cursor, as soon as its card is there."""
        spec = self.spec
        if not spec:
            self.warn("No model is marked: type a path or a Hub id, or clear the text")
        elif spec in self._cards:
            self._take(spec)
        else:
            if self._failed.pop(spec, ""):
                self.look(spec)
            self._wanted = spec
            self.tell(f"Looking at {spec} first; then it goes on")

    def action_show(self) -> None:
        """Show the recipe with the model under the cursor."""
        if self.spec:
            self.choose(model=self.spec)
        super().action_show()

    def _take(self, spec: str) -> None:
        from edgeprune.tui.screens.target import TargetScreen

        self._wanted = ""
        self.tell("")
        self.choose(model=spec)
        if self.is_current:
            self.app.push_screen(TargetScreen())


def _option(line: Line) -> Option:
    if line.spec:
        return Option(Content(f"  {line.text}"))
    return Option(Content.styled(line.text, "bold"), disabled=True)
