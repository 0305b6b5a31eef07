"""The family's estimators, in a real step, against float64 references from the papers, step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hizoo_lite.errors import UserError
from hizoo_lite.estimators import FZOO, GRZO, HiZOO, KerZOO, MeZO
from hizoo_lite.estimators.kerzoo import kernel
from hizoo_lite.registry import ESTIMATORS
from tests import family

#: Noise and the factor of an update are float32: 6e-8 of each move, a few moves.
CLOSE = 1e-6
MADE = {
    "hizoo": HiZOO(curvature_from="losses"),
    "hizoo, 3": HiZOO(directions=3),
    "mezo": MeZO(),
    "mezo, 3": MeZO(3),
    "kerzoo": KerZOO(),
    "kerzoo, 3": KerZOO(3),
    "fzoo": FZOO(),
    "fzoo, 2": FZOO(2),
    "grzo": GRZO(3),
}


@pytest.mark.parametrize("name", MADE)
def test_moves_are_the_papers(name: str) -> None:
    assert family.difference(MADE[name]) < CLOSE


def test_grzo_stands_still_where_all_groups_are_alike() -> None:
    alike = GRZO(2).estimate(0, np.array([1.5, 1.0, 1.5, 1.0]), np.zeros(2), family.MU)
    assert alike.coefficients == (0.0, 0.0)
    with pytest.raises(UserError, match="estimator grzo: groups must be a whole number >= 2, got 1"):
        GRZO(1)


def test_every_estimator_has_a_reference() -> None:
    open_ones = {name for name, member in ESTIMATORS.items() if not member.secret}  # of dp: test_dp.py
    assert set(family.REFERENCES) == open_ones


def test_kerzoos_kernel_keeps_the_slope_and_drops_the_third_derivative() -> None:
    r, weights = np.polynomial.legendre.leggauss(16)  # exact for these polynomials; the density is 1/2
    values = np.array([kernel(float(value)) for value in r])
    assert np.sum(weights / 2 * r * values) == pytest.approx(1.0, abs=1e-12)
    assert np.sum(weights / 2 * r**3 * values) == pytest.approx(0.0, abs=1e-12)


def test_fzoo_stands_still_where_all_losses_are_alike() -> None:
    assert FZOO(2).estimate(0, np.ones(3), np.zeros(2), family.MU).coefficients == (0.0, 0.0)
    nan = FZOO(2).estimate(0, np.array([1.0, np.nan, 1.0]), np.zeros(2), family.MU)
    assert np.isnan(nan.coefficients).any()


@pytest.mark.parametrize(("member", "least"), [(MeZO, 1), (KerZOO, 1), (FZOO, 2)])
def test_too_few_directions_are_an_error(member: Any, least: int) -> None:
    with pytest.raises(UserError, match=f"estimator {member.name}: directions must be .* >= {least}, got"):
        member(directions=least - 1)
