"""What another machine says it has: harmless files are taken, and whatever could lead elsewhere is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeprune.errors import BadInput
from edgeprune.remote import manifest


def entry(path: Any, **other: Any) -> dict[str, Any]:
    return {"path": path, "kind": "file", "size": 3, "mtime": 1.0, **other}


HOSTILE = {
    "../x": "leads elsewhere",
    "/etc/x": "absolute",
    "out/../../x": "leads elsewhere",
    "out/./x": "leads elsewhere",
    "out//x": "leads elsewhere",
    "out/": "leads elsewhere",
    "C:\\x": "absolute",
    "c:x": "absolute",
    "\\\\server\\x": "absolute",
    "out/a\\b": "character",
    "out/a:b": "character",
    "out/a\nb": "character",
    "out/a\0b": "character",
    "out/con": "reserve",
    "out/Nul.txt": "reserve",
    "out/dot.": "reserve",
    "out/" + "x" * 300: "too long",
    "out/\udcff": "no text",
    "": "is no path",
    "another": "not asked for",
    "unfinished-fetch/x": "not asked for",
}


@pytest.mark.parametrize(("path", "reason"), HOSTILE.items(), ids=map(repr, range(len(HOSTILE))))
def test_hostile_names_are_refused(path: str, reason: str) -> None:
    fine = entry("out/fine")
    with pytest.raises(BadInput, match=reason) as caught:
        manifest.read([fine, entry(path)], ["out"], "far")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "said",
    [
        {},
        "out/x",
        entry("out/x", kind="link"),
        entry("out/x", kind="other"),
        entry("out/x", size=-1),
        entry("out/x", size=1.5),
        entry("out/x", size=True),
        entry("out/x", mtime=float("nan")),
        entry("out/x", mtime=-1),
        entry(["out", "x"]),
    ],
    ids=repr,
)
def test_what_is_no_file_is_refused(said: Any) -> None:
    with pytest.raises(BadInput, match="nothing was fetched"):
        manifest.read([entry("out/fine"), said], ["out"], "far")


def test_an_answer_of_another_form_is_refused() -> None:
    with pytest.raises(BadInput, match="no list of files"):
        manifest.read({"out": 1}, ["out"], "far")


@pytest.mark.parametrize("folds", [True, False])
def test_names_that_differ_in_case_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folds: bool
) -> None:
    monkeypatch.setattr(manifest, "folds_case", lambda folder: folds)
    for pair in (["out/a", "out/A"], ["out/a/x", "OUT/a/y"], ["out/\u00e9", "out/e\u0301"]):
        both = manifest.read([entry(path) for path in pair], ["out", "OUT"], "far")
        if folds:
            with pytest.raises(BadInput, match="would be the same"):
                manifest.check_places(both, tmp_path, "far")
        else:
            manifest.check_places(both, tmp_path, "far")


@pytest.mark.parametrize("pair", [("out/a", "out/a"), ("out/a", "out/a/b"), ("out/a/b", "out/a")])
def test_two_files_in_one_place_are_refused(tmp_path: Path, pair: tuple[str, str]) -> None:
    both = manifest.read([entry(path) for path in pair], ["out"], "far")
    with pytest.raises(BadInput, match="would be the same"):
        manifest.check_places(both, tmp_path, "far")


def test_whether_case_counts_is_found_without_writing(tmp_path: Path) -> None:
    (tmp_path / "lower").mkdir()
    expected = (tmp_path / "LOWER").exists()
    assert manifest.folds_case(tmp_path / "lower/not/there") == expected


@pytest.mark.parametrize("path", ["out/deep/x", "out/x"])
def test_links_here_are_not_written_through(tmp_path: Path, path: str) -> None:
    elsewhere = tmp_path / "elsewhere/x"
    elsewhere.parent.mkdir()
    elsewhere.touch()
    folder = tmp_path / "home/out"
    folder.mkdir(parents=True)
    (folder / "deep").symlink_to(elsewhere.parent)
    (folder / "x").symlink_to(elsewhere)
    entries = manifest.read([entry(path)], ["out"], "far")
    with pytest.raises(BadInput, match="cannot be put here"):
        manifest.check_places(entries, tmp_path / "home", "far")
