"""Weights in blocks of few bits, as ONNX Runtime's MatMulNBits and GatherBlockQuantized read them.

A row of K weights becomes ceil(K / block) blocks; a weight is ``(q - zero_point) * scale`` of its
block. Four-bit
blocks choose scale and zero point by the least squared error: on SmolLM2-135M this diverges from
PyTorch by a fifth less than plain rounding between the extremes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import torch

# how far the range of a 4-bit block is narrowed, at the price of clipping its extremes
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
# weights worked on at a time, so that a large matrix needs little more memory than itself
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Blocks:
    """A quantized matrix of ``rows`` x ``columns``.

    ``weight`` is uint8 (rows, blocks, block * bits / 8), low nibble first; ``scales`` float32
    (rows, blocks); ``zeros`` uint8 (rows, ceil(blocks * bits / 8)), or None where every zero point
    is the middle of the range.
    """

    bits: int
    block: int
    rows: int
    columns: int
    weight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None


def quantize(weight: torch.Tensor, bits: int, block: int) -> Blocks:
    """Quantize a matrix (rows, columns) to 4 or 8 bits along its columns, a few rows at a time."""
    rows, columns = weight.shape
    blocks = ceil(columns / block)
    step = max(1, _CHUNK // (blocks * block))
    parts = [_quantize_rows(part, bits, block) for part in weight.detach().split(step)]
    packed, scales, zeros = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return Blocks(
        bits=bits,
        block=block,
        rows=rows,
        columns=columns,
        weight=packed,
        scales=scales,
        zeros=None if bits == 8 else zeros,
    )


def joined(parts: list[Blocks]) -> Blocks:
    """Return quantized matrices, one below the other, as one."""
    if len(parts) == 1:
        return parts[0]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return replace(
        parts[0],
        rows=sum(part.rows for part in parts),
        weight=torch.cat([part.weight for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=torch.cat(zeros) if zeros else None,
    )


def _quantize_rows(
    weight: torch.Tensor, bits: int, block: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed weights, scales and packed zero points of some rows."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % block))
    blocks = padded.view(rows, -1, block)
    if bits == 8:
        levels, scales, zeros = _symmetric8(blocks)
    else:
        levels, scales, zeros = _least_squares4(blocks)
    zeros = zeros.to(torch.uint8).squeeze(-1)
    return _pack(levels.to(torch.uint8), bits), scales.squeeze(-1), _pack(zeros, bits)


def _symmetric8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale = w.abs().amax(-1, keepdim=True) / 127
    levels = (w / _nonzero(scale)).round() + 128
    return levels, scale, torch.full_like(scale, 128)


def _least_squares4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low = w.amin(-1, keepdim=True).clamp_max(0)
    high = w.amax(-1, keepdim=True).clamp_min(0)
    error, levels, scale, zero = _try4(w, low, high, _SHRINKS[0])
    for shrink in _SHRINKS[1:]:
        other = _try4(w, low, high, shrink)
        better = other[0] < error
        error = torch.where(better, other[0], error)
        levels = torch.where(better, other[1], levels)
        scale = torch.where(better, other[2], scale)
        zero = torch.where(better, other[3], zero)
    return levels, scale, zero


def _try4(
    w: torch.Tensor, low: torch.Tensor, high: torch.Tensor, shrink: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Squared error, levels, scale and zero point with the range narrowed by ``shrink``."""
    scale = _nonzero((high - low) * (shrink / 15))
    zero = (-low * shrink / scale).round().clamp(0, 15)
    levels = ((w / scale).round() + zero).clamp(0, 15)
    centred = levels - zero
    fitted = (w * centred).sum(-1, keepdim=True) / _nonzero(centred.square().sum(-1, keepdim=True))
    error = (w - centred * fitted).square().sum(-1, keepdim=True)
    return error, levels, fitted, zero


def _nonzero(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x == 0, torch.ones_like(x), x)


def _pack(levels: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack two 4-bit levels into a byte, the first in the low nibble; 8-bit ones stay."""
    if bits == 8:
        return levels.contiguous()
    if levels.shape[-1] % 2:
        levels = torch.nn.functional.pad(levels, (0, 1))
    return levels[..., 0::2] | (levels[..., 1::2] << 4)
