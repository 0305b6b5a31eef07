"""KerZOO's estimator: slopes at random radii, weighted by a kernel that takes a bias out (arXiv 2505.18886).

Along each of n directions d_k, with r_k uniform in [-1, 1] and L the mean loss,

    g = 1/n sum_k [L(theta + mu r_k d_k) - L(theta - mu r_k d_k)] / (2 mu) K(r_k) d_k
    K(r) = 15/4 r (5 - 7 r^2)

so that E[r K] = 1 and E[r^3 K] = 0: the gradient along d_k is kept, and the third derivative drops out. That
is a bias of the order of mu^2, which at mu = 1e-3 lies far below the noise of a batch.

As published, with the constant of K at 1 and the differences in float64. The radii are a function of the
number of the step alone, so a replay and every rank have the same. A step costs 2 n forwards, and keeps
nothing.
"""

from __future__ import annotations

import numpy as np

from hizoo_lite.base import Estimate
from hizoo_lite.branches import Point
from hizoo_lite.estimators.mezo import MeZO, as_losses, central_difference
from hizoo_lite.noise import generator


class KerZOO(MeZO):
    """MeZO's pairs at random radii, weighted by a kernel (KerZOO, arXiv 2505.18886).

    With r_k uniform in [-1, 1], n = `directions`, and l_k+ and l_k- the mean losses at theta + mu r_k d_k and
    theta - mu r_k d_k:

        coefficient_k = (l_k+ - l_k-) / (2 mu n) K(r_k),        K(r) = 15/4 r (5 - 7 r^2)

    which takes the third derivative of the loss out of the estimate's bias.
    """

    name = "kerzoo"

    def radii(self, step: int) -> tuple[float, ...]:
        """r of each direction at `step`, in [-1, 1]: the same in every run."""
        return tuple(map(float, generator(0, self.name, step).uniform(-1.0, 1.0, self.directions)))

    def points(self, step: int) -> tuple[Point, ...]:
        """A pair along each direction."""
        return tuple(Point(k, sign * radius) for k, radius in enumerate(self.radii(step)) for sign in (1, -1))

    def estimate(self, step: int, losses: np.ndarray, divergences: np.ndarray, mu: float) -> Estimate:
        """See `Estimator.estimate`; losses are those of each direction's pair. What is not finite passes."""
        values = as_losses(losses, (2 * self.directions,), self.name)
        pairs = zip(values[::2], values[1::2], self.radii(step), strict=True)
        weighted = (central_difference(plus, minus, mu) * kernel(radius) for plus, minus, radius in pairs)
        return Estimate(tuple(slope / self.directions for slope in weighted), None)


def kernel(radius: float) -> float:
    """K(r) = 15/4 r (5 - 7 r^2)."""
    return 3.75 * radius * (5.0 - 7.0 * radius * radius)
