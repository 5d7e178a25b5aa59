"""Evaluating, exporting and writing without the model in memory gives what it gives with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from exporting import PRUNED, pruned, save
from safetensors.torch import load_file
from test_checkpoint import MADE
from test_checkpoint import pruned as pruned_source
from transformers import AutoModelForCausalLM, PreTrainedModel

from edgeprune import checkpoint, machine, mapped, sources
from edgeprune.__main__ import main
from edgeprune.errors import BadInput
from edgeprune.events import Event, Note, Progress
from edgeprune.exporters import onnx as exporter
from edgeprune.exporters import parity
from edgeprune.exporters.onnx import MODEL_FILES, export
from edgeprune.inspection import inspect
from edgeprune.perplexity import measure

TEXT = "The value of a name is what it is bound to. " * 60
FIGURES = ("tokens", "words", "window", "stride", "dtype", "text_hash")


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "compute_dtype", lambda _device=None: torch.float32)


# ---- perplexity


@pytest.mark.parametrize("memory", [1, 100_000])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_perplexity_is_the_same_layer_by_layer(family: str, memory: int, tmp_path: Path) -> None:
    source = sources.resolve(tiny.save(family, tmp_path / "model"))
    events: list[Event] = []
    options: dict[str, Any] = {"window": 64, "stride": 40, "max_tokens": 500}
    right = measure(source, TEXT, **options)
    found = measure(source, TEXT, memory=memory, emit=events.append, **options)
    assert found.token_perplexity == pytest.approx(right.token_perplexity, rel=1e-5)
    assert found.word_perplexity == pytest.approx(right.word_perplexity, rel=1e-5)
    for name in FIGURES:
        assert getattr(found, name) == getattr(right, name)
    done = [e for e in events if isinstance(e, Progress) and e.stage == "perplexity"]
    assert [e.done for e in done] == list(range(1, done[0].total + 1))
    assert any(isinstance(e, Note) and "layer by layer" in e.text for e in events)


def test_perplexity_of_stored_bfloat16(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path / "model")
    tiny.model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    source = sources.resolve(tmp_path / "model")
    right, found = (measure(source, TEXT, window=64, memory=m) for m in (None, 1))
    assert found.token_perplexity == pytest.approx(right.token_perplexity, rel=1e-5)
    assert found.dtype == right.dtype == "float32"


def test_the_command_line_takes_a_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tiny.save("llama", tmp_path / "model"))
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = ["ppl", folder, "--text", str(text), "--window", "64", "--json"]
    figures = []
    for budget in ([], ["--memory-budget", "1kB"]):
        assert main([*command, *budget]) == 0
        figures.append(json.loads(capsys.readouterr().out)["token_perplexity"])
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)
    for words in (command, ["export", folder, "--onnx", "-o", str(tmp_path / "out")]):
        assert main([*words, "--memory-budget", "much"]) == 2
        assert "--memory-budget" in capsys.readouterr().err


# ---- export


@pytest.mark.parametrize("precision", ["int4", "int8", "fp16", "fp32"])
@pytest.mark.parametrize("family", ["llama", "llama-untied", "gemma3_text", "phi3", "olmo2"])
def test_an_export_is_the_same_to_the_byte(family: str, precision: str, tmp_path: Path) -> None:
    model = pruned(family, PRUNED).to(torch.bfloat16)
    folder = str(save(model, tmp_path / "model"))
    files = []
    for memory in (None, 1):
        out = tmp_path / f"out-{memory}"
        manifest = export(folder, out, precision=precision, memory=memory)
        assert manifest["parity"]["failure"] is None
        assert manifest["parity"]["reference"] == ("fixed text" if memory else "generated")
        assert (manifest["parity"]["greedy_text_equal"] is None) == bool(memory)
        files.append({name: (out / name).read_bytes() for name in MODEL_FILES})
    assert files[0] == files[1]


def test_no_float32_copy_is_made_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    seen: list[PreTrainedModel] = []
    real = exporter.builder.build

    def build(model: PreTrainedModel, *others: Any) -> None:
        seen.append(model)
        real(model, *others)

    monkeypatch.setattr(exporter.builder, "build", build)
    export(str(folder), tmp_path / "out", memory=1)
    assert all(mapped.is_mapped(p) for p in seen[0].parameters())


@pytest.mark.parametrize("wrong", ["mlp.down_proj", "self_attn.k_proj"])
def test_a_wrong_export_fails_along_the_fixed_text(wrong: str, tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    export(str(folder), tmp_path / "out", precision="fp32", check=False)
    model = sources.load_model(sources.resolve(folder), mapped=True)
    tokenizer = tiny.tokenizer()
    assert (
        parity.check(tmp_path / "out", parity.reference(model, tokenizer), "fp32").failure is None
    )
    layer = model.model.layers[1].get_submodule(wrong)
    layer.weight = torch.nn.Parameter(layer.weight.detach() + 0.1)
    answers = parity.reference(model, tokenizer)
    assert parity.check(tmp_path / "out", answers, "fp32").failure


def test_too_little_memory_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(10**6, 1000))
    for check, advice in ((True, "--no-check"), (False, "close other programs")):
        with pytest.raises(BadInput, match=advice):
            export(str(folder), tmp_path / "out", check=check)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# ---- inspect


def test_inspect_reads_no_weights(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    expected = inspect(folder)
    (folder / "model.safetensors").unlink()
    assert inspect(folder) == expected


# ---- checkpoints in parts


def parts_of(model: PreTrainedModel, order: int) -> list[dict[str, torch.Tensor]]:
    """The parameters of the ends and of each layer, in one order or the other."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        key = ".".join(name.split(".")[:3]) if ".layers." in name else "ends"
        groups.setdefault(key, {})[name] = parameter.detach()
    return list(groups.values())[::order]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_parts_make_the_same_checkpoint(family: str, order: int, tmp_path: Path) -> None:
    source, model = pruned_source(family, tmp_path)
    tokenizer = tiny.tokenizer()
    one, other = tmp_path / "one", tmp_path / "other"
    record = checkpoint.save(model, tokenizer, one, provenance=MADE, source=source)
    again = checkpoint.save_parts(
        model.config, parts_of(model, order), tokenizer, other, provenance=MADE, source=source
    )
    assert again == record
    names = {p.name for p in one.iterdir()}
    assert {p.name for p in other.iterdir()} == names
    for name in names - {"model.safetensors"}:
        if name.endswith(".json"):
            assert json.loads((one / name).read_text()) == json.loads((other / name).read_text())
        else:
            assert (one / name).read_bytes() == (other / name).read_bytes()
    left, right = (load_file(f / "model.safetensors") for f in (one, other))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    stock = AutoModelForCausalLM.from_pretrained(other, trust_remote_code=True)
    ids = torch.arange(20)[None]
    assert torch.equal(stock(ids).logits, model(ids).logits)


