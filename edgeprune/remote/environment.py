"""Virtual environments on other machines: of this edgeprune on a box, of what measures on a board."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from edgeprune.errors import BadInput, EdgepruneError
from edgeprune.events import Emit, Progress
from edgeprune.locations import state_folder
from edgeprune.remote import far_environment, far_store, transfer, wheel
from edgeprune.remote.connection import Link
from edgeprune.remote.hosts import Host

STAGE = "environment"
RUNTIME = "onnxruntime-genai"
OLDEST_PYTHON = (3, 11)
"""That a box needs (``requires-python``), and that has wheels of what a board does."""
LAST_LINES, LONGEST_LINE = 3, 200
"""How many of pip's last lines an error repeats, and how many characters of each."""

_NO_ANSWER = re.compile(
    "after connection broken by|timed out|name resolution|not known|Max retries exceeded"
    "|Network is unreachable|Connection refused|No matching distribution found"
)


def box(link: Link, emit: Emit) -> str:
    """Return the interpreter of a virtual environment with this very edgeprune on the far machine, made if need be.

    What it depends on comes from the index that pip is set to there, or from the host's wheelhouse here. ``Progress``
    of stage "environment" tells of what is sent in bytes, and of the rest in pip's words.

    Raises:
        BadInput: the Python there is too old or cannot make environments, no index answers, or the disk is full.
        Unreachable: the link broke; the same call goes on.
        EdgepruneError: pip failed for another reason.
    """
    with TemporaryDirectory() as folder:
        own = wheel.build(Path(folder))
        return _made(link, [own.name], own, emit)


def board(link: Link, emit: Emit) -> str:
    """Return the interpreter of one with numpy and the ONNX Runtime GenAI of this machine. Raises as ``box``."""
    return _made(link, [f"{RUNTIME}=={version(RUNTIME)}", "numpy"], None, emit)


def clean(link: Link) -> dict[str, int]:
    """Remove the environments in which nothing is at work, and what was sent that nothing uses any more.

    Returns how many were ``removed``, how many are ``used``, and the ``bytes`` freed. Raises as ``Link.far``.
    """
    done: dict[str, int] = link.far(far_environment, "remove_unused")
    return {**done, "bytes": done["bytes"] + int(link.far(far_store, "clean"))}


def _made(link: Link, wanted: list[str], own: Path | None, emit: Emit) -> str:
    carried = _wheelhouse(link.host)
    found = link.far(far_environment, "find", key=_key(wanted, own, carried))
    if own:
        _check_python(link.host, found["version"])
    if not found["ready"]:
        _bring(link, found["environment"], [*carried, *([own] if own else [])], emit)
        said: list[str] = []
        code = _make(link, found["environment"], wanted, said, emit)
        if code:
            raise _explained(link.host, wanted, own, found, said)
    return str(found["python"])


def _key(wanted: list[str], own: Path | None, carried: Sequence[Path]) -> str:
    """Return what an environment is known by. Wheels say by their names what is in them, but for our own."""
    content = own and hashlib.sha256(own.read_bytes()).hexdigest()
    sizes = {path.name: path.stat().st_size for path in carried}
    return hashlib.sha256(json.dumps([wanted, content, sizes]).encode()).hexdigest()


def _wheelhouse(host: Host) -> list[Path]:
    if host.wheelhouse is None:
        return []
    folder = Path(host.wheelhouse).expanduser()
    found = sorted(folder.glob("*.whl"))
    if not found:
        raise BadInput(
            f"{host.name}: its wheelhouse {folder} holds no wheels; fill it with pip download"
        )
    return found


def _check_python(host: Host, found: str) -> None:
    if tuple(map(int, found.split(".")[:2])) < OLDEST_PYTHON:
        needed = ".".join(map(str, OLDEST_PYTHON))
        raise BadInput(
            f"{host.name}: its {host.python} is Python {found}, and edgeprune needs {needed} or newer; name another: "
            f"{_add(host)} --python python{needed} --replace"
        )


def _bring(link: Link, environment: str, wheels: list[Path], emit: Emit) -> None:
    sent = transfer.send(link, wheels, emit, STAGE)
    entries = [(path.name, sha256) for path, [(_, sha256)] in sent.items()]
    link.far(far_store, "link_wheels", environment=environment, entries=entries)


def _make(link: Link, environment: str, wanted: list[str], said: list[str], emit: Emit) -> int:
    """Have the environment made, tell what is said there, and return pip's exit code."""

    def on_line(line: str) -> None:
        if line.strip():
            said.append(line.strip())
            emit(Progress(stage=STAGE, done=0, total=0, note=line.strip()))

    arguments = (environment, wanted, link.host.wheelhouse is not None)
    call = f"raise SystemExit(make(*{arguments!r}))"
    script = f"{inspect.getsource(far_environment)}\n\n{call}\n"
    return link.run([link.host.python, "-I", "-"], input=script.encode(), on_line=on_line).code


# ---- what went wrong


def _explained(
    host: Host, wanted: list[str], own: Path | None, found: dict[str, Any], said: list[str]
) -> EdgepruneError:
    last = " / ".join(line[:LONGEST_LINE] for line in said[-LAST_LINES:])
    if any("No space left on device" in line for line in said):
        return BadInput(f"{host.name}: its disk is full: {last}; free some space there")
    if any(_NO_ANSWER.search(line) for line in said):
        what = [str(wheel.build(_kept()))] if own else wanted
        return BadInput(
            f"{_cause(host)}: {last}; carry the packages there: {_download(what, found)} && "
            f"{_add(host)} --wheelhouse wheelhouse --replace"
        )
    return EdgepruneError(f"{host.name}: pip failed there: {last}")


def _cause(host: Host) -> str:
    if host.wheelhouse is not None:
        return f"{host.name}: the wheelhouse {host.wheelhouse} lacks something"
    return f"{host.name} has no network, or its package index does not have everything"


def _kept() -> Path:
    """Return a folder in which the wheel stays for the command that names it."""
    folder = state_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _download(what: list[str], found: dict[str, Any]) -> str:
    platforms = [word for each in found["platforms"] for word in ("--platform", each)]
    python = ".".join(found["version"].split(".")[:2])
    fixed = ["pip", "download", "--dest", "wheelhouse", "--only-binary=:all:"]
    return shlex.join([*fixed, *platforms, "--python-version", python, *what])


def _add(host: Host) -> str:
    python = ["--python", host.python] if host.python != "python3" else []
    kind = ["--kind", host.kind] if host.kind != "box" else []
    name = host.name if re.fullmatch(r"[\w.-]+", host.name) else "NAME"
    return shlex.join(["edgeprune", "hosts", "add", name, host.url, *kind, *python])
