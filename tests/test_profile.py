"""Two exports taking turns: counts and pairs, errors in one line, and no process left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from exports import make, spoil

from edgeprune.errors import BadInput, EdgepruneError
from edgeprune.events import Progress
from edgeprune.profiles import profile as module
from edgeprune.profiles import runner
from edgeprune.profiles.profile import profile, remarks, table

SHORT = {"prompt": 8, "generate": 6, "repeats": 3, "threads": 1}


@pytest.fixture(scope="module")
def smaller_export(tmp_path_factory):
    return make(tmp_path_factory.mktemp("exports") / "smaller", num_hidden_layers=2)


@pytest.fixture(scope="module")
def measured(tiny_export, smaller_export):
    events = []
    result = profile(smaller_export, against=tiny_export, **SHORT, emit=events.append)
    return result, events


def runners(of: int | None = None) -> list[psutil.Process]:
    """Return the measuring processes below process ``of``, this one by default."""
    try:
        below = psutil.Process(of).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [process for process in below if runner.__file__ in _command(process)]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(autouse=True)
def nothing_left_behind():
    yield
    assert runners() == []


# ---- the result


def test_every_repetition_is_kept_and_counted(measured):
    result, _ = measured
    assert result["schema_version"] == runner.SCHEMA_VERSION
    assert {"cpu", "physical_cores", "memory_bytes", "os", "versions"} <= set(result["device"])
    assert [run["role"] for run in result["runs"]] == ["export", "against"]
    assert [run["name"] for run in result["runs"]] == ["smaller", "tiny"]
    for run in result["runs"]:
        assert len(run["repetitions"]) == 3
        for repetition in run["repetitions"]:
            assert repetition["tokens"] == 6
            assert len(repetition["inter_token_seconds"]) == 5
        assert set(run["summary"]) >= {*runner.PROCESS_METRICS, *runner.REPETITION_METRICS}
        for metric in runner.REPETITION_METRICS:
            found = run["summary"][metric]
            assert found["n"] == 3
            assert found["min"] <= found["median"] <= found["max"]
        assert run["disturbed"] == sum(entry["disturbed"] for entry in run["repetitions"])


def test_the_models_take_turns(measured):
    ours, theirs = ([entry["turn"] for entry in run["repetitions"]] for run in measured[0]["runs"])
    assert ours == [0, 3, 4]
    assert theirs == [1, 2, 5]


def test_ratios_are_export_over_against_pair_by_pair(measured):
    result, _ = measured
    ours, theirs = result["runs"]
    for metric in runner.REPETITION_METRICS:
        pairs = zip(ours["repetitions"], theirs["repetitions"], strict=True)
        expected = [a[metric] / b[metric] for a, b in pairs]
        assert result["ratios"][metric]["samples"] == pytest.approx(expected)
    size = result["ratios"]["file_bytes"]
    assert size["samples"] == [ours["file_bytes"] / theirs["file_bytes"]]
    assert size["median"] < 1


def test_the_result_is_strict_json(measured):
    result, _ = measured
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_progress_counts_every_repetition(measured):
    progress = [event for event in measured[1] if isinstance(event, Progress)]
    assert {event.total for event in progress} == {8}  # two models, a warm-up and three each
    assert [event.done for event in progress] == [0, 0, *range(1, 9)]


def test_what_the_exporter_wrote_is_in_the_result(measured, smaller_export):
    manifest = json.loads((smaller_export / runner.FACTS).read_text())
    assert measured[0]["runs"][0]["model"] == manifest
    assert measured[0]["runs"][0]["file_bytes"] == manifest["bytes"]


def test_a_model_against_itself_differs_in_time_only(tiny_export):
    result = profile(tiny_export, against=tiny_export, **{**SHORT, "repeats": 1})
    ours, theirs = result["runs"]
    assert ours["file_bytes"] == theirs["file_bytes"]
    assert result["ratios"]["file_bytes"]["median"] == 1
    assert result["ratios"]["peak_memory_bytes"]["median"] == pytest.approx(1, abs=0.25)
    assert table(result)[0] == ["", "export", "against", "ratio"]  # both have the same name


def test_one_model_alone_has_no_ratios(tiny_export):
    result = profile(tiny_export, **{**SHORT, "repeats": 1})
    assert result["ratios"] is None
    assert [run["name"] for run in result["runs"]] == ["tiny"]
    assert {len(row) for row in table(result)} == {2}


# ---- the table


def test_the_table_has_a_cell_for_each_model_and_the_ratio(measured):
    rows = table(measured[0])
    assert rows[0] == ["", "smaller", "tiny", "ratio"]
    assert {len(row) for row in rows} == {4}
    by_label = {row[0]: row[1:] for row in rows}
    assert " ± " in by_label["Decode (tokens/s)"][0]
    assert "(" in by_label["Decode (tokens/s)"][2]
    assert "±" not in by_label["Peak memory (MB)"][0]


def test_cells_are_short_numbers():
    samples = {"mean": 0.0801234, "stdev": 0.00123}
    assert module._cell(samples, 1e3) == "80.1 ± 1.2"
    assert module._cell({"mean": 1234.5, "stdev": None}, 1.0) == "1,234"
    assert module._ratio_cell({"n": 2, "median": 1.256, "min": 1.2, "max": 1.3}) == (
        "1.26 (1.20–1.30)"
    )


def test_disturbed_repetitions_are_said(measured):
    result = json.loads(json.dumps(measured[0]))
    for run, count in zip(result["runs"], (2, 0), strict=True):
        run["disturbed"] = count
        run["disturbed_by"] = {runner.OTHER_LOAD: 1, runner.THROTTLED: 2} if count else {}
    assert table(result)[-1] == ["Disturbed repetitions", "2 of 3", "0 of 3", ""]
    said = []
    module._warn_of_disturbance(result["runs"], said.append)
    (note,) = said
    assert note.level == "warning"
    assert note.text.startswith("2 of 6 repetitions were disturbed (in 1 other programs")
    assert "in 2 the processor was throttled: cool it" in note.text
    assert "clock fell" not in note.text


def test_what_sensors_tell_has_rows_and_a_remark(measured):
    result = json.loads(json.dumps(measured[0]))
    ours, theirs = result["runs"]
    ours["summary"]["clock"] = runner.summarise([2.4e9, 2.3e9])
    for run, joules in ((ours, 0.5), (theirs, 1.0)):
        run["summary"]["joules_per_token"] = runner.summarise([joules])
    result["ratios"]["joules_per_token"] = {"samples": [0.5], **runner.summarise([0.5])}
    rows = {row[0]: row[1:] for row in table(result)}
    assert rows["Clock (GHz)"] == ["2.35 ± 0.07", "–", ""]
    assert rows["Energy (J/token)"] == ["0.500", "1.00", "0.50"]

    result["device"].update(governors=["performance"], energy_sensor="RAPL")
    assert remarks(result) == [
        ("Governor: performance", False),
        ("Energy: of the whole processor package, prompt included", False),
    ]
    result["device"].update(governors=["ondemand", "performance"], energy_sensor=None)
    result["sweep"] = [{"threads": 1}, {"threads": 2}]
    (tried, _), (governor, is_a_warning) = remarks(result)
    assert tried == "Threads: 1, the fastest of 1, 2"
    assert is_a_warning
    assert governor.endswith("set it: sudo cpupower frequency-set -g performance")


# ---- threads and time


@pytest.mark.parametrize(
    ("physical", "logical", "expected"),
    [(1, 1, [1]), (4, 4, [1, 2, 4]), (6, 12, [1, 2, 4, 6, 8]), (2, 3, [1, 2])],
)
def test_the_threads_worth_trying(physical, logical, expected):
    assert module.thread_counts(physical, logical) == expected


def test_the_fastest_number_of_threads_measures_both(tiny_export, monkeypatch):
    monkeypatch.setattr(module, "thread_counts", lambda *cores: [1, 2])
    events = []
    options = {**SHORT, "repeats": 1, "threads": "sweep"}
    result = profile(tiny_export, against=tiny_export, **options, emit=events.append)
    assert [entry["threads"] for entry in result["sweep"]] == [1, 2]
    speeds = {entry["decode_tokens_per_second"]: entry["threads"] for entry in result["sweep"]}
    assert result["settings"]["threads"] == speeds[max(speeds)]
    tried = [event for event in events if event.unit == "thread counts"]
    assert [(event.done, event.total) for event in tried] == [(0, 2), (1, 2), (2, 2)]
    assert remarks(result)[0][0].startswith("Threads: ")


def test_a_sustained_run_has_samples_until_its_end(tiny_export, monkeypatch):
    monkeypatch.setattr(module, "SUSTAINED_INTERVAL", 0.2)
    events = []
    options = {**SHORT, "repeats": 1, "sustained": 0.01}
    result = profile(tiny_export, against=tiny_export, **options, emit=events.append)
    lasting = result["sustained"]
    assert lasting["minutes"] == 0.01
    times = [sample["seconds"] for sample in lasting["samples"]]
    assert times == sorted(times)
    assert times[-1] >= 0.6
    assert lasting["ratio"] == lasting["last_minute"] / lasting["first_minute"]
    assert set(lasting["samples"][0]) == {"seconds", *module._SAMPLED}
    told = [event for event in events if getattr(event, "unit", "") == "seconds"]
    assert told[-1].done == told[-1].total == 1
    by_label = {row[0]: row[1:] for row in table(result)}
    assert "→" in by_label["Sustained (tokens/s)"][0]
    assert by_label["Sustained (tokens/s)"][1:] == ["", ""]


def samples(*speeds: float, every: float = 20.0, throttled: bool | None = None) -> list[dict]:
    return [
        {"seconds": every * (1 + index), "decode_tokens_per_second": speed, "throttled": throttled}
        for index, speed in enumerate(speeds)
    ]


def test_minutes_are_compared_and_halves_where_there_are_no_two():
    found = module._first_and_last(samples(10, 10, 10, 9, 8, 6, 5, 4))
    assert found == {"first_minute": 10.0, "last_minute": 5.0, "ratio": 0.5}
    assert module._first_and_last(samples(4, 2))["ratio"] == 0.5
    assert module._first_and_last(samples(4))["ratio"] == 1.0


@pytest.mark.parametrize(
    ("speeds", "throttled", "said"),
    [
        ((10, 10), None, None),
        ((10, 9.6), False, None),
        (
            (10, 8),
            None,
            "tiny decodes at 80% of its first speed after 2 minutes (10.0 → 8.00 tokens/s)",
        ),
        ((10, 10), True, "throttled in 2 of 2 samples"),
    ],
)
def test_slowing_down_is_a_warning(speeds, throttled, said):
    found = samples(*speeds, throttled=throttled)
    events = []
    lasting = {"minutes": 2.0, "samples": found, **module._first_and_last(found)}
    module._warn_of_slowing("tiny", lasting, events.append)
    assert [event.level for event in events] == ([] if said is None else ["warning"])
    assert all(said in event.text for event in events)


# ---- what goes wrong


@pytest.mark.parametrize("fault", ["absent", "a file", "no config", "damaged config", "no graph"])
@pytest.mark.parametrize("side", ["export", "against"])
def test_what_is_no_export_is_bad_input(fault, side, tiny_export, tmp_path):
    spoilt = spoil(tiny_export, tmp_path / "spoilt", fault)
    folders = {"export": tiny_export, "against": tiny_export, side: spoilt}
    with pytest.raises(BadInput, match="edgeprune export MODEL --onnx") as caught:
        profile(folders["export"], against=folders["against"], **SHORT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", ["graph cut short", "weights cut short", "no weights"])
def test_damaged_files_are_bad_input(fault, tiny_export, tmp_path):
    spoilt = spoil(tiny_export, tmp_path / "spoilt", fault)
    with pytest.raises(BadInput, match=r"cannot be loaded .* export it again") as caught:
        profile(tiny_export, against=spoilt, **SHORT)
    assert "\n" not in str(caught.value)


def test_counts_out_of_range_are_bad_input(tiny_export):
    for wrong in (
        {"repeats": 0},
        {"prompt": 0},
        {"generate": 1},
        {"prompt": 600},
        {"sustained": -1},
    ):
        with pytest.raises(BadInput):
            profile(tiny_export, **{**SHORT, **wrong})


def test_a_killed_worker_is_an_error_with_its_last_words(tiny_export):
    def kill(event):
        if event.done == 1:
            for process in runners():
                process.kill()

    with pytest.raises(EdgepruneError, match=r"measured tiny ended with signal 9") as caught:
        profile(tiny_export, **SHORT, emit=kill)
    assert not isinstance(caught.value, BadInput)


def test_a_worker_that_fails_is_quoted(tiny_export, monkeypatch, tmp_path):
    failing = tmp_path / "runner.py"
    failing.write_text("import sys; sys.exit('no luck today\\n')")
    monkeypatch.setattr(runner, "__file__", str(failing))
    with pytest.raises(EdgepruneError, match="ended with exit code 1: no luck today"):
        profile(tiny_export, **SHORT)


def test_a_worker_that_hangs_is_given_up(tiny_export, monkeypatch):
    def stop(_event):
        for process in runners():
            process.suspend()

    monkeypatch.setattr(module, "LOAD_TIMEOUT", 0.5)
    with pytest.raises(EdgepruneError, match=r"measuring tiny was given up: no answer to load"):
        profile(tiny_export, **SHORT, emit=stop)


def test_an_interrupt_ends_the_workers(tiny_export):
    def interrupt(event):
        if event.done == 2:
            assert len(runners()) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(tiny_export, against=tiny_export, **SHORT, emit=interrupt)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_its_parent(how, tiny_export):
    script = """
        import sys
        from edgeprune.profiles.profile import profile
        say = lambda event: print(event.done, flush=True)
        profile(sys.argv[1], against=sys.argv[1], prompt=8, generate=400, threads=1,
                repeats=10_000, emit=say)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(tiny_export)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        for line in parent.stdout:
            if int(line) == 2:
                break
        measuring = runners(parent.pid)
        assert len(measuring) == 2
        # As a terminal does it: Ctrl-C reaches the whole group. The others hit the parent alone.
        (os.killpg if how == signal.SIGINT else os.kill)(parent.pid, how)
        parent.stdout.close()
        parent.wait(60)
        gone, alive = psutil.wait_procs(measuring, timeout=60)
        assert alive == []
        assert len(gone) == 2
    finally:
        parent.kill()
        parent.wait()


def test_nothing_is_written_to_the_export(tiny_export, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_export, folder)
    before = {path: path.stat().st_mtime_ns for path in [folder, *Path(folder).iterdir()]}
    time.sleep(0.01)
    profile(folder, **{**SHORT, "repeats": 1})
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]} == before
