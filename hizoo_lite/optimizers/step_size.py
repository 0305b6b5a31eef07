"""The learning rate of each step: a schedule, or derived from the measured curvature.

The mean of the directional curvature c = d' G d is the trace of the preconditioned Gauss-Newton matrix. With
one direction a step, a quadratic is expected to fall fastest at

    lr = kappa / E[c],        kappa = 1 / (1 + n / batch)

with n = tr Cov / |g|^2 the noise of one example relative to the signal; kappa above 2 diverges. So the rate
needs no grid search: its scale is measured, and kappa is a number below 0.1 that falls over a run as n grows.
The published code reads its schedules once an epoch; ours are per step. All arithmetic is in Python floats,
and a state restores bitwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hizoo_lite.base import Estimate, StepSize
from hizoo_lite.config import ScheduleName
from hizoo_lite.curvature.state import is_usable
from hizoo_lite.errors import UserError

#: An observed |c| enters the means as at most this multiple of the level: one outlier is not a new level.
LARGEST_RISE = 10.0
#: A |c| this much above the level lowers the rate of its own step.
SUDDEN = 4.0
#: Of the schedule that has any.
STAGES = 3
#: Share of the newest g^2 in the running mean square of the gradient guard.
GUARD_SHARE = 0.02


@dataclass(frozen=True)
class Schedule:
    """A value for every step: linear warm-up, then constant, or to zero along a line or half a cosine.

    In `stages`, of which there are three, each is twice as long as the one before and has half its value:
    DP-ZOSO (Liu et al., arXiv 2402.07818), whose published code takes 1 000, 2 000 and 4 000 steps.
    Used for the learning rate and for the smoothing. During the warm-up, step t (counted from 0) has
    peak * (t + 1) / (warmup_steps + 1); a decaying schedule stays above zero until `total_steps`.
    """

    kind: ScheduleName = "constant"
    peak: float = 1.0
    warmup_steps: int = 0
    total_steps: int = 1

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScheduleName):
            allowed = ", ".join(get_args(ScheduleName))
            raise UserError(f"schedule: kind: got {self.kind!r}, allowed: {allowed}")
        if not 0.0 < self.peak < float("inf"):
            raise UserError(f"schedule: peak must be a positive number, got {self.peak!r}")
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise UserError(
                f"schedule: 0 <= warmup_steps <= total_steps wanted, "
                f"got warmup_steps={self.warmup_steps!r}, total_steps={self.total_steps!r}"
            )

    def __call__(self, step: int) -> float:
        """The value at `step` >= 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        if self.kind == "constant":
            return self.peak
        if self.kind == "stages":
            taken, all_steps = step - self.warmup_steps, self.total_steps - self.warmup_steps
            ends = [all_steps * (2**stage - 1) for stage in range(1, STAGES)]
            return self.peak / 2.0 ** sum(taken * (2**STAGES - 1) >= end for end in ends)
        left = (self.total_steps - step) / max(self.total_steps - self.warmup_steps, 1)
        left = min(max(left, 0.0), 1.0)
        return self.peak * (left if self.kind == "linear" else 0.5 * (1.0 - math.cos(math.pi * left)))


class Smoothing(Schedule):
    """A schedule whose values are in (0, 1]: a smoothing of zero would switch the curvature off."""

    def __post_init__(self) -> None:
        if not 0.0 < self.peak <= 1.0:
            raise UserError(f"smoothing must be in (0, 1], got {self.peak!r}")
        super().__post_init__()

    def __call__(self, step: int) -> float:
        """The value at `step`; past the end of a decaying schedule, a millionth of the peak."""
        return max(super().__call__(step), 1e-6 * self.peak)


