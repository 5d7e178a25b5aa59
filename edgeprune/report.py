"""The end of a run: its figures as ``results.json``, as rows of a table, and as a page to read."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from edgeprune import machine
from edgeprune.events import Evaluation, Event, PruneIteration, TrainStep
from edgeprune.quantities import format_bytes, format_count
from edgeprune.recipe import Recipe

SCHEMA_VERSION = 1
ROLES = {"dense": "against", "pruned": "export"}
"""Which of the profile's runs is which model's."""
SAME = 0.005
"""The relative difference below which two figures count as the same."""
PACKAGES = (
    "edgeprune",
    "torch",
    "transformers",
    "safetensors",
    "onnx",
    "onnxruntime",
    "onnxruntime-genai",
)


@dataclass(frozen=True)
class Quantity:
    """A figure of both models: its key in the results, its name, and how people read it."""

    key: str
    label: str
    show: Callable[[float], str]
    less_is_better: bool
    as_factor: bool
    """Show the change as a factor (speed) and not in per cent (size)."""


@dataclass(frozen=True)
class Row:
    """A line of the table that compares the models, as text; ``better`` is None for no change."""

    label: str
    dense: str
    pruned: str
    change: str
    better: bool | None


def _perplexity(value: float) -> str:
    if value >= 1e6:
        return f"{value:.2g}"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _divergence(value: float) -> str:
    return f"{value:.2g}"


def _speed(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _milliseconds(value: float) -> str:
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.2f} s"


QUANTITIES = (
    Quantity("parameters", "Parameters", format_count, True, False),
    Quantity("decoder_parameters", "Decoder-layer parameters", format_count, True, False),
    Quantity("file_bytes", "File size", format_bytes, True, False),
    # of the checkpoints, in PyTorch; what the export's precision costs beyond that is the KL below
    Quantity("token_perplexity", "Perplexity per token", _perplexity, True, True),
    Quantity("word_perplexity", "Perplexity per word", _perplexity, True, True),
    Quantity("export_kl", "KL of the export, nats/token", _divergence, True, True),
    Quantity("prefill_tokens_per_second", "Prefill (tokens/s)", _speed, False, True),
    Quantity("decode_tokens_per_second", "Decode (tokens/s)", _speed, False, True),
    Quantity("time_to_first_token_seconds", "Time to first token", _milliseconds, True, True),
    Quantity("peak_memory_bytes", "Peak memory", format_bytes, True, False),
)


# ---- results.json


def build_results(recipe: Recipe, stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return all that a run found, as plain JSON values.

    ``dense`` and ``pruned`` have a figure for each of ``QUANTITIES``, the ``spread`` (standard
    deviation) of those measured repeatedly, and the widths of their ``layers``. ``ratios`` are
    pruned / dense. The raw data of each stage is kept beside them. A figure that is not finite is
    None, which JSON can say.
    ``stages`` maps the name of each finished stage to its result.
    """
    both = {which: _finite(_figures(stages, which)) for which in ("dense", "pruned")}
    measured = stages["profile"]["ratios"]
    return {
        "schema_version": SCHEMA_VERSION,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "model": stages["source"]["source"],
        **both,
        "ratios": {q.key: _ratio(q.key, both, measured) for q in QUANTITIES},
        "settings": recipe.model_dump(),
        "prune": _finite(stages["prune"]["summary"]),
        "exports": _finite({"dense": stages["export-dense"], "pruned": stages["export-pruned"]}),
        "evaluation": _finite(stages["evaluate"]),
        "profile": _finite(stages["profile"]),
        "machine": _machine(),
        "versions": _versions(),
    }


def to_json(results: dict[str, Any]) -> str:
    """Return ``results`` as strict JSON."""
    return json.dumps(results, indent=1, allow_nan=False)


def _figures(stages: dict[str, dict[str, Any]], which: str) -> dict[str, Any]:
    shape = stages["source"]["inspection"] if which == "dense" else stages["prune"]["inspection"]
    perplexity = stages["evaluate"][which]
    return {
        "parameters": shape["parameters"],
        "decoder_parameters": shape["decoder_parameters"],
        "token_perplexity": perplexity["token_perplexity"],
        "word_perplexity": perplexity["word_perplexity"],
        "export_kl": stages[f"export-{which}"]["parity"]["mean_kl"],
        **_measured(stages["profile"], which, "mean"),
        "spread": _measured(stages["profile"], which, "stdev"),
        "layers": shape["layers"],
    }


def _ratio(
    key: str, both: dict[str, dict[str, Any]], measured: dict[str, dict[str, float]]
) -> float | None:
    if key in measured:
        return measured[key]["median"]  # of repetitions in pairs, which a drifting machine spares
    pruned, dense = both["pruned"][key], both["dense"][key]
    return pruned / dense if pruned is not None and dense else None


