"""What a model is made of, from its config alone: it is built on the meta device, without weights.

Counts are parameters, sizes are bytes. Tied weights count once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeprune import provenance, sources
from edgeprune.events import Emit, ignore
from edgeprune.families import family_of, head_dim
from edgeprune.groups import layer_groups
from edgeprune.nonuniform import LayerWidths, layer_widths
from edgeprune.sources import Source
from edgeprune.sources import build_on_meta as build_on_meta

SCHEMA_VERSION = 1
KV_TOKENS = 1000
KV_BYTES = 2
# a block of this many quantized weights shares one 16-bit scale
BLOCK = 32
MEMORY_ASSUMPTION = (
    "weights alone; int8 and int4: matrices in blocks of 32 with a 16-bit scale each, the rest in "
    "16 bits; an exported file may keep the embeddings wider"
)
KV_ASSUMPTION = "keys and values in bf16, one sequence; a sliding-window layer keeps its window"


def inspect(
    model: str | Path | Source,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    emit: Emit = ignore,
) -> dict[str, Any]:
    """Describe a model as plain JSON values; weights are neither downloaded nor read.

    ``parameters``, ``decoder_parameters`` (all inside decoder layers) and ``layers[i]`` with their
    widths are there for every model; a pruned one has ``dense``, the same figures before pruning.
    BadInput as in ``sources.resolve``.
    """
    if not isinstance(model, Source):
        model = sources.resolve(
            model,
            revision=revision,
            trust_remote_code=trust_remote_code,
            weights=False,
            emit=emit,
        )
    config = sources.load_config(model)
    pruned = bool(config.is_heterogeneous)
    return {
        "schema_version": SCHEMA_VERSION,
        "model": model.title,
        "kind": model.kind,
        "revision": model.revision,
        "licence": provenance.licence(model),
        "pruned": pruned,
        **describe(config),
        "dense": _reference(dense_config(config)) if pruned else None,
        "provenance": provenance.read_provenance(model.path) if not model.gguf_file else None,
    }


def describe(config: Any) -> dict[str, Any]:
    """Describe the model that ``config`` builds: parameters by part and layer, memory, KV cache."""
    family = family_of(config)
    skeleton = build_on_meta(config)
    layers = _layers(skeleton, config)
    parameters = count(skeleton)
    decoder = sum(layer["parameters"] for layer in layers)
    embeddings = count_embeddings(skeleton)
    return {
        "model_type": config.model_type,
        "family": family.title,
        "parameters": parameters,
        "decoder_parameters": decoder,
        "embedding_parameters": embeddings,
        "other_parameters": parameters - decoder - embeddings,
        "prunable_parameters": sum(layer["prunable"]["parameters"] for layer in layers),
        "tied_embeddings": is_tied(skeleton),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "head_dim": head_dim(config),
        "num_hidden_layers": config.num_hidden_layers,
        "max_position_embeddings": getattr(config, "max_position_embeddings", None),
        "layers": layers,
        "memory": _memory(skeleton),
        "memory_assumption": MEMORY_ASSUMPTION,
        "kv_cache_bytes_per_1k_tokens": _kv_cache(config),
        "kv_cache_assumption": KV_ASSUMPTION,
    }


def dense_config(config: Any) -> Any:
    """Return a pruned config with the widths that its layers had before."""
    values = config.to_dict()
    for key in ("per_layer_config", "auto_map", "allow_global_per_layer_attribute_access"):
        values.pop(key, None)
    return type(config).from_dict(values)


def count(module: Any) -> int:
    """Return the number of parameters of a module, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_embeddings(model: Any) -> int:
    """Return the parameters of the token embedding and, unless it is the same tensor, the head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    own = {id(p): p.numel() for part in (embedding, head) for p in part.parameters()}
    return sum(own.values())


def is_tied(model: Any) -> bool:
    """Whether the head uses the token embedding's own weights."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _layers(skeleton: Any, config: Any) -> list[dict[str, Any]]:
    widths = layer_widths(config)
    return [
        _layer(i, layer, config.per_layer_config[i], widths[i])
        for i, layer in enumerate(skeleton.model.layers)
    ]


def _layer(index: int, layer: Any, config: Any, widths: LayerWidths) -> dict[str, Any]:
    total, attention, mlp = count(layer), count(layer.self_attn), count(layer.mlp)
    return {
        "index": index,
        **widths._asdict(),
        "parameters": total,
        "attention_parameters": attention,
        "mlp_parameters": mlp,
        "norm_parameters": total - attention - mlp,
        "prunable": _prunable(layer, config),
    }


def _prunable(layer: Any, config: Any) -> dict[str, int]:
    """Count the groups of a layer: a KV head with its query heads, or an FFN channel."""
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    groups = layer_groups(family_of(config), shapes, config)
    return {
        "kv_groups": groups.count["attention"],
        "ffn_channels": groups.count["mlp"],
        "parameters": groups.prunable,
    }


def _memory(skeleton: Any) -> dict[str, int]:
    matrices = sum(p.numel() for p in skeleton.parameters() if p.dim() > 1)
    rest = count(skeleton) - matrices
    return {
        "fp32": 4 * (matrices + rest),
        "bf16": 2 * (matrices + rest),
        "int8": matrices + matrices // BLOCK * 2 + 2 * rest,
        "int4": matrices // 2 + matrices // BLOCK * 2 + 2 * rest,
    }


def _kv_cache(config: Any) -> int:
    window = getattr(config, "sliding_window", None) or KV_TOKENS
    # families without a list of layer types have the window in every layer
    alike = ["sliding_attention"] * config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or alike
    total = 0
    for kind, widths in zip(kinds, layer_widths(config), strict=True):
        tokens = min(window, KV_TOKENS) if kind == "sliding_attention" else KV_TOKENS
        # a removed attention still has one head of zeros in the cache: nonuniform.NoAttention
        heads = max(widths.num_key_value_heads, 1)
        total += 2 * tokens * heads * head_dim(config) * KV_BYTES
    return total


def _reference(config: Any) -> dict[str, Any]:
    """Return what a pruned model is compared with."""
    described = describe(config)
    kept = ("parameters", "decoder_parameters", "memory", "kv_cache_bytes_per_1k_tokens")
    return {
        **{key: described[key] for key in kept},
        "layers": [widths._asdict() for widths in layer_widths(config)],
    }
