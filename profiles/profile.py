"""Measure exported models on this machine: each in a process of its own, taking turns.

The measuring itself is ``runner.py``, which runs in those processes and alone on a board.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from edgeprune.errors import BadInput, EdgepruneError
from edgeprune.events import Emit, Note, Progress, ignore
from edgeprune.profiles import runner
from edgeprune.quantities import format_count

STAGE = "profile"
LOAD_TIMEOUT = 1800.0

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
)


def profile(
    export: str | PathLike[str],
    *,
    against: str | PathLike[str] | None = None,
    prompt: int = 128,
    generate: int = 128,
    repeats: int = 5,
    threads: int | None = None,
    emit: Emit = ignore,
) -> dict[str, Any]:
    """Measure the folder ``export``, in turns with the folder ``against`` if there is one.

    Each repetition runs ``prompt`` tokens and generates ``generate``. With two models the turns go
    A B, B A, A B ...: repetition i of both is a pair, and a machine that drifts treats both alike.
    ``threads`` of None is one a physical core.

    Returns plain JSON values; times in seconds, sizes in bytes, speeds in tokens per second::

        schema_version, device, settings
        runs[0]   of ``export`` (role "export"); runs[1] of ``against`` (role "against")
            name, folder, model (what the exporter wrote of it, or None), file_bytes, load_seconds,
            peak_memory_bytes ..., disturbed (how many repetitions others got in the way of)
            repetitions[i]  raw: inter_token_seconds[generate - 1], decode_tokens_per_second,
                            prefill_tokens_per_second, time_to_first_token_seconds, disturbed ...
            summary[metric] n, mean, stdev, median, min, max
        ratios[metric]      export / against: samples (pair by pair), n, mean, stdev, median, ...
                            None without ``against``

    Raises:
        BadInput: a folder is no export, its files are damaged, or the tokens exceed its context.
        EdgepruneError: a measuring process failed, or the memory does not suffice.

    """
    if repeats < 1:
        raise BadInput(f"--repeats must be at least 1, not {repeats}")
    folders = [Path(export), *([Path(against)] if against is not None else [])]
    options = {"prompt": prompt, "generate": generate, "threads": threads or 0}
    sessions = [_checked(folder, options) for folder in folders]
    done = _Counter(len(folders) * (repeats + 1), emit)
    with ExitStack() as stack:
        workers = [stack.enter_context(_Worker(folder, options)) for folder in folders]
        for worker in workers:
            done.say(f"loading {worker.name}")
            worker.ask("load", LOAD_TIMEOUT)
        for worker in workers:
            worker.repetition("warmup")
            done.one(f"{worker.name}: warm-up")
        repetitions = _in_turns(workers, repeats, done)
        reports = [worker.ask("report", LOAD_TIMEOUT) for worker in workers]
    devices = [report.pop("device") for report in reports]
    runs = [
        runner.run_of(role, report, samples)
        for role, report, samples in zip(("export", "against"), reports, repetitions, strict=False)
    ]
    _warn_of_disturbance(runs, emit)
    return {
        "schema_version": runner.SCHEMA_VERSION,
        "device": devices[0],
        "settings": sessions[0].settings(repeats),
        "runs": runs,
        "ratios": _ratios(*runs) if len(runs) == 2 else None,
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
        cells = [_cell(run["summary"][metric], scale) for run in runs]
        rows.append([label, *cells, *([_ratio_cell(ratios[metric])] if ratios else [])])
    if any(run["disturbed"] for run in runs):
        cells = [f"{run['disturbed']} of {len(run['repetitions'])}" for run in runs]
        rows.append(["Disturbed repetitions", *cells, *([""] if ratios else [])])
    return rows


# ---- the processes


class _Worker:
    """A process that measures one model on demand, ended with the ``with`` block at the latest."""

    def __init__(self, folder: Path, options: dict[str, int]) -> None:
        self.name = folder.resolve().name
        # Generous: a large model on a small board takes seconds a token, a process that hangs
        # for ever.
        self._timeout = 300.0 + 2.0 * options["prompt"] + 10.0 * options["generate"]
        # A file and not a pipe, which would fill up unread.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        arguments = [f"--{name}={value}" for name, value in options.items()]
        self._process = subprocess.Popen(
            # -P: this folder's profile.py must not stand in for the standard library's.
            [sys.executable, "-P", runner.__file__, str(folder), "--worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            encoding="utf-8",
        )

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                _close(stream)
        self._said.close()

    def repetition(self, command: str = "measure") -> dict[str, Any]:
        return self.ask(command, self._timeout)

    def ask(self, command: str, timeout: float) -> dict[str, Any]:
        """Return the answer to ``command``, waiting at most ``timeout`` seconds for it."""
        with self._killed_after(timeout) as too_late:
            line = self._exchange(json.dumps({"command": command}) + "\n")
        if not line.endswith("\n"):
            raise self._death(command, timeout if too_late.is_set() else None)
        answer = json.loads(line)
        if "error" in answer:
            refused = answer["exit_code"] == BadInput.exit_code
            raise (BadInput if refused else EdgepruneError)(answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def _exchange(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except OSError:  # it has ended already
            return ""
        return self._process.stdout.readline()

    @contextmanager
    def _killed_after(self, seconds: float) -> Iterator[threading.Event]:
        too_late = threading.Event()

        def kill() -> None:
            too_late.set()
            self._process.kill()

        timer = threading.Timer(seconds, kill)
        timer.start()
        try:
            yield too_late
        finally:
            timer.cancel()

    def _death(self, command: str, timeout: float | None) -> EdgepruneError:
        code = self._process.wait()
        if timeout is not None:
            return EdgepruneError(
                f"measuring {self.name} was given up: no answer to {command} in {timeout:.0f} s;"
                " try with less: --prompt 16 --generate 16"
            )
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return EdgepruneError(
            f"the process that measured {self.name} ended with {how}: {self._last_words()}"
        )

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode("utf-8", "replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return said[-1] if said else "it said nothing; was it ended for lack of memory?"


def _close(stream: Any) -> None:
    try:
        stream.close()
    except OSError:  # what was still to be written has no reader any more
        return


def _checked(folder: Path, options: dict[str, int]) -> runner.Session:
    try:
        return runner.Session(folder, **options)
    except runner.Refused as error:
        raise BadInput(str(error)) from None


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
    workers: Sequence[_Worker], repeats: int, done: _Counter
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


def _ratios(export: dict[str, Any], against: dict[str, Any]) -> dict[str, Any]:
    """Return export / against for every metric, pair by pair."""
    found = {}
    for name in runner.PROCESS_METRICS:
        found[name] = [export[name] / against[name]]
    pairs = list(zip(export["repetitions"], against["repetitions"], strict=True))
    for name in runner.REPETITION_METRICS:
        found[name] = [ours[name] / theirs[name] for ours, theirs in pairs]
    return {
        name: {"samples": samples, **runner.summarise(samples)} for name, samples in found.items()
    }


def _warn_of_disturbance(runs: Sequence[dict[str, Any]], emit: Emit) -> None:
    disturbed = sum(run["disturbed"] for run in runs)
    if disturbed:
        text = (
            f"{disturbed} of {sum(len(run['repetitions']) for run in runs)} repetitions ran while"
            f" other programs took more than {runner.DISTURBED_ABOVE:.0%} of the processor:"
            " close them and measure again"
        )
        emit(Note(text=text, level="warning"))


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


def _ratio_cell(ratio: dict[str, Any]) -> str:
    median = f"{ratio['median']:.2f}"
    if ratio["n"] == 1:
        return median
    return f"{median} ({ratio['min']:.2f}–{ratio['max']:.2f})"


def _number(value: float) -> str:
    """Return three digits or more: 0.123, 1.23, 12.3, 123, 1,234."""
    decimals = 0 if value >= 1000 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{decimals}f}"