def _machine() -> dict[str, Any]:
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": machine.cpu_model(),
        "features": [name for name in machine.SPEED_FEATURES if name in machine.cpu_features()],
        "cores": machine.cores(),
        "memory_bytes": machine.memory().total,
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ---- the table


def results_table(results: dict[str, Any]) -> list[Row]:
    """Return the comparison of the two models, one row a quantity."""
    return [_row(q, results) for q in QUANTITIES]


def _row(quantity: Quantity, results: dict[str, Any]) -> Row:
    dense, pruned = (_cell(quantity, results[which]) for which in ("dense", "pruned"))
    ratio = results["ratios"][quantity.key]
    label = quantity.label
    if quantity.key == "file_bytes":
        label += f", {results['settings']['export']['precision']} ONNX"
    return Row(
        label,
        dense,
        pruned,
        "" if ratio is None else change(ratio, quantity.as_factor),
        better(ratio, quantity.less_is_better, _noise(quantity.key, results)),
    )


def _cell(quantity: Quantity, figures: dict[str, Any]) -> str:
    value, spread = figures[quantity.key], figures["spread"].get(quantity.key)
    deviation = f" ± {spread / value:.0%}".replace("%", " %") if spread and value else ""
    return shown(value, quantity.show) + deviation


def shown(value: float | None, show: Callable[[float], str]) -> str:
    """Return a figure as people read it, a dash where there is none."""
    return "–" if value is None else show(value)


def change(ratio: float, as_factor: bool) -> str:
    """Return pruned / dense as people read it: a factor, or a change in per cent."""
    if as_factor:
        return f"× {ratio:.2f}" if ratio < 100 else f"× {ratio:,.0f}"
    sign = "−" if ratio < 1 else "+"
    return f"{sign}{abs(ratio - 1):.1%}".replace("%", " %")


def better(ratio: float | None, less_is_better: bool, noise: float) -> bool | None:
    """Tell whether pruned / dense is a gain; None within ``noise`` of 1."""
    if ratio is None or abs(ratio - 1) < noise:
        return None
    return (ratio < 1) == less_is_better


def _noise(key: str, results: dict[str, Any]) -> float:
    """Return the relative difference below which two figures count as the same."""
    spreads = [results[which]["spread"].get(key) or 0 for which in ("dense", "pruned")]
    means = [results[which][key] or 1 for which in ("dense", "pruned")]
    return max(SAME, *(spread / mean for spread, mean in zip(spreads, means, strict=True)))


# ---- report.html


@dataclass(frozen=True)
class Plot:
    """A plot of the page: heading, what it shows, and the drawing."""

    title: str
    text: str
    svg: str


