"""Forms: rows of a label, something to set, and a note; all of it moved through with up and down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.reactive import reactive
from textual.style import Style
from textual.widget import Widget
from textual.widgets import Input, Label, Static


class Form(VerticalScroll, can_focus=False):
    """Rows to set."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down", "app.focus_next", "Next field", show=False, id="form.next"),
        Binding("up", "app.focus_previous", "Field before", show=False, id="form.previous"),
    ]


class Field(Horizontal):
    """A row: the label is marked while the row is in focus; the note says what belongs to the value."""

    def __init__(self, label: str, control: Widget, note: str = "", id: str = "") -> None:
        super().__init__(id=id or None)
        self.control = control
        self._title = label
        self._label = Label(f"  {label}", classes="label", markup=False)
        self._note = Static(note, classes="note", markup=False)
        self._note.display = bool(note)

    def compose(self) -> ComposeResult:
        """Make the row."""
        yield self._label
        yield self.control
        yield self._note

    def note(self, text: str) -> None:
        """Say ``text`` behind the value."""
        self._note.update(text)
        self._note.display = bool(text)

    def on_descendant_focus(self) -> None:
        """Mark the row."""
        self._label.update(f"▸ {self._title}")

    def on_descendant_blur(self) -> None:
        """Take the mark away."""
        self._label.update(f"  {self._title}")


class Entry(Input):
    """A value to type; in a line of its own height."""

    def __init__(self, value: str, id: str, disabled: bool = False) -> None:
        super().__init__(value, id=id, compact=True, disabled=disabled)

    def put(self, text: str) -> None:
        """Show another value that nobody typed: no change is told."""
        if self.value != text:
            with self.prevent(Input.Changed):
                self.value = text


class Words(Static, can_focus=True):
    """A line of words to choose from; the word in question is always in sight."""

    class Changed(Message):
        """Other words were chosen."""

        def __init__(self, words: Words) -> None:
            super().__init__()
            self.words = words

        @property
        def control(self) -> Words:
            """Whose words they are."""
            return self.words

    def __init__(self, words: Sequence[str], id: str) -> None:
        super().__init__(id=id)
        self._words = list(words)

    def render(self) -> Content:
        """Show all words that there is room for."""
        shown = [self._shown(word) for word in self._words]
        return in_sight(shown, self._at, self.size.width)

    @property
    def _at(self) -> int:
        """Where the word in question is."""
        raise NotImplementedError

    def _shown(self, word: str) -> Content:
        raise NotImplementedError

    def action_move(self, by: int) -> None:
        """Go to the word that far to the right, and round at the end."""
        raise NotImplementedError


