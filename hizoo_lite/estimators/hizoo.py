"""HiZOO's estimator: slope and curvature along random directions (arXiv 2402.15173, section 3).

Along one direction, with l+ and l- the mean losses at theta + mu*d and theta - mu*d, the slope is

    projected_grad = (l+ - l-) / (2 mu)

and the curvature comes from one of two sources:

- "predictions": d' G d = [KL(p+ || p-) + KL(p- || p+)] / (4 mu^2) of the predicted distributions, with G the
  Gauss-Newton matrix (`tasks/losses.py`). Never negative, first differences only, and the pair is
  enough: two branches a step.
- "losses": d' H d = (l+ + l- - 2 l0) / mu^2, as published, with l0 the loss at theta: three branches a step.

The second difference is kept for parity. It is no curvature if parameters are multiplied with each other:
with LoRA's A and B perturbed together it holds 2 <G_W, z_B z_A>, the *gradient* of the weight along a random
product, which has mean zero over z and is as large as the gradient. On SmolLM2-135M it scatters by 20 to 100
around a curvature of 0.03 to 0.3 (tools/LOG.md). H and G differ by the curvature of the model itself,
weighted by the residuals; G is what a stable step size needs (Martens, arXiv 1412.1193, section 8).

Along several directions each has one point, and all share the loss at theta: l0, and l_k at theta + mu*d_k,

    projected_grad_k = (l_k - l0) / mu            d_k' G d_k = [KL(p_k || p0) + KL(p0 || p_k)] / mu^2

which costs 1 + n branches for n directions where pairs cost 2 n (FZOO, arXiv 2506.09034, shares l0 so).
Slopes are those in the middle, theta + mu*d_k/2: off by mu/2 times the curvature, 1e-4 where slopes are 0.2.
The second difference needs points on both sides, so this is of "predictions" alone.

The published code spends a fourth forward on logging; ours never does. With "losses" the base branch may be
left out of most steps (`every`), because the curvature changes more slowly than the gradient: a step then
costs 2 + 1/every forwards on average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np

from hizoo_lite.base import Estimate, Estimator
from hizoo_lite.branches import Branches, Point
from hizoo_lite.errors import UserError
from hizoo_lite.estimators.mezo import as_losses, central_difference, check_directions
from hizoo_lite.registry import SPACES

CurvatureSource = Literal["predictions", "losses"]


class HiZOO(Estimator):
    """Slope and curvature of the loss along random directions (HiZOO, arXiv 2402.15173, section 3).

    Along one direction d = Sigma^(1/2) z, with l+ and l- the mean losses at theta + mu d and theta - mu d:

        coefficient = (l+ - l-) / (2 mu)
        curvature = d' G d = [KL(p+ || p-) + KL(p- || p+)] / (4 mu^2)          "predictions"
        curvature = d' H d = (l+ + l- - 2 l0) / mu^2                           "losses", as published

    with l0 the loss at theta, p+ and p- the predicted distributions, G the Gauss-Newton matrix and H the
    Hessian. Along n > 1 directions all points are one-sided and share theta: coefficient_k = (l_k - l0) / mu,
    and curvature_k has the predictions at theta for p- and mu^2 for 4 mu^2.
    Curvature from predictions is our deviation; with LoRA the published second difference is mostly noise.

    Example:
        >>> import numpy as np
        >>> estimator = HiZOO()
        >>> estimator.points(0)
        (Point(direction=0, offset=1.0), Point(direction=0, offset=-1.0))
        >>> estimate = estimator.estimate(0, np.array([0.75, 0.5]), divergences=np.array([0.5]), mu=0.5)
        >>> estimate.projected_grad, estimate.curvature
        (0.25, 0.5)
    """

    name = "hizoo"
    measures_curvature = True

    def __init__(
        self, every: int = 1, curvature_from: CurvatureSource = "predictions", directions: int = 1
    ) -> None:
        """Check the arguments.

        Args:
            every: steps between two curvatures from losses, whose third forward is left out of the others;
                1 with "predictions", which are there at every step.
            curvature_from: "predictions" or "losses".
            directions: n; 1 is a pair of points, 2 forwards (3 with "losses"); more share one base, 1 + n
                forwards, with "predictions" alone.

        Raises:
            UserError: if an argument is out of range, or two do not go together.
        """
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise UserError(f"estimator hizoo: every must be a whole number of steps >= 1, got {every!r}")
        if curvature_from not in get_args(CurvatureSource):
            allowed = " or ".join(get_args(CurvatureSource))
            raise UserError(f"estimator hizoo: curvature_from must be {allowed}, got {curvature_from!r}")
        check_directions(self.name, directions, 1)
        given = {"every": every, "curvature_from": curvature_from, "directions": directions}
        for problem in self.conflicts(given, str):
            raise UserError(f"estimator hizoo: {problem}")
        self.every, self.curvature_from, self.directions = every, curvature_from, directions

    @staticmethod
    def left_open(config: Any) -> dict[str, Any]:
        """What "auto" is in `config`: 2 directions for adapters with curvature from predictions, else 1."""
        several = config.curvature_from == "predictions" and not SPACES.lines[config.space].in_weights
        return {"directions": 2 if several else 1}

    @staticmethod
    def conflicts(options: Mapping[str, Any], where: Callable[[str], str]) -> list[str]:
        """Of the source of the curvature with the others."""
        every, directions = options["every"], options["directions"]
        if options["curvature_from"] == "predictions" and every != 1:
            return [
                f"{where('every')}: got {every}, but predictions give the curvature at every step; "
                f"allowed: 1, or {where('curvature_from')} losses"
            ]
        if options["curvature_from"] == "losses" and directions not in ("auto", 1):
            return [
                f"{where('directions')}: got {directions}, but a curvature from losses needs points on both "
                f"sides; allowed: 1, or {where('curvature_from')} predictions"
            ]
        return []

    def points(self, step: int) -> tuple[Point, ...]:
        """A pair, after the base if this step's curvature is from losses; or base and one-sided points."""
        if self.directions > 1:
            return Branches.of(base=True, pairs=0, one_sided=self.directions).points
        return Branches.of(base=not self.predicts and self.measures(step), pairs=1).points

    @property
    def predicts(self) -> bool:
        """Whether `curvature_from` is "predictions"."""
        return self.curvature_from == "predictions"

    def measures(self, step: int) -> bool:
        """Every `every` steps."""
        return step % self.every == 0

    def estimate(self, step: int, losses: np.ndarray, divergences: np.ndarray, mu: float) -> Estimate:
        """See `Estimator.estimate`; losses are (l0,) l+, l- or l0, l1, ...; what is not finite passes."""
        if self.directions > 1:
            zero, *others = as_losses(losses, (1 + self.directions,), self.name)
            slopes = tuple(2.0 * central_difference(value, zero, mu) for value in others)
            return Estimate(slopes, tuple(directional_curvature(float(d), mu) for d in divergences))
        values = as_losses(losses, (2, 3), self.name)
        slope = central_difference(values[-2], values[-1], mu)
        if self.predicts:
            return Estimate((slope,), (directional_curvature(float(divergences[0]), 2 * mu),))
        if len(values) == 2:
            return Estimate((slope,), None)
        zero, plus, minus = values
        # Differences first: adding l+ and l- would round away what separates them from 2 l0.
        return Estimate((slope,), (((plus - zero) + (minus - zero)) / (mu * mu),))


def directional_curvature(divergence: float, distance: float) -> float:
    """d' G d from the mean divergence of the predictions at two points on a line along d.

    distance: between them, in units of d: 2 mu for a pair at +-mu d. From theta itself to a one-sided point
    at mu d it is mu; 2 KL(p0 || p) / mu^2 has the same leading term, this one treats both points alike.
    """
    return divergence / (distance * distance)
