"""A tiny exported model, and ways to damage a copy of it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import tiny

from edgeprune.exporters.onnx import export
from edgeprune.profiles import runner

VOCAB_SIZE = tiny.VOCAB_SIZE


def make(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """Export a tiny Llama to ``folder``; return it."""
    with tempfile.TemporaryDirectory() as source:
        tiny.save("llama", source, seed, **overrides)
        export(source, folder, precision="fp32", check=False)
    return folder


def spoil(export: Path, folder: Path, fault: str) -> Path:
    """Make ``folder`` a copy of ``export`` that has ``fault``; return it."""
    if fault == "absent":
        return folder
    if fault == "a file":
        folder.write_text("not a folder")
        return folder
    shutil.copytree(export, folder)
    config, graph, weights = (
        folder / name for name in (runner.CONFIG, "model.onnx", "model.onnx.data")
    )
    damage = {
        "no config": config.unlink,
        "damaged config": lambda: config.write_text('{"model": {'),
        "no graph": graph.unlink,
        "graph cut short": lambda: _cut(graph),
        "weights cut short": lambda: _cut(weights),
        "no weights": weights.unlink,
    }
    damage[fault]()
    return folder


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
