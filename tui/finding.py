"""Which models the list of the wizard's first step shows, and in which order. Knows no screen."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeprune.quantities import format_bytes, format_count
from edgeprune.tui.choice import existing

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
GROUPS = (
    ("recent", "Recently used"),
    ("bundled", "Comes with edgeprune"),
    ("hub", "In the Hub's cache"),
    ("folder", "Folders here"),
    ("gguf", "GGUF files here"),
)


@dataclass(frozen=True)
class Line:
    """A line of the list; without a ``spec`` it is a heading."""

    text: str
    spec: str = ""


def lines(
    text: str, local: Sequence[Mapping[str, Any]], hub: Sequence[Mapping[str, Any]]
) -> list[Line]:
    """Return the list: what ``text`` names, then what matches it on this machine, then what the Hub found."""
    text = text.strip()
    if not text:
        return list(_grouped(local))
    here = [model for model in local if _matches(text, model)]
    here.sort(key=lambda model: text not in (model["spec"], model["title"]))
    known = {model["spec"] for model in local}
    others = [model for model in hub if model["spec"] not in known]
    found = [
        *_under("On this machine", map(_local, here)),
        *_under("On the Hub", map(_hub, others)),
    ]
    typed = Line(f"{text}  (as typed)", text)
    named = {line.spec for line in found} | {m["title"] for m in here}
    return [typed, *found] if names_model(text) and text not in named else found


def names_model(text: str) -> bool:
    """Whether what was typed can be a model's full name: a path, a wheel or a Hub id."""
    if text.startswith((".", "/", "~", "wheel:")) or "\\" in text or text.endswith(".gguf"):
        return True
    return bool(HUB_ID.fullmatch(text)) or existing(text) is not None


def _grouped(local: Sequence[Mapping[str, Any]]) -> Iterator[Line]:
    for kind, title in GROUPS:
        models = [m for m in local if ("recent" if m["recent"] else m["kind"]) == kind]
        yield from _under(title, map(_local, models))


def _under(title: str, found: Iterator[Line]) -> Iterator[Line]:
    for number, line in enumerate(found):
        if not number:
            yield Line(title)
        yield line


def _matches(text: str, model: Mapping[str, Any]) -> bool:
    known = f"{model['spec']} {model['title']}".lower()
    return all(word in known for word in text.lower().split())


def _local(model: Mapping[str, Any]) -> Line:
    title, spec = str(model["title"]), str(model["spec"])
    name = spec if title in spec else f"{title} ({spec})"
    pruned = ", pruned" if model["pruned"] else ""
    return Line(f"{name}  {format_bytes(model['bytes'])}{pruned}", spec)


def _hub(model: Mapping[str, Any]) -> Line:
    count, downloads = model["parameters"], model["downloads"]
    facts = [
        f"{format_count(count)} parameters" if count else "size unknown",
        *([model["licence"]] if model["licence"] else []),
        *([f"{format_count(downloads)} downloads"] if downloads else []),
        *(["gated"] if model["gated"] else []),
    ]
    return Line(f"{model['spec']}  {', '.join(facts)}", str(model["spec"]))
