"""The pruned model: its config and its weights, cut from the dense ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from edgeprune import mapped
from edgeprune.groups import Kept, LayerGroups, cut, pruned_config
from edgeprune.layers import skeleton, whole
from edgeprune.nonuniform import class_for
from edgeprune.scratch import Scratch


def settings(dense: Any, kept: list[Kept]) -> Any:
    """Return the pruned model's config, in the type that the source is stored in."""
    config = pruned_config(dense.config, kept)
    config.dtype = dense.dtype
    return config


def parts(
    dense: Any,
    groups: list[LayerGroups],
    kept: list[Kept],
    repaired: Scratch | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yield the pruned model's parameters, in the source's type: those around the decoder layers, then layer by layer.

    What ``repaired`` holds stands in for the dense model's.
    """
    mapped.trim()
    layers = "model.layers."
    norm = repaired.norm() if repaired else {}
    for name, parameter in dense.named_parameters():
        if not name.startswith(layers):
            yield {name: norm.get(name, parameter.detach())}
            mapped.release(parameter)
    config = pruned_config(dense.config, kept)
    for i, layer in enumerate(dense.model.layers):
        wanted = skeleton(layer, config, i, dense.config._attn_implementation)
        weights = cut(whole(layer), groups[i], kept[i]) | (repaired.fixed(i) if repaired else {})
        yield {
            f"{layers}{i}.{name}": weights[name].contiguous()
            for name, _ in wanted.named_parameters()
        }
        mapped.release(layer)
        mapped.trim()


def cut_model(dense: Any, groups: list[LayerGroups], kept: list[Kept]) -> Any:
    """Return the pruned model as an ordinary transformers model, in the source's type and without repair.

    What is whole shares its memory with ``dense``.
    """
    config = settings(dense, kept)
    config._attn_implementation = dense.config._attn_implementation
    with torch.device("meta"):
        pruned = class_for(config.model_type)(config)
    weights = {name: w for part in parts(dense, groups, kept) for name, w in part.items()}
    pruned.load_state_dict(weights, strict=False, assign=True)
    pruned.tie_weights()
    # buffers that are no weights (rotary frequencies) are not in the state; take the dense model's
    buffers = dict(dense.named_buffers())
    for name, buffer in list(pruned.named_buffers()):
        if buffer.is_meta:
            owner, _, own = name.rpartition(".")
            setattr(pruned.get_submodule(owner), own, buffers[name].clone())
    pruned.generation_config = dense.generation_config
    return pruned.eval()
