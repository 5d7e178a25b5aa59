"""Saved hosts: their file, their commands against a real OpenSSH server, and what a check tells."""

from __future__ import annotations

import inspect
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sshd import Sshd
from sshd import sshd as sshd

from edgeprune import console, tables
from edgeprune.__main__ import main
from edgeprune.errors import BadInput
from edgeprune.locations import config_folder
from edgeprune.profiles import runner
from edgeprune.remote import check, far_check, hosts
from edgeprune.remote.hosts import Host

PI = Host(name="pi5", address="192.168.1.20", user="pi", port=2222, kind="board")
RUNNER = inspect.getsource(runner)
BOX = Host(name="gpu.box-1_a", address="gpu", python="/opt/py", wheelhouse="/w h/$(x)\n")


class Terminal(io.StringIO):
    """Somebody who types this."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda text: monkeypatch.setattr(sys, "stdin", Terminal(text))


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the look at the host: the connection is a real one."""
    found, _ = found_on("box")
    monkeypatch.setattr(check, "examine", lambda _link: {**found, "problems": []})


# ---- the file


def test_hosts_are_kept() -> None:
    assert hosts.list_hosts() == []
    hosts.add(PI)
    hosts.add(BOX)
    assert hosts.list_hosts() == [BOX, PI]
    assert hosts.find("pi5") == PI
    assert [path.name for path in config_folder().iterdir()] == ["hosts.toml"]
    hosts.remove("gpu.box-1_a")
    assert hosts.list_hosts() == [PI]
    with pytest.raises(BadInput, match="edgeprune hosts list"):
        hosts.remove("gpu.box-1_a")


def test_a_host_is_replaced_only_if_that_is_meant() -> None:
    hosts.add(PI)
    with pytest.raises(BadInput, match="--replace"):
        hosts.add(Host(name="pi5", address="other"))
    hosts.add(Host(name="pi5", address="other"), replace=True)
    assert hosts.find("pi5").address == "other"


def test_a_host_that_is_not_there() -> None:
    with pytest.raises(BadInput, match="none is saved; add it with: edgeprune hosts add"):
        hosts.find("pi5")
    hosts.add(PI)
    with pytest.raises(BadInput, match="saved are: pi5; add"):
        hosts.find("pi4")


@pytest.mark.parametrize("name", ["local", "", "a b", "-x", "a/b", "../x", "ä", "a\n"])
def test_names_that_no_host_has(name: str) -> None:
    with pytest.raises(BadInput, match="no name for a host"):
        hosts.add(Host(name=name, address="x"))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("ssh://me@host", ("me", "host", None)),
        ("ssh://host:2222/", (None, "host", 2222)),
        ("ssh://My.Alias_1", (None, "My.Alias_1", None)),
        ("ssh://me%40org@10.0.0.1:22", ("me@org", "10.0.0.1", 22)),
        ("ssh://me@[2001:db8::1]:22", ("me", "2001:db8::1", 22)),
    ],
)
def test_urls(url: str, expected: tuple[str | None, str, int | None]) -> None:
    assert hosts.parse_url(url) == expected
    host = hosts.find(url)
    assert (host.user, host.address, host.port) == expected
    assert hosts.find(host.name) == host


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host",
        "http://host",
        "ssh://",
        "ssh://me@",
        "ssh://me:secret@host",
        "ssh://host/path",
        "ssh://host?x",
        "ssh://host:0",
        "ssh://host:99999",
        "ssh://host:x",
        "ssh://-oProxyCommand=x",
        "ssh://$(id)@host",
        "ssh://me@ho;st",
        "ssh://-x@host",
        "ssh://me@[::1",
        "ssh://me%0a@host",
        "ssh://me@ho%20st",
    ],
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(BadInput) as refused:
        hosts.parse_url(url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "[pi5",
        "pi5 = 1",
        "[pi5]\nuser = 'pi'",
        "[pi5]\naddress = 'x'\nport = '22'",
        "[pi5]\naddress = 'x'\nkind = 'toaster'",
        "[pi5]\naddress = 'x'\nspeed = 1",
        "[pi5]\naddress = 'x; reboot'",
        "[pi5]\naddress = 'x'\npython = ''",
    ],
)
def test_a_file_that_somebody_spoilt(text: str) -> None:
    config_folder().mkdir(parents=True, exist_ok=True)
    (config_folder() / "hosts.toml").write_text(text)
    with pytest.raises(BadInput, match=r"hosts\.toml"):
        hosts.list_hosts()


