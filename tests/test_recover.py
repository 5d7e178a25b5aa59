"""Recovery from end to end: of a model as it is, and in turns with pruning."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import edgeprune
from edgeprune import machine, outlook, recipe
from edgeprune.__main__ import main
from edgeprune.errors import BadInput
from edgeprune.events import Evaluation, Note, PruneIteration, TrainStep
from edgeprune.groups import describe_layers
from edgeprune.provenance import read_provenance
from edgeprune.recovery import recover as recovery
from edgeprune.recovery.recover import prune_and_recover, recover
from edgeprune.recovery.settings import Training, training_for
from edgeprune.recovery.stages import plan
from tests import tiny

LENGTH, BATCH = 32, 4
PRUNING = {"iterations": 3, "samples": 4, "length": 16, "repair_samples": 4, "width_multiple": 8}


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    monkeypatch.setattr(machine, "compute_dtype", lambda *_: torch.float32)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("recover") / "dense")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def training(steps=6, **others):
    rates = {"learning_rate": 3e-3, "min_learning_rate": 3e-4, "micro_batch": 2}
    return Training(steps * BATCH * LENGTH, length=LENGTH, batch=BATCH, **rates | others)


def trained(dense, output, cache, **others):
    wanted = {"data": ["builtin"], "training": training(), "held_out": 500, "cache": cache}
    return recover(dense, output, **wanted | others)


def interleaved(dense, output, cache, **others):
    wanted = {
        "target": {"sparsity": 0.4},
        "pruning": PRUNING,
        "data": ["builtin"],
        "training": training(),
        "interleavings": 3,
        "held_out": 500,
        "cache": cache,
        "work": output.with_name("work"),
    }
    return prune_and_recover(dense, output, **wanted | others)


@pytest.fixture(scope="module")
def uninterrupted(dense, cache, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "compute_dtype", lambda *_: torch.float32)
        interleaved(dense, output, cache)
    return output


def weights(folder):
    return edgeprune.load(folder).state_dict()


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(folder):
    """Return the held-out losses in a checkpoint's record, [(update, loss), ...]."""
    found = read_provenance(folder)["made"]["recovery"]["held_out_loss"]
    return [(each["step"], each["loss"]) for each in found]


# ---- the plan


@given(
    st.integers(1_000, 10**9),
    st.floats(0.01, 0.95),
    st.integers(1, 20),
    st.integers(20, 10_000),
    st.sampled_from(["geometric", "linear"]),
)
def test_the_stages_add_up(decoder, sparsity, count, steps, spacing):
    removed = round(decoder * sparsity)
    stages = plan(decoder, removed, steps, count, spacing)
    assert len(stages) == count
    assert (stages[-1].removed, stages[-1].until) == (removed, steps)
    for number, stage in enumerate(stages, start=1):
        share = number * (number + 1) / (count * (count + 1))  # the sum of 2i / (N (N + 1))
        assert abs(stage.until - steps * share) <= 0.5
        before = stages[number - 2] if number > 1 else None
        assert before is None or (before.removed <= stage.removed and before.until <= stage.until)


def test_geometric_stages_remove_the_same_share_and_linear_ones_the_same_number():
    left = [1_000_000] + [1_000_000 - s.removed for s in plan(1_000_000, 600_000, 100, 5)]
    shares = [b / a for a, b in pairwise(left)]
    assert max(shares) - min(shares) < 1e-5
    removed = [s.removed for s in plan(1_000_000, 600_000, 100, 5, "linear")]
    assert removed == [120_000, 240_000, 360_000, 480_000, 600_000]


def test_more_stages_than_updates_are_refused():
    with pytest.raises(BadInput, match="3 updates cannot be shared by 4 interleavings"):
        plan(1000, 100, 3, 4)


def test_the_settings_follow_the_tokens_and_are_told():
    notes = []
    small = training_for(300_000, notes.append)
    assert small.steps >= 500
    assert small.batch < 128
    assert training_for(10**9).batch == 128
    assert training_for(10**9).learning_rate == 2e-5 < small.learning_rate <= 2e-4
    assert f"{small.steps} updates of {small.batch}" in notes[0].text
    assert training_for(300_000, batch=2, learning_rate=1e-3).learning_rate == 1e-3
    assert training_for(300_000, learning_rate=1e-3).min_learning_rate == 1e-4
    assert training_for(300_000, min_learning_rate=0.0).min_learning_rate == 0
    assert training_for(300_000, warmup=0.3).decay == 0.7
    assert training_for(300_000, warmup=0.3, decay=0.2).schedule.decay == 0.2
    with pytest.raises(BadInput, match="less than one update"):
        training_for(1000, batch=128)


