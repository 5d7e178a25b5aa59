"""How much each decoder layer gives up, so that the whole meets its target exactly.

Two steps. ``layer_targets`` is Adapt-Pruner's rule (equation 6) with the shortfall that clipping leaves handed to
the other layers. ``choose`` turns it into groups: within a layer those with the least importance per parameter
go first, be they KV groups or FFN channels; at the end widths are rounded and the remainder is spent or saved
where it costs least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeprune.errors import BadInput
from edgeprune.families import Half
from edgeprune.groups import HALVES, Kept, LayerGroups


@dataclass(frozen=True)
class Limits:
    """The most that may be removed of a layer: groups that must stay, per half."""

    attention: int
    mlp: int

    def of(self, half: Half) -> int:
        """Groups of this half that must stay."""
        return self.attention if half == "attention" else self.mlp


def limits(groups: LayerGroups, width_multiple: int, skipped: bool) -> Limits:
    """Return what must stay: at least one multiple of FFN channels; everything in a layer to leave alone."""
    channels, kv_groups = groups.count["mlp"], groups.count["attention"]
    if skipped:
        return Limits(kv_groups, channels)
    return Limits(
        0 if groups.removable["attention"] else min(1, kv_groups), min(width_multiple, channels)
    )


def removable_parameters(groups: LayerGroups, limit: Limits) -> int:
    """Parameters of a layer that may go."""
    return sum((groups.count[h] - limit.of(h)) * groups.cost[h] for h in HALVES)


def layer_targets(
    planned: Sequence[float],
    prunable: Sequence[int],
    most: Sequence[int],
    importance: Sequence[float],
    amplitude: float,
    total: float,
) -> list[float]:
    """Parameters that each layer should have lost after this iteration; they add up to ``total``.

    Solves ``sum_i clip(planned_i + (base - amplitude * importance_i) * prunable_i, planned_i, most_i) = total`` for
    ``base``: equation 6 with the base sparsity adjusted for what the clip takes from single layers.

    Args:
        planned: what this gave in the iteration before (zeros at first). What has really gone differs from it
            by less than a group.
        prunable: parameters in all groups of each layer.
        most: parameters that each layer may lose.
        importance: normalised layer importance, in [-1, 1].
        amplitude: A of equation 6, as a share of a layer per iteration.
        total: parameters that all layers together should have lost, at most ``sum(most)``.
    """

    def at(base: float) -> list[float]:
        return [
            min(max(r + (base - amplitude * imp) * p, r), max(m, r))
            for r, p, m, imp in zip(planned, prunable, most, importance, strict=True)
        ]

    low, high = -abs(amplitude) - 1.0, abs(amplitude) + 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) < total else (low, middle)
    return at(high)


@dataclass
class LayerChoice:
    """The groups of one layer in the order in which they would go, and where the cut is.

    ``order[half]`` are positions within the kept groups, least important first; ``gone[half]`` of them go.
    ``sums[half][n]`` is the importance of the first ``n`` of them together.
    """

    groups: LayerGroups
    limit: Limits
    kept: Kept
    order: dict[Half, Tensor]
    sums: dict[Half, list[float]]
    gone: dict[Half, int]

    @staticmethod
    def of(
        groups: LayerGroups, limit: Limits, kept: Kept, scores: dict[Half, Tensor]
    ) -> LayerChoice:
        """Start with nothing gone."""
        order = {half: torch.argsort(scores[half], stable=True) for half in HALVES}
        sums = {
            half: [0.0, *scores[half][order[half]].double().cumsum(0).tolist()] for half in HALVES
        }
        return LayerChoice(groups, limit, kept, order, sums, dict.fromkeys(HALVES, 0))

    def may_go(self, half: Half) -> int:
        """How many more groups of this half may go."""
        return len(self.kept.of(half)) - self.gone[half] - self.limit.of(half)

    def removed(self) -> int:
        """Parameters gone since the dense layer, the present choice included."""
        before = self.groups.removed_parameters(self.kept)
        return before + sum(self.gone[h] * self.groups.cost[h] for h in HALVES)

    def next_score(self, half: Half, number: int = 1) -> float:
        """Importance per parameter of the next ``number`` groups to go."""
        return self._score(half, self.gone[half], self.gone[half] + number)

    def last_score(self, half: Half, number: int) -> float:
        """Importance per parameter of the last ``number`` groups that went."""
        return self._score(half, self.gone[half] - number, self.gone[half])

    def _score(self, half: Half, start: int, end: int) -> float:
        sums = self.sums[half]
        return (sums[end] - sums[start]) / ((end - start) * self.groups.cost[half])

    def spend(self, target: float) -> None:
        """Let groups go, least important per parameter first, until the layer is as near to ``target`` as it gets."""
        while True:
            halves = [half for half in HALVES if self.may_go(half) > 0]
            if not halves:
                return
            half = min(halves, key=self.next_score)
            if self.removed() + self.groups.cost[half] / 2 > target:
                return
            self.gone[half] += 1

    def result(self) -> Kept:
        """Return what is kept after the choice."""
        kept = {}
        for half in HALVES:
            stays = self.order[half][self.gone[half] :].sort().values
            kept[half] = self.kept.of(half)[stays]
        return Kept(kept["attention"], kept["mlp"])


def round_width(choice: LayerChoice, multiple: int) -> None:
    """Round a layer's FFN width to the nearest multiple that it still has; an untouched dense width stays."""
    have, dense = len(choice.kept.mlp), choice.groups.count["mlp"]
    width = have - choice.gone["mlp"]
    nearest = round(width / multiple) * multiple
    if nearest > have // multiple * multiple:
        # a dense width need not be a multiple: it stays, or goes down to the next one
        nearest = have if have == dense else have // multiple * multiple
    choice.gone["mlp"] = have - max(nearest, min(choice.limit.mlp, have))


