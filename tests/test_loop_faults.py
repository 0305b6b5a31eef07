"""Failures at awkward moments of a run: what is saved afterwards is a state the run was in, or nothing is."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hizoo_lite.checkpoints import tensorfile
from hizoo_lite.config import TrainConfig
from hizoo_lite.errors import BudgetError, StorageError
from hizoo_lite.run import Run, fit
from hizoo_lite.spaces.inplace import InPlaceSpace
from hizoo_lite.spaces.weights import Weights
from hizoo_lite.train import checkpoint
from hizoo_lite.train.folder import RunFolder
from hizoo_lite.train.loop import Loop
from hizoo_lite.train.progress import Progress
from hizoo_lite.train.ranks import Ranks
from hizoo_lite.train.replay import replay
from tests.run_fixtures import short_run

#: Of a run whose best evaluation is not its last one: the step is far too large.
BEST = {"keep": "best", "eval_every": 1, "save_every": 2, "lr": 3e-1, "mu": 1e-2}


class Told(Progress):
    """Keeps the messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def run_of(folder: Path, progress: Progress | None = None, **changes: Any) -> Run:
    return fit(TrainConfig(**short_run(folder, **changes)), callbacks=[progress] if progress else [])


def best_of(folder: Path) -> int:
    lines = [line for line in RunFolder(folder).evaluations() if line["when"] == "dev"]
    return max((line["accuracy"], -line["step"]) for line in lines)[1] * -1


def test_a_rank_ends_by_what_all_have_agreed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that comes while a rank waits for the others has been told as none."""
    sent: list[float] = []

    def told_first(self: Ranks, values: np.ndarray) -> np.ndarray:
        values = values.copy()
        if values.shape == (2,):  # interrupted, stopped by a callback
            sent.append(float(values[0]))
            if len(sent) == 4:
                os.kill(os.getpid(), signal.SIGTERM)
        return values

    monkeypatch.setattr(Ranks, "sum", told_first)
    run = run_of(tmp_path)
    assert sent == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert run.summary["interrupted"]
    assert run.summary["steps"] == 4


def test_a_block_that_cannot_be_read_costs_nothing_that_was_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last blocks' updates may only be due when a step has its losses: before the curvature sees them."""
    plain, flushes = Weights.flush, []

    def failing(self: Weights) -> None:
        flushes.append(self._now.step if self._now is not None else -1)
        if flushes.count(3) == 1 and flushes[-1] == 3:
            raise StorageError("a block cannot be read")
        plain(self)

    monkeypatch.setattr(Weights, "flush", failing)
    options = {"space": "dense", "save_every": 0, "curvature": "factored"}
    with pytest.raises(StorageError, match=r"a block cannot be read; .*step-000003 is the last good state"):
        run_of(tmp_path, **options)
    assert replay(tmp_path / "run", 3, tmp_path / "replayed").differs == []
    resumed = run_of(tmp_path, resume=True, **options)
    monkeypatch.setattr(Weights, "flush", plain)
    straight = run_of(tmp_path / "straight", **options)
    for name in ("curvature.safetensors", "adapter/block-00000.safetensors"):
        ours, theirs = (checkpoint.newest(run.folder / "checkpoints") for run in (resumed, straight))
        assert ours is not None
        assert theirs is not None
        assert tensorfile.equal(ours / name, theirs / name)


def test_a_damaged_best_checkpoint_is_set_aside_and_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, plain = Told(), Loop._take_best
    damaged: list[int] = []

    def after_damage(self: Loop) -> None:
        step = self.best_step()
        assert step is not None
        assert step < 6
        [weights] = checkpoint.path_of(self.folder.checkpoints, step).glob("adapter/*.safetensors")
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
        damaged.append(step)
        plain(self)

    monkeypatch.setattr(Loop, "_take_best", after_damage)
    run = run_of(tmp_path, told, **BEST)
    [step] = damaged
    said = "\n".join(told.messages)
    assert f"step-{step:06d}/adapter/adapter_model.safetensors: is damaged" in said
    assert f"the best on dev, after {step} steps, is not among the checkpoints; hizoo-lite replay" in said
    assert run.summary["adapter_step"] != step
    assert (run.folder / "adapter/adapter_model.safetensors").is_file()
    found = replay(run.folder, run.summary["adapter_step"], tmp_path / "replayed")
    assert found.differs == []


def test_a_best_state_that_is_loaded_in_part_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: InPlaceSpace, folder: Path) -> None:
        raise MemoryError

    options = {**BEST, "space": "dense"}
    with monkeypatch.context() as patched:
        patched.setattr(InPlaceSpace, "load", refused)
        with pytest.raises(BudgetError, match=r"memory ran out; .*--resume goes on"):
            run_of(tmp_path, **options)
    assert best_of(tmp_path / "run") < 6
    assert not (tmp_path / "run/adapter").exists()
    assert RunFolder(tmp_path / "run").read_summary()["adapter_step"] is None
    run = run_of(tmp_path, resume=True, **options)
    assert run.summary["adapter_step"] == best_of(tmp_path / "run")


def test_memory_refused_at_the_last_save_is_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> Path:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_adapter", refused)
        with pytest.raises(
            BudgetError, match=r"memory ran out; .*step-000006 is the last good state, --resume"
        ):
            run_of(tmp_path)
    assert run_of(tmp_path, resume=True).summary["adapter_step"] == 6
