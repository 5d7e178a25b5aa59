"""Models that stay in their files: the same values, refused as before, in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from exporting import PRUNED, pruned, save
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_sources import edit_weights, write_gguf
from transformers import PreTrainedModel

from edgeprune import mapped, shards, sources
from edgeprune.errors import BadInput

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def both(folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    source = sources.resolve(folder)
    return sources.load_model(source), sources.load_model(source, mapped=True)


def same(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """The same parameters, buffers, settings and logits."""
    for kind in ("named_parameters", "named_buffers"):
        left, right = dict(getattr(model, kind)()), dict(getattr(other, kind)())
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert tensor.dtype == right[name].dtype, name
            assert torch.equal(tensor, right[name]), name
    assert model.dtype == other.dtype == other.config.dtype
    assert model.training is other.training is False
    assert model.generation_config.to_dict() == other.generation_config.to_dict()
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied
    ids = torch.arange(40).view(2, 20)
    assert torch.equal(model(ids).logits, other(ids).logits)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_is_the_same_mapped(family: str, tmp_path: Path) -> None:
    model, other = both(tiny.save(family, tmp_path / "model"))
    same(model, other)
    assert all(mapped.is_mapped(p) for p in other.parameters())
    assert not mapped.is_mapped(model)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_a_pruned_checkpoint_is_the_same_mapped(family: str, tmp_path: Path) -> None:
    same(*both(save(pruned(family, PRUNED), tmp_path / "pruned")))


def test_bfloat16_in_several_files(tmp_path: Path) -> None:
    model = tiny.model("llama-untied").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    same(*both(tmp_path / "model"))


@pytest.mark.parametrize("away", ["model.", "language_model."])
def test_names_may_have_another_prefix(away: str, tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    expected = sources.load(folder)

    def rename(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            new = name.removeprefix(away) if away == "model." else away + name
            weights[new] = weights.pop(name)

    edit_weights(folder, rename)
    same(expected, sources.load_model(sources.resolve(folder), mapped=True))


def test_a_head_stored_beside_its_twin_or_instead_of_it(tmp_path: Path) -> None:
    for way in ("beside", "instead"):
        folder = tiny.save("llama", tmp_path / way)

        def change(weights: dict[str, torch.Tensor], way: str = way) -> None:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
            if way == "instead":
                del weights["model.embed_tokens.weight"]

        edit_weights(folder, change)
        same(*both(folder))


@pytest.mark.parametrize("fault", ["missing", "misshapen", "nan", "infinite"])
def test_the_same_faults_are_refused_in_the_same_words(fault: str, tmp_path: Path) -> None:
    folder = tiny.save("qwen2", tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"

    def damage(weights: dict[str, torch.Tensor]) -> None:
        if fault == "missing":
            del weights[name]
        elif fault == "misshapen":
            weights[name] = weights[name][:-1].contiguous()
        else:
            weights[name][3, 3] = float("nan") if fault == "nan" else float("inf")

    edit_weights(folder, damage)
    messages = []
    for kind in (False, True):
        with pytest.raises(BadInput, match=name) as error:
            sources.load_model(sources.resolve(folder), mapped=kind)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_types_that_are_not_read(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    name = "model.norm.weight"
    edit_weights(folder, lambda w: w.update({name: w[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(BadInput, match="F8_E4M3"):
        sources.load_model(sources.resolve(folder), mapped=True)
    with pytest.raises(ValueError, match="has the type"):
        sources.load_model(sources.resolve(folder), mapped=True, dtype=torch.float32)


def test_a_gguf_is_unpacked_once(tmp_path: Path) -> None:
    source = sources.resolve(write_gguf(tmp_path / "tiny.gguf"))
    scratch = tmp_path / "scratch"
    model = sources.load_model(source, mapped=True, scratch=scratch)
    same(sources.load_model(source), model)
    files = {path: path.stat().st_mtime_ns for path in scratch.iterdir()}
    sources.load_model(source, mapped=True, scratch=scratch)
    assert {path: path.stat().st_mtime_ns for path in scratch.iterdir()} == files
    with pytest.raises(BadInput, match="scratch"):
        sources.load_model(source, mapped=True)


def test_opened_maps_what_is_larger_than_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    folder = tiny.save("llama", tmp_path / "model")
    size = sum(p.numel() for p in tiny.model("llama").parameters()) * 4
    for model in (folder, write_gguf(tmp_path / "tiny.gguf")):
        source = sources.resolve(model)
        for memory, expected in ((size, False), (size - 1, True), (None, False)):
            with sources.opened(source, memory=memory, dtype=torch.float32) as loaded:
                assert mapped.is_mapped(loaded) == expected
    assert not list((tmp_path / "scratch").iterdir())
    monkeypatch.setattr(sources.machine, "disk_free", lambda _path: 1000)
    with (
        pytest.raises(BadInput, match="TMPDIR=DIR"),
        sources.opened(sources.resolve(tmp_path / "tiny.gguf"), memory=1, dtype=torch.float32),
    ):
        pass


# ---- pages


def big(folder: Path, rows: int = 8192) -> dict[str, torch.Tensor]:
    """Three tensors of 32 MB each, mapped."""
    values = torch.arange(rows * 1024, dtype=torch.float32).view(rows, 1024)
    save_file({name: values + i for i, name in enumerate("abc")}, folder / "big.safetensors")
    return mapped.map_tensors(folder / "big.safetensors")


@LINUX
def test_memory_grows_with_what_is_touched_and_shrinks_again(tmp_path: Path) -> None:
    big(tmp_path)
    script = """
