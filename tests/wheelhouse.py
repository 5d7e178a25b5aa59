"""Wheels with nothing in them, of every package that edgeprune depends on: pip really resolves and installs them, and
what is imported then is what the tests themselves run with."""

from __future__ import annotations

import re
import sysconfig
import zipfile
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement

CARRIER = "numpy"  # which both a box and a board need
WHEEL = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def make(folder: Path, site_packages: Path | None = None) -> Path:
    """Fill ``folder`` with such wheels, of the versions installed here; one of them leads to ``site_packages``.

    That is by default where the packages of this process are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = site_packages or Path(sysconfig.get_path("purelib"))
    for name in dependencies():
        lines = {"edgeprune_tests.pth": f"{place}\n"} if name == CARRIER else {}
        empty_wheel(folder, name, version(name), lines)
    return folder


def dependencies() -> list[str]:
    """The packages that edgeprune needs wherever it runs."""
    wanted = [Requirement(each) for each in requires("edgeprune") or []]
    here = [each for each in wanted if not each.marker or each.marker.evaluate({"extra": ""})]
    return sorted(each.name for each in here)


def empty_wheel(folder: Path, name: str, number: str, files: dict[str, str]) -> Path:
    """Write a wheel that holds no more than ``files``."""
    known = re.sub("[-_.]+", "_", name).lower()
    about = f"{known}-{number}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n"
    content = {**files, f"{about}/METADATA": metadata, f"{about}/WHEEL": WHEEL}
    content[f"{about}/RECORD"] = "".join(f"{each},,\n" for each in [*content, f"{about}/RECORD"])
    path = folder / f"{known}-{number}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for each, text in content.items():
            file.writestr(each, text)
    return path