class FixedRate:
    """A learning rate that the user chose, on a schedule, whatever is measured."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def rate(self, step: int, estimate: Estimate) -> float:
        """The schedule's value."""
        return self.schedule(step)

    def state_dict(self) -> dict[str, float]:
        """Nothing: the rate depends on the step alone."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """`UserError` unless the saved run had a fixed rate as well."""
        _check_keys(state, {})


class AutoRate:
    """lr = kappa * schedule / level, where `level` follows |c| (`--lr auto`).

    Of several directions a step, c is their mean, and lr is of each: theta moves along each as it would along
    one alone. Their mean has 1/n of the noise, and so may take steps n times as long.

    - The level is the larger of two running means, in which the newest |c| has the shares `fast` and `slow`.
      |c| counts up to LARGEST_RISE times the level; beyond SUDDEN times the level it lowers the rate of its
      own step directly.
    - The rate starts small: it is ramped over the first `ramp` measured curvatures, while the mean is
      uncertain. If no curvature was found there is no rate either, or `ceiling`, which it never exceeds.
    - One huge projected gradient does not throw the parameters away: the length of a step is rate * |g| *
      |d|, with E|d|^2 fixed by the curvature, so |g| beyond `guard` times its running root mean square
      lowers the rate until the product is back at it.
    - Steps are not to lower the loss by more than `descent` nats to first order, rate * g^2, of this g and of
      its running mean square. Predictions that are sure and wrong have next to no curvature and a large
      slope: kappa / c knows no bound there.
    - A curvature that is negative counts by its size; one that is not finite is passed over; a step
      without one (`HiZOO(every=k)`) reuses the last level. A gradient that is not finite gives a rate of 0.
    """

    def __init__(
        self,
        kappa: float = 0.04,
        fast: float = 0.03,
        slow: float = 0.03,
        ramp: int = 5,
        guard: float = 3.0,
        ceiling: float | None = None,
        descent: float | None = 1.0,
        schedule: Schedule | None = None,
    ) -> None:
        """`schedule` multiplies the rate (peak 1 for none); the other parameters as above, all positive."""
        given = {"kappa": kappa, "fast": fast, "slow": slow, "ramp": ramp, "guard": guard}
        given |= {} if ceiling is None else {"ceiling": ceiling}
        given |= {} if descent is None else {"descent": descent}
        for name, value in given.items():
            if not 0.0 < value < float("inf"):
                raise UserError(f"lr auto: {name} must be a positive number, got {value!r}")
        self.kappa = kappa
        self.fast, self.slow = fast, slow
        self.ceiling = ceiling
        self.ramp = ramp
        self.guard = guard
        self.descent = descent
        self.schedule = schedule
        self._state = {"fast": 0.0, "slow": 0.0, "curvatures": 0.0, "square": 0.0, "gradients": 0.0}

    def rate(self, step: int, estimate: Estimate) -> float:
        """The rate of this step; 0 as long as no step had a usable curvature."""
        gradient, curvature = estimate.projected_grad, estimate.curvature
        if curvature is None and self._state["curvatures"] == 0.0:
            return 0.0
        if not is_usable(gradient):
            return 0.0
        level = self._level(curvature)
        count = self._state["curvatures"]
        rate = self._bounded(level) * min(count / self.ramp, 1.0)
        if self.schedule is not None:
            rate *= self.schedule(step)
        rate *= self._damping(gradient)
        square = len(estimate.coefficients) * max(gradient * gradient, self._state["square"])
        if self.descent is not None and rate * square > self.descent:
            rate = self.descent / square
        return rate

    def state_dict(self) -> dict[str, float]:
        """The running means and their counts."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """The inverse of `state_dict`."""
        _check_keys(state, self._state)
        self._state = {key: float(state[key]) for key in self._state}

    def _bounded(self, level: float) -> float:
        if level <= 0.0:
            return self.ceiling or 0.0
        rate = self.kappa / level
        return rate if self.ceiling is None else min(rate, self.ceiling)

    def _level(self, curvature: float | None) -> float:
        """Take in c; the level by which this step's rate is divided."""
        state = self._state
        level = max(state["fast"], state["slow"])
        if curvature is None or not is_usable(curvature):
            return level
        size = abs(curvature)
        count = state["curvatures"] + 1.0
        state["curvatures"] = count
        counted = min(size, LARGEST_RISE * level) if level > 0.0 else size
        for key, share in (("fast", self.fast), ("slow", self.slow)):
            state[key] += max(share, 1.0 / count) * (counted - state[key])
        return max(state["fast"], state["slow"], size / SUDDEN)

    def _damping(self, gradient: float) -> float:
        """Take in g; the factor, at most 1, that keeps |g| within the guard."""
        state = self._state
        size = abs(gradient)
        bound = self.guard * math.sqrt(state["square"])
        damping = bound / size if state["gradients"] > 0.0 and size > bound > 0.0 else 1.0
        state["gradients"] += 1.0
        share = max(GUARD_SHARE, 1.0 / state["gradients"])
        state["square"] += share * ((size * damping) ** 2 - state["square"])
        return damping


#: kappa of a step along one direction, and of each of several, whose mean is less noisy (tools/LOG.md).
KAPPA_OF_ONE, KAPPA_OF_SEVERAL = 0.04, 0.06

#: Of a rate from second differences of losses, which say little of the curvature (`estimators/hizoo.py`). The
#: level rises at once and falls slowly; 0.03 landed on the best rate of a grid in a trial on SST-2, 0.1 was
#: noisy, 0.3 stalled.
FROM_LOSSES: dict[str, Any] = {
    "kappa": 0.03,
    "fast": 0.1,
    "slow": 0.01,
    "ramp": 20,
    "ceiling": 1e-2,
    "descent": None,
}


def step_size(
    lr: float | Literal["auto"],
    schedule: Schedule,
    measures_curvature: bool,
    predicts: bool = True,
    directions: int = 1,
) -> StepSize:
    """The step size for the flag `--lr`: `auto`, or a number that becomes the peak of `schedule`.

    measures_curvature, predicts, directions: of the estimator's steps. `UserError` for anything else.
    """
    if directions == 0:  # nothing moves along any: the rate is the share of the schedule
        return FixedRate(Schedule(schedule.kind, 1.0, schedule.warmup_steps, schedule.total_steps))
    if lr == "auto":
        if not measures_curvature:
            raise UserError("--lr auto needs the curvature: give --lr a number, or use --estimator hizoo")
        course = Schedule(schedule.kind, 1.0, schedule.warmup_steps, schedule.total_steps)
        if not predicts:
            return AutoRate(schedule=course, **FROM_LOSSES)
        return AutoRate(KAPPA_OF_ONE if directions == 1 else KAPPA_OF_SEVERAL, schedule=course)
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0.0 < lr < float("inf"):
        raise UserError(f"--lr must be auto or a positive number, got {lr!r}")
    return FixedRate(Schedule(schedule.kind, float(lr), schedule.warmup_steps, schedule.total_steps))


def _check_keys(state: Mapping[str, float], expected: Mapping[str, float]) -> None:
    if set(state) != set(expected):
        raise UserError(f"step size: saved state has {sorted(state)}, this run needs {sorted(expected)}")
