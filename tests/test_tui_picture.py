"""What the events of a run come to, whole or in pieces, damaged or not; and why a run ended."""

import copy
import math
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune import worker
from edgeprune.events import (
    Evaluation,
    Note,
    Progress,
    PruneIteration,
    RunFailed,
    RunFinished,
    RunStarted,
    StageFinished,
    StageStarted,
    TrainStep,
)
from edgeprune.log import LogReader, LogWriter
from edgeprune.tui.picture import (
    LINES,
    POINTS,
    UNKNOWN,
    Gauge,
    Picture,
    Series,
    cause,
    kept,
    picture_of,
    thinned,
)

NAMES = ["source", "prune", "report"]


def inspected(heads, channels):
    layers = [{"num_key_value_heads": heads, "intermediate_size": channels} for _ in range(2)]
    return {"inspection": {"layers": layers}}


def iteration(number, at=0.0, loss=3.0):
    return PruneIteration(
        time=at,
        iteration=number,
        of=4,
        loss=loss,
        decoder_parameters=1000,
        layer_importance=[-1.0, 1.0],
        layer_sparsity=[0.1 * number, 0.0],
        num_key_value_heads=[3, 4],
        intermediate_size=[64, 128],
        seconds=1.0,
    )


def update(step, at=0.0, loss=3.0):
    return TrainStep(
        time=at,
        step=step,
        of=100,
        loss=loss,
        lm_loss=loss,
        learning_rate=1e-4,
        gradient_norm=1.0,
        tokens=step,
        tokens_per_second=50.0,
        peak_share=0.25,
        seconds_left=100.0 - step,
    )


def started(finished=(), at=0.0):
    return RunStarted(time=at, folder="run", stages=NAMES, finished=list(finished), pid=7)


def stage(name, at=0.0):
    return StageStarted(time=at, stage=name, title=name.title(), index=1, of=3)


def finished(name, seconds=1.0, at=0.0, **result):
    return StageFinished(time=at, stage=name, seconds=seconds, result=result)


STEPS = st.integers(1, 40)
TIMES = st.floats(0, 1000)
FIGURES = st.floats(-10, 10)
EVENT = st.one_of(
    st.builds(started, st.sampled_from([(), ("source",), ("source", "prune")]), TIMES),
    st.builds(stage, st.sampled_from(NAMES), TIMES),
    st.builds(finished, st.sampled_from(NAMES), st.floats(0, 100), TIMES),
    st.just(StageFinished(time=2.0, stage="source", seconds=1.0, result=inspected(4, 128))),
    st.builds(
        Progress,
        time=TIMES,
        stage=st.sampled_from(NAMES),
        done=STEPS,
        total=STEPS,
        unit=st.sampled_from(["layers", "B"]),
    ),
    st.builds(iteration, STEPS, TIMES, FIGURES),
    st.builds(update, STEPS, TIMES, FIGURES),
    st.builds(Evaluation, time=TIMES, step=STEPS, loss=FIGURES, perplexity=FIGURES, tokens=STEPS),
    st.builds(Note, time=TIMES, text=st.text(max_size=9), level=st.just("warning")),
    st.builds(RunFailed, time=TIMES, error=st.just("why"), exit_code=st.sampled_from([1, 130])),
    st.builds(RunFinished, time=TIMES, results=st.just("r"), report=st.just("p"), seconds=TIMES),
)


# ---- the log in pieces


@given(st.lists(EVENT, max_size=40), st.integers(0, 40))
@settings(max_examples=40)
def test_a_log_in_two_pieces_gives_the_same_picture(log, cut):
    picture = picture_of(log[:cut])
    for event in log[cut:]:
        picture.apply(event)
    assert picture == picture_of(log)


@given(st.lists(EVENT, min_size=1, max_size=20), st.lists(st.integers(0, 20), min_size=1))
@settings(max_examples=30)
def test_damage_only_adds_warnings(tmp_path_factory, log, places):
    path = tmp_path_factory.mktemp("log") / "events.jsonl"
    with LogWriter(path) as emit:
        for event in log:
            emit(event)
    lines = path.read_bytes().splitlines(keepends=True)
    for place in places:
        lines.insert(min(place, len(lines)), b'{"kind": "progress", "sta\xff\n')
    path.write_bytes(b"".join(lines))
    damaged, whole = picture_of(LogReader(path).poll()), picture_of(log)
    assert damaged.gaps == len(places)
    damaged.gaps, damaged.told = whole.gaps, whole.told
    damaged.lines = copy.copy(whole.lines)
    damaged.lines.clear()
    whole.lines.clear()
    assert damaged == whole


