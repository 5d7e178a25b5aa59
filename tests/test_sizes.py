"""The predicted size of an export is never below the real one, and close to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from exporting import PRUNED, build, pruned

from edgeprune.exporters.onnx import MODEL_FILES
from edgeprune.exporters.sizes import file_bytes, matrix_bytes
from edgeprune.exporters.storage import STORAGE

# wide enough that the graph is a small part of the file, as it is in real models
WIDE = {"hidden_size": 256, "intermediate_size": 1000, "vocab_size": 4096}


def real_bytes(model, folder: Path, precision: str) -> int:
    build(model, folder, precision)
    return sum((folder / name).stat().st_size for name in MODEL_FILES)


@pytest.mark.parametrize("precision", STORAGE)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_never_below_the_real_size(family: str, precision: str, tmp_path: Path) -> None:
    model = tiny.model(family, num_hidden_layers=2)
    predicted = file_bytes(model.config, precision)
    real = real_bytes(model, tmp_path, precision)
    assert real <= predicted <= real + 8_000  # the slack is that of the graph


@pytest.mark.parametrize("precision", STORAGE)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "olmo2"])
def test_close_to_the_real_size_of_a_pruned_model(
    family: str, precision: str, tmp_path: Path
) -> None:
    model = pruned(family, PRUNED, **WIDE)
    predicted = file_bytes(model.config, precision)
    real = real_bytes(model, tmp_path, precision)
    assert real <= predicted <= real * 1.02


def test_a_matrix_in_blocks() -> None:
    # 48 columns are two blocks of 32: 16 bytes of levels and 4 of scale each, one byte of zero
    # points
    assert matrix_bytes(10, 48, 4, 32) == 10 * (2 * 20 + 1)
    assert matrix_bytes(10, 48, 8, 32) == 10 * 2 * 36
    assert matrix_bytes(10, 48, 16, 32) == 960