def trim(choices: list[LayerChoice], multiple: int, total: int) -> None:
    """Bring all layers together to ``total`` removed parameters: never less, and as little more as steps allow.

    Steps are one KV group or one multiple of FFN channels. What must still go goes where importance per parameter
    is least; what was taken too much is given back where it is greatest.
    """

    def excess() -> int:
        return sum(choice.removed() for choice in choices) - total

    while excess() < 0:
        steps = [
            (choice.next_score(half, size), n, half, size)
            for n, choice in enumerate(choices)
            for half in HALVES
            if (size := _step(choice, half, multiple)) and choice.may_go(half) >= size
        ]
        if not steps:
            raise BadInput("the target needs more than can be removed")
        _, n, half, size = min(steps)
        choices[n].gone[half] += size
    while True:
        room = excess()
        steps = [
            (-choice.last_score(half, size), n, half, size)
            for n, choice in enumerate(choices)
            for half in HALVES
            if (size := _step_back(choice, half, multiple))
            and size * choice.groups.cost[half] <= room
        ]
        if not steps:
            return
        _, n, half, size = min(steps)
        choices[n].gone[half] -= size


def _step(choice: LayerChoice, half: Half, multiple: int) -> int:
    """Groups to remove at once: one KV group, or down to the next lower multiple of channels."""
    if half == "attention":
        return 1
    width = len(choice.kept.mlp) - choice.gone["mlp"]
    return width % multiple or min(multiple, width)


def _step_back(choice: LayerChoice, half: Half, multiple: int) -> int:
    """Groups to give back at once: one KV group, or channels up to the next multiple or the dense width."""
    gone = choice.gone[half]
    return min(gone, 1 if half == "attention" else multiple)


def choose(
    choices: list[LayerChoice], targets: Sequence[float], multiple: int, total: int | None = None
) -> list[Kept]:
    """Choose the groups that stay.

    Args:
        choices: one a layer, nothing gone yet.
        targets: parameters that each layer should have lost (``layer_targets``); met to the nearest step.
        multiple: FFN widths are rounded to it.
        total: parameters that all layers together must have lost (the last iteration); None leaves it
            at what the rounding gives.
    """
    for choice, target in zip(choices, targets, strict=True):
        choice.spend(target)
        round_width(choice, multiple)
    if total is not None:
        trim(choices, multiple, total)
    return [choice.result() for choice in choices]