def test_an_event_that_holds_nonsense_is_a_gap():
    picture = picture_of([started(), stage("prune")])
    picture.apply(Progress(time=1.0, stage="prune", done="many", total=2))
    picture.apply(StageFinished(time=2.0, stage="source", seconds=1.0, result={"inspection": 3}))
    picture.apply(iteration(1, loss="high"))
    assert picture.gaps == 3
    assert picture.lines[-1].level == "warning"
    assert picture.iteration == 0


# ---- stages


def test_stages_from_waiting_to_done():
    picture = picture_of([started(at=10.0), stage("source", at=10.0)])
    assert [s.state for s in picture.stages] == ["at work", "waiting", "waiting"]
    picture.apply(finished("source", 5.0, at=15.0))
    picture.apply(stage("prune", at=15.0))
    picture.apply(Progress(time=20.0, stage="prune", done=0, total=10, unit="layer passes"))
    picture.apply(Progress(time=30.0, stage="prune", done=5, total=10, unit="layer passes"))
    assert [s.state for s in picture.stages] == ["done", "at work", "waiting"]
    gauge = picture.at_work.gauge
    assert (gauge.share, gauge.amount) == (0.5, "5/10 layer passes")
    assert (picture.left(30.0), picture.left(34.0), picture.left(99.0)) == (10.0, 6.0, 0.0)
    assert picture.worked(30.0) == 20.0
    assert picture.waiting == 1


def test_a_resumed_stage_is_paced_from_where_it_began():
    gauge = Gauge(50, 100, "layers", "", 40, began=0.0, at=10.0)
    assert gauge.left(10.0) == 50.0
    assert Gauge(40, 100, "layers", "", 40, 0.0, 0.0).left(0.0) is None
    assert Gauge(40, 0, "B", "", 0, 0.0, 9.0).left(9.0) is None
    assert Gauge(1_500_000, 3_000_000, "B", "", 0, 0.0, 9.0).amount == "1.50 MB of 3.00 MB"


def test_pruning_and_training_in_turns_keep_their_paces():
    def passes(done, at):
        return Progress(time=at, stage="prune", done=done, total=8, unit="layer passes")

    events = [passes(0, 0.0), passes(2, 10.0), update(1, 20.0), passes(4, 30.0)]
    picture = picture_of([started(), stage("prune"), *events])
    assert picture.left(30.0) == 30.0
    picture.apply(update(2, 40.0))
    assert picture.left(40.0) == 98.0
    assert picture.at_work.gauge.note == "loss 3.00, 50 tokens/s"


def test_a_resumed_run_knows_what_was_finished_before():
    session = [started(), stage("source"), finished("source", 3.0, **inspected(4, 128))]
    picture = picture_of([*session, stage("prune"), RunFailed(time=9.0, error="no", next="n")])
    assert picture.stages[1].state == "failed"
    assert picture.end.error == "no"
    picture.apply(started(["source"], at=20.0))
    assert [s.state for s in picture.stages] == ["done", "waiting", "waiting"]
    assert picture.stages[0].seconds == 3.0
    assert picture.end is None
    assert picture.dense.heads == [4, 4]


def test_what_the_log_does_not_say_is_in_the_state_file():
    results = {
        "source": {"seconds": 3.0, "result": inspected(4, 128)},
        "prune": {"seconds": 4.0, "result": inspected(2, 96)},
    }
    picture = picture_of([started(["source", "prune"])])
    picture.recall(results)
    assert [s.seconds for s in picture.stages] == [3.0, 4.0, None]
    assert (picture.layers[0].heads, picture.layers[0].dense_heads) == (2, 4)
    empty = Picture()
    empty.recall(results)
    assert [s.state for s in empty.stages][:3] == ["done", "done", "waiting"]
    assert len(empty.stages) == len(worker.STAGES)
    picture.recall({"source": {"seconds": "?"}, "prune": None})


def test_a_stopped_run_is_no_failed_one():
    end = RunFailed(time=5.0, error="stopped", exit_code=worker.INTERRUPTED)
    picture = picture_of([started(), stage("prune", 1.0), end])
    assert (picture.stages[1].state, picture.stages[1].seconds) == ("stopped", 4.0)
    assert picture.worked(99.0) == 4.0


# ---- layers and series


