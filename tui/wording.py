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


# ---- a check


def check_pair(check: Mapping[str, Any]) -> tuple[str, str]:
    """Return a check's mark and word, and what was found with what to do."""
    state = str(check["state"])
    mend = f"\n-> {check['mend']}" if check["mend"] and state != "ok" else ""
    return f"{MARKS[state]} {state}", f"{check['title']}: {check['text']}{mend}".rstrip(": ")
