"""Functions to be called over there."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def echo(value: Any) -> Any:
    return value


def home() -> str:
    return str(Path.home())


def repeat(text: str, times: int) -> str:
    return text * times


def shout() -> str:
    print("something", end="")
    print("else", file=sys.stderr)
    subprocess.run(["sh", "-c", "echo loud; printf more"], check=True)
    return "heard"


def refuse() -> None:
    raise ValueError("not that\none")


def fill() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")


def fail() -> None:
    Path("/no/such/file").read_text()


def slip() -> None:
    b"\xff".decode()


def leave() -> None:
    sys.exit(7)
