"""Models on this machine, and what the Hub finds: no model is made, since none is opened."""

import json
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from edgeprune import library
from edgeprune.errors import EdgepruneError
from edgeprune.library import HubModel, local_models, search


def put_model(folder, model_type="llama", weights=b"12345"):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def put_in_cache(cache, name, *, weights=True, model_type="llama"):
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = put_model(repository / "snapshots" / ("a" * 40), model_type)
    if not weights:
        (snapshot / "model.safetensors").unlink()
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)


@pytest.fixture
def here(monkeypatch, tmp_path):
    """An empty folder to be in, an empty Hub cache, no bundled model."""
    monkeypatch.setattr(library, "_bundled", lambda: [])
    monkeypatch.setattr(
        huggingface_hub, "scan_cache_dir", partial(huggingface_hub.scan_cache_dir, tmp_path / "hub")
    )
    (tmp_path / "hub").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_what_is_here_and_one_level_below_is_listed(here):
    put_model(here / "dense")
    pruned = put_model(here / "run" / "pruned", weights=b"1")
    (pruned / "edgeprune.json").write_text("{}")
    (here / "run" / "small.gguf").write_bytes(b"123")
    put_model(here / "a" / "b" / "too-deep")
    put_model(here / ".hidden")
    put_model(here / "bert", "bert")
    (here / "config.json").write_text("no model")
    found = {Path(model.spec).as_posix(): model for model in local_models()}
    assert set(found) == {"dense", "run/pruned", "run/small.gguf"}
    dense, cut = found["dense"], found["run/pruned"]
    assert (dense.title, dense.kind, dense.bytes, dense.pruned) == ("dense", "folder", 5, False)
    assert (cut.bytes, cut.pruned, cut.recent) == (1, True, False)
    assert found["run/small.gguf"].kind == "gguf"


def test_a_folder_with_very_much_in_it_is_not_searched_to_its_end(here, monkeypatch):
    monkeypatch.setattr(library, "MOST_ENTRIES", 3)
    for number in range(5):
        put_model(here / f"m{number}")
    assert [model.spec for model in local_models()] == ["m0", "m1", "m2"]


def test_the_hubs_cache_is_listed_where_weights_of_a_known_family_are_in_it(here, tmp_path):
    put_in_cache(tmp_path / "hub", "one/whole")
    put_in_cache(tmp_path / "hub", "one/config-only", weights=False)
    put_in_cache(tmp_path / "hub", "one/encoder", model_type="bert")
    (model,) = local_models()
    assert (model.spec, model.title, model.kind, model.bytes) == (
        "one/whole",
        "one/whole",
        "hub",
        5,
    )


def test_recently_used_models_come_first_once_and_only_if_they_are_there(here, tmp_path):
    put_in_cache(tmp_path / "hub", "one/whole")
    put_model(here / "dense")
    far = put_model(tmp_path / "far")
    recent = [str(here / "dense"), "gone/from-the-cache", str(tmp_path / "gone"), str(far)]
    found = local_models(recent)
    assert [(model.spec, model.recent) for model in found] == [
        ("dense", True),
        (str(far), True),
        ("one/whole", False),
    ]


def test_the_bundled_model_is_listed(smollm2):
    assert ("bundled", smollm2) in [(model.kind, model.spec) for model in local_models()]


# ---- the Hub


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: False)


def info(name, config=None, **others):
    return SimpleNamespace(id=name, config=config, **others)


def test_what_the_hub_finds_is_told_as_far_as_the_hub_tells_it(online, monkeypatch):
    whole = info(
        "one/known",
        {"model_type": "qwen3"},
        safetensors=SimpleNamespace(total=600),
        gated="manual",
        downloads=7,
        tags=["x", "license:mit"],
    )
    found = [
        whole,
        info("one/other-family", {"model_type": "bert"}),
        info("one/quantized", {"model_type": "llama", "quantization_config": {"bits": 4}}),
        info("one/silent", tags=None, safetensors=None, gated=False, downloads=None),
        info("one/more", {"model_type": "llama"}),
    ]
    monkeypatch.setattr(library, "_asked", lambda text, limit: found)
    assert search("any", limit=2) == [
        HubModel("one/known", "qwen3", 600, 7, "mit", True),
        HubModel("one/silent", "", None, None, "", False),
    ]


def test_a_hub_that_is_not_there_is_told_and_not_waited_for(online, monkeypatch):
    def refuse(text, limit):
        raise OSError("no route to host")

    monkeypatch.setattr(library, "_asked", refuse)
    with pytest.raises(EdgepruneError, match=r"the Hub cannot be reached \(no route to host"):
        search("any")
    released = threading.Event()
    monkeypatch.setattr(library, "SEARCH_SECONDS", 0.01)
    monkeypatch.setattr(library, "_asked", lambda text, limit: released.wait() or [])
    with pytest.raises(EdgepruneError, match=r"the Hub cannot be reached \(no answer"):
        search("any")
    released.set()


def test_a_hub_that_is_not_to_be_asked_is_not_asked(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: True)
    with pytest.raises(EdgepruneError, match="cannot be reached: HF_HUB_OFFLINE is set"):
        search("any")
