"""Importance of decoder layers and of the groups in them, from one calibration pass.

Layer importance is equation 3-5 of Adapt-Pruner (arXiv 2502.03460), group importance its equation 10. The released
code has the sign of the two distances inverted and credits query head h to KV head ``h % kv_heads``; both are right
here (``h // (heads / kv_heads)`` follows from the parts in ``families``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from edgeprune.blocks import Block, Weights
from edgeprune.families import Half
from edgeprune.groups import HALVES, Kept, LayerGroups, sum_by_group

LayerMeasure = Literal["cosine", "euclidean", "manhattan"]
ElementMeasure = Literal["taylor", "magnitude", "activation"]

OUTPUT = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}


def change(before: Tensor, after: Tensor, measure: LayerMeasure) -> float:
    """Return how much a layer changes its input, summed over tokens: the more, the more important it is.

    Args:
        before: the layer's input, (batch, length, hidden size).
        after: its output, same shape.
        measure: ``cosine`` gives -cos (equation 3), the others the distance itself.
    """
    before, after = before.float(), after.float()
    if measure == "cosine":
        return -float(cosine_similarity(before, after, dim=-1).cpu().sum(dtype=torch.float64))
    norm = 2 if measure == "euclidean" else 1
    return float((after - before).norm(p=norm, dim=-1).cpu().sum(dtype=torch.float64))


def normalised(importance: list[float]) -> list[float]:
    """Subtract the mean and divide by the largest magnitude, so that all lie in [-1, 1] (equations 4-5)."""
    mean = sum(importance) / len(importance)
    centred = [x - mean for x in importance]
    largest = max(abs(x) for x in centred)
    return [x / largest for x in centred] if largest else centred


def ranked(importance: list[float]) -> list[float]:
    """Replace each by its rank, from -1 to 1: one outlier cannot use up the amplitude as it does in equation 5."""
    order = sorted(range(len(importance)), key=importance.__getitem__)
    result = [0.0] * len(importance)
    for rank, i in enumerate(order):
        result[i] = 2 * rank / max(1, len(importance) - 1) - (len(importance) > 1)
    return result


@dataclass
class ImportanceWatcher:
    """Listens to a calibration pass and gathers layer and group importance.

    ``by_group[half][i]`` is a float32 tensor over the kept groups of layer ``i``.
    """

    groups: list[LayerGroups]
    kept: list[Kept]
    layer_measure: LayerMeasure = "cosine"
    element_measure: ElementMeasure = "taylor"
    by_layer: list[float] = field(default_factory=list)
    by_group: dict[Half, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.by_layer = [0.0] * len(self.groups)
        self.by_group = {half: [torch.empty(0)] * len(self.groups) for half in HALVES}
        self._inputs: list[dict[Half, Tensor]] = [{} for _ in self.groups]

    def boundary(self, index: int, before: Tensor, after: Tensor) -> None:
        """Add one micro batch to the layer's importance."""
        self.by_layer[index] += change(before, after, self.layer_measure)

    @contextmanager
    def listening(self, index: int, block: Block) -> Iterator[None]:
        """Hear the inputs of the layer's output projections; only the ``activation`` measure needs them."""
        hooks = []
        if self.element_measure == "activation":
            for half in HALVES:
                if len(self.kept[index].of(half)):
                    projection = block.module.get_submodule(OUTPUT[half])
                    hooks.append(projection.register_forward_pre_hook(self._hearer(index, half)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hearer(self, index: int, half: Half) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hear(_module: Any, inputs: tuple[Tensor, ...]) -> None:
            size = inputs[0].detach().float().abs().flatten(0, -2).sum(0)
            heard = self._inputs[index]
            heard[half] = heard[half] + size if half in heard else size

        return hear

    def gradients(self, index: int, block: Block, gradients: Weights) -> None:
        """Score the layer's groups from its finished gradients."""
        if self.element_measure == "activation":
            scores = self._activation_scores(index, block)
        else:
            scores = element_scores(block, gradients, self.element_measure)
        for half in HALVES:
            parts = self.groups[index].parts[half]
            self.by_group[half][index] = sum_by_group(
                scores,
                [part for part in parts if part.parameter in scores],
                self.groups[index].count[half],
                len(self.kept[index].of(half)),
            )

    def figures(self) -> Weights:
        """Return all that was measured so far, for ``restore``; layers are whole or not in it."""
        found = {"by_layer": torch.tensor(self.by_layer, dtype=torch.float64)}
        for half in HALVES:
            found |= {
                f"{half}.{i}": each for i, each in enumerate(self.by_group[half]) if len(each)
            }
        return found

    def restore(self, figures: Weights) -> None:
        """Go on from what ``figures`` gave."""
        self.by_layer = figures["by_layer"].tolist()
        for half in HALVES:
            for i in range(len(self.groups)):
                self.by_group[half][i] = figures.get(f"{half}.{i}", self.by_group[half][i])

    @torch.no_grad()
    def _activation_scores(self, index: int, block: Block) -> Weights:
        """Mean size of each input of the output projections times the norm of the column that reads it."""
        return {
            f"{OUTPUT[half]}.weight": (
                size * block.weights[f"{OUTPUT[half]}.weight"].float().norm(dim=0)
            )[None]
            for half, size in self._inputs[index].items()
        }


@torch.no_grad()
def element_scores(block: Block, gradients: Weights, measure: ElementMeasure) -> Weights:
    """Turn a layer's gradients into the importance of every element of its groups, in place.

    ``taylor`` is ``|w * dL/dw|`` (equation 10), ``magnitude`` is ``|w|``; float32, in the parameters' shapes.
    """
    for name, gradient in gradients.items():
        weight = block.weights[name]
        (gradient.copy_(weight) if measure == "magnitude" else gradient.mul_(weight)).abs_()
    return gradients
