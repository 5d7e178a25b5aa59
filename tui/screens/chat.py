"""Talk to the dense and the pruned model of a run, beside each other."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.screen import Screen
from textual.widgets import Header, Input, Static

from edgeprune.tui.widgets.chat_pane import ChatPane
from edgeprune.tui.widgets.footer import KeyFooter

if TYPE_CHECKING:
    from edgeprune.tui.app import EdgepruneApp

IN_TURNS = "Both get the same message; the second starts when the first has ended, so neither slows the other."
ALONE = "There is not enough free memory for both: each is loaded for its turn, which takes longer."


class ChatScreen(Screen[None]):
    """Two models, one input. Their processes live as long as the screen."""

    app: EdgepruneApp
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (120, "-wide")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(
            "escape", "back", "Stop, back", id="chat.back", tooltip="Stop the answer, then go back"
        ),
        Binding(
            "ctrl+l",
            "clear",
            "Clear",
            id="chat.clear",
            tooltip="Begin a new conversation",
            priority=True,
        ),
        Binding(
            "ctrl+r",
            "again",
            "Restart",
            id="chat.again",
            tooltip="Start a model again that has ended",
        ),
    ]

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = Path(folder).absolute()
        self._at_work = asyncio.Lock()
        self._speaking: ChatPane | None = None
        self._answering = False
        self._stopping = False
        self._alone = False

    def compose(self) -> ComposeResult:
        """Make both panes."""
        from edgeprune import worker
        from edgeprune.tui.app import log_file

        yield Header()
        yield Static(IN_TURNS, id="chat-how", markup=False)
        with Container(id="chat-panes"):
            for model, name in (("dense", worker.EXPORT_DENSE), ("pruned", worker.EXPORT_PRUNED)):
                yield ChatPane(model, self._folder / name, log_file(), self._again_key)
        yield Input(placeholder="Say something to both, then press Enter", id="chat-input")
        yield KeyFooter()

    def on_mount(self) -> None:
        """Begin to load."""
        self.sub_title = f"{self._folder.name}, dense and pruned"
        self.query_one(Input).focus()
        self.load()

    @property
    def _panes(self) -> list[ChatPane]:
        return list(self.query(ChatPane))

    @work(group="load")
    async def load(self) -> None:
        """Load both models, one after the other, if the memory has room for both."""
        from edgeprune import machine
        from edgeprune.tui.partner import file_bytes, fit_together

        sizes = [file_bytes(pane.folder) for pane in self._panes]
        self._alone = not fit_together(sizes, machine.memory().available)
        if self._alone:
            self.query_one("#chat-how", Static).update(f"{IN_TURNS} {ALONE}")
            return
        async with self._at_work:
            for pane in self._panes:
                await pane.load()

    @on(Input.Submitted)
    def send(self, event: Input.Submitted) -> None:
        """Give both the message."""
        text = event.value.strip()
        if not text:
            return
        if self._answering:
            self.notify("They are still speaking; Escape stops them")
            return
        if all(pane.failed for pane in self._panes):
            self.notify(f"Neither model is there; {self._again_key()} starts them again")
            return
        event.input.clear()
        self._answering, self._stopping = True, False
        self.answer(text)

    @work(group="answer")
    async def answer(self, text: str) -> None:
        """Let one after the other answer."""
        try:
            async with self._at_work:
                for pane in self._panes:
                    if not self._stopping:
                        await self._answer(pane, text)
        finally:
            self._answering = False

    async def _answer(self, pane: ChatPane, text: str) -> None:
        if self._alone:
            others = [other for other in self._panes if other is not pane]
            await asyncio.gather(*(other.partner.close() for other in others))
            if pane.partner.pid is None:
                await pane.load()
        if pane.failed or self._stopping:
            return
        self._speaking = pane
        try:
            await pane.answer(text)
        finally:
            self._speaking = None

    # ---- keys

    def action_back(self) -> None:
        """Stop the answer; if none is given, or it does not stop, go back."""
        if not self._answering or self._stopping:
            self.app.pop_screen()
            return
        self._stopping = True
        if self._speaking is not None:
            self._speaking.partner.stop()

    def action_clear(self) -> None:
        """Begin a new conversation."""
        if self._answering:
            self.notify("They are still speaking; Escape stops them")
            return
        for pane in self._panes:
            pane.clear()

    @work(group="load")
    async def action_again(self) -> None:
        """Start what has ended again."""
        failed = [pane for pane in self._panes if pane.failed]
        if not failed:
            self.notify("Both models are there")
        async with self._at_work:
            for pane in failed:
                await pane.load()

    def _again_key(self) -> str:
        bindings = self.active_bindings.values()
        keys = [active.binding for active in bindings if active.binding.action == "again"]
        return self.app.get_key_display(keys[0]) if keys else "F1 names the key that"
