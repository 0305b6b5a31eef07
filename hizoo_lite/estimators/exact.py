"""A step that estimates nothing: all that is trained has an exact gradient, from theta alone."""

from __future__ import annotations

import numpy as np

from hizoo_lite.base import Estimate, Estimator
from hizoo_lite.branches import THETA, Point


class Exact(Estimator):
    """One loss a step, at theta. A `TrainConfig` that estimates nothing has it, whatever it names."""

    name = "exact"

    def points(self, step: int) -> tuple[Point, ...]:
        """Theta, at every step."""
        return (THETA,)

    def estimate(self, step: int, losses: np.ndarray, divergences: np.ndarray, mu: float) -> Estimate:
        """No coefficient: there is no direction."""
        return Estimate((), None)
