"""Measure exported models on this machine: each in a process of its own, taking turns.

The measuring itself is ``runner.py``, which runs in those processes and alone on a board.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Protocol

from edgeprune.errors import BadInput, EdgepruneError
from edgeprune.events import Emit, Note, Progress, ignore
from edgeprune.profiles import runner
from edgeprune.quantities import format_count
from edgeprune.remote.words import harmless

STAGE = "profile"
LOAD_TIMEOUT = 1800.0
SWEEP_PROMPT, SWEEP_GENERATE, SWEEP_REPEATS = 16, 32, 3
"""What a number of threads is tried with."""
SUSTAINED_INTERVAL = 5.0
"""Seconds between two samples of a sustained run."""
SLOWED_BELOW = 0.95
"""Speed of the last minute, as a part of the first one's, that is worth a warning."""
SLOW_GOVERNORS = frozenset({"conservative", "ondemand", "powersave"})

Threads = int | Literal["sweep"] | None

# What the table shows of a run's summary: metric, label with unit, and what to multiply by.
_ROWS = (
    ("file_bytes", "File size (MB)", 1e-6),
    ("load_seconds", "Load (ms)", 1e3),
    ("prefill_tokens_per_second", "Prefill (tokens/s)", 1.0),
    ("time_to_first_token_seconds", "Time to first token (ms)", 1e3),
    ("decode_tokens_per_second", "Decode (tokens/s)", 1.0),
    ("inter_token_p50_seconds", "Between tokens, p50 (ms)", 1e3),
    ("inter_token_p95_seconds", "Between tokens, p95 (ms)", 1e3),
    ("inter_token_p99_seconds", "Between tokens, p99 (ms)", 1e3),
    ("peak_memory_bytes", "Peak memory (MB)", 1e-6),
    ("joules_per_token", "Energy (J/token)", 1.0),
    ("clock", "Clock (GHz)", 1e-9),
    ("temperature", "Temperature (°C)", 1.0),
)
_ADVICE = {
    runner.OTHER_LOAD: f"other programs took more than {runner.DISTURBED_ABOVE:.0%} of the processor: close them",
    runner.THROTTLED: "the processor was throttled: cool it, check its power supply",
    runner.CLOCK_FELL: f"the clock fell below {runner.CLOCK_FELL_BELOW:.0%} of the first repetition's: let it cool",
}

_MEASURED_BY = {"RAPL": "processor package", "power rails": "board", "battery": "computer"}
# What a sample of a sustained run keeps.
_SAMPLED = ("decode_tokens_per_second", "clock", "temperature", "throttled", "other_load")


def profile(
    export: str | PathLike[str],
    *,
    against: str | PathLike[str] | None = None,
    prompt: int = 128,
    generate: int = 128,
    repeats: int = 5,
    threads: Threads = None,
    sustained: float = 0.0,
    emit: Emit = ignore,
) -> dict[str, Any]:
    """Measure the folder ``export``, in turns with the folder ``against`` if there is one.

    A .gguf file in the place of a folder is measured by llama.cpp's llama-bench, if that is on the PATH; what it does
    not tell is None or absent.

    Each repetition runs ``prompt`` tokens and generates ``generate``. With two models the turns go
    A B, B A, A B ...: repetition i of both is a pair, and a machine that drifts treats both alike.
    ``threads`` of None is one a physical core; "sweep" tries which number decodes ``export`` fastest.
    Afterwards ``export`` generates on end for ``sustained`` minutes.

    Returns plain JSON values; times in seconds, sizes in bytes, speeds in tokens per second, clocks in Hz,
    temperatures in degrees Celsius; what a machine does not tell of itself is None::

        schema_version, device, settings
        runs[0]   of ``export`` (role "export"); runs[1] of ``against`` (role "against")
            name, folder, model (what the exporter wrote of it, or None), file_bytes, load_seconds,
            peak_memory_bytes ..., disturbed (how many repetitions something got in the way of),
            disturbed_by[reason] (how many), sensors (before it was loaded and after all repetitions)
            repetitions[i]  raw: inter_token_seconds[generate - 1], decode_tokens_per_second,
                            prefill_tokens_per_second, time_to_first_token_seconds, disturbed, disturbed_by,
                            other_load, clock, temperature, throttled, joules, joules_per_token, sensors ...
            summary[metric] n, mean, stdev, median, min, max
        ratios[metric]      export / against: samples (pair by pair), n, mean, stdev, median, ...
                            None without ``against``
        sweep[i]            threads, decode_tokens_per_second; None unless swept
        sustained           minutes, samples[i] (seconds, decode_tokens_per_second, clock, temperature,
                            throttled, other_load), first_minute, last_minute, ratio; None unless asked for

    Raises:
        BadInput: a folder is no export, its files are damaged, or the tokens exceed its context.
        EdgepruneError: a measuring process failed, or the memory does not suffice.

    """
    folders = [Path(export), *([Path(against)] if against is not None else [])]
    check(folders, prompt, generate, repeats, threads, sustained)
    return measurement(
        folders,
        LocalProcess,
        prompt=prompt,
        generate=generate,
        repeats=repeats,
        threads=threads,
        sustained=sustained,
        emit=emit,
    )


