"""How fast a file goes to another machine and comes home, against `sftp`, over a real OpenSSH server on loopback.

python benchmarks/ssh_transfer.py [--megabytes 500] [--repeats 3]

The figures of both include everything: logging in, and with edgeprune the checksums on both sides and the far Python
that is started for them. How long these checksums take by themselves is shown below the table. The two take turns
(A B B A).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeprune.events import ignore
from edgeprune.remote import far_store, transfer
from edgeprune.remote.connection import connect
from edgeprune.remote.hosts import Host

SSHD = "/usr/sbin/sshd"
SERVER = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/home/.ssh/id_ed25519.pub
StrictModes no
UsePAM no
PidFile none
PermitRootLogin yes
Subsystem sftp internal-sftp
SetEnv HOME={folder}/far XDG_DATA_HOME={folder}/far
"""
CLIENT = """\
Host far
  HostName 127.0.0.1
  Port {port}
  IdentityFile {folder}/home/.ssh/id_ed25519
  UserKnownHostsFile {folder}/home/.ssh/known_hosts
"""
NAME = "model.bin"
CHUNK = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, served(Path(temporary)):
        bench = Bench(Path(temporary), options.megabytes)
        seconds = measured(bench, options.repeats)
        checksums = bench.checksums()
    show(seconds, checksums, options.megabytes)


# ---- a server of its own


@contextmanager
def served(folder: Path) -> Iterator[None]:
    port = free_port()
    ssh = folder / "home/.ssh"
    ssh.mkdir(parents=True)
    (folder / "far").mkdir()
    Path("/run/sshd").mkdir(exist_ok=True)
    for key in (folder / "host_key", ssh / "id_ed25519"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    public = " ".join((folder / "host_key.pub").read_text().split()[:2])
    (ssh / "known_hosts").write_text(f"[127.0.0.1]:{port} {public}\n")
    (ssh / "config").write_text(CLIENT.format(port=port, folder=folder))
    (folder / "sshd_config").write_text(SERVER.format(port=port, folder=folder))
    os.environ["HOME"] = str(folder / "home")
    command = [SSHD, "-D", "-E", str(folder / "log"), "-f", str(folder / "sshd_config")]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        wait_for(port)
        yield
    finally:
        server.terminate()
        server.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(port: int) -> None:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise SystemExit("sshd did not start")


# ---- what is compared


class Bench:
    """One file and the ways to move it; nothing of it is left where it goes."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        self.host = Host(name="far", address="far", python=sys.executable)
        self.far, self.near = folder / "far", folder / "near"
        self.config = folder / "home/.ssh/config"
        self.near.mkdir()
        self.file = self.near / NAME
        with self.file.open("wb") as file:
            for _ in range(megabytes * 10**6 // CHUNK):
                file.write(os.urandom(CHUNK))
        shutil.copy(self.file, self.far / NAME)
        self.ways: dict[tuple[str, str], Callable[[], object]] = {
            ("upload", "edgeprune"): self.send,
            ("upload", "sftp"): lambda: self.sftp(f"put {self.file} {self.far}/copy"),
            ("download", "edgeprune"): self.fetch,
            ("download", "sftp"): lambda: self.sftp(f"get {self.far}/{NAME} {self.near}/copy"),
        }

    def send(self) -> None:
        with connect(self.host) as link:
            transfer.send(link, [self.file], ignore, "bench")

    def fetch(self) -> None:
        with connect(self.host) as link:
            transfer.fetch(link, str(self.far), self.near / "home", [NAME], ignore, "bench")

    def sftp(self, line: str) -> None:
        command = ["sftp", "-q", "-F", str(self.config), "-b", "-", "far"]
        subprocess.run(command, input=line, text=True, check=True, capture_output=True)

    def timed(self, direction: str, who: str) -> float:
        started = time.monotonic()
        self.ways[direction, who]()
        seconds = time.monotonic() - started
        shutil.rmtree(self.far / "edgeprune", ignore_errors=True)
        shutil.rmtree(self.near / "home", ignore_errors=True)
        for folder in (self.far, self.near):
            (folder / "copy").unlink(missing_ok=True)
        return seconds

    def checksums(self) -> tuple[float, float]:
        """Return the seconds that a checksum takes here, and there."""
        started = time.monotonic()
        with self.file.open("rb") as file:
            hashlib.file_digest(file, "sha256")
        here = time.monotonic()
        with connect(self.host) as link:
            connected = time.monotonic()
            link.far(far_store, "digests", folder=str(self.far), paths=[NAME])
        return here - started, time.monotonic() - connected


def measured(bench: Bench, repeats: int) -> dict[tuple[str, str], list[float]]:
    seconds: dict[tuple[str, str], list[float]] = {way: [] for way in bench.ways}
    for direction in ("upload", "download"):
        bench.timed(direction, "sftp")  # the first reads the disk
        for _ in range(repeats):
            for who in ("edgeprune", "sftp", "sftp", "edgeprune"):
                seconds[direction, who].append(bench.timed(direction, who))
    return seconds


def show(
    seconds: dict[tuple[str, str], list[float]], checksums: tuple[float, float], megabytes: int
) -> None:
    speeds = {way: [megabytes / each for each in found] for way, found in seconds.items()}
    print(f"| {megabytes} MB | edgeprune MB/s (min to max) | sftp MB/s (min to max) | ratio |")
    print("|---|---|---|---|")
    for direction in ("upload", "download"):
        own, other = speeds[direction, "edgeprune"], speeds[direction, "sftp"]
        ratio = statistics.median(own) / statistics.median(other)
        print(f"| {direction} | {shown(own)} | {shown(other)} | {ratio:.2f} |")
    here, there = checksums
    print(f"\na checksum by itself: {here:.2f} s here, {there:.2f} s there")


def shown(speeds: list[float]) -> str:
    return f"{statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f})"


if __name__ == "__main__":
    main()