class Pick(Words):
    """One of a few words; left and right choose."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("right,l,space", "move(1)", "Next", id="pick.next"),
        Binding("left,h", "move(-1)", "Before", show=False, id="pick.previous"),
    ]
    value: reactive[str] = reactive("", init=False)

    def __init__(self, words: Sequence[str], value: str, id: str) -> None:
        super().__init__(words, id)
        self.set_reactive(Pick.value, value)

    def offer(self, words: Sequence[str]) -> None:
        """Let other words be chosen from; if the chosen one is no more, the first is."""
        self._words = list(words)
        if self.value in words:
            self.refresh()
        else:
            self.value = words[0]

    @property
    def _at(self) -> int:
        return self._words.index(self.value)

    def _shown(self, word: str) -> Content:
        """Put the chosen word in brackets."""
        if word != self.value:
            return Content(f" {word} ")
        return Content.styled(f"[{word}]", "bold reverse" if self.has_focus else "bold")

    def watch_value(self) -> None:
        """Tell of it."""
        self.refresh()
        self.post_message(self.Changed(self))

    def action_move(self, by: int) -> None:
        """Choose the word that far to the right, and go round at the end."""
        self.value = self._words[(self._at + by) % len(self._words)]

    def on_click(self) -> None:
        """Choose the next with the mouse."""
        self.action_move(1)


class Ticks(Words):
    """Any of a few words; left and right move the mark, the space bar ticks."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "tick", "Tick", id="ticks.tick"),
        Binding("right,l", "move(1)", "Next", show=False, id="ticks.next"),
        Binding("left,h", "move(-1)", "Before", show=False, id="ticks.previous"),
    ]

    def __init__(self, words: Sequence[str], value: Sequence[str], id: str) -> None:
        super().__init__(words, id)
        self._ticked = set(value)
        self._mark = 0

    @property
    def value(self) -> tuple[str, ...]:
        """The words ticked, in their order."""
        return tuple(word for word in self._words if word in self._ticked)

    def offer(self, words: Sequence[str]) -> None:
        """Let other words be chosen from; a tick is kept where its word is."""
        before = self.value
        self._words = list(words)
        self._mark = min(self._mark, len(words) - 1)
        self._ticked &= set(words)
        self._follow(before)

    @property
    def _at(self) -> int:
        return self._mark

    def _shown(self, word: str) -> Content:
        at = self._words.index(word)
        sign = "✓" if word in self._ticked else " "
        style = "bold reverse" if self.has_focus and at == self._mark else ""
        click = Style.from_meta({"@click": f"tick({at})"})
        return Content.styled(f"[{sign}] {word}", style).stylize(click)

    def action_move(self, by: int) -> None:
        """Move the mark, round at the end."""
        self._mark = (self._mark + by) % len(self._words)
        self.refresh()

    def action_tick(self, at: int | None = None) -> None:
        """Tick the marked word or that one, or take its tick away."""
        self._mark = self._mark if at is None else at
        before = self.value
        self._ticked ^= {self._words[self._mark]}
        self._follow(before)

    def _follow(self, before: tuple[str, ...]) -> None:
        self.refresh()
        if self.value != before:
            self.post_message(self.Changed(self))


def in_sight(words: Sequence[Content], at: int, width: int) -> Content:
    """Return words in a line that begins with the first one from which the word ``at`` still fits."""
    first = 0
    while first < at and sum(word.cell_length + 1 for word in words[first : at + 1]) > width - 2:
        first += 1
    line = Content(" ").join(words[first:])
    return Content.assemble("‹ ", line) if first else line


class Dial(Static, can_focus=True):
    """A share as a bar; left and right move it by 1 %, brackets by 5 %."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("right,l", "move(1)", "+1 %", id="dial.more"),
        Binding("left,h", "move(-1)", "-1 %", show=False, id="dial.less"),
        Binding("right_square_bracket,shift+right", "move(5)", "+5 %", id="dial.much_more"),
        Binding(
            "left_square_bracket,shift+left", "move(-5)", "-5 %", show=False, id="dial.much_less"
        ),
    ]
    value: reactive[float] = reactive(0.3)
    most: reactive[float] = reactive(0.99)

    class Moved(Message):
        """The user moved the bar to ``value``."""

        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

    def __init__(self, value: float, id: str) -> None:
        super().__init__(id=id)
        self.set_reactive(Dial.value, value)

    def render(self) -> str:
        """Draw the bar as wide as there is room."""
        return bar(self.value, self.most, self.size.width)

    def action_move(self, by: int) -> None:
        """Move to a whole per cent."""
        self.value = moved(self.value, by, self.most)
        self.post_message(self.Moved(self.value))


def moved(value: float, by: int, most: float) -> float:
    """Return the share ``by`` per cent further, whole, from 1 % to the most."""
    last = max(1, min(99, int(100 * most + 1e-6)))
    return min(max(round(100 * value) + by, 1), last) / 100


def bar(value: float, most: float, width: int) -> str:
    """Draw a share of 0 to 100 %; dots are what cannot be reached."""
    text = f" {100 * value:.3g} % removed"
    cells = max(10, width - len(text) - 2)
    full, reach = round(value * cells), round(most * cells)
    rest = "".join("─" if n < reach else "·" for n in range(full + 1, cells))
    return f"├{'━' * full}●{rest}┤{text}"[: max(width, 12)]