def check(
    folders: Sequence[Path],
    prompt: int,
    generate: int,
    repeats: int,
    threads: Threads,
    sustained: float,
) -> None:
    """Raise BadInput if these folders cannot be measured in this way."""
    if repeats < 1:
        raise BadInput(f"--repeats must be at least 1, not {repeats}")
    if sustained < 0:
        raise BadInput(f"--sustained must not be negative: {sustained}")
    for folder in folders:
        session(folder, prompt, generate, 0 if threads == "sweep" else threads or 0)


def session(folder: Path, prompt: int, generate: int, threads: int = 0) -> runner.Session:
    """Return the export as it would be measured, not loaded. BadInput if it cannot be."""
    try:
        return runner.session_of(folder, prompt, generate, threads)
    except runner.Refused as error:
        raise BadInput(str(error)) from None


def measurement(
    folders: Sequence[Path],
    start: Start,
    *,
    prompt: int,
    generate: int,
    repeats: int,
    threads: Threads,
    sustained: float,
    emit: Emit,
) -> dict[str, Any]:
    """Return ``profile``'s document of ``folders``, which ``check`` has let pass; ``start`` starts the processes."""
    sweep, count = None, 0 if threads == "sweep" else threads or 0
    if threads == "sweep":
        sweep = _sweep(
            folders[0], start, min(prompt, SWEEP_PROMPT), min(generate, SWEEP_GENERATE), emit
        )
        count = max(sweep, key=lambda tried: tried["decode_tokens_per_second"])["threads"]
    done = _Counter(len(folders) * (repeats + 1), emit)
    with ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(folder, start, prompt, generate, count))
            for folder in folders
        ]
        for worker in workers:
            done.say(f"loading {worker.name}")
            worker.ask("load", LOAD_TIMEOUT)
        for worker in workers:
            worker.repetition("warmup")
            done.one(f"{worker.name}: warm-up")
        repetitions = _in_turns(workers, repeats, done)
        reports = [worker.ask("report", LOAD_TIMEOUT, repeats=repeats) for worker in workers]
        lasting = _sustain(workers[0], sustained, emit) if sustained else None
    devices, settings = ([each.pop(key) for each in reports] for key in ("device", "settings"))
    runs = [
        runner.run_of(role, {**report, "folder": str(folder)}, samples)
        for role, report, folder, samples in zip(
            ("export", "against"), reports, folders, repetitions, strict=False
        )
    ]
    _warn_of_disturbance(runs, emit)
    return {
        "schema_version": runner.SCHEMA_VERSION,
        "device": devices[0],
        "settings": settings[0],
        "runs": runs,
        "ratios": _ratios(*runs) if len(runs) == 2 else None,
        "sweep": sweep,
        "sustained": lasting,
    }


def table(result: dict[str, Any]) -> list[list[str]]:
    """Return ``profile``'s result as rows of text to draw; the first is the header.

    The columns are: what is measured, one a model with mean and standard deviation, and with two
    models the ratio of the first to the second: median of the pairs, and their range.
    """
    runs, ratios = result["runs"], result["ratios"]
    rows = [["", *_headings(runs), *(["ratio"] if ratios else [])]]
    if any(_parameters(run) for run in runs):
        counts = [_parameters(run) for run in runs]
        cells = [format_count(count) if count else "–" for count in counts]
        rows.append(["Parameters", *cells, *_parameter_ratio(counts, ratios)])
    for metric, label, scale in _ROWS:
        found = [run["summary"].get(metric) for run in runs]
        if any(found):
            cells = [_cell(summary, scale) if summary else "–" for summary in found]
            rows.append([label, *cells, *([_ratio_cell(ratios.get(metric))] if ratios else [])])
    if result["sustained"]:
        cells = [_sustained_cell(result["sustained"]), *([""] * (len(rows[0]) - 2))]
        rows.append(["Sustained (tokens/s)", *cells])
    if any(run["disturbed"] for run in runs):
        cells = [f"{run['disturbed']} of {len(run['repetitions'])}" for run in runs]
        rows.append(["Disturbed repetitions", *cells, *([""] if ratios else [])])
    return rows


