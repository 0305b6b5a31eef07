"""MeZO's estimator: two losses a step, no curvature (arXiv 2305.17333, section 2, SPSA).

    projected_grad = (l+ - l-) / (2 mu)

As published, except that the differences are taken in float64.
"""

from __future__ import annotations

import numpy as np

from hizoo_lite.base import Estimate, Estimator
from hizoo_lite.branches import Branches, Point
from hizoo_lite.errors import UserError


class MeZO(Estimator):
    """Projected gradient from one antithetic pair."""

    name = "mezo"

    def points(self, step: int) -> tuple[Point, ...]:
        """The pair, at every step."""
        return Branches.of(base=False, pairs=1).points

    def estimate(self, step: int, losses: np.ndarray, divergences: np.ndarray, mu: float) -> Estimate:
        """See `Estimator.estimate`; losses are l+, l-. What is not finite passes through."""
        plus, minus = as_losses(losses, (2,), self.name)
        return Estimate((central_difference(plus, minus, mu),), None)


def as_losses(losses: np.ndarray, counts: tuple[int, ...], name: str) -> list[float]:
    """The losses as Python floats; `ValueError` unless there is one for each branch."""
    values = np.asarray(losses, dtype=np.float64)
    if values.ndim != 1 or len(values) not in counts:
        allowed = " or ".join(f"({n},)" for n in counts)
        raise ValueError(f"estimator {name}: losses of shape {allowed} expected, got {values.shape}")
    return [float(v) for v in values]


def central_difference(plus: float, minus: float, mu: float) -> float:
    """(l+ - l-) / (2 mu); `UserError` unless mu is a positive number."""
    if not 0.0 < mu < float("inf"):
        raise UserError(f"mu must be a positive number, got {mu!r}")
    return (plus - minus) / (2.0 * mu)
