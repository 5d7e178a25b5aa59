"""How fast this device multiplies matrices: the yardstick for a training's speed."""

from __future__ import annotations

import statistics
import time
from functools import cache

import torch

# Of a square product: large enough to reach the peak, and with 17 GFLOP still quick in float32 on a laptop.
SIZE = 2048
SECONDS = 0.5


@cache
def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """Return the median rate of a large matrix product in FLOP/s, measured for about half a second, once.

    Not the best: a virtual machine that has rested is for some milliseconds twice as fast as it can go on.
    """
    left = torch.randn(SIZE, SIZE, device=device).to(dtype)
    right = torch.randn(SIZE, SIZE, device=device).to(dtype)
    _seconds(left, right)  # libraries choose their kernels at the first call
    found, end = [_seconds(left, right)], time.monotonic() + SECONDS
    while time.monotonic() < end:
        found.append(_seconds(left, right))
    return 2 * SIZE**3 / statistics.median(found)


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    started = time.perf_counter()
    float((left @ right)[0, 0])  # waits for the device
    return time.perf_counter() - started