def test_layers_before_and_while_pruning():
    picture = picture_of([started(), finished("source", **inspected(4, 128))])
    assert [(a.heads, a.dense_heads, a.importance) for a in picture.layers] == [(4, 4, None)] * 2
    picture.apply(iteration(1))
    assert [(a.heads, a.channels) for a in picture.layers] == [(3, 64), (4, 128)]
    assert picture.layers[0].importance == -1.0
    assert picture_of([iteration(1)]).layers[0].dense_heads is None


@given(st.integers(1, 9000), st.integers(1, 3))
@settings(max_examples=20)
def test_a_series_is_bounded_even_and_ends_at_the_last_point(number, step):
    series = Series()
    for x in range(number):
        series.add(step * x, float(x))
        assert len(series.points) <= POINTS
    assert series.points[0][0] == 0
    assert series.points[-1] == (step * (number - 1), number - 1)
    gaps = [b[0] - a[0] for a, b in zip(series.points[:-1], series.points[1:-1], strict=False)]
    assert not gaps or max(gaps) <= 2 * min(gaps)


def test_updates_made_again_replace_those_that_were_lost():
    picture = picture_of([update(s) for s in (1, 2, 3, 4)] + [update(s, loss=2.0) for s in (3,)])
    assert picture.training_loss.points == [(1, 3.0), (2, 3.0), (3, 2.0)]
    picture.apply(update(4, loss=math.nan))
    assert picture.training_loss.last == 2.0


def test_thinned_for_the_screen():
    points = [(float(x), 0.0) for x in range(1000)]
    assert len(thinned(points, 100)) <= 101
    assert thinned(points, 100)[-1] == points[-1]
    assert thinned(points[:3], 100) == points[:3]
    assert thinned([], 100) == []


def test_lines_are_bounded():
    picture = picture_of(Note(text=str(n)) for n in range(LINES + 9))
    assert (len(picture.lines), picture.told) == (LINES, LINES + 9)


# ---- ends


@pytest.mark.parametrize(
    ("error", "last_words", "why"),
    [
        ("the run's worker process was ended by SIGKILL (out of memory?)", "", "out of memory"),
        ("RuntimeError: bug", "torch.OutOfMemoryError: CUDA out of memory.", "out of memory"),
        ("its process is gone without a word", "", "killed from outside"),
        ("its process is gone without a word; the last words: std::bad_alloc", "", "out of memory"),
        ("the disk is full: free some space", "", "the disk is full"),
        ("OSError: [Errno 28] No space left on device", "", "the disk is full"),
        ("step 3: the loss is not a number; resume", "", "unstable"),
        ("step 3: the loss exploded from 3 to 9; resume", "", "unstable"),
        ("'a/b' is no local folder, the Hub cannot be reached, and", "", "Hub cannot be reached"),
        ("downloading 'a/b' failed (timeout); the same", "", "Hub cannot be reached"),
        ("'a/b' is gated: accept its terms", "", "terms"),
        ("lab: 10.0.0.7 does not answer within 20 s", "", "machine cannot be reached"),
        ("lab: 10.0.0.7 cannot be reached: no route", "", "machine cannot be reached"),
        ("lab: THE HOST KEY OF 10.0.0.7 HAS CHANGED: it is now", "", "is not known"),
        ("lab: no such host; none is saved", "", "is not known"),
        ("models of type 'x' cannot be pruned yet; known", "", "refused"),
        ("x is quantized already (gptq)", "", "refused"),
        ("it takes 9 GB; --memory-budget is 1 GB: type", "", "more memory"),
    ],
)
def test_known_causes(error, last_words, why):
    found, remedy = cause(error, last_words)
    assert why in found
    assert remedy


def test_an_unknown_cause_is_called_unknown():
    assert cause("KeyError: 'bug' (all of it in run/worker.log)", "the end") == UNKNOWN
    assert "worker.log" in UNKNOWN[1]


def test_what_a_stop_keeps():
    assert kept(Picture()) == ["No stage is finished yet."]
    picture = picture_of([started(), finished("source"), stage("prune"), iteration(2), update(5)])
    text = "\n".join(kept(picture))
    assert "Check the source model" in text
    assert "Pruning iterations stay: 2 of 4" in text
    assert "last checkpoint" in text
    picture.apply(stage("report"))
    assert '"Report" begins anew' in kept(picture)[-1]


def test_nothing_heavy_and_no_screen_is_imported():
    code = (
        "import sys, edgeprune.tui.picture, edgeprune.tui.watching\n"
        "heavy = ('torch', 'transformers', 'numpy', 'onnxruntime', 'textual', 'plotext')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert found.stdout == "[]\n"
