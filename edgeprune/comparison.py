"""Several finished runs beside each other: their figures, what they cost, and which are worth having."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edgeprune import report, runs
from edgeprune.errors import BadInput
from edgeprune.locations import own_name
from edgeprune.report import Quantity
from edgeprune.runs import Figures, RunInfo

QUANTITIES = tuple(
    next(q for q in report.QUANTITIES if q.key == field.name) for field in fields(Figures)
)
LABELS = (
    "File size",
    "Perplexity per token",
    "Decode tokens/s",
    "Prefill tokens/s",
    "First token",
    "Peak memory",
)
"""Of ``QUANTITIES``, short."""


@dataclass(frozen=True)
class Compared:
    """A run among others."""

    name: str
    """Tells it from the others."""
    info: RunInfo
    ratios: Figures
    """Pruned / dense."""
    on_front: bool
    """No other run is better in file size, decode speed or perplexity and as good in the other two."""


@dataclass(frozen=True)
class Comparison:
    """Finished runs beside each other; ``differences`` says why some of their figures may not be compared."""

    runs: tuple[Compared, ...]
    differences: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain JSON values."""
        return {
            "runs": [
                {
                    "name": each.name,
                    "folder": str(each.info.folder),
                    "model": each.info.model,
                    "target": each.info.target,
                    "dense": asdict(each.info.dense or Figures()),
                    "pruned": asdict(each.info.pruned or Figures()),
                    "ratios": asdict(each.ratios),
                    "pareto": each.on_front,
                }
                for each in self.runs
            ],
            "differences": list(self.differences),
        }


@dataclass(frozen=True)
class Cell:
    """A figure and its change against the dense model, as text; ``better`` is None for no change."""

    value: str
    change: str
    better: bool | None


def compare(folders: Iterable[str | Path]) -> Comparison:
    """Return the finished runs in ``folders`` beside each other.

    Raises:
        BadInput: with a line for each that is not finished; or if there are not two.
    """
    paths = list(dict.fromkeys(Path(folder).absolute() for folder in folders))
    if len(paths) < 2:
        raise BadInput("name two or more runs: edgeprune runs compare DIR DIR; see: edgeprune runs")
    infos = [runs.describe(path) for path in paths]
    problems = [_problem(info) for info in infos if info.pruned is None]
    if problems:
        raise BadInput("\n".join(problems))
    results = [runs.read_results(info.folder) for info in infos]
    front = pareto_front([info.pruned or Figures() for info in infos])
    compared = tuple(
        Compared(name, info, _ratios(info, result), on_front)
        for name, info, result, on_front in zip(_names(paths), infos, results, front, strict=True)
    )
    return Comparison(compared, tuple(_differences(results)))


def _problem(info: RunInfo) -> str:
    if info.state in ("finished", "missing"):
        return info.error
    return f"{info.folder}: {info.state}, not finished; next: {info.next}"


def pareto_front(models: Sequence[Figures]) -> list[bool]:
    """Tell of each model whether no other is better in one of size, speed and perplexity and as good in all.

    A model that lacks one of these figures is not on the front.
    """
    costs = [_costs(model) for model in models]
    return [
        cost is not None and not any(other and _dominates(other, cost) for other in costs)
        for cost in costs
    ]


def _costs(model: Figures) -> tuple[float, float, float] | None:
    size, speed = model.file_bytes, model.decode_tokens_per_second
    if size is None or speed is None or model.token_perplexity is None:
        return None
    return size, -speed, model.token_perplexity


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def _ratios(info: RunInfo, results: Mapping[str, Any]) -> Figures:
    """Take the ratios of the results, which are of repetitions in pairs; else divide."""
    stated = results.get("ratios")
    found = {}
    for quantity in QUANTITIES:
        ratio = stated.get(quantity.key) if isinstance(stated, dict) else None
        if not isinstance(ratio, int | float):
            pruned, dense = (getattr(side, quantity.key) for side in (info.pruned, info.dense))
            ratio = pruned / dense if pruned is not None and dense else None
        found[quantity.key] = ratio
    return Figures(**found)


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell all of them apart."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = [str(Path(*path.parts[-parts:])) for path in paths]
        if len(set(names)) == len(paths):
            break
    return names


