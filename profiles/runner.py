"""Measure how fast one exported model runs on this machine, in a process of its own.

One file that needs Python 3.9, numpy and onnxruntime-genai, nothing else of edgeprune: it is copied
to boards.

    python runner.py FOLDER --prompt 128 --generate 128 --repeats 5 --threads 4

prints one JSON document. With ``--worker`` it measures on demand instead: a line
``{"command": C}`` on stdin, C one of ``load``, ``warmup``, ``measure``, ``sustain`` (for so many
``seconds``), ``report`` (of so many ``repeats``), ``quit``, is answered by one line on stdout,
``{"result": ...}`` or ``{"error": "...", "exit_code": N}``. In between it sleeps, so two models can
take turns on a quiet machine; when stdin ends, it ends at once, so it never outlives its parent.

What is measured: the prompt is fixed pseudo-random token ids, the same for every model of one
vocabulary; decoding is greedy and goes on past the end-of-text token, so each repetition generates
exactly as many tokens as asked. Choosing the token counts, tokenising and detokenising do not.
Times are seconds, sizes bytes, speeds tokens per second, clocks Hz, temperatures degrees Celsius.

A .gguf file instead of a folder is measured by llama.cpp's llama-bench, which must be on the PATH;
numpy and onnxruntime-genai are not needed then.

What the machine was like is read before and after each repetition, where the system tells: clock,
temperature, throttling, other programs' load, and the energy used. A repetition that throttling, a
lower clock or other load came in the way of is marked ``disturbed``, and counts like the others.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import platform
import queue
import random
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TextIO

SCHEMA_VERSION = 2
SEED = 20
CONFIG = "genai_config.json"
FACTS = "edgeprune_export.json"
LLAMA_BENCH = "llama-bench"
# Above this share of the machine taken by others during a repetition, its figures are in doubt.
DISTURBED_ABOVE = 0.05
# Below this share of the clock of the first repetition, too.
CLOCK_FELL_BELOW = 0.9
# What disturbs a repetition.
OTHER_LOAD, THROTTLED, CLOCK_FELL = "other load", "throttled", "clock fell"
# What loading needs at least, over the size of the file: the runtime maps the weights and keeps a
# repacked copy of them (seen: 1.45 at int4).
MEMORY_FACTOR = 1.5

# The figures that every repetition has.
REPETITION_METRICS = (
    "prefill_tokens_per_second",
    "time_to_first_token_seconds",
    "decode_tokens_per_second",
    "inter_token_p50_seconds",
    "inter_token_p95_seconds",
    "inter_token_p99_seconds",
)
# Those that it has where the system offers them.
SENSOR_METRICS = ("clock", "temperature", "joules_per_token")
# The figures that a process has once.
PROCESS_METRICS = ("file_bytes", "load_seconds", "peak_memory_bytes")


class RunnerError(Exception):
    """The measurement failed; the message is one line."""

    exit_code = 1


class Refused(RunnerError):
    """What was asked for cannot be measured; nothing was loaded."""

    exit_code = 2


# ---- the export folder


def check(folder: Path, prompt: int, generate: int) -> dict[str, Any]:
    """Return the ``model`` section of the folder's genai_config.json.

    Raises:
        Refused: no export is there, or its context is shorter than ``prompt + generate`` tokens.

    """
    if not folder.is_dir():
        what = "is a file, not an export folder" if folder.exists() else "does not exist"
        raise Refused(f"{folder} {what}; make an export: edgeprune export MODEL --onnx -o {folder}")
    again = f"export it again: edgeprune export MODEL --onnx -o {folder}"
    if not (folder / CONFIG).is_file():
        raise Refused(
            f"{folder} is not an export: it has no {CONFIG}; make one of the model:"
            " edgeprune export MODEL --onnx -o DIR"
        )
    model: Any = _read_json(folder / CONFIG, again).get("model")
    try:
        graph = folder / str(model["decoder"]["filename"])
        context, _vocabulary = int(model["context_length"]), int(model["vocab_size"])
    except (KeyError, TypeError, ValueError):
        raise Refused(f"{folder / CONFIG} lacks what a decoder needs; {again}") from None
    if not graph.is_file():
        raise Refused(f"{graph} is missing; {again}")
    if prompt + generate > context:
        raise Refused(
            f"{prompt} + {generate} tokens do not fit the model's context of {context};"
            f" ask for less: --prompt {context // 2} --generate {context - context // 2}"
        )
    return dict(model)


def facts(folder: Path) -> dict[str, Any] | None:
    """Return what the exporter wrote about the model (precision, parameters, widths), if it did."""
    path = folder / FACTS
    return _read_json(path, "export the model again") if path.is_file() else None


def _read_json(path: Path, advice: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise Refused(f"{path} cannot be read as JSON; {advice}")
    return found


def _graph_files(folder: Path, graph: str) -> list[Path]:
    """Return the ONNX file and the files of its weights, which carry its name and a suffix."""
    return sorted(path for path in folder.iterdir() if path.name.startswith(graph))


# ---- measuring


class Session:
    """One model, loaded once, measured again and again. ``threads`` of 0: one a physical core."""

    def __init__(self, folder: Path, prompt: int, generate: int, threads: int = 0) -> None:
        for name, value, least in (
            ("--prompt", prompt, 1),
            ("--generate", generate, 2),
            ("--threads", threads, 0),
        ):
            if value < least:
                raise Refused(f"{name} must be at least {max(least, 1)}, not {value}")
        self.folder = folder
        self.prompt = prompt
        self.generate = generate
        self.threads = threads or default_threads()
        self.config, self.facts = self._look()
        self.measured: dict[str, Any] = {}
        self.sensors = Sensors()
        self._sensed: dict[str, Any] = self.sensors.state()
        self._first_clock: float | None = None
        self._model: Any = None
        self._tokens: Any = None

    def load(self) -> dict[str, Any]:
        """Load the model; return the sizes, the time it took and the memory before and after.

        Raises:
            Refused: the memory does not suffice, or the runtime cannot load the files.

        """
        try:
            import numpy
            import onnxruntime_genai as genai
        except ImportError as error:
            raise RunnerError(f"{_one_line(error)}: pip install numpy onnxruntime-genai") from error
        files = self._files()
        self._check_memory()
        _read_through(files)
        before = resident_memory()
        started = time.perf_counter()
        try:
            config = genai.Config(str(self.folder))
            config.overlay(json.dumps(self._overlay()))
            self._model = genai.Model(config)
        except Exception as error:  # the runtime raises RuntimeError and worse for damaged files
            raise Refused(
                f"{self.folder} cannot be loaded ({_one_line(error)});"
                f" export it again: edgeprune export MODEL --onnx -o {self.folder}"
            ) from error
        seconds = time.perf_counter() - started
        chosen = prompt_tokens(self.prompt, self.config["vocab_size"])
        self._tokens = numpy.array(chosen, dtype=numpy.int32)
        self.measured = {
            "file_bytes": sum(path.stat().st_size for path in files),
            "folder_bytes": sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file()),
            "load_seconds": seconds,
            "memory_before_load_bytes": before,
            "memory_loaded_bytes": resident_memory(),
        }
        settle()
        return self.measured

    def _look(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        return check(self.folder, self.prompt, self.generate), facts(self.folder)

    def warm_up(self) -> dict[str, Any]:
        """Do a repetition that nothing is compared with."""
        found = self.repetition()
        self._first_clock = None
        return found

    def repetition(self) -> dict[str, Any]:
        """Run the prompt and generate the tokens once; return the times and what they amount to.

        ``inter_token_seconds`` has one entry a generated token but the first, which comes out of
        the prompt's run. ``clock`` is that of the fastest core and ``temperature`` the highest, at
        the end; ``joules`` are the machine's, and ``joules_per_token`` the part of a generated one.
        ``disturbed_by`` says what makes it ``disturbed``. What the system does not tell is None.
        """
        with Watch(self.sensors) as watch:
            timed = self._generate()
        settle()
        seen = watch.seen
        reasons = self._disturbances(seen)
        joules = seen["joules"]
        return {
            **timed,
            **seen,
            "joules_per_token": None if joules is None else joules / self.generate,
            "disturbed": bool(reasons),
            "disturbed_by": reasons,
        }

    def sustain(self, seconds: float) -> dict[str, Any]:
        """Run and generate without a rest until ``seconds`` are over; return how fast it decoded."""
        with Watch(self.sensors) as watch:
            end = time.monotonic() + seconds
            timed = [self._generate()]
            while time.monotonic() < end:
                timed.append(self._generate())
        decoding = sum(entry["decode_seconds"] for entry in timed)
        tokens = sum(entry["decode_seconds"] * entry["decode_tokens_per_second"] for entry in timed)
        return {"decode_tokens_per_second": tokens / decoding, **watch.seen}

    def report(self) -> dict[str, Any]:
        """Return what is known of the model and its process: ``peak_memory_bytes`` until now."""
        return {
            "name": self.folder.resolve().name,
            "folder": str(self.folder),
            "model": self.facts,
            **self.measured,
            "peak_memory_bytes": peak_memory(),
            "sensors": {"before": self._sensed, "after": self.sensors.state()},
        }

    def settings(self, repeats: int) -> dict[str, Any]:
        """Return how the measurement was done, for the record."""
        return {
            "prompt": self.prompt,
            "generate": self.generate,
            "repeats": repeats,
            "threads": self.threads,
            "seed": SEED,
            "warmup": "one whole repetition of each model, not counted",
            "decoding": "greedy, past the end-of-text token",
            "included": "choosing each token; in the time to first token, setting up the generator",
            "excluded": "tokenising, detokenising, starting Python, reading the files from disk",
            "disturbed_above": DISTURBED_ABOVE,
            "clock_fell_below": CLOCK_FELL_BELOW,
        }

    def _generate(self) -> dict[str, Any]:
        started = time.perf_counter()
        generator = self._generator()
        ready = time.perf_counter()
        generator.append_tokens(self._tokens)
        filled = time.perf_counter()
        marks = [filled]
        for _ in range(self.generate):
            if generator.is_done():
                break
            generator.generate_next_token()
            marks.append(time.perf_counter())
        self._check_count(int(generator.token_count()), len(marks) - 1)
        between = [marks[i + 1] - marks[i] for i in range(1, self.generate)]
        return {
            "tokens": self.generate,
            "prefill_seconds": filled - ready,
            "decode_seconds": marks[-1] - marks[1],
            "inter_token_seconds": [round(value, 7) for value in between],
            "prefill_tokens_per_second": self.prompt / (filled - ready),
            "time_to_first_token_seconds": marks[1] - started,
            "decode_tokens_per_second": len(between) / (marks[-1] - marks[1]),
            "inter_token_p50_seconds": percentile(between, 50),
            "inter_token_p95_seconds": percentile(between, 95),
            "inter_token_p99_seconds": percentile(between, 99),
        }

    def _disturbances(self, seen: dict[str, Any]) -> list[str]:
        clock, load = seen["clock"], seen["other_load"]
        if self._first_clock is None:
            self._first_clock = clock
        fell = clock is not None and clock < CLOCK_FELL_BELOW * (self._first_clock or 0)
        found = {
            OTHER_LOAD: load is not None and load > DISTURBED_ABOVE,
            THROTTLED: seen["throttled"],
            CLOCK_FELL: fell,
        }
        return [reason for reason, is_so in found.items() if is_so]

    def _overlay(self) -> dict[str, Any]:
        options = {"intra_op_num_threads": self.threads}
        return {"model": {"decoder": {"session_options": options}}}

    def _generator(self) -> Any:
        import onnxruntime_genai as genai

        length = self.prompt + self.generate
        params = genai.GeneratorParams(self._model)
        params.set_search_options(
            batch_size=1,
            max_length=length,
            min_length=length,  # masks the end-of-text tokens until then
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
        )
        return genai.Generator(self._model, params)

    def _check_count(self, in_sequence: int, generated: int) -> None:
        if generated != self.generate or in_sequence != self.prompt + self.generate:
            raise RunnerError(
                f"{self.folder} stopped after {generated} of {self.generate} tokens:"
                " its figures would not compare"
            )

    def memory_needed(self) -> float:
        """Return about how many bytes of memory the loaded model takes, its cache included."""
        decoder = self.config["decoder"]
        cache_elements = 2 * (self.prompt + self.generate)
        for name in ("num_hidden_layers", "num_key_value_heads", "head_size"):
            cache_elements *= int(decoder.get(name, 1))
        file_bytes = sum(path.stat().st_size for path in self._files())
        return file_bytes * MEMORY_FACTOR + cache_elements * 4

    def _files(self) -> list[Path]:
        return _graph_files(self.folder, self.config["decoder"]["filename"])

    def _check_memory(self) -> None:
        needed = self.memory_needed()
        available = available_memory()
        if available is not None and needed > available:
            raise RunnerError(
                f"{self.folder} needs about {needed / 1e9:.1f} GB to run and"
                f" {available / 1e9:.1f} GB are free: close other programs, or measure one model"
                " at a time, without --against"
            )


class GgufSession(Session):
    """A GGUF file, which llama.cpp's llama-bench loads, warms up and measures anew in each repetition.

    It tells the speeds of the prompt and of generating, each from an empty context, and no more. The energy of a
    repetition would be that of loading, too: it is None.
    """

    def _look(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        try:
            with self.folder.open("rb") as file:
                is_one = file.read(4) == b"GGUF"
        except OSError as error:
            raise Refused(f"{self.folder} cannot be read: {error.strerror}") from None
        if not is_one:
            raise Refused(
                f"{self.folder} is not a GGUF file; give another, or the folder of an export"
            )
        return {}, None

    def load(self) -> dict[str, Any]:
        """Look for llama-bench; return the size of the file.

        Raises:
            Refused: there is none.
            RunnerError: the memory does not suffice.

        """
        if shutil.which(LLAMA_BENCH) is None:
            raise Refused(
                f"{self.folder} is measured by {LLAMA_BENCH}, which is not on the PATH: unpack a release"
                " of https://github.com/ggml-org/llama.cpp/releases and put its folder there"
            )
        self._check_memory()
        _read_through(self._files())
        size = self.folder.stat().st_size
        self.measured = {"file_bytes": size, "folder_bytes": size}
        return self.measured

    def repetition(self) -> dict[str, Any]:
        """Run llama-bench once; return its speeds and what the machine was like, as ``Session``."""
        return {**super().repetition(), "joules": None, "joules_per_token": None}

    def memory_needed(self) -> float:
        """Return about how many bytes of memory the loaded model takes."""
        return self.folder.stat().st_size * MEMORY_FACTOR

    def report(self) -> dict[str, Any]:
        """Return what is known of the model and of llama-bench."""
        return {**super().report(), "peak_memory_bytes": _peak_memory_of_children()}

    def settings(self, repeats: int) -> dict[str, Any]:
        """Return how the measurement was done, for the record."""
        return {
            **super().settings(repeats),
            "warmup": "one of llama-bench's own before each repetition, not counted",
            "decoding": "by llama-bench, from an empty context",
            "included": "nothing but the model's work",
            "excluded": "choosing each token, tokenising, loading",
        }

    def _files(self) -> list[Path]:
        return [self.folder]

    def _generate(self) -> dict[str, Any]:
        tests = self._benched()
        prefill, decode = ([each for each in tests if each[key]] for key in ("n_prompt", "n_gen"))
        (prefill_speed,), (decode_speed,) = prefill[0]["samples_ts"], decode[0]["samples_ts"]
        self.facts = {
            "parameters": decode[0]["model_n_params"],
            "type": decode[0]["model_type"],
            "llama.cpp": decode[0]["build_number"],
            "backends": decode[0]["backends"],
        }
        return {
            "tokens": self.generate,
            "prefill_seconds": prefill[0]["samples_ns"][0] / 1e9,
            "decode_seconds": decode[0]["samples_ns"][0] / 1e9,
            "inter_token_seconds": [],
            **dict.fromkeys(REPETITION_METRICS),
            "prefill_tokens_per_second": prefill_speed,
            "decode_tokens_per_second": decode_speed,
        }

    def _benched(self) -> list[dict[str, Any]]:
        numbers = {"-p": self.prompt, "-n": self.generate, "-t": self.threads, "-r": 1}
        options = [str(word) for pair in numbers.items() for word in pair]
        done = subprocess.run(
            [LLAMA_BENCH, "-m", str(self.folder), *options, "-o", "json"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            preexec_fn=_ending_with_parent(),
            check=False,
        )
        try:
            found: list[dict[str, Any]] = json.loads(done.stdout)
        except ValueError:
            said = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
            raise Refused(f"{self.folder} could not be measured by {LLAMA_BENCH}: {said}") from None
        return found


def _ending_with_parent() -> Callable[[], Any] | None:
    """Return what a new process does so that Linux ends it when this one ends; None elsewhere."""
    if sys.platform != "linux":
        return None
    system, set_signal_of_parents_death = ctypes.CDLL(None), 1
    return lambda: system.prctl(set_signal_of_parents_death, signal.SIGKILL)


def session_of(path: Path, prompt: int, generate: int, threads: int = 0) -> Session:
    """Return what measures the folder of an export, or a .gguf file. Raises as ``Session``."""
    kind = GgufSession if path.suffix == ".gguf" else Session
    return kind(path, prompt, generate, threads)


def measure(session: Session, repeats: int) -> dict[str, Any]:
    """Load, warm up and measure ``repeats`` times; return the whole document."""
    session.load()
    session.warm_up()
    repetitions = [session.repetition() for _ in range(repeats)]
    return {
        "schema_version": SCHEMA_VERSION,
        "device": device(),
        "settings": session.settings(repeats),
        "runs": [run_of("export", session.report(), repetitions)],
        "ratios": None,
    }


def run_of(
    role: str, report: dict[str, Any], repetitions: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return a model's entry in ``runs``: its report, raw repetitions and their summary."""
    columns = {
        **{name: [report.get(name)] for name in PROCESS_METRICS},
        **{
            name: [entry[name] for entry in repetitions]
            for name in (*REPETITION_METRICS, *SENSOR_METRICS)
        },
    }
    known = {name: values for name, values in columns.items() if None not in values}
    reasons = [reason for entry in repetitions for reason in entry["disturbed_by"]]
    return {
        "role": role,
        **report,
        "repetitions": list(repetitions),
        "disturbed": sum(bool(entry["disturbed"]) for entry in repetitions),
        "disturbed_by": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "summary": {name: summarise(values) for name, values in known.items()},
    }


