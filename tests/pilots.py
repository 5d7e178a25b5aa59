"""What tests of the app share: running one, waiting in it, and seeing it as text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from textual.app import App
from textual.pilot import Pilot

from edgeprune.tui.answers import AnswerFailed, Answers
from edgeprune.tui.app import EdgepruneApp

PATIENCE = 60.0


class FixedAnswers(Answers):
    """Answers by ``replies``: question -> value, an exception to raise, or a function of the arguments."""

    def __init__(self, **replies: Any) -> None:
        self.replies = replies
        self.asked: list[tuple[str, dict[str, Any]]] = []

    async def ask(
        self, question: str, on_part: Callable[[Any], None] | None = None, **args: Any
    ) -> Any:
        self.asked.append((question, args))
        if question not in self.replies:
            raise AnswerFailed(f"no reply to '{question}'")
        reply = self.replies[question]
        if callable(reply):
            reply = reply(on_part=on_part, **args)
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def warm_up(self) -> None: ...

    async def close(self) -> None: ...


def piloted(
    act: Callable[[Pilot[Any]], Awaitable[None]],
    app: App[Any] | None = None,
    size: tuple[int, int] = (80, 24),
) -> None:
    """Run ``act`` in an app of ``size`` columns and lines."""

    async def run() -> None:
        async with (app or EdgepruneApp(FixedAnswers())).run_test(size=size) as pilot:
            await act(pilot)

    asyncio.run(run())


async def until(
    pilot: Pilot[Any], condition: Callable[[], object], what: str = "", patience: float = PATIENCE
) -> None:
    """Let the app work until ``condition`` holds; a condition that cannot be asked yet does not."""
    end = time.monotonic() + patience
    pause = 0.01
    while True:
        await pilot.pause(pause)
        pause = min(1.5 * pause, 0.1)  # a look costs, and what takes long is often others' work
        try:
            if condition():
                return
        except (LookupError, AttributeError):
            pass
        except Exception as error:
            if type(error).__name__ not in ("NoMatches", "WrongType"):
                raise
        if time.monotonic() > end:
            raise AssertionError(f"not within {patience:.0f} s: {what}\n{seen(pilot.app)}")


def told(app: App[Any]) -> str:
    """Return the app's notifications, which tests do not draw."""
    return " ".join(each.message for each in app._notifications)


def seen(app: App[Any]) -> str:
    """Return the screen as lines of text."""
    return "\n".join(strip.text.rstrip() for strip in app.screen._compositor.render_strips())
