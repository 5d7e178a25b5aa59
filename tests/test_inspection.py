import json
from pathlib import Path

import pytest
import tiny
from gguf import GGUFReader
from test_checkpoint import saved

from edgeprune import inspect, sources
from edgeprune.errors import BadInput
from edgeprune.inspection import count, dense_config, describe


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_counts_are_those_of_the_real_model(family):
    model = tiny.model(family)
    found = describe(model.config)
    assert found["parameters"] == count(model)
    assert found["decoder_parameters"] == sum(count(layer) for layer in model.model.layers)
    parts = ("attention_parameters", "mlp_parameters", "norm_parameters")
    for shown, layer in zip(found["layers"], model.model.layers, strict=True):
        assert shown["attention_parameters"] == count(layer.self_attn)
        assert shown["mlp_parameters"] == count(layer.mlp)
        assert sum(shown[part] for part in parts) == shown["parameters"] == count(layer)
        assert shown["num_attention_heads"] == model.config.num_attention_heads
        assert shown["num_key_value_heads"] == model.config.num_key_value_heads
        assert shown["intermediate_size"] == model.config.intermediate_size
    whole = ("decoder_parameters", "embedding_parameters", "other_parameters")
    assert sum(found[part] for part in whole) == found["parameters"]
    assert found["tied_embeddings"] == model.config.tie_word_embeddings
    assert found["memory"]["fp32"] == 4 * count(model)
    json.dumps(found)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_pruned_model_is_compared_with_its_dense_self(family, tmp_path):
    model, folder = saved(family, tmp_path)
    found = inspect(folder)
    assert found["pruned"]
    assert found["parameters"] == count(model)
    assert found["layers"][0]["intermediate_size"] == 64
    assert found["layers"][1]["num_attention_heads"] == 0
    assert found["layers"][1]["attention_parameters"] == 0
    assert found["layers"][2]["intermediate_size"] == 0
    dense = inspect(tmp_path / "dense")
    assert not dense["pruned"]
    assert found["dense"]["parameters"] == dense["parameters"]
    assert (
        found["dense"]["layers"][1]["intermediate_size"]
        == (dense["layers"][1]["intermediate_size"])
    )
    assert found["provenance"]["source"]["name"] == "dense"


def test_prunable_is_what_the_groups_hold():
    found = describe(tiny.config("qwen2"))
    layer = found["layers"][0]
    # a KV group: q rows of two heads, k and v rows, their biases, and two heads' o columns
    group = 2 * 16 * (64 + 1) + 2 * 16 * (64 + 1) + 2 * 16 * 64
    assert layer["prunable"] == {
        "kv_groups": 2,
        "ffn_channels": 128,
        "parameters": 2 * group + 128 * 3 * 64,
    }


def test_kv_cache_counts_heads_bytes_and_windows():
    assert describe(tiny.config("llama"))["kv_cache_bytes_per_1k_tokens"] == (
        4 * 2 * 2 * 16 * 2 * 1000
    )
    sliding = 2 * 2 * 16 * 2
    assert describe(tiny.config("gemma3_text"))["kv_cache_bytes_per_1k_tokens"] == (
        2 * sliding * 8 + 2 * sliding * 1000
    )


def test_a_model_far_too_large_to_load_is_described():
    config = tiny.config(
        "llama-untied",
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        attention_bias=False,
        mlp_bias=False,
    )
    assert describe(config)["parameters"] == 70_553_706_496


def test_weights_are_not_needed(tmp_path):
    folder = tiny.save("llama", tmp_path / "m")
    (folder / "model.safetensors").unlink()
    assert inspect(folder)["parameters"] == count(tiny.model("llama"))
    with pytest.raises(BadInput, match="no weights"):
        sources.resolve(folder)


def test_dense_config_of_a_dense_model_is_itself():
    config = tiny.config("qwen3")
    assert dense_config(config).to_dict() == config.to_dict()


def test_smollm2(smollm2):
    found = inspect(smollm2)
    assert found["parameters"] == 134_515_008
    assert found["decoder_parameters"] == 106_202_880
    assert found["tied_embeddings"]
    assert found["licence"] == "apache-2.0"
    assert len(found["layers"]) == 30
    assert found["layers"][7]["num_attention_heads"] == 9
    assert found["layers"][7]["num_key_value_heads"] == 3
    assert found["layers"][7]["intermediate_size"] == 1536
    assert found["kv_cache_bytes_per_1k_tokens"] == 30 * 2 * 3 * 64 * 2 * 1000


def test_a_gguf_is_inspected_from_its_header_alone(smollm2, monkeypatch):
    opened = []
    read = GGUFReader.__init__

    def noted(self, path, *args):
        opened.append(Path(path).stat().st_size)
        read(self, path, *args)

    monkeypatch.setattr(GGUFReader, "__init__", noted)
    assert inspect(smollm2)["num_hidden_layers"] == 30
    assert max(opened) < 100_000
