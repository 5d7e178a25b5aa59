"""A model to talk to: its process, ``profiles/chat.py``, seen from the app."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgeprune.errors import EdgepruneError
from edgeprune.profiles import chat, runner
from edgeprune.tui.answers import end

Message = dict[str, str]


class ChatFailed(EdgepruneError):
    """The model does not answer, for the reason that the message names."""


class Partner:
    """The model exported to ``folder``.

    Args:
        log: where its libraries' chatter goes.
        on_death: is told when the process ends while nobody waits for an answer.
    """

    def __init__(self, folder: Path, log: Path, on_death: Callable[[str], None]) -> None:
        self._folder = folder
        self._log = log
        self._on_death = on_death
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._said: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._awaited = False

    @property
    def pid(self) -> int | None:
        """The process, if one is at work."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def start(self) -> dict[str, Any]:
        """Load the model; return what it says when it is ready (``ready`` in seconds, ``plain``).

        Raises:
            ChatFailed: it cannot be loaded.
        """
        await self.close()
        self._said = asyncio.Queue()
        try:
            self._process = await self._begin()
        except OSError as error:
            raise ChatFailed(f"its process does not start: {error}") from error
        self._reader = asyncio.create_task(self._read(self._process, self._said))
        try:
            return await self._next()
        except ChatFailed:
            await self.close()
            raise

    async def say(self, messages: list[Message], on_text: Callable[[str], None]) -> dict[str, Any]:
        """Go on with the conversation ``messages``; return the figures of the answer when all of it was told.

        Raises:
            ChatFailed: it refused, or its process has ended.
        """
        self._tell({"say": messages, "max_tokens": chat.MAX_TOKENS})
        while "done" not in (message := await self._next()):
            on_text(message.get("text", ""))
        done: dict[str, Any] = message["done"]
        return done

    def stop(self) -> None:
        """Let it stop in the middle of an answer."""
        with suppress(ChatFailed):  # it has stopped for good
            self._tell({"stop": True})

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        await end(process)
        if self._reader is not None:
            await self._reader

    async def _begin(self) -> asyncio.subprocess.Process:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                # -P: the folder of chat.py has a profile.py, which is not the standard library's.
                *(sys.executable, "-P", chat.__file__, str(self._folder)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # the terminal's signals are the app's
            )

    def _tell(self, message: dict[str, Any]) -> None:
        if self._process is None or self._process.stdin is None:
            raise ChatFailed("its process has ended")
        with suppress(ConnectionError):  # its end is told by the reader
            self._process.stdin.write((json.dumps(message) + "\n").encode())

    async def _next(self) -> dict[str, Any]:
        self._awaited = True
        try:
            message = await self._said.get()
        finally:
            self._awaited = False
        if message is None:
            raise ChatFailed(self._death())
        if "error" in message:
            raise ChatFailed(message["error"])
        return message

    async def _read(
        self, process: asyncio.subprocess.Process, said: asyncio.Queue[dict[str, Any] | None]
    ) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            with suppress(ValueError):  # half a line of a process that was killed
                said.put_nowait(json.loads(line))
        await process.wait()
        if process is not self._process:
            return  # it was closed
        said.put_nowait(None)
        if not self._awaited:
            self._on_death(self._death())

    def _death(self) -> str:
        code = self._process.returncode if self._process is not None else None
        how = "" if code is None else f" (signal {-code})" if code < 0 else f" (code {code})"
        return f"its process has ended{how}; what it said is in {self._log}"


def file_bytes(folder: Path) -> int:
    """Return the size of an exported model's graph and weights; 0 if there is none."""
    return sum(path.stat().st_size for path in folder.glob("*.onnx*"))


def fit_together(sizes: list[int], available: int) -> bool:
    """Tell whether models with files of ``sizes`` bytes can be loaded at once into ``available`` bytes."""
    return sum(sizes) * runner.MEMORY_FACTOR <= available