def heading(name: str, result: dict[str, Any]) -> str:
    """Return what stands above the table of a device that ``name`` names; "" for this machine alone."""
    device = result["device"]
    name, threads = name or device.get("name", ""), result["settings"]["threads"]
    unit = "thread" if threads == 1 else "threads"
    return f"{name}: {device['cpu']}, {threads} {unit}" if name else ""


def remarks(result: dict[str, Any]) -> list[tuple[str, bool]]:
    """Return lines to write under ``table``, each with whether it is a warning."""
    found = []
    if result["sweep"]:
        tried = ", ".join(str(entry["threads"]) for entry in result["sweep"])
        found.append((f"Threads: {result['settings']['threads']}, the fastest of {tried}", False))
    governors = result["device"]["governors"]
    if governors:
        slow = not SLOW_GOVERNORS.isdisjoint(governors)
        advice = "; set it: sudo cpupower frequency-set -g performance" if slow else ""
        found.append((f"Governor: {', '.join(governors)}{advice}", slow))
    if result["device"]["energy_sensor"]:
        sensor = result["device"]["energy_sensor"]
        found.append((f"Energy: of the whole {_MEASURED_BY[sensor]}, prompt included", False))
    return found


# ---- the processes


class Process(Protocol):
    """A runner that takes commands, on this machine or on another."""

    def write_line(self, line: str) -> None:
        """Give it a line; nothing happens if it has ended."""

    def read_line(self, timeout: float) -> str:
        """Return its next line, "" if it has ended. TimeoutError after ``timeout`` seconds."""

    def ending(self) -> str:
        """Return how it ended, " with signal 9" or " with exit code 1"; "" where that is not known."""

    def stderr_tail(self) -> str:
        """Return the last that it said."""

    def close(self) -> None:
        """End it, whatever it does."""


Start = Callable[[Path, Sequence[str]], Process]
"""Starts a runner for an export with further arguments."""


class LocalProcess:
    """A runner on this machine."""

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        # A file and not a pipe, which would fill up unread.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            # -P: this folder's profile.py must not stand in for the standard library's.
            [sys.executable, "-P", runner.__file__, str(folder), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            encoding="utf-8",
        )

    def write_line(self, line: str) -> None:
        """Give it a line; nothing happens if it has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except OSError:
            return

    def read_line(self, timeout: float) -> str:
        """Return its next line, "" if it has ended. After ``timeout`` seconds it is killed: TimeoutError."""
        assert self._process.stdout is not None
        too_late = threading.Event()

        def kill() -> None:
            too_late.set()
            self._process.kill()

        timer = threading.Timer(timeout, kill)
        timer.daemon = True  # an interrupt may come before the next line
        try:
            timer.start()
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if line.endswith("\n"):
            return line
        if too_late.is_set():
            raise TimeoutError
        return ""

    def ending(self) -> str:
        """Wait for its end and return how it ended."""
        code = self._process.wait()
        return f" with signal {-code}" if code < 0 else f" with exit code {code}"

    def stderr_tail(self) -> str:
        """Return what it said on stderr."""
        self._said.seek(0)
        return self._said.read().decode("utf-8", "replace")

    def close(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                _close(stream)
        self._said.close()


class Worker:
    """Measures one export on demand, in a process that ends with the ``with`` block at the latest."""

    def __init__(
        self, folder: Path, start: Start, prompt: int, generate: int, threads: int
    ) -> None:
        self.name = folder.resolve().name
        # Generous: a large model on a small board takes seconds a token, a process that hangs
        # for ever.
        self._timeout = 300.0 + 2.0 * prompt + 10.0 * generate
        options = {"prompt": prompt, "generate": generate, "threads": threads}
        arguments = [f"--{name}={value}" for name, value in options.items()]
        self._process = start(folder, ["--worker", *arguments])

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.close()

    def repetition(self, command: str = "measure") -> dict[str, Any]:
        """Return the figures of one repetition."""
        return self.ask(command, self._timeout)

    def sustain(self, seconds: float) -> dict[str, Any]:
        """Return the figures of so many seconds without a rest."""
        return self.ask("sustain", self._timeout + seconds, seconds=seconds)

    def ask(self, command: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        """Return the answer to ``command``, waiting at most ``timeout`` seconds for it."""
        self._process.write_line(json.dumps({"command": command, **arguments}))
        try:
            line = self._process.read_line(timeout)
        except TimeoutError:
            raise EdgepruneError(
                f"measuring {self.name} was given up: no answer to {command} in {timeout:.0f} s;"
                " try with less: --prompt 16 --generate 16"
            ) from None
        if not line:
            how, words = self._process.ending(), self._last_words()
            raise EdgepruneError(f"the process that measured {self.name} ended{how}: {words}")
        answer = harmless(json.loads(line))
        if "error" in answer:
            refused = answer["exit_code"] == BadInput.exit_code
            raise (BadInput if refused else EdgepruneError)(answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def _last_words(self) -> str:
        lines = self._process.stderr_tail().split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return said[-1] if said else "it said nothing; was it ended for lack of memory?"


def _close(stream: Any) -> None:
    try:
        stream.close()
    except OSError:  # what was still to be written has no reader any more
        return


# ---- turns and figures


class _Counter:
    """Tells the listener how many of the repetitions are done."""

    def __init__(self, total: int, emit: Emit) -> None:
        self._done, self._total, self._emit = 0, total, emit

    def one(self, note: str) -> None:
        self._done += 1
        self.say(note)

    def say(self, note: str) -> None:
        self._emit(
            Progress(stage=STAGE, done=self._done, total=self._total, unit="repetitions", note=note)
        )


def _in_turns(
    workers: Sequence[Worker], repeats: int, done: _Counter
) -> list[list[dict[str, Any]]]:
    """Return each worker's repetitions, each with its ``turn``: A B, B A, A B ..."""
    samples: list[list[dict[str, Any]]] = [[] for _ in workers]
    turn = 0
    for pair in range(repeats):
        order = range(len(workers))
        for index in reversed(order) if pair % 2 else order:
            found = workers[index].repetition()
            samples[index].append({"turn": turn, **found})
            turn += 1
            speed = found["decode_tokens_per_second"]
            done.one(f"{workers[index].name}: {speed:.1f} tokens/s")
    return samples


def _sweep(
    folder: Path, start: Start, prompt: int, generate: int, emit: Emit
) -> list[dict[str, Any]]:
    """Return how fast ``folder`` decodes with 1, 2, 4 ... threads and one a physical core."""
    with Worker(folder, start, prompt, generate, 0) as worker:
        device = worker.ask("report", LOAD_TIMEOUT)["device"]
    counts = thread_counts(device["physical_cores"], device["logical_cores"])
    found: list[dict[str, Any]] = []
    note = "finding the best number of threads"
    for done, threads in enumerate(counts):
        emit(Progress(stage=STAGE, done=done, total=len(counts), unit="thread counts", note=note))
        with Worker(folder, start, prompt, generate, threads) as worker:
            worker.ask("load", LOAD_TIMEOUT)
            worker.repetition("warmup")
            tried = [worker.repetition() for _ in range(SWEEP_REPEATS)]
        speed = statistics.median(each["decode_tokens_per_second"] for each in tried)
        found.append({"threads": threads, "decode_tokens_per_second": speed})
        note = f"{threads} threads: {speed:.1f} tokens/s"
    emit(
        Progress(stage=STAGE, done=len(counts), total=len(counts), unit="thread counts", note=note)
    )
    return found


def thread_counts(physical: int, logical: int) -> list[int]:
    """Return the numbers of threads worth trying: powers of two and one a physical core."""
    powers = {1 << exponent for exponent in range(logical.bit_length())}
    return sorted({count for count in powers | {physical} if count <= logical})


def _sustain(worker: Worker, minutes: float, emit: Emit) -> dict[str, Any]:
    """Let ``worker`` generate on end for so many minutes; return how its speed went, and warn if it fell."""
    total, began = 60 * minutes, time.monotonic()
    samples: list[dict[str, Any]] = []
    note, passed = f"{worker.name}: sustained", 0.0
    while passed < total:
        _tell_seconds(passed, total, note, emit)
        found = worker.sustain(min(SUSTAINED_INTERVAL, total - passed))
        passed = time.monotonic() - began
        samples.append({"seconds": passed, **{key: found[key] for key in _SAMPLED}})
        note = f"{worker.name}: {found['decode_tokens_per_second']:.1f} tokens/s"
    _tell_seconds(total, total, note, emit)
    lasting = {"minutes": minutes, "samples": samples, **_first_and_last(samples)}
    _warn_of_slowing(worker.name, lasting, emit)
    return lasting


