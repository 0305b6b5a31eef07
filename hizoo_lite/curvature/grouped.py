"""One curvature value for every tensor or row, learnt without bias (after HiZOO, arXiv 2402.15173).

HiZOO's H' = c/2 (Sigma^-1/2 z z' Sigma^-1/2 - Sigma^-1) is an unbiased estimate of the Hessian H, but its
noise per coordinate is about the whole trace of H, and its absolute value turns that noise into curvature.
We keep what one scalar a step can teach: the mean a_g of H's diagonal over each of a few groups g of n_g
coordinates. With d = Sigma^(1/2) z, one sigma_g a group, and u_g = mean_g(z^2) - 1,

    c = d' H d,      E[c] = sum_g n_g sigma_g a_g,      E[c u_g] = 2 sigma_g a_g

The last equation is HiZOO's with its minus-one term, averaged over the group; off-diagonal entries of H add
noise to it but no bias. Both equations say that c is a linear regression on the squared lengths
x_g = sigma_g sum_g(z^2) with coefficients a_g, so we run the filter for slowly changing coefficients
(Kalman 1960), with mean a, covariance C and noise R:

    r = c - x'a        S = R + x'Cx        a <- a + C x r / S        C <- C - C x x'C / S

x'a is the baseline subtracted from c. It is made from earlier steps only, hence independent of this z. It
also holds the part of c that this z explains, so a noise-free problem is solved in about one step a group
(sampling E[c u_g] alone takes steps by the hundred, and cannot use what a change of Sigma does to c).

Around the filter:

- It starts when the mean of c is positive beyond doubt. Until then, and for as long as c is mostly noise,
  Sigma is the identity: the prior is that every a_g equals the common mean, within `prior` times it.
- R is the running mean of r^2 - x'Cx; residuals beyond three standard deviations are cut to them.
- The Hessian moves during training: C leaks back towards the prior's relative variance at `drift` *
  smoothing, relative to a_g, and a to the common mean as far as C says that it is unknown.

Sigma is relative, and leaves E[c] what it is without a preconditioner: sigma_g is the mean over
coordinates of h, divided by h_g, with h_g = a_g + sqrt(C_gg) and h_g / mean in [1/clip, clip]. So a learning
rate or mu that suits Sigma = I stays as stable under Sigma, and curved groups give up what flat ones gain.
A group is taken for flat only when the evidence says so (LoRA's A has zero curvature while B is zero). c
scaled by a constant gives the same Sigma. The clip is what a flat group that wakes up can cost: c jumps by as
much before the filter has learnt better.

Deviation from the paper: its Sigma^-1 is a Hessian in the loss's units that starts from the identity, so the
start and the size of a step depend on how the loss is scaled. Ours has no units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from hizoo_lite.arrays import Array, Arrays, Shape
from hizoo_lite.base import Curvature
from hizoo_lite.curvature.state import check_smoothing, check_state, is_usable
from hizoo_lite.errors import UserError

#: Residuals beyond this many standard deviations are cut to it.
OUTLIER = 3.0
#: The filter starts after this many observations, once the mean of c exceeds CERTAIN standard errors.
WARM_UP = 4
CERTAIN = 2.0
#: Rows are bundled so that there are no more groups than this: the filter's work and memory are its square
#: (2 MiB), and one scalar a step cannot teach more values than a run has steps.
MOST_ROW_GROUPS = 512


class Grouped(Curvature):
    """One curvature value a tensor or row, learnt without bias from one scalar a step (after HiZOO).

    c = d' H d is a linear regression on x_g = sigma_g sum_g(z^2) over the groups g; its coefficients, the
    mean of H's diagonal over each group, are followed by a Kalman filter (equations and deviations at the top
    of this file). Sigma is relative: E[c] stays what it is with Sigma = I, so that a learning rate keeps its
    meaning. State: groups * (groups + 1) float64 values.

    Example:
        >>> import numpy as np
        >>> from hizoo_lite.arrays import NumpyArrays
        >>> curvature = Grouped()
        >>> curvature.start({"flat": (500,), "steep": (500,)}, NumpyArrays())
        >>> draw = np.random.default_rng(0)
        >>> for step in range(50):  # the Hessian's diagonal is 1 and 9
        ...     d = {}
        ...     for name in ("flat", "steep"):
        ...         z = draw.standard_normal(500).astype("float32")
        ...         d[name] = curvature.scale(name) * z
        ...         curvature.see(name, z)
        ...     c = sum(d["flat"] ** 2) + 9 * sum(d["steep"] ** 2)
        ...     curvature.observe(float(c), smoothing=0.01)
        >>> {name: round(float(mean[0]), 1) for name, mean in curvature.curvatures().items()}
        {'flat': 1.0, 'steep': 9.0}
    """

    name = "grouped"

    def __init__(
        self,
        per: Literal["tensor", "row"] = "tensor",
        clip: float = 30.0,
        prior: float = 1.0,
        drift: float = 0.3,
    ) -> None:
        """Check the arguments.

        Args:
            per: what a group is: a "tensor", or a "row" of it (an element if it has one dimension); rows are
                bundled so that there are at most 512 groups, or one a tensor.
            clip: above 1; bounds the ratio of a group's curvature to the mean, both ways.
            prior: above 0; the standard deviation of that ratio before any evidence.
            drift: in [0, 1]; times the smoothing, the share of the evidence that is forgotten each step.

        Raises:
            UserError: if an argument is out of range.
        """
        if per not in ("tensor", "row"):
            raise UserError(f"curvature grouped: per must be tensor or row, got {per!r}")
        if not 1.0 < clip < float("inf"):
            raise UserError(f"curvature grouped: clip must be a number above 1, got {clip!r}")
        if not 0.0 < prior < float("inf"):
            raise UserError(f"curvature grouped: prior must be a positive number, got {prior!r}")
        if not 0.0 <= drift <= 1.0:
            raise UserError(f"curvature grouped: drift must be in [0, 1], got {drift!r}")
        self.per = per
        self.clip = clip
        self.prior = prior
        self.drift = drift
        self._sigma: Array = None  # by group, once started
        self._drawn_sigma: Array = None  # that of the last `scale`: all directions of a step have it

    def start(self, shapes: Mapping[str, Shape], arrays: Arrays) -> None:
        """Sigma = I."""
        self._arrays = arrays
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._bundle = self._rows_per_group()
        self._slices: dict[str, slice] = {}
        sizes: list[int] = []
        for name, shape in self._shapes.items():
            rows, row_size = self._rows(shape)
            first = range(0, rows, self._bundle) if self.per == "row" else range(1)
            own = [min(self._bundle, rows - i) * row_size for i in first]
            self._slices[name] = slice(len(sizes), len(sizes) + len(own))
            sizes += own
        self._sizes = self._xp.asarray(sizes, dtype=self._xp.float64)
        self._drawn_sigma = None
        self._drawn: dict[str, Array] = {}  # the Sigma behind the last `scale` of each name
        self._squares: dict[str, Array] = {}  # the sum of this step's z^2 over each group, float64
        self._reset()

    def scale(self, name: str) -> Array:
        """Sigma^(1/2) of parameter `name`, float32: 0-dim per tensor, (rows, 1, ...) per row."""
        self._drawn[name] = self._drawn_sigma = self._sigma
        return self._shaped(name, self._sigma)

    def update_scale(self, name: str) -> Array:
        """What `scale` last returned for `name`: d is the direction whose derivative was measured."""
        return self._shaped(name, self._drawn.get(name, self._sigma))

    def curvatures(self) -> dict[str, Array]:
        """The estimated mean Hessian diagonal of every group, signed, (groups,) float64 by parameter name."""
        return {name: self._mean[part] for name, part in self._slices.items()}

    def see(self, name: str, z: Array, first_row: int = 0) -> None:
        """Add the rows to the sums of z^2 over their groups; no float64 copy of z is made."""
        if not self._running:
            return
        part = self._slices[name]
        if first_row == 0:
            self._squares[name] = self._arrays.zeros(part.stop - part.start, like=z)
        _, row_size = self._rows(self._shapes[name])
        lengths = self._arrays.row_squares(z.reshape(-1, row_size))
        self._arrays.add_by_group(lengths, first_row, self._bundle, self._squares[name])

    def observe(self, curvature: float, smoothing: float) -> None:
        """Take in c = d' H d; an unusable c is ignored, a smoothing outside (0, 1] is a `UserError`.

        What was not seen has no part in c.
        """
        weight = check_smoothing(smoothing)
        seen, self._squares = self._squares, {}
        if not is_usable(curvature) or len(self._sizes) == 0:
            return
        if not self._running:
            self._warm_up(curvature, weight)
            return
        squares = self._xp.zeros_like(self._sizes)
        for name, sums in zip(seen, self._arrays.home(list(seen.values())), strict=True):
            squares[self._slices[name]] = sums
        lengths = (self._sigma if self._drawn_sigma is None else self._drawn_sigma) * squares
        self._filter(curvature, lengths, weight)
        self._forget(self.drift * weight)
        if self._common() > 0.0:
            self._sigma = self._preconditioner()
        else:  # the mean curvature is not positive any more: there is nothing to compare groups with
            self._reset()

    def state_dict(self) -> dict[str, Array]:
        """mean (groups,), covariance (groups, groups), moments (4,) = running, level, spread, count."""
        level, spread, count = self._moments
        xp = self._xp
        moments = xp.asarray([float(self._running), level, spread, count], dtype=xp.float64)
        covariance = self._arrays.copied(self._covariance)
        return {"mean": self._mean, "covariance": covariance, "moments": moments}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """The inverse of `state_dict`, after `start` with the same shapes."""
        loaded = check_state(state, self.state_dict(), self.name, self._arrays)
        running, level, spread, count = loaded["moments"].tolist()
        self._mean, self._covariance = loaded["mean"], loaded["covariance"]
        self._running, self._moments = running != 0.0, (level, spread, count)
        self._drawn, self._drawn_sigma = {}, None
        self._sigma = self._preconditioner() if self._running else self._xp.ones_like(self._sizes)

    # ------------------------------------------------------------------------------------- groups

    @property
    def _xp(self) -> Any:
        return self._arrays.xp

    def _rows(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """How many rows a tensor has, and of how many elements."""
        rows = shape[0] if len(shape) > 0 else 1
        return rows, math.prod(shape) // max(rows, 1)

    def _rows_per_group(self) -> int:
        """1 per row if there are few; the next power of two that keeps the groups few; all per tensor."""
        rows = [self._rows(shape)[0] for shape in self._shapes.values()]
        if self.per == "tensor":
            return max(rows, default=1)
        bundle = 1
        while sum(-(-n // bundle) for n in rows) > max(MOST_ROW_GROUPS, len(rows)):
            bundle *= 2
        return bundle

    def _shaped(self, name: str, sigma: Array) -> Array:
        """Sigma^(1/2) of a parameter from the values of its groups."""
        shape = self._shapes[name]
        own = self._arrays.narrow(self._xp.sqrt(sigma[self._slices[name]]))
        if self.per == "tensor" or len(shape) == 0:
            return own.reshape(())
        return self._arrays.repeat(own, self._bundle)[: shape[0]].reshape(-1, *(1 for _ in shape[1:]))

    # ------------------------------------------------------------------------------------- filter

    def _reset(self) -> None:
        """No evidence."""
        groups, xp = len(self._sizes), self._xp
        self._running = False
        self._moments = (0.0, 0.0, 0.0)  # level or 0, spread (R once running), observations
        self._mean = xp.zeros(groups, dtype=xp.float64)
        self._covariance = xp.zeros((groups, groups), dtype=xp.float64)
        self._sigma = xp.ones_like(self._sizes)

    def _warm_up(self, curvature: float, weight: float) -> None:
        """Running mean and variance of c under Sigma = I, until the mean is certain; then the prior."""
        level, spread, count = self._moments
        share = max(weight, 1.0 / (count + 1.0))
        change = curvature - level
        level += share * change
        spread = (1.0 - share) * (spread + share * change * change)
        count += 1.0
        self._moments = (level, spread, count)
        if count < WARM_UP:
            return
        error = math.sqrt(spread / min(count - 1.0, 1.0 / weight + 1.0))  # standard error of the level
        if level <= CERTAIN * error:
            return
        self._running = True
        common = level / float(self._sizes.sum())
        xp = self._xp
        self._mean = xp.full_like(self._sizes, common)
        self._covariance = xp.diag(xp.full_like(self._sizes, (self.prior * common) ** 2))
        self._covariance += (error / float(self._sizes.sum())) ** 2  # the common mean is not exact either
        explained = (self.prior * common) ** 2 * float(2.0 * self._sizes.sum())
        self._moments = (0.0, max(spread - explained, 0.0), 1.0)

    def _filter(self, curvature: float, lengths: Array, weight: float) -> None:
        """One step of the filter: mean, covariance and noise."""
        _, spread, count = self._moments
        known = self._covariance @ lengths
        own = max(float(known @ lengths), 0.0)
        predicted = float(self._mean @ lengths)
        variance = max(spread, 0.0) + own
        bound = OUTLIER * math.sqrt(variance)
        residual = min(max(curvature - predicted, -bound), bound)
        if variance > 0.0:
            self._mean = self._mean + known * (residual / variance)
            self._covariance -= self._xp.outer(known / variance, known)
        share = max(weight, 1.0 / (count + 10.0))
        surprise = min((curvature - predicted) ** 2, bound**2) - own
        self._moments = (0.0, spread + share * (surprise - spread), count + 1.0)

    def _forget(self, share: float) -> None:
        """Evidence ages: the covariance leaks towards the prior's, the mean to the common one if unknown."""
        common = self._common()
        if common <= 0.0:
            return
        clip, diagonal = self._xp.clip, self._diagonal()
        most = (self.prior * clip(self._mean, common / self.clip, common * self.clip)) ** 2
        unknown = clip(clip(diagonal, 0.0, None) / most, None, 1.0)
        diagonal += share * clip(most - diagonal, 0.0, None)
        self._mean = self._mean + share * unknown * (common - self._mean)

    def _common(self) -> float:
        """The mean curvature over coordinates."""
        return float(self._average(self._mean))

    def _preconditioner(self) -> Array:
        """Sigma by group; exactly 1 while all groups are alike."""
        clip = self._xp.clip
        cautious = clip(self._mean, 0.0, None) + self._xp.sqrt(clip(self._diagonal(), 0.0, None))
        ratio = cautious / self._average(cautious)
        ratio = clip(ratio, 1.0 / self.clip, self.clip)
        ratio = ratio / ratio.min()
        return self._average(ratio) / ratio

    def _diagonal(self) -> Array:
        """Of the covariance, as a view that can be written."""
        return self._covariance.reshape(-1)[:: len(self._sizes) + 1]

    def _average(self, values: Array) -> Array:
        """The mean over coordinates of a value by group, 0-dim."""
        return (self._sizes * values).sum() / self._sizes.sum()
