"""A conversation with one model, and how fast it speaks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Label, Static

from edgeprune import worker
from edgeprune.quantities import format_bytes, format_seconds
from edgeprune.tui.lists import Page
from edgeprune.tui.partner import ChatFailed, Message, Partner, file_bytes

REDRAW_SECONDS = 0.1


class ChatPane(Vertical):
    """The conversation with ``model`` (dense or pruned), exported to ``folder``; ``again`` names the restart key."""

    def __init__(self, model: str, folder: Path, log: Path, again: Callable[[], str]) -> None:
        super().__init__(id=f"chat-{model}")
        self.model = model
        self.folder = folder
        self.partner = Partner(folder, log, self.fail)
        self.failed = False
        self._again = again
        self._history: list[Message] = []
        self._text = ""
        self._shown = ""
        self._line: Static | None = None

    def compose(self) -> ComposeResult:
        """Make an empty conversation."""
        size = file_bytes(self.folder)
        title = f"{self.model}, {format_bytes(size)}" if size else self.model
        yield Label(title, classes="chat-title", markup=False)
        yield Page(classes="chat-talk")
        yield Static("", classes="chat-state", markup=False)

    def on_mount(self) -> None:
        """Draw what was said, at a pace that costs the model nothing."""
        self.query_one(Page).anchor()
        self.set_interval(REDRAW_SECONDS, self._redraw)

    async def on_unmount(self) -> None:
        """Leave no process behind."""
        await self.partner.close()

    async def load(self) -> None:
        """Start the model's process."""
        self.failed = False
        if not self.folder.is_dir():
            command = worker.resume_command(self.folder.parent)
            self.fail(f"{self.folder.name} is gone; make it again with: {command}")
            return
        self.say_state("loading …")
        try:
            ready = await self.partner.start()
        except ChatFailed as error:
            self.fail(str(error))
            return
        plain = f"; {ready['plain']}: it gets plain text" if ready.get("plain") else ""
        self.say_state(f"loaded in {format_seconds(ready['ready'])}{plain}")

    async def answer(self, text: str) -> None:
        """Let the model answer ``text``; what failed is told here and is no part of the conversation."""
        self._show("You", text)
        self._line, self._text, self._shown = self._show(self.model, "…"), "", ""
        self.say_state("speaking …")
        asked = [*self._history, {"role": "user", "content": text}]
        try:
            done = await self.partner.say(asked, self._hear)
        except ChatFailed as error:
            self._finish()
            if self.partner.pid is None:
                self.fail(str(error))
            else:
                self.say_state(f"✗ {error}")
            return
        self._history = [*asked, {"role": "assistant", "content": self._text}]
        self._finish()
        self.say_state(figures(done))

    def clear(self) -> None:
        """Forget what was said."""
        self._history = []
        self._line = None
        self.query_one(Page).remove_children()
        if not self.failed:
            self.say_state("")

    def fail(self, why: str) -> None:
        """Tell that the model's process has ended or did not start, and how to go on."""
        self.failed = True
        self.say_state(f"✗ {why}\n{self._again()} starts it again")

    def say_state(self, text: str) -> None:
        """Show how the model stands, under its conversation."""
        for line in self.query(".chat-state").results(Static):  # none, once the screen is left
            line.update(text)

    def _show(self, who: str, text: str) -> Static:
        line = Static(f"{who}: {text}", classes=f"chat-{who.lower()}", markup=False)
        self.query_one(Page).mount(line)
        return line

    def _hear(self, piece: str) -> None:
        self._text += piece

    def _redraw(self) -> None:
        if self._line is not None and self._text != self._shown:
            self._shown = self._text
            self._line.update(f"{self.model}: {self._text}")

    def _finish(self) -> None:
        self._redraw()
        if self._line is not None and not self._text:
            self._line.update(f"{self.model}: (nothing)")
        self._line = None


def figures(done: dict[str, Any]) -> str:
    """Return how fast an answer came, in the units of the results."""
    from edgeprune.report import QUANTITIES

    show = {quantity.key: quantity.show for quantity in QUANTITIES}
    speed, first = done["tokens_per_second"], done["time_to_first_token_seconds"]
    texts = ["stopped"] if done["stopped"] else []
    texts.append(f"{done['tokens']} tokens")
    if speed is not None:
        texts.append(f"{show['decode_tokens_per_second'](speed)} tokens/s")
    if first is not None:
        texts.append(f"first token after {show['time_to_first_token_seconds'](first)}")
    return ", ".join([*texts, f"{done['prompt_tokens']} tokens of prompt"])
