"""LoRA (Hu et al., arXiv 2106.09685) through peft: low-rank additions are trained, then added to the weights.

The model's own weights stay as they are in the type that is computed in; gradients, float32 weights and moments exist
for the additions alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

ADAPTER, BASE = "default", ".base_layer"
# Scale of the addition over its rank. With it fixed, a learning rate suits all ranks.
ALPHA_OVER_RANK = 2
# LoRA's learning rate over full training's ("LoRA Without Regret", Schulman et al. 2025).
RATE = 10


def adapt(model: Any, rank: int, seed: int) -> None:
    """Freeze a model's weights and give every linear module of its layers an addition of ``rank``, at first 0."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank,
        lora_alpha=ALPHA_OVER_RANK * rank,
        target_modules="all-linear",
        lora_dropout=0.0,
    )
    with torch.random.fork_rng():  # all processes begin alike
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)


def merged(model: Any, additions: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Give all weights by the names that they had before ``adapt``; those that are added to in float32.

    ``additions`` are the trained parameters by their names in the adapted model, float32.
    """
    for name, weight in model.named_parameters():
        if f".{ADAPTER}.weight" in name:
            continue
        stem, base, kind = name.rpartition(BASE)
        whole = weight.detach()
        if base and kind == ".weight":
            a, b = (additions[f"{stem}.lora_{each}.{ADAPTER}.weight"].detach() for each in "AB")
            whole = (b @ a).mul_(ALPHA_OVER_RANK).add_(whole)
        yield stem + kind, whole


def parameters(model: Any, rank: int) -> int:
    """Return how many parameters the additions to a model (perhaps on the meta device) have."""
    linear = (m for m in model.model.modules() if isinstance(m, nn.Linear))
    return sum(rank * (m.in_features + m.out_features) for m in linear)
