"""A memory budget is kept, and one that cannot be is refused before any work."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgeprune import machine
from edgeprune.errors import BadInput
from edgeprune.events import Note
from edgeprune.footprint import Footprint
from edgeprune.groups import describe_layers
from edgeprune.pruner import prune
from edgeprune.quantities import parse_bytes
from tests import tiny

OPTIONS = {
    "sparsity": 0.4,
    "iterations": 1,
    "samples": 8,
    "repair_samples": 8,
    "length": 16,
    "width_multiple": 8,
}
SCRIPT = """
import json, sys
from edgeprune import mapped, prune
from edgeprune.errors import BadInput
from edgeprune.quantities import parse_bytes
source, output, options = *sys.argv[1:3], json.loads(sys.argv[3])
try:
    prune(source, output, memory_budget=1_000_000, stream=True, **options)
except BadInput as refused:
    budget = parse_bytes(str(refused).rpartition(" ")[2])
prune(source, output, memory_budget=budget, stream=True, **options)
print(mapped.peak_resident(), budget)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    monkeypatch.setattr(machine, "compute_dtype", lambda *_: torch.float32)


def large():
    """Llama-3.1-8B's widths, 32 layers, in bf16."""
    config = tiny.config(
        "llama",
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        num_hidden_layers=32,
        vocab_size=128256,
        tie_word_embeddings=False,
    )
    return Footprint(
        config,
        describe_layers(config),
        samples=64,
        repair=1024,
        length=64,
        micro_batch=16,
        stored=2,
        computed=2,
        process=400_000_000,
        streamed=True,
    )


def figure_in(error):
    """The bytes that a refusal says to type."""
    (text,) = re.findall(r"--memory-budget (\S+GB)$", str(error))
    return parse_bytes(text)


def test_a_model_of_8_billion_parameters_fits_into_6_gb_streamed():
    sizes = large()
    assert sizes.needed() < 6e9 < 16e9 < replace(sizes, streamed=False).needed()


@pytest.mark.parametrize("budget", [3.5e9, 6e9, 12e9, 48e9])
def test_what_a_budget_leaves_is_not_promised_twice(budget):
    sizes = large()
    assert 0 < sizes.hold(budget) < budget
    samples = sizes.repair_samples(budget)
    assert 2 <= samples <= 1024
    assert sizes.repairing(samples) <= budget
    assert sizes.repair_samples(budget + 1e9) >= samples


def test_more_to_do_needs_more():
    sizes = large()
    for name in ("samples", "length", "micro_batch", "stored", "computed", "process"):
        assert replace(sizes, **{name: 2 * getattr(sizes, name)}).needed() >= sizes.needed()
    assert replace(sizes, repair=0).needed() <= sizes.needed()


@pytest.mark.parametrize("stream", [True, False, None])
def test_a_budget_too_small_is_refused_and_the_figure_named_is_enough(source, tmp_path, stream):
    with pytest.raises(BadInput) as raised:
        prune(source, tmp_path / "out", memory_budget=1_000_000, stream=stream, **OPTIONS)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []
    budget = figure_in(raised.value)
    made = prune(source, tmp_path / "out", memory_budget=budget, stream=stream, **OPTIONS)["made"]
    assert made["streamed"] == bool(stream)  # it is small: what is enough for one is for the other


def test_too_little_free_memory_is_told(source, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(10**9, 1000))
    with pytest.raises(BadInput, match="close other programs"):
        prune(source, tmp_path / "out", **OPTIONS)
    # who says --no-stream knows better
    prune(source, tmp_path / "out", stream=False, **OPTIONS)


def test_few_repair_samples_are_taken_where_more_do_not_fit(source, tmp_path, monkeypatch):
    monkeypatch.setattr(Footprint, "repair_samples", lambda *_: 5)
    notes = []
    prune(source, tmp_path / "out", emit=notes.append, **OPTIONS)
    assert any("5 sequences instead of 8" in n.text for n in notes if isinstance(n, Note))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_budget_is_kept(tmp_path):
    wide = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 3}
    source = tiny.save("llama-untied", tmp_path / "dense", **wide)

    words = [source, tmp_path / "out", json.dumps(OPTIONS | {"length": 64})]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=True,
    )
    peak, budget = map(int, done.stdout.split())
    assert 0 < peak <= budget
