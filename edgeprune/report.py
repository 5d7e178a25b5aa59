"""The end of a run: its figures as ``results.json``, as rows of a table, and as a page to read."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, cast

from edgeprune import machine
from edgeprune.events import Evaluation, Event, PruneIteration, TrainStep
from edgeprune.locations import own_name
from edgeprune.profiles.runner import CLOCK_FELL, OTHER_LOAD, THROTTLED
from edgeprune.quantities import format_bytes, format_count
from edgeprune.recipe import Recipe
from edgeprune.remote.hosts import LOCAL

SCHEMA_VERSION = 2
MODELS = ("dense", "pruned")
ROLES = {"dense": "against", "pruned": "export"}
"""Which of a profile's runs is which model's."""
NOT_KNOWN = "–"
DISTURBANCES = {
    OTHER_LOAD: "other programs were busy",
    THROTTLED: "the processor was throttled",
    CLOCK_FELL: "the processor's clock fell",
}
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
    on_device: bool = False
    """Each device that was measured has its own."""


@dataclass(frozen=True)
class Row:
    """A line of the table that compares the models, as text; ``better`` is None for no change.

    ``dense`` is empty where the dense model was not asked: ``change`` is then what happened to the pruned one.
    """

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


def _joules(value: float) -> str:
    return f"{1000 * value:.3g} mJ" if value < 1 else f"{value:.3g} J"


QUANTITIES = (
    Quantity("parameters", "Parameters", format_count, True, False),
    Quantity("decoder_parameters", "Decoder-layer parameters", format_count, True, False),
    Quantity("file_bytes", "File size", format_bytes, True, False),
    # of the checkpoints, in PyTorch; what the export's precision costs beyond that is the KL below
    Quantity("token_perplexity", "Perplexity per token", _perplexity, True, True),
    Quantity("word_perplexity", "Perplexity per word", _perplexity, True, True),
    Quantity("export_kl", "KL of the export, nats/token", _divergence, True, True),
    Quantity("prefill_tokens_per_second", "Prefill (tokens/s)", _speed, False, True, True),
    Quantity("decode_tokens_per_second", "Decode (tokens/s)", _speed, False, True, True),
    Quantity("time_to_first_token_seconds", "Time to first token", _milliseconds, True, True, True),
    Quantity("peak_memory_bytes", "Peak memory", format_bytes, True, False, True),
    Quantity("joules_per_token", "Energy per token", _joules, True, False, True),
)
ON_DEVICES = tuple(quantity for quantity in QUANTITIES if quantity.on_device)


# ---- results.json


def build_results(recipe: Recipe, stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return all that a run found, as plain JSON values.

    ``dense`` and ``pruned`` have a figure for each of ``QUANTITIES``, the ``spread`` (standard
    deviation) of those measured repeatedly, and the widths of their ``layers``. ``ratios`` are
    pruned / dense. What depends on a device is the first device's, None without any. The raw data of each
    stage is kept beside them, in ``devices`` what ``profiles.profile.profile`` returned for each. A figure that is not
    finite is None, which JSON can say.
    ``stages`` maps the name of each finished stage to its result.
    """
    source = stages["source"]
    made_on = source if "machine" in source else this_machine()  # begun by the version before
    results = {
        "schema_version": SCHEMA_VERSION,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "model": source["source"],
        **{which: _finite(_figures(stages, which)) for which in MODELS},
        "ratios": {},
        "settings": recipe.model_dump(),
        "prune": _finite(stages["prune"]["summary"]),
        "exports": _finite({"dense": stages["export-dense"], "pruned": stages["export-pruned"]}),
        "evaluation": _finite(stages["evaluate"]),
        "devices": {},
        "machine": made_on["machine"],
        "versions": made_on["versions"],
    }
    return _with_devices(results, _finite(_devices(stages["profile"])))


def _with_devices(results: dict[str, Any], documents: dict[str, Any]) -> dict[str, Any]:
    found = of_device(next(iter(documents.values()), None))
    both = {which: {**results[which], **found[which]} for which in MODELS}
    ratios = {q.key: _divided(q.key, both) for q in QUANTITIES} | found["ratios"]
    return {**results, **both, "ratios": ratios, "devices": documents}