def _differences(results: Sequence[Mapping[str, Any]]) -> list[str]:
    checks: tuple[tuple[str, Callable[[Mapping[str, Any]], Any]], ...] = (
        (
            "The runs are of different models: perplexity per token compares where tokenizers are the same.",
            lambda found: found["model"]["name"],
        ),
        (
            "Perplexity was measured on different texts, or differently.",
            lambda found: found["settings"]["evaluate"],
        ),
        (
            "Speed was measured with different prompts or threads.",
            _timing,
        ),
        ("Speed was measured on different machines.", _device),
    )
    return [text for text, part in checks if _differ(part, results)]


def _timing(results: Mapping[str, Any]) -> Any:
    """Return how speed was measured; None where it was not."""
    settings = results["settings"]["profile"]
    names = ("prompt", "generate", "threads")
    return [settings[name] for name in names] if results["devices"] else None


def _device(results: Mapping[str, Any]) -> Any:
    """Return what tells the first device, whose figures the run's are, from others; None where there is none."""
    first = next(iter(results["devices"].values()), None)
    return first and (first["device"]["cpu"], first["device"]["physical_cores"])


def _differ(part: Callable[[Mapping[str, Any]], Any], results: Sequence[Mapping[str, Any]]) -> bool:
    try:
        parts = [part(found) for found in results]
    except (LookupError, TypeError, AttributeError):
        return True  # who does not say cannot be trusted to be the same
    told = [each for each in parts if each is not None]
    return any(each != told[0] for each in told)


# ---- as text


def cells(run: Compared) -> list[Cell]:
    """Return a run's figures of the pruned model, one for each of ``LABELS``."""
    return [_cell(run, quantity) for quantity in QUANTITIES]


def _cell(run: Compared, quantity: Quantity) -> Cell:
    ratio = getattr(run.ratios, quantity.key)
    return Cell(
        report.shown(getattr(run.info.pruned, quantity.key), quantity.show),
        "" if ratio is None else report.change(ratio, quantity.as_factor),
        report.better(ratio, quantity.less_is_better, report.SAME),
    )


def page(comparison: Comparison) -> str:
    """Return the comparison as one HTML page that needs nothing else."""
    from jinja2 import Environment, PackageLoader

    best = [each.name for each in comparison.runs if each.on_front]
    environment = Environment(loader=PackageLoader("edgeprune", "."), autoescape=True)
    return environment.get_template("comparison.html.j2").render(
        title=f"{len(comparison.runs)} runs compared",
        summary=f"On the Pareto front of file size, decode speed and perplexity: {', '.join(best) or 'none'}.",
        differences=comparison.differences,
        labels=LABELS,
        rows=[
            {
                "name": each.name,
                "what": f"{own_name(each.info.model)}, {each.info.target}",
                "on_front": each.on_front,
                "cells": cells(each),
            }
            for each in comparison.runs
        ],
        plot=_plot(comparison),
    )


def _plot(comparison: Comparison) -> str:
    from edgeprune import plots

    dense: dict[str, plots.Point] = {}
    pruned = []
    for each in comparison.runs:
        model = own_name(each.info.model)
        dense.setdefault(model, _point(f"dense {model}", each.info.dense, dense=True))
        pruned.append(_point(each.name, each.info.pruned, on_front=each.on_front))
    points = [point for point in (*dense.values(), *pruned) if point]
    return plots.pareto(points) if points else ""


def _point(name: str, model: Figures | None, **marks: bool) -> Any:
    from edgeprune import plots

    costs = _costs(model) if model else None
    return costs and plots.Point(name, costs[0] / 1e6, -costs[1], costs[2], **marks)