def test_the_command_line_and_a_recipe_set_the_schedule_alike(monkeypatch, tmp_path):
    asked = []

    def listen(*_, training, **__):
        asked.append(training)
        raise BadInput("enough")

    monkeypatch.setattr(recovery, "recover", listen)
    wanted = {
        "min_learning_rate": 0.0,
        "warmup": 0.1,
        "decay": 0.5,
        "clip": 2.0,
        "weight_decay": 0.1,
    }
    options = [f"--{name.replace('_', '-')}={value}" for name, value in wanted.items()]
    given = ["--data", "builtin", "--tokens", "100k", *options]
    assert main(["recover", "m", "-o", str(tmp_path / "out"), *given]) == 2
    assert {name: getattr(asked[0], name) for name in wanted} == wanted
    section = {"data": ["builtin"], "tokens": "100k", "distill": 0.0} | wanted
    assert outlook.settings_of(recipe.RecoverSection(**section)) == asked[0]


# ---- training alone


@pytest.mark.parametrize(("after", "warned"), [(2.5, False), (3.5, True)])
def test_a_training_that_makes_the_model_worse_is_told(after, warned):
    told = []
    listener = recovery._Evaluations(told.append)
    for step, loss in ((5, 1.0), (5, 3.0), (7, 2.0), (10, after)):  # cut anew after the fifth
        listener(Evaluation(step=step, loss=loss, perplexity=math.exp(loss), tokens=9))
    listener.warn_if_worse(since=5)
    notes = [event.text for event in told if isinstance(event, Note)]
    assert [f"from 3.000 to {after:.3f}" in text for text in notes] == [True] * warned


def test_training_lowers_the_loss_on_held_out_text_and_leaves_an_ordinary_checkpoint(
    dense, tmp_path, cache
):
    events = []
    record = trained(dense, tmp_path / "out", cache, training=training(60), emit=events.append)
    losses = [event.loss for event in events if isinstance(event, Evaluation)]
    assert losses[-1] < losses[0] - 0.05
    assert [e.step for e in events if isinstance(e, TrainStep)] == list(range(1, 61))
    assert record == read_provenance(tmp_path / "out")
    told = record["made"]["recovery"]
    assert told["data"] == ["builtin"]
    assert told["held_out_loss"][-1] == {"step": 60, "loss": losses[-1]}
    before, after = weights(dense), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_a_training_that_was_killed_goes_on_to_the_same_weights(dense, tmp_path, cache):
    trained(dense, tmp_path / "whole", cache)

    def kill(event):
        if isinstance(event, TrainStep) and event.step == 4:
            raise Killed

    work = tmp_path / "work"
    with pytest.raises(Killed):
        trained(dense, tmp_path / "out", cache, work=work, minutes=0.0, emit=kill)
    assert not (tmp_path / "out").exists()
    steps = []
    trained(dense, tmp_path / "out", cache, work=work, minutes=0.0, emit=steps.append)
    assert next(e.step for e in steps if isinstance(e, TrainStep)) == 4
    assert same(tmp_path / "whole", tmp_path / "out")
    assert losses(tmp_path / "whole") == losses(tmp_path / "out")
    assert not work.exists()


def test_distilling_needs_a_teacher(dense, tmp_path, cache):
    with pytest.raises(BadInput, match="--teacher"):
        trained(dense, tmp_path / "out", cache, training=training(distill=0.5))
    record = trained(
        dense, tmp_path / "out", cache, training=training(1, distill=0.5), teacher=str(dense)
    )
    assert record["made"]["recovery"]["teacher"] == str(dense)


def test_a_pruned_model_keeps_its_widths(dense, tmp_path, cache):
    edgeprune.prune(dense, tmp_path / "pruned", sparsity=0.4, **PRUNING)
    record = trained(tmp_path / "pruned", tmp_path / "out", cache)
    assert record["layers"] == read_provenance(tmp_path / "pruned")["layers"]


# ---- in turns with pruning


