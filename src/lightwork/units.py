"""Quantities as people write them: bytes, durations, rates and counts. Parsing and printing, nothing else."""

from __future__ import annotations

import re

from lightwork.errors import SpecError

_BYTE_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_bytes(text: str) -> int:
    """Return the number of bytes that `text` names, such as "1GiB", "512 MiB" or "4096".

    Raises: SpecError when it is not a quantity of bytes.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _BYTE_UNITS.get((match.group(2) or "b").lower()) if match else None
    if match is None or unit is None:
        raise SpecError(f"{text!r} is not a number of bytes. Write it as 1GiB, 512MiB, 2GB or 4096.")
    return int(float(match.group(1)) * unit)


_SECONDS = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}


def parse_interval(text: str | int) -> tuple[int | None, float | None]:
    """Return the steps or the seconds that `text` names: 500 or "500 steps"; "10min", "90 s" or "2h".

    Raises: SpecError when it is neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if match is not None and float(match.group(1)) > 0:
        number, unit = match.groups()
        if unit.lower() in ("", "step", "steps") and number.isdecimal():
            return int(number), None
        if unit.lower() in _SECONDS:
            return None, float(number) * _SECONDS[unit.lower()]
    raise SpecError(f"{text!r} is neither a time nor a number of steps. Write it as 10min, 90s, 2h, or 500 steps.")


def format_bytes(num_bytes: float) -> str:
    """Return `num_bytes` in the largest binary unit that leaves at least one, with three digits."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def format_seconds(seconds: float) -> str:
    """Return a duration as people say it: "850 us", "12 ms", "3.2 s", "4 min 05 s", "2 h 10 min"."""
    if 0 < seconds < 999.5e-6:
        return f"{seconds * 1e6:.0f} us"
    if 0 < seconds < 999.5e-3:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    seconds = round(seconds)
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def format_count(count: float) -> str:
    """Return a count or rate with three digits and a decimal suffix: "950", "12.3 k", "4.56 M"."""
    for suffix in ("", " k", " M", " G"):
        if abs(count) < 999.5:
            return f"{count:.3g}{suffix}"
        count /= 1000
    return f"{count:.3g} T"
