"""Curves of a run's figures, drawn in text. Its import takes a while: it waits for the first point."""

from __future__ import annotations

from dataclasses import dataclass

from textual.color import Color, ColorParseError
from textual_plotext import PlotextPlot

from edgeprune.tui.picture import Point


@dataclass(frozen=True)
class Drawn:
    """Points to draw: joined, or each with a sign of its own. ``colour`` is one of the theme's variables."""

    points: list[Point]
    colour: str
    sign: str = ""
    """Empty: joined to a line."""


class Curve(PlotextPlot):
    """Draws one or more series over the same x. They differ in colour and, for those who see none, in sign."""

    def __init__(self, title: str, id: str) -> None:
        super().__init__(id=id)
        self._title = title
        self._drawn: list[Drawn] = []
        self.theme = "clear"  # text in the widget's own colours: plotext's would not do in a terminal's palette

    def show(self, *drawn: Drawn) -> None:
        """Draw these from now on."""
        if list(drawn) == self._drawn:
            return
        self._drawn = list(drawn)
        self._lay_out()

    def on_mount(self) -> None:
        """Follow the theme."""
        self.app.theme_changed_signal.subscribe(self, lambda _theme: self._lay_out())

    def _lay_out(self) -> None:
        self.plt.clear_figure()
        self.plt.title(self._title)
        for each in self._drawn:
            xs, ys = [x for x, _ in each.points], [y for _, y in each.points]
            colour = self._colour(each.colour)
            if each.sign or len(xs) == 1:
                sign = each.sign or "+"
                self.plt.scatter(xs, ys, marker=sign, color=colour)
            else:
                self.plt.plot(xs, ys, marker="braille", color=colour)
        self.refresh()

    def _colour(self, name: str) -> tuple[int, int, int] | int | str:
        try:
            colour = Color.parse(self.app.theme_variables[name])
        except (LookupError, ColorParseError):
            return "default"
        if colour.ansi is None:
            return colour.rgb
        return colour.ansi if colour.ansi >= 0 else "default"
