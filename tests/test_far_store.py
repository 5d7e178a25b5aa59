"""The far store by itself: what is in it, what uses it, and what it refuses."""

from __future__ import annotations

import ast
import hashlib
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edgeprune.remote import far_store

REMOTE = Path(far_store.__file__).parent


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The far root, here."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data" / "edgeprune"


def arrived(content: bytes) -> str:
    """Put content where an upload leaves it; return its SHA-256."""
    sha256 = hashlib.sha256(content).hexdigest()
    far_store.part(sha256).write_bytes(content)
    return sha256


def stored(content: bytes) -> str:
    sha256 = arrived(content)
    assert far_store.adopt({sha256: len(content)}) == []
    return sha256


# ---- what every far module is


@pytest.mark.parametrize("path", sorted(REMOTE.glob("far_*.py")), ids=lambda path: path.stem)
def test_a_far_module_needs_nothing_but_an_old_python(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"), feature_version=(3, 9))
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [each.name for each in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= set(sys.stdlib_module_names)


# ---- the store


def test_the_far_root_is_its_users_alone(far: Path) -> None:
    far_store.store()
    assert far.stat().st_mode & 0o777 == 0o700


def test_what_arrived_is_taken_only_if_it_is_what_it_should_be(far: Path) -> None:
    whole, damaged, short = arrived(b"whole"), arrived(b"damaged"), arrived(b"short")
    far_store.part(damaged).write_bytes(b"dXmaged")
    far_store.part(short).write_bytes(b"sho")
    sizes = {whole: 5, damaged: 7, short: 5}
    assert far_store.have(sizes)["parts"] == {whole: 5, damaged: 7, short: 3}
    assert far_store.adopt(sizes) == [damaged, short]
    said = far_store.have(sizes)
    assert (said["whole"], said["parts"]) == ([whole], {short: 3})
    assert said["free"] > 0
    assert far_store.adopt({whole: 5}) == []  # another process was first


def test_what_is_arriving_is_followed(far: Path) -> None:
    content = b"slowly" * 1000
    sha256 = hashlib.sha256(content).hexdigest()
    with ThreadPoolExecutor(1) as pool:
        adopted = pool.submit(far_store.adopt, {sha256: len(content)}, patience=20.0)
        with far_store.part(sha256).open("wb", buffering=0) as file:
            for start in range(0, len(content), 1000):
                file.write(content[start : start + 1000])
                time.sleep(0)
        assert adopted.result() == []
    assert far_store.blob(sha256).read_bytes() == content


@pytest.mark.parametrize("sha256", ["", "../x", "0" * 63, "G" * 64, "0" * 64 + "\n"])
def test_only_contents_name_files_in_the_store(far: Path, sha256: str) -> None:
    with pytest.raises(ValueError, match="is not a SHA-256"):
        far_store.have({sha256: 1})


def test_inputs_are_links_to_the_store(far: Path) -> None:
    one, two = stored(b"one"), stored(b"two")
    entries = [["model/a.bin", one], ["model/deep/b.bin", two], ["text", one]]
    for _ in range(2):
        place = Path(far_store.link_inputs("run-1", entries))
        assert place == far / "runs" / "run-1" / "inputs"
        assert (place / "model/deep/b.bin").read_bytes() == b"two"
        assert (place / "text").samefile(far_store.blob(one))
    far_store.link_inputs("run-1", [["text", two]])
    assert (place / "text").read_bytes() == b"two"


def test_inputs_are_copies_where_links_fail(far: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError("not supported")

    one = stored(b"one")
    monkeypatch.setattr(os, "link", link)
    place = Path(far_store.link_inputs("run", [["text", one]]))
    assert [each.name for each in place.iterdir()] == ["text"]
    assert (place / "text").read_bytes() == b"one"


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "a//b", "", ".", "a\0b"])
def test_inputs_stay_in_their_run(far: Path, path: str) -> None:
    with pytest.raises(ValueError, match="leads out"):
        far_store.link_inputs("run", [["fine", stored(b"1")], [path, stored(b"2")]])
    assert not (far / "runs").exists()


def test_inputs_go_through_no_link(far: Path, tmp_path: Path) -> None:
    place = Path(far_store.link_inputs("run", [["text", stored(b"1")]]))
    (place / "model").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="is a link"):
        far_store.link_inputs("run", [["model/x", stored(b"2")]])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("run", ["", "..", "a/b", "-a", "A", "a\n"])
def test_only_ids_name_runs(far: Path, run: str) -> None:
    with pytest.raises(ValueError, match="is not the id of a run"):
        far_store.link_inputs(run, [])


def test_what_is_gone_is_said(far: Path) -> None:
    with pytest.raises(ValueError, match="sends it again"):
        far_store.link_inputs("run", [["text", "0" * 64]])


def test_cleaning_keeps_what_is_used_or_on_its_way(far: Path) -> None:
    used, free, wheel = stored(b"used"), stored(b"free"), stored(b"wheel")
    new, old = arrived(b"new"), arrived(b"old")
    far_store.link_inputs("run", [["text", used]])
    wheels = Path(far_store.link_wheels("abc", [["x.whl", wheel]]))
    long_ago = time.time() - 2 * far_store.PART_SECONDS
    os.utime(far_store.part(old), (long_ago, long_ago))
    assert far_store.clean() == len(b"free") + len(b"old")
    left = {each.name for each in far_store.store().iterdir()}
    assert left == {used, wheel, f"{new}.part"}
    assert free not in left
    wheels.with_name("ready").touch()  # installed, and not needed any more
    assert far_store.clean() == len(b"wheel")


def test_a_listing_describes_files_and_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "out/deep").mkdir(parents=True)
    (tmp_path / "out/deep/b").write_bytes(b"bb")
    (tmp_path / "out/z").symlink_to("/etc")
    os.mkfifo(tmp_path / "out/pipe")
    (tmp_path / "other").write_bytes(b"")
    found = far_store.listing(str(tmp_path), ["out"])
    assert [(each["path"], each["kind"]) for each in found] == [
        ("out/deep/b", "file"),
        ("out/pipe", "other"),
        ("out/z", "link"),
    ]
    assert found[0]["size"] == 2
    sums = far_store.digests(str(tmp_path), ["out/deep/b"])
    assert sums == {"out/deep/b": hashlib.sha256(b"bb").hexdigest()}
    with pytest.raises(ValueError, match="has no missing"):
        far_store.listing(str(tmp_path), ["missing"])
