"""Where a checkpoint came from: ``edgeprune.json`` beside its weights."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from edgeprune import sources
from edgeprune.sources import Source

FILE = "edgeprune.json"
SCHEMA_VERSION = 1
LIBRARIES = ("edgeprune", "torch", "transformers", "safetensors")


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """Return what ``edgeprune.json`` in ``folder`` says; None without one, BadInput if damaged."""
    path = folder / FILE
    return sources.read_json(path) if path.is_file() else None


def origin(source: Source) -> dict[str, Any]:
    """Describe a source for its descendants; the provenance of a pruned source stays inside."""
    described: dict[str, Any] = {
        "name": source.title,
        "kind": source.kind,
        "revision": source.revision,
        "licence": licence(source),
    }
    earlier = None if source.gguf_file else read_provenance(source.path)
    return {**described, "provenance": earlier} if earlier else described


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that made a checkpoint."""
    return {"python": platform.python_version(), **{n: metadata.version(n) for n in LIBRARIES}}


def licence(source: Source) -> str | None:
    """Return the licence that a source states, such as apache-2.0; None if it states none."""
    if source.gguf_file:
        stated = sources.gguf_header(source).metadata.get("general.license")
        return str(stated) if stated else None
    earlier = read_provenance(source.path)
    if earlier:
        return earlier.get("source", {}).get("licence")
    return _licence_of_card(source.path / "README.md")


def _licence_of_card(card: Path) -> str | None:
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\r?\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:\s*['\"]?([\w.+-]+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else None
