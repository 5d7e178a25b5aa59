from pathlib import Path

import pytest

from edgeprune import machine, preflight, recipe
from edgeprune.errors import BadInput
from edgeprune.events import Note
from edgeprune.sources import Source

SHAPE = {"parameters": 1_000_000_000, "max_position_embeddings": 256}
GB = 10**9


@pytest.fixture
def check(monkeypatch, tmp_path):
    """Return a function that checks a run on a model of 1B parameters on a machine as given."""

    def run(*, disk=100 * GB, memory=(64 * GB, 64 * GB), **sections):
        source = Source("m", "folder", Path("/models/m"))
        monkeypatch.setattr(preflight.sources, "resolve", lambda *a, **k: source)
        monkeypatch.setattr(preflight, "inspect", lambda source: SHAPE)
        monkeypatch.setattr(machine, "disk_free", lambda folder: disk)
        monkeypatch.setattr(machine, "memory", lambda: machine.Memory(*memory))
        data = {"source": {"model": "m"}, "prune": {"sparsity": 0.3}}
        data |= {"profile": {"prompt": 64, "generate": 64}, "evaluate": {"window": 128}}
        notes = []
        found = preflight.check_source(recipe.parse(data | sections), tmp_path, notes.append)
        return found, notes

    return run


def test_a_run_that_fits_is_told_where_the_model_is_and_its_shape(check):
    found, notes = check()
    assert found["inspection"] == SHAPE
    assert Source(**found["source"]).kind == "folder"
    assert notes == []


def test_all_problems_are_told_at_once_with_their_figures(check, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(BadInput) as caught:
        check(
            disk=5 * GB,
            prune={"sparsity": 0.3, "calibration": str(empty)},
            evaluate={"window": 1024},
        )
    disk, window, text = str(caught.value).splitlines()
    assert "5.00 GB free, and the run may need 12.2 GB" in disk
    assert window.startswith("evaluate.window: 1024 tokens, and the model takes at most 256")
    assert str(empty) in text


def test_a_model_larger_than_memory_is_worked_on_in_pieces(check):
    _, (note,) = check(memory=(2 * GB, 1 * GB))
    assert isinstance(note, Note)
    assert "one decoder layer at a time" in note.text
