"""Tables of parameters of which some entries run by default, and the others with `-m grid`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def covering(*axes: Sequence[Any]) -> list[Any]:
    """The product of the axes; by default as few entries as have every value of every axis at least once.

    A value that is a tuple counts as several parameters.
    """
    table: list[tuple[int, ...]] = [()]
    for axis in axes:
        table = [(*entry, place) for entry in table for place in range(len(axis))]
    chosen = {tuple(number % len(axis) for axis in axes) for number in range(max(map(len, axes)))}
    found = []
    for entry in table:
        values = [axis[place] for axis, place in zip(axes, entry, strict=True)]
        flat = [part for value in values for part in (value if type(value) is tuple else (value,))]
        found.append(pytest.param(*flat, marks=[] if entry in chosen else [pytest.mark.grid]))
    return found
