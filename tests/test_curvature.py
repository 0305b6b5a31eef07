"""Every curvature: common claims in one table, formulas against plain references, recovery of a known one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import trajectories
from torch import Tensor

from hizoo_lite.base import Curvature, Estimator
from hizoo_lite.curvature import CURVATURES, Diagonal, Factored, Grouped, get
from hizoo_lite.curvature.grouped import MOST_ROW_GROUPS
from hizoo_lite.errors import UserError
from hizoo_lite.estimators import HiZOO, MeZO
from hizoo_lite.tensors import TorchArrays, add_padded
from tests import reference

SHAPES = {
    "a": torch.Size([3, 4]),
    "b": torch.Size([5]),
    "c": torch.Size([2, 2, 3]),
    "d": torch.Size([]),
    "e": torch.Size([1, 1]),
}
MEMBERS: dict[str, Callable[[], Curvature]] = {
    "none": CURVATURES["none"],
    "diagonal paper": Diagonal,
    "diagonal reference": lambda: Diagonal("reference"),
    "grouped tensor": Grouped,
    "grouped row": lambda: Grouped("row"),
    "factored": Factored,
}
ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "hizoo": HiZOO,
    "hizoo from losses": lambda: HiZOO(curvature_from="losses"),
    "hizoo from losses every 3": lambda: HiZOO(3, "losses"),
    "mezo": MeZO,
}
every_member = pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS)
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
#: float32 state against a float64 reference: a few roundings of 6e-8 a step, over the steps of a test.
FLOAT32 = 1e-5


def draw(step: int, shapes: dict[str, torch.Size] = SHAPES) -> dict[str, Tensor]:
    """z of a step by name, float32."""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def started(member: Callable[[], Curvature], shapes: dict[str, torch.Size] = SHAPES) -> Curvature:
    """A member, laid out for `shapes`."""
    curvature = member()
    curvature.start(shapes, TorchArrays())
    return curvature


def scales(curvature: Curvature, shapes: dict[str, torch.Size] = SHAPES) -> dict[str, Tensor]:
    """Sigma^(1/2) of every parameter, expanded."""
    return {name: curvature.scale(name).expand(shape) for name, shape in shapes.items()}


def descend(curvature: Curvature, estimator: Estimator, point: dict[str, Tensor], steps: range) -> None:
    """Steps on a quadratic in place; parameter number i has curvature 10^i / 10."""
    for step in steps:
        z = draw(step)
        d = {name: curvature.scale(name) * z[name] for name in z}
        losses = [
            sum(
                float(10.0**i / 20 * (point[name] + offset * 1e-3 * d[name]).double().square().sum())
                for i, name in enumerate(z)
            )
            for _, offset in estimator.points(step)
        ]
        bend = sum(float(10.0**i / 10 * d[name].double().square().sum()) for i, name in enumerate(z))
        estimate = estimator.estimate(step, np.array(losses), np.array([2e-3**2 * bend]), 1e-3)
        if estimate.curvature is not None:
            take_in(curvature, estimate.curvature, z, 0.05)
        for name in z:
            point[name] -= 1e-6 * estimate.projected_grad * curvature.update_scale(name) * z[name]


def take_in(curvature: Curvature, c: float, z: dict[str, Tensor], smoothing: float) -> None:
    """A step's z, whole, and its curvature."""
    for name, value in z.items():
        curvature.see(name, value)
    curvature.observe(c, smoothing)


def ones() -> dict[str, Tensor]:
    """A start for `descend`."""
    return {name: torch.ones(shape) for name, shape in SHAPES.items()}


# ------------------------------------------------------------------------------------- common claims


@every_estimator
@every_member
def test_steps_are_finite_and_deterministic(member, estimator):
    first, second = ones(), ones()
    descend(started(member), estimator(), first, range(40))
    descend(started(member), estimator(), second, range(40))
    for name in SHAPES:
        assert torch.isfinite(first[name]).all()
        assert torch.equal(first[name], second[name])


