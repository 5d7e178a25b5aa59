"""The engine's answers to the app: a process of its own, asked over its standard input.

The app's process never imports torch; ``edgeprune.answers`` does, and serves one JSON object a line.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from edgeprune.errors import EdgepruneError

COMMAND = (sys.executable, "-m", "edgeprune.answers")
LONGEST_LINE = 64 * 2**20
GRACE = 2.0
"""Seconds that the process has to end by itself when its input has ended."""


class AnswerFailed(EdgepruneError):
    """The engine could not answer, for the reason that the message names; ``exit_code`` is 2 for bad input."""

    def __init__(self, text: str, exit_code: int = 1) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class Answers:
    """Asks the engine; its process starts with the first question and again after a death.

    Args:
        log: where its libraries' chatter goes.
    """

    def __init__(self, log: Path, command: tuple[str, ...] = COMMAND) -> None:
        self._log = log
        self._command = command
        self._numbers = count(1)
        self._waiting: dict[int, tuple[asyncio.Future[Any], Callable[[Any], None]]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()

    async def ask(
        self, question: str, on_part: Callable[[Any], None] | None = None, **args: Any
    ) -> Any:
        """Return the answer as plain JSON values; what comes before it goes to ``on_part``.

        Raises:
            AnswerFailed: with the engine's own words, or because its process has died.
        """
        process = await self._running()
        number = next(self._numbers)
        future = asyncio.get_running_loop().create_future()
        self._waiting[number] = (future, on_part or (lambda _part: None))
        line = json.dumps({"id": number, "ask": question, "args": args}) + "\n"
        try:
            assert process.stdin is not None
            process.stdin.write(line.encode())
            with suppress(ConnectionError):  # its end is told by the reader
                await process.stdin.drain()
            return await future
        finally:
            self._waiting.pop(number, None)

    async def warm_up(self) -> None:
        """Start the process, so that its imports are done when the first question comes."""
        with suppress(AnswerFailed):
            await self._running()

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        await end(process)
        if self._reader is not None:
            await self._reader

    async def _running(self) -> asyncio.subprocess.Process:
        async with self._starting:
            if self._process is None or self._process.returncode is not None:
                self._process = await self._start()
                self._reader = asyncio.create_task(self._read(self._process))
            return self._process

    async def _start(self) -> asyncio.subprocess.Process:
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("ab") as log:
                return await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    limit=LONGEST_LINE,
                    start_new_session=True,  # the terminal's signals are the app's
                )
        except OSError as error:
            raise AnswerFailed(f"the engine does not start: {error}") from error

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            with suppress(ValueError, TypeError, AttributeError):  # a stray line is not ours
                self._take(json.loads(line))
        code = await process.wait()
        text = f"the engine's process ended (code {code}); what it said is in {self._log}"
        for future, _ in list(self._waiting.values()):
            if not future.done():
                future.set_exception(AnswerFailed(text))

    def _take(self, message: dict[str, Any]) -> None:
        found = self._waiting.get(message.get("id", 0))
        if found is None:
            return  # nobody waits for it any more
        future, on_part = found
        if "part" in message:
            on_part(message["part"])
        elif not future.done():
            if "error" in message:
                future.set_exception(
                    AnswerFailed(message["error"], int(message.get("exit_code", 1)))
                )
            else:
                future.set_result(message.get("answer"))


async def end(process: asyncio.subprocess.Process) -> None:
    """Close the input of ``process``, which ends it; if it does not within ``GRACE``, kill it."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), GRACE)
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
