"""A new estimator or optimizer is one class and its name: runs with it train, save, resume and replay."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hizoo_lite.arrays import Array, Arrays, Shape
from hizoo_lite.base import Estimate, Estimator, Piece
from hizoo_lite.branches import THETA, Point
from hizoo_lite.checkpoints import tensorfile
from hizoo_lite.config import TrainConfig
from hizoo_lite.errors import UserError
from hizoo_lite.estimators import ESTIMATORS
from hizoo_lite.estimators.hizoo import directional_curvature
from hizoo_lite.noise import generator
from hizoo_lite.optimizers import OPTIMIZERS
from hizoo_lite.registry import Line
from hizoo_lite.run import Run, fit
from hizoo_lite.train import checkpoint, journal
from hizoo_lite.train.folder import RunFolder
from hizoo_lite.train.replay import replay
from tests.run_fixtures import short_run

#: By how much one example's loss may move in `Fan`; some examples of the run below move by more.
MOST = 2e-4
STEPS = 5


def radii(step: int, count: int) -> np.ndarray:
    """Offsets that are a function of the step."""
    return generator(0, "radii", step).uniform(-2.0, 2.0, count)


class Fan(Estimator):
    """One-sided points along three directions, each at its own radius; what one example says is bounded."""

    name = "fan"
    predicts = measures_curvature = True

    def points(self, step: int) -> tuple[Point, ...]:
        return (THETA, *(Point(k, float(radius)) for k, radius in enumerate(radii(step, 3))))

    def measures(self, step: int) -> bool:
        return True

    def reduce(self, step: int, losses: np.ndarray) -> np.ndarray:
        """The sums of the bounded changes alone: not even the loss at theta leaves."""
        return np.clip(losses[1:] - losses[0], -MOST, MOST).sum(axis=1)

    def estimate(self, step: int, losses: np.ndarray, divergences: np.ndarray, mu: float) -> Estimate:
        away = [mu * point.offset for point in self.points(step)[1:]]
        slopes = tuple(float(change) / at for change, at in zip(losses, away, strict=True))
        bends = (directional_curvature(float(d), at) for d, at in zip(divergences, away, strict=True))
        return Estimate(slopes, tuple(bends))


class Radius(Estimator):
    """One pair at a radius of its own, without curvature."""

    name = "radius"

    def points(self, step: int) -> tuple[Point, ...]:
        [radius] = radii(step, 1)
        return Point(0, float(radius)), Point(0, -float(radius))

    def estimate(self, step: int, losses: np.ndarray, divergences: np.ndarray, mu: float) -> Estimate:
        plus, minus = map(float, losses)
        return Estimate(((plus - minus) / (2 * mu * self.points(step)[0].offset),), None)


class Momentum:
    """v <- 0.5 v + g, theta <- theta - lr v; the state is by parameter."""

    name, streams = "momentum", False

    def start(self, shapes: Mapping[str, Shape], arrays: Arrays) -> None:
        self._arrays = arrays
        self._state = {n: arrays.from_numpy(np.zeros(tuple(s), np.float32)) for n, s in shapes.items()}

    def update(
        self, parameters: Mapping[str, Array], pieces: Sequence[Piece], lr: float, decay: float
    ) -> None:
        for name, value in parameters.items():
            self._state[name] *= 0.5
            for values, coefficient in pieces:
                self._arrays.add_scaled(self._state[name], values[name], coefficient)
            self._arrays.add_scaled(value, self._state[name], -lr)

    def state_dict(self) -> dict[str, Array]:
        return self._state

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        for name, value in state.items():
            self._state[name][...] = self._arrays.from_numpy(value)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimators of this file beside the others."""
    for member in (Fan, Radius):
        line = Line(f"{__name__}:{member.__name__}", str(member.__doc__))
        monkeypatch.setitem(ESTIMATORS.lines, member.name, line)


def run_of(folder: Path, **changes: Any) -> Run:
    """A run of `STEPS` steps, with a checkpoint after two."""
    return fit(TrainConfig(**short_run(folder, **{"steps": STEPS, "save_every": 2, "lr": 1e-2, **changes})))


def assert_same(ours: Run, theirs: Run) -> None:
    """What both have saved last is the same, bit for bit."""
    last, other = (checkpoint.path_of(run.folder / "checkpoints", STEPS) for run in (ours, theirs))
    files = {file.relative_to(last) for file in last.rglob("*.safetensors")}
    assert files
    assert all(tensorfile.equal(last / file, other / file) for file in files)


@pytest.mark.parametrize(("estimator", "space"), [("fan", "lora"), ("radius", "dense")])
def test_a_run_with_a_new_estimator_trains_resumes_and_replays(
    estimator: str, space: str, tmp_path: Path
) -> None:
    options = {"estimator": estimator, "space": space}
    straight = run_of(tmp_path / "straight", **options)
    assert straight.summary["estimator"] == estimator
    assert straight.summary["skipped_steps"] == 0
    run_of(tmp_path, **options, steps=3)
    resumed = run_of(tmp_path, **options, resume=True)
    assert_same(resumed, straight)
    assert replay(resumed.folder, STEPS - 1, tmp_path / "replayed").differs == []