@every_estimator
@every_member
def test_a_restored_state_continues_bitwise(member, estimator):
    curvature, point = started(member), ones()
    descend(curvature, estimator(), point, range(25))
    resumed, copy = started(member), {name: value.clone() for name, value in point.items()}
    resumed.load_state_dict({name: value.clone() for name, value in curvature.state_dict().items()})
    descend(curvature, estimator(), point, range(25, 50))
    descend(resumed, estimator(), copy, range(25, 50))
    for name in SHAPES:
        assert torch.equal(point[name], copy[name])
        assert torch.equal(curvature.scale(name), resumed.scale(name))


def test_a_second_direction_of_a_step_counts_under_the_sigma_it_was_drawn_with():
    curvature, smoothing = started(Diagonal), 0.3
    descend(curvature, HiZOO(), ones(), range(20))
    h = {name: value.clone() for name, value in curvature.state_dict().items()}
    first, second = draw(100), draw(101)
    for name in SHAPES:
        curvature.scale(name)
    take_in(curvature, 2.0, first, smoothing)
    take_in(curvature, 3.0, second, smoothing)
    for name, old in h.items():
        once = (1 - smoothing) * old + smoothing * 2.0 / 2 * old * (first[name] ** 2 - 1).abs()
        twice = (1 - smoothing) * once + smoothing * 3.0 / 2 * old * (second[name] ** 2 - 1).abs()
        torch.testing.assert_close(curvature.state_dict()[name], twice, rtol=1e-5, atol=1e-3)  # the floor


def test_grouped_measures_all_directions_of_a_step_by_the_sigma_they_were_drawn_with(monkeypatch):
    curvature = started(Grouped)
    descend(curvature, HiZOO(), ones(), range(60))
    sigma, seen = {name: float(curvature.scale(name)) ** 2 for name in SHAPES}, []
    through = Grouped._filter
    monkeypatch.setattr(Grouped, "_filter", lambda self, c, x, w: (seen.append(x), through(self, c, x, w)))
    first, second = draw(100), draw(101)
    take_in(curvature, 2.0, first, 0.5)
    take_in(curvature, 3.0, second, 0.5)
    assert len({*sigma.values()}) > 1  # it has learnt something, which the first observation changes
    assert {name: float(curvature.scale(name)) ** 2 for name in SHAPES} != sigma
    for lengths, z in zip(seen, (first, second), strict=True):
        wanted = [sigma[name] * float(z[name].double().square().sum()) for name in SHAPES]
        assert lengths.tolist() == pytest.approx(wanted, rel=1e-6)


@every_member
def test_a_saved_state_does_not_change_with_later_observations(member):
    curvature = started(member)
    descend(curvature, HiZOO(), ones(), range(20))
    state = curvature.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    descend(curvature, HiZOO(), ones(), range(20, 30))
    assert all(torch.equal(state[name], before[name]) for name in before)


@every_member
def test_scale_is_exactly_one_at_the_start_and_broadcasts(member):
    for name, scale in scales(started(member)).items():
        assert scale.dtype == torch.float32
        assert torch.equal(scale, torch.ones(SHAPES[name]))


@every_member
def test_state_is_float32_or_float64(member):
    assert {v.dtype for v in started(member).state_dict().values()} <= {torch.float32, torch.float64}


@every_member
@pytest.mark.parametrize("curvature", [0.0, -5.0, 1e-200, 1e99, -1e99])
def test_extreme_curvatures_leave_a_finite_positive_scale(member, curvature):
    object_under_test = started(member)
    for step in range(300):
        take_in(object_under_test, curvature, draw(step), 0.1)
    for scale in scales(object_under_test).values():
        assert ((scale > 0) & torch.isfinite(scale)).all()


@every_member
def test_a_jump_of_the_curvature_leaves_a_finite_positive_scale(member):
    curvature = started(member)
    for step in range(200):
        size = (1.0, 1e30, 0.0, -1e10)[step // 10 % 4]
        take_in(curvature, size, draw(step), 0.1)
        for scale in scales(curvature).values():
            assert ((scale > 0) & torch.isfinite(scale)).all()


@every_member
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e101])
def test_a_curvature_that_is_not_finite_is_ignored(member, bad):
    curvature = started(member)
    descend(curvature, HiZOO(), ones(), range(20))
    before = {name: value.clone() for name, value in curvature.state_dict().items()}
    take_in(curvature, bad, draw(99), 0.1)
    assert all(torch.equal(value, before[name]) for name, value in curvature.state_dict().items())


