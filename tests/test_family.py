"""The family's estimators, in a real step, against float64 references from the papers, step by step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hizoo_lite.config import TrainConfig
from hizoo_lite.errors import UserError
from hizoo_lite.estimators import FZOO, GRZO, HiZOO, KerZOO, MeZO
from hizoo_lite.estimators.kerzoo import kernel
from hizoo_lite.registry import ESTIMATORS
from hizoo_lite.run import fit
from hizoo_lite.train import journal
from tests import family
from tests.run_fixtures import short_run

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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"estimator": "mezo", "directions": 200}, "directions: got 200, each a pair; allowed: up to 127"),
        ({"estimator": "kerzoo", "directions": 128}, "directions: got 128, each a pair; allowed: up to 127"),
        ({"estimator": "grzo", "groups": 200}, "groups: got 200, allowed: a whole number of 2 or more and"),
        ({"estimator": "grzo", "groups": 5, "batch_size": 4}, "groups: got 5, but batch_size is 4"),
        ({"estimator": "grzo", "batch_size": "many"}, "batch_size: got 'many', allowed: a whole number"),
        ({"estimator": "fzoo", "space": "dense"}, "estimator: got 'fzoo', but space dense trains weights"),
        ({"estimator": "grzo", "space": "small"}, "allowed: hizoo, mezo, kerzoo, dp"),
        ({"estimator": "mezo", "dp_epsilon": 1.0}, "dp_epsilon: got 1.0, but estimator is mezo"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_is_loaded(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        TrainConfig(model="m", task="sst2", **{"lr": 1e-3, **given})


def test_settings_of_other_methods_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"estimator": "mezo", "lr": 1e-3, "groups": 3, "momentum": 0.5, "steps": 1}
    fit(TrainConfig(**short_run(tmp_path, **settings)))
    assert "settings of other methods, and not used: --groups, --momentum" in caplog.text


def test_losses_of_groups_are_the_batchs(tmp_path: Path) -> None:
    """At the same point, whatever the directions: to first order in mu."""
    found = []
    for estimator in ("grzo", "mezo"):
        settings = {"estimator": estimator, "lr": 1e-3, "steps": 1, "batch_size": 6, "head": "none"}
        groups = {"groups": 3} if estimator == "grzo" else {}
        run = fit(TrainConfig(**short_run(tmp_path / estimator, **settings, **groups)))
        [record] = journal.read(run.folder / "journal.bin")
        found.append(np.mean(record.losses))
    assert found[0] == pytest.approx(found[1], rel=1e-2)