def render(results: dict[str, Any], events: Iterable[Event]) -> str:
    """Return the report: one HTML page that needs nothing else, no network and no script."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("edgeprune", "."), autoescape=True)
    return environment.get_template("report.html.j2").render(
        title=f"{own_name(results['model']['name'])}, pruned",
        summary=summary(results),
        rows=results_table(results),
        conditions=_conditions(results),
        figures=_plots(results, events),
        provenance=_provenance(results),
        recipe=_recipe(results["settings"]),
    )


def summary(results: dict[str, Any]) -> str:
    """Return what was won and what was lost, in two sentences."""
    ratios, dense, pruned = results["ratios"], results["dense"], results["pruned"]
    removed = 1 - ratios["decoder_parameters"]
    file = format_bytes(pruned["file_bytes"])
    speed = ratios["decode_tokens_per_second"]
    faster = "as fast as the dense one" if speed is None else _faster(speed)
    before, after = (shown(x["token_perplexity"], _perplexity) for x in (dense, pruned))
    return (
        f"{removed:.0%} of the parameters in the decoder layers are gone: the file is {file} "
        f"instead of {format_bytes(dense['file_bytes'])}, and decodes {faster} on this machine. "
        f"Perplexity went from {before} to {after}."
    )


def _faster(ratio: float) -> str:
    if abs(ratio - 1) < 0.01:
        return "as fast as before"
    return f"{abs(ratio - 1):.0%} {'faster' if ratio > 1 else 'slower'}"


def _conditions(results: dict[str, Any]) -> str:
    settings, evaluation = results["settings"]["profile"], results["evaluation"]["dense"]
    return (
        f"Perplexity over {evaluation['tokens']:,} tokens of {own_name(_text(results))} in windows of "
        f"{evaluation['window']}. Speed from {settings['repeats']} repetitions of "
        f"{settings['prompt']} tokens of prompt and {settings['generate']} generated, each model "
        f"in its own process, the two in turns, after a warm-up.{_disturbance(results['profile'])}"
    )


def _disturbance(profile: dict[str, Any]) -> str:
    disturbed = sum(run["disturbed"] for run in profile["runs"])
    if not disturbed:
        return ""
    total = sum(len(run["repetitions"]) for run in profile["runs"])
    return f" Other programs were busy during {disturbed} of the {total} repetitions of both."


def _plots(results: dict[str, Any], events: Iterable[Event]) -> list[Plot]:
    from edgeprune import plots

    found = [
        Plot(
            "What each layer kept",
            "Layers that change their input least give up most.",
            plots.widths(results["dense"]["layers"], results["pruned"]["layers"]),
        )
    ]
    events = list(events)
    steps = _iterations(events)
    if steps:
        importance = [step.layer_importance for step in steps]
        sparsity = [step.layer_sparsity for step in steps]
        found.append(
            Plot(
                "How pruning went",
                f"{len(steps)} iterations; importance is measured anew in each.",
                plots.iterations(importance, sparsity, [step.loss for step in steps]),
            )
        )
    losses, held_out, cuts = _training(events)
    if losses:
        found.append(
            Plot(
                "How training went",
                f"{len(losses)} updates; the model was cut where the dotted lines are.",
                plots.training(losses, held_out, cuts),
            )
        )
    between, decode = _samples(results["profile"])
    found.append(
        Plot(
            "Latency",
            "Every token of every repetition; the slowest 1 % share the last bar.",
            plots.latencies(between, decode),
        )
    )
    return found


def _iterations(events: Iterable[Event]) -> list[PruneIteration]:
    """Return the iterations in order; of one done twice, since a worker was killed, the last."""
    last = {event.iteration: event for event in events if isinstance(event, PruneIteration)}
    return [last[number] for number in sorted(last)]


def _training(
    events: Iterable[Event],
) -> tuple[list[tuple[int, float]], list[tuple[int, float]], list[int]]:
    """Return the losses of the updates, those of the held-out text, and after which updates a cut came."""
    losses: dict[int, float] = {}
    held_out: dict[int, float] = {}
    cuts, update = set(), 0
    for event in events:
        if isinstance(event, TrainStep):
            update = event.step
            losses[update] = event.loss
        elif isinstance(event, Evaluation):
            held_out[event.step] = event.loss
        elif isinstance(event, PruneIteration) and update:
            cuts.add(update)
    return sorted(losses.items()), sorted(held_out.items()), sorted(cuts)


def _provenance(results: dict[str, Any]) -> list[tuple[str, str]]:
    here, model = results["machine"], results["model"]
    memory = format_bytes(here["memory_bytes"])
    return [
        ("Model", own_name(model["name"])),
        ("Revision", model["revision"] or "none, a local file"),
        ("Calibration", own_name(results["settings"]["prune"]["calibration"])),
        ("Machine", f"{here['processor']}, {here['cores']} cores, {memory}"),
        ("Processor features", ", ".join(here["features"]) or "none known"),
        ("Versions", ", ".join(f"{key} {value}" for key, value in results["versions"].items())),
        ("Finished", results["finished"]),
    ]


def _recipe(settings: dict[str, Any]) -> str:
    named = {
        section: {key: _named(value) for key, value in values.items()}
        for section, values in settings.items()
        if values is not None
    }
    return Recipe.model_validate(named).to_toml()


def _named(value: Any) -> Any:
    if isinstance(value, list):
        return [_named(each) for each in value]
    return own_name(value) if isinstance(value, str) else value


def _text(results: dict[str, Any]) -> str:
    return str(results["settings"]["evaluate"]["text"])


def own_name(spec: str) -> str:
    """Return a file's or folder's own name, anything else as it is: a page is passed on."""
    return Path(spec).name if Path(spec).is_absolute() else spec


# ---- what the profile says


def _measured(profile: dict[str, Any], which: str, statistic: str) -> dict[str, Any]:
    """Return a statistic of each figure that the profile measured and the table shows."""
    summary = _run(profile, which)["summary"]
    return {q.key: summary[q.key][statistic] for q in QUANTITIES if q.key in summary}


def _samples(profile: dict[str, Any]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the milliseconds between tokens, and the decoded tokens/s of each repetition."""
    between, decode = {}, {}
    for which in ("dense", "pruned"):
        repetitions = _run(profile, which)["repetitions"]
        between[which] = [1000 * x for each in repetitions for x in each["inter_token_seconds"]]
        decode[which] = [each["decode_tokens_per_second"] for each in repetitions]
    return between, decode


def _run(profile: dict[str, Any], which: str) -> dict[str, Any]:
    (found,) = (run for run in profile["runs"] if run["role"] == ROLES[which])
    return found
