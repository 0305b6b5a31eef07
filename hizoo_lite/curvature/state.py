"""Checks that every curvature shares, and the rule for values that cannot be used.

A directional curvature that is not finite, or so large that its square would not be, is ignored: the state
stays what it was. The loop counts steps with non-finite losses on its own; Sigma must outlive them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from hizoo_lite.arrays import Array, Arrays
from hizoo_lite.errors import UserError

#: Largest size taken in. float32 losses at mu = 1e-3 cannot exceed 1e45; squares of more would overflow.
LARGEST = 1e100


def check_smoothing(smoothing: float) -> float:
    """`smoothing` as a float; `UserError` unless it is in (0, 1]. At zero Sigma would never move."""
    if not 0.0 < smoothing <= 1.0:
        raise UserError(
            f"smoothing must be in (0, 1], got {smoothing!r} (at 0 the curvature would never be used)"
        )
    return float(smoothing)


def is_usable(value: float) -> bool:
    """False for what must be ignored: NaN, infinities and absurdly large values."""
    return math.isfinite(value) and abs(value) <= LARGEST


def check_state(
    state: Mapping[str, Array], expected: Mapping[str, Array], who: str, arrays: Arrays
) -> dict[str, Array]:
    """Copies of the tensors of `state`; `UserError` unless names, shapes and dtypes are as in `expected`."""
    if set(state) != set(expected):
        odd = ", ".join(sorted(set(state) ^ set(expected)))
        raise UserError(f"curvature {who}: the saved state and this run differ in {odd}")
    copies = {key: arrays.copied(state[key]) for key in expected}
    for key, want in expected.items():
        got = copies[key]
        if got.shape != want.shape or got.dtype != want.dtype:
            raise UserError(
                f"curvature {who}: saved {key} is {tuple(got.shape)} {got.dtype}, "
                f"this run needs {tuple(want.shape)} {want.dtype}"
            )
    return copies
