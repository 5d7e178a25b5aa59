"""Prune a language model layer by layer until it fits the device you own, and measure it there.

``load``, ``inspect``, ``prune``, ``export`` and ``profile`` take the same words as the commands.
They are imported on first use: ``import edgeprune`` alone costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from edgeprune.errors import BadInput, EdgepruneError

if TYPE_CHECKING:
    from edgeprune.exporters.onnx import export
    from edgeprune.inspection import inspect
    from edgeprune.profiles.profile import profile
    from edgeprune.pruner import prune
    from edgeprune.sources import load

__version__ = "0.1.0"
__all__ = [
    "BadInput",
    "EdgepruneError",
    "export",
    "inspect",
    "load",
    "profile",
    "prune",
]

_HOMES = {
    "export": "edgeprune.exporters.onnx",
    "inspect": "edgeprune.inspection",
    "load": "edgeprune.sources",
    "profile": "edgeprune.profiles.profile",
    "prune": "edgeprune.pruner",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
