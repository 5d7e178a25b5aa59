"""The model families that can be pruned: which rows and columns of a decoder layer belong together.

A *group* is the least that can be removed: one KV head with its own query heads, or one FFN channel. A ``Part`` says
where the groups of a layer lie in one of its parameters; importance, pruning and counting all read the same parts,
so that a family is described in one place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edgeprune.errors import BadInput

Half = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Part:
    """Group ``g`` owns the rows (``dim`` 0) or columns (``dim`` 1) ``offset + g*width .. offset + (g+1)*width``.

    ``parameter`` is the name inside the decoder layer, such as ``self_attn.q_proj.weight``.
    """

    parameter: str
    dim: int
    offset: int
    width: int


@dataclass(frozen=True)
class Family:
    """How one family names the parts of its decoder layer."""

    model_type: str
    title: str
    fused_qkv: bool = False
    fused_gate_up: bool = False
    # the q/k norm runs over all heads together, so its weight shrinks with them (OLMo2)
    wide_qk_norm: bool = False

    def attention_parts(self, shapes: Mapping[str, tuple[int, ...]], config: Any) -> list[Part]:
        """Parts of the attention groups of a layer with these parameter shapes and this layer config."""
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        queries = config.num_attention_heads // kv_heads * head_dim(config)
        keys = head_dim(config)
        if self.fused_qkv:
            k_offset = kv_heads * queries
            rows = [("qkv_proj", 0, queries), ("qkv_proj", k_offset, keys)]
            rows.append(("qkv_proj", k_offset + kv_heads * keys, keys))
        else:
            rows = [("q_proj", 0, queries), ("k_proj", 0, keys), ("v_proj", 0, keys)]
        if self.wide_qk_norm:
            rows += [("q_norm", 0, queries), ("k_norm", 0, keys)]
        parts = _rows("self_attn", rows, shapes)
        return [*parts, Part("self_attn.o_proj.weight", 1, 0, queries)]

    def mlp_parts(self, shapes: Mapping[str, tuple[int, ...]], config: Any) -> list[Part]:
        """Parts of the FFN channels of a layer with these parameter shapes and this layer config."""
        if self.fused_gate_up:
            rows = [("gate_up_proj", 0, 1), ("gate_up_proj", config.intermediate_size, 1)]
        else:
            rows = [("gate_proj", 0, 1), ("up_proj", 0, 1)]
        return [*_rows("mlp", rows, shapes), Part("mlp.down_proj.weight", 1, 0, 1)]

    def parts(self, half: Half, shapes: Mapping[str, tuple[int, ...]], config: Any) -> list[Part]:
        """Parts of one half of the layer."""
        make = self.attention_parts if half == "attention" else self.mlp_parts
        return make(shapes, config)


def _rows(
    module: str, rows: list[tuple[str, int, int]], shapes: Mapping[str, tuple[int, ...]]
) -> list[Part]:
    """Weight and, where the layer has one, bias of each projection."""
    return [
        Part(f"{module}.{name}.{kind}", 0, offset, width)
        for name, offset, width in rows
        for kind in ("weight", "bias")
        if f"{module}.{name}.{kind}" in shapes
    ]


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "Llama, SmolLM2, MobileLLM"),
        Family("mistral", "Mistral"),
        Family("qwen2", "Qwen2"),
        Family("qwen3", "Qwen3"),
        Family("smollm3", "SmolLM3"),
        Family("gemma3_text", "Gemma 3 text"),
        Family("phi3", "Phi-3", fused_qkv=True, fused_gate_up=True),
        Family("granite", "Granite"),
        Family("olmo2", "OLMo2", wide_qk_norm=True),
    )
}


def family_of(config: Any) -> Family:
    """Return the family of a config; BadInput lists the known ones."""
    try:
        return FAMILIES[config.model_type]
    except KeyError:
        known = ", ".join(f"{f.model_type} ({f.title})" for f in FAMILIES.values())
        raise BadInput(
            f"models of type '{config.model_type}' cannot be pruned yet; known types: {known}"
        ) from None


def head_dim(config: Any) -> int:
    """Size of one attention head."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)


def logits_divisor(config: Any) -> float:
    """What the head's output is divided by to give logits (Granite); 1 for the others."""
    return float(getattr(config, "logits_scaling", 1.0) or 1.0)


def residual_scale(config: Any) -> float | None:
    """What a layer's halves are multiplied by before they join the residual stream; None where a norm is in between."""
    if config.model_type in ("gemma3_text", "olmo2"):
        return None
    return float(getattr(config, "residual_multiplier", 1.0) or 1.0)


def norm_offset(config: Any) -> float:
    """What a norm adds to its weight before it multiplies (Gemma: 1)."""
    return 1.0 if config.model_type == "gemma3_text" else 0.0
