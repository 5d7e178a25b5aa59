"""Text that is drawn anew only when it has changed."""

from __future__ import annotations

from textual.content import Content
from textual.widgets import Static


class Steady(Static):
    """A text that is set often and changes seldom."""

    _shown = Content("")

    def put(self, text: Content) -> None:
        """Show ``text``; nothing is drawn, nor laid out, that need not be."""
        old, self._shown = self._shown, text
        if (text.plain, text.spans) != (old.plain, old.spans):
            self.update(text, layout=self._may_grow(old, text))

    def _may_grow(self, old: Content, new: Content) -> bool:
        if not self.styles.auto_dimensions:
            return False
        wraps = self.styles.text_wrap == "wrap"
        return wraps or old.plain.count("\n") != new.plain.count("\n") or not old.plain
