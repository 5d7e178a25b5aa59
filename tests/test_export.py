"""Exporting tiny models of every family, dense and pruned, through the real builder and runtime."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from exporting import PRUNED, build, pruned, save
from transformers import AutoConfig

from edgeprune.errors import BadInput, EdgepruneError
from edgeprune.events import Event, Progress
from edgeprune.exporters import builder, parity
from edgeprune.exporters import onnx as exporter
from edgeprune.exporters.onnx import MANIFEST, export
from edgeprune.exporters.quantize import quantize
from edgeprune.exporters.storage import STORAGE


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("source") / "llama")


@pytest.mark.parametrize("kind", ["dense", "pruned"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_computes_what_pytorch_computes(
    family: str, kind: str, tmp_path: Path
) -> None:
    model = tiny.model(family) if kind == "dense" else pruned(family, PRUNED)
    answers = parity.reference(model, tiny.tokenizer())
    result = parity.check(build(model, tmp_path / "out", "fp32"), answers, "fp32")
    assert result.failure is None
    assert max(result.prompt_max_abs_diff, result.decode_max_abs_diff) < 1e-4
    assert result.greedy_text_equal
    assert result.greedy_agreement == 1


@pytest.mark.parametrize("precision", ["int4", "int8", "fp16"])
@pytest.mark.parametrize("family", ["llama", "llama-untied", "gemma3_text", "phi3"])
def test_fewer_bits_stay_near(family: str, precision: str, tmp_path: Path) -> None:
    model = pruned(family, PRUNED)  # with a width that is no multiple of the blocks
    answers = parity.reference(model, tiny.tokenizer())
    result = parity.check(build(model, tmp_path / "out", precision), answers, precision)
    assert result.failure is None
    assert result.mean_kl < 0.3 * result.unrelated_kl


@pytest.mark.parametrize(
    "layers",
    [
        {0: {"skip": ["attention", "mlp"]}},
        {i: {"skip": ["mlp"]} for i in range(3)},
        {i: {"skip": ["attention", "mlp"]} for i in range(1, 3)},
    ],
    ids=["first layer empty", "no MLP at all", "only the first layer"],
)
@pytest.mark.parametrize("family", ["granite", "gemma3_text", "olmo2"])
def test_layers_may_lose_everything(
    family: str, layers: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    model = pruned(family, layers, num_hidden_layers=3)
    answers = parity.reference(model, tiny.tokenizer())
    result = parity.check(build(model, tmp_path / "out", "fp32"), answers, "fp32")
    assert result.failure is None


def test_long_rotary_embeddings(tmp_path: Path) -> None:
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = tiny.model("llama", rope_parameters=llama3)
    answers = parity.reference(model, tiny.tokenizer())
    result = parity.check(build(model, tmp_path / "out", "fp32"), answers, "fp32")
    assert result.failure is None


def test_the_folder_is_complete(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    manifest = export(str(llama), out, precision="int4")
    assert manifest == json.loads((out / MANIFEST).read_text())
    assert {"genai_config.json", "model.onnx", "model.onnx.data", "tokenizer.json"} <= {
        path.name for path in out.iterdir()
    }
    assert (out / "chat_template.jinja").read_text() == tiny.CHAT_TEMPLATE
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    assert manifest["layers"][0]["num_key_value_heads"] == 2
    assert manifest["parity"]["failure"] is None
    assert (
        str(tmp_path) not in (out / MANIFEST).read_text() + (out / "genai_config.json").read_text()
    )
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_pruned_checkpoint_exports_with_its_widths(tmp_path: Path) -> None:
    checkpoint = save(pruned("llama", PRUNED), tmp_path / "pruned")
    manifest = export(str(checkpoint), tmp_path / "out", precision="fp32")
    assert manifest["layers"][0] == {
        "num_attention_heads": 0,
        "num_key_value_heads": 0,
        "intermediate_size": 96,
    }
    assert manifest["layers"][1]["intermediate_size"] == 40


def test_it_says_nothing_and_leaves_no_names_behind(
    llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, events = list(sys.path), []

    def listen(event: Event) -> None:
        events.append(event)

    export(str(llama), tmp_path / "out", precision="int4", emit=listen)
    assert capfd.readouterr() == ("", "")
    assert sys.path == path
    assert not {"builder", "builders", "quantization", "builder_config"} & set(sys.modules)
    done = [e.done for e in events if isinstance(e, Progress) and e.stage == "export"]
    assert done == [1, 2, 3, 4]
    assert events[-1].kind == "stage_finished"


# ---- what is refused, and what is left behind


def test_a_failed_check_keeps_the_export_under_another_name(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builder.build

    def corrupt(model, *args: Any) -> None:
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[0] += 0.5
        real(model, *args)

    monkeypatch.setattr(builder, "build", corrupt)
    for kept in ("out.failed-parity", "out.failed-parity-2"):
        with pytest.raises(
            EdgepruneError, match=r"does not agree with PyTorch.*failed-parity"
        ) as e:
            export(str(llama), tmp_path / "out", precision="fp32")
        assert e.value.exit_code == 1
        assert (tmp_path / kept / "model.onnx").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "out.failed-parity",
        "out.failed-parity-2",
    ]


def test_a_check_that_is_not_wanted_is_not_made(llama: Path, tmp_path: Path) -> None:
    assert export(str(llama), tmp_path / "out", precision="int8", check=False)["parity"] is None


@pytest.mark.parametrize("content", ["file", "folder"])
def test_what_is_there_is_not_overwritten(llama: Path, tmp_path: Path, content: str) -> None:
    out = tmp_path / "out"
    if content == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    with pytest.raises(BadInput, match="out is"):
        export(str(llama), out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_filled(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(str(llama), tmp_path / "out", precision="int8", check=False)
    assert (tmp_path / "out" / "model.onnx").is_file()


def test_an_unknown_precision_names_the_known(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="int4, int8, fp16, fp32"):
        export(str(llama), tmp_path / "out", precision="int3")


def test_a_disk_that_is_too_small_is_seen_before_any_work(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(exporter.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(BadInput, match="MB free"):
        export(str(llama), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_model, _tokenizer, folder: Path, *_args: Any) -> None:
        (folder / "model.onnx.data").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(builder, "build", full)
    with pytest.raises(BadInput, match=r"disk of .* is full"):
        export(str(llama), tmp_path / "out", check=False)
    assert not list(tmp_path.iterdir())


def test_rotary_embeddings_the_builder_gets_wrong_are_refused() -> None:
    config = tiny.config("llama", rope_parameters={"rope_type": "linear", "factor": 2.0})
    with pytest.raises(BadInput, match="rotary embedding 'linear'"):
        builder.check_supported(config)


def test_what_the_builder_cannot_do_is_bad_input(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "source", hidden_act="quick_gelu")
    with pytest.raises(BadInput, match="quick_gelu"):
        export(str(source), tmp_path / "out", check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_unknown_families_are_refused_by_name() -> None:
    with pytest.raises(BadInput, match=r"'gpt2'.*llama, mistral"):
        builder.check_supported(AutoConfig.for_model("gpt2"))


# ---- blocks


@pytest.mark.parametrize(("bits", "columns"), [(4, 64), (4, 40), (8, 64), (8, 40)])
def test_blocks_read_back(bits: int, columns: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, columns)
    blocks = quantize(weight, bits, 32)
    assert blocks.scales.shape == (6, 2)
    back = dequantized(blocks)[:, :columns]
    step = blocks.scales.abs().max()
    assert (weight - back).abs().max() < (3 if bits == 4 else 0.6) * step
    assert (weight - back).square().mean() < (0.02 if bits == 4 else 1e-4)


def test_zeros_stay_zeros() -> None:
    assert dequantized(quantize(torch.zeros(2, 32), 4, 32)).abs().max() == 0


def dequantized(blocks) -> torch.Tensor:
    levels, zeros = blocks.weight, torch.full(blocks.scales.shape, 128)
    if blocks.bits == 4:
        levels = nibbles(blocks.weight)
        zeros = nibbles(blocks.zeros)[:, : blocks.scales.shape[1]]
    return ((levels - zeros[..., None].float()) * blocks.scales[..., None]).flatten(1)


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).float()


def test_storage_of_every_precision() -> None:
    assert list(STORAGE) == ["int4", "int8", "fp16", "fp32"]
