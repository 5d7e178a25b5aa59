"""The wizard's third step: texts, effort, recovery, machines, measuring and the output folder."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.widgets import Input

from edgeprune.errors import BadInput
from edgeprune.quantities import format_count, format_seconds
from edgeprune.tui import choice as choices
from edgeprune.tui import wording
from edgeprune.tui.answers import AnswerFailed
from edgeprune.tui.choice import EFFORTS, HERE, RECOVERIES, TOKENS, Choice
from edgeprune.tui.lists import Page
from edgeprune.tui.screens.wizard import WizardScreen
from edgeprune.tui.widgets.fields import Entry, Field, Form, Pick, Ticks, Words
from edgeprune.tui.widgets.pairs import Pairs

DEBOUNCE = 0.3
LABELS = {
    "calibration": "Calibration",
    "effort": "Effort",
    "recovery": "Recovery",
    "own_tokens": "Tokens",
    "data": "Data",
    "where": "Runs on",
    "evaluation": "Evaluation",
    "devices": "Measures on",
    "prompt": "Prompt",
    "generate": "Generate",
    "repeats": "Repeats",
    "folder": "Folder",
}
NOTES = {
    "own_tokens": "to train on, such as 5M",
    "prompt": "tokens, to measure with",
    "generate": "tokens",
    "repeats": "measured, after a warm-up",
}
THIS = "this machine"
"""No host can be called that: there is a blank in it."""


class RecipeScreen(WizardScreen):
    """Everything has a default, so that Enter goes through."""

    STEP = 3
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(
            "ctrl+r",
            "hosts",
            "Hosts",
            id="recipe.hosts",
            tooltip="Other machines to run and to measure on: add, check, remove",
        ),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._left = False
        """For the hosts, which may have come and gone by the time that it is seen again."""
        self._times: dict[str, str] = {}
        self._basis = ""
        self._agreed: tuple[str, ...] = ()
        """The data whose licences were shown."""

    def body(self) -> ComposeResult:
        """Make a row for each choice, and what follows from them."""
        chosen = self.app.choice
        self._default_folder = str(replace(chosen, folder="").run_folder())
        self._controls = _controls(chosen, self._default_folder)
        self._rows = {
            name: Field(LABELS[name], control, NOTES.get(name, ""))
            for name, control in self._controls.items()
        }
        self._preview = Pairs("preview")
        with Container(id="form-and-preview"):
            with Form(id="recipe-form"):
                yield from self._rows.values()
            with Page(id="preview-page"):
                yield self._preview

    def on_mount(self) -> None:
        """Show what belongs to the choices; begin at effort, which is changed most."""
        self._follow()
        self._controls["effort"].focus()
        self.ask_times()
        self.ask_hosts()

    def on_screen_resume(self) -> None:
        """Look for hosts that were added or removed."""
        if self._left:
            self._left = False
            self.ask_hosts()

    # ---- what is set

    @on(Input.Changed, "Entry")
    @on(Words.Changed)
    def _changed(self) -> None:
        problem = self._keep()
        self._follow()
        if problem:
            self.warn(problem[1])
        else:
            self.tell("")

    @on(Pick.Changed, "#effort")
    @on(Pick.Changed, "#recovery")
    @on(Input.Changed, "#own_tokens")
    @on(Input.Changed, "#data")
    def _other_times(self) -> None:
        self.ask_times()

    def _keep(self) -> tuple[str, str] | None:
        """Keep what can be used; return the field that cannot, and why."""
        problem = None
        for name, read in _readers(self._default_folder).items():
            if not self._counts(name):
                continue
            try:
                self.choose(**{name: read(self._controls[name].value)})
            except BadInput as error:
                problem = problem or (name, str(error))
        return problem

    def _counts(self, name: str) -> bool:
        """Whether a row has a meaning beside the recovery chosen."""
        recovery = self._controls["recovery"].value
        return {"own_tokens": recovery == "own", "data": recovery != "none"}.get(name, True)

    def _follow(self) -> None:
        """Show the rows that count, and what follows from the choices."""
        for name, row in self._rows.items():
            row.display = self._counts(name)
        chosen = self.app.choice
        little = chosen.tokens < TOKENS.get(chosen.recovery, 0)
        self._rows["data"].note(
            f"{format_count(chosen.tokens)} tokens, read once" if little else ""
        )
        self._preview.show(list(self._facts()))

    def _facts(self) -> Iterator[tuple[str, str]]:
        chosen = self.app.choice
        yield "Where", wording.places(chosen.where, chosen.devices)
        yield "Time", "\n".join(map(self._time, RECOVERIES))
        if self._basis:
            other = "" if chosen.where == HERE else f"; {chosen.where} takes another time"
            yield "", self._basis + other
        if chosen.recovery != "none":
            for spec, licence in choices.licences(chosen.data):
                yield "Licence", f"{spec}: {licence}"
        yield "Texts", "builtin, a file (.txt, .jsonl, .parquet; .gz, too) or a data set of the Hub"
        if chosen.recovery != "none":
            yield (
                "Data",
                "such texts, with commas between them, each perhaps with a weight "
                "(notes.txt=3, builtin=1); or adapt-pruner, the paper's mixture of data sets; "
                "quick and full read a text once: again and again it would be learnt by heart",
            )

    def _time(self, recovery: str) -> str:
        mark = "▸" if recovery == self.app.choice.recovery else " "
        tokens = self._tokens(recovery)
        what = f"trains on {format_count(tokens)} tokens" if tokens else "no training"
        return f"{mark} {recovery}: {what}, {self._times.get(recovery, 'time unknown yet')}"

    def _tokens(self, recovery: str) -> int:
        return replace(self.app.choice, recovery=recovery).tokens

    # ---- how long it takes

    @work(exclusive=True, group="times")
    async def ask_times(self) -> None:
        """Ask how long each kind of recovery takes."""
        await asyncio.sleep(DEBOUNCE)
        for recovery in RECOVERIES:
            try:
                self._times[recovery] = await self._ask_time(recovery)
            except AnswerFailed as error:
                self._times[recovery], self._basis = "time unknown", str(error)
            self._follow()

    async def _ask_time(self, recovery: str) -> str:
        chosen = self.app.choice
        outlook: dict[str, Any] = await self.app.answers.ask(
            "outlook",
            model=chosen.model,
            target={chosen.target: chosen.value},
            precision=chosen.precision,
            effort=chosen.effort,
            tokens=self._tokens(recovery),
        )
        self._basis = outlook["seconds_basis"]
        seconds = outlook["seconds"]
        if not seconds:
            return "time unknown"
        return f"about {format_seconds(sum(each or 0 for each in seconds.values()))}"

    # ---- where

    @work(exclusive=True, group="hosts")
    async def ask_hosts(self) -> None:
        """Offer the hosts that are saved."""
        try:
            hosts = await self.app.answers.ask("hosts")
        except AnswerFailed as error:
            self._rows["where"].note(f"saved hosts unknown: {error}")
            return
        self._rows["where"].note("" if hosts else "no other machine is saved: see Hosts")
        for name, words in _machines(hosts).items():
            control = self._controls[name]
            assert isinstance(control, Pick | Ticks)
            control.offer(words)

    def action_hosts(self) -> None:
        """Add, check and remove the machines that can be chosen."""
        self._left = True
        self.app.show_hosts()

    # ---- on

    def action_go_on(self) -> None:
        """Go on if all can be used; licences of a mixture are shown first."""
        problem = self._keep() or next(((None, p) for p in self.app.choice.problems()), None)
        if problem:
            self.warn(problem[1])
            if problem[0]:
                self._controls[problem[0]].focus()
            return
        self.tell("")
        chosen = self.app.choice
        licences = choices.licences(chosen.data) if chosen.tokens else []
        if licences and self._agreed != chosen.data:
            self._show_licences(licences)
        else:
            self._go_on()

    def _show_licences(self, licences: list[tuple[str, str]]) -> None:
        from edgeprune.tui.screens.licences import LicencesScreen

        def then(agreed: bool | None) -> None:
            if agreed:
                self._agreed = self.app.choice.data
                self._go_on()

        self.app.push_screen(LicencesScreen(licences), then)

    def _go_on(self) -> None:
        from edgeprune.tui.screens.preflight import PreflightScreen

        self.app.push_screen(PreflightScreen())


def _controls(chosen: Choice, default_folder: str) -> dict[str, Entry | Pick | Ticks]:
    where, devices = _shown(chosen.where), [_shown(each) for each in chosen.devices]
    return {
        "calibration": Entry(chosen.calibration, "calibration"),
        "effort": Pick(EFFORTS, chosen.effort, "effort"),
        "recovery": Pick(RECOVERIES, chosen.recovery, "recovery"),
        "own_tokens": Entry(format_count(chosen.own_tokens), "own_tokens"),
        "data": Entry(", ".join(chosen.data), "data"),
        "where": Pick(list(dict.fromkeys((THIS, where))), where, "where"),
        "evaluation": Entry(chosen.evaluation, "evaluation"),
        "devices": Ticks(list(dict.fromkeys((THIS, *devices))), devices, "devices"),
        "prompt": Entry(str(chosen.prompt), "prompt"),
        "generate": Entry(str(chosen.generate), "generate"),
        "repeats": Entry(str(chosen.repeats), "repeats"),
        "folder": Entry(chosen.folder or default_folder, "folder"),
    }


def _shown(machine: str) -> str:
    return THIS if machine == HERE else machine


def _read_machine(word: str) -> str:
    return HERE if word == THIS else word


def _machines(hosts: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the words to choose from in the two rows of machines: boards do not prune."""
    boxes = [host["name"] for host in hosts if host["kind"] == "box"]
    return {"where": [THIS, *boxes], "devices": [THIS, *(host["name"] for host in hosts)]}


def _readers(default_folder: str) -> dict[str, Callable[[Any], Any]]:
    """Return how each field is read."""

    def folder(text: str) -> str:
        return "" if text.strip() == default_folder else choices.read_folder(text)

    return {
        "calibration": lambda text: choices.read_text("Calibration", text),
        "effort": str,
        "recovery": str,
        "own_tokens": choices.read_tokens,
        "data": choices.read_data,
        "where": _read_machine,
        "evaluation": lambda text: choices.read_text("Evaluation", text),
        "devices": lambda words: tuple(map(_read_machine, words)),
        "prompt": lambda text: choices.read_whole("Prompt", text),
        "generate": lambda text: choices.read_whole("Generate", text, 2),
        "repeats": lambda text: choices.read_whole("Repeats", text),
        "folder": folder,
    }
