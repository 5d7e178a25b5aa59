"""An asyncio loop in a thread of its own, whose work is waited for from outside."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError
from typing import Any, TypeVar

PATIENCE = 10.0
"""Seconds that work which was cancelled may take to clean up."""

_T = TypeVar("_T")
Told = Callable[[Callable[[], object]], None]
"""Has something done in the thread that waits, while the work goes on."""


class Background:
    """The loop, at work until ``end``."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def call(self, work: Callable[[Told], Coroutine[Any, Any, _T]]) -> _T:
        """Return what ``work`` comes to. What it is to tell meanwhile is done in this thread, in order.

        An exception here, as by Ctrl-C, cancels the work, which gets a while to clean up. CancelledError once it was
        ended.
        """
        if not self.is_alive():
            raise CancelledError("it was closed")
        inbox: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        ended = threading.Event()
        future = asyncio.run_coroutine_threadsafe(_marked(work(inbox.put), ended), self._loop)
        future.add_done_callback(lambda _: inbox.put(None))
        try:
            while (said := inbox.get()) is not None:
                said()
            return future.result()
        except BaseException:
            future.cancel()
            ended.wait(PATIENCE)
            raise

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Let ``work`` go on by itself."""
        asyncio.run_coroutine_threadsafe(work, self._loop)

    async def ask(self, question: Callable[[], _T], told: Told) -> _T:
        """Return the answer to ``question``, which is asked in the thread that waits."""
        answer: asyncio.Future[_T] = self._loop.create_future()
        told(lambda: self._loop.call_soon_threadsafe(answer.set_result, question()))
        return await answer

    def is_alive(self) -> bool:
        """Tell whether it was not ended yet."""
        return self._thread.is_alive()

    def end(self) -> None:
        """Cancel what is at work and end the thread."""
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _marked(work: Coroutine[Any, Any, _T], ended: threading.Event) -> _T:
    try:
        return await work
    finally:
        ended.set()


async def _cancel_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
