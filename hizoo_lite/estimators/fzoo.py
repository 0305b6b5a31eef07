"""FZOO's estimator: one-sided slopes along random signs, by the deviation of their losses (arXiv 2506.09034).

Along n directions of +-1, l0 the loss at theta, l_i at theta + mu*u_i, and s the deviation of l_1 ... l_n,

    g = 1/n sum_i (l_i - l0) / s  u_i

A step has a length of its own: mu cancels, and where the loss is steep so is s. The learning rate that suits
it is MeZO's times the deviation of MeZO's slopes.

As published (s with n - 1 in its denominator), except that differences are taken in float64, and that a step
whose losses are all alike moves nothing, where 0 / 0 would be. z is +-1 in place of normal, so nothing can be
learnt from z^2: there is no curvature. A step costs 1 + n forwards and keeps nothing.
"""

from __future__ import annotations

import statistics
from typing import ClassVar

import numpy as np

from hizoo_lite.base import Estimate, Estimator, NoiseLaw
from hizoo_lite.branches import Branches, Point
from hizoo_lite.estimators.mezo import as_losses, check_directions


class FZOO(Estimator):
    """Normalized one-sided slopes along directions of signs that share a base (FZOO, arXiv 2506.09034).

    With l0 the mean loss at theta, l_k at theta + mu u_k, u_k of -1 and +1, and s the standard deviation of
    the l_k (n - 1 in its denominator), for n = `directions`:

        coefficient_k = (l_k - l0) / (n s);        0 if s is 0

    Example:
        >>> import numpy as np
        >>> FZOO(directions=2).estimate(0, np.array([1.0, 2.0, 4.0]), divergences=np.zeros(2), mu=1e-3)
        Estimate(coefficients=(0.35355339059327373, 1.0606601717798212), curvatures=None)
    """

    name = "fzoo"
    law: ClassVar[NoiseLaw] = "signs"
    for_weights = False

    def __init__(self, directions: int = 8) -> None:
        """Check the argument.

        Args:
            directions: n, 2 or more, which a deviation needs; a step costs 1 + n forwards.

        Raises:
            UserError: if it is not a whole number of 2 or more.
        """
        self.directions = check_directions(self.name, directions, 2)

    def points(self, step: int) -> tuple[Point, ...]:
        """The base, and a point along each direction."""
        return Branches.of(base=True, pairs=0, one_sided=self.directions).points

    def estimate(self, step: int, losses: np.ndarray, divergences: np.ndarray, mu: float) -> Estimate:
        """See `Estimator.estimate`; losses are l0, l1, ... What is not finite passes through."""
        zero, *others = as_losses(losses, (1 + self.directions,), self.name)
        deviation = statistics.stdev(others) if np.isfinite(others).all() else float("nan")
        if deviation == 0.0:
            return Estimate((0.0,) * self.directions, None)
        return Estimate(tuple((value - zero) / (self.directions * deviation) for value in others), None)
