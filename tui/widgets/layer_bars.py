"""The model as bars: for each decoder layer, what is left of its attention and of its MLP."""

from __future__ import annotations

import math
from dataclasses import dataclass

from textual import events
from textual.app import ComposeResult
from textual.content import Content

from edgeprune.quantities import format_count
from edgeprune.tui.lists import Page
from edgeprune.tui.picture import Layer, Picture
from edgeprune.tui.widgets.steady import Steady

NARROWEST = 38
"""Columns that a layer needs."""
WITH_CUT = 60
"""Columns from which the share that is cut is shown, too."""
GAP = 2
SCROLLBAR = 2
LEGEND_LINES = 2


class LayerBars(Page):
    """Shows the layers of a picture in as many columns as it takes, and scrolls if that is not enough."""

    def compose(self) -> ComposeResult:
        """Make the text that is scrolled."""
        yield Steady(id="layer-text")

    def on_mount(self) -> None:
        """There is nothing to show yet."""
        self._picture = Picture()

    def on_resize(self, _event: events.Resize) -> None:
        """Divide the room anew."""
        self.show(self._picture)

    def show(self, picture: Picture) -> None:
        """Draw the layers of ``picture``."""
        self._picture = picture
        width, height = self.content_region.size
        if width:
            self.query_one(Steady).put(layer_text(picture, width, height))


@dataclass(frozen=True)
class _Scale:
    """The widest there is, so that bars can be compared between layers."""

    heads: int
    channels: int

    @classmethod
    def of(cls, layers: list[Layer]) -> _Scale:
        heads = max(max(layer.heads, layer.dense_heads or 0) for layer in layers)
        channels = max(max(layer.channels, layer.dense_channels or 0) for layer in layers)
        return cls(max(1, heads), max(1, channels))


def layer_text(picture: Picture, width: int, height: int) -> Content:
    """Return the layers of ``picture`` in ``width`` columns and, if it goes, in ``height`` lines."""
    layers = picture.layers
    if not layers:
        return Content("The layers are known when the source model is checked.")
    scale = _Scale.of(layers)
    columns = _columns(len(layers), width, height)
    if LEGEND_LINES + math.ceil(len(layers) / columns) > height:
        width -= SCROLLBAR
        columns = _columns(len(layers), width, height)
    rows = math.ceil(len(layers) / columns)
    cell = (width + GAP) // columns - GAP
    lines = [legend(picture, scale.heads, scale.channels)]
    gap = Content(" " * GAP)
    for row in range(rows):
        lines.append(gap.join([_cell(layer, scale, cell) for layer in layers[row::rows]]))
    return Content("\n").join(lines)


def _columns(number: int, width: int, height: int) -> int:
    fit = max(1, height - LEGEND_LINES)
    return max(1, min((width + GAP) // (NARROWEST + GAP), math.ceil(number / fit)))


def legend(picture: Picture, heads: int, channels: int) -> Content:
    """Return the two lines that say what the bars are."""
    if picture.dense is None:
        of = "widths now; those of the dense model are unknown"
    else:
        of = f"KV heads of {heads} and MLP channels of {channels:,}"
    since = "not pruned yet"
    if picture.iteration:
        left = format_count(picture.decoder_parameters or 0)
        since = f"after iteration {picture.iteration} of {picture.iterations}: {left} left"
    elif picture.present is not None:
        since = "pruned"
    importance = "; importance from -1 to +1" if picture.importance else ""
    return Content.assemble((f"█ left ░ pruned: {of}\n", "dim"), (f"{since}{importance}", "dim"))


def _cell(layer: Layer, scale: _Scale, width: int) -> Content:
    importance = "" if layer.importance is None else f"{layer.importance:+.2f}"
    cut = f"{layer.sparsity:5.0%} cut" if layer.sparsity is not None and width >= WITH_CUT else ""
    heads, channels = (
        f"{layer.heads:>{len(str(scale.heads))}}",
        f"{layer.channels:>{len(str(scale.channels))}}",
    )
    tail = f" {importance:>5}{cut}"
    room = max(6, width - 3 - 1 - 1 - len(heads) - 1 - 1 - len(channels) - len(tail))
    attention = max(2, room // 4)
    parts: list[str | tuple[str, str]] = [
        (f"{layer.index:>3} ", "dim"),
        *_bar(layer.heads, layer.dense_heads, scale.heads, attention, "$secondary"),
        f" {heads} ",
        *_bar(layer.channels, layer.dense_channels, scale.channels, room - attention, "$primary"),
        f" {channels}",
        (tail, ""),
    ]
    return Content.assemble(*parts)


def _bar(
    value: int, dense: int | None, scale: int, width: int, style: str
) -> tuple[tuple[str, str], ...]:
    """Return a bar of what is left and what is gone; what is not all shows as not all, what is not nothing too."""
    whole = max(value, dense or 0)
    cells = round(width * whole / scale)
    left = round(width * value / scale)
    if value > 0:
        left = max(1, left)
    if value < whole:
        left = max(0, min(left, cells - 1))
    gone = max(0, cells - left)
    return (("█" * left, style), ("░" * gone, "dim"), (" " * (width - left - gone), ""))
