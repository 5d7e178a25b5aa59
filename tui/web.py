"""The app in a browser: ``edgeprune --web``, through textual-serve.

Whoever reaches the page can start runs and read files as this user, so it is served on loopback unless a host is given,
and pages of other sites are kept from talking to it.
"""

from __future__ import annotations

import ipaddress
import logging
import shlex
import sys
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from textual_serve.server import Server

from edgeprune.errors import BadInput
from edgeprune.tui.app import log_file

COMMAND = f"{shlex.quote(sys.executable)} -m edgeprune"


def serve(host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve the app on ``host`` until Ctrl-C; ``say`` is told where it is.

    Raises:
        BadInput: if ``host`` and ``port`` cannot be listened on.
    """
    if not is_loopback(host):
        say(
            f"warning: everybody who reaches {host}:{port} can use this app as you, without a password; "
            "prefer ssh -L and the default host"
        )
    try:
        _Server(host, port, say).serve()
    except OSError as error:
        raise BadInput(
            f"{host}:{port} cannot be listened on: {error.strerror or error}; name another with --port N"
        ) from error


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Server(Server):
    def __init__(self, host: str, port: int, say: Callable[[str], None]) -> None:
        super().__init__(COMMAND, host=host, port=port, title="edgeprune")
        self._say = say

    def initialize_logging(self) -> None:
        """Log to a file: the terminal says where the app is, and nothing else."""
        file = log_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        logging.basicConfig(filename=file, level="INFO", format="%(asctime)s %(message)s")

    async def _make_app(self) -> web.Application:
        app: web.Application = await super()._make_app()
        app.middlewares.append(self._only_own_pages)
        return app

    async def on_startup(self, app: web.Application) -> None:  # noqa: ARG002
        """Say where the app is."""
        self._say(f"edgeprune is at {self.public_url}; Ctrl-C ends it, runs go on")

    @web.middleware
    async def _only_own_pages(self, request: web.Request, handler: Any) -> web.StreamResponse:
        # A page of another site could open the socket (it has no password), or give its own name to our address.
        name = urlsplit(f"//{request.host}").hostname or ""
        origin = request.headers.get("Origin")
        if is_loopback(self.host) and not is_loopback(name):
            raise web.HTTPForbidden(text=f"served on {self.host} only")
        if origin is not None and urlsplit(origin).netloc != request.host:
            raise web.HTTPForbidden(text="asked for by another site")
        self.public_url = (
            f"{request.scheme}://{request.host}"  # the page's links: as it was reached
        )
        response: web.StreamResponse = await handler(request)
        return response
