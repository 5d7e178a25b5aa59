"""What the user wants the model to become: a share of it, a number of parameters, or a file size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from edgeprune.errors import BadInput
from edgeprune.groups import Kept, LayerGroups, describe_layers, pruned_config
from edgeprune.quantities import format_bytes, format_count

# A file size follows from the widths; this often the cut is corrected until it fits.
MOST_CORRECTIONS = 40
# How far below its target a result may end, as a share of the dense decoder parameters.
TOLERANCE = 0.003


@dataclass(frozen=True)
class Target:
    """A goal and the decoder parameters to remove for it. ``bytes_limit`` is set for a file size."""

    kind: Literal["sparsity", "params", "memory"]
    value: float
    removed: int
    bytes_limit: int | None = None
    precision: str | None = None

    @staticmethod
    def of(
        config: Any,
        sparsity: float | None,
        params: int | None,
        memory: int | None,
        precision: str,
    ) -> Target:
        """Make the target from the one of the three that is given; BadInput if it is none or several."""
        given = {"sparsity": sparsity, "params": params, "memory": memory}
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise BadInput(
                "say how small the model must become with exactly one of --sparsity, --params and --memory"
            )
        if sparsity is not None:
            return _by_sparsity(config, sparsity)
        if params is not None:
            return _by_parameters(config, params)
        assert memory is not None
        return _by_memory(config, memory, precision)

    def to_json(self) -> dict[str, Any]:
        """Return what the user asked for."""
        asked: dict[str, Any] = {self.kind: self.value}
        return asked | ({"precision": self.precision} if self.precision else {})

    def check(self, config: Any, groups: list[LayerGroups], most: list[int]) -> None:
        """Raise BadInput if the layers cannot give up that much."""
        if self.removed <= sum(most):
            return
        whole = sum(g.parameters for g in groups)
        least = _parameters(config) - sum(most)
        raise BadInput(
            f"the target is too small: at most {sum(most) / whole:.1%} of the decoder-layer parameters can go "
            f"(down to {format_count(least)} parameters in all); ask for less, leave fewer layers alone, or lower "
            f"the width multiple"
        )

    def settle(self, config: Any, choose: Callable[[int], list[Kept]]) -> list[Kept]:
        """Return the final choice: ``choose(removed)`` itself, or for a file size the largest that fits."""
        if self.bytes_limit is None:
            return choose(self.removed)
        return _settle_bytes(config, choose, self.removed, self.bytes_limit, self.precision or "")


def _parameters(config: Any) -> int:
    from edgeprune.inspection import describe

    return int(describe(config)["parameters"])


def _decoder_parameters(config: Any) -> int:
    from edgeprune.inspection import describe

    return int(describe(config)["decoder_parameters"])


def _by_sparsity(config: Any, sparsity: float) -> Target:
    if not (math.isfinite(sparsity) and 0 < sparsity < 1):
        raise BadInput(
            f"the sparsity is {sparsity}; it is the share of decoder-layer parameters to remove, "
            "above 0 and below 1 (or 100%)"
        )
    removed = math.ceil(sparsity * _decoder_parameters(config))
    return Target("sparsity", sparsity, removed)


def _by_parameters(config: Any, params: int) -> Target:
    whole, decoder = _parameters(config), _decoder_parameters(config)
    if params >= whole:
        raise BadInput(f"the model has {format_count(whole)} parameters; ask for fewer than that")
    if params <= whole - decoder:
        raise BadInput(
            f"{format_count(max(params, 0))} parameters: the embeddings and the head alone have "
            f"{format_count(whole - decoder)}; ask for more"
        )
    return Target("params", params, whole - params)


def _by_memory(config: Any, memory: int, precision: str) -> Target:
    from edgeprune.exporters.sizes import file_bytes

    whole = file_bytes(config, precision)
    if memory >= whole:
        raise BadInput(
            f"the {precision} export of the dense model is {format_bytes(whole)}; ask for less than that"
        )
    per_parameter = _bytes_per_parameter(config, precision)
    removed = math.ceil((whole - memory) / per_parameter)
    decoder = _decoder_parameters(config)
    if removed >= decoder:
        rest = whole - decoder * per_parameter
        raise BadInput(
            f"{format_bytes(memory)} at {precision}: the embeddings and the head alone need about "
            f"{format_bytes(rest)}; ask for more, or for a smaller precision"
        )
    return Target("memory", memory, removed, bytes_limit=memory, precision=precision)


def _bytes_per_parameter(config: Any, precision: str) -> float:
    """Bytes that a decoder parameter takes in the export, from the dense model and one with half of every FFN."""
    import torch

    from edgeprune.exporters.sizes import file_bytes

    groups = describe_layers(config)
    halved = [
        Kept(torch.arange(g.count["attention"]), torch.arange(max(1, g.count["mlp"] // 2)))
        for g in groups
    ]
    lost = sum(g.removed_parameters(k) for g, k in zip(groups, halved, strict=True))
    smaller = file_bytes(pruned_config(config, halved), precision)
    return (file_bytes(config, precision) - smaller) / lost


def _settle_bytes(
    config: Any,
    choose: Callable[[int], list[Kept]],
    removed: int,
    limit: int,
    precision: str,
) -> list[Kept]:
    """Find, in steps from the estimate, the least cut whose export fits."""
    from edgeprune.exporters.sizes import file_bytes

    def fits(kept: list[Kept]) -> bool:
        return file_bytes(pruned_config(config, kept), precision) <= limit

    step = max(1, int(TOLERANCE * _decoder_parameters(config) / 4))
    best = choose(removed)
    if fits(best):
        return _with_less_removed(choose, fits, best, removed, step)
    for n in range(1, MOST_CORRECTIONS):
        best = choose(removed + n * step)
        if fits(best):
            return best
    raise BadInput(f"no cut was found whose export is at most {format_bytes(limit)}; ask for more")


def _with_less_removed(
    choose: Callable[[int], list[Kept]],
    fits: Callable[[list[Kept]], bool],
    best: list[Kept],
    removed: int,
    step: int,
) -> list[Kept]:
    for n in range(1, MOST_CORRECTIONS):
        more = choose(removed - n * step)
        if not fits(more):
            break
        best = more
    return best
