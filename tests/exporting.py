"""Tiny pruned models, and building them, for the tests of the exporter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import PreTrainedModel

from edgeprune.exporters import builder
from edgeprune.exporters.storage import STORAGE
from edgeprune.nonuniform import class_for

# One layer without attention, one narrow with a width that is no multiple of 32, one without MLP.
PRUNED: dict[int, dict[str, Any]] = {
    0: {"skip": ["attention"], "num_key_value_heads": 1, "intermediate_size": 96},
    1: {"num_key_value_heads": 1, "intermediate_size": 40},
    2: {"skip": ["mlp"]},
}


def pruned(family: str, layers: dict[int, dict[str, Any]], **overrides: Any) -> PreTrainedModel:
    """Return a tiny non-uniform model; query heads follow from ``num_key_value_heads``."""
    dense = tiny.config(family, **overrides)
    group = dense.num_attention_heads // dense.num_key_value_heads
    per_layer = {}
    for i, widths in layers.items():
        per_layer[i] = dict(widths)
        if "num_key_value_heads" in widths and "attention" not in widths.get("skip", []):
            per_layer[i]["num_attention_heads"] = group * widths["num_key_value_heads"]
    values = dense.to_dict()
    values["per_layer_config"] = per_layer
    values["allow_global_per_layer_attribute_access"] = True
    config = type(dense).from_dict(values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = class_for(config.model_type)(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                elif "embed" in name or "lm_head" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def build(model: PreTrainedModel, folder: Path, precision: str) -> Path:
    """Build the graph of a model, with the files that the runtime needs beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    builder.build(model, tokenizer, folder, STORAGE[precision], lambda _layer: None)
    return folder


def save(model: PreTrainedModel, folder: Path) -> Path:
    """Write a model and the tiny tokenizer as a checkpoint."""
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder
