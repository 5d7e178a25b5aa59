"""GGUF files, measured by llama-bench: a made-up one that prints what the real one's README documents."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from sshd import Sshd, wait_until
from sshd import sshd as sshd

from edgeprune.errors import BadInput
from edgeprune.profiles import board, runner
from edgeprune.profiles.profile import LocalProcess, profile, remarks, table

SHORT = {"prompt": 8, "generate": 6, "repeats": 2, "threads": 3}

LLAMA_BENCH = """\
#!{python} -S
import json, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert set(options) == set("-m -p -n -t -r -o".split()), options
assert options["-r"] == "1" and options["-o"] == "json"
if options["-n"] == "999":
    time.sleep(1000)
print("load_backend: loaded CPU backend", file=sys.stderr)
if b"damaged" in open(options["-m"], "rb").read():
    print("main: error: failed to load model", file=sys.stderr)
    sys.exit(1)
common = dict(
    build_commit="8cf427ff", build_number=5163, cpu_info="Cortex-A76", gpu_info="", backends="CPU",
    model_filename=options["-m"], model_type="llama ?B Q4_0", model_size=4, model_n_params=1234,
    n_batch=2048, n_threads=int(options["-t"]), test_time="2025-04-24T11:58:50Z",
)
def test(prompt, generate, speed):
    seconds = (prompt + generate) / speed
    nanoseconds = round(1e9 * seconds)
    return dict(
        common, n_prompt=prompt, n_gen=generate, n_depth=0, avg_ns=nanoseconds, stddev_ns=0, avg_ts=speed,
        stddev_ts=0.0, samples_ns=[nanoseconds], samples_ts=[speed],
    )
tests = [test(int(options["-p"]), 0, 80.0), test(0, int(options["-n"]), 10.0 * int(options["-t"]))]
print(json.dumps(tests, indent=2))
"""


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "llama-bench"
    program.write_text(LLAMA_BENCH.format(python=sys.executable))
    program.chmod(0o755)
    return folder


@pytest.fixture
def installed(bin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}{os.environ['PATH']}")
    return bin_folder / "llama-bench"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "a model.gguf"
    path.write_bytes(b"GGUF" + bytes(1000))
    return path


def test_a_gguf_file_is_measured_by_llama_bench(installed, gguf):
    result = profile(gguf, **SHORT)
    (run,) = result["runs"]
    assert run["name"] == "a model.gguf"
    assert run["model"] == {
        "parameters": 1234,
        "type": "llama ?B Q4_0",
        "llama.cpp": 5163,
        "backends": "CPU",
    }
    assert run["file_bytes"] == 1004
    assert [each["decode_tokens_per_second"] for each in run["repetitions"]] == [30.0, 30.0]
    assert run["summary"]["prefill_tokens_per_second"]["mean"] == 80.0
    assert "time_to_first_token_seconds" not in run["summary"]
    assert run["peak_memory_bytes"] > 0
    assert "llama-bench" in result["settings"]["decoding"]
    rows = {row[0]: row[1] for row in table(result)}
    assert rows["Decode (tokens/s)"] == "30.0 ± 0.0"
    assert rows["Parameters"] == "1.23k"
    assert "Load (ms)" not in rows
    assert not any("Energy" in line for line, _ in remarks(result))


def test_a_gguf_file_and_an_export_are_compared_by_what_both_tell(installed, gguf, tiny_export):
    result = profile(tiny_export, against=gguf, **{**SHORT, "threads": 1})
    assert set(result["ratios"]) >= {"decode_tokens_per_second", "file_bytes"}
    assert "load_seconds" not in result["ratios"]
    rows = {row[0]: row[1:] for row in table(result)}
    assert rows["Load (ms)"][1:] == ["–", ""]


def test_threads_are_swept_and_speed_sustained(installed, gguf, monkeypatch):
    monkeypatch.setattr("edgeprune.profiles.profile.thread_counts", lambda *cores: [1, 2])
    result = profile(gguf, **{**SHORT, "threads": "sweep", "sustained": 0.002})
    assert result["settings"]["threads"] == 2
    assert result["sustained"]["first_minute"] == pytest.approx(20.0)


def test_without_llama_bench_it_says_what_to_install(gguf, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        BadInput, match=r"llama-bench, which is not on the PATH: .*llama.cpp/releases"
    ):
        profile(gguf, **SHORT)


def test_a_file_that_llama_bench_refuses_is_bad_input(installed, gguf):
    gguf.write_bytes(b"GGUF damaged")
    with pytest.raises(BadInput, match="could not be measured by llama-bench: main: error: failed"):
        profile(gguf, **SHORT)


@pytest.mark.parametrize("content", [None, b"", b"PK\3\4"])
def test_what_is_no_gguf_file_is_refused(content, tmp_path):
    path = tmp_path / "x.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(runner.Refused, match=r"x\.gguf (cannot be read|is not a GGUF file)"):
        runner.session_of(path, prompt=8, generate=6)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_llama_bench_ends_with_the_process_that_started_it(installed, gguf):
    process = LocalProcess(gguf, ["--worker", "--generate=999"])
    process.write_line('{"command": "load"}')
    process.read_line(60)
    process.write_line('{"command": "measure"}')
    wait_until(lambda: running(gguf))
    (bench,) = running(gguf)
    process.close()
    assert psutil.wait_procs([bench], timeout=20)[1] == []


def running(gguf: Path) -> list[psutil.Process]:
    below = psutil.Process().children(recursive=True)
    return [each for each in below if "-m" in each.cmdline() and str(gguf) in each.cmdline()]


def test_a_board_with_llama_bench_needs_nothing_else(sshd: Sshd, bin_folder, gguf):
    python = bin_folder / "python"
    python.write_text(f'#!/bin/sh\nPATH="{bin_folder}:$PATH" exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    result = board.measure(replace(sshd.host, python=str(python)), gguf, **SHORT)
    assert result["runs"][0]["summary"]["decode_tokens_per_second"]["mean"] == 30.0
    assert result["runs"][0]["folder"] == str(gguf)
    assert not (sshd.root / "envs").exists()
    with pytest.raises(
        BadInput, match=r"^far: .*a model.gguf is measured by llama-bench, which is not"
    ):
        board.measure(sshd.host, gguf, **SHORT)
