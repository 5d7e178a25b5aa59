"""Causal language models whose decoder layers differ in width.

transformers has the schema (``per_layer_config`` in config.json) but its model code still builds every decoder
layer alike. The classes here build each layer from its own entry of that schema; everything else is the stock
model. This file is saved inside every pruned checkpoint and needs only torch and transformers, so that
``AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)`` works where edgeprune is not installed.

Entries of ``per_layer_config[i]``: ``num_attention_heads``, ``num_key_value_heads``, ``intermediate_size``, and
``skip``, a list with ``"attention"`` and/or ``"mlp"`` for a layer that has lost the whole of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

CAUSAL_LM = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
}

# The norms that serve one half of a layer only, and go with it. What is not listed norms before the other half.
ATTENTION_NORMS = {
    "gemma3_text": ("input_layernorm", "post_attention_layernorm"),
    "olmo2": ("post_attention_layernorm",),
}
MLP_NORMS = {
    "gemma3_text": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("post_feedforward_layernorm",),
}


class LayerWidths(NamedTuple):
    """Widths of one decoder layer; zeros for a half that was removed."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int


def layer_widths(config: Any) -> list[LayerWidths]:
    """Return the widths of every decoder layer of a dense or a non-uniform config."""
    return [widths_of(config.per_layer_config[i]) for i in range(config.num_hidden_layers)]


def widths_of(layer_config: Any) -> LayerWidths:
    """Return the widths of the decoder layer that this layer config describes."""
    skip = getattr(layer_config, "skip", None) or []
    heads = layer_config.num_attention_heads
    kv_heads = getattr(layer_config, "num_key_value_heads", None) or heads
    if "attention" in skip:
        heads = kv_heads = 0
    return LayerWidths(heads, kv_heads, 0 if "mlp" in skip else layer_config.intermediate_size)


class NoAttention(nn.Module):
    """Stands where a layer's attention was removed: adds nothing to the residual stream.

    It still hands the cache one KV head of zeros, because transformers reads the length of the past from single
    layers of the cache.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx

    def forward(
        self,
        hidden_states: torch.Tensor,
        *_args: Any,
        past_key_values: Any = None,
        **_kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Return zeros in the shape of ``hidden_states`` (batch, length, hidden size)."""
        if past_key_values is not None:
            batch, length, _ = hidden_states.shape
            nothing = hidden_states.new_zeros(batch, 1, length, self.config.head_dim)
            past_key_values.update(nothing, nothing, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class NoMLP(nn.Module):
    """Stands where a layer's MLP was removed: adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return zeros in the shape of ``hidden_states``."""
        return torch.zeros_like(hidden_states)


def build_layer(layer_class: type[nn.Module], layer_config: Any, layer_idx: int) -> nn.Module:
    """Build one decoder layer from its own config, without the halves that ``skip`` names."""
    layer = layer_class(layer_config, layer_idx)
    family = layer_config.model_type
    skip = getattr(layer_config, "skip", None) or []
    gone: tuple[str, ...] = ()
    if "attention" in skip:
        layer.self_attn = NoAttention(layer_config, layer_idx)
        gone += ATTENTION_NORMS.get(family, ("input_layernorm",))
    if "mlp" in skip:
        layer.mlp = NoMLP()
        gone += MLP_NORMS.get(family, ("post_attention_layernorm",))
    for name in gone:
        setattr(layer, name, nn.Identity())
    return layer


class NonUniform:
    """Mixed in before a stock ``...ForCausalLM``: rebuilds its decoder layers from ``per_layer_config``."""

    # makes save_pretrained put this file and the matching ``auto_map`` into the checkpoint
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        layers = self.model.layers  # type: ignore[attr-defined]
        for i, dense in enumerate(layers):
            layers[i] = build_layer(type(dense), config.per_layer_config[i], i)
        self.post_init()  # type: ignore[attr-defined]

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Change the attention implementation, in the layers' own configs too."""
        super().set_attn_implementation(*args, **kwargs)  # type: ignore[misc]
        for layer in self.model.layers:  # type: ignore[attr-defined]
            layer.self_attn.config._attn_implementation = self.config._attn_implementation  # type: ignore[attr-defined]


def _class(base_name: str) -> type:
    base = getattr(transformers, base_name)
    return type(f"NonUniform{base_name}", (NonUniform, base), {"__module__": __name__})


def __getattr__(name: str) -> type:
    # the classes are made when first asked for: a transformers without one of the families must not break the rest
    base_name = name.removeprefix("NonUniform")
    if base_name == name or base_name not in CAUSAL_LM.values():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = globals()[name] = _class(base_name)
    return made


def class_for(model_type: str) -> Any:
    """Return the non-uniform class for a config's ``model_type``; KeyError if there is none."""
    name = f"NonUniform{CAUSAL_LM[model_type]}"
    return globals().get(name) or __getattr__(name)
