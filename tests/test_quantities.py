from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import BadInput
from edgeprune.quantities import (
    format_bytes,
    format_count,
    format_seconds,
    parse_bytes,
    parse_count,
    parse_fraction,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("95M", 95_000_000),
        ("1.2B", 1_200_000_000),
        ("1_000", 1000),
        ("5e6", 5_000_000),
        ("7k", 7000),
    ],
)
def test_count(text: str, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("60MB", 60_000_000), ("1.5GiB", 3 * 2**29), (" 10 kB ", 10_000), ("60M", 60_000_000)],
)
def test_bytes(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize(("text", "value"), [("0.4", 0.4), ("40%", 0.4), (".25", 0.25), ("0", 0)])
def test_fraction(text: str, value: float) -> None:
    assert parse_fraction(text) == pytest.approx(value)


@pytest.mark.parametrize("parse", [parse_count, parse_bytes, parse_fraction])
@pytest.mark.parametrize(
    "text", ["", "x", "-1", "nan", "inf", "1e999", "5 parsecs", "1,5", "0x10", "--", "%"]
)
def test_what_is_no_quantity_is_refused_in_one_line(parse, text: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse(text)
    assert "\n" not in str(caught.value)
    assert f'"{text}"' in str(caught.value)


@pytest.mark.parametrize("text", ["1", "100%", "40", "1.5"])
def test_a_fraction_is_below_one(text: str) -> None:
    with pytest.raises(BadInput, match="below 1"):
        parse_fraction(text)


def test_a_per_cent_value_without_its_sign_is_guessed() -> None:
    with pytest.raises(BadInput, match="did you mean 40%"):
        parse_fraction("40")


@given(st.integers(min_value=1, max_value=10**14))
def test_what_is_shown_can_be_typed(number: int) -> None:
    assert parse_bytes(format_bytes(number)) == pytest.approx(number, rel=0.005)
    assert parse_count(format_count(number)) == pytest.approx(number, rel=0.005)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.412, "0.41 s"), (3.21, "3.2 s"), (12, "12 s"), (59.7, "1 min 00 s"), (7800, "2 h 10 min")],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