def test_the_target_is_met_and_each_stage_is_trained(dense, tmp_path, cache):
    events = []
    record = interleaved(dense, tmp_path / "out", cache, emit=events.append)
    counts = record["parameters"]
    assert 0.4 <= 1 - counts["decoder"] / counts["dense_decoder"] < 0.44
    assert [e.step for e in events if isinstance(e, TrainStep)] == list(range(1, 7))
    order = [type(e) for e in events if isinstance(e, PruneIteration | TrainStep)]
    # 3 iterations are shared by 3 stages, of 1, 2 and 3 updates
    assert order == [PruneIteration, TrainStep] + [PruneIteration] + 2 * [TrainStep] + [
        PruneIteration
    ] + 3 * [TrainStep]
    cuts = [e for e in events if isinstance(e, PruneIteration)]
    assert [(e.iteration, e.of) for e in cuts] == [(1, 3), (2, 3), (3, 3)]
    left = [e.decoder_parameters for e in cuts]
    assert left == sorted(left, reverse=True)
    for cut in cuts:  # of the dense model, whose layers are alike here
        whole = counts["dense_decoder"]
        assert sum(cut.layer_sparsity) / 4 == pytest.approx(1 - cut.decoder_parameters / whole)
    assert record["made"]["recovery"]["interleavings"] == 3
    # after every update of so few, and before the last stage, which begins after the third
    assert [step for step, _ in losses(tmp_path / "out")] == [1, 2, 3, 3, 4, 5, 6]
    assert record["source"]["name"] == "dense"
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5, 7, 8, 9])
def test_a_run_that_was_killed_goes_on_to_the_same_model(
    dense, tmp_path, cache, uninterrupted, stop_at
):
    seen = 0

    def kill(event):
        nonlocal seen
        seen += isinstance(event, PruneIteration | TrainStep)
        if seen == stop_at:
            raise Killed

    with pytest.raises(Killed):
        interleaved(dense, tmp_path / "out", cache, minutes=0.0, emit=kill)
    interleaved(dense, tmp_path / "out", cache, minutes=0.0)
    assert same(uninterrupted, tmp_path / "out")
    assert losses(uninterrupted) == losses(tmp_path / "out")


def test_one_interleaving_is_to_prune_and_then_to_train(dense, tmp_path, cache):
    interleaved(dense, tmp_path / "both", cache, interleavings=1)
    edgeprune.prune(dense, tmp_path / "pruned", sparsity=0.4, **PRUNING)
    trained(tmp_path / "pruned", tmp_path / "out", cache)
    assert same(tmp_path / "both", tmp_path / "out")
    assert losses(tmp_path / "both") == losses(tmp_path / "out")
    assert next(step for step, _ in losses(tmp_path / "out")) == 0


def test_moments_that_are_kept_make_a_difference(dense, tmp_path, cache, uninterrupted):
    interleaved(dense, tmp_path / "anew", cache, keep_moments=False)
    assert not same(uninterrupted, tmp_path / "anew")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_carried_tensor_is_cut_like_the_weight(family, tmp_path):
    source = tiny.save(family, tmp_path / "dense")
    options = PRUNING | {"iterations": 1, "repair_samples": 0}
    edgeprune.prune(source, tmp_path / "out", sparsity=0.3, kept=tmp_path / "kept", **options)
    model, found = edgeprune.load(source), weights(tmp_path / "out")
    kept = recovery.state_file.read_kept(tmp_path / "kept")
    assert len(kept) == len(describe_layers(model.config))
    carry = recovery._carrier(model.config, kept)
    for name, weight in model.named_parameters():
        if name in found:
            assert torch.equal(carry(name, weight.detach()), found[name])


def test_a_memory_target_is_met_by_the_last_stage(dense, tmp_path, cache):
    from edgeprune.exporters.sizes import file_bytes

    config = edgeprune.load(dense).config
    goal = int(file_bytes(config, "fp32") * 0.8)
    interleaved(
        dense, tmp_path / "out", cache, target={"memory": goal}, precision="fp32", interleavings=2
    )
    assert file_bytes(edgeprune.load(tmp_path / "out").config, "fp32") <= goal


def test_bad_input_leaves_nothing(dense, tmp_path, cache):
    for others in (
        {"data": []},
        {"data": ["no such file.txt"]},
        {"interleavings": 7},
        {"training": replace(training(), learning_rate=math.nan)},
        {"target": {"sparsity": 1.5}},
    ):
        with pytest.raises(BadInput) as raised:
            interleaved(dense, tmp_path / "out", cache, **others)
        assert "\n" not in str(raised.value)
        assert list(tmp_path.iterdir()) == []


def test_what_is_done_is_told(dense, tmp_path, cache):
    events = []
    interleaved(dense, tmp_path / "out", cache, emit=events.append)
    said = [e.text for e in events if isinstance(e, Note)]
    assert "stage 2 of 3: pruning" in said


def test_what_will_not_fit_is_refused_before_anything_is_done(dense, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(recovery.memory, "free_memory", lambda _device: 1000)
    for work in (trained, interleaved):
        with pytest.raises(BadInput, match="training takes about"):
            work(dense, tmp_path / "out", cache)
        assert list(tmp_path.iterdir()) == []


def test_the_card_of_a_model_that_was_only_trained_says_so(dense, tmp_path, cache):
    trained(dense, tmp_path / "out", cache)
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "# dense, trained further" in card
    assert "pruned" not in card.partition("## Loading")[0]