def current(results: dict[str, Any]) -> dict[str, Any]:
    """Return results as this version writes them: those of the version before had one device, as ``profile``."""
    profile = results.get("profile")
    if not isinstance(profile, dict):
        return results
    kept = {key: value for key, value in results.items() if key != "profile"}
    return {**kept, "schema_version": SCHEMA_VERSION, "devices": _devices(profile)}


def _devices(profile: dict[str, Any]) -> dict[str, Any]:
    """Return the devices' documents of a run's stage; that of the version before was the one document."""
    devices: dict[str, Any] = profile.get("devices", {LOCAL: profile})
    return devices


def to_json(results: dict[str, Any]) -> str:
    """Return ``results`` as strict JSON."""
    return json.dumps(results, indent=1, allow_nan=False)


def _figures(stages: dict[str, dict[str, Any]], which: str) -> dict[str, Any]:
    shape = stages["source"]["inspection"] if which == "dense" else stages["prune"]["inspection"]
    perplexity, export = stages["evaluate"][which], stages[f"export-{which}"]
    return {
        "parameters": shape["parameters"],
        "decoder_parameters": shape["decoder_parameters"],
        "file_bytes": export["bytes"],
        "token_perplexity": perplexity["token_perplexity"],
        "word_perplexity": perplexity["word_perplexity"],
        "export_kl": export["parity"]["mean_kl"],
        "layers": shape["layers"],
    }


def _divided(key: str, both: Mapping[str, Mapping[str, Any]]) -> float | None:
    pruned, dense = both["pruned"][key], both["dense"][key]
    return pruned / dense if pruned is not None and dense else None


def this_machine() -> dict[str, Any]:
    """Return what the results say of the machine on which a run is made: ``machine`` and ``versions``."""
    return {"machine": _machine(), "versions": _versions()}


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
    """Return the comparison of the two models, one row a quantity, of those on devices one a device."""
    devices = results["devices"]
    rows = [_row(q, _label(q, results), results) for q in QUANTITIES if not q.on_device]
    for quantity in ON_DEVICES:
        for name, document in devices.items():
            row = _row(quantity, quantity.label + _on(name, devices), of_device(document))
            if (row.dense, row.pruned) != (NOT_KNOWN, NOT_KNOWN):
                rows.append(row)
    for name, document in devices.items():
        if document.get("sustained"):
            rows.append(_sustained(document["sustained"], _on(name, devices)))
    return rows


def _label(quantity: Quantity, results: dict[str, Any]) -> str:
    if quantity.key == "file_bytes":
        return f"{quantity.label}, {results['settings']['export']['precision']} ONNX"
    return quantity.label


def _on(name: str, devices: Mapping[str, Any]) -> str:
    """Return what tells a device's rows and plots from those of the others."""
    return f", {name}" if len(devices) > 1 else ""


def _row(quantity: Quantity, label: str, found: Mapping[str, Any]) -> Row:
    """Return the row of a quantity of which ``found`` has the figures of both models and the ratio."""
    dense, pruned = (_cell(quantity, found[which]) for which in MODELS)
    ratio = found["ratios"][quantity.key]
    return Row(
        label,
        dense,
        pruned,
        "" if ratio is None else change(ratio, quantity.as_factor),
        better(ratio, quantity.less_is_better, _noise(quantity.key, found)),
    )


def _sustained(sustained: Mapping[str, Any], device: str) -> Row:
    first, last = (shown(sustained[key], _speed) for key in ("first_minute", "last_minute"))
    ratio = sustained["ratio"]
    label = f"Sustained decode, first → last minute{device}"
    return Row(label, "", f"{first} → {last}", "" if ratio is None else change(ratio, True), None)


def _cell(quantity: Quantity, figures: Mapping[str, Any]) -> str:
    value, spread = figures[quantity.key], figures["spread"].get(quantity.key)
    deviation = f" ± {spread / value:.0%}".replace("%", " %") if spread and value else ""
    return shown(value, quantity.show) + deviation


def shown(value: float | None, show: Callable[[float], str]) -> str:
    """Return a figure as people read it, a dash where there is none."""
    return NOT_KNOWN if value is None else show(value)


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


