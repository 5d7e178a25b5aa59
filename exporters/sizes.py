"""How large an export will be, from the config alone: what a memory target is met with."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import Any

from edgeprune.exporters.storage import STORAGE
from edgeprune.families import head_dim
from edgeprune.nonuniform import LayerWidths, layer_widths

_FLOAT = 4
# The graph without its weights: nodes, names, shapes. Measured; every layer of three families has
# some nodes more.
_GRAPH = 6_500
_GRAPH_LAYER = {"int4": 8_500, "int8": 7_350, "fp16": 6_650, "fp32": 5_450}
_GRAPH_LAYER_MORE = {"qwen3": 3_100, "gemma3_text": 4_100, "olmo2": 2_200, "granite": 550}
_GRAPH_BIAS = 430
_LONGER_NAMES = 1.08  # of layers whose number has two or three digits


def file_bytes(config: Any, precision: str) -> int:
    """Bytes of ``model.onnx`` and ``model.onnx.data``, for a dense or a non-uniform config.

    Weights are counted exactly, the graph from above: the real files are never larger, and smaller
    by less than 2 % from some ten megabytes on.
    """
    storage = STORAGE[precision]
    table = matrix_bytes(config.vocab_size, config.hidden_size, storage.table_bits, storage.block)
    tables = table if config.tie_word_embeddings else 2 * table
    layers = sum(
        sum(matrix_bytes(*m, storage.body_bits, storage.block) for m in _matrices(config, widths))
        + _FLOAT * sum(_vectors(config, widths))
        for widths in layer_widths(config)
    )
    final_norm = _FLOAT * config.hidden_size
    return tables + layers + final_norm + _rotary_bytes(config) + _graph_bytes(config, precision)


def matrix_bytes(rows: int, columns: int, bits: int, block: int) -> int:
    """Bytes of one stored matrix whose blocks lie along its columns."""
    if bits >= 16:
        return rows * columns * bits // 8
    blocks = ceil(columns / block)
    zeros = ceil(blocks / 2) if bits == 4 else 0
    return rows * (blocks * (block * bits // 8 + _FLOAT) + zeros)


def _matrices(config: Any, widths: LayerWidths) -> Iterator[tuple[int, int]]:
    """Shapes (rows, columns) of the projections that a layer still has."""
    hidden, size = config.hidden_size, head_dim(config)
    queries, keys = widths.num_attention_heads * size, widths.num_key_value_heads * size
    if queries:
        yield queries + 2 * keys, hidden
        yield hidden, queries
    if widths.intermediate_size:
        yield 2 * widths.intermediate_size, hidden
        yield hidden, widths.intermediate_size


def _vectors(config: Any, widths: LayerWidths) -> Iterator[int]:
    """Lengths of the norms and biases that a layer still has."""
    hidden, size = config.hidden_size, head_dim(config)
    queries, keys = widths.num_attention_heads * size, widths.num_key_value_heads * size
    norms = 2 if config.model_type == "gemma3_text" else 1
    if queries:
        yield norms * hidden
        if config.model_type == "olmo2":
            yield queries + keys
        elif config.model_type in ("qwen3", "gemma3_text"):
            yield 2 * size
        if config.model_type == "qwen2":
            yield queries + 2 * keys
        elif getattr(config, "attention_bias", False):
            yield queries + 2 * keys + hidden
    if widths.intermediate_size:
        yield norms * hidden
        if getattr(config, "mlp_bias", False):
            yield 2 * widths.intermediate_size + hidden


def _rotary_bytes(config: Any) -> int:
    """Cosines and sines of every position; Gemma 3 has more of them for its local layers."""
    rope = config.rope_parameters
    positions = config.max_position_embeddings
    if rope.get("rope_type") == "longrope":
        positions += config.original_max_position_embeddings
    if config.model_type == "gemma3_text":
        positions *= 2
    rotated = int(head_dim(config) * rope.get("partial_rotary_factor", 1.0))
    return positions * rotated * _FLOAT


def _graph_bytes(config: Any, precision: str) -> int:
    layer = _GRAPH_LAYER[precision] + _GRAPH_LAYER_MORE.get(config.model_type, 0)
    if config.model_type == "qwen2" or getattr(config, "attention_bias", False):
        layer += 2 * _GRAPH_BIAS
    if getattr(config, "mlp_bias", False):
        layer += 3 * _GRAPH_BIAS
    return ceil(_GRAPH + layer * config.num_hidden_layers * _LONGER_NAMES)