def prompt_tokens(count: int, vocabulary: int) -> list[int]:
    """Return ``count`` token ids below ``vocabulary``, always the same ones."""
    draw = random.Random(SEED)
    return [draw.randrange(vocabulary) for _ in range(count)]


def settle(limit: float = 3.0) -> None:
    """Wait until no thread of this process is busy, ``limit`` seconds at most.

    The runtime's threads spin for a while after a run, in the way of whoever measures next.
    """
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        before = time.process_time()
        time.sleep(0.05)
        if time.process_time() - before < 0.002 and not _other_threads_run():
            return


def _other_threads_run() -> bool:
    """Tell whether another thread runs, or would if the machine were not busy with others."""
    for task in Path("/proc/self/task").glob("[0-9]*"):
        state = _read(f"{task}/stat").rpartition(")")[2].split()
        if state[:1] == ["R"] and int(task.name) != threading.get_native_id():
            return True
    return False


def _read_through(files: Sequence[Path]) -> None:
    """Bring the files into the page cache, or the first of two models would load more slowly."""
    for path in files:
        with path.open("rb") as file:
            while file.read(1 << 20):
                pass


# ---- figures


def summarise(values: Sequence[float]) -> dict[str, Any]:
    """Return n, mean, stdev (sample; None for a single value), median, min and max."""
    return {
        "n": len(values),
        "mean": statistics.fmean(values),
        "stdev": statistics.stdev(values) if len(values) > 1 else None,
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the percentile, interpolated between the two nearest of the sorted values."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def other_load(
    before: tuple[float, float] | None, after: tuple[float, float] | None, own: float
) -> float | None:
    """Return the share of the machine (0 to 1) that other processes took; None if unknown.

    ``before`` and ``after`` are ``machine_busy()``, ``own`` the CPU seconds of this process.
    """
    if before is None or after is None or after[1] - before[1] < 0.5:
        return None  # the kernel counts in steps of 10 ms: nothing to be said of a short time
    return max(0.0, (after[0] - before[0] - own) / (after[1] - before[1]))


