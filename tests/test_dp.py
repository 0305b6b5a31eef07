"""Differential privacy: the mechanism against a reference from the papers, its accounting, what is told."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld, rdp

from hizoo_lite import curvature
from hizoo_lite.arrays import NumpyArrays
from hizoo_lite.base import AttachedSpace, BranchLosses
from hizoo_lite.batch import Batch, Losses
from hizoo_lite.branches import EVALUATION, Branches
from hizoo_lite.checkpoints import tensorfile
from hizoo_lite.config import TrainConfig
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import UserError
from hizoo_lite.estimators import DP, dp
from hizoo_lite.estimators.accountant import Accountant
from hizoo_lite.noise import drawn_along
from hizoo_lite.optimizers.step_size import FixedRate, Schedule
from hizoo_lite.run import Run, fit
from hizoo_lite.train import journal
from hizoo_lite.train.given import configured
from hizoo_lite.train.step import Stepper
from tests.run_fixtures import short_run

#: Standard errors that a mean or a variance of the operating system's values may be away: one in a million.
ERRORS = 5.0


def run_of(folder: Path, *, callbacks: Any = (), **changes: Any) -> Run:
    options = {"estimator": "dp", "lr": 1e-2, **changes}
    return fit(TrainConfig(**short_run(folder, **options)), callbacks=callbacks)


def begun(examples: int = 10, batch_size: int = 4, steps: int = 6, **options: Any) -> DP:
    """An estimator of a run."""
    made = DP(**options)
    made.begin(examples, batch_size, steps, [])
    return made


class Messages:
    """A callback that keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def on_message(self, args: Any, state: Any, control: Any, *, text: str, **more: Any) -> None:
        self.lines.append(text)


# ------------------------------------------------------------------------- against the papers


SHAPE, RATE, MU, SEED = (3, 5), 0.5, 1e-2, 11
INPUTS = np.random.default_rng(0).normal(size=(12, 15)) * np.geomspace(0.1, 3.0, 12)[:, None]
TARGETS = np.random.default_rng(1).normal(size=12)


def squares(theta: np.ndarray, examples: np.ndarray) -> np.ndarray:
    """Losses of a linear model, (examples,) float64."""
    return 0.5 * (INPUTS[examples] @ theta.reshape(-1) - TARGETS[examples]) ** 2


class Linear(BranchLosses):
    """`squares` at every branch; `gold` of a batch is which examples it has."""

    def __init__(self, space: LinearSpace) -> None:
        self.space = space

    def losses(
        self,
        batch: Batch,
        branches: Branches = EVALUATION,
        mu: float = 0.0,
        directions: Mapping[str, Any] | None = None,
        exact: Mapping[str, Any] | None = None,
    ) -> Losses:
        theta, along = self.space.parameters["w"].astype(np.float64), (directions or {})["w"]
        points = (
            theta + offset * mu * along[number].astype(np.float64) for number, offset in branches.points
        )
        found = np.array([squares(point, np.asarray(batch.gold)) for point in points])
        return Losses(found, np.zeros((branches.count, 0)), np.ones((branches.directions, batch.examples)))


class LinearSpace(AttachedSpace):
    name, weights = "linear", None

    def __init__(self) -> None:
        self.parameters = {"w": np.zeros(SHAPE, np.float32)}
        self.exact: dict[str, Any] = {}
        self.frozen: dict[str, Any] = {}


def batch_of(examples: list[int]) -> Batch:
    none = np.zeros(0, np.int64)
    mask = np.ones((len(examples), 1), np.int64)
    return Batch(mask, mask, None, none, none, none, none, none, none, np.array(examples), "class")


def stepper_of(estimator: DP, space: Any = None) -> Stepper:
    space = LinearSpace() if space is None else space
    schedule = Schedule("constant", RATE, 0, 100)
    arguments: dict[str, Any] = {"seed": SEED, "mu": MU, "smoothing": Schedule("constant", 0.01, 0, 100)}
    made = curvature.get("none"), FixedRate(schedule)
    return Stepper(Linear(space), NumpyArrays(), space, estimator, *made, **arguments)


