"""What the engine answers, in words: a model's card, the outlook of a cut, a check. Knows no screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeprune.quantities import format_bytes, format_count, format_seconds

MARKS = {"ok": "✓", "warning": "!", "failed": "✗", "skipped": "-"}
LEVELS = "▁▂▃▄▅▆▇█"


# ---- a model


def card_lines(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a model is and whether this machine can work on it, as pairs of a label and a text."""
    found, machine = card["inspection"], card["machine"]
    pruned = "; pruned already, by edgeprune" if found["pruned"] else ""
    return [
        ("Model", f"{found['model']}{pruned}"),
        ("Family", str(found["family"])),
        ("Parameters", _parameters(found)),
        ("Layers", f"{found['num_hidden_layers']}, {_widths(found)}"),
        ("Licence", str(found["licence"] or "unknown")),
        ("Weights", _memory(found["memory"])),
        ("Machine", _machine(machine)),
        ("Prune", _can(card["prune"])),
        ("Train", _can(card["train"])),
    ]


def _parameters(found: Mapping[str, Any]) -> str:
    tied = " (shared with the head)" if found["tied_embeddings"] else ""
    return (
        f"{format_count(found['parameters'])}: decoder {format_count(found['decoder_parameters'])}, "
        f"embeddings {format_count(found['embedding_parameters'])}{tied}"
    )


def _widths(found: Mapping[str, Any]) -> str:
    layers = found["layers"]
    heads = _span([layer["num_attention_heads"] for layer in layers])
    groups = _span([layer["num_key_value_heads"] for layer in layers])
    inner = _span([layer["intermediate_size"] for layer in layers])
    return f"hidden {found['hidden_size']}, heads {heads}, KV heads {groups}, intermediate {inner}"


def _span(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least} to {most}"


def _memory(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items())


def _machine(machine: Mapping[str, Any]) -> str:
    return (
        f"{machine['processor']}, {machine['cores']} cores, "
        f"{format_bytes(machine['available_bytes'])} of {format_bytes(machine['memory_bytes'])} free, "
        f"computes on {machine['device']}"
    )


def _can(answer: Mapping[str, Any]) -> str:
    return f"{'✓ yes' if answer['possible'] else '✗ no'}: {answer['text']}"


# ---- a cut


def outlook_lines(outlook: Mapping[str, Any], precision: str) -> list[tuple[str, str]]:
    """Return what a cut makes of a model, as pairs of a label and a text."""
    dense = outlook["dense"]
    return [
        (
            "File",
            f"{format_bytes(dense['file_bytes'])} -> {format_bytes(outlook['file_bytes'])} "
            f"({precision}, {_less(outlook['file_bytes'], dense['file_bytes'])})",
        ),
        (
            "Parameters",
            f"{format_count(dense['parameters'])} -> {format_count(outlook['parameters'])} "
            f"({_less(outlook['parameters'], dense['parameters'])})",
        ),
        ("Speed", speed(outlook)),
        ("Layers", layers(outlook)),
        ("Time", duration(outlook)),
        ("Quality", quality(outlook)),
    ]


def _less(now: float, before: float) -> str:
    return f"{100 * (now / before - 1):+.0f} %".replace("-", "−") if before else "unknown"


def speed(outlook: Mapping[str, Any]) -> str:
    """Return the predicted tokens a second with what the prediction rests on."""
    predicted, before = (
        outlook["decode_tokens_per_second"],
        outlook["dense"]["decode_tokens_per_second"],
    )
    if predicted is None:
        return f"unknown: {outlook['speed_basis']}"
    first = "unknown" if before is None else f"{before:.1f}"
    return f"{first} -> {predicted:.1f} tokens/s; {outlook['speed_basis']}"


def layers(outlook: Mapping[str, Any]) -> str:
    """Return what each layer likely keeps, a sign a layer, first to last."""
    shares = outlook["layers"]
    if not shares:
        return str(outlook["layers_basis"])
    kept = {part: bars([layer[part] for layer in shares]) for part in ("attention", "mlp")}
    return f"attention {kept['attention']}\nMLP       {kept['mlp']}\n{outlook['layers_basis']}"


def bars(shares: Sequence[float]) -> str:
    """Draw shares of 0 to 1, a sign each."""
    last = len(LEVELS) - 1
    return "".join(LEVELS[round(min(max(share, 0.0), 1.0) * last)] for share in shares)


def duration(outlook: Mapping[str, Any]) -> str:
    """Return the time needed, what of it is pruning and training, and what it rests on."""
    seconds = outlook["seconds"]
    if not seconds:
        return f"unknown: {outlook['seconds_basis']}"
    names = {"prune": "pruning", "train": "training", "rest": "the rest"}
    parts = [f"{names[key]} {format_seconds(seconds[key])}" for key in names if seconds.get(key)]
    total = format_seconds(sum(seconds.get(key) or 0 for key in names))
    return f"about {total} ({', '.join(parts)}); {outlook['seconds_basis']}"


