"""The runner alone: what it needs, what it counts, how it refuses, and that it leaves nothing."""

from __future__ import annotations

import ast
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from exports import VOCAB_SIZE, spoil

from edgeprune.profiles import runner

SOURCE = Path(runner.__file__)
SHORT = ("--prompt", "8", "--generate", "6", "--repeats", "3", "--threads", "1")


def run(folder: Path, *options: str, file: Path = SOURCE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(file), str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


class Asked:
    """A runner in worker mode."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(SOURCE), str(folder), "--worker", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def tell(self, command: str) -> None:
        self.process.stdin.write(json.dumps({"command": command}) + "\n")
        self.process.stdin.flush()

    def ask(self, command: str) -> dict:
        self.tell(command)
        return json.loads(self.process.stdout.readline())


# ---- one file for boards


def test_the_file_is_python_3_9_and_needs_little():
    tree = ast.parse(SOURCE.read_text(), feature_version=(3, 9))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
    assert imported - sys.stdlib_module_names == {"numpy", "onnxruntime_genai"}


def test_a_copy_elsewhere_prints_one_document(tiny_export, tmp_path):
    copy = tmp_path / "board.py"
    shutil.copy(SOURCE, copy)
    done = run(tiny_export, *SHORT, file=copy)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema_version"] == runner.SCHEMA_VERSION
    assert document["ratios"] is None
    settings = document["settings"]
    assert (settings["prompt"], settings["generate"], settings["repeats"]) == (8, 6, 3)
    assert (settings["threads"], settings["seed"]) == (1, runner.SEED)
    (only,) = document["runs"]
    assert only["name"] == tiny_export.name
    assert len(only["repetitions"]) == 3
    for repetition in only["repetitions"]:
        assert repetition["tokens"] == 6
        assert len(repetition["inter_token_seconds"]) == 5
        decode = repetition["decode_seconds"]
        assert sum(repetition["inter_token_seconds"]) == pytest.approx(decode, abs=1e-5)
        assert repetition["decode_tokens_per_second"] == pytest.approx(5 / decode)
        filled = repetition["prefill_seconds"]
        assert repetition["prefill_tokens_per_second"] == pytest.approx(8 / filled)
        assert repetition["time_to_first_token_seconds"] > filled
    assert set(only["summary"]) == {*runner.PROCESS_METRICS, *runner.REPETITION_METRICS}
    speeds = [entry["decode_tokens_per_second"] for entry in only["repetitions"]]
    found = only["summary"]["decode_tokens_per_second"]
    assert found["mean"] == pytest.approx(statistics.fmean(speeds))
    assert (found["n"], found["min"], found["max"]) == (3, min(speeds), max(speeds))


def test_sizes_and_memory_are_those_of_the_files_and_the_process(tiny_export):
    document = json.loads(run(tiny_export, *SHORT).stdout)
    (only,) = document["runs"]
    graph = [path for path in tiny_export.iterdir() if path.name.startswith("model.onnx")]
    assert only["file_bytes"] == sum(path.stat().st_size for path in graph)
    assert only["folder_bytes"] == sum(path.stat().st_size for path in tiny_export.iterdir())
    assert 0 < only["memory_before_load_bytes"] < only["memory_loaded_bytes"]
    assert only["memory_loaded_bytes"] <= only["peak_memory_bytes"]
    assert only["peak_memory_bytes"] < document["device"]["memory_bytes"]


# ---- what it counts


def test_the_prompt_is_always_the_same_and_in_the_vocabulary():
    prompt = runner.prompt_tokens(1000, VOCAB_SIZE)
    assert prompt == runner.prompt_tokens(1000, VOCAB_SIZE)
    assert prompt[:10] == runner.prompt_tokens(10, VOCAB_SIZE)
    assert min(prompt) >= 0
    assert max(prompt) < VOCAB_SIZE
    assert len(set(prompt)) > 200


def test_the_end_of_text_does_not_end_a_repetition(tiny_export, tmp_path):
    folder = tmp_path / "chatty"
    shutil.copytree(tiny_export, folder)
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = list(range(VOCAB_SIZE - 1))  # all that it could say but one
    (folder / "genai_config.json").write_text(json.dumps(config))
    session = runner.Session(folder, prompt=8, generate=12, threads=1)
    session.load()
    repetition = session.repetition()
    assert repetition["tokens"] == 12
    assert len(repetition["inter_token_seconds"]) == 11


def test_a_generation_cut_short_is_an_error(tiny_export, monkeypatch):
    session = runner.Session(tiny_export, prompt=8, generate=12, threads=1)
    session.load()
    whole = runner.Session(tiny_export, prompt=8, generate=7, threads=1)
    whole.load()
    monkeypatch.setattr(session, "_generator", whole._generator)
    with pytest.raises(runner.RunnerError, match="stopped after 7 of 12 tokens"):
        session.repetition()


def test_percentiles_are_interpolated():
    values = [float(value) for value in range(101)][::-1]
    assert [runner.percentile(values, p) for p in (0, 50, 95, 99, 100)] == [0, 50, 95, 99, 100]
    assert runner.percentile([1.0, 2.0], 50) == 1.5
    assert runner.percentile([7.0], 99) == 7.0


def test_a_single_value_has_no_spread():
    assert runner.summarise([3.0])["stdev"] is None
    assert runner.summarise([1.0, 3.0])["stdev"] == pytest.approx(2**0.5)


def test_load_of_others_is_what_is_busy_and_not_ours():
    assert runner.other_load((100.0, 1000.0), (106.0, 1010.0), own=4.0) == pytest.approx(0.2)
    assert runner.other_load((100.0, 1000.0), (104.0, 1010.0), own=4.1) == 0.0
    assert runner.other_load((100.0, 1000.0), (100.1, 1000.1), own=0.0) is None
    assert runner.other_load(None, None, own=1.0) is None


def test_cores_memory_and_names_are_known_here():
    device = runner.device()
    assert 1 <= device["physical_cores"] <= device["logical_cores"]
    assert 1 <= runner.default_threads() <= device["physical_cores"]
    assert device["cpu"]
    assert device["os"]
    assert device["versions"]["onnxruntime-genai"]


# ---- what it refuses


@pytest.mark.parametrize("fault", ["absent", "a file", "no config", "damaged config", "no graph"])
def test_what_is_no_export_is_refused_before_anything_loads(fault, tiny_export, tmp_path):
    with pytest.raises(runner.Refused) as caught:
        runner.Session(spoil(tiny_export, tmp_path / "export", fault), prompt=8, generate=8)
    assert "edgeprune export MODEL --onnx" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", ["graph cut short", "weights cut short", "no weights"])
def test_damaged_files_are_refused(fault, tiny_export, tmp_path):
    done = run(spoil(tiny_export, tmp_path / "export", fault), *SHORT)
    assert done.returncode == 2
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert "cannot be loaded" in last
    assert "export it again: edgeprune export MODEL --onnx" in last


def test_more_tokens_than_the_context_are_refused(tiny_export):
    with pytest.raises(runner.Refused, match=r"400 \+ 200 tokens do not fit .* context of 512"):
        runner.Session(tiny_export, prompt=400, generate=200)
    runner.Session(tiny_export, prompt=400, generate=112)


@pytest.mark.parametrize(("name", "value"), [("prompt", 0), ("generate", 1), ("threads", -1)])
def test_counts_out_of_range_are_refused(name, value, tiny_export):
    with pytest.raises(runner.Refused, match=f"--{name} must be at least"):
        runner.Session(tiny_export, **{"prompt": 8, "generate": 8, name: value})


def test_too_little_memory_is_seen_before_loading(tiny_export, monkeypatch):
    monkeypatch.setattr(runner, "available_memory", lambda: 1000)
    session = runner.Session(tiny_export, prompt=8, generate=8)
    with pytest.raises(runner.RunnerError, match="GB are free") as caught:
        session.load()
    assert caught.value.exit_code == 1


# ---- the worker


def test_a_worker_answers_line_by_line_and_quits(tiny_export):
    with Asked(tiny_export, *SHORT) as worker:
        assert worker.ask("load")["result"]["file_bytes"] > 0
        assert worker.ask("warmup")["result"]["tokens"] == 6
        assert worker.ask("measure")["result"]["tokens"] == 6
        assert worker.ask("report")["result"]["name"] == tiny_export.name
        assert worker.ask("quit") == {"result": {}}
        assert worker.process.wait(60) == 0


def test_a_worker_answers_a_refusal(tiny_export, tmp_path):
    with Asked(spoil(tiny_export, tmp_path / "export", "graph cut short"), *SHORT) as worker:
        answer = worker.ask("load")
    assert answer["exit_code"] == 2
    assert "cannot be loaded" in answer["error"]


def test_an_idle_worker_idles(tiny_export):
    with Asked(tiny_export, "--prompt=64", "--generate=64", "--threads=2") as worker:
        worker.ask("load")
        worker.ask("measure")
        process = psutil.Process(worker.process.pid)
        before = process.cpu_times()
        time.sleep(0.5)
        after = process.cpu_times()
    assert after.user + after.system - before.user - before.system <= 0.02


def test_the_runtime_gets_the_threads_asked_for(tiny_export):
    def threads(count: int) -> int:
        with Asked(tiny_export, f"--threads={count}") as worker:
            before = psutil.Process(worker.process.pid)
            worker.ask("load")
            return before.num_threads()

    assert threads(3) - threads(1) == 2


def test_a_worker_ends_with_its_stdin_in_the_middle_of_a_repetition(tiny_export):
    with Asked(tiny_export, "--prompt=8", "--generate=500", "--threads=1") as worker:
        worker.ask("load")
        worker.tell("measure")
        worker.process.stdin.close()
        worker.process.stdin = None  # communicate() would flush it
        assert worker.process.wait(60) == 1
        assert worker.process.stdout.read() == ""
