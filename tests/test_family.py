"""The family's estimators, in a real step, against float64 references from the papers, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hizoo_lite.arrays import NumpyArrays
from hizoo_lite.batch import Losses
from hizoo_lite.branches import Branches
from hizoo_lite.curvature import NoCurvature
from hizoo_lite.errors import UserError
from hizoo_lite.estimators import FZOO, KerZOO, MeZO
from hizoo_lite.estimators.kerzoo import kernel
from hizoo_lite.noise import drawn_along
from hizoo_lite.optimizers.step_size import FixedRate, Schedule
from hizoo_lite.train.step import Stepper
from tests import family

SEED, MU, EXAMPLES, STEPS = 3, 1e-2, 6, 5
SHAPES = {"a": (2, 3), "b": (4,)}
COUNT = 10
#: Noise and the factor of an update are float32: 6e-8 of each move, a few moves.
CLOSE = {"rtol": 1e-6, "atol": 1e-8}


class Analytic:
    """What a step asks of a model, of a smooth function: losses of every example at every point."""

    def __init__(self, parameters: dict[str, np.ndarray]) -> None:
        self.parameters = parameters
        self.weights = np.random.default_rng(0).normal(size=(EXAMPLES, COUNT))

    def per_example(self, theta: np.ndarray) -> np.ndarray:
        """(examples,)."""
        return np.log1p(np.exp(self.weights @ theta)) + 0.1 * (self.weights @ theta) ** 2

    def losses(
        self, batch: Any, branches: Branches, mu: float, directions: Mapping[str, np.ndarray]
    ) -> Losses:
        """See `BranchLosses.losses`."""
        theta = flat(self.parameters)
        points = [
            theta + offset * mu * flat({name: d[k] for name, d in directions.items()})
            for k, offset in branches.points
        ]
        per_example = np.stack([self.per_example(point) for point in points])
        return Losses(per_example, None, np.zeros((branches.directions, EXAMPLES)))


def flat(values: Mapping[str, np.ndarray]) -> np.ndarray:
    """All values in one float64 vector."""
    return np.concatenate([np.asarray(values[name], np.float64).ravel() for name in SHAPES])


def stepper(estimator: Any, lr: float) -> Stepper:
    """A step over `Analytic`; the parameters are float64."""
    draw = np.random.default_rng(1)
    parameters = {name: draw.normal(size=shape) for name, shape in SHAPES.items()}
    space: Any = SimpleNamespace(name="analytic", parameters=parameters, exact={}, frozen={}, weights=None)
    rate = FixedRate(Schedule("constant", lr))
    options: Any = {"seed": SEED, "mu": MU, "smoothing": Schedule()}
    return Stepper(Analytic(parameters), NumpyArrays(), space, estimator, NoCurvature(), rate, **options)


def noise(step: int, directions: int) -> np.ndarray:
    """z of a step as the package draws it, (directions, COUNT)."""
    drawn = {name: drawn_along(SEED, step, name, shape, directions) for name, shape in SHAPES.items()}
    return np.stack([flat({name: z[k] for name, z in drawn.items()}) for k in range(directions)])


@pytest.mark.parametrize("directions", [1, 3])
def test_mezo_is_the_papers(directions: int) -> None:
    follow(MeZO(directions), directions, 1e-2, family.mezo, lambda step: step)


@pytest.mark.parametrize("directions", [1, 3])
def test_kerzoo_is_the_papers(directions: int) -> None:
    estimator = KerZOO(directions)
    follow(estimator, directions, 1e-2, family.kerzoo, lambda step: np.array(estimator.radii(step)))


@pytest.mark.parametrize("directions", [2, 8])
def test_fzoo_is_the_papers(directions: int) -> None:
    follow(FZOO(directions), directions, 1e-2, family.fzoo, lambda step: step, signs=True)


def follow(
    estimator: Any,
    directions: int,
    lr: float,
    reference: Callable[..., np.ndarray],
    extra: Callable[[int], Any],
    *,
    signs: bool = False,
) -> None:
    """Step with ours and with the reference, from where the reference is; all moves are alike."""
    ours = stepper(estimator, lr)
    model: Any = ours.traversal
    theta = flat(ours.space.parameters)
    batch: Any = SimpleNamespace(examples=EXAMPLES, attention_mask=np.ones(1))
    for step in range(STEPS):
        z = noise(step, directions)
        z = np.where(z < 0, -1.0, 1.0) if signs else z
        loss = lambda at: float(np.mean(model.per_example(at)))
        expected = reference(theta, loss, z, MU, lr, extra(step))
        record = ours.step(step, batch)
        assert len(record.coefficients) == directions
        moved = flat(ours.space.parameters)
        assert np.abs(moved - theta).max() > 1e-5
        np.testing.assert_allclose(moved - theta, expected - theta, **CLOSE)
        theta = moved
    ours.close()


def test_kerzoos_kernel_keeps_the_slope_and_drops_the_third_derivative() -> None:
    r, weights = np.polynomial.legendre.leggauss(16)  # exact for these polynomials; the density is 1/2
    values = np.array([kernel(float(value)) for value in r])
    assert np.sum(weights / 2 * r * values) == pytest.approx(1.0, abs=1e-12)
    assert np.sum(weights / 2 * r**3 * values) == pytest.approx(0.0, abs=1e-12)


def test_fzoo_stands_still_where_all_losses_are_alike() -> None:
    assert FZOO(2).estimate(0, np.ones(3), np.zeros(2), MU).coefficients == (0.0, 0.0)
    nan = FZOO(2).estimate(0, np.array([1.0, np.nan, 1.0]), np.zeros(2), MU)
    assert np.isnan(nan.coefficients).any()


@pytest.mark.parametrize(("member", "least"), [(MeZO, 1), (KerZOO, 1), (FZOO, 2)])
def test_too_few_directions_are_an_error(member: Any, least: int) -> None:
    with pytest.raises(UserError, match=f"estimator {member.name}: directions must be .* >= {least}, got"):
        member(directions=least - 1)
