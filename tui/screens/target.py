"""The wizard's second step: how small. One cut, read as a share, as parameters, as a file and as a speed."""

from __future__ import annotations

import asyncio
from typing import Any

from textual import on, work
from textual.app import ComposeResult
from textual.containers import Container
from textual.widgets import Input

from edgeprune.errors import BadInput
from edgeprune.quantities import format_bytes, format_count
from edgeprune.tui import wording
from edgeprune.tui.answers import AnswerFailed
from edgeprune.tui.choice import PRECISIONS, read_target
from edgeprune.tui.lists import Page
from edgeprune.tui.screens.wizard import WizardScreen
from edgeprune.tui.widgets.fields import Dial, Entry, Field, Form, Pick
from edgeprune.tui.widgets.pairs import Pairs

DEBOUNCE = 0.15
READINGS = {
    "sparsity": "Removed",
    "params": "Parameters",
    "memory": "File size",
    "decode": "Decode speed",
}
NOTES = {"sparsity": "of the decoder layers", "params": "in all", "memory": "exported"}


class TargetScreen(WizardScreen):
    """What is set last counts; the other readings follow the engine's answer."""

    STEP = 2

    def __init__(self) -> None:
        super().__init__()
        self._outlook: dict[str, Any] | None = None
        self._typo = ""
        """What is wrong with the text that was typed."""
        self._failed = False
        self._asked: tuple[str, int] | None = None
        self._wanted = False

    def body(self) -> ComposeResult:
        """Make the dial, its readings, and the preview."""
        choice = self.app.choice
        self._kind, self._value = choice.target, choice.value
        self._dial = Dial(choice.value if choice.target == "sparsity" else 0.3, id="dial")
        self._entries = {kind: Entry("", kind, disabled=kind == "decode") for kind in READINGS}
        self._entries[self._kind].put(shown(self._kind, self._value))
        self._precision = Pick(PRECISIONS, choice.precision, "precision")
        self._speed = Field(READINGS["decode"], self._entries["decode"])
        self._preview = Pairs("preview")
        with Container(id="form-and-preview"):
            with Form(id="readings"):
                yield Field("Cut", self._dial)
                for kind, note in NOTES.items():
                    yield Field(READINGS[kind], self._entries[kind], note)
                yield Field("Precision", self._precision)
                yield self._speed
            with Page(id="preview-page"):
                yield self._preview

    def on_mount(self) -> None:
        """Ask for what was chosen before."""
        self._dial.focus()
        self._preview.show([("", "Asking the engine; its first answer takes some seconds ...")])
        self.ask_outlook()

    def on_screen_resume(self) -> None:
        """Ask again if the next step has changed what the time depends on."""
        choice = self.app.choice
        if self._asked not in (None, (choice.effort, choice.tokens)):
            self.ask_outlook()

    # ---- what is set

    @on(Dial.Moved)
    def _dialled(self, event: Dial.Moved) -> None:
        self._entries["sparsity"].put(shown("sparsity", event.value))
        self._set("sparsity", event.value)

    @on(Input.Changed, "Entry")
    def _typed(self, event: Input.Changed) -> None:
        kind = str(event.input.id)
        try:
            value = read_target(kind, event.value)
        except BadInput as error:
            self.workers.cancel_group(self, "outlook")
            self._typo = f"{READINGS[kind]}: {error}"
            self._refuse(self._typo)
        else:
            self._set(kind, value)

    @on(Pick.Changed, "#precision")
    def _precision_changed(self) -> None:
        self._set(self._kind, self._value)

    def _set(self, kind: str, value: float) -> None:
        self._kind, self._value, self._typo = kind, value, ""
        self.tell("")
        self.ask_outlook()

    def _refuse(self, problem: str) -> None:
        self._outlook, self._wanted = None, False
        self.warn(problem)

    # ---- what the engine says of it

    @work(exclusive=True, group="outlook")
    async def ask_outlook(self) -> None:
        """Ask for the preview; what is set in the meantime ends the question."""
        self._outlook, self._failed = None, False
        await asyncio.sleep(DEBOUNCE)
        choice, precision = self.app.choice, self._precision.value
        self._asked = (choice.effort, choice.tokens)
        try:
            outlook = await self.app.answers.ask(
                "outlook",
                model=choice.model,
                target={self._kind: self._value},
                precision=precision,
                effort=choice.effort,
                tokens=choice.tokens,
            )
        except AnswerFailed as error:
            self._failed = True
            self._refuse(str(error))
            return
        self._take(outlook, precision)

    def _take(self, outlook: dict[str, Any], precision: str) -> None:
        self._outlook = outlook
        ((key, value),) = outlook["recipe_target"].items()
        self.choose(target=key, value=value, precision=precision)
        self._follow(outlook)
        self._preview.show(wording.outlook_lines(outlook, precision))
        if self._wanted:
            self.action_go_on()

    def _follow(self, outlook: dict[str, Any]) -> None:
        """Turn the dial and the readings that were not set to what the cut comes to."""
        found = {
            "sparsity": outlook["sparsity"],
            "params": outlook["parameters"],
            "memory": outlook["file_bytes"],
            "decode": outlook["decode_tokens_per_second"],
        }
        self._dial.most = outlook["limits"]["sparsity_max"]
        self._dial.value = self._value if self._kind == "sparsity" else outlook["sparsity"]
        for kind, value in found.items():
            if kind != self._kind:
                self._entries[kind].put(shown(kind, value))
        self._follow_speed(outlook)

    def _follow_speed(self, outlook: dict[str, Any]) -> None:
        unknown = outlook["decode_tokens_per_second"] is None
        self._entries["decode"].disabled = unknown
        note = f"cannot be set: {outlook['speed_basis']}" if unknown else "tokens/s, predicted"
        self._speed.note(note)

    # ---- on

    def action_go_on(self) -> None:
        """Go on when the engine has no objection."""
        from edgeprune.tui.screens.recipe import RecipeScreen

        if self._outlook is not None:
            self._wanted = False
            self.tell("")
            if self.is_current:
                self.app.push_screen(RecipeScreen())
        elif self._typo:
            self.warn(self._typo)
        else:
            if self._failed:
                self.ask_outlook()
            self._wanted = True
            self.tell("Asking the engine first; then it goes on")


def shown(kind: str, value: float | None) -> str:
    """Return a reading as it is typed."""
    if value is None:
        return ""
    if kind == "sparsity":
        return f"{100 * value:.3g}%"
    if kind == "decode":
        return f"{value:.1f}"
    return format_count(value) if kind == "params" else format_bytes(value)
