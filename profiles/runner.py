"""Measure how fast one exported model folder runs on this machine, in a process of its own.

One file that needs Python 3.9, numpy and onnxruntime-genai, nothing else of edgeprune: it is copied
to boards.

    python runner.py FOLDER --prompt 128 --generate 128 --repeats 5 --threads 4

prints one JSON document. With ``--worker`` it measures on demand instead: a line
``{"command": C}`` on stdin, C one of ``load``, ``warmup``, ``measure``, ``report``, ``quit``, is
answered by one line on stdout, ``{"result": ...}`` or ``{"error": "...", "exit_code": N}``. In
between it sleeps, so two models can take turns on a quiet machine; when stdin ends, it ends at
once, so it never outlives its parent.

What is measured: the prompt is fixed pseudo-random token ids, the same for every model of one
vocabulary; decoding is greedy and goes on past the end-of-text token, so each repetition generates
exactly as many tokens as asked. Choosing the token counts, tokenising and detokenising do not.
Times are seconds, sizes bytes, speeds tokens per second.
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
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

SCHEMA_VERSION = 1
SEED = 20
CONFIG = "genai_config.json"
FACTS = "edgeprune_export.json"
# Above this share of the machine taken by others during a repetition, its figures are in doubt.
DISTURBED_ABOVE = 0.05
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
        self.config = check(folder, prompt, generate)
        self.facts = facts(folder)
        self.measured: dict[str, Any] = {}
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
        files = _graph_files(self.folder, self.config["decoder"]["filename"])
        self._check_memory(sum(path.stat().st_size for path in files))
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

    def repetition(self) -> dict[str, Any]:
        """Run the prompt and generate the tokens once; return the times and what they amount to.

        ``inter_token_seconds`` has one entry a generated token but the first, which comes out of
        the prompt's run.
        """
        busy = machine_busy()
        own, started = time.process_time(), time.perf_counter()
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
        own = time.process_time() - own
        others = other_load(busy, machine_busy(), own)
        self._check_count(int(generator.token_count()), len(marks) - 1)
        del generator
        settle()
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
            "cpu_seconds": own,
            "other_load": others,
            "disturbed": others is not None and others > DISTURBED_ABOVE,
        }

    def report(self) -> dict[str, Any]:
        """Return what is known of the model and its process: ``peak_memory_bytes`` until now."""
        return {
            "name": self.folder.resolve().name,
            "folder": str(self.folder),
            "model": self.facts,
            **self.measured,
            "peak_memory_bytes": peak_memory(),
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
        }

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

    def _check_memory(self, file_bytes: int) -> None:
        decoder = self.config["decoder"]
        cache_elements = 2 * (self.prompt + self.generate)
        for name in ("num_hidden_layers", "num_key_value_heads", "head_size"):
            cache_elements *= int(decoder.get(name, 1))
        needed = file_bytes * MEMORY_FACTOR + cache_elements * 4
        available = available_memory()
        if available is not None and needed > available:
            raise RunnerError(
                f"{self.folder} needs about {needed / 1e9:.1f} GB to run and"
                f" {available / 1e9:.1f} GB are free: close other programs, or measure one model"
                " at a time, without --against"
            )


def measure(session: Session, repeats: int) -> dict[str, Any]:
    """Load, warm up and measure ``repeats`` times; return the whole document."""
    session.load()
    session.repetition()
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
    return {
        "role": role,
        **report,
        "repetitions": list(repetitions),
        "disturbed": sum(bool(entry["disturbed"]) for entry in repetitions),
        "summary": {
            **{name: summarise([report[name]]) for name in PROCESS_METRICS},
            **{
                name: summarise([entry[name] for entry in repetitions])
                for name in REPETITION_METRICS
            },
        },
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


# ---- the two ways to run


def serve(session: Session, answers: TextIO) -> None:
    """Do one command a line of stdin until ``quit`` or its end; a failed one is answered too."""
    commands: dict[str, Callable[[], dict[str, Any]]] = {
        "load": session.load,
        "warmup": session.repetition,
        "measure": session.repetition,
        "report": lambda: {"device": device(), **session.report()},
        "quit": dict,
    }
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    command = ""
    while command != "quit":
        command = json.loads(lines.get())["command"]
        try:
            reply: dict[str, Any] = {"result": commands[command]()}
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
    parser.add_argument("folder", type=Path)
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
        session = Session(options.folder, options.prompt, options.generate, options.threads)
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
