import json
import threading

import pytest

from edgeprune.events import (
    Evaluation,
    Event,
    Note,
    Progress,
    PruneIteration,
    RunFailed,
    RunFinished,
    RunStarted,
    StageFinished,
    StageStarted,
    TrainStep,
    event_from_json,
)
from edgeprune.log import LogReader, LogWriter, follow, read_events

EVERY_KIND = [
    RunStarted(folder="run", stages=["source", "prune"], finished=["source"], pid=7),
    StageStarted(stage="prune", title="Prune", index=2, of=2),
    Progress(stage="prune", done=1, total=2, unit="iterations"),
    PruneIteration(
        iteration=1,
        of=2,
        loss=3.5,
        decoder_parameters=1000,
        layer_importance=[-0.5, 1.0],
        layer_sparsity=[0.1, 0.3],
        num_key_value_heads=[3, 2],
        intermediate_size=[96, 64],
        seconds=0.5,
    ),
    TrainStep(
        step=1,
        of=2,
        loss=3.5,
        lm_loss=3.25,
        learning_rate=1e-5,
        gradient_norm=0.5,
        tokens=64,
        tokens_per_second=100.0,
        seconds_left=0.5,
    ),
    Evaluation(step=2, loss=3.0, perplexity=20.0, tokens=64),
    Note(text="naïve\nline", level="warning"),
    StageFinished(stage="prune", seconds=1.5, result={"parameters": 10}),
    RunFinished(results="results.json", report="report.html", seconds=9.0),
    RunFailed(error="disk full", exit_code=1, next="edgeprune run --resume run"),
]


@pytest.fixture
def log(tmp_path):
    return tmp_path / "events.jsonl"


def test_every_kind_of_event_reads_back_the_same(log):
    with LogWriter(log) as emit:
        for event in EVERY_KIND:
            emit(event)
    assert read_events(log) == EVERY_KIND
    assert {type(event) for event in EVERY_KIND} == set(Event.__subclasses__())


def test_no_log_is_an_empty_one(log):
    assert read_events(log) == []


def test_fields_of_a_newer_version_are_dropped_and_new_kinds_refused():
    data = {**Note(text="a", time=1.0).to_json(), "colour": "red"}
    assert event_from_json(data) == Note(text="a", time=1.0)
    with pytest.raises(ValueError, match="unknown kind"):
        event_from_json({"kind": "tomorrow"})
    with pytest.raises(ValueError, match="not a complete"):
        event_from_json({"kind": "progress"})


def test_a_line_cut_short_waits_until_it_is_whole(log):
    line = json.dumps(Note(text="second", time=2.0).to_json()).encode() + b"\n"
    with LogWriter(log) as emit:
        emit(Note(text="first", time=1.0))
    reader = LogReader(log)
    with log.open("ab", buffering=0) as file:
        file.write(line[:20])
        assert [event.text for event in reader.poll()] == ["first"]
        assert reader.poll() == []
        file.write(line[20:])
        assert [event.text for event in reader.poll()] == ["second"]
        assert reader.poll() == []


@pytest.mark.parametrize("damage", [b'{"kind": "no', b"\xff\xfe", b"[1]", b"null", b""])
def test_a_damaged_line_in_the_middle_is_a_warning_and_the_rest_is_read(log, damage):
    with LogWriter(log) as emit:
        emit(Note(text="before"))
    with log.open("ab") as file:
        file.write(damage + b"\n")
    with LogWriter(log) as emit:
        emit(Note(text="after"))
    before, warning, after = read_events(log)
    assert (before.text, after.text) == ("before", "after")
    assert warning.level == "warning"
    assert "events.jsonl" in warning.text


def test_a_new_writer_does_not_continue_the_cut_line_of_a_dead_one(log):
    log.write_bytes(b'{"kind": "note", "te')
    with LogWriter(log) as emit:
        emit(Note(text="alive"))
    warning, alive = read_events(log)
    assert warning.level == "warning"
    assert alive.text == "alive"


def test_a_follower_loses_nothing_and_sees_nothing_twice(log):
    def write():
        with LogWriter(log) as emit:
            for number in range(500):
                emit(Progress(stage="s", done=number, total=500))

    writer = threading.Thread(target=write)
    writer.start()
    seen = [e.done for e in follow(log, ended=lambda: not writer.is_alive(), interval=0.001)]
    writer.join()
    assert seen == list(range(500))


def test_a_follower_starts_at_its_offset(log):
    with LogWriter(log) as emit:
        emit(Note(text="old"))
        offset = log.stat().st_size
        emit(Note(text="new"))
    assert [event.text for event in follow(log, offset, ended=lambda: True)] == ["new"]
