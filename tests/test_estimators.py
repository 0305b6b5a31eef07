"""Estimators against plain formulas and against autograd's exact directional derivatives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hizoo_lite.base import Estimator
from hizoo_lite.errors import UserError
from hizoo_lite.estimators import HiZOO, MeZO, get
from hizoo_lite.estimators.hizoo import directional_curvature
from hizoo_lite.tasks.losses import divergence_terms
from hizoo_lite.tensors import TorchArrays
from tests import reference

MU = 1e-3  # the default perturbation scale
#: Required of the scalars of a step, in float32 at the default mu. See `per_example_losses` for how.
AUTOGRAD_TOLERANCE = 1e-3
SEEDS = range(9)
#: Divergences of a step in which they are not looked at.
NO_PAIR = np.zeros(0)


def published(every: int = 1) -> HiZOO:
    """HiZOO with the second difference of losses."""
    return HiZOO(every, curvature_from="losses")


def offsets(estimator: Estimator, step: int = 0) -> tuple[float, ...]:
    """Of a step's points, in order."""
    return tuple(point.offset for point in estimator.points(step))


def test_hizoo_scalars_equal_the_float64_formula():
    losses = [2.5, 2.75, 2.5625]
    estimate = published().estimate(0, np.array(losses), NO_PAIR, MU)
    got = (estimate.projected_grad, estimate.curvature)
    assert got == pytest.approx(reference.hizoo_scalars(losses, MU), rel=1e-12)


def test_mezo_scalar_equals_the_float64_formula():
    estimate = MeZO().estimate(0, np.array([2.75, 2.5625]), NO_PAIR, MU)
    assert estimate.projected_grad == pytest.approx(
        reference.hizoo_scalars([0.0, 2.75, 2.5625], MU)[0], rel=1e-12
    )
    assert estimate.curvature is None


def test_hizoo_without_base_branch_equals_mezo():
    losses = np.array([2.75, 2.5625])
    assert published(every=2).estimate(0, losses, NO_PAIR, MU) == MeZO().estimate(0, losses, NO_PAIR, MU)


@pytest.mark.parametrize("every", [1, 2, 5])
def test_hizoo_costs_two_forwards_and_one_over_every(every):
    estimator = published(every)
    counts = [len(estimator.points(step)) for step in range(10 * every)]
    assert sum(counts) / len(counts) == 2 + 1 / every
    assert counts[0] == 3


def test_mezo_costs_two_forwards():
    assert {offsets(MeZO(), step) for step in range(5)} == {(1, -1)}


def test_branch_order_is_base_plus_minus():
    assert offsets(published()) == (0, 1, -1)


def test_predictions_cost_two_forwards_and_measure_every_step():
    estimator = HiZOO()
    assert {offsets(estimator, step) for step in range(5)} == {(1, -1)}
    assert all(estimator.measures(step) for step in range(5))


def test_curvature_from_predictions_is_their_divergence_over_the_distance_squared():
    estimate = HiZOO().estimate(0, np.array([2.75, 2.5625]), np.array([3e-6]), MU)
    assert estimate.curvature == pytest.approx(3e-6 / (4 * MU**2), rel=1e-12)
    assert directional_curvature(3e-6, MU) == pytest.approx(3e-6 / MU**2, rel=1e-12)  # of a one-sided point


def test_several_directions_share_one_base():
    estimator = HiZOO(directions=3)
    assert {offsets(estimator, step) for step in range(5)} == {(0, 1, 1, 1)}
    losses, divergences = np.array([2.5, 2.75, 2.5625, 2.25]), np.array([1e-6, 2e-6, 3e-6])
    estimate = estimator.estimate(0, losses, divergences, MU)
    assert estimate.coefficients == pytest.approx((losses[1:] - losses[0]) / MU, rel=1e-12)
    assert estimate.curvatures == pytest.approx(divergences / MU**2, rel=1e-12)
    assert estimate.projected_grad == pytest.approx(math.sqrt(np.mean((losses[1:] - 2.5) ** 2)) / MU)
    assert estimate.curvature == pytest.approx(2e-6 / MU**2)


@pytest.mark.parametrize(
    ("directions", "source", "message"),
    [(0, "predictions", "got 0"), (2.0, "predictions", "got 2.0"), (2, "losses", "points on both sides")],
)
def test_directions_that_cannot_be_are_refused(directions, source, message):
    with pytest.raises(UserError, match=message):
        HiZOO(curvature_from=source, directions=directions)


def test_divergence_equals_both_kullback_leibler_divergences():
    draw = np.random.default_rng(0)
    p, q = (torch.from_numpy(draw.dirichlet(np.ones(5), 7)) for _ in range(2))
    wanted = (p * (p / q).log()).sum(1) + (q * (q / p).log()).sum(1)
    terms = divergence_terms(TorchArrays(), p.log(), q.log())
    assert (terms >= 0).all()
    torch.testing.assert_close(terms.sum(1), wanted, rtol=1e-12, atol=0)


