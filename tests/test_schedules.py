"""Schedules, and the learning rate derived from the measured curvature."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest

from hizoo_lite.base import Estimate
from hizoo_lite.config import ScheduleName
from hizoo_lite.errors import UserError
from hizoo_lite.optimizers.step_size import (
    FROM_LOSSES,
    AutoRate,
    FixedRate,
    Schedule,
    Smoothing,
    step_size,
)


def one(gradient: float, curvature: float | None) -> Estimate:
    """An estimate along one direction."""
    return Estimate((gradient,), None if curvature is None else (curvature,))


def feed(rate: AutoRate, curvature: float | None, gradient: float = 1.0, steps: int = 1) -> float:
    """The last of `steps` rates."""
    return [rate.rate(step, one(gradient, curvature)) for step in range(steps)][-1]


def settled(curvature: float = 100.0) -> AutoRate:
    """An automatic rate that has seen a steady curvature for long."""
    rate = AutoRate(**FROM_LOSSES)
    feed(rate, curvature, steps=500)
    return rate


def test_constant_schedule_is_the_peak_after_its_warmup():
    schedule = Schedule("constant", 2.0, warmup_steps=3, total_steps=10)
    assert [schedule(step) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_linear_schedule_equals_the_line():
    schedule = Schedule("linear", 1.0, warmup_steps=0, total_steps=4)
    assert [schedule(step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_cosine_schedule_equals_half_a_cosine():
    schedule = Schedule("cosine", 3.0, warmup_steps=2, total_steps=12)
    wanted = [1.5 * (1 + math.cos(math.pi * k / 10)) for k in range(10)]
    assert [schedule(2 + k) for k in range(10)] == pytest.approx(wanted, rel=1e-12)


def test_stages_double_and_halve():
    schedule = Schedule("stages", 4.0, warmup_steps=1, total_steps=15)
    assert [schedule(step) for step in range(18)] == [2.0, *[4.0] * 2, *[2.0] * 4, *[1.0] * 11]


@pytest.mark.parametrize("kind", get_args(ScheduleName))
def test_schedule_is_positive_until_its_end(kind):
    schedule = Schedule(kind, 1e-3, warmup_steps=7, total_steps=50)
    assert all(0 < schedule(step) <= 1e-3 for step in range(50))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "step"}, "kind: got 'step', allowed: constant, linear, cosine, stages"),
        ({"peak": 0.0}, "peak must be a positive number"),
        ({"peak": math.nan}, "peak must be a positive number"),
        ({"warmup_steps": 5, "total_steps": 4}, "0 <= warmup_steps <= total_steps wanted"),
        ({"warmup_steps": -1}, "0 <= warmup_steps <= total_steps wanted"),
    ],
)
def test_impossible_schedules_are_errors(options, message):
    with pytest.raises(UserError, match=message):
        Schedule(**options)


@pytest.mark.parametrize("peak", [0.0, -1e-3, 1.5, math.nan])
def test_impossible_smoothing_is_an_error(peak):
    with pytest.raises(UserError, match=rf"smoothing must be in \(0, 1\], got {peak}"):
        Smoothing(peak=peak)


def test_smoothing_stays_positive_past_its_end():
    schedule = Smoothing("linear", 0.5, total_steps=10)
    assert schedule(0) == 0.5
    assert 0 < schedule(20) <= 1


def test_fixed_rate_is_the_schedule_whatever_is_measured():
    rate = FixedRate(Schedule("linear", 1.0, total_steps=4))
    assert [rate.rate(step, one(1e9, None)) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    rate.load_state_dict(rate.state_dict())
    assert rate.state_dict() == {}


def test_auto_rate_of_a_steady_curvature_is_kappa_over_it():
    assert feed(settled(100.0), 100.0) == pytest.approx(0.03 / 100.0, rel=1e-9)


def test_auto_rate_starts_small():
    rate = AutoRate(kappa=0.03, ramp=20)
    rates = [feed(rate, 100.0) for _ in range(25)]
    assert rates[0] == pytest.approx(0.03 / 100.0 / 20, rel=1e-9)
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.03 / 100.0, rel=1e-9)


def test_auto_rate_falls_at_once_and_rises_slowly():
    rate = settled(100.0)
    assert feed(rate, 10_000.0) <= 0.03 / 100.0 / 10
    assert feed(rate, 10_000.0, steps=50) == pytest.approx(0.03 / 10_000.0, rel=0.01)
    assert feed(rate, 100.0, steps=20) < 0.1 * 0.03 / 100.0


def test_auto_rate_recovers_from_one_outlier():
    rate = settled(100.0)
    assert feed(rate, 1e12) < 1e-10
    assert feed(rate, 100.0, steps=100) > 0.9 * 0.03 / 100.0


def test_auto_rate_counts_a_negative_curvature_by_its_size():
    assert feed(settled(-100.0), -100.0) == feed(settled(100.0), 100.0)


@pytest.mark.parametrize("curvature", [0.0, 1e-300, -1e-300])
def test_auto_rate_without_curvature_is_the_ceiling(curvature):
    assert feed(AutoRate(ceiling=1e-2), curvature, steps=50) == 1e-2


def test_auto_rate_without_curvature_and_ceiling_is_zero():
    assert feed(AutoRate(), 0.0, steps=50) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200, None])
def test_auto_rate_passes_over_a_missing_or_infinite_curvature(bad):
    rate = settled(100.0)
    assert feed(rate, bad) == pytest.approx(0.03 / 100.0, rel=1e-9)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, 1e200])
def test_auto_rate_of_a_gradient_that_is_not_finite_is_zero(bad):
    rate = settled()
    before = rate.state_dict()
    assert feed(rate, 100.0, gradient=bad) == 0.0
    assert rate.state_dict() == before


def test_auto_rate_bounds_the_move_of_a_huge_gradient():
    rate = settled()
    usual = feed(rate, 100.0, gradient=1.0)
    assert feed(rate, 100.0, gradient=1e6) * 1e6 == pytest.approx(3.0 * usual, rel=0.01)
    assert feed(rate, 100.0, gradient=-2.0) == pytest.approx(usual, rel=1e-9)


def test_auto_rate_lowers_no_loss_by_more_than_a_nat_to_first_order():
    """Sure and wrong: a slope of 2 on a curvature of 1e-10."""
    rate = AutoRate()
    assert feed(rate, 1e-10, gradient=2.0, steps=50) == pytest.approx(1.0 / 2.0**2, rel=1e-9)
    assert feed(AutoRate(), 10.0, gradient=2.0, steps=50) == pytest.approx(0.04 / 10.0, rel=1e-9)


def test_auto_rate_ends_near_the_minimum_of_a_problem_that_it_begins_sure_and_wrong_on():
    """Logistic regression whose first weights give logits of 50, a few of them with the wrong sign."""
    draw = np.random.default_rng(0)
    inputs, weights = draw.standard_normal((64, 20)), draw.standard_normal(20)
    labels = np.sign(inputs @ weights)
    labels[:3] *= -1
    weights *= 50 / np.linalg.norm(weights)

    def loss(at: np.ndarray, rows: np.ndarray) -> float:
        return float(np.logaddexp(0.0, -labels[rows] * (inputs[rows] @ at)).mean())

    rate = AutoRate(schedule=Schedule("linear", 1.0, total_steps=3_000))
    everything, begin, worst = np.arange(64), loss(weights, np.arange(64)), 0.0
    for step in range(3_000):
        rows, direction = draw.choice(64, 4, replace=False), draw.standard_normal(20)
        slope = (loss(weights + 1e-4 * direction, rows) - loss(weights - 1e-4 * direction, rows)) / 2e-4
        p = np.exp(-np.logaddexp(0.0, -inputs[rows] @ weights))
        bend = float((p * (1 - p) * (inputs[rows] @ direction) ** 2).mean())
        weights = weights - rate.rate(step, one(slope, bend)) * slope * direction
        worst = max(worst, loss(weights, everything))
    assert worst < 20 * begin
    assert loss(weights, everything) < begin


def test_auto_rate_follows_its_schedule():
    rate = AutoRate(kappa=0.03, schedule=Schedule("linear", 1.0, total_steps=1_000))
    for step in range(500):
        last = rate.rate(step, one(1.0, 100.0))
    assert last == pytest.approx(0.03 / 100.0 * 501 / 1_000, rel=1e-9)


def test_auto_rate_restores_bitwise():
    values = np.random.default_rng(0).standard_normal((60, 2)) * 50
    rate = AutoRate()
    for g, c in values[:30]:
        feed(rate, c, g)
    resumed = AutoRate()
    resumed.load_state_dict(rate.state_dict())
    assert [feed(rate, c, g) for g, c in values[30:]] == [feed(resumed, c, g) for g, c in values[30:]]


def test_auto_rate_takes_no_step_before_the_first_curvature():
    rate = AutoRate()
    assert feed(rate, None) == 0.0
    feed(rate, 5.0)
    assert feed(rate, None) > 0.0


@pytest.mark.parametrize("option", ["kappa", "ceiling", "ramp", "guard"])
def test_impossible_settings_of_the_auto_rate_are_errors(option):
    with pytest.raises(UserError, match=f"lr auto: {option} must be a positive number"):
        AutoRate(**{option: 0})


def test_a_state_of_another_step_size_is_an_error():
    with pytest.raises(UserError, match="step size: saved state has"):
        FixedRate(Schedule()).load_state_dict(AutoRate().state_dict())


def test_step_size_makes_what_the_flag_says():
    schedule = Schedule("linear", 1.0, total_steps=4)
    auto = step_size("auto", schedule, measures_curvature=True)
    assert isinstance(auto, AutoRate)
    assert auto.ceiling is None
    published = step_size("auto", schedule, measures_curvature=True, predicts=False)
    assert (published.kappa, published.ramp, published.ceiling) == (0.03, 20, 1e-2)
    assert step_size(0.5, schedule, measures_curvature=False).rate(2, one(1.0, None)) == 0.25


def test_auto_with_an_estimator_without_curvature_is_an_error():
    with pytest.raises(
        UserError, match="--lr auto needs the curvature: give --lr a number, or use --estimator hizoo"
    ):
        step_size("auto", Schedule(), measures_curvature=False)


@pytest.mark.parametrize("lr", [0.0, -1.0, math.nan, "fast", True])
def test_impossible_learning_rates_are_errors(lr):
    with pytest.raises(UserError, match="--lr must be auto or a positive number"):
        step_size(lr, Schedule(), measures_curvature=True)