def _noise(key: str, found: Mapping[str, Any]) -> float:
    """Return the relative difference below which two figures count as the same."""
    spreads = [found[which]["spread"].get(key) or 0 for which in MODELS]
    means = [found[which][key] or 1 for which in MODELS]
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
        conditions=conditions(results),
        devices=list(results["devices"]),
        device_facts=device_facts(results["devices"]),
        figures=_plots(results, events),
        provenance=_provenance(results),
        recipe=_recipe(results["settings"]),
    )


def summary(results: dict[str, Any]) -> str:
    """Return what was won and what was lost, in two sentences."""
    dense, pruned = results["dense"], results["pruned"]
    removed = 1 - results["ratios"]["decoder_parameters"]
    before, after = (shown(x["token_perplexity"], _perplexity) for x in (dense, pruned))
    return (
        f"{removed:.0%} of the parameters in the decoder layers are gone: the file is "
        f"{format_bytes(pruned['file_bytes'])} instead of {format_bytes(dense['file_bytes'])}"
        f"{_speeds(results['devices'])}. Perplexity went from {before} to {after}."
    )


def _speeds(devices: Mapping[str, Any]) -> str:
    said = []
    for name, document in devices.items():
        ratio = of_device(document)["ratios"]["decode_tokens_per_second"]
        if ratio is not None:
            said.append(f"{_faster(ratio)} on {'this machine' if name == LOCAL else name}")
    return f", and decodes {_listed(said)}" if said else ""


def _faster(ratio: float) -> str:
    if abs(ratio - 1) < 0.01:
        return "as fast as before"
    return f"{abs(ratio - 1):.0%} {'faster' if ratio > 1 else 'slower'}"


def _listed(texts: Sequence[str]) -> str:
    *others, last = texts
    return f"{', '.join(others)} and {last}" if others else last


def conditions(results: dict[str, Any]) -> str:
    """Return how perplexity and speed were measured."""
    evaluation = results["evaluation"]["dense"]
    return (
        f"Perplexity over {evaluation['tokens']:,} tokens of {own_name(_text(results))} in windows of "
        f"{evaluation['window']}. {_timing(results)}"
    )


def _timing(results: dict[str, Any]) -> str:
    settings, devices = results["settings"]["profile"], results["devices"]
    if not devices:
        return "Speed was not measured."
    return (
        f"Speed from {settings['repeats']} repetitions of "
        f"{settings['prompt']} tokens of prompt and {settings['generate']} generated, each model "
        f"in its own process, the two in turns, after a warm-up."
        + "".join(_disturbance(each, _on(name, devices)) for name, each in devices.items())
    )


def _disturbance(document: Mapping[str, Any], device: str) -> str:
    counts = [(text, _disturbed_by(document, reason)) for reason, text in DISTURBANCES.items()]
    said = [f"{text} during {count}" for text, count in counts if count]
    if not said:
        return ""
    total = sum(len(run["repetitions"]) for run in document["runs"])
    text = f"{_listed(said)} of the {total} repetitions of both{device.replace(', ', ' on ')}."
    return f" {text[0].upper()}{text[1:]}"


def _disturbed_by(document: Mapping[str, Any], reason: str) -> int:
    """Return how many repetitions were disturbed so; documents without reasons know of other load only."""
    counts = [run.get("disturbed_by", {OTHER_LOAD: run["disturbed"]}) for run in document["runs"]]
    return sum(each.get(reason, 0) for each in counts)


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
    for name, document in results["devices"].items():
        found += _device_plots(document, _on(name, results["devices"]))
    return found