def test_what_leaves_a_rank_is_what_the_estimator_reduces_losses_to(tmp_path: Path) -> None:
    mu = 1e-1
    run = run_of(tmp_path, estimator="fan", mu=mu)
    records = journal.read(run.folder / "journal.bin")
    for record in records:
        assert record.predicted
        assert record.curvatures is not None
        changes = zip(record.losses, radii(record.step, 3), strict=True)
        assert record.coefficients == tuple(change / (mu * float(radius)) for change, radius in changes)
    changes = [abs(change) for record in records for change in record.losses]
    assert max(changes) <= MOST
    assert max(changes) > MOST / 2  # without the bound they are larger
    lines = RunFolder(run.folder).read_metrics()
    assert [line["forwards"] for line in lines if line["kind"] == "step"] == [4] * STEPS


def test_one_sided_points_are_refused_for_weights_inside_the_blocks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--directions: got 3, but --space dense"):
        run_of(tmp_path, estimator="fan", space="dense")


def test_an_optimizer_with_a_state_saves_resumes_and_replays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = OPTIMIZERS.lines["sgd"]
    monkeypatch.setitem(OPTIMIZERS.lines, "sgd", Line(f"{__name__}:Momentum", ""))
    straight = run_of(tmp_path / "straight")
    run_of(tmp_path, steps=3)
    resumed = run_of(tmp_path, resume=True)
    assert_same(resumed, straight)
    path = checkpoint.path_of(resumed.folder / "checkpoints", STEPS) / "optimizer.safetensors"
    assert any(np.abs(value).max() > 0 for value in tensorfile.load(path).values())
    assert replay(resumed.folder, STEPS - 1, tmp_path / "replayed").differs == []
    with pytest.raises(UserError, match=r"--optimizer: momentum .* --space dense"):
        run_of(tmp_path / "dense", space="dense")
    monkeypatch.setitem(OPTIMIZERS.lines, "sgd", plain)
    with pytest.raises(UserError, match="optimizer sgd: keeps nothing"):
        run_of(tmp_path, resume=True, steps=STEPS + 1)


#: A process that has one more line in the registry, as a file of the package would have it.
OF_A_NEW_LINE = """
import json, sys
from hizoo_lite.registry import ESTIMATORS, Line, Setting

strength = Setting(float, 2.0, "of its slopes", argument="by", above=0.0)
path = "tests.test_members_estimator:Strong"
ESTIMATORS.lines["strong"] = Line(path, "MeZO times a number", {"strength": strength})
from hizoo_lite.cli import main

for line in json.loads(sys.argv[1]):
    sys.argv[1:] = line
    try:
        main()
    except SystemExit as ended:
        print("ended with", ended.code)
"""


class Strong(Estimator):
    """MeZO with a setting of its own."""

    name = "strong"

    def __init__(self, by: float) -> None:
        self.by = by

    def points(self, step: int) -> tuple[Point, ...]:
        return Point(0, 1.0), Point(0, -1.0)

    def estimate(self, step: int, losses: np.ndarray, divergences: np.ndarray, mu: float) -> Estimate:
        plus, minus = map(float, losses)
        return Estimate((self.by * (plus - minus) / (2 * mu),), None)


def commands(*lines: list[str]) -> subprocess.CompletedProcess[str]:
    """What command lines print where the registry has the line `OF_A_NEW_LINE` adds."""
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "COLUMNS": "200"}
    line = [sys.executable, "-c", OF_A_NEW_LINE, json.dumps(lines)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=root, check=False)


def test_a_setting_in_the_line_of_a_member_is_flag_help_key_and_rule(tmp_path: Path) -> None:
    run = ["train", "--config", "demo", "--estimator", "strong", "--lr", "0.001", "--steps", "1"]
    small = ["--test-examples", "4", "--out", str(tmp_path / "run"), "--quiet"]
    wrong, right = ([*run, *small, "--strength", strength] for strength in "03")
    done = commands(["train", "--help"], wrong, right)
    told, refused, trained = re.findall(r"(.*?)ended with (.*?)\n", done.stdout, re.DOTALL)
    assert "of strong: of its slopes (default: 2.0)" in " ".join(told[0].split())
    assert refused == ("", "2")
    assert "--strength: got 0.0, allowed: a number above 0" in done.stderr
    assert trained[1] in ("0", "None"), done.stderr
    assert "strength = 3.0\n" in (tmp_path / "run" / "config.toml").read_text()
    [record] = journal.read(tmp_path / "run" / "journal.bin")
    plus, minus = record.losses
    assert record.coefficients == (3.0 * (plus - minus) / (2 * 1e-3),)
