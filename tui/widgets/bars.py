"""The widths that the decoder layers kept, as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from textual.content import Content
from textual.geometry import Size
from textual.widget import Widget

from edgeprune.tui import figures


class LayerWidths(Widget):
    """A line a decoder layer: kept of dense, MLP channels and query heads."""

    def __init__(
        self, dense: Sequence[Mapping[str, int]], pruned: Sequence[Mapping[str, int]]
    ) -> None:
        super().__init__()
        self._dense = dense
        self._pruned = pruned

    def render(self) -> Content:
        """Draw as wide as there is room."""
        width = self.content_size.width
        return Content("\n".join(figures.layer_lines(self._dense, self._pruned, width)))

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:  # noqa: ARG002
        """One line a layer, under a heading."""
        return len(self._dense) + 1