# ---- the machine


def device() -> dict[str, Any]:
    """Return what the figures were measured on."""
    return {
        "cpu": _cpu_name(),
        "architecture": platform.machine(),
        "physical_cores": physical_cores(),
        "logical_cores": os.cpu_count(),
        "memory_bytes": total_memory(),
        "memory_available_bytes": available_memory(),
        "os": platform.platform(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None,
        "governors": governors(),
        "energy_sensor": power_source().name,
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("onnxruntime-genai", "onnxruntime", "numpy")},
        },
    }


def default_threads() -> int:
    """Return the physical cores that this process may use, a container's quota counted."""
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        return max(1, min(physical_cores(), -(-int(quota[0]) // int(quota[1]))))
    return physical_cores()


def physical_cores() -> int:
    """Return the cores open to this process; on Windows, which does not say, the logical ones."""
    if sys.platform == "darwin":
        return int(_sysctl("hw.physicalcpu") or os.cpu_count() or 1)
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return len({_read(siblings.format(cpu)) or str(cpu) for cpu in os.sched_getaffinity(0)})


def machine_busy() -> tuple[float, float] | None:
    """Return (busy, all) CPU seconds of all cores since the start; None where not to be had.

    Busy counts what a hypervisor took away ("steal"): that is others' work too.
    """
    fields = _read("/proc/stat").split("\n", 1)[0].split()
    if len(fields) < 9 or fields[0] != "cpu":
        return None
    ticks = [int(value) for value in fields[1:9]]  # user nice system idle iowait irq softirq steal
    second = os.sysconf("SC_CLK_TCK")
    return (sum(ticks) - ticks[3] - ticks[4]) / second, sum(ticks) / second


def peak_memory() -> int:
    """Return the most memory that this process has had resident, in bytes."""
    # Not ru_maxrss on Linux: a child inherits there the peak of the process that started it.
    peak = _process_status("VmHWM")
    if peak is not None:
        return peak
    if sys.platform == "win32":
        return _windows_memory()[0]
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most) * (1 if sys.platform == "darwin" else 1024)


def resident_memory() -> int:
    """Return the memory that this process has resident now; its peak where only that is known."""
    if sys.platform == "win32":
        return _windows_memory()[1]
    return _process_status("VmRSS") or peak_memory()


def total_memory() -> int | None:
    """Return the bytes of memory in the machine, None where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def available_memory() -> int | None:
    """Return the bytes that a new process can have; all memory where only that is known."""
    for line in _read("/proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            limit = _read("/sys/fs/cgroup/memory.max")
            free = int(value.split()[0]) * 1024
            return min(free, int(limit)) if limit.isdigit() else free
    return total_memory()


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of those it waited for."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def _peak_memory_of_children() -> int | None:
    """Return the most memory that one of the ended children had resident, in bytes."""
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return int(most) * (1 if sys.platform == "darwin" else 1024)


def _process_status(field: str) -> int | None:
    for line in _read("/proc/self/status").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None


def _windows_memory() -> tuple[int, int]:
    """Return the peak and the present working set in bytes."""

    class Counters(ctypes.Structure):
        _fields_ = [
            ("cb", ctypes.c_uint32),
            ("page_faults", ctypes.c_uint32),
            ("peak", ctypes.c_size_t),
            ("now", ctypes.c_size_t),
            ("rest", ctypes.c_size_t * 6),
        ]

    counters = Counters()
    counters.cb = ctypes.sizeof(counters)
    kernel = ctypes.CDLL("kernel32")
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    process = ctypes.c_void_p(kernel.GetCurrentProcess())
    kernel.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.cb)
    return int(counters.peak), int(counters.now)


def _cpu_name() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "Hardware") and value.strip():
            return value.strip()
    board = _read("/proc/device-tree/model").strip("\0")
    apple = _sysctl("machdep.cpu.brand_string") if sys.platform == "darwin" else ""
    return board or apple or platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _sysctl(name: str) -> str:
    try:
        return subprocess.check_output(["sysctl", "-n", name], text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else "..." + text[-157:]  # the cause stands at the end


# ---- sensors: what the system does not offer is None; tests give them another ``root``

CPUS = "sys/devices/system/cpu/cpu[0-9]*"
HWMON = "sys/class/hwmon/*"
# Hardware monitors that tell the processor's temperature where no thermal zone does.
CPU_MONITORS = ("coretemp", "k10temp")
# Those whose power is a graphics card's, not the machine's.
GRAPHICS = ("amdgpu", "i915", "nouveau", "xe")
# Rails of a Jetson through which all its power comes: the others are parts of it.
WHOLE_BOARD = ("VDD_IN", "POM_5V_IN")
# Bits of a Raspberry Pi's firmware; 16 above each stands "since the start".
FIRMWARE_BITS = ("under-voltage", "clock capped", "throttled", "temperature limit")
POWER_INTERVAL = 0.1


class Rail(NamedTuple):
    """A power line: the product of what its ``files`` say, times ``scale``, is watts."""

    files: tuple[Path, ...]
    scale: float


class PowerSource(NamedTuple):
    """A sensor by ``name``: files that count microjoules, or else rails whose watts add up."""

    name: str | None
    counters: Sequence[Path] = ()
    rails: Sequence[Rail] = ()


def vcgencmd() -> str:
    """Return what the firmware of a Raspberry Pi says of throttling; "" on any other machine."""
    command = shutil.which("vcgencmd")
    if command is None:
        return ""
    try:
        asked = [command, "get_throttled"]
        return subprocess.run(
            asked, stdout=subprocess.PIPE, text=True, timeout=5, check=False
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


class Sensors:
    """The machine's sensors, below ``root`` and in the ``firmware``."""

    def __init__(self, root: str = "/", firmware: Callable[[], str] = vcgencmd) -> None:
        self.root, self.firmware = root, firmware

    def state(self) -> dict[str, Any]:
        """Return ``clock``, ``temperature``, ``governors`` and ``throttling`` of this moment."""
        return {
            "clock": clock(self.root),  # first: it falls when the work is over
            "temperature": temperature(self.root),
            "governors": governors(self.root),
            "throttling": throttling(self.root, self.firmware),
        }


class Watch:
    """Sees what happens to the machine while a ``with`` block works: ``seen`` when it has ended."""

    def __init__(self, sensors: Sensors) -> None:
        self._sensors = sensors
        self._energy = Energy(power_source(sensors.root))
        self.seen: dict[str, Any] = {}

    def __enter__(self) -> Watch:
        self._before = self._sensors.state()
        self._energy.start()
        self._busy, self._own = machine_busy(), _cpu_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        own = _cpu_seconds() - self._own
        others = other_load(self._busy, machine_busy(), own)
        joules = self._energy.stop()
        after = self._sensors.state()
        self.seen = {
            "cpu_seconds": own,
            "other_load": others,
            # The fastest core's: those without work go slower, however cool they are.
            "clock": after["clock"] and after["clock"]["max"],
            "temperature": after["temperature"],
            "throttled": was_throttled(self._before["throttling"], after["throttling"]),
            "joules": joules,
            "sensors": {"before": self._before, "after": after},
        }


def clock(root: str = "/") -> dict[str, float] | None:
    """Return ``mean``, ``min`` and ``max`` of the cores' clocks in Hz."""
    found = [1000.0 * value for value in _numbers(root, f"{CPUS}/cpufreq/scaling_cur_freq")]
    if not found:
        return None
    return {"mean": statistics.fmean(found), "min": min(found), "max": max(found)}


def governors(root: str = "/") -> list[str] | None:
    """Return by which rules the cores' clocks are chosen, each once."""
    files = Path(root).glob(f"{CPUS}/cpufreq/scaling_governor")
    return sorted({_read(str(path)) for path in files} - {""}) or None


def temperature(root: str = "/") -> float | None:
    """Return the highest temperature of the thermal zones and the processor, in degrees Celsius."""
    zones = Path(root).glob("sys/class/thermal/thermal_zone*")
    # A Jetson's power chip always says the same.
    found = [_number(zone / "temp") for zone in zones if "PMIC" not in _read(f"{zone}/type")]
    for chip in Path(root).glob(HWMON):
        if _read(f"{chip}/name") in CPU_MONITORS:
            found += [_number(path) for path in chip.glob("temp*_input")]
    sensible = [value / 1000 for value in found if value is not None and 0 < value < 150_000]
    return max(sensible) if sensible else None


def throttling(root: str = "/", firmware: Callable[[], str] = vcgencmd) -> dict[str, Any] | None:
    """Return ``now``, why the processor is slowed down, and ``events``, how often it has been."""
    counts = _numbers(root, f"{CPUS}/thermal_throttle/*_throttle_count")
    counts += _numbers(root, f"{HWMON}/oc*_event_cnt")  # a Jetson's over-current alarms
    coolers = [
        path / "cur_state"
        for path in Path(root).glob("sys/class/thermal/cooling_device*")
        if "cpufreq" in _read(f"{path}/type") or _read(f"{path}/type") == "Processor"
    ]
    bits = _firmware_bits(firmware())
    if not counts and not coolers and bits is None:
        return None
    now = ["cooling"] if any((_number(path) or 0) > 0 for path in coolers) else []
    now += [name for bit, name in enumerate(FIRMWARE_BITS) if (bits or 0) >> bit & 1]
    return {"now": now, "events": sum(counts) + bin((bits or 0) >> 16).count("1")}


def was_throttled(before: dict[str, Any] | None, after: dict[str, Any] | None) -> bool | None:
    """Tell whether the processor was slowed down between two ``throttling()``."""
    if before is None or after is None:
        return None
    return bool(before["now"] or after["now"] or after["events"] > before["events"])


def _firmware_bits(said: str) -> int | None:
    name, _, value = said.strip().partition("=")
    try:
        return int(value, 16) if name == "throttled" else None
    except ValueError:
        return None


def power_source(root: str = "/") -> PowerSource:
    """Return the best of the sensors that can be read: RAPL, power rails, a battery in use."""
    counters = [
        path / "energy_uj"
        for path in sorted(Path(root).glob("sys/class/powercap/intel-rapl:*"))
        # A package's parts are zones of their own; the counters are often root's alone.
        if _read(f"{path}/name").startswith("package") and _number(path / "energy_uj") is not None
    ]
    if counters:
        return PowerSource("RAPL", counters=counters)
    for name, rails in (("power rails", _board_rails(root)), ("battery", _battery_rails(root))):
        if rails:
            return PowerSource(name, rails=rails)
    return PowerSource(None)


def _board_rails(root: str) -> list[Rail]:
    rails = {}
    for chip in sorted(Path(root).glob(HWMON)):
        name = _read(f"{chip}/name")
        if name in GRAPHICS:
            continue
        for path in chip.glob("power*_input"):
            label = _read(str(path).replace("_input", "_label"))
            rails[Rail((path,), 1e-6)] = label
        for channel in (1, 2, 3) if name == "ina3221" else ():  # the fourth is a sum of shunts
            files = (chip / f"in{channel}_input", chip / f"curr{channel}_input")
            rails[Rail(files, 1e-6)] = _read(f"{chip}/in{channel}_label")
    known = [rail for rail in rails if _watts([rail]) is not None]
    return [rail for rail in known if rails[rail] in WHOLE_BOARD] or known


def _battery_rails(root: str) -> list[Rail]:
    rails = []
    for supply in sorted(Path(root).glob("sys/class/power_supply/*")):
        is_in_use = _read(f"{supply}/status") == "Discharging"
        is_a_mouse = _read(f"{supply}/scope") == "Device"
        if _read(f"{supply}/type") != "Battery" or not is_in_use or is_a_mouse:
            continue
        power = Rail((supply / "power_now",), 1e-6)
        product = Rail((supply / "voltage_now", supply / "current_now"), 1e-12)
        rails.append(product if _watts([power]) is None else power)
    return [rail for rail in rails if _watts([rail]) is not None]


def _watts(rails: Sequence[Rail]) -> float | None:
    total = 0.0
    for rail in rails:
        factors = [_number(path) for path in rail.files]
        if None in factors:
            return None
        total += rail.scale * abs(math.prod(value for value in factors if value is not None))
    return total


class Energy:
    """Counts joules between ``start`` and ``stop``.

    A counter is read twice. Watts are read every 0.1 s by a thread of its own, and added up.
    """

    def __init__(self, source: PowerSource) -> None:
        self._source = source
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._samples: list[tuple[float, float]] = []

    def start(self) -> None:
        """Begin to count."""
        self._counted = [_number(path) for path in self._source.counters]
        if self._source.rails:
            self._sample()
            self._thread = threading.Thread(target=self._keep_sampling, daemon=True)
            self._thread.start()

    def stop(self) -> float | None:
        """Return the joules since ``start``; None if no sensor tells."""
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            self._sample()
            return self._integral()
        counted = [_number(path) for path in self._source.counters]
        if not counted or None in counted or None in self._counted:
            return None
        return sum(map(_joules_between, self._source.counters, self._counted, counted))

    def _keep_sampling(self) -> None:
        while not self._stopped.wait(POWER_INTERVAL):
            self._sample()

    def _sample(self) -> None:
        watts = _watts(self._source.rails)
        if watts is not None:
            self._samples.append((time.perf_counter(), watts))

    def _integral(self) -> float | None:
        pairs = list(zip(self._samples, self._samples[1:]))
        if not pairs:
            return None
        return sum((after - before) * (low + high) / 2 for (before, low), (after, high) in pairs)


def _joules_between(counter: Path, before: Any, after: Any) -> float:
    """Return the joules between two readings of a counter that begins anew at its highest."""
    highest = _number(counter.parent / "max_energy_range_uj")
    microjoules = after - before
    return 1e-6 * (microjoules % highest if highest else microjoules)


def _numbers(root: str, pattern: str) -> list[int]:
    found = (_number(path) for path in Path(root).glob(pattern))
    return [value for value in found if value is not None]


def _number(path: Path) -> int | None:
    try:
        return int(_read(str(path)))
    except ValueError:
        return None


# ---- the two ways to run


def serve(session: Session, answers: TextIO) -> None:
    """Do one command a line of stdin until ``quit`` or its end; a failed one is answered too."""

    def report(repeats: int = 0) -> dict[str, Any]:
        return {"device": device(), "settings": session.settings(repeats), **session.report()}

    commands: dict[str, Callable[..., dict[str, Any]]] = {
        "load": session.load,
        "warmup": session.warm_up,
        "measure": session.repetition,
        "sustain": session.sustain,
        "report": report,
        "quit": dict,
    }
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    command = ""
    while command != "quit":
        arguments = json.loads(lines.get())
        command = arguments.pop("command")
        try:
            reply: dict[str, Any] = {"result": commands[command](**arguments)}
        except RunnerError as error:
            reply = {"error": str(error), "exit_code": error.exit_code}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def _listen(lines: queue.Queue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(1)  # whoever asked has gone, perhaps in the middle of a repetition


def _take_stdout() -> TextIO:
    """Return the real stdout; what the libraries print there goes to stderr from now on."""
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stdout


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure an exported model on this machine.")
    parser.add_argument("folder", type=Path, help="of an export; or a .gguf file")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--generate", type=int, default=128, help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=5, help="measured repetitions")
    parser.add_argument("--threads", type=int, default=0, help="default: one a physical core")
    parser.add_argument("--worker", action="store_true", help="take commands from stdin instead")
    found = parser.parse_args(argv)
    if found.repeats < 1:
        parser.error("--repeats must be at least 1")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = _arguments(argv)
    if options.worker:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends us
    stdout = _take_stdout()
    try:
        session = session_of(options.folder, options.prompt, options.generate, options.threads)
        if options.worker:
            serve(session, stdout)
        else:
            json.dump(measure(session, options.repeats), stdout, indent=1)
            stdout.write("\n")
            stdout.flush()
    except RunnerError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
