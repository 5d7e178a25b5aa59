"""Figures for TensorBoard: what the events say, once a step, and never the end of a training."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from tensorboardX.event_file_writer import EventsWriter

from edgeprune import machine
from edgeprune.__main__ import main
from edgeprune.errors import BadInput
from edgeprune.events import Evaluation, Note, Progress, PruneIteration, TrainStep
from edgeprune.tensorboard import check_folder, recorded
from tests import scalars, tiny


def train_step(step, loss=3.5, **others):
    wanted = {
        "of": 9,
        "lm_loss": 3.25,
        "learning_rate": 0.125,
        "gradient_norm": 1.5,
        "tokens": 64 * step,
        "tokens_per_second": 640.0,
        "seconds_left": 1.0,
        "time": 1000.0 + step,
    }
    return TrainStep(step=step, loss=loss, **wanted | others)


def iteration(number, time=500.0):
    return PruneIteration(
        iteration=number,
        of=9,
        loss=2.5,
        decoder_parameters=1000 - number,
        layer_importance=[0.5, 0.75],
        layer_sparsity=[0.25, 0.5],
        num_key_value_heads=[2, 1],
        intermediate_size=[64, 32],
        seconds=1.0,
        time=time,
    )


def write(folder, *events):
    heard = []
    with recorded(folder, heard.append) as emit:
        for event in events:
            emit(event)
    return heard


def test_the_figures_of_the_events_are_written_at_their_steps_and_times(tmp_path):
    events = [
        iteration(4),
        Progress(stage="prune", done=1, total=2),
        train_step(1),
        train_step(2, loss=3.0, kl=0.5, peak_share=0.75),
        Evaluation(step=2, loss=2.0, perplexity=7.5, tokens=9, time=1003.0),
    ]
    assert write(tmp_path / "board", *events) == events
    assert scalars.read(tmp_path / "board") == {
        "train/loss": [(1, 3.5, 1001.0), (2, 3.0, 1002.0)],
        "train/lm_loss": [(1, 3.25, 1001.0), (2, 3.25, 1002.0)],
        "train/kl": [(2, 0.5, 1002.0)],
        "train/learning_rate": [(1, 0.125, 1001.0), (2, 0.125, 1002.0)],
        "train/gradient_norm": [(1, 1.5, 1001.0), (2, 1.5, 1002.0)],
        "train/tokens_per_second": [(1, 640.0, 1001.0), (2, 640.0, 1002.0)],
        "train/peak_share": [(2, 0.75, 1002.0)],
        "held_out/loss": [(2, 2.0, 1003.0)],
        "held_out/perplexity": [(2, 7.5, 1003.0)],
    }
    assert scalars.read(tmp_path / "board" / "pruning") == {
        "prune/loss": [(4, 2.5, 500.0)],
        "prune/sparsity": [(4, 0.375, 500.0)],
        "prune/decoder_parameters": [(4, 996.0, 500.0)],
    }


def test_steps_that_are_done_again_are_shown_once(tmp_path):
    write(tmp_path, iteration(8), iteration(9), *(train_step(n) for n in range(1, 7)))
    write(tmp_path, *(train_step(n, loss=1.0) for n in range(4, 9)))
    found = scalars.read(tmp_path)["train/loss"]
    assert [(step, value) for step, value, _ in found] == [(n, 3.5) for n in (1, 2, 3)] + [
        (n, 1.0) for n in (4, 5, 6, 7, 8)
    ]
    assert scalars.steps(tmp_path / "pruning", "prune/loss") == [8, 9]


def test_an_update_is_still_shown_where_the_loss_after_it_is_measured_once_more(tmp_path):
    write(tmp_path, *(train_step(n) for n in (1, 2, 3)))
    held_out = Evaluation(step=2, loss=2.0, perplexity=7.5, tokens=9, time=1003.0)
    write(tmp_path, held_out, *(train_step(n, loss=1.0) for n in (3, 4)))
    found = scalars.read(tmp_path)
    assert [value for _, value, _ in found["train/loss"]] == [3.5, 3.5, 1.0, 1.0]
    assert [step for step, _, _ in found["held_out/loss"]] == [2]


def test_nothing_is_made_without_figures_or_unasked(tmp_path):
    events = [Note(text="x"), Progress(stage="data", done=1, total=2)]
    assert write(tmp_path / "board", *events) == events
    assert write(None, train_step(1)) == [train_step(1)]
    assert list(tmp_path.iterdir()) == []


def test_a_running_training_can_be_followed_and_a_kill_loses_nothing(tmp_path):
    with recorded(tmp_path, lambda event: None) as emit:
        for step in (1, 2, 3):
            emit(train_step(step))
            assert scalars.steps(tmp_path, "train/loss")[-1] == step


def test_what_was_heard_is_kept_when_the_training_fails(tmp_path):
    def train():
        with recorded(tmp_path, lambda event: None) as emit:
            emit(train_step(1))
            emit(train_step(2))
            raise KeyError

    with pytest.raises(KeyError):
        train()
    assert scalars.steps(tmp_path, "train/loss") == [1, 2]


@pytest.mark.parametrize("when", ["opening", "flushing"])
def test_a_disk_that_fails_is_told_once_and_the_training_goes_on(tmp_path, monkeypatch, when):
    tried = []

    def full(writer):
        tried.append(writer)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = tmp_path / "board"
    if when == "opening":
        folder.write_text("")
    else:
        monkeypatch.setattr(EventsWriter, "flush", full)
    events = [train_step(1), train_step(2), iteration(1)]
    heard = write(folder, *events)
    (note,) = (event for event in heard if isinstance(event, Note))
    assert note.level == "warning"
    assert str(folder) in note.text
    assert when == "opening" or "No space left" in note.text
    assert [event for event in heard if event is not note] == events
    assert len(tried) <= 1


def test_folders_that_are_no_place_for_it_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is a file"):
        check_folder(tmp_path / "file")
    for folder in (tmp_path / "out", tmp_path / "out" / "board", Path(f"{tmp_path}/x/../out")):
        with pytest.raises(BadInput, match="name another folder"):
            check_folder(folder, tmp_path / "state", tmp_path / "out")
    check_folder(tmp_path / "board", tmp_path / "out", None)


def test_recover_writes_it_when_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))  # where the packed text is kept
    monkeypatch.setattr(machine, "compute_dtype", lambda *_: torch.float32)
    dense = tiny.save("llama", tmp_path / "dense")
    command = ["recover", dense, "-o", tmp_path / "out", "--data", "builtin", "--tokens", 192]
    command += ["--length", 32, "--batch", 2, "--held-out", 300]
    assert main([str(word) for word in [*command, "--tensorboard", tmp_path / "out"]]) == 2
    assert "name another folder with --tensorboard" in capsys.readouterr().err
    board = tmp_path / "board"
    assert main([str(word) for word in [*command, "--tensorboard", board]]) == 0
    assert scalars.steps(board, "train/loss") == [1, 2, 3]
    assert scalars.steps(board, "held_out/loss") == [0, 3]

    monkeypatch.setenv("RANK", "1")  # a process that does not speak
    monkeypatch.setattr("edgeprune.recovery.recover.recover", lambda *_, **__: {})
    assert main([str(word) for word in [*command, "--tensorboard", tmp_path / "other"]]) == 0
    assert not (tmp_path / "other").exists()
