"""What training and pruning have come to: figures, and the curves of them that there are."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from textual.app import ComposeResult

from edgeprune.tui.lists import Page
from edgeprune.tui.picture import Picture, thinned
from edgeprune.tui.widgets.run_text import figures
from edgeprune.tui.widgets.steady import Steady

if TYPE_CHECKING:
    from edgeprune.tui.widgets.curve import Curve, Drawn

NOTHING = "No figures yet: each pruning iteration and each training update adds a point."
MOST = 400
"""Points that are drawn of a series: two for a column of a wide screen."""
FIGURE_LINES = 3
SQUAT, TALL = 9, 12
"""The least lines of a curve where all are in sight, and its lines where one scrolls."""
TITLES = {
    "loss": "Training and held-out loss (dots and x, nats/token) by update",
    "perplexity": "Held-out perplexity by update",
    "pruning": "Loss (nats/token) by pruning iteration",
}


class RunCurves(Page):
    """Shows the curves of a picture; one appears with its first point."""

    def __init__(self, id: str, classes: str) -> None:
        super().__init__(id=id, classes=classes)
        self._curves: dict[str, Curve] = {}
        self._height = TALL

    def compose(self) -> ComposeResult:
        """Make the line of figures."""
        yield Steady(NOTHING, id="curve-figures")

    def show(self, picture: Picture) -> None:
        """Draw the curves of ``picture``."""
        if not (picture.pruning_loss.points or picture.training_loss.points):
            return
        self.query_one("#curve-figures", Steady).put(figures(picture))
        for name, drawn in _series(picture).items():
            if drawn:
                curve = self._curve(name)
                curve.call_later(curve.show, *drawn)  # it may not be mounted yet
        self._divide()

    def _curve(self, name: str) -> Curve:
        from edgeprune.tui.widgets.curve import Curve

        if name not in self._curves:
            self._curves[name] = Curve(TITLES[name], id=f"curve-{name}")
            self._curves[name].styles.height = self._height
            self.mount(self._curves[name])
        return self._curves[name]

    def on_resize(self) -> None:
        """Divide the room anew."""
        self._divide()

    def _divide(self) -> None:
        """Give all curves the same height: so that all are in sight, if that leaves them legible."""
        each = (self.size.height - FIGURE_LINES) // max(1, len(self._curves))
        height = each if each >= SQUAT else TALL
        if height != self._height:
            self._height = height
            for curve in self._curves.values():
                curve.styles.height = height


def _series(picture: Picture) -> dict[str, list[Drawn]]:
    from edgeprune.tui.widgets.curve import Drawn

    all_of_them = {
        "loss": [
            Drawn(picture.training_loss.points, "primary"),
            Drawn(picture.held_out_loss.points, "warning", "x"),
        ],
        "perplexity": [Drawn(picture.perplexity.points, "warning", "x")],
        "pruning": [Drawn(picture.pruning_loss.points, "success", "o")],
    }
    return {
        name: [replace(d, points=thinned(d.points, MOST)) for d in drawn if d.points]
        for name, drawn in all_of_them.items()
    }
