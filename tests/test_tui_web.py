"""The app in a real browser: headless Chromium, driven by its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from edgeprune.tui.web import is_loopback

PATIENCE = 60.0


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address at which ``edgeprune --web`` serves the app."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen(
        [sys.executable, "-m", "edgeprune", "--web", "--port", str(port)],
        cwd=tmp_path_factory.mktemp("served"),
        env=os.environ | {"XDG_STATE_HOME": str(tmp_path_factory.mktemp("no-runs"))},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        assert f"edgeprune is at http://127.0.0.1:{port}" in said
        yield f"http://127.0.0.1:{port}"
        process.terminate()


def test_the_app_is_used_in_a_browser(served: str, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")

    async def main() -> None:
        async with browsing(chromium, tmp_path) as page:
            await page.ask("Network.enable")
            await page.ask("Page.navigate", url=served)
            await page.until(lambda: "No runs yet" in page.drawn, "the first screen")
            await page.click(300, 300)
            await page.press("F1", 112)
            await page.until(lambda: "start.new" in page.drawn, "the keys")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://elsewhere.example"}, 403),
        ({"Host": "elsewhere.example"}, 403),
    ],
)
def test_pages_of_other_sites_are_refused(
    served: str, headers: dict[str, str], status: int
) -> None:
    async def main() -> int:
        async with aiohttp.ClientSession() as session, session.get(served, headers=headers) as got:
            return got.status

    assert asyncio.run(main()) == status


def test_a_port_in_use_is_told(served: str) -> None:
    port = served.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-m", "edgeprune", "--web", "--port", port],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 2
    assert "--port N" in done.stderr


@pytest.mark.parametrize(
    ("host", "alone"),
    [("localhost", True), ("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("pi", False)],
)
def test_only_loopback_is_without_a_warning(host: str, alone: bool) -> None:
    assert is_loopback(host) == alone


# ---- a browser


class Page:
    """A page of a browser: asks it, and gathers what its terminal was told to draw."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.drawn = ""
        self._socket = socket
        self._number = 0
        self._answers: dict[int, Any] = {}

    async def ask(self, method: str, **params: Any) -> Any:
        self._number += 1
        number = self._number
        await self._socket.send_json({"id": number, "method": method, "params": params})
        await self.until(lambda: number in self._answers, method)
        return self._answers.pop(number)

    async def click(self, x: int, y: int) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            await self.ask(
                "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1
            )

    async def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            await self.ask(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
            )

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"not within {PATIENCE:.0f} s: {what}\n{self.drawn[-2000:]}")
            try:
                self._take(await self._socket.receive_json(timeout=1.0))
            except TimeoutError:
                continue

    def _take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._answers[message["id"]] = message
        elif message.get("method") == "Network.webSocketFrameReceived":
            frame = message["params"]["response"]
            data = frame["payloadData"]
            self.drawn += (
                base64.b64decode(data).decode("utf-8", "replace") if frame["opcode"] == 2 else data
            )


@asynccontextmanager
async def browsing(chromium: str, folder: Path) -> AsyncIterator[Page]:
    process = await asyncio.create_subprocess_exec(
        chromium,
        "--headless",
        "--no-sandbox",  # CI is root in a container
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--remote-debugging-port=0",
        f"--user-data-dir={folder}",
        "--window-size=1200,800",
        "about:blank",
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        port = await devtools_port(folder)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as found:
                pages = json.loads(await found.text())
            address = next(p["webSocketDebuggerUrl"] for p in pages if p["type"] == "page")
            async with session.ws_connect(address, max_msg_size=0) as socket:
                yield Page(socket)
    finally:
        process.kill()
        await process.wait()


async def devtools_port(folder: Path) -> int:
    file = folder / "DevToolsActivePort"
    end = time.monotonic() + PATIENCE
    while not (file.is_file() and file.read_text().count("\n")):
        assert time.monotonic() < end, "Chromium did not start"
        await asyncio.sleep(0.05)
    return int(file.read_text().split("\n")[0])