# ---- the commands


def test_a_host_is_added_listed_checked_and_removed(
    sshd: Sshd, capsys: pytest.CaptureFixture[str]
) -> None:
    python = ["--python", sys.executable]
    assert main(["hosts", "add", "pi", sshd.url, "--kind", "board", *python]) == 0
    shown = capsys.readouterr()
    assert "Processor" in shown.out
    assert "Clock governor" in shown.out
    assert "Saved as pi" in shown.err

    assert main(["hosts", "list", "--json"]) == 0
    (saved,) = json.loads(capsys.readouterr().out)
    assert saved["url"] == sshd.url
    assert saved["kind"] == "board"
    for command in (["hosts"], ["hosts", "list"]):
        assert main(command) == 0
        assert "board" in capsys.readouterr().out

    assert main(["hosts", "check", "pi", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["host"]["name"] == "pi"
    assert found["storage"]["folder"] == str(sshd.root)
    assert found["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert found["system"]["architecture"] == os.uname().machine
    assert not sshd.root.exists()

    assert main(["hosts", "clean", "pi"]) == 0
    assert "Freed 0 B on pi; environments removed: 0." in capsys.readouterr().err

    assert main(["hosts", "remove", "pi"]) == 0
    assert hosts.list_hosts() == []
    assert main(["hosts"]) == 0
    assert "No hosts yet" in capsys.readouterr().err


def test_a_saved_host_is_not_overwritten(sshd: Sshd, capsys: pytest.CaptureFixture[str]) -> None:
    hosts.add(PI)
    assert main(["hosts", "add", "pi5", sshd.url]) == 2
    assert "--replace" in capsys.readouterr().err
    assert hosts.find("pi5") == PI


def test_a_host_that_cannot_be_reached_is_not_saved(
    sshd: Sshd, capsys: pytest.CaptureFixture[str]
) -> None:
    sshd.stop()
    assert main(["hosts", "add", "pi", sshd.url]) == 1
    assert "cannot be reached" in capsys.readouterr().err
    assert hosts.list_hosts() == []
    assert main(["hosts", "add", "pi", sshd.url, "--no-check"]) == 0
    assert hosts.find("pi").url == sshd.url
    assert main(["hosts", "check", "pi"]) == 1


def test_a_wheelhouse_that_is_not_there(
    sshd: Sshd, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["hosts", "add", "pi", sshd.url, "--no-check", "--wheelhouse", "wheels"]
    assert main(command) == 2
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "wheels").mkdir()
    assert main(command) == 0
    assert hosts.find("pi").wheelhouse == str(tmp_path / "wheels")


def test_a_new_key_is_not_accepted_without_a_word(
    sshd: Sshd, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    sshd.forget_key()
    assert main(["hosts", "add", "pi", sshd.url]) == 2
    told = capsys.readouterr().err
    assert sshd.fingerprint in told
    assert "--accept-new-host-key" in told
    assert hosts.list_hosts() == []
    assert not sshd.known_hosts.exists()


def test_a_new_key_is_shown_and_asked_about(
    sshd: Sshd, looked_at: None, capsys: pytest.CaptureFixture[str], typed: Any
) -> None:
    sshd.forget_key()
    command = ["hosts", "add", "pi", sshd.url]
    typed("n\n")
    assert main(command) == 2
    told = capsys.readouterr().err
    assert f"ssh-ed25519 {sshd.fingerprint}" in told
    assert "ssh_host_ed25519_key.pub" in told
    assert "not accepted" in told
    assert not sshd.known_hosts.exists()
    typed("y\n")
    assert main(command) == 0
    assert sshd.known_hosts.exists()
    typed("")
    assert main(["hosts", "check", "pi"]) == 0


def test_a_script_accepts_a_new_key_and_no_changed_one(
    sshd: Sshd, looked_at: None, capsys: pytest.CaptureFixture[str]
) -> None:
    sshd.forget_key()
    command = ["hosts", "add", "pi", sshd.url, "--accept-new-host-key", "--replace"]
    assert main(command) == 0
    assert f"Added to the known hosts: [127.0.0.1]:{sshd.port}" in capsys.readouterr().err
    sshd.new_host_key()
    assert main(command) == 2
    assert "HAS CHANGED" in capsys.readouterr().err


def test_a_host_without_python(sshd: Sshd, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hosts", "add", "pi", sshd.url, "--python", "no-such-python"]) == 2
    assert "sudo apt install python3 python3-venv" in capsys.readouterr().err
    assert hosts.list_hosts() == []


def test_a_host_that_lacks_what_is_required(sshd: Sshd, capsys: pytest.CaptureFixture[str]) -> None:
    (sshd.home / ".local").write_text("in the way")
    hosts.add(sshd.host)
    assert main(["hosts", "check", "far"]) == 1
    shown = " ".join(capsys.readouterr().out.split())  # where lines break depends on the path
    assert "cannot be written" in shown
    assert "error: " in shown


# ---- what is found


def jetson(folder: Path) -> Path:
    """Make the files of a small board."""
    files = {
        "etc/os-release": 'NAME=x\nPRETTY_NAME="Ubuntu 22.04.4 LTS"\n',
        "etc/nv_tegra_release": "# R36 (release), REVISION: 3.0, GCID: 36923193, BOARD: generic\n",
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano\0",
        "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n",
        "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
        "sys/bus/pci/devices/0000:01:00.0/class": "0x030200\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def program(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_what_a_board_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = far_check.check(RUNNER, str(jetson(tmp_path)))
    assert found["system"]["os"] == "Ubuntu 22.04.4 LTS"
    assert found["system"]["board"] == "NVIDIA Jetson Orin Nano"
    assert found["system"]["features"] == ["fp", "asimd", "asimddp", "i8mm"]
    assert found["graphics"]["jetson"] == "L4T 36.3.0"
    assert found["graphics"]["cards"][0]["memory_bytes"] is None
    assert json.loads(json.dumps(found)) == found


def test_what_nvidias_program_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = "| NVIDIA-SMI 550.54.14   Driver Version: 550.54.14   CUDA Version: 12.4     |"
    cards = "NVIDIA RTX A6000, 49140, 48000\\nNVIDIA GB10, [N/A], [N/A]"
    body = f"if [ $# = 0 ]; then echo '{table}'; else printf '{cards}\\n'; fi"
    program(tmp_path, "nvidia-smi", body)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found = far_check.check(RUNNER, str(tmp_path))["graphics"]
    assert found["cards"] == [
        {"name": "NVIDIA RTX A6000", "memory_bytes": 49140 * 2**20, "free_bytes": 48000 * 2**20},
        {"name": "NVIDIA GB10", "memory_bytes": None, "free_bytes": None},
    ]
    assert (found["driver"], found["cuda"]) == ("550.54.14", "12.4")
    assert not found["without_driver"]


def test_a_card_whose_driver_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "nvidia-smi", "echo NVIDIA-SMI has failed; exit 9")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    (jetson(tmp_path) / "etc/nv_tegra_release").unlink()
    found = far_check.check(RUNNER, str(tmp_path))["graphics"]
    assert found["without_driver"]
    assert found["cards"] == []


def test_it_needs_only_the_standard_library() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-"], input=Path(far_check.__file__).read_bytes()
    )
    assert done.returncode == 0


# ---- what is missing


def found_on(kind: hosts.Kind = "box", **parts: Any) -> tuple[dict[str, Any], Host]:
    """Return what a machine without faults tells, but for these parts of it, and its host."""
    found: dict[str, Any] = {
        "system": {
            "os": "Debian",
            "kernel": "Linux 6.1",
            "board": None,
            "architecture": "aarch64",
            "libc": "2.36",
            "features": [],
            "load": 0.1,
        },
        "python": {"version": "3.11.2", "path": "/usr/bin/python3", "venv": True},
        "storage": {"folder": "/f", "free_bytes": 10**11, "writable": True},
        "graphics": {
            "cards": [{"name": "GPU", "memory_bytes": 8 * 10**9, "free_bytes": None}],
            "driver": "550",
            "cuda": "12.4",
            "jetson": None,
            "without_driver": False,
        },
        "sensors": {"locked": []},
        "device": {
            "cpu": "Cortex",
            "physical_cores": 4,
            "logical_cores": 4,
            "memory_bytes": 8 * 10**9,
            "memory_available_bytes": 6 * 10**9,
            "governors": ["performance"],
            "energy_sensor": None,
        },
        "temperature": 45.2,
        "throttling": {"now": [], "events": 0},
    }
    for part, changes in parts.items():
        found[part] = {**found[part], **changes}
    host = Host(name="x", address="x", kind=kind)
    return {**found, "host": {"url": host.url, "kind": kind}}, host


@pytest.mark.parametrize("kind", ["box", "board"])
def test_nothing_is_missing(kind: hosts.Kind) -> None:
    assert check.problems(*found_on(kind)) == []


@pytest.mark.parametrize(
    ("kind", "part", "change", "what", "mend", "required"),
    [
        ("board", "system", {"architecture": "armv7l"}, "armv7l", "64-bit", True),
        ("board", "system", {"libc": None}, "not glibc", "Ubuntu 20.04", True),
        ("box", "system", {"libc": "2.27"}, "glibc 2.27", "Ubuntu 20.04", True),
        ("box", "python", {"version": "3.10.12"}, "3.10.12", "--python python3.11", True),
        ("board", "python", {"version": "3.9.2"}, "3.9.2", "python3.11-venv", True),
        ("box", "python", {"venv": False}, "virtual", "sudo apt install python3-venv", True),
        ("box", "storage", {"free_bytes": 4 * 10**9}, "needs 5", "du ", True),
        ("board", "storage", {"free_bytes": 10**8}, "needs 1", "du ", True),
        ("board", "storage", {"writable": False}, "cannot be written", "chown", True),
        ("box", "device", {"memory_bytes": 2 * 10**9}, "of memory", "100M", False),
        ("box", "graphics", {"without_driver": True}, "driver", "nvidia-driver", False),
        ("box", "graphics", {"cards": []}, "no GPU", "fast enough", False),
        ("board", "system", {"load": 3.0}, "load 3.0", "top", False),
        ("board", "device", {"governors": ["ondemand"]}, "ondemand", "tee /sys", False),
        ("board", "throttling", {"now": ["throttled"]}, "throttled", "cool", False),
        ("board", "sensors", {"locked": ["/sys/a b"]}, "energy", "a+r '/sys/a b'", False),
    ],
)
def test_what_is_missing_and_how_it_is_mended(
    kind: hosts.Kind, part: str, change: dict[str, Any], what: str, mend: str, required: bool
) -> None:
    (problem,) = check.problems(*found_on(kind, **{part: change}))
    assert what in problem.what
    assert mend in problem.mend
    assert problem.required is required


def test_the_required_comes_first() -> None:
    found, host = found_on("board", system={"load": 9.0}, storage={"writable": False})
    assert [problem.required for problem in check.problems(found, host)] == [True, False]


@pytest.mark.parametrize("kind", ["box", "board"])
def test_a_check_is_drawn(kind: hosts.Kind, capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = found_on(kind)
    console.show(tables.host({**found, "problems": []}))
    shown = capsys.readouterr().out
    assert "GPU 8.00 GB, driver 550, CUDA 12.4" in shown
    assert "Nothing is missing." in shown
    assert ("45 °C" in shown) == (kind == "board")
    assert max(map(len, shown.splitlines())) <= 80
