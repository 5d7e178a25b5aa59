"""Logging in to a host by SSH as its user's configuration, agents, keys and known hosts have it.

Host keys are never accepted silently: one that is not in the user's known_hosts files raises ``UnknownHostKey``, one
that differs from what is there is refused.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import asyncssh

from edgeprune.errors import BadInput, EdgepruneError, one_line
from edgeprune.remote.hosts import Host

CONNECT_SECONDS = 20
KEEPALIVE_SECONDS, KEEPALIVE_COUNT = 15, 3
"""A link over which nothing comes for as many of these is dead."""
CIPHERS = "^aes128-gcm@openssh.com"
"""Preferred: the fastest here, as measured; what the user's configuration says comes first."""
NO_CERTIFICATES = "-*-cert-v01@openssh.com"
MORE_KEYS = "+ssh-ed25519,ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521,rsa-sha2-512,rsa-sha2-256"
"""Kinds of host keys to ask for beside the known ones, so that a changed key is seen to have changed."""
DEFAULT_PORT = 22
KEY_FILES = ("id_ed25519", "id_ecdsa", "id_rsa", "id_ed25519_sk", "id_ecdsa_sk")
KNOWN_HOSTS = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2")
SYSTEMS_KNOWN_HOSTS = ("/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")

Ask = Callable[[str], Awaitable[str]]
Place = tuple[str, str | None, int | None]
"""Address, user and port, None where the configuration says them."""


class Unreachable(EdgepruneError):
    """The host cannot be reached, or the link to it broke: trying again may help."""


class UnknownHostKey(BadInput):
    """The host's key is in none of the known_hosts files.

    ``fingerprint`` is what ``ssh-keygen -l`` shows ("SHA256:..."), ``algorithm`` the key's kind, ``machine`` the
    address that showed it: the host's own, or that of a jump host on the way; ``shown`` says all of it in a line.
    """

    def __init__(self, name: str, machine: str, algorithm: str, fingerprint: str) -> None:
        kind = next((kind for kind in ("ed25519", "ecdsa") if kind in algorithm), "rsa")
        self.shown = (
            f"{name}: the key of {machine} is not known yet: {algorithm} {fingerprint}; compare it with what is shown "
            f"there by: ssh-keygen -lf /etc/ssh/ssh_host_{kind}_key.pub"
        )
        super().__init__(f"{self.shown}; then accept it with: edgeprune hosts check {name}")
        self.machine, self.algorithm, self.fingerprint = machine, algorithm, fingerprint


async def log_in(
    host: Host, ask: Ask | None = None, trusted: str = ""
) -> list[asyncssh.SSHClientConnection]:
    """Return the connections that lead to ``host``, its own the last: those before are its jump hosts'.

    ``ask`` is awaited for the passphrase of a key. A host key that is not known yet and has the fingerprint
    ``trusted`` is added to the user's known_hosts.

    Raises:
        Unreachable: if the host or a jump host does not answer.
        UnknownHostKey: if a host key is in no known_hosts file; also once the ``trusted`` one was added, with
            that fingerprint: the caller connects anew.
        BadInput: if a host key has changed, no key of the user's is accepted, or the configuration is of no use.
        EdgepruneError: if the server speaks nothing that is safe enough.
    """
    hops: list[asyncssh.SSHClientConnection] = []
    way = _Way(host.name, ask, trusted)
    try:
        await _follow(way, hops, (host.address, host.user, host.port))
    except BaseException:
        abort(hops)
        raise
    return hops


def abort(hops: Sequence[asyncssh.SSHClientConnection]) -> None:
    """Drop connections at once."""
    for hop in reversed(hops):
        hop.abort()


@dataclass(frozen=True)
class _Way:
    """What the steps of one login share."""

    name: str
    ask: Ask | None
    trusted: str
    unlocked: dict[Path, asyncssh.SSHKey] = field(default_factory=dict)


async def _follow(
    way: _Way,
    hops: list[asyncssh.SSHClientConnection],
    place: Place,
    before: tuple[str, ...] = (),
) -> None:
    """Append to ``hops`` the connections to the jump hosts of ``place``, and to itself.

    ``before`` are the places that need this one.
    """
    if place[0] in before:
        raise BadInput(f"{way.name}: its jump hosts lead in a circle; look at ~/.ssh/config")
    given = dict(zip(("host", "username", "port"), place, strict=True))
    given = {key: value for key, value in given.items() if value is not None}
    settings = await _settings(way, given)
    for jump in _jumps(settings, place) if not hops else []:
        await _follow(way, hops, jump, (*before, place[0]))
    hops.append(await _connected(way, settings, given, hops[-1] if hops else None))


def _jumps(settings: asyncssh.SSHClientConnectionOptions, place: Place) -> list[Place]:
    """Return the jump hosts on the way to ``place``; a rule for all hosts names one for itself, too."""
    named = settings.tunnel.split(",") if isinstance(settings.tunnel, str) else []
    jumps = [_jump(text) for text in named if text.strip().lower() != "none"]
    return [jump for jump in jumps if jump[0] != place[0]]