def test_a_one_sided_divergence_is_twice_the_kullback_leibler_one_to_leading_order():
    generator = torch.Generator().manual_seed(0)
    logits, move = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    zero, moved = logits.log_softmax(0), (logits + MU * move).log_softmax(0)
    ours = directional_curvature(float(divergence_terms(TorchArrays(), zero, moved).sum()), MU)
    theirs = 2 * float((zero.exp() * (zero - moved)).sum()) / MU**2
    assert ours == pytest.approx(theirs, rel=1e-2)  # they differ by terms of order mu


def test_an_outcome_that_is_impossible_adds_nothing_to_a_divergence():
    log_p = torch.tensor([0.0, -torch.inf], dtype=torch.float64)
    assert divergence_terms(TorchArrays(), log_p, log_p).tolist() == [0.0, 0.0]


def test_curvature_keeps_differences_that_a_plain_sum_would_round_away():
    base, rise = 1e6, 2.0**-33  # l+ + l- of this size is spaced 2^-32: the rise of one branch falls between
    estimate = published().estimate(0, np.array([base, base + rise, base]), NO_PAIR, 1.0)
    assert estimate.curvature == rise


def test_non_finite_losses_give_non_finite_scalars():
    estimate = published().estimate(0, np.array([1.0, math.nan, 1.0]), NO_PAIR, MU)
    assert math.isnan(estimate.projected_grad)
    assert math.isnan(estimate.curvature)


def test_unknown_estimator_is_an_error():
    with pytest.raises(
        UserError, match="--estimator: unknown name 'adam', allowed are dp, fzoo, grzo, hizoo, kerzoo, mezo"
    ):
        get("adam")


def test_unknown_option_is_an_error():
    with pytest.raises(UserError, match=r"--estimator mezo: MeZO.__init__\(\) got an unexpected"):
        get("mezo", every=2)


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_impossible_refresh_interval_is_an_error(every):
    with pytest.raises(UserError, match="every must be a whole number of steps >= 1"):
        HiZOO(every=every)


def test_predictions_are_not_measured_now_and_then():
    with pytest.raises(UserError, match="every: got 2, but predictions give the curvature at every step"):
        HiZOO(every=2)


def test_an_unknown_source_of_curvature_is_an_error():
    with pytest.raises(UserError, match="curvature_from must be predictions or losses, got 'gradients'"):
        HiZOO(curvature_from="gradients")


@pytest.mark.parametrize("mu", [0.0, -1e-3, math.nan, math.inf])
def test_impossible_mu_is_an_error(mu):
    with pytest.raises(UserError, match="mu must be a positive number"):
        MeZO().estimate(0, np.array([1.0, 2.0]), NO_PAIR, mu)


def test_wrong_number_of_losses_is_an_error():
    with pytest.raises(ValueError, match=r"losses of shape \(2,\) expected, got \(3,\)"):
        MeZO().estimate(0, np.zeros(3), NO_PAIR, MU)
    with pytest.raises(ValueError, match=r"losses of shape \(2,\) or \(3,\) expected, got \(5,\)"):
        published().estimate(0, np.zeros(5), NO_PAIR, MU)


def network(seed: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """Weights of a two-layer classifier, its inputs, and their classes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    weights = [draw(32, 16) / 4, draw(32) / 4, draw(8, 32) / 4]
    return weights, 2 * draw(512, 16), torch.randint(8, (512,), generator=generator)


def per_example_losses(weights: list[Tensor], inputs: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy of each example: the network in its own dtype, the log-softmax in float64.

    A curvature of size c moves the losses by mu^2 c. float32 losses are spaced 1e-7, so at mu = 1e-3 the
    loss of one example knows c to 0.1 only. What is left after float64 losses is the rounding of the
    logits, independent between examples, so that the mean over 512 knows c about 20 times better; and c
    itself is a sum over the network's 800 weights.
    """
    first, bias, second = weights
    logits = torch.tanh(inputs @ first.T + bias) @ second.T
    return torch.nn.functional.cross_entropy(logits.double(), classes, reduction="none")


def step_errors(seed: int) -> tuple[float, float]:
    """Relative errors of projected gradient and curvature of a float32 step, against float64 autograd."""
    weights, inputs, classes = network(seed, torch.float32)
    generator = torch.Generator().manual_seed(seed + 1_000)
    z = [torch.randn(w.shape, generator=generator) for w in weights]
    losses = [
        float(
            per_example_losses(
                [w + sign * MU * d for w, d in zip(weights, z, strict=True)], inputs, classes
            ).mean()
        )
        for sign in offsets(published())
    ]
    estimate = published().estimate(0, np.array(losses), NO_PAIR, MU)

    def along(t: Tensor) -> Tensor:
        point = [w.double() + t * d.double() for w, d in zip(weights, z, strict=True)]
        return per_example_losses(point, inputs.double(), classes).mean()

    zero = torch.zeros((), dtype=torch.float64)
    gradient = float(torch.func.grad(along)(zero))
    curvature = float(torch.func.grad(torch.func.grad(along))(zero))
    return abs(estimate.projected_grad / gradient - 1), abs(estimate.curvature / curvature - 1)


def test_scalars_of_a_float32_step_equal_autograds_directional_derivatives():
    errors = np.array([step_errors(seed) for seed in SEEDS])
    gradient_error, curvature_error = np.median(errors, axis=0)
    assert gradient_error <= AUTOGRAD_TOLERANCE
    assert curvature_error <= AUTOGRAD_TOLERANCE
