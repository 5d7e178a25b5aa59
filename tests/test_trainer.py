"""Recovery training: what an update is, that nothing is lost, and when it stops."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from edgeprune import machine
from edgeprune.errors import BadInput, EdgepruneError
from edgeprune.events import Evaluation, TrainStep, event_from_json
from edgeprune.groups import Kept, cut, describe_layers
from edgeprune.pruned import cut_model
from edgeprune.recovery import checkpoints
from edgeprune.recovery.objective import Objective
from edgeprune.recovery.settings import Training
from edgeprune.recovery.trainer import Trainer
from edgeprune.recovery.weights import squares
from tests import killed_trainer, tiny
from tests.packed import InMemory, packed

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    monkeypatch.setattr(machine, "compute_dtype", lambda *_: torch.float32)


def settings(steps=6, **others):
    values = {"length": 32, "batch": 4, "learning_rate": 1e-3, "min_learning_rate": 1e-4} | others
    return Training(tokens=steps * values["batch"] * 32, **values)


def trainer(family="llama", asked=None, data=None, **others):
    data = packed() if data is None else data
    return Trainer(tiny.model(family), asked or settings(), data, **others)


def steps_of(events):
    return [event for event in events if isinstance(event, TrainStep)]


def pruned(family="llama"):
    """A non-uniform model, the last layer of which has lost its MLP."""
    model = tiny.model(family)
    groups = describe_layers(model.config)
    kept = [
        Kept(
            torch.arange(max(1, g.count["attention"] - i % 2)),
            torch.arange(0, g.count["mlp"], 1 + i),
        )
        for i, g in enumerate(groups)
    ]
    kept[-1] = Kept(kept[-1].attention, torch.arange(0))
    return cut_model(model, groups, kept), groups, kept


# ---- an update


def test_an_update_is_torchs_own():
    """One step of ours against a loop that anyone would write: mean loss over all labels, clip, AdamW."""
    asked, data = (
        settings(steps=1, batch=8, warmup=0.0, decay=0.0, clip=0.5, weight_decay=0.1),
        packed(8),
    )
    ours = Trainer(tiny.model("llama"), asked, data)
    ours.run()
    model = tiny.model("llama").train()
    batch = data.batch(range(8))
    logits = model(input_ids=batch.input_ids, position_ids=batch.positions, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    vectors, matrices = (
        [p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (False, True)
    )
    torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        1e-3,
        (0.9, 0.95),
    ).step()
    for (name, a), b in zip(ours.weights().items(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), atol=2e-5, rtol=0, msg=name)


def test_the_norm_of_many_gradients_is_not_rounded_away_and_the_same_in_parts():
    many = torch.randn(5 * 10**7, generator=torch.Generator().manual_seed(0))
    whole = float(squares(many))
    assert whole == pytest.approx(float(many.double().square().sum()), rel=1e-12)
    parts = many[: 2 * 10**7 + 1], many[2 * 10**7 + 1 :], many[:0]
    assert float(sum(squares(part) for part in parts)) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_learns_pruned_and_in_bfloat16(family, monkeypatch):
    monkeypatch.setattr(machine, "compute_dtype", lambda *_: torch.bfloat16)
    events = []
    model, _, _ = pruned(family)
    Trainer(model, settings(steps=8, learning_rate=3e-3), packed(), emit=events.append).run()
    losses = [event.loss for event in steps_of(events)]
    assert losses[-1] < losses[0] - 0.2
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_a_document_does_not_see_another(family):
    data = packed(3)
    objective = Objective(tiny.model(family), None, 0.0, 1.0)
    first = data.documents == 0
    other = InMemory(torch.where(first, data.ids, (data.ids + 11) % 300), data.documents)
    for rows in range(3):
        losses = []
        for each in (data, other):
            batch = each.batch([rows])
            batch.labels[~first[rows : rows + 1]] = -100
            losses.append(float(objective(batch)[0]))
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    alone = InMemory(data.ids[:1, first[0]], data.documents[:1, first[0]])
    packed_loss = objective(_only(data.batch([0]), first[:1]))[0]
    assert float(objective(alone.batch([0]))[0]) == pytest.approx(float(packed_loss), rel=1e-5)


def _only(batch, which):
    batch.labels[~which] = -100
    return batch


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_micro_batch_does_not_change_the_update(checkpointing):
    found = []
    for micro_batch in (1, 3, 8):
        asked = settings(steps=2, batch=8, micro_batch=micro_batch, checkpointing=checkpointing)
        each = trainer(asked=asked)
        each.run()
        found.append(each.moments())
    for name, (first, _) in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(first, other[name][0], atol=1e-6, rtol=1e-3, msg=name)


def test_bfloat16_copies_follow_float32_masters(monkeypatch):
    monkeypatch.setattr(machine, "compute_dtype", lambda *_: torch.bfloat16)
    each = trainer(asked=settings(learning_rate=1e-4, min_learning_rate=1e-5))
    each.run()
    for name, copy in each.model.named_parameters():
        assert copy.dtype == torch.bfloat16
        assert torch.equal(copy.detach(), each.weights()[name].bfloat16())


def test_a_pupil_comes_nearer_to_its_teacher_and_leaves_it_as_it_was():
    events = []
    teacher = tiny.model("llama")
    before = [p.clone() for p in teacher.parameters()]
    pupil, _, _ = pruned()  # shares what is whole with another dense model
    asked = settings(steps=20, distill=1.0, temperature=2.0, learning_rate=3e-3)
    Trainer(pupil, asked, packed(), teacher=teacher, emit=events.append).run()
    found = steps_of(events)
    assert found[-1].kl < 0.7 * found[0].kl
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


def test_a_model_that_shares_memory_with_its_teacher_does_not_train_it():
    dense = tiny.model("llama")
    groups = describe_layers(dense.config)
    before = [p.clone() for p in dense.parameters()]
    pupil = cut_model(dense, groups, [g.everything() for g in groups])
    Trainer(pupil, settings(distill=0.5), packed(), teacher=dense).run()
    assert all(torch.equal(a, b) for a, b in zip(before, dense.parameters(), strict=True))


def test_what_is_told():
    events = []
    each = trainer(
        asked=settings(steps=6, evaluations=2), held_out=packed(5, seed=1), emit=events.append
    )
    each.run()
    found = steps_of(events)
    assert [event.step for event in found] == [1, 2, 3, 4, 5, 6]
    assert [event.learning_rate for event in found] == [
        each.schedule.rate(step) for step in range(6)
    ]
    assert found[-1].seconds_left == 0
    assert found[-1].tokens == 6 * 4 * 32
    assert all(event.tokens_per_second > 0 and event.peak_share > 0 for event in found)
    measured = [event for event in events if isinstance(event, Evaluation)]
    assert [event.step for event in measured] == [3, 6]
    assert all(event_from_json(event.to_json()) == event for event in events)
    batch = packed(5, seed=1).batch(range(5))
    with torch.no_grad():
        logits = each.model(
            input_ids=batch.input_ids, position_ids=batch.positions, use_cache=False
        ).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    assert measured[-1].loss == pytest.approx(float(wanted), rel=1e-5)


def test_each_sequence_is_seen_once_before_any_is_seen_again():
    each = trainer(data=packed(10))
    rows = []
    for step in range(5):
        each.step = step
        rows += each._rows()
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]


# ---- nothing is lost


def test_going_on_is_as_if_it_had_never_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "compute_dtype", lambda *_: torch.bfloat16)
    whole, again = [], []
    first = trainer(emit=whole.append)
    first.run()
    stopped = trainer(emit=again.append, folder=tmp_path)
    stopped.notes = {"stage": 1}
    stopped.run(until=4)
    resumed = trainer(emit=again.append, folder=tmp_path)
    resumed.load(tmp_path)
    assert resumed.notes == {"stage": 1}
    assert resumed.step == 4
    resumed.run()
    assert [(e.loss, e.gradient_norm) for e in steps_of(whole)] == [
        (e.loss, e.gradient_norm) for e in steps_of(again)
    ]
    for name, weight in first.weights().items():
        assert torch.equal(weight, resumed.weights()[name]), name


def test_a_killed_process_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    last = random.Random(1).randint(2, 7)
    command = [sys.executable, "-m", "tests.killed_trainer", str(tmp_path), str(last)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=_environment())
    assert done.returncode == -9, done.stderr
    monkeypatch.setattr(machine, "compute_dtype", lambda *_: torch.bfloat16)
    told, weights = killed_trainer.train(tmp_path)
    whole, expected = killed_trainer.train(None)
    assert 0 < len(told) < len(whole)
    assert told == whole[-len(told) :]
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    kept = [path.name for path in checkpoints.all_of(tmp_path)]
    assert kept == ["step-00000007", "step-00000008"]
    assert not list(tmp_path.glob(".*"))


def _environment():
    threads = str(torch.get_num_threads())  # as here, or it would not be the same to the bit
    return {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(tmp_path, monkeypatch):
    each = trainer(folder=tmp_path)
    each.run(until=2)

    def full(_tensors, path):
        Path(path).write_bytes(b"some of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(EdgepruneError, match=r"the disk is full.*step-00000002 is whole"):
            each.run(until=4)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    again = trainer(folder=tmp_path)
    again.load(tmp_path)
    again.run()


def test_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(tmp_path):
    each = trainer(folder=tmp_path, minutes=0.0)
    each.run()
    assert [p.name for p in checkpoints.all_of(tmp_path)] == ["step-00000005", "step-00000006"]
    tensors = tmp_path / "step-00000006" / checkpoints.TENSORS
    tensors.write_bytes(tensors.read_bytes()[:1000])
    again = trainer()
    again.load(tmp_path)
    assert again.step == 5


def test_a_checkpoint_is_written_when_asked_for(tmp_path):
    each = trainer(
        folder=tmp_path, emit=lambda event: each.ask_for_checkpoint() if event.step == 2 else None
    )
    each.run()
    assert [p.name for p in checkpoints.all_of(tmp_path)] == ["step-00000003", "step-00000006"]


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    each = trainer(folder=tmp_path)
    each.run(until=1)
    for other, named in (
        (trainer(asked=settings(learning_rate=2e-3)), "learning_rate"),
        (trainer(data=packed(17)), "sequences"),
        (trainer("qwen2"), "widths"),
        (Trainer(pruned()[0], settings(), packed()), "widths"),
    ):
        with pytest.raises(BadInput, match=named):
            other.load(tmp_path)
    with pytest.raises(BadInput, match="no whole checkpoint"):
        each.load(tmp_path / "nothing")
    assert trainer(asked=settings(micro_batch=1, checkpointing=True)).load(tmp_path) is None


# ---- when it stops


def test_a_loss_that_is_no_number_stops_before_it_spoils_the_weights(tmp_path):
    each = trainer(folder=tmp_path)
    each.run(until=2)
    name = "model.norm.weight"
    with torch.no_grad():
        each.model.get_parameter(name)[0] = float("nan")
    others = {n: w.clone() for n, w in each.weights().items() if n != name}
    with pytest.raises(
        EdgepruneError, match=r"step 3: the loss is not a number; .*step-00000002 is whole"
    ):
        each.run()
    assert all(torch.equal(w, each.weights()[n]) for n, w in others.items())
    assert [path.name for path in checkpoints.all_of(tmp_path)] == ["step-00000002"]


def test_an_exploding_loss_stops_at_the_last_good_checkpoint(tmp_path):
    asked = settings(steps=100, learning_rate=3.0, warmup=0.2)
    each = trainer(asked=asked, folder=tmp_path, minutes=0.0)
    with pytest.raises(EdgepruneError, match=r"exploded.*is whole.*learning rate"):
        each.run()
    assert len(checkpoints.all_of(tmp_path)) == 2
    again = trainer(asked=asked)
    again.load(tmp_path)
    assert again.step <= each.step - 2


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"asked": settings(length=64)}, "packed to 32"),
        ({"asked": settings(distill=0.5)}, "no teacher"),
        ({"data": packed(0)}, "not one sequence"),
        (
            {"asked": settings(distill=0.5), "teacher": tiny.model("llama", vocab_size=100)},
            "vocabulary",
        ),
        ({"asked": Training(1000, length=32, batch=0)}, "batch"),
    ],
)
def test_what_cannot_be_trained_is_refused(wrong, named):
    with pytest.raises(BadInput, match=named):
        trainer(**wrong)


# ---- pruned between stages


def test_moments_are_cut_with_the_weights(tmp_path):
    """A cut that removes nothing changes nothing; one that does slices the moments as it slices the weights."""
    straight, staged = trainer(), trainer()
    straight.run()
    staged.run(until=3)
    whole = tiny.model("llama")
    whole.load_state_dict(staged.weights(), strict=False)
    staged.replace_model(whole, lambda _name, tensor: tensor)
    staged.run()
    for name, weight in straight.weights().items():
        assert torch.equal(weight, staged.weights()[name]), name

    before = staged.moments()
    _, groups, kept = pruned()
    dense = tiny.model("llama")
    dense.load_state_dict(staged.weights(), strict=False)
    smaller = cut_model(dense, groups, kept)

    def carry(name, tensor):
        if ".layers." not in name:
            return tensor
        layer, _, own = name.removeprefix("model.layers.").partition(".")
        weights = dict(dense.model.layers[int(layer)].named_parameters()) | {own: tensor}
        return cut(weights, groups[int(layer)], kept[int(layer)])[own]

    staged.replace_model(smaller, carry)
    for name, both in staged.moments().items():
        assert both[0].shape == staged.weights()[name].shape
        assert torch.equal(both[1], carry(name, before[name][1]))
    assert staged.step == 6
