"""How pruning and training alternate: what is left after each stage, and how much of the training it gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgeprune.errors import BadInput

Spacing = Literal["geometric", "linear"]


@dataclass(frozen=True)
class Stage:
    """Prune until ``removed`` of the dense model's decoder parameters are gone, then train up to update ``until``."""

    removed: int
    until: int


def plan(
    decoder: int, removed: int, steps: int, interleavings: int, spacing: Spacing = "geometric"
) -> list[Stage]:
    """Divide a cut and its training among stages (Adapt-Accel, arXiv 2502.03460).

    Geometric stages each remove the same share of what is left, linear ones the same number of parameters. Stage i of
    N gets 2i / (N (N + 1)) of the updates: what is trained last is kept longest.

    Args:
        decoder: decoder parameters of the dense model.
        removed: how many of them go in all.
        steps: updates in all.
        interleavings: N, how many stages.
        spacing: of the targets.

    Raises:
        BadInput: there are fewer updates than stages, or no stage at all.
    """
    if interleavings < 1:
        raise BadInput(f"interleavings is {interleavings}; it must be at least 1")
    if steps < interleavings:
        raise BadInput(
            f"{steps} updates cannot be shared by {interleavings} interleavings; train on more tokens, with a smaller "
            "batch, or interleave less"
        )
    left = 1 - removed / decoder
    stages = []
    for i in range(1, interleavings + 1):
        share = i / interleavings
        gone = decoder * (1 - left**share) if spacing == "geometric" else removed * share
        trained = i * (i + 1) / (interleavings * (interleavings + 1))
        stages.append(Stage(round(gone), round(steps * trained)))
    return [*stages[:-1], Stage(removed, steps)]