def test_several_files_load_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.Writer.__init__, "__defaults__", (100_000,))
    source = sources.resolve(tiny.save("llama-untied", tmp_path / "dense"))
    model = sources.load_model(source)
    out = tmp_path / "out"
    checkpoint.save_parts(
        model.config, parts_of(model, 1), None, out, provenance=MADE, source=source
    )
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    ids = torch.arange(20)[None]
    for again in (
        AutoModelForCausalLM.from_pretrained(out),
        sources.load(out),
        sources.load_model(sources.resolve(out), mapped=True),
    ):
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("fault", ["missing", "twice", "unknown", "misshapen", "two types"])
def test_parts_that_are_not_the_model_leave_nothing(fault: str, tmp_path: Path) -> None:
    source, model = pruned_source("llama", tmp_path)
    parts = parts_of(model, 1)
    name = next(iter(parts[1]))
    if fault == "missing":
        del parts[1][name]
    elif fault == "twice":
        parts.append({name: parts[1][name]})
    elif fault == "unknown":
        parts.append({"nothing.weight": torch.ones(3)})
    elif fault == "misshapen":
        parts[1][name] = parts[1][name][:-1]
    else:
        parts[1][name] = parts[1][name].half()
    with pytest.raises(ValueError, match=r"config asks for|missing"):
        checkpoint.save_parts(
            model.config, parts, None, tmp_path / "out", provenance=MADE, source=source
        )
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, model = pruned_source("llama", tmp_path)

    def save_it() -> None:
        checkpoint.save_parts(
            model.config, parts_of(model, 1), None, tmp_path / "out", provenance={}, source=source
        )

    def fail(*_arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Writer, "finish", fail)
        with pytest.raises(BadInput, match="the disk is full"):
            save_it()
    monkeypatch.setattr(machine, "disk_free", lambda _path: 1000)
    with pytest.raises(BadInput, match="the disk is full"):
        save_it()
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_generation_settings_given_win(tmp_path: Path) -> None:
    source, model = pruned_source("llama", tmp_path)
    given = type(model.generation_config)(max_new_tokens=7)
    checkpoint.save_parts(
        model.config,
        parts_of(model, 1),
        None,
        tmp_path / "out",
        provenance={},
        source=source,
        generation_config=given,
    )
    stored = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert stored["max_new_tokens"] == 7
