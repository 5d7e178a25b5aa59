"""The line of keys at the foot of every screen."""

from __future__ import annotations

from typing import Any

from textual.screen import Screen
from textual.widgets import Footer


class KeyFooter(Footer):
    """A footer that is made anew only when other keys are to be shown, and not whenever the focus moves."""

    _shown: list[tuple[str, str, bool]] | None = None

    def bindings_changed(self, screen: Screen[Any]) -> None:
        """Show the keys of ``screen``, if they are not what is shown."""
        if screen.app.app_focus and self.is_attached and screen is self.screen:
            active = screen.active_bindings.values()
            shown = [
                (a.binding.key, a.binding.description, a.enabled) for a in active if a.binding.show
            ]
            if shown == self._shown:
                return
            self._shown = shown
        super().bindings_changed(screen)