async def _settings(way: _Way, given: dict[str, Any]) -> asyncssh.SSHClientConnectionOptions:
    """Return what the user's configuration says about an address; no key is read."""
    try:
        return await asyncssh.SSHClientConnectionOptions.construct(
            **given, config=(), client_keys=None
        )
    except (ValueError, OSError, asyncssh.Error) as error:
        raise BadInput(f"{way.name}: ~/.ssh/config is of no use: {one_line(error)}") from None


def _jump(text: str) -> Place:
    """Return the jump host that an entry of ProxyJump means."""
    user, _, place = text.strip().removeprefix("ssh://").rpartition("@")
    address, _, port = place.rpartition(":")
    if not port.isdigit() or (":" in address and not address.startswith("[")):
        address, port = place, ""
    return address.strip("[]"), user or None, int(port) if port else None


# ---- one connection


async def _connected(
    way: _Way,
    settings: asyncssh.SSHClientConnectionOptions,
    given: dict[str, Any],
    tunnel: asyncssh.SSHClientConnection | None,
) -> asyncssh.SSHClientConnection:
    door = _Door(way, settings, given)
    options = {**given, **_options(settings, door), "tunnel": tunnel}
    try:
        try:
            return await asyncssh.connect(**options)
        except asyncssh.PermissionDenied:
            keys = await _unlocked(way, settings)
            if not keys:
                raise
            return await asyncssh.connect(**{**options, "client_keys": keys})
    except (OSError, ValueError, asyncssh.Error) as error:
        raise _explained(error, door) from error


def _options(settings: asyncssh.SSHClientConnectionOptions, door: _Door) -> dict[str, Any]:
    """Return what asyncssh is told beyond what it finds in the configuration itself."""
    config = settings.config
    options: dict[str, Any] = {
        "client_factory": lambda: door,
        "known_hosts": door.known_keys,
        "x509_trusted_certs": None,
        "connect_timeout": CONNECT_SECONDS,
        "keepalive_interval": KEEPALIVE_SECONDS,
        "keepalive_count_max": KEEPALIVE_COUNT,
        "ignore_encrypted": True,
    }
    if config.get("Ciphers") is None:
        options["encryption_algs"] = CIPHERS
    if config.get("HostKeyAlgorithms") is None:
        options["server_host_key_algs"] = MORE_KEYS if door.is_known() else NO_CERTIFICATES
    if config.get("IdentityFile"):
        options["client_keys"] = [str(path) for path in _key_files(settings) if path.is_file()]
    if config.get("IdentitiesOnly"):
        options["agent_identities"] = [str(path) for path in _public_keys(settings)]
    return options


def _key_files(settings: asyncssh.SSHClientConnectionOptions) -> list[Path]:
    named = cast(list[str], settings.config.get("IdentityFile", []))
    names = named or [f"~/.ssh/{name}" for name in KEY_FILES]
    return [Path(name).expanduser() for name in names]


def _public_keys(settings: asyncssh.SSHClientConnectionOptions) -> list[Path]:
    """Return the files that tell which of an agent's keys are meant."""
    files = [
        path if path.suffix == ".pub" else path.with_name(f"{path.name}.pub")
        for path in _key_files(settings)
    ]
    return [path for path in files if path.is_file()]


async def _unlocked(
    way: _Way, settings: asyncssh.SSHClientConnectionOptions
) -> list[asyncssh.SSHKey]:
    """Return the keys that need a passphrase, unlocked by what the user is asked for.

    Raises:
        BadInput: if there are such keys, and nobody to ask or a wrong answer.
    """
    locked = [path for path in _key_files(settings) if _is_locked(path)]
    if locked and way.ask is None:
        raise BadInput(
            f"{way.name}: the key {locked[0]} needs its passphrase; unlock it with: ssh-add {locked[0]}"
        )
    for path in locked:
        if way.ask is not None and path not in way.unlocked:
            passphrase = await way.ask(f"Passphrase of the key {path}")
            way.unlocked[path] = _opened(way, path, passphrase)
    return [way.unlocked[path] for path in locked]


def _opened(way: _Way, path: Path, passphrase: str) -> asyncssh.SSHKey:
    try:
        return asyncssh.read_private_key(path, passphrase)
    except (OSError, ValueError) as error:
        raise BadInput(f"{way.name}: {path}: {one_line(error)}; or type: ssh-add {path}") from None


def _is_locked(path: Path) -> bool:
    try:
        asyncssh.read_private_key(path)
    except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as error:
        return "passphrase" in str(error).lower()
    except (OSError, ValueError):
        pass
    return False


# ---- host keys