def _tell_seconds(passed: float, total: float, note: str, emit: Emit) -> None:
    whole = max(1, round(total))
    done = min(whole, round(passed))
    emit(Progress(stage=STAGE, done=done, total=whole, unit="seconds", note=note))


def _first_and_last(samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the mean speeds of the first and the last minute, halves where there are no two, and their ratio."""
    end = samples[-1]["seconds"]
    window = min(60.0, end / 2)
    speeds = [(each["seconds"], each["decode_tokens_per_second"]) for each in samples]
    first = [speed for seconds, speed in speeds if seconds <= window] or [speeds[0][1]]
    last = [speed for seconds, speed in speeds if seconds > end - window]
    means = statistics.fmean(first), statistics.fmean(last)
    return {"first_minute": means[0], "last_minute": means[1], "ratio": means[1] / means[0]}


def _ratios(export: dict[str, Any], against: dict[str, Any]) -> dict[str, Any]:
    """Return export / against for every metric, pair by pair."""
    found = {}
    for name in runner.PROCESS_METRICS:
        if export.get(name) and against.get(name):
            found[name] = [export[name] / against[name]]
    pairs = list(zip(export["repetitions"], against["repetitions"], strict=True))
    for name in (*runner.REPETITION_METRICS, "joules_per_token"):
        if all(ours[name] and theirs[name] for ours, theirs in pairs):
            found[name] = [ours[name] / theirs[name] for ours, theirs in pairs]
    return {
        name: {"samples": samples, **runner.summarise(samples)} for name, samples in found.items()
    }


def _warn_of_disturbance(runs: Sequence[dict[str, Any]], emit: Emit) -> None:
    disturbed = sum(run["disturbed"] for run in runs)
    if not disturbed:
        return
    counts = {reason: sum(run["disturbed_by"].get(reason, 0) for run in runs) for reason in _ADVICE}
    reasons = "; ".join(
        f"in {count} {_ADVICE[reason]}" for reason, count in counts.items() if count
    )
    total = sum(len(run["repetitions"]) for run in runs)
    text = f"{disturbed} of {total} repetitions were disturbed ({reasons}): measure again"
    emit(Note(text=text, level="warning"))


def _warn_of_slowing(name: str, lasting: dict[str, Any], emit: Emit) -> None:
    throttled = sum(bool(sample["throttled"]) for sample in lasting["samples"])
    if lasting["ratio"] >= SLOWED_BELOW and not throttled:
        return
    text = (
        f"{name} decodes at {lasting['ratio']:.0%} of its first speed after {lasting['minutes']:g} minutes"
        f" ({_sustained_cell(lasting)} tokens/s)"
    )
    if throttled:
        text += f", throttled in {throttled} of {len(lasting['samples'])} samples"
    emit(Note(text=f"{text}: expect that of long use, or cool the device", level="warning"))


# ---- cells


def _headings(runs: Sequence[dict[str, Any]]) -> list[str]:
    names = [run["name"] for run in runs]
    return names if len(set(names)) == len(names) else [run["role"] for run in runs]


def _parameters(run: dict[str, Any]) -> int | None:
    return (run["model"] or {}).get("parameters")


def _parameter_ratio(counts: Sequence[int | None], ratios: object) -> list[str]:
    if not ratios:
        return []
    ours, theirs = counts
    return [f"{ours / theirs:.2f}" if ours and theirs else ""]


def _cell(summary: dict[str, Any], scale: float) -> str:
    mean = _number(summary["mean"] * scale)
    if summary["stdev"] is None:
        return mean
    decimals = len(mean.partition(".")[2])
    return f"{mean} ± {summary['stdev'] * scale:.{decimals}f}"


def _sustained_cell(lasting: dict[str, Any]) -> str:
    return f"{_number(lasting['first_minute'])} → {_number(lasting['last_minute'])}"


def _ratio_cell(ratio: dict[str, Any] | None) -> str:
    if ratio is None:
        return ""
    median = f"{ratio['median']:.2f}"
    if ratio["n"] == 1:
        return median
    return f"{median} ({ratio['min']:.2f}–{ratio['max']:.2f})"


def _number(value: float) -> str:
    """Return three digits or more: 0.123, 1.23, 12.3, 123, 1,234."""
    decimals = 0 if value >= 1000 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{decimals}f}"
