"""How each precision stores weights: read by what writes them and by what predicts their size."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Storage:
    """Bits of a weight in the decoder layers, and in the embedding table and head.

    16 and 32 bits are plain floats; fewer are integers in blocks of ``block`` along a row, each
    block with a float32 scale and, at 4 bits, a zero point. Computation and KV cache are float32 in
    all of them: few CPUs do more.
    """

    body_bits: int
    table_bits: int
    block: int = 32


STORAGE = {
    "int4": Storage(4, 4),
    "int8": Storage(8, 8),
    "fp16": Storage(16, 16),
    "fp32": Storage(32, 32),
}
