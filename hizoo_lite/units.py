"""Sizes as users write them ("24GiB", "500 MB") and back, and counts of things, for display.

Inside the code a size is an int of bytes.
"""

from __future__ import annotations

import re

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_TOO_MANY = 2**63  # bytes: no address reaches them
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")

ALLOWED_SIZES = "a number and a unit, such as 24GiB or 500MB (B, KB, MB, GB, TB; KiB, MiB, GiB, TiB)"


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "24GiB" (2^30) or "24GB" (10^9). ValueError for anything else, and for zero."""
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(f"got {text!r}, allowed: {ALLOWED_SIZES}")
    size_bytes = float(match[1]) * unit
    if not 1 <= size_bytes < _TOO_MANY:
        raise ValueError(f"got {text!r:.80}, allowed: more than zero bytes, and less than {_TOO_MANY:.1e}")
    return int(size_bytes)


def format_bytes(size_bytes: int | None) -> str:
    """For display only: "1.50 GiB"; "-" for None."""
    if size_bytes is None:
        return "-"
    for unit in ("GiB", "MiB", "KiB"):
        if abs(size_bytes) >= _UNITS[unit.upper()]:
            return f"{size_bytes / _UNITS[unit.upper()]:.2f} {unit}"
    return f"{size_bytes} B"


def counted(number: int, noun: str) -> str:
    """For display only: "1 example", "2,000 examples"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
