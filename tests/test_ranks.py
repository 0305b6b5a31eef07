"""Data parallel runs: several processes, one batch; the same state on each, and that of a single process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_fixtures import short_run
from safetensors.torch import load_file

from hizoo_lite.config import TrainConfig
from hizoo_lite.run import fit
from hizoo_lite.train.ranks import ONE, Ranks
from hizoo_lite.train.replay import replay

#: Losses of float32 products with other rows, averaged, after a few steps.
TOLERANCE = 5e-6


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Short steps: what is compared is the rounding of sums, not what long steps make of it."""
    wanted = {"compute_dtype": "float32", "batch_size": 5, "eval_every": 2, "dev_examples": 3, "threads": 1}
    wanted |= {"lr": 1e-3}
    return short_run(folder, **{**wanted, **changes})


def launch(count: int, options: dict[str, Any], *, state: Path | None = None) -> subprocess.Popen[str]:
    """The run in `count` processes; each writes what it has learnt to `state`, and its bytes sent."""
    code = """
import json, sys
from pathlib import Path
from safetensors.torch import save_file
from hizoo_lite.config import TrainConfig
from hizoo_lite.run import fit
settings = json.loads(sys.argv[1])
if settings["device"] == "simgpu":
    from tests.simulated.gpu import install
    install()
run = fit(TrainConfig(**settings))
ranks = run.setup.stepper.ranks
state = {k: v.cpu().clone() for k, v in run.setup.space.parameters.items()}
state |= {f"curvature.{k}": v.cpu().clone() for k, v in run.setup.stepper.curvature.state_dict().items()}
if sys.argv[2]:
    save_file(state, f"{sys.argv[2]}.{ranks.rank}")
    Path(f"{sys.argv[2]}.{ranks.rank}.json").write_text(json.dumps([ranks.sent_bytes, ranks.exchanges]))
"""
    where = "" if state is None else str(state)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    script = Path(options["out"]).with_suffix(".py")
    script.write_text(code)
    return subprocess.Popen(
        [*command, "--standalone", str(script), json.dumps(options), where],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What it wrote; it must have ended well."""
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text
    return text


def losses(folder: Path) -> np.ndarray:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return np.array([line["losses"] for line in lines if line["kind"] == "step"])


def test_shares_are_in_order_and_whole() -> None:
    class Three(Ranks):
        count = 3

        def __init__(self, rank: int) -> None:
            self.rank = rank

    for total in range(8):
        parts = [Three(rank).share(range(total)) for rank in range(3)]
        assert [item for part in parts for item in part] == list(range(total))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert ONE.share([1, 2]) == [1, 2]
    assert ONE.gather("x") == ["x"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [  # on a CPU a rank is killed below, and losses are compared
        pytest.param({}, marks=pytest.mark.grid, id="cpu"),
        pytest.param({"device": "simgpu", "residency": "host", "steps": 2}, id="gpu"),
    ],
)
def test_ranks_stay_identical_and_equal_a_single_process(place: dict[str, Any], tmp_path: Path) -> None:
    alone = fit(TrainConfig(**settings(tmp_path / "one", **{**place, "device": "cpu", "residency": "auto"})))
    options = settings(tmp_path / "two", **place)
    finish(launch(2, options, state=tmp_path / "state"))
    first, second = (load_file(tmp_path / f"state.{rank}") for rank in (0, 1))
    assert all(value.equal(second[name]) for name, value in first.items())
    folder = Path(options["out"])
    assert np.abs(losses(folder) - losses(alone.folder)).max() < TOLERANCE
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["metric_after"] == alone.summary["metric_after"]
    assert summary["loss_after"] == pytest.approx(alone.summary["loss_after"], abs=TOLERANCE)
    sent, exchanges = json.loads((tmp_path / "state.1.json").read_text())
    head = 8 * sum(value.numel() + 2 for value in alone.setup.space.exact.values())
    # six steps of five numbers and the head's gradient, four evaluations and a few waits
    assert sent < 6 * (40 + head) + 4 * 300
    assert exchanges < 40


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_saved_and_another_number_of_ranks_goes_on(tmp_path: Path) -> None:
    wanted = fit(TrainConfig(**settings(tmp_path / "one", steps=16, eval_every=0)))
    options = settings(tmp_path / "two", steps=16, eval_every=0)
    folder = Path(options["out"])
    process = launch(2, options)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not _steps(folder):
        time.sleep(0.02)
    victim = max(_children(process.pid))
    os.kill(victim, signal.SIGKILL)
    text, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    done = _steps(folder)
    assert 0 < done < 16, text
    fit(TrainConfig(**{**options, "resume": True}))
    assert np.abs(losses(folder) - losses(wanted.folder)).max() < 10 * TOLERANCE
    assert len(losses(folder)) == 16


@pytest.mark.slow
@pytest.mark.grid
def test_ranks_of_a_secret_estimator_share_what_one_of_them_has_drawn(tmp_path: Path) -> None:
    options = settings(tmp_path / "two", estimator="dp", directions=2)
    finish(launch(2, options, state=tmp_path / "state"))
    first, second = (load_file(tmp_path / f"state.{rank}") for rank in (0, 1))
    assert all(value.equal(second[name]) for name, value in first.items())
    folder = Path(options["out"])
    assert replay(folder, out=tmp_path / "replayed").differs == []
    assert json.loads((folder / "summary.json").read_text())["dp"]["steps"] == 6


def test_a_batch_in_parts_is_the_same_batch(tmp_path: Path) -> None:
    whole = fit(TrainConfig(**settings(tmp_path / "whole", steps=3)))
    parts = fit(TrainConfig(**settings(tmp_path / "parts", steps=3, accumulate=2)))
    assert np.abs(losses(whole.folder) - losses(parts.folder)).max() < TOLERANCE
    more = fit(TrainConfig(**settings(tmp_path / "more", steps=3, accumulate=9)))  # more parts than examples
    assert np.abs(losses(whole.folder) - losses(more.folder)).max() < TOLERANCE


def _steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count('"kind": "step"') if path.is_file() else 0


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]
