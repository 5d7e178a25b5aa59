import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgeprune import checkpoint, machine, sources
from edgeprune.errors import BadInput, EdgepruneError
from edgeprune.nonuniform import class_for, layer_widths

MADE = {"options": {"sparsity": 0.3, "seed": 0}, "calibration": {"sha256": "00ff"}}


def pruned(family: str, folder: Path):
    """A tiny source and a model with a narrow layer, one without attention, one without MLP."""
    source = sources.resolve(tiny.save(family, folder / "dense"))
    config = sources.load_config(source)
    queries = config.num_attention_heads // config.num_key_value_heads
    config.allow_global_per_layer_attribute_access = True
    config.per_layer_config = {
        0: {"num_attention_heads": queries, "num_key_value_heads": 1, "intermediate_size": 64},
        1: {"num_attention_heads": 1, "num_key_value_heads": 1, "skip": ["attention"]},
        2: {"skip": ["mlp"]},
    }
    torch.manual_seed(1)
    return source, class_for(config.model_type)(config).eval()


def saved(family: str, folder: Path):
    source, model = pruned(family, folder)
    checkpoint.save(model, tiny.tokenizer(), folder / "pruned", provenance=MADE, source=source)
    return model, folder / "pruned"


def prompt(tokenizer=None):
    return (tokenizer or tiny.tokenizer())("The value of a name", return_tensors="pt").input_ids


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_round_trip_is_exact_and_the_cache_changes_nothing(family, tmp_path):
    model, folder = saved(family, tmp_path)
    source = sources.resolve(folder)
    again = sources.load_model(source)
    ids = prompt(sources.load_tokenizer(source))
    assert type(again) is type(model)
    assert layer_widths(again.config) == layer_widths(model.config)
    assert torch.equal(model(ids).logits, again(ids).logits)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(
        again.generate(ids, **options), again.generate(ids, use_cache=False, **options)
    )

    second = tmp_path / "second"
    checkpoint.save(again, tiny.tokenizer(), second, provenance=MADE, source=source)
    assert torch.equal(sources.load(second)(ids).logits, model(ids).logits)
    assert (second / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()


def test_loads_where_edgeprune_is_not_installed(tmp_path):
    families = ("llama", "gemma3_text", "phi3")
    for family in families:
        model, folder = saved(family, tmp_path / family)
        save_file({"logits": model(prompt()).logits}, folder.parent / "logits.safetensors")
    script = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "edgeprune":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import pathlib, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from safetensors.torch import load_file
try:
    import edgeprune
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("edgeprune is there")
for folder in map(pathlib.Path, sys.argv[1:]):
    model = AutoModelForCausalLM.from_pretrained(folder / "pruned", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "pruned")
    ids = tokenizer("The value of a name", return_tensors="pt").input_ids
    assert torch.equal(model(ids).logits, load_file(folder / "logits.safetensors")["logits"])
    model.generate(ids, max_new_tokens=3)
    model.save_pretrained(folder / "again")
    again = AutoModelForCausalLM.from_pretrained(folder / "again", trust_remote_code=True)
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert "edgeprune" not in sys.modules
"""
    env = {**os.environ, "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, *(str(tmp_path / f) for f in families)],
        env=env,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    # what was saved there is still a checkpoint of ours
    assert type(sources.load(tmp_path / "llama" / "again")) is class_for("llama")


def test_trains_with_gradient_checkpointing(tmp_path):
    model, _ = saved("llama", tmp_path)
    model.train()
    ids = prompt()
    model(ids, labels=ids).loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name])


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
def test_bf16_and_eager_attention_are_close(family, tmp_path):
    model, folder = saved(family, tmp_path)
    ids = prompt()
    expected = model(ids).logits
    eager = sources.load(folder)
    eager.set_attn_implementation("eager")
    torch.testing.assert_close(eager(ids).logits, expected, atol=1e-4, rtol=1e-4)
    half = sources.load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    drift = (half(ids).logits.float() - expected).abs().mean() / expected.abs().mean()
    assert drift < 0.05


def test_carries_everything_that_a_user_needs(tmp_path):
    _, folder = saved("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoModelForCausalLM": "modeling_edgeprune.NonUniformLlamaForCausalLM"
    }
    assert (folder / "modeling_edgeprune.py").is_file()
    assert not (folder / "nonuniform.py").exists()
    assert AutoTokenizer.from_pretrained(folder).chat_template == tiny.CHAT_TEMPLATE
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["max_new_tokens"] == 32

    record = checkpoint.read_provenance(folder)
    assert record["schema_version"] == 1
    assert record["made"] == MADE
    assert record["source"]["name"] == "dense"
    assert record["parameters"]["total"] < record["parameters"]["dense_total"]
    assert record["layers"][1]["num_key_value_heads"] == 0
    assert {"edgeprune", "torch", "transformers", "python"} <= set(record["versions"])

    card = (folder / "README.md").read_text()
    assert f"{record['parameters']['total']:,}" in card
    assert "trust_remote_code=True" in card
    for file in folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), f"{file.name} names this machine"


def test_a_pruned_source_keeps_its_own_history(tmp_path):
    _, folder = saved("llama", tmp_path)
    source = sources.resolve(folder)
    model = sources.load_model(source)
    record = checkpoint.save(model, None, tmp_path / "third", provenance={}, source=source)
    assert record["source"]["provenance"]["made"] == MADE


def test_a_dense_model_is_a_plain_checkpoint(tmp_path):
    source = sources.resolve(tiny.save("qwen2", tmp_path / "dense"))
    model = sources.load_model(source)
    checkpoint.save(model, tiny.tokenizer(), tmp_path / "copy", provenance={}, source=source)
    assert not list((tmp_path / "copy").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "copy" / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert torch.equal(plain(prompt()).logits, model(prompt()).logits)


def test_tied_embeddings_are_stored_once(tmp_path):
    model, folder = saved("llama", tmp_path)
    stored = (folder / "model.safetensors").stat().st_size
    assert stored < sum(p.numel() for p in model.parameters()) * 4 + 20_000
    again = sources.load(folder)
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.skipif(os.name == "nt", reason="no such permissions there")
def test_files_have_the_permissions_of_the_umask(tmp_path):
    _, folder = saved("llama", tmp_path)
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


# ---- outputs that cannot be


def test_an_output_that_is_not_empty_is_left_alone(tmp_path):
    source, model = pruned("llama", tmp_path)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("precious")
    for attempt in (
        lambda: checkpoint.check_output(full),
        lambda: checkpoint.save(model, None, full, provenance={}, source=source),
    ):
        with pytest.raises(BadInput, match="is not empty"):
            attempt()
    assert [f.name for f in full.iterdir()] == ["mine"]


def test_an_empty_output_folder_is_used(tmp_path):
    (tmp_path / "pruned").mkdir()
    checkpoint.check_output(tmp_path / "pruned")
    _, folder = saved("llama", tmp_path)
    assert (folder / "config.json").is_file()


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="is a file"):
        checkpoint.check_output(tmp_path / "file")
    with pytest.raises(BadInput, match="cannot be written"):
        checkpoint.check_output(tmp_path / "file" / "below")


def test_too_little_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    source, model = pruned("llama", tmp_path)
    monkeypatch.setattr(machine, "disk_free", lambda _path: 1_000_000)
    with pytest.raises(BadInput, match=r"the disk is full.*1(\.0+)? ?MB are free"):
        checkpoint.save(model, None, tmp_path / "out", provenance={}, source=source)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch, error):
    source, model = pruned("llama", tmp_path)
    write = type(model).save_pretrained

    def fails(self, folder, **options):
        write(self, folder, **options)
        raise error

    monkeypatch.setattr(type(model), "save_pretrained", fails)
    with pytest.raises(EdgepruneError, match="the disk is full"):
        checkpoint.save(model, None, tmp_path / "out", provenance={}, source=source)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small file system")
def test_a_really_full_disk(tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=256k", "none", str(small)], capture_output=True
    )
    if not made or made.returncode:
        pytest.skip("may not mount a file system here")
    try:
        source, model = pruned("llama", tmp_path)
        monkeypatch.setattr(machine, "disk_free", lambda _path: 10**12)
        with pytest.raises(EdgepruneError, match="the disk is full"):
            checkpoint.save(model, None, small / "out", provenance={}, source=source)
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_what_a_killed_process_left_is_swept_away(tmp_path):
    source, model = pruned("llama", tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / f".out.{dead.pid}.part"
    left.mkdir()
    (left / "half").write_text("x")
    checkpoint.save(model, None, tmp_path / "out", provenance={}, source=source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "out"]
