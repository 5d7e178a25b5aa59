"""Virtual environments on another machine: the wheel that is sent, what pip makes of it there, and what is told."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import wheelhouse
from sshd import Sshd
from sshd import sshd as sshd

from edgeprune.errors import BadInput, EdgepruneError
from edgeprune.events import Event, ignore
from edgeprune.remote import environment, far_environment
from edgeprune.remote.connection import connect
from edgeprune.remote.hosts import Host

RUNTIME = f"onnxruntime-genai=={version('onnxruntime-genai')}"


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The far root, here."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data" / "edgeprune"


# ---- environments


def test_an_environment_belongs_to_its_content_and_python(far: Path) -> None:
    one, two = far_environment.find("one"), far_environment.find("two")
    assert one["environment"] != two["environment"]
    assert not one["ready"]
    assert one["version"] == sysconfig.get_config_var("py_version")
    place = far / "envs" / one["environment"]
    place.mkdir(parents=True)
    (place / "ready").touch()
    assert far_environment.find("one")["ready"]


def test_a_python_that_makes_no_environments_is_told(
    far: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="sudo apt install python3-venv"):
        far_environment.find("one")


def test_platforms_are_those_of_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far_environment.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.28")
    expected = ["manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux2014"]
    assert far_environment.platforms() == [f"{each}_aarch64" for each in expected]
    monkeypatch.setattr(os, "confstr", lambda name: None)
    monkeypatch.setattr(sysconfig, "get_platform", lambda: "macosx-11.0-arm64")
    assert far_environment.platforms() == ["macosx_11_0_arm64"]


def test_environments_in_which_nothing_is_at_work_are_removed(sshd: Sshd) -> None:
    envs = sshd.home / ".local/share/edgeprune/envs"
    for name in ("old", "busy", "begun"):
        (envs / name / "venv").mkdir(parents=True)
        (envs / name / "ready").touch()
    (envs / "old" / "venv" / "library").write_bytes(b"x" * 5000)
    (envs / "busy" / "python").symlink_to(sys.executable)
    with (
        (envs / "begun" / "lock").open("w") as lock,
        subprocess.Popen([envs / "busy" / "python", "-c", "input()"], stdin=-1) as busy,
        connect(sshd.host) as link,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = environment.clean(link)
        assert done == {"removed": 1, "used": 2, "bytes": 5000}
        assert sorted(path.name for path in envs.iterdir()) == ["begun", "busy"]
        busy.communicate(b"\n")
        lock.close()
        assert environment.clean(link)["removed"] == 2
    assert list(envs.iterdir()) == []


FOUND = {"platforms": ["manylinux_2_28_aarch64", "manylinux2014_aarch64"], "version": "3.12.3"}
NO_INDEX = [
    "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError': /simple/x/",
    "ERROR: Could not find a version that satisfies the requirement x (from versions: none)",
    "ERROR: No matching distribution found for x",
]


def test_without_an_index_both_commands_are_told() -> None:
    host = Host(name="pi5", address="pi5.local", kind="board", python="python3.12")
    error = environment._explained(host, ["onnxruntime-genai==1.0"], None, FOUND, NO_INDEX)
    assert isinstance(error, BadInput)
    text = str(error)
    assert "pi5 has no network" in text
    assert "No matching distribution found for x" in text
    assert (
        "pip download --dest wheelhouse --only-binary=:all: --platform manylinux_2_28_aarch64 "
        "--platform manylinux2014_aarch64 --python-version 3.12 onnxruntime-genai==1.0"
    ) in text
    assert text.endswith(
        "edgeprune hosts add pi5 ssh://pi5.local --kind board --python python3.12 "
        "--wheelhouse wheelhouse --replace"
    )
    assert "\n" not in text


def test_the_wheel_that_the_command_names_is_there() -> None:
    host = Host(name="me@box", address="box", user="me")
    own = Path("edgeprune-0-py3-none-any.whl")  # as it was sent, and is gone by now
    text = str(environment._explained(host, [own.name], own, FOUND, NO_INDEX))
    named = next(Path(word) for word in text.split() if word.endswith(".whl"))
    assert zipfile.is_zipfile(named)
    assert "edgeprune hosts add NAME ssh://me@box --wheelhouse" in text


def test_a_full_disk_and_other_ends_of_pip_are_told_apart() -> None:
    host = Host(name="box", address="box")
    full = environment._explained(
        host, [], None, FOUND, ["ERROR: [Errno 28] No space left on device"]
    )
    assert isinstance(full, BadInput)
    assert "box: its disk is full" in str(full)
    other = environment._explained(host, [], None, FOUND, ["a", "ERROR: ResolutionImpossible"])
    assert type(other) is EdgepruneError
    assert str(other) == "box: pip failed there: a / ERROR: ResolutionImpossible"


def test_a_box_needs_a_python_that_edgeprune_runs_on() -> None:
    host = Host(name="box", address="box")
    with pytest.raises(BadInput, match=r"Python 3\.9\.2, .* needs 3\.11 .* --python python3\.11"):
        environment._check_python(host, "3.9.2")
    environment._check_python(host, "3.11.0")


def test_a_wheelhouse_without_wheels_is_told(tmp_path: Path) -> None:
    host = Host(name="box", address="box", wheelhouse=str(tmp_path))
    with pytest.raises(BadInput, match="holds no wheels"):
        environment._wheelhouse(host)


# ---- over there, with a real pip


@pytest.fixture
def alone(sshd: Sshd) -> Sshd:
    """A machine whose pip asks an index that does not answer."""
    settings = sshd.home / ".config/pip/pip.conf"
    settings.parent.mkdir(parents=True)
    settings.write_text("[global]\nindex-url = http://127.0.0.1:9/simple\n")
    return sshd


def test_a_machine_without_an_index_is_told_what_to_do(alone: Sshd) -> None:
    with connect(alone.host) as link, pytest.raises(BadInput) as caught:
        environment.board(link, ignore)
    text = str(caught.value)
    python = ".".join(map(str, sys.version_info[:2]))
    assert text.startswith("far has no network")
    assert "pip download --dest wheelhouse --only-binary=:all: --platform " in text
    assert f"--python-version {python} {RUNTIME} numpy && " in text
    assert f"edgeprune hosts add far ssh://far --python {sys.executable} --wheel" in text
    assert not list(alone.root.glob("envs/*/ready"))


def test_a_board_without_an_index_is_served_by_a_wheelhouse(alone: Sshd, tmp_path: Path) -> None:
    wheels = wheelhouse.make(tmp_path / "wheelhouse")
    host = replace(alone.host, kind="board", wheelhouse=str(wheels))
    key = environment._key([RUNTIME, "numpy"], None, environment._wheelhouse(host))
    with connect(host) as link:
        python = Path(link.far(far_environment, "find", key=key)["python"])
        python.parent.mkdir(parents=True)
        (python.parent / "left").touch()  # by one who was killed while making it
        assert environment.board(link, ignore) == str(python)
        events: list[Event] = []
        assert environment.board(link, events.append) == str(python)
    assert not events  # the second time, nothing is to be done
    assert python.is_relative_to(alone.root / "envs")
    assert not (python.parent / "left").exists()
    installed = python.parent.parent.glob("lib/*/site-packages/*.dist-info")
    names = {each.name.partition("-")[0] for each in installed}
    assert names - {"pip", "setuptools"} == {"numpy", "onnxruntime_genai"}
