"""Warm-up, stable, decay: one learning rate schedule over the whole of a recovery, whatever stages it has."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Learning rates of ``steps`` updates (WSD, arXiv 2404.06395).

    The first ``warmup`` of the steps rise linearly to ``maximum``, the last ``decay`` of them fall linearly to
    ``minimum``, and those between are constant. Both are shares of the steps, in [0, 1].
    """

    steps: int
    maximum: float
    minimum: float
    warmup: float
    decay: float

    def rate(self, step: int) -> float:
        """Return the learning rate of update ``step``, counted from 0; the last one has ``minimum``."""
        rising, falling = math.ceil(self.warmup * self.steps), round(self.decay * self.steps)
        if step < rising:
            return self.maximum * (step + 1) / rising
        into = step + 1 - (self.steps - falling)
        if into <= 0:
            return self.maximum
        return self.maximum + (self.minimum - self.maximum) * min(1.0, into / falling)