@every_member
@pytest.mark.parametrize("smoothing", [0.0, -0.1, 1.5, math.nan])
def test_impossible_smoothing_is_an_error(member, smoothing):
    with pytest.raises(UserError, match=r"smoothing must be in \(0, 1\]"):
        take_in(started(member), 1.0, draw(0), smoothing)


@pytest.mark.parametrize("member", [m for n, m in MEMBERS.items() if n != "diagonal reference"])
def test_update_scale_is_the_scale_that_perturbed(member):
    curvature = started(member)
    descend(curvature, HiZOO(), ones(), range(20))
    perturbed = {name: scale.clone() for name, scale in scales(curvature).items()}
    take_in(curvature, 100.0, draw(20), 0.5)
    assert not curvature.updates_with_new_scale
    assert all(torch.equal(curvature.update_scale(n).expand(SHAPES[n]), perturbed[n]) for n in SHAPES)


@every_member
def test_a_state_of_another_layout_is_an_error(member):
    state = started(member).state_dict() | {"other": torch.zeros(1)}
    with pytest.raises(UserError, match="the saved state and this run differ in other"):
        started(member).load_state_dict(state)


def test_a_state_of_another_shape_is_an_error():
    state = started(Grouped).state_dict()
    with pytest.raises(UserError, match=r"saved mean is \(5,\) torch.float64, this run needs \(1,\)"):
        started(Grouped, {"a": torch.Size([2])}).load_state_dict(state)


def test_none_answers_for_its_own_names_only():
    with pytest.raises(KeyError, match="stranger"):
        started(CURVATURES["none"]).scale("stranger")


def test_unknown_curvature_is_an_error():
    with pytest.raises(UserError, match="unknown name 'full', allowed are diagonal, factored, grouped, none"):
        get("full")


def test_unknown_option_is_an_error():
    with pytest.raises(UserError, match=r"--curvature factored: .*clip"):
        get("factored", clip=2.0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("diagonal", {"mode": "new"}, "mode must be paper or reference, got 'new'"),
        ("diagonal", {"floor": 0.0}, "0 < floor <= 1 <= ceiling wanted"),
        ("factored", {"ceiling": 0.5}, "0 < floor <= 1 <= ceiling wanted"),
        ("grouped", {"per": "column"}, "per must be tensor or row, got 'column'"),
        ("grouped", {"clip": 1.0}, "clip must be a number above 1"),
        ("grouped", {"prior": 0.0}, "prior must be a positive number"),
        ("grouped", {"drift": 2.0}, r"drift must be in \[0, 1\]"),
    ],
)
def test_impossible_options_are_errors(name, options, message):
    with pytest.raises(UserError, match=message):
        get(name, **options)


# ---------------------------------------------------------------------------------- against references


@pytest.mark.parametrize(
    ("mode", "rule"), [("paper", reference.diagonal_paper), ("reference", reference.diagonal_code)]
)
def test_diagonal_equals_the_float64_formula(mode, rule):
    shapes = {"w": torch.Size([3, 4])}
    curvature, h = started(lambda: Diagonal(mode), shapes), np.ones((3, 4))
    for step, c in enumerate([3.0, -20.0, 0.5, 7.0, 100.0] * 4):
        z = draw(step, shapes)
        take_in(curvature, c, z, 0.02)
        h = rule(h, z["w"].double().numpy(), c, 0.02)
        np.testing.assert_allclose(curvature.scale("w").numpy(), 1 / np.sqrt(h), rtol=FLOAT32)


def test_diagonal_reference_mode_updates_with_the_new_curvature():
    shapes = {"w": torch.Size([6])}
    curvature, z = started(lambda: Diagonal("reference"), shapes), draw(0, shapes)
    old = curvature.scale("w")
    take_in(curvature, 50.0, z, 0.5)
    new = 1 / np.sqrt(reference.diagonal_code(np.ones(6), z["w"].double().numpy(), 50.0, 0.5))
    assert curvature.updates_with_new_scale
    assert torch.equal(old, torch.ones(6))
    np.testing.assert_allclose(curvature.update_scale("w").numpy(), new, rtol=FLOAT32)


