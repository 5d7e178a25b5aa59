"""The machines that the user saved by name, in ``hosts.toml`` in the folder of their choices."""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import unquote, urlsplit

import tomli_w

from edgeprune.errors import BadInput, one_line
from edgeprune.locations import config_folder

Kind = Literal["box", "board"]
LOCAL = "local"
"""What recipes call the machine at which they are run; no host has this name."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# These reach the commands of the user's ssh configuration (ProxyCommand): nothing that means more than itself.
_ADDRESS = re.compile(r"\w[\w.-]*")
_USER = re.compile(r"[\w.][\w.+@-]*")


@dataclass(frozen=True)
class Host:
    """A machine that is reached by SSH.

    ``address`` is a name, an IP address or a ``Host`` of ~/.ssh/config, which says the ``user`` and the ``port`` where
    they are None here. A ``box`` prunes and trains, a ``board`` is measured. ``python`` is the interpreter there that
    makes virtual environments, ``wheelhouse`` a folder here with wheels for a machine without a network.
    """

    name: str
    address: str
    user: str | None = None
    port: int | None = None
    kind: Kind = "box"
    python: str = "python3"
    wheelhouse: str | None = None

    def __post_init__(self) -> None:
        _check(self)

    @property
    def url(self) -> str:
        """The host as ``ssh://user@address:port``, as far as that is set here."""
        address = f"[{self.address}]" if ":" in self.address else self.address
        user = f"{self.user.replace('@', '%40')}@" if self.user else ""
        return f"ssh://{user}{address}{f':{self.port}' if self.port else ''}"


def list_hosts() -> list[Host]:
    """Return the saved hosts in the order of their names. BadInput if their file is damaged."""
    try:
        text = _file().read_text("utf-8")
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise BadInput(f"{_file()}: cannot be read: {one_line(error)}") from None
    try:
        saved = tomllib.loads(text)
        return [Host(name=name, **saved[name]) for name in sorted(saved)]
    except (tomllib.TOMLDecodeError, TypeError, BadInput) as error:
        raise BadInput(f"{_file()}: {one_line(error)}; mend it, or delete it") from None


def find(name_or_url: str) -> Host:
    """Return the host saved by this name, or the one that ``ssh://user@host[:port]`` means.

    Raises:
        BadInput: if there is no such host, naming those that are saved.
    """
    if "://" in name_or_url:
        return _unsaved(name_or_url)
    saved = list_hosts()
    for host in saved:
        if host.name == name_or_url:
            return host
    known = ", ".join(host.name for host in saved)
    raise BadInput(
        f"{name_or_url}: no such host; "
        + (f"saved are: {known}; " if known else "none is saved; ")
        + "add it with: edgeprune hosts add NAME ssh://user@host"
    )


def add(host: Host, replace: bool = False) -> None:
    """Save ``host``. BadInput if its name is that of a saved one, unless it is to be replaced."""
    refuse(host, replace)
    _write([*(each for each in list_hosts() if each.name != host.name), host])


def refuse(host: Host, replace: bool) -> None:
    """Raise BadInput if ``add`` would."""
    if not _NAME.fullmatch(host.name) or host.name == LOCAL:
        raise BadInput(
            f'"{host.name}" is no name for a host: it is made of letters, digits, "-", "_" and ".", and "{LOCAL}" is '
            "this machine"
        )
    if not replace and any(each.name == host.name for each in list_hosts()):
        raise BadInput(f"{host.name} is saved already; save it anew with --replace")


def remove(name: str) -> None:
    """Forget the host saved by this name; the machine itself stays as it is. BadInput if there is none."""
    kept = [host for host in list_hosts() if host.name != name]
    if len(kept) == len(list_hosts()):
        raise BadInput(f"{name}: no such host is saved; see: edgeprune hosts list")
    _write(kept)


def parse_url(text: str) -> tuple[str | None, str, int | None]:
    """Return the (user, address, port) of ``ssh://[user@]host[:port]``, None for what it leaves out.

    Raises:
        BadInput: if ``text`` is anything else, or says more.
    """
    form = "a host is written ssh://user@host or ssh://user@host:port"
    try:
        url = urlsplit(text)
        user, password, address, port = url.username, url.password, url.hostname, url.port
    except ValueError as error:
        raise BadInput(f'"{text}": {one_line(error)}; {form}') from None
    if password is not None:
        raise BadInput(f"a password has no place in ssh://...: keys are used; {form}")
    if url.scheme != "ssh" or not address or url.path not in ("", "/") or url.query or url.fragment:
        raise BadInput(f'"{text}" is no host; {form}')
    # urlsplit makes names lower case, but a Host of ~/.ssh/config is what its owner wrote.
    start = url.netloc.lower().rindex(address)
    found = Host(
        name=LOCAL,
        address=url.netloc[start : start + len(address)],
        user=None if user is None else unquote(user),
        port=port,
    )
    return found.user, found.address, found.port


def _unsaved(url: str) -> Host:
    user, address, port = parse_url(url)
    host = Host(name=url, user=user, address=address, port=port)
    return changed(host, name=host.url)  # by which it is found again


# ---- what may be saved


def _check(host: Host) -> None:
    """Raise BadInput if a field of ``host`` cannot be what it is meant to be: files are edited by hand."""
    texts: dict[str, Any] = {"address": host.address, "python": host.python}
    texts |= {"user": host.user} if host.user is not None else {}
    texts |= {"wheelhouse": host.wheelhouse} if host.wheelhouse is not None else {}
    for key, value in texts.items():
        if not isinstance(value, str) or not value or "\0" in value:
            raise BadInput(f"{host.name}: {key} is no text: {value!r}")
    if not _ADDRESS.fullmatch(host.address) and not _is_ipv6(host.address):
        raise BadInput(f'{host.name}: "{host.address}" is no address of a machine')
    if host.user is not None and not _USER.fullmatch(host.user):
        raise BadInput(f'{host.name}: "{host.user}" is no name of a user')
    if host.port is not None and not (type(host.port) is int and 0 < host.port < 65_536):
        raise BadInput(f"{host.name}: {host.port!r} is no port: 1 to 65535")
    if host.kind not in get_args(Kind):
        raise BadInput(f'{host.name}: {host.kind!r} is no kind of host: "box" or "board"')


def _is_ipv6(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).version == 6 and "%" not in address
    except ValueError:
        return False


# ---- the file


def _file() -> Path:
    return config_folder() / "hosts.toml"


def _write(hosts: Iterable[Host]) -> None:
    saved = {host.name: _saved(host) for host in sorted(hosts, key=lambda host: host.name)}
    temporary = _file().with_name(f"hosts.toml.{os.getpid()}.tmp")
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(tomli_w.dumps(saved), "utf-8")
        temporary.replace(_file())
    except OSError as error:
        raise BadInput(f"{_file()}: cannot be written: {error.strerror}") from error


def _saved(host: Host) -> dict[str, Any]:
    return {
        key: value for key, value in asdict(host).items() if key != "name" and value is not None
    }