def _device_plots(document: Mapping[str, Any], device: str) -> list[Plot]:
    from edgeprune import plots

    found = [
        Plot(
            f"Latency{device}",
            "Every token of every repetition; the slowest 1 % share the last bar.",
            plots.latencies(*samples(document)),
        )
    ]
    sustained = document.get("sustained") or {}
    if sustained.get("samples"):
        found.append(
            Plot(
                f"Speed over time{device}",
                f"The pruned model, generating for {sustained['minutes']:g} minutes on end.",
                plots.over_time(sustained["samples"]),
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


# ---- what a device's document says


def samples(document: Mapping[str, Any]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the milliseconds between tokens, and the decoded tokens/s of each repetition."""
    between, decode = {}, {}
    for which in MODELS:
        repetitions = _run(document, which)["repetitions"]
        between[which] = [1000 * x for each in repetitions for x in each["inter_token_seconds"]]
        decode[which] = [each["decode_tokens_per_second"] for each in repetitions]
    return between, decode


def of_device(document: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the figures of both models on a device and their ratios; all None without a document."""
    both = {which: _measured(document, which) for which in MODELS}
    # of repetitions in pairs, which a drifting machine spares
    stated = (document or {}).get("ratios") or {}
    ratios = {
        q.key: stated[q.key]["median"] if q.key in stated else _divided(q.key, both)
        for q in ON_DEVICES
    }
    return {**both, "ratios": ratios}


def _measured(document: Mapping[str, Any] | None, which: str) -> dict[str, Any]:
    summary = _run(document, which)["summary"] if document else {}
    known = {q.key: summary[q.key] for q in ON_DEVICES if summary.get(q.key)}
    return {
        **{q.key: known[q.key]["mean"] if q.key in known else None for q in ON_DEVICES},
        "spread": {key: figures["stdev"] for key, figures in known.items()},
    }


def _run(document: Mapping[str, Any], which: str) -> dict[str, Any]:
    (found,) = (run for run in document["runs"] if run["role"] == ROLES[which])
    return cast("dict[str, Any]", found)


def device_facts(devices: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return what is known of the devices: a name and a text for each; what none of them says is left out."""
    told = [_facts(document) for document in devices.values()]
    names = list(dict.fromkeys(name for facts in told for name in facts))
    return [(name, [facts.get(name, NOT_KNOWN) for facts in told]) for name in names]


def _facts(document: Mapping[str, Any]) -> dict[str, str]:
    device = document["device"]
    memory = device.get("memory_bytes")
    cores, logical = device.get("physical_cores"), device.get("logical_cores")
    facts = {
        "Processor": device.get("cpu"),
        "Architecture": device.get("architecture"),
        "Cores": cores if logical in (cores, None) else f"{cores}, {logical} logical",
        "Memory": memory and format_bytes(memory),
        "System": device.get("os"),
        "Governor": ", ".join(device.get("governors") or ()) or device.get("governor"),
        "Clock": _range([each.get("clock") for each in _repetitions(document)], 1e-9, ".2f", "GHz"),
        "Temperature": _range(_temperatures(document), 1, ".0f", "°C"),
        "Throttled": _throttled(document),
        "Energy by": device.get("energy_sensor"),
        "Threads used": _threads(document),
        "Runtime": _runtime(device.get("versions") or {}),
    }
    return {name: str(text) for name, text in facts.items() if text}


def _repetitions(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [each for run in document["runs"] for each in run["repetitions"]]


def _temperatures(document: Mapping[str, Any]) -> list[float | None]:
    seen = [run.get("sensors") or {} for run in document["runs"]]
    moments = [each.get(when) or {} for each in seen for when in ("before", "after")]
    return [each.get("temperature") for each in (*moments, *_repetitions(document))]


def _range(values: Iterable[float | None], scale: float, digits: str, unit: str) -> str:
    known = [scale * value for value in values if value is not None]
    if not known:
        return ""
    ends = dict.fromkeys(format(each, digits) for each in (min(known), max(known)))
    return f"{' to '.join(ends)} {unit}"


def _throttled(document: Mapping[str, Any]) -> str:
    known = [
        each["throttled"] for each in _repetitions(document) if each.get("throttled") is not None
    ]
    if not known:
        return ""
    return f"in {sum(known)} of {len(known)} repetitions" if any(known) else "no"


def _threads(document: Mapping[str, Any]) -> str:
    used = str(document["settings"]["threads"])
    tried = [str(each["threads"]) for each in document.get("sweep") or ()]
    return f"{used}, the fastest of {', '.join(tried)}" if tried else used


def _runtime(versions: Mapping[str, Any]) -> str:
    names = ("onnxruntime-genai", "onnxruntime")
    return ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name))