class _Door(asyncssh.SSHClient):
    """Decides about the host key of one machine, and remembers what it saw."""

    def __init__(
        self, way: _Way, settings: asyncssh.SSHClientConnectionOptions, given: dict[str, Any]
    ) -> None:
        self.way = way
        self.given = given
        self.machine = settings.host
        config = settings.config
        own = cast(Sequence[str], config.get("UserKnownHostsFile", KNOWN_HOSTS))
        others = cast(Sequence[str], config.get("GlobalKnownHostsFile", SYSTEMS_KNOWN_HOSTS))
        self._own = [Path(name).expanduser() for name in own]
        self._files = self._own + [Path(name).expanduser() for name in others]
        self._name = settings.host_key_alias or settings.host
        self._port = None if settings.port == DEFAULT_PORT else settings.port
        has_port = self._port and not settings.host_key_alias
        self.listed = f"[{self._name}]:{self._port}" if has_port else self._name
        """How known_hosts calls the machine."""
        self.known_in: Path | None = None
        """The file that has keys of the machine."""
        self.shown: asyncssh.SSHKey | None = None
        """A key that is not among them."""

    def is_known(self) -> bool:
        """Tell whether the files have a key of the machine, or authorities that certify it."""
        keys, authorities, _ = self.known_keys(self._name, "", self._port)
        return bool(keys or authorities)

    def known_keys(self, host: str, addr: str, port: int | None) -> Any:
        """Return what the files know of a machine: its keys, authorities for them, keys revoked."""
        found: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
        for path in self._files:
            try:
                known = asyncssh.import_known_hosts(_content(path).decode("utf-8", "replace"))
            except ValueError as error:
                raise BadInput(
                    f"{self.way.name}: {path}: {one_line(error)}; mend that line"
                ) from None
            keys = known.match(host, addr, port)[:3]
            for every, some in zip(found, keys, strict=True):
                every.extend(some)
            if keys[0] and self.known_in is None:
                self.known_in = path
        return found

    def validate_host_public_key(
        self,
        host: str,  # noqa: ARG002
        addr: str,  # noqa: ARG002
        port: int,  # noqa: ARG002
        key: asyncssh.SSHKey,
    ) -> bool:
        """Refuse a key that is not known, but write down the one that the user trusts."""
        self.shown = key
        if self.known_in is None and key.get_fingerprint() == self.way.trusted:
            self._remember(key)
        return False

    def _remember(self, key: asyncssh.SSHKey) -> None:
        path = self._own[0] if self._own else Path(os.devnull)
        if path.exists() and not path.is_file():
            raise BadInput(
                f"{self.way.name}: ~/.ssh/config lets no host key be kept (UserKnownHostsFile {path})"
            )
        line = b"%s %s" % (self.listed.encode(), key.export_public_key().strip())
        _append(path, line + b"\n")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _append(path: Path, line: bytes) -> None:
    """Append a whole line in one write: others may do so at the same time."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    old = _content(path)
    cut = b"\n" if old and not old.endswith(b"\n") else b""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, cut + line)
    finally:
        os.close(file)


# ---- what went wrong


def _explained(error: Exception, door: _Door) -> EdgepruneError:
    name, machine = door.way.name, door.machine
    if isinstance(error, asyncssh.HostKeyNotVerifiable):
        return _refused(error, door)
    if isinstance(error, asyncssh.PermissionDenied):
        return BadInput(
            f"{name}: {machine} accepts no key of yours ({one_line(error)}); bring yours there with: "
            f"ssh-copy-id {_typed(door.given)}"
        )
    if isinstance(error, TimeoutError):
        return Unreachable(f"{name}: {machine} does not answer within {CONNECT_SECONDS} s")
    if isinstance(error, asyncssh.ConnectionLost | asyncssh.ServiceNotAvailable | ConnectionError):
        return Unreachable(f"{name}: {machine} cannot be reached: {one_line(error)}")
    if isinstance(error, asyncssh.DisconnectError):
        return EdgepruneError(
            f"{name}: {machine} and this machine do not understand each other: {one_line(error)}"
        )
    if isinstance(error, FileNotFoundError | PermissionError | ValueError):
        return BadInput(f"{name}: {one_line(error)}; look at ~/.ssh/config")
    return Unreachable(f"{name}: {machine} cannot be reached: {one_line(error)}")


def _typed(given: dict[str, Any]) -> str:
    port = f"-p {given['port']} " if "port" in given else ""
    user = f"{given['username']}@" if "username" in given else ""
    return f"{port}{user}{given['host']}"


def _refused(error: Exception, door: _Door) -> EdgepruneError:
    if door.shown is None:
        return BadInput(f"{door.way.name}: {one_line(error)}")
    fingerprint = door.shown.get_fingerprint()
    if door.known_in is not None:
        return BadInput(
            f"{door.way.name}: THE HOST KEY OF {door.listed} HAS CHANGED: it is now {door.shown.get_algorithm()} "
            f"{fingerprint}. Somebody may be listening in between. Only if you know why it changed, forget the old "
            f"one: {_forget(door.known_in, door.listed)}"
        )
    return UnknownHostKey(door.way.name, door.listed, door.shown.get_algorithm(), fingerprint)


def _forget(file: Path, machine: str) -> str:
    named = [] if file == Path(KNOWN_HOSTS[0]).expanduser() else ["-f", str(file)]
    return shlex.join(["ssh-keygen", *named, "-R", machine])
