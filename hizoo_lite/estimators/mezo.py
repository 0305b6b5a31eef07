"""MeZO's estimator: pairs of losses, no curvature (arXiv 2305.17333, definition 1, SPSA).

Along each of n directions z_k, with l+ and l- the mean losses at theta + mu*d_k and theta - mu*d_k,

    g = 1/n sum_k (l_k+ - l_k-) / (2 mu) d_k

As published (n-SPSA; n = 1 is its algorithm 1), except that the differences are taken in float64 and that the
2 n points go through a block together. A step costs 2 n forwards, and keeps nothing but the noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hizoo_lite.base import Estimate, Estimator
from hizoo_lite.branches import Branches, Point
from hizoo_lite.errors import UserError

#: That the journal holds of a step.
MOST_PAIRS = 127


class MeZO(Estimator):
    """Slopes from pairs of points, no curvature (MeZO, arXiv 2305.17333, definition 1: n-SPSA).

    With l_k+ and l_k- the mean losses at theta + mu d_k and theta - mu d_k, for n = `directions`:

        coefficient_k = (l_k+ - l_k-) / (2 mu n)

    Example:
        >>> import numpy as np
        >>> MeZO().estimate(0, np.array([0.75, 0.5]), divergences=np.zeros(1), mu=0.5)
        Estimate(coefficients=(0.25,), curvatures=None)
    """

    name = "mezo"

    def __init__(self, directions: int = 1) -> None:
        """Check the argument.

        Args:
            directions: n, 1 or more; a step costs 2 n forwards.

        Raises:
            UserError: if it is not a whole number of 1 or more.
        """
        self.directions = check_directions(self.name, directions, 1)

    @staticmethod
    def conflicts(options: Mapping[str, Any], where: Callable[[str], str]) -> list[str]:
        """Of the directions with a record of the journal."""
        return too_many_pairs(options["directions"], where)

    def points(self, step: int) -> tuple[Point, ...]:
        """A pair along each direction, at every step."""
        return Branches.of(base=False, pairs=self.directions).points

    def estimate(self, step: int, losses: np.ndarray, divergences: np.ndarray, mu: float) -> Estimate:
        """See `Estimator.estimate`; losses are l+, l- of each direction; what is not finite passes."""
        values = as_losses(losses, (2 * self.directions,), self.name)
        slopes = (central_difference(*pair, mu) for pair in zip(values[::2], values[1::2], strict=True))
        return Estimate(tuple(slope / self.directions for slope in slopes), None)


def check_directions(name: str, directions: int, least: int) -> int:
    """`directions`; UserError unless it is a whole number of `least` or more."""
    if not isinstance(directions, int) or isinstance(directions, bool) or directions < least:
        raise UserError(f"estimator {name}: directions must be a whole number >= {least}, got {directions!r}")
    return directions


def too_many_pairs(directions: Any, where: Callable[[str], str]) -> list[str]:
    """What is wrong with so many directions, each with a pair of points."""
    if not isinstance(directions, int) or directions <= MOST_PAIRS:
        return []
    return [f"{where('directions')}: got {directions}, each a pair; allowed: up to {MOST_PAIRS}"]


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
