"""How fast this machine multiplies matrices: what a floor of arithmetic is worked out from."""

from __future__ import annotations

import time

import torch

from edgeprune import machine

SIZE = 4096


def matrix_speed() -> float:
    """Floating point operations a second of the best of five products of two matrices, in the type to compute in."""
    a, b = (torch.randn(SIZE, SIZE).to(machine.compute_dtype()) for _ in range(2))
    times = []
    for _ in range(5):
        started = time.monotonic()
        a @ b
        times.append(time.monotonic() - started)
    return 2 * SIZE**3 / min(times)


if __name__ == "__main__":
    print(f"{matrix_speed() / 1e12:.2f} TFLOP/s in {machine.compute_dtype()}")
