"""Checkpoints of a training: a folder ``step-NNNNNNNN`` each, whole or not there, the last two kept.

``state.safetensors`` holds the float32 weights (``weight.NAME``), AdamW's moments (``exp_avg.NAME``,
``exp_avg_sq.NAME``) and the states of the random generators (``random.NAME``); ``state.json`` the rest.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.checkpoint import disk_is_full, sync
from edgeprune.errors import BadInput, EdgepruneError, one_line
from edgeprune.quantities import format_bytes

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 2
TENSORS, ABOUT = "state.safetensors", "state.json"
FORMAT = 1


def write(folder: Path, step: int, tensors: dict[str, Tensor], about: dict[str, Any]) -> Path:
    """Write the checkpoint of ``step`` into ``folder``, remove all but the last two, and return its own folder.

    Raises:
        EdgepruneError: the disk is full or fails; says which checkpoint there still is.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    place = folder / f"step-{step:08}"
    unfinished = folder / f".step-{step:08}.part"
    try:
        for left in folder.glob(".step-*.part"):
            shutil.rmtree(left)
        unfinished.mkdir(parents=True)
        save_file(tensors, unfinished / TENSORS)
        text = json.dumps({"format": FORMAT, "step": step, **about}, indent=2)
        (unfinished / ABOUT).write_text(text + "\n", encoding="utf-8")
        sync(unfinished)
        if place.exists():  # of an earlier process that went back behind this step
            shutil.rmtree(place)
        unfinished.rename(place)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise _not_written(folder, step, tensors, error) from error
    for old in all_of(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return place


def _not_written(
    folder: Path, step: int, tensors: dict[str, Tensor], error: Exception
) -> EdgepruneError:
    reason = one_line(error)
    if disk_is_full(error):
        needed = format_bytes(sum(t.nbytes for t in tensors.values()))
        reason = f"the disk is full: a checkpoint takes {needed}"
    return EdgepruneError(
        f"the checkpoint of step {step} cannot be written to {folder}: {reason}; {way_back(folder)}"
    )


def way_back(folder: Path | None) -> str:
    """Say where the training can go on from."""
    whole = all_of(folder) if folder else []
    if not whole:
        return "there is no earlier checkpoint: the training starts anew"
    return f"{whole[-1]} is whole: make good what failed and resume from it"


def all_of(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / ABOUT).is_file())


def describe(path: Path) -> dict[str, Any]:
    """Return what a checkpoint's ``state.json`` says. BadInput if it is none of this version."""
    try:
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is no checkpoint of a training: {one_line(error)}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise BadInput(f"{path} is of another version of edgeprune; resume with that one")
    return about


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint in ``folder`` whose files are whole, or None."""
    return next((path for path in reversed(all_of(folder)) if _is_whole(path)), None)


def _is_whole(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        describe(path)
        with safe_open(path / TENSORS, framework="pt"):
            return True
    except (SafetensorError, OSError, BadInput):
        return False


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights in a checkpoint, by their names in the model."""
    from safetensors import safe_open

    with safe_open(path / TENSORS, framework="pt") as file:
        names = [n for n in file.keys() if n.startswith("weight.")]  # noqa: SIM118 - it is no dict
        return {n.removeprefix("weight."): tuple(file.get_slice(n).get_shape()) for n in names}