import sys, torch
from pathlib import Path
from edgeprune import mapped
torch.ones(8).sum()
before = mapped.resident()
tensors = mapped.map_tensors(Path(sys.argv[1]))
loaded = mapped.resident()
sums = [float(t.sum(dtype=torch.float64)) for t in tensors.values()]
touched = mapped.resident()
for t in tensors.values():
    mapped.release(t)
released = mapped.resident()
again = [float(t.sum(dtype=torch.float64)) for t in tensors.values()]
assert sums == again
print(loaded - before, touched - before, released - before, mapped.peak_resident() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "big.safetensors")],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded, touched, released, peak = map(int, done.stdout.split())
    size = 3 * 8192 * 4096
    assert loaded < size / 10
    assert touched > size * 0.9
    assert released < size / 5
    assert peak >= touched


def test_ordinary_memory_is_left_alone(tmp_path: Path) -> None:
    """DONTNEED on memory that is no file would clear it."""
    tensor = torch.ones(1 << 20)
    linear = torch.nn.Linear(512, 512)
    before = linear.weight.detach().clone()
    for each in (tensor, linear, tensor[5:], torch.ones(3, device="meta"), torch.empty(0)):
        mapped.release(each)
        mapped.prefetch(each)
        assert not mapped.is_mapped(each)
    assert bool((tensor == 1).all())
    assert torch.equal(linear.weight, before)
    copy = big(tmp_path)["a"].clone()
    expected = copy.clone()
    mapped.release(copy)
    assert torch.equal(copy, expected)


@given(st.data())
def test_releasing_any_part_changes_no_value(data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        shapes = data.draw(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 200)), min_size=1))
        kinds = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8])
        tensors = {
            f"t{i}": torch.randint(0, 100, shape).to(data.draw(kinds))
            for i, shape in enumerate(shapes)
        }
        with shards.Writer(Path(folder), list(tensors), shard_bytes=20_000) as writer:
            writer.add(tensors)
            writer.finish()
        found: dict[str, torch.Tensor] = {}
        for path in Path(folder).glob("*.safetensors"):
            found |= mapped.map_tensors(path)
            load_file(path)  # the official reader takes it too
        assert found.keys() == tensors.keys() == writer.written
        for name in data.draw(st.lists(st.sampled_from(sorted(found)))):
            mapped.prefetch(found[name])
            mapped.release(found[name][1:])
            mapped.release(found[name].T)
        for name, tensor in tensors.items():
            assert torch.equal(found[name], tensor)
            assert found[name].dtype == tensor.dtype


def test_several_files_have_an_index(tmp_path: Path) -> None:
    tensors = {name: torch.ones(1000) for name in "abcde"}
    with shards.Writer(tmp_path, list(tensors), shard_bytes=8000) as writer:
        writer.add(tensors)
        writer.finish()
    index = json.loads((tmp_path / shards.INDEX).read_text())
    assert index["metadata"]["total_size"] == writer.bytes == 20_000
    assert index["weight_map"].keys() == tensors.keys()
    names = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert set(index["weight_map"].values()) == names
    assert {p.name for p in tmp_path.iterdir()} == names | {shards.INDEX}


@pytest.mark.skipif(os.name == "nt", reason="open files cannot be replaced there")
def test_a_mapping_that_is_gone_gets_no_advice(tmp_path: Path) -> None:
    tensors = big(tmp_path, rows=64)
    address = tensors["a"].untyped_storage().data_ptr()
    assert address in mapped._MAPPINGS
    del tensors
    assert mapped._MAPPINGS[address]() is None


# ---- running layer by layer


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_walk_computes_what_the_model_computes(family: str, tmp_path: Path) -> None:
    model, other = both(tiny.save(family, tmp_path / "model"))
    batches = [torch.randint(0, 320, (2, 30)), torch.randint(0, 320, (1, 7))]
    walk = mapped.Walk(other, torch.float32)
    ticks: list[int] = []
    for ids, hidden in zip(batches, walk.hidden(batches, lambda: ticks.append(1)), strict=True):
        with torch.inference_mode():
            torch.testing.assert_close(walk.logits(hidden), model(ids).logits)
    assert len(ticks) == 2 * model.config.num_hidden_layers


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "granite"])
def test_a_walk_in_another_type_is_the_model_in_that_type(family: str, tmp_path: Path) -> None:
    tiny.model(family).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    source = sources.resolve(tmp_path / "model")
    model = sources.load_model(source, dtype=torch.float32)
    walk = mapped.Walk(sources.load_model(source, mapped=True), torch.float32)
    ids = torch.randint(0, 320, (1, 20))
    with torch.inference_mode():
        torch.testing.assert_close(walk.logits(walk.hidden([ids])[0]), model(ids).logits)


def test_a_walk_of_a_pruned_model(tmp_path: Path) -> None:
    model, other = both(save(pruned("llama", PRUNED), tmp_path / "pruned"))
    ids = torch.randint(0, 320, (1, 20))
    walk = mapped.Walk(other, torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(walk.logits(walk.hidden([ids])[0]), model(ids).logits)