def quality(outlook: Mapping[str, Any]) -> str:
    """Return what such cuts have cost where they were measured."""
    return (
        "\n".join(str(case["text"]) for case in outlook["quality"]) or "unknown: none was measured"
    )


# ---- machines


def places(where: str, devices: Sequence[str]) -> str:
    """Return where a run is done and measured; "local" is this machine."""
    runs = "Runs here" if where == "local" else f"Runs on {where}, and its results come home"
    named = ["this machine" if each == "local" else each for each in devices]
    if not named:
        return f"{runs}; no speed is measured"
    first = f"; {named[0]}'s figures stand for the run" if len(named) > 1 else ""
    return f"{runs}; measures on {', '.join(named)}{first}"


def key_text(key: Mapping[str, str]) -> str:
    """Return the question whether a key that was never seen is that of the machine."""
    kind = next((kind for kind in ("rsa", "ecdsa") if kind in key["algorithm"]), "ed25519")
    return (
        f"{key['machine']} was never reached from here. It shows this key:\n\n"
        f"  {key['algorithm']}\n  {key['fingerprint']}\n\n"
        "At the machine itself, this command shows the one that it has:\n\n"
        f"  ssh-keygen -lf /etc/ssh/ssh_host_{kind}_key.pub\n\n"
        "If the two differ, something else answers in its place."
    )


def host_state(found: Mapping[str, Any]) -> str:
    """Return in two words whether a host has what it needs."""
    problems = found["problems"]
    missing = sum(bool(each["required"]) for each in problems)
    if missing:
        return f"✗ {missing} missing"
    return f"! {len(problems)} to see" if problems else "✓ ready"


def host_lines(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what is missing on a host with what mends it, then what is there, as pairs of a label and a text."""
    return [*map(_problem, found["problems"]), *_host_facts(found)]


def host_mends(found: Mapping[str, Any]) -> list[str]:
    """Return what is to be typed to mend what is missing on a host."""
    return [str(each["mend"]) for each in found["problems"]]


def _problem(problem: Mapping[str, Any]) -> tuple[str, str]:
    label = "✗ missing" if problem["required"] else "! to see"
    return label, f"{problem['what']}\n-> {problem['mend']}"


def _host_facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    system, device, python = found["system"], found["device"], found["python"]
    features = ", ".join([system["architecture"], *system["features"]])
    cores = f"{device['physical_cores']} cores"
    return [
        ("System", " · ".join(filter(None, (system["board"], system["os"], system["kernel"])))),
        ("Processor", f"{device['cpu'] or 'unknown'}, {cores} ({features})"),
        (
            "Memory",
            f"{_size(device['memory_bytes'])}, {_size(device['memory_available_bytes'])} free",
        ),
        (
            "Disk",
            f"{format_bytes(found['storage']['free_bytes'])} free, {found['storage']['folder']}",
        ),
        ("GPU", _graphics(found["graphics"])),
        ("Python", f"{python['version']}, {python['path']}"),
        ("Clocks", _clocks(found)),
        ("Energy", device["energy_sensor"] or "no sensor that can be read"),
    ]


def _size(size: int | None) -> str:
    return "unknown" if size is None else format_bytes(size)


def _graphics(found: Mapping[str, Any]) -> str:
    cards = [f"{card['name']} ({_size(card['memory_bytes'])})" for card in found["cards"]]
    versions = [
        f"{name} {found[key]}"
        for name, key in (("driver", "driver"), ("CUDA", "cuda"))
        if cards and found[key]
    ]
    return ", ".join([*cards, *versions]) or "none"


def _clocks(found: Mapping[str, Any]) -> str:
    governors, degrees, slowed = (
        found["device"]["governors"],
        found["temperature"],
        found["throttling"],
    )
    return ", ".join(
        (
            f"governor {' and '.join(governors)}" if governors else "governor unknown",
            "temperature unknown" if degrees is None else f"{degrees:.0f} °C",
            "throttling unknown"
            if slowed is None
            else "throttled"
            if slowed["now"]
            else "not throttled",
        )
    )


# ---- a check


def check_pair(check: Mapping[str, Any]) -> tuple[str, str]:
    """Return a check's mark and word, and what was found with what to do."""
    state = str(check["state"])
    mend = f"\n-> {check['mend']}" if check["mend"] and state != "ok" else ""
    return f"{MARKS[state]} {state}", f"{check['title']}: {check['text']}{mend}".rstrip(": ")
