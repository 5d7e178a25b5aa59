"""The edgeprune that runs here as a wheel, and on a box that it is sent to."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import wheelhouse
from sshd import Sshd
from sshd import sshd as sshd

from edgeprune import __version__
from edgeprune.events import Event, Progress
from edgeprune.remote import environment, wheel
from edgeprune.remote.connection import Unreachable, connect

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel.build(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(built) as file:
        names = set(file.namelist())
    assert built.name == f"edgeprune-{__version__}-py3-none-any.whl"
    for part in ("edgeprune", "tui", "exporters", "profiles"):
        prefix = "edgeprune" if part == "edgeprune" else f"edgeprune/{part}"
        modules = {p.relative_to(ROOT / part).as_posix() for p in (ROOT / part).rglob("*.py")}
        assert {f"{prefix}/{each}" for each in modules} <= names
    data = {each for each in names if ".dist-info/" not in each and not each.endswith(".py")}
    assert {Path(each).suffix for each in data} == {".j2", ".toml", ".typed", ".tcss"}


def test_the_same_code_gives_the_same_wheel(built: Path, tmp_path: Path) -> None:
    again = wheel.build(tmp_path)
    assert again.read_bytes() == built.read_bytes()
    assert [each.name for each in tmp_path.iterdir()] == [built.name]


def test_pip_installs_the_wheel_and_it_runs(built: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(built)], check=True, capture_output=True)
    place = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    (place / "tests.pth").write_text(sysconfig.get_path("purelib"))
    code = "import edgeprune, edgeprune.tui; print(edgeprune.__file__, edgeprune.tui.__file__)"
    for command, expected in (
        ([str(python), "-I", "-m", "edgeprune", "--version"], __version__),
        ([str(tmp_path / "venv/bin/edgeprune"), "--version"], __version__),
        ([str(python), "-I", "-c", code], f"{place}/edgeprune/tui/__init__.py"),
    ):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert expected in done.stdout, done.stderr


# ---- on a box


def output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    return done.stdout.strip()


def test_a_box_gets_this_edgeprune_though_the_link_breaks(sshd: Sshd, tmp_path: Path) -> None:
    wheels = wheelhouse.make(tmp_path / "wheelhouse")
    host = replace(sshd.host, wheelhouse=str(wheels))
    events: list[Event] = []

    def cut(event: Event) -> None:
        if isinstance(event, Progress) and event.note == "making a virtual environment":
            sshd.cut()

    with connect(host) as link, pytest.raises(Unreachable):
        environment.box(link, cut)

    def again(_: int) -> str:
        with connect(host) as link:
            return environment.box(link, events.append)

    with ThreadPoolExecutor(2) as both:
        pythons = set(both.map(again, range(2)))
    [python] = pythons
    assert output(python, "-m", "edgeprune", "--version") == f"edgeprune {__version__}"
    place = output(python, "-I", "-c", "import edgeprune.tui; print(edgeprune.__file__)")
    assert Path(place).is_relative_to(sshd.root)
    assert {event.stage for event in events if isinstance(event, Progress)} == {"environment"}
