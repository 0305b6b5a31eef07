"""GRZO's estimator: a direction for each group of examples, advantages in place of losses (arXiv 2606.02857).

Group g of G has a direction z_g of its own, and with delta_g the mean over the batch of its examples'
differences l(theta + mu z_g) - l(theta - mu z_g), s the deviation of delta_1 ... delta_G,

    a_g = delta_g / s,        g = 1/G sum_g a_g z_g

Examples that share a direction share its noise; with a direction each it averages out. What examples differ
by does not, and gains nothing if it is the larger of the two.

Deviations: the paper's g has another factor 1 / (2 mu), so its learning rate over 2 mu is ours. Its groups
are single examples, whose z are sign flips of one shared matrix; here groups go through the blocks one after
the other, each with a draw of its own: 2 forwards of each example as in MeZO, but blocks are unpacked, or
streamed, G times. s has G - 1 in its denominator; if it is 0 nothing moves. The noise of G directions is
kept.
"""

from __future__ import annotations

import statistics

import numpy as np

from hizoo_lite.base import Estimate, Estimator
from hizoo_lite.branches import Branches, Point
from hizoo_lite.errors import UserError
from hizoo_lite.estimators.mezo import as_losses


class GRZO(Estimator):
    """A direction for each group of examples, by normalized differences (GRZO, arXiv 2606.02857).

    With delta_g the mean of l(theta + mu d_g) - l(theta - mu d_g) over the examples of group g, G = `groups`,
    and s the standard deviation of the delta_g (G - 1 in its denominator):

        coefficient_g = delta_g / (s G);        0 if s is 0

    The paper has a further factor 1 / (2 mu): its learning rate over 2 mu is ours.
    """

    name = "grzo"
    for_weights = False

    def __init__(self, groups: int = 4) -> None:
        """Check the argument.

        Args:
            groups: G, 2 or more, which a deviation needs, and at most the examples of a batch. A step costs 2
                forwards of each example, and every block comes G times.

        Raises:
            UserError: if it is not a whole number of 2 or more.
        """
        if not isinstance(groups, int) or isinstance(groups, bool) or groups < 2:
            raise UserError(f"estimator grzo: groups must be a whole number >= 2, got {groups!r}")
        self.groups = groups

    def points(self, step: int) -> tuple[Point, ...]:
        """The pair that the examples of a group are evaluated at."""
        return Branches.of(base=False, pairs=1).points

    def release(self, step: int, sums: np.ndarray, examples: int) -> np.ndarray:
        """The means of each group, whose sizes are the same up to one."""
        return sums * self.groups / examples

    def estimate(self, step: int, losses: np.ndarray, divergences: np.ndarray, mu: float) -> Estimate:
        """See `Estimator.estimate`; losses are l+, l- of each group. What is not finite passes through."""
        values = as_losses(losses, (2 * self.groups,), self.name)
        rises = [plus - minus for plus, minus in zip(values[::2], values[1::2], strict=True)]
        deviation = statistics.stdev(rises) if np.isfinite(rises).all() else float("nan")
        if deviation == 0.0:
            return Estimate((0.0,) * self.groups, None)
        return Estimate(tuple(rise / (deviation * self.groups) for rise in rises), None)
