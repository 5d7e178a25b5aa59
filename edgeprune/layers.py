"""The decoder layers of a pruning run: dense weights cut to what is kept, ready to run as blocks.

One at a time is made, from dense weights in memory or in their files (``mapped``). Which of the two changes nothing in
the figures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgeprune import mapped
from edgeprune.blocks import Block
from edgeprune.groups import HALVES, Kept, LayerGroups, cut, pruned_config
from edgeprune.nonuniform import build_layer


class CutLayers:
    """Decoder layers cut to what is kept, in the type to compute in; made anew whenever another one is asked for.

    Args:
        dense: the dense model; mapped or in memory. Pages of mapped weights are given back.
        groups: its groups, one a layer.
        kept: what each layer keeps.
        dtype: the type to compute in.
        device: the device to compute on.
    """

    def __init__(
        self,
        dense: Any,
        groups: list[LayerGroups],
        kept: list[Kept],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._dense, self._groups = dense, groups
        self._dtype, self._device = dtype, device
        self._last = 0
        self.cut(kept)

    def __len__(self) -> int:
        return len(self._kept)

    def cut(self, kept: list[Kept]) -> None:
        """Cut the dense weights anew."""
        self._kept = kept
        self._config = pruned_config(self._dense.config, kept)
        self._held: Block | None = None

    def block(self, index: int) -> Block:
        """Return layer ``index``."""
        if self._held is None or index != self._last:
            self._held = None  # before the next one is made
            self._read_ahead(index)
            self._held = self._cut(index)
        return self._held

    def _read_ahead(self, index: int) -> None:
        """Give the layer before back and have the one behind it read, in whichever direction the pass goes."""
        layers = self._dense.model.layers
        step = -1 if index < self._last else 1
        if index != self._last:
            mapped.release(layers[self._last])
            mapped.trim()
        if 0 <= index + step < len(layers):
            mapped.prefetch(layers[index + step])
        self._last = index

    def _cut(self, index: int) -> Block:
        layer = self._dense.model.layers[index]
        module = skeleton(layer, self._config, index, self._dense.config._attn_implementation)
        scored = {part.parameter for h in HALVES for part in self._groups[index].parts[h]}
        weights = cut(whole(layer), self._groups[index], self._kept[index])
        ready = {
            name: weights[name].to(self._device, self._dtype).requires_grad_(name in scored)
            for name, _ in module.named_parameters()
        }
        mapped.release(layer)  # what was copied is not needed; what was not is read again
        return Block(module, ready)


def whole(layer: Any) -> dict[str, Tensor]:
    """Return a decoder layer's parameters by name."""
    return {name: p.detach() for name, p in layer.named_parameters()}


def skeleton(layer: Any, config: Any, index: int, attention: str) -> Any:
    """Build layer ``index`` of a pruned ``config`` on the meta device; ``attention`` is its implementation."""
    layer_config = config.per_layer_config[index]
    layer_config._attn_implementation = attention
    with torch.device("meta"):
        return build_layer(type(layer), layer_config, index)
