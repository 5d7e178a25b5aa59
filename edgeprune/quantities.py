"""Quantities as people type and read them: "95M" parameters, "60MB", "40%"."""

from __future__ import annotations

import math
import re

from edgeprune.errors import BadInput

_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_BYTE_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    # What people mean by "60M" of memory is 60MB; the file sizes that we print are decimal too.
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
}
_QUANTITY = re.compile(r"\s*(\d[\d_]*(?:\.\d*)?|\.\d+)(e[+-]?\d+)?\s*([a-zA-Z%]*)\s*")


def parse_count(text: str) -> int:
    """Return the whole number that ``text`` writes: "95M", "1.2B", "950000". BadInput if none."""
    advice = "write it like 95M, 1.2B or 95000000"
    return _parse(text, _COUNT_UNITS, "a number of parameters", advice)


def parse_bytes(text: str) -> int:
    """Return the bytes that ``text`` writes: "60MB" is 60 x 10**6, "1.5GiB" 1.5 x 2**30."""
    return _parse(text, _BYTE_UNITS, "a size in bytes", "write it like 60MB, 1.5GiB or 60000000")


def parse_fraction(text: str) -> float:
    """Return the fraction that ``text`` writes: "0.4", "40%". BadInput unless 0 <= fraction < 1."""
    advice = "write a part of the whole like 0.4 or 40%"
    value, unit = _split(text, "a fraction", advice)
    if unit not in ("", "%"):
        raise BadInput(f'"{text}" is not a fraction: {advice}')
    fraction = value / 100 if unit == "%" else value
    if not 0 <= fraction < 1:
        hint = f" (did you mean {value:g}%?)" if not unit and 1 < value < 100 else ""
        raise BadInput(f'"{text}" is out of range: {advice}, at least 0 and below 1{hint}')
    return fraction


def format_count(count: float) -> str:
    """Return a number of parameters or tokens in at most four digits: 134.5M, 1.24B, 950."""
    return _scaled(count, 1000, ("", "k", "M", "B", "T"))


def format_bytes(size: float) -> str:
    """Return a size in decimal units, as disks and download pages write it: 81.3 MB."""
    return _scaled(size, 1000, (" B", " kB", " MB", " GB", " TB"))


def format_seconds(seconds: float) -> str:
    """Return a duration in its two largest units: 0.41 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _split(text: str, what: str, advice: str) -> tuple[float, str]:
    match = _QUANTITY.fullmatch(str(text))
    if not match:
        raise BadInput(f'"{text}" is not {what}: {advice}')
    digits, exponent, unit = match.groups()
    value = float(digits.replace("_", "") + (exponent or ""))
    if math.isinf(value):
        raise BadInput(f'"{text}" is too large: {advice}')
    return value, unit.lower()


def _parse(text: str, units: dict[str, int], what: str, advice: str) -> int:
    value, unit = _split(text, what, advice)
    if unit not in units:
        raise BadInput(f'"{text}" is not {what}: unknown unit "{unit}"; {advice}')
    number = round(value * units[unit])
    if number <= 0:
        raise BadInput(f'"{text}" is not {what}: it must be above 0; {advice}')
    return number


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    if abs(value) < base:
        return f"{value:.0f}{units[0]}"
    for unit in units[1:]:
        value /= base
        if abs(value) < base or unit == units[-1]:
            break
    digits = 2 if abs(value) < 10 else 1
    return f"{value:.{digits}f}{unit}"