def known_values(monkeypatch: pytest.MonkeyPatch, seed: int = 5) -> Callable[[int], np.ndarray]:
    """In place of the operating system's values those of a generator; a second one, of the same values."""
    ours, theirs = np.random.default_rng(seed), np.random.default_rng(seed)
    monkeypatch.setattr(dp, "uniform", ours.random)
    return theirs.random


@pytest.mark.parametrize(
    ("mechanism", "directions"), [("gaussian", 1), ("gaussian", 4), ("laplace", 1)], ids=str
)
def test_every_step_is_that_of_the_papers(
    mechanism: Any, directions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, a step at a time, for batches of any size, in parts and without examples."""
    clip, noise, expected = 0.02, 0.7, 4
    drawn = known_values(monkeypatch)
    estimator = begun(12, expected, clip=clip, noise=noise, mechanism=mechanism, directions=directions)
    stepper = stepper_of(estimator)
    steps = [[0, 3, 11], [], [1, 2, 4, 5, 6, 7, 8, 9, 10], [2], list(range(12))]
    clipped = 0
    for step, examples in enumerate(steps):
        theta = stepper.space.parameters["w"].astype(np.float64)
        z = [d.astype(np.float64) for d in drawn_along(SEED, step, "w", SHAPE, directions)]
        total = np.zeros(directions)
        for example in examples:
            one = np.array([example])
            change = np.array(
                [(squares(theta + MU * d, one) - squares(theta - MU * d, one)).item() for d in z]
            )
            size = math.sqrt(sum(float(c) ** 2 for c in change))
            clipped += size > clip
            total += change * min(1.0, clip / size)
        u, v = drawn(2 * directions).reshape(2, directions)
        xi = np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v) if mechanism == "gaussian" else np.log(u / v)
        gradients = (total + noise * clip * xi) / (2 * MU * expected * directions)
        parts = [batch_of(examples[first : first + 4]) for first in range(0, len(examples), 4)]
        record = stepper.step(step, *parts)
        # to the grid of the released values
        np.testing.assert_allclose(record.coefficients, gradients, rtol=0, atol=1e-7 * noise * clip / MU)
        assert (record.losses, record.curvatures, record.tokens, record.skipped) == ((), None, None, False)
        moved = theta - RATE * sum(g * d for g, d in zip(gradients, z, strict=True))
        np.testing.assert_allclose(stepper.space.parameters["w"], moved, rtol=1e-6, atol=1e-6)
    stepper.close()
    assert 0 < clipped < sum(map(len, steps))


def test_exact_gradients_are_refused() -> None:
    space = LinearSpace()
    space.exact = {"head": np.zeros((2, 2), np.float32)}
    with pytest.raises(UserError, match=r"--head: exact gradients .* --estimator dp"):
        stepper_of(begun(), space)


# ------------------------------------------------------------------------------- the mechanism


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_what_is_released_is_the_clipped_sum_and_the_noise_that_is_accounted_for(mechanism: Any) -> None:
    """An attack that sees the same step many times learns the sum no better than the noise lets it."""
    calls, clip, noise, batch_size = 4000, 1e-3, 2.5, 4
    estimator = begun(batch_size=batch_size, clip=clip, noise=noise, mechanism=mechanism)
    changes = np.random.default_rng(3).normal(size=7) * 2e-3
    losses = np.stack([1.0 + changes, np.ones(7)])
    wanted = np.clip(losses[0] - losses[1], -clip, clip).sum()
    sums = estimator.reduce(0, losses)
    released = np.array([estimator.release(0, sums, 7)[0] for _ in range(calls)]) * batch_size
    scale = noise * clip
    deviation = scale * (1.0 if mechanism == "gaussian" else math.sqrt(2.0))
    kurtosis, size = (3.0, scale * math.sqrt(2 / math.pi)) if mechanism == "gaussian" else (6.0, scale)
    assert released.mean() == pytest.approx(wanted, abs=ERRORS * deviation / math.sqrt(calls))
    spread = deviation**2 * math.sqrt((kurtosis - 1) / calls)
    assert released.var() == pytest.approx(deviation**2, abs=ERRORS * spread)
    error = math.sqrt((deviation**2 - size**2) / calls)  # tells the two distributions apart
    assert np.abs(released - wanted).mean() == pytest.approx(size, abs=ERRORS * error)
    grid = 2.0 ** (math.floor(math.log2(scale)) - dp.KEPT_BITS)
    assert not np.any(released / grid % 1.0)  # the same values for every sum


def test_noise_of_directions_is_independent() -> None:
    estimator = begun(directions=3, clip=1.0, noise=1.0)
    found = np.array([estimator.release(0, np.zeros(3), 0) for _ in range(4000)]) * 4
    covariance = found.T @ found / len(found)
    np.testing.assert_allclose(covariance, np.eye(3), atol=ERRORS * math.sqrt(2 / len(found)))


@pytest.mark.parametrize("directions", [1, 3])
def test_data_sets_that_differ_by_an_example_have_sums_that_differ_by_the_clip_at_most(
    directions: int,
) -> None:
    clip = 1e-3
    estimator = begun(directions=directions, clip=clip)
    draw = np.random.default_rng(4)
    losses = draw.normal(size=(2 * directions, 9)) * np.geomspace(1e-6, 1e6, 9)
    losses[0, 2], losses[1, 3], losses[0, 4], losses[1, 4] = math.nan, math.inf, math.inf, -math.inf
    whole = estimator.reduce(0, losses)
    assert np.isfinite(whole).all()
    far = 0.0
    for example in range(9):
        rest = estimator.reduce(0, np.delete(losses, example, axis=1))
        far = max(far, float(np.linalg.norm(whole - rest)))
    assert far == pytest.approx(clip, rel=1e-9)
    one = estimator.reduce(0, losses[:, :1])
    np.testing.assert_allclose(one, losses[0::2, 0] - losses[1::2, 0], rtol=1e-12)  # a small one is whole


def test_each_example_is_in_a_batch_with_the_probability_that_is_accounted_for() -> None:
    estimator, calls = begun(examples=40, batch_size=6), 4000
    batches = [estimator.sample() for _ in range(calls)]
    assert all(batch == sorted(set(batch)) for batch in batches)
    there = np.zeros((calls, 40))
    for row, batch in zip(there, batches, strict=True):
        row[batch] = 1
    q = 6 / 40
    deviation = math.sqrt(q * (1 - q) / calls)
    np.testing.assert_allclose(there.mean(0), q, atol=ERRORS * deviation)
    sizes = there.sum(1)  # binomial, so that examples do not depend on each other
    variance = 40 * q * (1 - q)
    assert sizes.var() == pytest.approx(variance, abs=ERRORS * variance * math.sqrt(2 / calls))
    assert begun(examples=6, batch_size=6).sample() == list(range(6))


def test_values_of_the_operating_system_are_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    found = dp.uniform(100_000)
    assert 0 < found.min() < found.max() < 1
    assert found.mean() == pytest.approx(0.5, abs=ERRORS * math.sqrt(1 / 12 / len(found)))
    for byte, end in (b"\0", 2.0**-53), (b"\xff", 1 - 2.0**-53):
        monkeypatch.setattr(os, "urandom", lambda count, byte=byte: byte * count)
        assert dp.uniform(2).tolist() == [end, end]
        assert np.isfinite(dp.NOISE["gaussian"](3)).all()


# ---------------------------------------------------------------------------------- accounting


LIBRARY: dict[str, Any] = {
    "gaussian": (rdp.RdpAccountant, dp_accounting.GaussianDpEvent),
    "laplace": (pld.PLDAccountant, dp_accounting.LaplaceDpEvent),
}


@pytest.mark.parametrize("mechanism", LIBRARY)
@pytest.mark.parametrize(("q", "noise", "steps"), [(0.016, 1.0, 1000), (0.25, 3.0, 40), (1.0, 20.0, 3)])
def test_epsilon_is_that_of_the_library(mechanism: str, q: float, noise: float, steps: int) -> None:
    accountant, event = LIBRARY[mechanism]
    made = accountant()
    made.compose(dp_accounting.PoissonSampledDpEvent(q, event(noise)), steps)
    wanted = made.get_epsilon(1e-5)
    assert 0.1 < wanted < 10
    estimator = begun(1000, round(1000 * q), steps, noise=noise, mechanism=mechanism)
    entries, line = estimator.account(steps)
    assert entries["dp"]["epsilon"] == wanted
    assert line == f"differential privacy: epsilon {wanted:.4g} at delta 1e-05 in {steps} steps"
    assert estimator.account(0)[0]["dp"]["epsilon"] == 0.0


def test_the_steps_of_a_budget_are_the_most_that_are_within_it() -> None:
    accountant = Accountant("gaussian", 0.1, 1.0, 1e-5)
    for steps in (1, 7, 50):
        epsilon = accountant.epsilon(steps)
        assert accountant.most_steps(epsilon, 50) == steps
        assert accountant.most_steps(0.999 * epsilon, 50) == steps - 1


def test_orders_that_the_library_leaves_out_are_no_news(caplog: pytest.LogCaptureFixture) -> None:
    level = logging.getLogger("absl").level
    assert begun(noise=0.3).account(10)[0]["dp"]["epsilon"] > 10
    assert not caplog.records
    assert logging.getLogger("absl").level == level


def test_without_the_library_nothing_begins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(UserError, match=r"pip install 'hizoo-lite\[dp\]'"):
        run_of(tmp_path)
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": "auto"}, "lr: got 'auto', but dp measures no curvature"),
        ({"head": "exact"}, "head: got 'exact', but estimator dp .*; allowed: auto, estimated, none"),
        ({"exact_blocks": 1}, "exact_blocks: got 1, but estimator dp .*; allowed: 0"),
        ({"objective": "accuracy"}, "objective: got 'accuracy', but estimator dp .*; allowed: loss"),
        ({"dp_mechanism": "laplace", "directions": 2}, "directions: got 2, but dp_mechanism laplace"),
        ({"directions": 128}, "directions: got 128, each a pair; allowed: up to 127"),
        ({"directions": 2, "space": "dense"}, "directions: got 2, allowed: 1 or auto with space dense"),
        ({"dp_noise": 0.0}, "dp_noise: got 0.0, allowed: a number of 0.1 or more"),
        ({"dp_clip": 0.0}, "dp_clip: got 0.0"),
        ({"dp_delta": 0.6}, "dp_delta: got 0.6"),
        ({"dp_epsilon": 0.0}, "dp_epsilon: got 0.0"),
        ({"dp_mechanism": "uniform"}, "dp_mechanism: got 'uniform', allowed: gaussian, laplace"),
    ],
    ids=str,
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**{"model": "m", "task": "sst2", "estimator": "dp", "lr": 1e-3, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": -1.0}, "clip must be a positive number"),
        ({"noise": math.inf}, "noise must be a positive number"),
        ({"delta": 1.0}, "delta must be"),
        ({"epsilon": 0.0}, "epsilon must be"),
        ({"directions": 0}, "directions must be a whole number >= 1"),
        ({"directions": True}, "directions must be"),
        ({"mechanism": "none"}, "mechanism must be gaussian or laplace"),
        ({"mechanism": "laplace", "directions": 2}, "directions: got 2"),
    ],
    ids=str,
)
def test_options_of_an_object_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"estimator dp: {message}"):
        DP(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 11}, "--batch-size: got 11, .* of the 10 examples .*; allowed: up to 10"),
        ({"dp_epsilon": 0.1}, "--dp-epsilon: got 0.1, but a single step has .*; allowed: that or more"),
    ],
    ids=str,
)
def test_what_the_examples_do_not_allow_is_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run_of(tmp_path, **changes)
    assert not (tmp_path / "run").exists()


def test_what_is_left_open_is_what_releases_nothing_else() -> None:
    given = {"model": "m", "task": "sst2", "lr": 1e-3}
    config = TrainConfig(**given, estimator="dp")
    assert (config.head, config.balanced, config.by_length) == ("estimated", "off", "off")
    other, _ = configured(TrainConfig(**given, estimator="mezo"), None, None, None, {"estimator": "dp"})
    assert other == config
    back, _ = configured(config, None, None, None, {"estimator": "mezo"})
    assert (back.head, back.balanced, back.by_length) == ("exact", "auto", "auto")
    made, _ = configured(TrainConfig(**given, estimator="mezo"), None, DP(clip=0.5, epsilon=3.0), None, {})
    assert made == replace(config, dp_clip=0.5, dp_epsilon=3.0, directions=1)


# ---------------------------------------------------------------------------------------- runs


def test_a_run_says_what_it_has_released_and_what_is_not_covered(tmp_path: Path) -> None:
    said = Messages()
    run = run_of(tmp_path, callbacks=[said], eval_every=3, dp_delta=0.2, directions=2, dp_noise=2.0)
    accountant, event = LIBRARY["gaussian"]
    made = accountant()
    made.compose(dp_accounting.PoissonSampledDpEvent(0.4, event(2.0)), 6)
    epsilon = made.get_epsilon(0.2)
    told = json.loads((run.folder / "summary.json").read_text())["dp"]
    files = told.pop("not_covered").pop()
    assert files.startswith("run.json")
    assert told == {
        "epsilon": epsilon,
        "delta": 0.2,
        "neighbours": "one training example more or less",
        "mechanism": "gaussian",
        "noise_multiplier": 2.0,
        "clip": 1e-3,
        "directions": 2,
        "sampling": "poisson",
        "probability": 0.4,
        "steps": 6,
    }
    text = "\n".join(said.lines)
    spent = f"epsilon {epsilon:.4g} at delta 0.2 in 6 steps"
    assert f"in a batch with probability 0.4, and the run is to have {spent}" in text
    assert "--dp-delta: 0.2 is above one over the 10 training examples" in text
    dev = "evaluations on dev examples (out of the training file); evaluations on test examples; run.json"
    assert f"epsilon does not cover {dev}" in text
    assert said.lines[-1] == f"differential privacy: {spent}"
    assert "--exact-blocks" not in text  # which has no noise


def test_a_budget_ends_the_run_saved(tmp_path: Path) -> None:
    estimator = begun()
    budget = estimator.account(3)[0]["dp"]["epsilon"] + 1e-9
    said = Messages()
    run = run_of(tmp_path, callbacks=[said], dp_epsilon=budget)
    assert f"--dp-epsilon: {budget} is reached after 3 of 6 steps" in said.lines
    assert f"the budget (--dp-epsilon {budget}) ends the run after 3 of 6 steps" in said.lines
    assert (run.summary["steps"], run.summary["dp"]["steps"], run.interrupted) == (3, 3, False)
    assert run.summary["dp"]["epsilon"] <= budget
    assert run.after is not None
    assert (run.folder / "checkpoints/step-000003").is_dir()
    again = run_of(tmp_path, dp_epsilon=budget, resume=True)
    assert again.summary["steps"] == 3
    assert tensorfile.equal(*(r.folder / "adapter/adapter_model.safetensors" for r in (run, again)))


def test_the_same_seed_has_the_same_directions_and_other_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run leaves holds nothing of what was drawn: not even who has all of it knows the noise."""
    drawn: list[bytes] = []
    plain = os.urandom

    def urandom(count: int) -> bytes:
        drawn.append(plain(count))
        return drawn[-1]

    monkeypatch.setattr(os, "urandom", urandom)
    runs = [run_of(tmp_path / name, save_every=1) for name in ("one", "two")]
    monkeypatch.undo()
    one, two = (journal.read(run.folder / "journal.bin") for run in runs)
    assert all(ours.coefficients != theirs.coefficients for ours, theirs in zip(one, two, strict=True))
    assert [record.seed for record in one] == [record.seed for record in two]
    stored = b"".join(file.read_bytes() for run in runs for file in run.folder.rglob("*") if file.is_file())
    words = {some[first : first + 8] for some in drawn for first in range(0, len(some), 8)}
    assert len(words) >= 2 * 6 * (10 + 2)  # examples, and noise of one direction
    assert not any(word in stored for word in words)
    for name in runs[0].setup.space.parameters:
        moved = [before(run, 1)[name] - before(run, 0)[name] for run in runs]
        first, second = (
            value / made[0].coefficients[0] for value, made in zip(moved, (one, two), strict=True)
        )
        np.testing.assert_allclose(first, second, rtol=1e-3, atol=1e-5)
        assert np.abs(first).max() > 1e-3


def before(run: Run, step: int) -> dict[str, np.ndarray]:
    """The parameters before a step, by name."""
    path = run.folder / "checkpoints" / f"step-{step:06d}" / "adapter" / "adapter_model.safetensors"
    return {name.removeprefix("base_model.model."): value for name, value in tensorfile.load(path).items()}


#: What of a run depends on time and memory alone.
_MEASURED = ("seconds", "measured_peak_bytes", "inference_peak_bytes", "out", "model_bytes")


def without_measures(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_measures(item) for key, item in value.items() if key not in _MEASURED}
    return [without_measures(item) for item in value] if isinstance(value, list) else value


def told_by(run: Run) -> Iterator[tuple[str, Any]]:
    """Every file of a run folder, and what it says."""
    for file in sorted(run.folder.rglob("*")):
        name = file.relative_to(run.folder).as_posix()
        if file.suffix == ".json":
            yield name, without_measures(json.loads(file.read_text()))
        elif file.suffix == ".jsonl":
            yield name, [without_measures(json.loads(line)) for line in file.read_text().splitlines()]
        elif file.is_file():
            yield name, file.read_bytes().replace(str(run.folder).encode(), b"")


def test_no_file_tells_which_or_how_many_examples_a_step_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs whose batches differ and whose sums do not leave the same files."""
    monkeypatch.setattr(DP, "reduce", lambda self, step, losses: np.zeros(1))
    monkeypatch.setitem(dp.NOISE, "gaussian", np.ones)
    runs = []
    for name, batches in (("one", [[], [0], [1, 2, 3, 4, 5, 6]]), ("two", [list(range(10)), [7, 8], []])):
        chosen = itertools.cycle(batches)
        monkeypatch.setattr(DP, "sample", lambda self, chosen=chosen: next(chosen))
        said = Messages()
        run = run_of(tmp_path, callbacks=[said], out=str(tmp_path / name), residency="host")
        runs.append((run, said.lines))
    ours, theirs = (dict(told_by(run)) for run, _ in runs)
    assert ours == theirs
    assert "memory.json" not in ours
    steps = [line for line in ours["metrics.jsonl"] if line["kind"] == "step"]
    assert all((line["tokens"], line["losses"]) == (None, []) for line in steps)
    assert all("seconds" in line and line["seconds"] is None for line in step_lines(runs[0][0]))
    assert runs[0][1] == runs[1][1]


def step_lines(run: Run) -> list[dict[str, Any]]:
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "step"]


def test_a_run_without_any_example_learns_its_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DP, "sample", lambda self: [])
    run = run_of(tmp_path, space="dense", steps=3, lr=1e-4)
    assert run.summary["skipped_steps"] == 0
    assert all(record.coefficients[0] != 0.0 for record in journal.read(run.folder / "journal.bin"))
    assert run.before is not None
    assert run.after is not None
    assert run.before.loss != run.after.loss


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_large_batch_goes_through_in_parts_of_the_usual_size(
    accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    plain = Traversal.losses

    def losses(self: Traversal, batch: Batch, branches: Branches = EVALUATION, *given: Any) -> Losses:
        if branches.count > 1:
            sizes.append(batch.examples)
        return plain(self, batch, branches, *given)

    monkeypatch.setattr(Traversal, "losses", losses)
    monkeypatch.setattr(DP, "sample", lambda self: list(range(9)))
    run_of(tmp_path, steps=2, batch_size=4, accumulate=accumulate)
    assert sum(sizes) == 2 * 9
    assert max(sizes) <= 4 // accumulate


def test_kept_hidden_states_give_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, said = [], Messages()
    for hidden_states in ("auto", "off"):
        known_values(monkeypatch)
        run = run_of(
            tmp_path / hidden_states,
            callbacks=[said],
            hidden_states=hidden_states,
            blocks=1,
            compute_dtype="float32",
        )
        found.append([record.coefficients for record in journal.read(run.folder / "journal.bin")])
    assert sum("computing the hidden states" in line for line in said.lines) == 1
    # of losses that are rounded otherwise, some 1e-7 apart, over 2 mu
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-3)
    assert np.abs(found).min() > 1e-3


def test_no_step_tells_of_losses_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = DP.reduce
    monkeypatch.setattr(DP, "reduce", lambda self, step, losses: plain(self, step, losses * math.nan))
    run = run_of(tmp_path)
    assert run.summary["skipped_steps"] == 0
