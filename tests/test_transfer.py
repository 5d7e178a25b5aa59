"""Files to another machine and home: each content once, checked, going on after a cut, and nothing hostile written."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sshd import Sshd
from sshd import sshd as sshd

from edgeprune import machine
from edgeprune.errors import BadInput, EdgepruneError
from edgeprune.events import Event, Progress, ignore
from edgeprune.remote import far_store, manifest, transfer
from edgeprune.remote.connection import Link, Unreachable, connect

MB = 10**6


@pytest.fixture
def link(sshd: Sshd) -> Iterator[Link]:
    with connect(sshd.host) as found:
        yield found


class Traffic:
    """Counts the bytes that uploads and downloads move, and breaks the link when there are enough."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.moved, self.limit = 0, float("inf")
        self.at_limit: Callable[[], None] = lambda: None
        for name in ("upload", "download"):
            patch.setattr(Link, name, self._counted(getattr(Link, name)))

    def _counted(self, move: Callable[..., None]) -> Callable[..., None]:
        def counted(
            link: Link, *places: Any, offset: int, progress: Callable[[int], object]
        ) -> None:
            last = offset

            def told(there: int) -> None:
                nonlocal last
                self.moved += there - last
                last = there
                if self.moved >= self.limit:
                    self.limit = float("inf")
                    self.at_limit()
                progress(there)

            move(link, *places, offset=offset, progress=told)

        return counted

    def cut_after(self, count: int, how: Callable[[], None]) -> None:
        self.limit, self.at_limit = self.moved + count, how


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    return Traffic(monkeypatch)


