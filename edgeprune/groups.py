"""What is kept of each decoder layer, and the cutting of its parameters to that.

Groups are numbered as in the dense model for the whole run, so a run's state is a few lists of numbers and the
pruned weights are always cut from the source weights, never from rounded copies.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgeprune.families import Family, Half, Part, family_of, head_dim
from edgeprune.nonuniform import widths_of

HALVES: tuple[Half, Half] = ("attention", "mlp")


@dataclass
class Kept:
    """Ascending numbers of the KV groups and FFN channels that a layer keeps (int64, on the CPU)."""

    attention: Tensor
    mlp: Tensor

    def of(self, half: Half) -> Tensor:
        """Return the kept groups of one half."""
        return self.attention if half == "attention" else self.mlp

    def to_json(self) -> dict[str, list[int]]:
        """Return plain lists, for a run's state file."""
        return {half: self.of(half).tolist() for half in HALVES}

    @staticmethod
    def from_json(lists: Mapping[str, list[int]]) -> Kept:
        """Read what ``to_json`` gave."""
        return Kept(*(torch.tensor(lists[half], dtype=torch.int64) for half in HALVES))


@dataclass(frozen=True)
class LayerGroups:
    """The groups of one dense decoder layer: where they lie, how many, and what each costs in parameters."""

    parts: Mapping[Half, list[Part]]
    count: Mapping[Half, int]
    cost: Mapping[Half, int]
    # a half that adds a bias of its own to the residual stream cannot vanish without changing the function
    removable: Mapping[Half, bool]
    parameters: int

    @property
    def prunable(self) -> int:
        """Parameters in all groups of the layer."""
        return sum(self.count[half] * self.cost[half] for half in HALVES)

    def everything(self) -> Kept:
        """Keep all groups."""
        return Kept(*(torch.arange(self.count[half]) for half in HALVES))

    def removed_parameters(self, kept: Kept) -> int:
        """Parameters of the groups that are not kept."""
        return sum((self.count[h] - len(kept.of(h))) * self.cost[h] for h in HALVES)


def layer_groups(family: Family, shapes: Mapping[str, tuple[int, ...]], config: Any) -> LayerGroups:
    """Describe a dense layer with parameters of these shapes; ``config`` is that layer's config."""
    output_bias = {"attention": "self_attn.o_proj.bias", "mlp": "mlp.down_proj.bias"}
    widths = widths_of(config)
    count: dict[Half, int] = {
        "attention": widths.num_key_value_heads,
        "mlp": widths.intermediate_size,
    }
    parts = {half: family.parts(half, shapes, config) if count[half] else [] for half in HALVES}
    return LayerGroups(
        parts=parts,
        count=count,
        cost={half: sum(_cost(part, shapes) for part in parts[half]) for half in HALVES},
        removable={half: output_bias[half] not in shapes for half in HALVES},
        parameters=sum(_numel(shape) for shape in shapes.values()),
    )


def describe_layers(config: Any) -> list[LayerGroups]:
    """Return the groups of every decoder layer of a dense or a pruned model, from its config alone."""
    from edgeprune.sources import build_on_meta

    family = family_of(config)
    layers = build_on_meta(config).model.layers
    return [
        layer_groups(
            family,
            {name: tuple(p.shape) for name, p in layer.named_parameters()},
            config.per_layer_config[i],
        )
        for i, layer in enumerate(layers)
    ]


def _numel(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _cost(part: Part, shapes: Mapping[str, tuple[int, ...]]) -> int:
    shape = shapes[part.parameter]
    return part.width * _numel(shape) // shape[part.dim]


def part_index(parts: list[Part], kept: Tensor) -> dict[tuple[str, int], Tensor]:
    """Rows or columns to keep, ascending, for every (parameter, dim) that the parts touch."""
    index: dict[tuple[str, int], list[Tensor]] = {}
    for part in sorted(parts, key=lambda p: p.offset):
        rows = part.offset + kept[:, None] * part.width + torch.arange(part.width)
        index.setdefault((part.parameter, part.dim), []).append(rows.flatten())
    return {key: torch.cat(rows) for key, rows in index.items()}


def cut(weights: Mapping[str, Tensor], groups: LayerGroups, kept: Kept) -> dict[str, Tensor]:
    """Return a layer's parameters, or some of them, cut to the kept groups; what is whole is not copied."""
    result = dict(weights)
    for half in HALVES:
        if len(kept.of(half)) == groups.count[half]:
            continue
        for (name, dim), index in part_index(groups.parts[half], kept.of(half)).items():
            if name in result:
                result[name] = result[name].index_select(dim, index.to(result[name].device))
    return result


def sum_by_group(
    scores: Mapping[str, Tensor], parts: list[Part], offsets_of: int, kept: int
) -> Tensor:
    """Add up elementwise scores of a *cut* layer over each kept group.

    Args:
        scores: for each parameter a tensor of its shape, float32.
        parts: the dense layer's parts of one half.
        offsets_of: groups of that half in the dense layer, which the parts' offsets count.
        kept: groups that the cut layer still has.

    Returns:
        float32 tensor of ``kept`` sums.
    """
    total = torch.zeros(kept)
    for part in parts:
        by_row = scores[part.parameter]
        if by_row.dim() == 2:
            by_row = by_row.sum(1 - part.dim)
        start = part.offset // offsets_of * kept if part.offset else 0
        rows = by_row[start : start + kept * part.width]
        total += rows.reshape(kept, part.width).sum(1).cpu()
    return total


def layer_entry(layer_config: Any, kept: Kept) -> dict[str, Any]:
    """Return the ``per_layer_config`` entry of a layer that keeps these groups."""
    kv_heads, channels = len(kept.attention), len(kept.mlp)
    dense = widths_of(layer_config)
    # a removed attention is written as one KV head that is skipped: see nonuniform.NoAttention
    queries = dense.num_attention_heads // dense.num_key_value_heads if kv_heads else 1
    entry: dict[str, Any] = {
        "num_attention_heads": queries * max(kv_heads, 1),
        "num_key_value_heads": max(kv_heads, 1),
        "intermediate_size": channels or layer_config.intermediate_size,
    }
    skip = [half for half in HALVES if len(kept.of(half)) == 0]
    return entry | ({"skip": skip} if skip else {})


def pruned_config(config: Any, kept: list[Kept]) -> Any:
    """Return a copy of ``config`` whose ``per_layer_config`` describes what is kept of each layer."""
    result = copy.deepcopy(config)
    result.head_dim = head_dim(config)
    result.allow_global_per_layer_attribute_access = True
    result.per_layer_config = {
        i: layer_entry(config.per_layer_config[i], k) for i, k in enumerate(kept)
    }
    return result
