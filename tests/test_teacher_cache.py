"""Predictions of a teacher that are recorded once: what is kept, that it is whole, and that it teaches the same."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import edgeprune
from edgeprune import machine, sources
from edgeprune.__main__ import main
from edgeprune.errors import BadInput, EdgepruneError
from edgeprune.events import Progress, TrainStep
from edgeprune.recovery import memory, teacher_cache
from edgeprune.recovery import recover as recovery
from edgeprune.recovery.mixture import parse_sources
from edgeprune.recovery.packing import prepare
from edgeprune.recovery.recover import prune_and_recover, recover
from edgeprune.recovery.settings import Training
from edgeprune.recovery.teacher_cache import Taught
from edgeprune.recovery.trainer import Trainer
from tests import tiny

CPU, LENGTH, BATCH = torch.device("cpu"), 32, 4


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    monkeypatch.setattr(machine, "compute_dtype", lambda *_: torch.float32)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("teacher") / "dense")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("student") / "student", seed=1)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    made, _ = prepare(
        parse_sources(["builtin"]),
        tiny.tokenizer(),
        tokens=10 * LENGTH - 3,
        length=LENGTH,
        held_out=0,
        cache=tmp_path_factory.mktemp("cache"),
    )
    return made


@pytest.fixture(autouse=True)
def _anew(packed):
    """No test finds what another one recorded."""
    for pattern in ("teacher-*", ".teacher-*"):
        for path in packed.folder.parent.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def settings(steps=6, **others):
    values = {"distill": 0.6, "teacher_top_k": 8, "learning_rate": 3e-3, "micro_batch": 2} | others
    return Training(steps * BATCH * LENGTH, length=LENGTH, batch=BATCH, **values)


def made(packed, teacher, asked=None, **others):
    asked = asked or settings()
    return teacher_cache.prepare(packed, sources.resolve(teacher), asked, device=CPU, **others)


def kept_in(packed):
    return sorted(path.name for path in packed.folder.parent.glob("teacher-*"))


@pytest.fixture
def unloaded(monkeypatch):
    """Whoever loads a model now fails."""

    def refuse(*_, **__):
        raise AssertionError("the teacher was loaded")

    return lambda: monkeypatch.setattr(sources, "load_model", refuse)


# ---- what is kept


def test_the_likeliest_tokens_of_every_place_are_kept(packed, dense):
    told = []
    found = made(packed, dense, settings(temperature=2.0), emit=told.append)
    batch = found.batch([9, 0, 3])
    plain = packed.batch([9, 0, 3])
    with torch.no_grad():
        logits = edgeprune.load(dense)(
            input_ids=plain.input_ids, position_ids=plain.positions, use_cache=False
        ).logits
    wanted = (logits / 2.0).log_softmax(-1)
    assert torch.equal(batch.labels, plain.labels)
    assert batch.teacher_ids.shape == batch.teacher_log_probabilities.shape == (3, LENGTH, 8)
    assert batch.teacher_log_probabilities.dtype == torch.float16
    torch.testing.assert_close(
        batch.teacher_log_probabilities.float(), wanted.topk(8).values, rtol=1e-3, atol=1e-4
    )
    chosen = wanted.gather(-1, batch.teacher_ids.long())
    torch.testing.assert_close(chosen, wanted.topk(8).values, rtol=0, atol=1e-4)
    assert np.load(found.recorded / teacher_cache.IDS, mmap_mode="r").dtype == np.uint16
    heard = [(e.done, e.total) for e in told if isinstance(e, Progress) and e.stage == "teacher"]
    whole = 10 * LENGTH
    assert heard == [(rows * LENGTH, whole) for rows in range(0, 11, 2)]
    again = pickle.loads(pickle.dumps(found)).batch([9, 0, 3])
    assert torch.equal(again.teacher_ids, batch.teacher_ids)
    with pytest.raises(IndexError):
        found.batch([-1])


def test_it_is_made_once_for_the_same_teacher_and_anew_for_another(
    packed, dense, student, unloaded
):
    found = made(packed, dense)
    others = [
        made(packed, student),
        made(packed, dense, settings(temperature=2.0)),
        made(packed, dense, settings(teacher_top_k=9)),
    ]
    assert len({each.recorded for each in (found, *others)}) == 4
    unloaded()
    assert made(packed, dense).recorded == found.recorded
    (dense / "model.safetensors").touch()
    with pytest.raises(AssertionError, match="was loaded"):
        made(packed, dense)


def test_what_was_broken_off_goes_on_and_had_no_name(packed, dense, monkeypatch):
    whole = made(packed, dense).batch(range(10))
    shutil.rmtree(packed.folder.parent / kept_in(packed)[0])
    monkeypatch.setattr(teacher_cache, "INTERVAL", 0.0)

    def kill(event):
        if isinstance(event, Progress) and event.done == 6 * LENGTH:
            raise Killed

    with pytest.raises(Killed):
        made(packed, dense, emit=kill)
    assert kept_in(packed) == []
    heard = []
    found = made(packed, dense, emit=heard.append)
    assert next(e.done for e in heard if isinstance(e, Progress) and e.stage == "teacher") == 192
    assert torch.equal(found.batch(range(10)).teacher_ids, whole.teacher_ids)
    assert not list(packed.folder.parent.glob(".teacher-*.part"))


def test_what_is_damaged_is_made_anew(packed, dense):
    found = made(packed, dense)
    path = found.recorded / teacher_cache.LOG_PROBABILITIES
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(EdgepruneError, match="delete that folder"):
        Taught(packed.folder, found.recorded)
    assert torch.equal(made(packed, dense).batch([1]).labels, packed.batch([1]).labels)


def test_too_little_disk_is_told_before_and_during_the_work(packed, dense, monkeypatch, unloaded):
    with monkeypatch.context() as patch:
        patch.setattr(machine, "disk_free", lambda _: 7000)
        unloaded()
        with pytest.raises(BadInput, match=r"take 10\.2 kB.*7\.00 kB are free.*top_k = 5$"):
            made(packed, dense)
        patch.setattr(machine, "disk_free", lambda _: 100)
        with pytest.raises(BadInput, match="teacher_top_k = 0"):
            made(packed, dense)
    monkeypatch.undo()
    monkeypatch.setattr(machine, "compute_dtype", lambda *_: torch.float32)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(teacher_cache, "INTERVAL", 0.0)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadInput, match="disk is full"):
        made(packed, dense)
    assert not [p for p in packed.folder.parent.glob("*teacher-*") if p.is_dir()]
    assert not [p for p in packed.folder.parent.glob(".teacher-*") if p.is_dir()]


def test_what_cannot_be_recorded_is_refused(packed, dense, monkeypatch):
    with pytest.raises(BadInput, match="320 tokens in its vocabulary"):
        made(packed, dense, settings(teacher_top_k=321))
    monkeypatch.setattr(memory, "free_memory", lambda _device: 1000)
    with pytest.raises(BadInput, match="the teacher alone takes"):
        made(packed, dense)
    assert made(packed, dense, force=True).top_k == 8


# ---- training with it


def test_all_tokens_recorded_teach_what_the_teacher_does(packed, dense, student):
    losses = []
    for asked in (settings(teacher_top_k=0), settings(teacher_top_k=320)):
        told = []
        data = made(packed, dense, asked) if asked.teacher_top_k else packed
        teacher = None if asked.teacher_top_k else edgeprune.load(dense)
        Trainer(edgeprune.load(student), asked, data, teacher=teacher, emit=told.append).run()
        losses.append([(e.loss, e.kl) for e in told if isinstance(e, TrainStep)])
    for ours, theirs in zip(losses[1], losses[0], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)
    assert losses[1][-1][1] < 0.95 * losses[1][0][1]


@pytest.mark.parametrize("wrong", [{"teacher_top_k": 9}, {"temperature": 2.0}])
def test_other_predictions_than_asked_for_are_refused(packed, dense, student, wrong):
    for data in (packed, made(packed, dense)):
        with pytest.raises(BadInput, match="record them"):
            Trainer(edgeprune.load(student), settings(**wrong), data)
    other = tiny.model("llama", vocab_size=100)
    with pytest.raises(BadInput, match="vocabulary"):
        Trainer(other, settings(), made(packed, dense))


def test_a_recorded_teacher_takes_no_memory():
    config = tiny.config("llama")
    asked = settings(teacher_top_k=0)
    taken = [
        memory.estimate(config, each, 2, torch.float32, config)
        for each in (asked, replace(asked, teacher_top_k=8))
    ]
    assert taken[0].teacher > 0 == taken[1].teacher
    assert taken[1].loss <= taken[0].loss


# ---- from end to end


def trained(student, output, cache, teacher, **others):
    wanted = {"data": ["builtin"], "training": settings(), "held_out": 0, "cache": cache}
    return recover(student, output, teacher=str(teacher), **wanted | others)


def weights(folder):
    return edgeprune.load(folder).state_dict()


def same(a, b):
    a, b = weights(a), weights(b)
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_training_that_was_killed_goes_on_to_the_same_weights(dense, student, tmp_path):
    cache, loaded = tmp_path / "cache", []
    record = trained(student, tmp_path / "whole", cache, dense)
    assert record["made"]["recovery"]["training"]["teacher_top_k"] == 8

    def kill(event):
        if isinstance(event, TrainStep) and event.step == 4:
            raise Killed

    work, load = tmp_path / "work", sources.load_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sources, "load_model", lambda s, **o: (loaded.append(s.path.name), load(s, **o))[1]
        )
        with pytest.raises(Killed):
            trained(student, tmp_path / "out", cache, dense, work=work, minutes=0.0, emit=kill)
        trained(student, tmp_path / "out", cache, dense, work=work, minutes=0.0)
    assert set(loaded) == {"student"}
    assert same(tmp_path / "whole", tmp_path / "out")


def test_the_dense_model_is_recorded_once_for_all_stages(dense, tmp_path):
    told = []
    prune_and_recover(
        dense,
        tmp_path / "out",
        target={"sparsity": 0.4},
        pruning={
            "iterations": 2,
            "samples": 4,
            "length": 16,
            "repair_samples": 0,
            "width_multiple": 8,
        },
        data=["builtin"],
        training=settings(),
        interleavings=2,
        held_out=0,
        cache=tmp_path / "cache",
        work=tmp_path / "work",
        emit=told.append,
    )
    kinds = [
        "P" if isinstance(e, Progress) and e.stage == "teacher" else "T"
        for e in told
        if isinstance(e, TrainStep) or (isinstance(e, Progress) and e.stage == "teacher")
    ]
    assert "".join(kinds).lstrip("P") == "T" * 6
    assert all(e.kl is not None for e in told if isinstance(e, TrainStep))


def test_a_teacher_of_other_tokens_is_refused_before_it_is_loaded(student, tmp_path, unloaded):
    other = tiny.save("llama", tmp_path / "other", vocab_size=100)
    unloaded()
    with pytest.raises(BadInput, match="100 tokens in its vocabulary"):
        trained(student, tmp_path / "out", tmp_path / "cache", other)


def test_the_command_line_hands_it_over(monkeypatch, tmp_path, capsys):
    asked = []

    def listen(*_, training, **__):
        asked.append(training)
        raise BadInput("enough")

    monkeypatch.setattr(recovery, "recover", listen)
    given = ["--data", "builtin", "--tokens", "100k", "--distill", "0.5", "--teacher-top-k", "64"]
    assert main(["recover", "m", "-o", str(tmp_path / "out"), *given]) != 0
    assert asked[0].teacher_top_k == 64
    assert json.dumps(asked[0].what())
    assert "enough" in capsys.readouterr().err
