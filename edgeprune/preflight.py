"""What a run checks before it starts any work: all problems at once, with the figures."""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from edgeprune import machine, sources
from edgeprune.errors import BadInput
from edgeprune.events import Emit, Note
from edgeprune.inspection import inspect
from edgeprune.quantities import format_bytes
from edgeprune.recipe import Recipe
from edgeprune.texts import read_texts

WEIGHT_BYTES = 4
"""Bytes of a weight while a model is worked on: float32, the widest case."""
ROOM = 200_000_000
"""Bytes of disk for tokenizers, logs, graphs and other small things."""


def check_source(recipe: Recipe, folder: Path, emit: Emit) -> dict[str, Any]:
    """Fetch the recipe's model and check that the run can be done on this machine.

    Returns where the model is (``source``) and its shape (``inspection``).

    Raises:
        BadInput: with every problem, one a line.
    """
    wanted = recipe.source
    source = sources.resolve(
        wanted.model,
        revision=wanted.revision,
        trust_remote_code=wanted.trust_remote_code,
        emit=emit,
    )
    shape = inspect(source)
    problems = [
        *_disk_problems(shape["parameters"], recipe.recover is not None, folder),
        *_length_problems(recipe, shape["max_position_embeddings"]),
        *_text_problems(recipe),
        *_data_problems(recipe),
    ]
    if problems:
        raise BadInput("\n".join(problems))
    _note_memory(shape["parameters"], emit)
    return {"source": {**asdict(source), "path": str(source.path)}, "inspection": shape}


def _disk_problems(parameters: int, recovers: bool, folder: Path) -> list[str]:
    # The pruned checkpoint and both exports, none larger than the model in float32. Training: the models of two
    # stages before and after it, and three checkpoints (one unfinished) of weights and two moments.
    copies = 3 + (4 + 9 if recovers else 0)
    need, free = copies * parameters * WEIGHT_BYTES + ROOM, machine.disk_free(folder)
    if need <= free:
        return []
    return [
        f"{folder}: {format_bytes(free)} free, and the run may need {format_bytes(need)}; "
        "free some space or name another disk with -o DIR"
    ]


def _note_memory(parameters: int, emit: Emit) -> None:
    need, memory = parameters * WEIGHT_BYTES, machine.memory()
    if need > memory.available:
        text = (
            f"the model takes {format_bytes(need)} of memory in float32 and {format_bytes(memory.available)} are free: "
            "it is worked on one decoder layer at a time"
        )
        emit(Note(text=text))


def _length_problems(recipe: Recipe, longest: int | None) -> list[str]:
    lengths = {
        "prune.length": recipe.prune.length,
        "evaluate.window": recipe.evaluate.window,
        "profile.prompt + profile.generate": recipe.profile.prompt + recipe.profile.generate,
    }
    if recipe.recover is not None:
        lengths["recover.length"] = recipe.recover.length
    return [
        f"{name}: {length} tokens, and the model takes at most {longest}; ask for less"
        for name, length in lengths.items()
        if longest is not None and length > longest
    ]


def _text_problems(recipe: Recipe) -> list[str]:
    problems = []
    for spec in dict.fromkeys((recipe.prune.calibration, recipe.evaluate.text)):
        try:
            if not list(islice(read_texts(spec), 1)):
                problems.append(f"{spec}: no text in it; name another file or data set")
        except BadInput as error:
            problems.append(str(error))
    return problems


def _data_problems(recipe: Recipe) -> list[str]:
    from edgeprune.recovery.mixture import parse_sources

    try:
        parse_sources(recipe.recover.data if recipe.recover else ["builtin"])
    except BadInput as error:
        return [f"recover.data: {error}"]
    return []
