"""A real OpenSSH server on loopback, with a user's home over there and one over here that are both temporary.

``from sshd import sshd`` in a test module makes the fixture known there.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from edgeprune.remote.hosts import Host

PATIENCE = 20.0
"""Seconds to wait for what must come at once; only a failing test waits that long."""
ALIAS = "far"
SETTINGS = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
StrictModes no
UsePAM no
PidFile none
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
MaxStartups 100
MaxSessions 100
Subsystem sftp internal-sftp
SetEnv HOME={home} XDG_DATA_HOME={home}/.local/share
"""
CONFIG = """\
Host {alias}
  HostName 127.0.0.1
  Port {port}
  User {user}
  IdentityFile ~/.ssh/id_ed25519
"""


def wait_until(condition: Callable[[], object]) -> None:
    """Return once ``condition()`` is true."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.01)


class Sshd:
    """The server, what is on its machine, and the client's home.

    ``host`` reaches it by the alias of ~/.ssh/config, ``url`` by address, user and port.
    """

    def __init__(self, folder: Path, client_home: Path) -> None:
        self._folder = folder
        self.home = folder / "far-home"
        self.root = self.home / ".local/share/edgeprune"
        self.client_home = client_home
        self.port = _free_port()
        self.user = getpass.getuser()
        self.url = f"ssh://{self.user}@127.0.0.1:{self.port}"
        self.host = Host(name=ALIAS, address=ALIAS, python=sys.executable)
        self._server: subprocess.Popen[bytes] | None = None
        self._prepare()

    # ---- the server

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        program = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin")
        assert program is not None
        self._server = subprocess.Popen(
            [program, "-D", "-E", str(self.log), "-f", str(self._folder / "sshd_config")],
            stdin=subprocess.DEVNULL,
        )
        wait_until(self._answers)

    def stop(self) -> None:
        """End the server and all that is logged in there, as if the machine were switched off."""
        if self._server is not None:
            sessions = self._sessions()  # no longer its children once it is gone
            self._server.terminate()
            for session in sessions:
                with suppress(psutil.NoSuchProcess):
                    session.kill()
            self._server.wait()
            self._server = None

    def cut(self) -> None:
        """Break all links to the server; it stays, and so do the commands that run there."""
        assert self._server is not None
        for session in self._sessions():
            with suppress(psutil.NoSuchProcess):
                session.kill()

    def is_linked(self) -> bool:
        """Tell whether anybody is logged in."""
        return bool(self._sessions())

    def set_up(self, setting: str, other: str) -> None:
        """Start the server anew with another setting in the place of this one."""
        settings = self._folder / "sshd_config"
        text = settings.read_text()
        assert setting in text
        settings.write_text(text.replace(setting, other))
        self.stop()
        self.start()

    def processes(self, text: str) -> list[psutil.Process]:
        """Return the processes on this machine that have ``text`` on their command line."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            if text in " ".join(process.info["cmdline"] or []):
                found.append(process)
        return found

    @property
    def log(self) -> Path:
        """What the server says, when a test fails."""
        return self._folder / "sshd.log"

    # ---- keys

    def new_host_key(self) -> None:
        """Give the server another host key, as a machine that was set up anew has, or a false one."""
        self._keygen("host_key")
        self.stop()
        self.start()

    def certify_key(self, authority: Path) -> None:
        """Make an authority, and have the server show its certificate for the host key."""
        self._keygen(authority.name, authority.parent)
        key = str(self._folder / "host_key.pub")
        command = ["ssh-keygen", "-q", "-s", str(authority), "-I", "host", "-h", "-n", "127.0.0.1"]
        subprocess.run([*command, key], check=True)
        shown = f"HostKey {self._folder}/host_key\n"
        self.set_up(shown, f"{shown}HostCertificate {self._folder}/host_key-cert.pub\n")

    def know_key(self) -> None:
        """Let the client know the server's host key: it does from the beginning."""
        key = " ".join((self._folder / "host_key.pub").read_text().split()[:2])
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {key}\n")

    def forget_key(self) -> None:
        """Let the client know no host key."""
        self.known_hosts.unlink(missing_ok=True)

    def revoke(self) -> None:
        """Let the server accept no key of the client's."""
        (self._folder / "authorized_keys").write_text("")

    @property
    def known_hosts(self) -> Path:
        return self.client_home / ".ssh/known_hosts"

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the server's host key, as ``ssh-keygen`` has it."""
        command = ["ssh-keygen", "-lf", str(self._folder / "host_key.pub")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.split()[1]

    # ---- how it is made

    def _prepare(self) -> None:
        ssh = self.client_home / ".ssh"
        ssh.mkdir(parents=True)
        self.home.mkdir()
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where it asks for an empty folder
        self._keygen("host_key")
        self._keygen("id_ed25519", ssh)
        shutil.copy(ssh / "id_ed25519.pub", self._folder / "authorized_keys")
        settings = SETTINGS.format(port=self.port, folder=self._folder, home=self.home)
        (self._folder / "sshd_config").write_text(settings)
        config = CONFIG.format(alias=ALIAS, port=self.port, user=self.user)
        (ssh / "config").write_text(config)
        self.know_key()

    def _keygen(self, name: str, folder: Path | None = None) -> None:
        path = (folder or self._folder) / name
        path.unlink(missing_ok=True)
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)

    def _answers(self) -> bool:
        assert self._server is not None
        assert self._server.poll() is None, self.log.read_text()
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    def _sessions(self) -> list[psutil.Process]:
        """Return the server's processes that serve a link each, and not what their users run."""
        assert self._server is not None
        sessions = []
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._server.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):  # it has just ended
                    if child.name().startswith("sshd"):
                        sessions.append(child)
        return sessions


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def running(folders: pytest.TempPathFactory) -> Iterator[Sshd]:
    """Have a server at work, and a home of which the client reads: never the user's own."""
    if shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin") is None:
        pytest.skip("no sshd on this machine: sudo apt install openssh-server")
    server = Sshd(folders.mktemp("sshd"), folders.mktemp("client-home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(server.client_home))
        patch.delenv("SSH_AUTH_SOCK", raising=False)
        server.start()
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """A server for this test alone."""
    with running(tmp_path_factory) as server:
        yield server


@pytest.fixture(scope="module")
def calm_sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """A server for the tests of a module that leave it as it is."""
    with running(tmp_path_factory) as server:
        yield server
