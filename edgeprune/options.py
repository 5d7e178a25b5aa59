"""How to prune: the options, what they are by default, and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from edgeprune.errors import BadInput
from edgeprune.importance import ElementMeasure, LayerMeasure

Method = Literal["adapt", "adapt-pruner", "uniform"]
Effort = Literal["quick", "balanced", "best"]
# Tokens that go through a layer at once. Fixed, so that a result does not depend on the machine's memory; larger
# gains nothing on CPUs.
MICRO_BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Pace:
    """Time spent for quality: iterations, calibration sequences in each, and sequences to repair with."""

    iterations: int
    samples: int
    repair_samples: int


# At 40 %, on one busy thread: quick 91.6 in under 10 minutes, balanced 84.7 in 18, best 76.9 in 35 (RESULTS.md).
EFFORTS: dict[Effort, Pace] = {
    "quick": Pace(10, 64, 128),
    "balanced": Pace(25, 64, 256),
    "best": Pace(25, 64, 4096),
}
# Equation 6's A is a share of a layer for each iteration; the tilt of ``adapt`` is for the whole run, relative to the
# average sparsity, so that it does not depend on how many iterations there are.
AMPLITUDES: dict[Method, float] = {"adapt": 0.4, "adapt-pruner": 0.02, "uniform": 0.0}


@dataclass(frozen=True)
class Options:
    """How to prune. ``adapt-pruner`` with A = 0.02, 50 iterations and 512 x 64 tokens is the paper's setting."""

    method: Method = "adapt"
    iterations: int = EFFORTS["balanced"].iterations
    samples: int = EFFORTS["balanced"].samples
    length: int = 64
    repair_samples: int = EFFORTS["balanced"].repair_samples
    amplitude: float = AMPLITUDES["adapt"]
    width_multiple: int = 32
    seed: int = 0
    layer_importance: LayerMeasure = "cosine"
    element_importance: ElementMeasure = "taylor"
    skip_layers: tuple[int, ...] = ()

    @staticmethod
    def of(
        effort: Effort = "balanced",
        *,
        method: Method = "adapt",
        iterations: int | None = None,
        samples: int | None = None,
        repair_samples: int | None = None,
        amplitude: float | None = None,
        **others: Any,
    ) -> Options:
        """Fill in what is left open from the effort and the method. BadInput for an effort there is not."""
        for name, value, kind in (("effort", effort, Effort), ("method", method, Method)):
            _check_choice(name, value, kind)
        pace = EFFORTS[effort]
        if repair_samples is None:
            repair_samples = pace.repair_samples if method == "adapt" else 0
        return Options(
            method=method,
            iterations=pace.iterations if iterations is None else iterations,
            samples=pace.samples if samples is None else samples,
            repair_samples=repair_samples,
            amplitude=AMPLITUDES[method] if amplitude is None else amplitude,
            **others,
        )

    @property
    def micro_batch(self) -> int:
        """Sequences that go through a layer at once."""
        return max(1, MICRO_BATCH_TOKENS // self.length)

    def to_json(self) -> dict[str, Any]:
        """Return the options as plain values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
        }

    def check(self, config: Any) -> None:
        """Raise BadInput for what cannot be done with this model."""
        for name, least in (
            ("iterations", 1),
            ("samples", 1),
            ("length", 2),
            ("repair_samples", 0),
            ("width_multiple", 1),
        ):
            if getattr(self, name) < least:
                raise BadInput(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name, kind in _CHOICES.items():
            _check_choice(name, getattr(self, name), kind)
        if not math.isfinite(self.amplitude) or self.amplitude < 0:
            raise BadInput(f"amplitude is {self.amplitude}; it must be 0 or more")
        layers = config.num_hidden_layers
        for number in self.skip_layers:
            if not 0 <= number < layers:
                raise BadInput(
                    f"there is no decoder layer {number}: this model has 0 to {layers - 1}"
                )
        longest = getattr(config, "max_position_embeddings", None) or self.length
        if self.length > longest:
            raise BadInput(f"length is {self.length} tokens; this model takes at most {longest}")


_CHOICES: dict[str, Any] = {
    "method": Method,
    "layer_importance": LayerMeasure,
    "element_importance": ElementMeasure,
}


def _check_choice(name: str, value: Any, kind: Any) -> None:
    if value not in get_args(kind):
        raise BadInput(f"{name} is {value!r}; it must be one of {', '.join(get_args(kind))}")