def random_file(path: Path, size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(random.Random(path.name).randbytes(size))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sent(link: Link, *paths: Path) -> dict[Path, list[tuple[str, str]]]:
    return transfer.send(link, paths, ignore, "send")


def fetched(link: Link, sshd: Sshd, folder: Path, *names: str) -> None:
    transfer.fetch(link, str(sshd.home / "out"), folder, names, ignore, "fetch")


# ---- sending


def test_each_content_is_sent_once(
    sshd: Sshd, link: Link, tmp_path: Path, traffic: Traffic
) -> None:
    one = random_file(tmp_path / "model/deep/one", 100_000)
    blob = random_file(tmp_path / "blobs/abc", 50_000)
    (tmp_path / "model/two").symlink_to(blob)  # as in the Hub's cache
    (tmp_path / "model/same").write_bytes(one.read_bytes())
    (tmp_path / "model/empty").touch()
    (tmp_path / "model/.hidden").write_text("not sent")
    found = sent(link, tmp_path / "model", blob)
    assert found[blob] == [("", sha256(blob))]
    assert dict(found[tmp_path / "model"]) == {
        "deep/one": sha256(one),
        "same": sha256(one),
        "two": sha256(blob),
        "empty": hashlib.sha256().hexdigest(),
    }
    assert traffic.moved == 150_000
    for _, content in found[tmp_path / "model"]:
        assert sha256(sshd.root / "store" / content) == content
    assert sent(link, tmp_path / "model", blob) == found
    assert traffic.moved == 150_000


def test_what_was_sent_is_linked_for_a_run(sshd: Sshd, link: Link, tmp_path: Path) -> None:
    random_file(tmp_path / "model/one", 10)
    [files] = sent(link, tmp_path / "model").values()
    place = link.far(far_store, "link_inputs", run="run-1", entries=files)
    assert (Path(place) / "one").read_bytes() == (tmp_path / "model/one").read_bytes()


def test_progress_is_one_sum_and_seldom(link: Link, tmp_path: Path) -> None:
    for index in range(40):
        random_file(tmp_path / f"model/{index}", 1000)
    events: list[Event] = []
    transfer.send(link, [tmp_path / "model"], events.append, "send")
    told = [event for event in events if isinstance(event, Progress)]
    assert {(event.stage, event.total, event.unit) for event in told} == {("send", 40_000, "bytes")}
    assert told[-1].done == 40_000
    seconds = told[-1].time - told[0].time
    assert len(told) <= 4 + seconds / transfer.INTERVAL


def test_an_upload_goes_on_where_the_link_broke(
    sshd: Sshd, tmp_path: Path, traffic: Traffic
) -> None:
    file = random_file(tmp_path / "model.bin", 100 * MB)  # it goes on while it is being cut
    traffic.cut_after(10 * MB, sshd.cut)
    with connect(sshd.host) as link, pytest.raises(Unreachable):
        sent(link, file)
    assert not (sshd.root / "store" / sha256(file)).exists()
    with connect(sshd.host) as link:
        sent(link, file)
    assert sha256(sshd.root / "store" / sha256(file)) == sha256(file)
    assert traffic.moved < 150 * MB


def test_a_damaged_beginning_is_sent_again(
    sshd: Sshd, link: Link, tmp_path: Path, traffic: Traffic
) -> None:
    file = random_file(tmp_path / "model.bin", MB)
    part = sshd.root / "store" / f"{sha256(file)}.part"
    part.parent.mkdir(parents=True)
    for wrong in (b"x" * 1000, b"x" * (2 * MB)):
        part.write_bytes(wrong)
        sent(link, file)
        assert sha256(part.with_suffix("")) == sha256(file)
        assert not part.exists()
        part.with_suffix("").unlink()
    assert traffic.moved == (MB - 1000) + MB + MB


def test_a_file_that_changes_meanwhile_is_told(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = random_file(tmp_path / "model.bin", 1000)
    monkeypatch.setattr(transfer, "_digest", lambda path, progress: "0" * 64)
    with pytest.raises(EdgepruneError, match=r"model\.bin: did not arrive whole"):
        sent(link, file)


@pytest.mark.parametrize(("size", "how"), [(2000, "grows"), (500, "shrank"), (0, "shrank")])
def test_a_file_that_changes_its_size_meanwhile_is_told(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, how: str
) -> None:
    file = random_file(tmp_path / "model.bin", 1000)
    room = transfer._check_far_room

    def grow(*arguments: Any) -> None:
        room(*arguments)
        file.write_bytes(bytes(size))

    monkeypatch.setattr(transfer, "_check_far_room", grow)
    with pytest.raises(EdgepruneError, match=how):
        sent(link, file)


def test_what_cannot_be_sent_is_told(link: Link, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(BadInput, match="no such file or folder"):
        sent(link, folder)
    folder.mkdir()
    with pytest.raises(BadInput, match="an empty folder"):
        sent(link, folder)
    (folder / "elsewhere").symlink_to("/")
    with pytest.raises(BadInput, match="'elsewhere' is neither a file nor a folder of its own"):
        sent(link, folder)
    (folder / "elsewhere").unlink()
    (folder / "broken").symlink_to("nowhere")
    with pytest.raises(BadInput, match="'broken' is neither"):
        sent(link, folder)
    (folder / "broken").unlink()
    (folder / "two\nlines").touch()
    with pytest.raises(BadInput, match=r"'two\\nlines' has a character"):
        sent(link, folder)


# ---- disks that are full


def test_a_far_disk_without_room_is_told_before_sending(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traffic: Traffic
) -> None:
    monkeypatch.setattr(transfer, "ROOM", 10**18)
    with pytest.raises(BadInput, match=r"far: its disk has no room: 1\.00 MB are to be sent"):
        sent(link, random_file(tmp_path / "model.bin", MB))
    assert traffic.moved == 0


@pytest.fixture
def small_disk(sshd: Sshd) -> Iterator[Path]:
    """A far root on a disk of 8 MB."""
    sshd.root.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "tmpfs", str(sshd.root)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    yield sshd.root
    subprocess.run(["umount", "-l", str(sshd.root)], check=True)


def test_a_far_disk_that_fills_up_is_told(
    small_disk: Path, link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_check_far_room", lambda *_: None)  # others write there, too
    file = random_file(tmp_path / "model.bin", 20 * MB)
    with pytest.raises(BadInput, match="far: its disk is full"):
        sent(link, file)
    assert not (small_disk / "store" / sha256(file)).exists()


def test_a_disk_here_without_room_is_told(
    sshd: Sshd, link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_file(sshd.home / "out/model.bin", MB)
    monkeypatch.setattr(machine, "disk_free", lambda path: 500_000)
    with pytest.raises(BadInput, match=r"1\.00 MB are to be fetched, and 500\.0 kB are free"):
        fetched(link, sshd, tmp_path / "home", "model.bin")
    assert not (tmp_path / "home").exists()


def test_a_disk_here_that_fills_up_is_told(
    sshd: Sshd, link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: Any, **__: Any) -> None:
        Path("/dev/full").write_bytes(b"x")

    random_file(sshd.home / "out/model.bin", MB)
    monkeypatch.setattr(Link, "download", write)
    with pytest.raises(BadInput, match="the disk is full"):
        fetched(link, sshd, tmp_path / "home", "model.bin")


# ---- fetching


def results(sshd: Sshd, size: int = 1000) -> dict[str, str]:
    """Make results over there; return their contents by their paths."""
    out = sshd.home / "out"
    files = [random_file(out / path, size) for path in ("model/a", "model/deep/b", "results.json")]
    (out / "model/same").write_bytes((out / "model/a").read_bytes())
    files.append(out / "model/same")
    return {file.relative_to(out).as_posix(): sha256(file) for file in files}


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_results_come_home(sshd: Sshd, link: Link, tmp_path: Path, traffic: Traffic) -> None:
    expected = results(sshd)
    os.utime(sshd.home / "out/results.json", (10**9, 10**9))
    fetched(link, sshd, tmp_path / "home", "model", "results.json")
    assert contents(tmp_path / "home") == expected
    assert sorted(each.name for each in (tmp_path / "home").iterdir()) == ["model", "results.json"]
    assert (tmp_path / "home/results.json").stat().st_mtime == 10**9
    assert traffic.moved == 4000
    ids = {path.stat().st_ino for path in (tmp_path / "home").rglob("*") if path.is_file()}
    assert len(ids) == 4  # changing one does not change another


def test_only_what_changed_is_fetched_again(
    sshd: Sshd, link: Link, tmp_path: Path, traffic: Traffic
) -> None:
    results(sshd)
    home = tmp_path / "home"
    fetched(link, sshd, home, "model", "results.json")
    (home / "model/mine").write_text("mine")
    (sshd.home / "out/model/a").write_bytes(b"new")
    fetched(link, sshd, home, "model", "results.json")
    assert traffic.moved == 4003
    assert (home / "model/a").read_bytes() == b"new"
    assert (home / "model/mine").read_text() == "mine"


def test_a_download_goes_on_where_the_link_broke(
    sshd: Sshd, tmp_path: Path, traffic: Traffic
) -> None:
    expected = results(sshd, size=25 * MB)  # it goes on while it is being cut
    home = tmp_path / "home"
    traffic.cut_after(30 * MB, sshd.cut)
    with connect(sshd.host) as link, pytest.raises(Unreachable):
        fetched(link, sshd, home, "model", "results.json")
    assert not (home / "model").exists()  # a folder appears whole
    with connect(sshd.host) as link:
        fetched(link, sshd, home, "model", "results.json")
    assert contents(home) == expected
    assert traffic.moved < 1.5 * 100 * MB


def test_a_damaged_download_is_fetched_again(
    sshd: Sshd, link: Link, tmp_path: Path, traffic: Traffic
) -> None:
    expected = results(sshd)
    waiting = tmp_path / "home" / transfer.UNFINISHED
    waiting.mkdir(parents=True)
    listed = far_store.listing(str(sshd.home / "out"), ["model", "results.json"])
    entries = {each.path: each for each in manifest.read(listed, ["model", "results.json"], "far")}
    transfer._part(entries["results.json"], waiting).write_bytes(b"x" * 400)
    transfer._part(entries["model/a"], waiting).write_bytes(b"x" * 4000)
    fetched(link, sshd, tmp_path / "home", "model", "results.json")
    assert contents(tmp_path / "home") == expected
    assert traffic.moved == 4000 + 600


def test_what_an_earlier_try_left_does_not_appear(sshd: Sshd, link: Link, tmp_path: Path) -> None:
    expected = results(sshd)
    random_file(tmp_path / "home" / transfer.UNFINISHED / "whole/model/old/gone", 10)
    fetched(link, sshd, tmp_path / "home", "model", "results.json")
    assert contents(tmp_path / "home") == expected


def test_what_arrives_wrong_twice_is_told(
    sshd: Sshd, link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results(sshd)
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "_sums", lambda *_: {"results.json": "0" * 64})
        with pytest.raises(EdgepruneError, match=r"results\.json did not arrive whole"):
            fetched(link, sshd, tmp_path / "home", "results.json")
    answers(monkeypatch, entry("results.json", size=10))
    with pytest.raises(EdgepruneError, match="grows while it is transferred"):
        fetched(link, sshd, tmp_path / "home", "results.json")
    assert not (tmp_path / "home/results.json").exists()


def test_a_name_that_is_not_there_is_told(sshd: Sshd, link: Link, tmp_path: Path) -> None:
    results(sshd)
    with pytest.raises(BadInput, match="has no nothing"):
        fetched(link, sshd, tmp_path / "home", "nothing")


# ---- hostile machines


def entry(path: Any, **other: Any) -> dict[str, Any]:
    return {"path": path, "kind": "file", "size": 3, "mtime": 1.0, **other}


def answers(patch: pytest.MonkeyPatch, *entries: Any) -> None:
    """Let the far machine say that it has these."""
    far = Link.far

    def said(link: Link, module: Any, function: str, /, **arguments: Any) -> Any:
        if function == "listing":
            return list(entries)
        return far(link, module, function, **arguments)

    patch.setattr(Link, "far", said)


def test_one_hostile_entry_refuses_all(
    sshd: Sshd, link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results(sshd)
    (sshd.home / "out/model/link").symlink_to("/etc/passwd")
    with pytest.raises(BadInput, match=r"far: 'model/link' is no file"):
        fetched(link, sshd, tmp_path / "home", "results.json", "model")
    answers(monkeypatch, entry("results.json"), entry("../results.json"))
    with pytest.raises(BadInput, match=r"far: '\.\./results\.json' leads elsewhere"):
        fetched(link, sshd, tmp_path / "home", "results.json")
    assert not list(tmp_path.iterdir())


def test_the_waiting_room_is_no_link(sshd: Sshd, link: Link, tmp_path: Path) -> None:
    results(sshd)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / transfer.UNFINISHED).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match="no folder; move it away"):
        fetched(link, sshd, tmp_path, "results.json")
    assert not list((tmp_path / "elsewhere").iterdir())
