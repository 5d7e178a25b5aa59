"""Links to a real OpenSSH server: what goes over them, and what happens when they break."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import far_sample
import pytest
from sshd import Sshd, wait_until
from sshd import calm_sshd as calm_sshd
from sshd import sshd as sshd

from edgeprune.errors import BadInput, EdgepruneError
from edgeprune.remote import connection
from edgeprune.remote.connection import Link, UnknownHostKey, Unreachable, connect

HOSTILE = ["$(id)", "; ls", "a\nb", "it's", '"quoted"', "`w`", "*", "\\", "~", "!!", "", "é\t"]
SIZE = 3_000_000
"""Bytes: more than are on their way at a time need not be, but several requests."""


@pytest.fixture
def link(sshd: Sshd) -> Iterator[Link]:
    with connect(sshd.host) as link:
        yield link


@pytest.fixture(scope="module")
def calm_link(calm_sshd: Sshd) -> Iterator[Link]:
    with connect(calm_sshd.host) as link:
        yield link


def nothing(_done: int) -> None:
    pass


def long(sshd: Sshd) -> str:
    """Return seconds to sleep that no other test sleeps."""
    return f"1{sshd.port}"


# ---- logging in


def test_the_users_configuration_is_used(sshd: Sshd) -> None:
    (sshd.client_home / ".ssh/config").rename(sshd.client_home / ".ssh/more")
    (sshd.client_home / ".ssh/config").write_text("Include more\n")
    (sshd.client_home / ".ssh/id_ed25519").rename(sshd.client_home / "elsewhere")
    more = sshd.client_home / ".ssh/more"
    more.write_text(more.read_text().replace("~/.ssh/id_ed25519", "~/elsewhere"))
    sshd.known_hosts.rename(sshd.client_home / "known")
    more.write_text(f"{more.read_text()}  UserKnownHostsFile ~/none ~/known\n")
    with connect(sshd.host) as link:
        assert link.run(["echo", "in"]).output == "in\n"


def test_a_jump_host_is_gone_through(sshd: Sshd) -> None:
    config = sshd.client_home / ".ssh/config"
    rule = "Host behind\n  HostName localhost\n  ProxyJump far\n"
    same = "\n".join(config.read_text().splitlines()[2:])
    config.write_text(f"{config.read_text()}{rule}{same}\n")
    behind = replace(sshd.host, name="behind", address="behind")
    with pytest.raises(UnknownHostKey) as unknown:
        connect(behind).close()
    assert unknown.value.machine == f"[localhost]:{sshd.port}"
    connection.trust(behind, unknown.value.fingerprint)
    with connect(behind) as link:
        assert "127.0.0.1" in link.run(["printenv", "SSH_CONNECTION"]).output


def test_jump_hosts_in_a_circle_are_refused(sshd: Sshd) -> None:
    (sshd.client_home / ".ssh/config").write_text("Host a\n  ProxyJump b\nHost b\n  ProxyJump a\n")
    with pytest.raises(BadInput, match="circle"):
        connect(replace(sshd.host, address="a"))


def test_an_agent_holds_the_key(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    key = sshd.client_home / ".ssh/id_ed25519"
    said = subprocess.run(["ssh-agent", "-s"], capture_output=True, text=True, check=True).stdout
    words = dict(part.split("=") for part in said.replace("\n", ";").split(";") if "=" in part)
    try:
        monkeypatch.setenv("SSH_AUTH_SOCK", words["SSH_AUTH_SOCK"])
        subprocess.run(["ssh-add", "-q", str(key)], check=True)
        key.unlink()
        connect(sshd.host).close()
        with (sshd.client_home / ".ssh/config").open("a") as config:
            config.write("  IdentitiesOnly yes\n")
        connect(sshd.host).close()
    finally:
        os.kill(int(words["SSH_AGENT_PID"]), signal.SIGTERM)


def test_a_key_with_a_passphrase(sshd: Sshd) -> None:
    key = str(sshd.client_home / ".ssh/id_ed25519")
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", key], check=True)
    with pytest.raises(BadInput, match="ssh-add"):
        connect(sshd.host)
    pytest.importorskip(
        "bcrypt", reason="asyncssh unlocks keys with bcrypt, which is not installed"
    )
    asked: list[tuple[str, threading.Thread]] = []

    def ask(prompt: str) -> str:
        asked.append((prompt, threading.current_thread()))
        return "secret"

    connect(sshd.host, ask).close()
    ((prompt, thread),) = asked
    assert key in prompt
    assert thread is threading.current_thread()
    with pytest.raises(BadInput, match="passphrase"):
        connect(sshd.host, lambda _prompt: "wrong")


def test_a_key_that_is_not_accepted(sshd: Sshd) -> None:
    sshd.revoke()
    with pytest.raises(BadInput, match="ssh-copy-id far"):
        connect(sshd.host)


def test_nobody_answers(sshd: Sshd) -> None:
    sshd.stop()
    with pytest.raises(Unreachable, match="cannot be reached"):
        connect(sshd.host)
    with pytest.raises(Unreachable):
        connect(replace(sshd.host, address="nobody.invalid"))


def test_something_else_answers(sshd: Sshd) -> None:
    sshd.stop()
    with socket.create_server(("127.0.0.1", sshd.port)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n" * 4000)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(EdgepruneError, match="far: "):
            connect(sshd.host)
        thread.join()


# ---- host keys


def test_an_unknown_key_is_shown_and_then_trusted(sshd: Sshd) -> None:
    sshd.forget_key()
    with pytest.raises(UnknownHostKey, match="not known") as unknown:
        connect(sshd.host)
    assert unknown.value.fingerprint == sshd.fingerprint
    assert unknown.value.algorithm == "ssh-ed25519"
    assert not sshd.known_hosts.exists()
    connection.trust(sshd.host, unknown.value.fingerprint)
    assert sshd.known_hosts.stat().st_mode & 0o777 == 0o600
    connect(sshd.host).close()


def test_what_is_trusted_is_added_to_what_is_known(sshd: Sshd) -> None:
    sshd.known_hosts.write_text("other.example ssh-ed25519 cut-off-line")
    connection.trust(sshd.host, sshd.fingerprint)
    first, second = sshd.known_hosts.read_text().splitlines()
    assert first == "other.example ssh-ed25519 cut-off-line"
    assert second.startswith(f"[127.0.0.1]:{sshd.port} ssh-ed25519 ")
    done = subprocess.run(["ssh-keygen", "-F", f"[127.0.0.1]:{sshd.port}", "-f", sshd.known_hosts])
    assert done.returncode == 0


def test_another_key_than_the_one_shown_is_not_trusted(sshd: Sshd) -> None:
    sshd.forget_key()
    shown = sshd.fingerprint
    sshd.new_host_key()
    with pytest.raises(UnknownHostKey):
        connection.trust(sshd.host, shown)
    assert not sshd.known_hosts.exists()


def test_a_changed_key_is_refused(sshd: Sshd) -> None:
    before = sshd.known_hosts.read_text()
    sshd.new_host_key()
    for _ in range(2):
        with pytest.raises(BadInput, match="HAS CHANGED") as changed:
            connect(sshd.host)
        assert not isinstance(changed.value, UnknownHostKey)
        assert f"ssh-keygen -R '[127.0.0.1]:{sshd.port}'" in str(changed.value)
        with pytest.raises(BadInput, match="HAS CHANGED"):
            connection.trust(sshd.host, sshd.fingerprint)
    assert sshd.known_hosts.read_text() == before


def test_a_key_of_another_kind_is_a_changed_key(sshd: Sshd) -> None:
    command = ["ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-f", str(sshd.client_home / "other")]
    subprocess.run(command, check=True)
    kind, key, _ = (sshd.client_home / "other.pub").read_text().split()
    sshd.known_hosts.write_text(f"[127.0.0.1]:{sshd.port} {kind} {key}\n")
    with pytest.raises(BadInput, match="HAS CHANGED"):
        connect(sshd.host)


@pytest.mark.parametrize("setting", ["UserKnownHostsFile none", "UserKnownHostsFile /dev/null"])
def test_no_configuration_makes_a_key_accepted_silently(sshd: Sshd, setting: str) -> None:
    with (sshd.client_home / ".ssh/config").open("a") as config:
        config.write(f"  {setting}\n  StrictHostKeyChecking no\n")
    with pytest.raises(UnknownHostKey) as unknown:
        connect(sshd.host)
    with pytest.raises(BadInput, match="UserKnownHostsFile"):
        connection.trust(sshd.host, unknown.value.fingerprint)


def test_a_damaged_file_of_known_hosts(sshd: Sshd) -> None:
    sshd.known_hosts.write_text("nonsense\n")
    with pytest.raises(BadInput, match=f"{sshd.known_hosts}: .*nonsense; mend that line"):
        connect(sshd.host)


def test_an_authority_vouches_for_the_key(sshd: Sshd, tmp_path: Path) -> None:
    sshd.certify_key(tmp_path / "authority")
    authority = (tmp_path / "authority.pub").read_text()
    sshd.known_hosts.write_text(f"@cert-authority * {authority}")
    connect(sshd.host).close()
    sshd.know_key()  # without it, the certificate is no hindrance
    connect(sshd.host).close()
    sshd.forget_key()
    with pytest.raises(UnknownHostKey) as unknown:
        connect(sshd.host)
    assert unknown.value.fingerprint == sshd.fingerprint


# ---- commands


def test_arguments_arrive_as_they_are(calm_link: Link) -> None:
    done = calm_link.run(["printf", "<%s>", *HOSTILE])
    assert done.code == 0
    assert done.output == "".join(f"<{text}>" for text in HOSTILE)


def test_what_a_command_reads_and_writes(calm_link: Link) -> None:
    lines: list[str] = []
    script = "cat; echo wrong >&2; printf last; exit 3"
    done = calm_link.run(["sh", "-c", script], input=b"one\n\xfftwo\n", on_line=lines.append)
    assert done.code == 3
    assert sorted(lines) == sorted(["one", "\ufffdtwo", "wrong", "last"])
    assert sorted(done.output.splitlines()) == sorted(lines)


def test_nothing_that_is_said_commands_the_terminal(calm_link: Link) -> None:
    evil = "\x1b]0;title\x07a\tb\nc\x9b2J"
    harmless = "?]0;title?a\tb\nc?2J"
    assert calm_link.run(["printf", "%s", evil]).output == harmless
    assert calm_link.far(far_sample, "echo", value=[{evil: evil}]) == [{harmless: harmless}]


def test_a_command_ended_by_a_signal(calm_link: Link) -> None:
    assert calm_link.run(["sh", "-c", "kill -TERM $$"]).code == -signal.SIGTERM


def test_a_command_that_reads_nothing(calm_link: Link) -> None:
    assert calm_link.run(["true"], input=b"x" * 5_000_000).code == 0


def test_a_command_that_takes_too_long_is_killed(calm_sshd: Sshd, calm_link: Link) -> None:
    with pytest.raises(EdgepruneError, match="longer than"):
        calm_link.run(["sleep", long(calm_sshd)], timeout=0.1)
    wait_until(lambda: not calm_sshd.processes(long(calm_sshd)))


def test_an_exception_at_a_line_ends_the_command(calm_sshd: Sshd, calm_link: Link) -> None:
    def stop(_line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calm_link.run(["sh", "-c", f"echo x; exec sleep {long(calm_sshd)}"], on_line=stop)
    wait_until(lambda: not calm_sshd.processes(long(calm_sshd)))
    assert calm_link.run(["echo", "still there"]).output == "still there\n"


def test_several_threads_share_a_link(calm_link: Link) -> None:
    found: list[str] = []
    command = ["sh", "-c", "cat"]
    threads = [
        threading.Thread(
            target=lambda number=number: found.append(
                calm_link.run(command, input=f"{number}".encode()).output
            )
        )
        for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["0", "1", "2", "3"]


def test_a_command_is_running_when_the_link_is_cut(sshd: Sshd, link: Link) -> None:
    with pytest.raises(Unreachable, match="link broke"):
        link.run(["sh", "-c", "echo x; exec sleep 5"], on_line=lambda _line: sshd.cut())
    for use in (lambda: link.run(["true"]), lambda: link.open(["true"])):
        with pytest.raises(Unreachable):
            use()
    with connect(sshd.host) as again:
        assert again.run(["true"]).code == 0


def test_a_link_is_closed_twice(calm_sshd: Sshd) -> None:
    with connect(calm_sshd.host) as link:
        link.close()


# ---- processes of lines


def test_lines_go_to_and_fro(calm_link: Link) -> None:
    process = calm_link.open(
        ["sh", "-c", 'while read -r x; do echo "<$x>"; echo "e$x" >&2; done; exit']
    )
    for text in ("one", "$(two)", ""):
        process.write_line(text)
        assert process.read_line(20) == f"<{text}>\n"
    wait_until(lambda: process.stderr_tail() == "eone\ne$(two)\ne\n")
    process.close()
    assert process.read_line(20) == ""
    assert process.read_line(20) == ""


def test_a_process_that_says_nothing(calm_link: Link) -> None:
    process = calm_link.open(["cat"])
    with pytest.raises(TimeoutError):
        process.read_line(0.01)
    process.write_line("x")
    assert process.read_line(20) == "x\n"
    process.close()


def test_a_process_that_has_ended(calm_link: Link) -> None:
    process = calm_link.open(["sh", "-c", "echo out; echo why >&2; exit 1"])
    assert process.read_line(20) == "out\n"
    assert process.read_line(20) == ""

    wait_until(lambda: process.stderr_tail() == "why\n")
    with pytest.raises(EdgepruneError, match="sh has ended: why") as ended:
        wait_until(lambda: process.write_line("x"))
    assert not isinstance(ended.value, Unreachable)


def test_closing_kills_the_process_and_its_children(calm_sshd: Sshd, calm_link: Link) -> None:
    process = calm_link.open(["sh", "-c", f"sleep {long(calm_sshd)} & echo x; wait"])
    assert process.read_line(20) == "x\n"
    assert calm_sshd.processes(long(calm_sshd))
    process.close()
    wait_until(lambda: not calm_sshd.processes(long(calm_sshd)))
    process.close()


def test_a_process_learns_that_the_link_is_cut(sshd: Sshd, link: Link) -> None:
    process = link.open(["cat"])
    sshd.cut()
    for _ in range(2):
        with pytest.raises(Unreachable):
            process.read_line(20)
    with pytest.raises(Unreachable):
        process.write_line("x")
    process.close()


# ---- functions


def test_a_function_over_there(calm_sshd: Sshd, calm_link: Link) -> None:
    values = {"text": "é'\n$(id)\ud800", "number": 1.5, "none": None, "list": [1, {"a": True}]}
    assert calm_link.far(far_sample, "echo", value=values) == values
    assert calm_link.far(far_sample, "home") == str(calm_sshd.home)


def test_a_large_result(calm_link: Link) -> None:
    assert calm_link.far(far_sample, "repeat", text="ab", times=2_000_000) == "ab" * 2_000_000


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        ("refuse", BadInput, "far: not that one"),
        ("fill", BadInput, "far: its disk is full"),
        ("fail", EdgepruneError, "far: fail failed: .*No such file"),
        ("slip", EdgepruneError, "far: slip failed: "),
        ("missing", EdgepruneError, "missing"),
        ("leave", EdgepruneError, "far: leave ended with exit code 7"),
    ],
)
def test_a_function_that_raises(
    calm_link: Link, function: str, kind: type[EdgepruneError], message: str
) -> None:
    with pytest.raises(EdgepruneError, match=message) as raised:
        calm_link.far(far_sample, function)
    assert type(raised.value) is kind
    assert "\n" not in str(raised.value)


def test_a_login_that_talks(sshd: Sshd) -> None:
    (sshd.home / ".bashrc").write_text("echo Welcome; echo edgeprune-0 {}; echo careful >&2\n")
    with connect(sshd.host) as link:
        assert link.far(far_sample, "echo", value=1) == 1
        assert link.far(far_sample, "shout") == "heard"


def test_modules_of_the_user_are_not_in_the_way(calm_sshd: Sshd, tmp_path: Path) -> None:
    (calm_sshd.home / "json.py").write_text("raise SystemExit(9)")
    wrapper = _script(tmp_path / "python", f'cd "{calm_sshd.home}" && exec python3 "$@"')
    with connect(replace(calm_sshd.host, python=str(wrapper))) as link:
        assert link.far(far_sample, "echo", value=1) == 1


@pytest.mark.parametrize("python", ["no-such-python", "/no/such/python", "/tmp"])
def test_there_is_no_python(calm_sshd: Sshd, python: str) -> None:
    with (
        connect(replace(calm_sshd.host, python=python)) as link,
        pytest.raises(BadInput, match="sudo apt install python3 python3-venv"),
    ):
        link.far(far_sample, "home")


def test_the_python_is_too_old(calm_sshd: Sshd, tmp_path: Path) -> None:
    old = "import sys; sys.version_info = (3, 8, 1); sys.version = '3.8.1 (old)'; "
    body = f'shift 2; code="$1"; exec python3 -c "{old}$code"'
    wrapper = _script(tmp_path / "python", body)
    with (
        connect(replace(calm_sshd.host, python=str(wrapper))) as link,
        pytest.raises(BadInput, match=r"Python 3\.8\.1, too old: 3\.9"),
    ):
        link.far(far_sample, "home")


def test_a_python_of_another_age(calm_sshd: Sshd, tmp_path: Path) -> None:
    wrapper = _script(tmp_path / "python", "echo 'Unknown option: -I' >&2; exit 2")
    with (
        connect(replace(calm_sshd.host, python=str(wrapper))) as link,
        pytest.raises(BadInput, match="Python 2, too old"),
    ):
        link.far(far_sample, "home")


def _script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


# ---- files


def test_files_go_on_where_they_stopped(calm_sshd: Sshd, calm_link: Link, tmp_path: Path) -> None:
    content = os.urandom(SIZE)
    local, far, back = tmp_path / "local", calm_sshd.home / "a 'far' $(file)", tmp_path / "back"
    local.write_bytes(content)
    far.write_bytes(content[: SIZE // 3])
    told: list[int] = []
    calm_link.upload(local, str(far), offset=SIZE // 3, progress=told.append)
    assert far.read_bytes() == content
    assert told == sorted(told)
    assert told[-1] == SIZE

    back.write_bytes(content[: SIZE // 2])
    told.clear()
    calm_link.download(str(far), back, offset=SIZE // 2, progress=told.append)
    assert back.read_bytes() == content
    assert told == sorted(told)
    assert told[-1] == SIZE


def test_a_whole_file_and_an_empty_one(calm_sshd: Sshd, calm_link: Link, tmp_path: Path) -> None:
    for size in (0, 1000):
        local, far = tmp_path / f"{size}", calm_sshd.home / f"{size}"
        local.write_bytes(b"x" * size)
        calm_link.upload(local, str(far), offset=0, progress=nothing)
        calm_link.download(str(far), tmp_path / f"back{size}", offset=0, progress=nothing)
        assert (tmp_path / f"back{size}").read_bytes() == b"x" * size == far.read_bytes()


def test_a_part_of_a_file(calm_sshd: Sshd, calm_link: Link) -> None:
    far = calm_sshd.home / "log"
    assert calm_link.read(str(far), 0) == b""
    far.write_bytes(bytes(range(100)) * 10_000)
    assert calm_link.read(str(far), 50, 3) == bytes([50, 51, 52])
    assert calm_link.read(str(far), 999_990) == bytes(range(90, 100))
    assert calm_link.read(str(far), 1_000_000) == b""
    assert calm_link.read(str(far), 2_000_000) == b""
    assert len(calm_link.read(str(far), 0)) == 1_000_000


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_transfer_is_cut(sshd: Sshd, link: Link, tmp_path: Path, way: str) -> None:
    # the transfer goes on while it is being cut: 100 MB are not over by then
    content = os.urandom(400 * connection.BLOCK)
    local, far = tmp_path / "local", sshd.home / "far"
    source, target = (local, far) if way == "up" else (far, local)
    source.write_bytes(content)

    def cut(_done: int) -> None:
        if sshd.is_linked():
            sshd.cut()

    with pytest.raises(Unreachable):
        _transfer(link, way, local, far, 0, cut)
    part = target.stat().st_size
    assert 0 < part < len(content)
    assert target.read_bytes() == content[:part]
    with connect(sshd.host) as again:
        _transfer(again, way, local, far, part, nothing)
    assert target.read_bytes() == content


def _transfer(
    link: Link, way: str, local: Path, far: Path, offset: int, progress: Callable[[int], None]
) -> None:
    if way == "up":
        link.upload(local, str(far), offset=offset, progress=progress)
    else:
        link.download(str(far), local, offset=offset, progress=progress)


def test_files_that_cannot_be_had(calm_sshd: Sshd, calm_link: Link, tmp_path: Path) -> None:
    local = tmp_path / "local"
    with pytest.raises(BadInput, match="No such file"):
        calm_link.download(str(calm_sshd.home / "none"), local, offset=0, progress=nothing)
    assert not local.exists()
    local.write_text("x")
    with pytest.raises(BadInput, match="No such file"):
        calm_link.upload(local, str(calm_sshd.home / "none/file"), offset=0, progress=nothing)


def test_the_disk_over_there_is_full(calm_sshd: Sshd, calm_link: Link, tmp_path: Path) -> None:
    small = calm_sshd.home / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount).returncode:
        pytest.skip("no small disk can be made here: that takes root")
    try:
        local = tmp_path / "local"
        local.write_bytes(b"x" * SIZE)
        with pytest.raises(BadInput, match="its disk is full"):
            calm_link.upload(local, str(small / "file"), offset=0, progress=nothing)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_server_without_files(sshd: Sshd) -> None:
    sshd.set_up("Subsystem sftp internal-sftp", "")
    with connect(sshd.host) as link, pytest.raises(BadInput, match="openssh-sftp-server"):
        link.read("/etc/passwd", 0)