def test_diagonal_moves_at_the_published_smoothing():
    curvature = started(Diagonal)
    take_in(curvature, 100.0, draw(0), 1e-6)
    assert (scales(curvature)["a"] != 1.0).any()


def test_factored_equals_the_float64_formula():
    shapes = {"w": torch.Size([3, 4]), "v": torch.Size([5])}
    curvature = started(Factored, shapes)
    rows, columns, full = np.ones(3), np.ones(4), np.ones(5)
    for step, c in enumerate([3.0, -20.0, 0.5, 7.0, 100.0] * 4):
        z = draw(step, shapes)
        take_in(curvature, c, z, 0.02)
        rows, columns = reference.factored_step(rows, columns, z["w"].double().numpy(), c, 0.02)
        full = reference.diagonal_paper(full, z["v"].double().numpy(), c, 0.02)
        inverse = reference.factored_inverse(rows, columns)
        np.testing.assert_allclose(curvature.scale("w").numpy(), 1 / np.sqrt(inverse), rtol=FLOAT32)
        np.testing.assert_allclose(curvature.scale("v").numpy(), 1 / np.sqrt(full), rtol=FLOAT32)


def test_factored_keeps_rows_plus_columns():
    state = started(Factored, {"w": torch.Size([30, 40])}).state_dict()
    assert sum(value.numel() for value in state.values()) == 70


def test_grouped_filter_step_equals_bayes_rule():
    shapes = {f"g{i}": torch.Size([50]) for i in range(4)}
    curvature, truth = started(lambda: Grouped(drift=0.0), shapes), np.array([1.0, 2.0, 5.0, 20.0])
    generator = np.random.default_rng(0)
    checked = 0
    for step in range(60):
        z = draw(step, shapes)
        before = curvature.state_dict()
        running, _, noise, _ = before["moments"].tolist()
        x = np.array(
            [float((curvature.scale(name).double() * z[name].double()).square().sum()) for name in z]
        )
        predicted = float(before["mean"].numpy() @ x)
        c = float(truth @ x) * (1 + 0.1 * float(generator.standard_normal()))
        take_in(curvature, c, z, 1e-9)  # a vanishing smoothing leaves the filter alone
        spread = noise + x @ before["covariance"].numpy() @ x
        if not running or noise <= 1e-3 * spread or (c - predicted) ** 2 > 8 * spread:
            continue  # warming up; or not covered by Bayes' rule with a known noise: none, or an outlier
        mean, covariance = reference.kalman_step(
            before["mean"].numpy(), before["covariance"].numpy(), x, c, noise
        )
        # sigma comes back through a float32 scale: 1e-7 in x, magnified by the condition of the covariance.
        np.testing.assert_allclose(curvature.state_dict()["mean"].numpy(), mean, rtol=1e-4, atol=1e-6)
        scale = np.abs(covariance).max()
        np.testing.assert_allclose(
            curvature.state_dict()["covariance"].numpy() / scale, covariance / scale, atol=1e-4
        )
        checked += 1
    assert checked >= 20


# --------------------------------------------------------------------------------------------- grouped


def observe_quadratic(
    curvature: Curvature, truth: Tensor, shapes: dict[str, torch.Size], steps: int, noise: float = 0.0
) -> None:
    """Observations of a quadratic whose Hessian is truth[i] times the identity on tensor i."""
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        z = draw(step, shapes)
        squares = torch.stack([(curvature.scale(name) * z[name]).double().square().sum() for name in z])
        error = 1 + noise * float(torch.randn((), generator=generator))
        take_in(curvature, float(truth @ squares) * error, z, 0.01)


