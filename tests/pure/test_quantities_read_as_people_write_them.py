"""Bytes, durations and counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightwork.errors import SpecError
from lightwork.units import format_bytes, format_count, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("4096", 4096), ("1GiB", 2**30), ("512 MiB", 2**29), ("2GB", 2 * 10**9), (" 1.5 kib ", 1536), ("0", 0), ("7b", 7)],
)
def test_bytes_are_read(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 GiB x", "1e9", "12 parsecs", "1,5 GiB"])
def test_what_is_not_bytes_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(SpecError, match=r"is not a number of bytes\. Write it as 1GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1000 * 1024, "1000 KiB"),
        (1536 * 1024, "1.5 MiB"),
        (2**30, "1 GiB"),
        (5 * 2**40, "5 TiB"),
    ],
)
def test_bytes_are_written(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@given(st.integers(0, 2**49))
def test_written_bytes_are_read_back_to_three_digits(num_bytes: int) -> None:
    assert parse_bytes(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=6e-3)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (85e-5, "850 us"),
        (0.0124, "12 ms"),
        (0.99996, "1.0 s"),
        (0.00099999, "1 ms"),
        (3.24, "3.2 s"),
        (59.99, "1 min 00 s"),
        (245, "4 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_durations_are_written(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (950, "950"), (999.7, "1 k"), (12_345, "12.3 k"), (4_560_000, "4.56 M"), (2e9, "2 G"), (3e12, "3 T")],
)
def test_counts_are_written(count: float, text: str) -> None:
    assert format_count(count) == text