def unequal(groups: int, size: int) -> tuple[Tensor, dict[str, torch.Size]]:
    """Curvatures from 1 to 1000 in a shuffled order, and tensors to have them."""
    order = torch.randperm(groups, generator=torch.Generator().manual_seed(5))
    truth = torch.logspace(0, 3, groups, dtype=torch.float64)[order]
    return truth, {f"g{i:02d}": torch.Size([size // groups]) for i in range(groups)}


@pytest.mark.parametrize("size", [2_000, 20_000])
def test_grouped_recovers_a_known_curvature(size):
    truth, shapes = unequal(20, size)
    curvature = started(Grouped, shapes)
    observe_quadratic(curvature, truth, shapes, 320)
    learnt = torch.stack([-2 * curvature.scale(name).double().log() for name in shapes])
    assert float(torch.corrcoef(torch.stack([truth.log(), learnt]))[0, 1]) >= 0.95
    means = torch.cat(list(curvature.curvatures().values()))
    large = truth > truth.mean() / 10
    # evidence is forgotten at 0.3 * 0.01 a step, which leaves that error on 20 groups at any time
    assert float((means / truth - 1).abs()[large].median()) < 0.25


def test_grouped_sees_a_full_hessian_through_its_diagonal():
    generator = torch.Generator().manual_seed(1)
    shapes = {f"g{i}": torch.Size([40]) for i in range(4)}
    truth = torch.tensor([1.0, 30.0, 3.0, 10.0], dtype=torch.float64)
    factor = torch.randn(160, 640, generator=generator, dtype=torch.float64) / 640**0.5
    hessian = factor @ factor.T * truth.sqrt().repeat_interleave(40).outer(truth.sqrt().repeat_interleave(40))
    curvature = started(Grouped, shapes)
    for step in range(1_500):
        z = draw(step, shapes)
        d = torch.cat([curvature.scale(name) * z[name] for name in z]).double()
        take_in(curvature, float(d @ hessian @ d), z, 0.01)
    learnt = torch.stack([-2 * curvature.scale(name).double().log() for name in shapes])
    assert float(torch.corrcoef(torch.stack([truth.log(), learnt]))[0, 1]) >= 0.95


def test_grouped_keeps_the_mean_curvature_along_a_step():
    truth, shapes = unequal(20, 2_000)
    curvature = started(Grouped, shapes)
    observe_quadratic(curvature, truth, shapes, 320)
    sigma = torch.stack([curvature.scale(name).double().square() for name in shapes])
    # sigma is made from the estimate plus its uncertainty, hence not exact
    assert float(truth @ sigma) == pytest.approx(float(truth.sum()), rel=0.25)


def test_grouped_is_the_same_for_a_scaled_loss():
    truth, shapes = unequal(5, 500)
    plain, scaled = started(Grouped, shapes), started(Grouped, shapes)
    observe_quadratic(plain, truth, shapes, 100)
    observe_quadratic(scaled, truth * 2.0**40, shapes, 100)
    assert all(torch.equal(plain.scale(name), scaled.scale(name)) for name in shapes)


def test_grouped_stays_near_the_identity_where_the_curvature_is_noise():
    _, shapes = unequal(20, 2_000)
    curvature = started(Grouped, shapes)
    observe_quadratic(curvature, torch.ones(20, dtype=torch.float64), shapes, 1_000, noise=2.0)
    sigma = torch.stack([curvature.scale(name).square() for name in shapes])
    # evidence is 2 / sqrt(2 / 2000) = 60 times smaller than the noise; without a prior sigma would be random
    assert float(sigma.min()) > 1 / 4
    assert float(sigma.max()) < 4


def test_grouped_gives_a_flat_group_no_more_than_the_clip():
    shapes = {"curved": torch.Size([100]), "flat": torch.Size([100])}
    curvature = started(lambda: Grouped(clip=10.0), shapes)
    observe_quadratic(curvature, torch.tensor([2.0, 0.0], dtype=torch.float64), shapes, 400)
    sigma = {name: float(curvature.scale(name).square()) for name in shapes}
    assert sigma["flat"] > 4 * sigma["curved"]
    assert sigma["flat"] <= 11.0  # clip, times a mean of the clipped ratios of at most 1 + 1/clip


@pytest.mark.parametrize("rise", [1, 500])
def test_grouped_follows_a_group_that_starts_to_curve(rise):
    shapes = {"first": torch.Size([100]), "second": torch.Size([100])}
    curvature = started(Grouped, shapes)
    for step in range(400 + rise + 300):
        z = draw(step, shapes)
        now = {"first": 2.0, "second": 8.0 * min(max(step - 400, 0) / rise, 1.0)}
        c = sum(now[name] * float((curvature.scale(name) * z[name]).double().square().sum()) for name in z)
        take_in(curvature, c, z, 0.01)
        if step == 399:
            assert abs(float(curvature.curvatures()["second"])) < 0.02
    # what came as a surprise counts as noise until 1 / smoothing = 100 steps have forgotten it
    assert float(curvature.curvatures()["second"]) == pytest.approx(8.0, rel=0.2)
    assert float(curvature.curvatures()["first"]) == pytest.approx(2.0, rel=0.3)


def test_grouped_with_a_single_group_is_the_identity():
    shapes = {"only": torch.Size([50])}
    curvature = started(Grouped, shapes)
    observe_quadratic(curvature, torch.tensor([7.0], dtype=torch.float64), shapes, 200)
    assert float(curvature.scale("only")) == 1.0


def test_grouped_rows_share_groups_where_there_are_many():
    shapes = {"tall": torch.Size([3_000, 2]), "flat": torch.Size([2, 3_000])}
    curvature = started(lambda: Grouped("row"), shapes)
    for step in range(5):
        take_in(curvature, 1.0 + step, draw(step, shapes), 0.1)
    assert len(curvature.state_dict()["mean"]) <= MOST_ROW_GROUPS
    assert curvature.scale("tall").shape == (3_000, 1)
    assert curvature.scale("flat").shape == (2, 1)


@pytest.mark.parametrize("bundle", [1, 4, 100])
def test_grouped_adds_by_group_on_a_gpu_what_it_adds_on_a_cpu(bundle):
    norms = torch.rand(50, dtype=torch.float64)
    found = []
    for add in (TorchArrays().add_by_group, add_padded):
        sums = torch.zeros(-(-50 // bundle), dtype=torch.float64)
        for first in range(0, 50, 7):
            add(norms[first : first + 7], first, bundle, sums)
        found.append(sums)
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_grouped_after_load_uses_the_loaded_sigma():
    truth, shapes = unequal(5, 500)
    curvature, loaded = started(Grouped, shapes), started(Grouped, shapes)
    observe_quadratic(curvature, truth, shapes, 100)
    loaded.scale("g00")
    loaded.load_state_dict(curvature.state_dict())
    assert torch.equal(loaded.update_scale("g00"), curvature.scale("g00"))


# --------------------------------------------------------------------------------------- trajectories


@pytest.mark.parametrize(("number", "budget"), [(0, 4_000), pytest.param(1, 15_000, marks=pytest.mark.grid)])
def test_hizoo_needs_fewer_forwards_than_mezo_where_curvatures_differ(number, budget):
    function, seeds = trajectories.FUNCTIONS[number], range(3)
    rates = [factor / function.largest_curvature for factor in (0.25, 0.5, 1.0, 2.0)]
    mezo = trajectories.best(function, [(lr, trajectories.mezo(lr)) for lr in rates], seeds, budget)
    hizoo = trajectories.best(function, [(k, trajectories.hizoo(k)) for k in (0.1, 0.3)], seeds, budget)
    assert hizoo[1] < 0.8 * mezo[1]
    assert hizoo[2] == 0


@pytest.mark.parametrize("seed", [0, *(pytest.param(one, marks=pytest.mark.grid) for one in range(1, 5))])
def test_hizoo_does_not_break_where_curvature_is_zero(seed):
    function = trajectories.FUNCTIONS[2]
    run = trajectories.descend(function, trajectories.hizoo(), seed, 6_000, go_on=True)
    assert not run.broke
    assert np.hypot(*run.points[-1]) < 0.1 * math.dist(function.start, function.minimum)


@pytest.mark.grid
def test_trajectories_tool_writes_plot_and_figures(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the tool's plot needs matplotlib")
    plot, figures = tmp_path / "plot.png", tmp_path / "figures.json"
    trajectories.main(["--quick", "--out", str(plot), "--json", str(figures)])
    assert plot.stat().st_size > 10_000
    assert len(json.loads(figures.read_text())["trajectories"]) == 3
    assert "10000x^2 + y^2" in capsys.readouterr().out
