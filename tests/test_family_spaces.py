"""The noise and the moves of spaces of low rank against float64 references from the papers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hizoo_lite.config import DEMO, TrainConfig
from hizoo_lite.curvature import NoCurvature
from hizoo_lite.engine.load import load
from hizoo_lite.export.quantize import Quantization
from hizoo_lite.model.scratch import Scratch
from hizoo_lite.registry import SPACES
from hizoo_lite.run import fit
from hizoo_lite.spaces.lowrank import LowRank, LowRankNoise
from hizoo_lite.spaces.subspace import SubspaceNoise
from hizoo_lite.spaces.weights import Draw
from hizoo_lite.tensors import TorchArrays
from hizoo_lite.train import checkpoint
from hizoo_lite.train.replay import replay
from tests import family
from tests.family import COLUMNS, EVERY, PART, RANK, SEED, TILES
from tests.run_fixtures import short_run

#: Sums of a few float32 products.
CLOSE = 1e-6


@pytest.mark.parametrize("name", family.NOISES)
def test_noise_and_moves_are_the_papers(name: str) -> None:
    assert family.NOISES[name]() < CLOSE


def test_every_structured_space_has_a_reference() -> None:
    structured = {name for name, line in SPACES.lines.items() if line.structured}
    assert structured <= set(family.NOISES)


def test_directions_of_low_rank_are_of_unit_variance_and_share_their_columns() -> None:
    made = LowRankNoise(RANK, EVERY, 0.0, Scratch())
    together = np.vstack([family.filled(made, step) for step in range(EVERY)])
    assert np.linalg.matrix_rank(together, tol=1e-3) == RANK
    values = np.concatenate([family.filled(made, step) for step in range(200 * EVERY)])
    assert values.std() == pytest.approx(1.0, abs=0.03)  # 200 windows of 40 x 3 values of V


def test_directions_in_a_subspace_are_of_unit_variance() -> None:
    made = SubspaceNoise(RANK, EVERY)
    made.start([PART])
    values = np.concatenate([family.filled(made, step) for step in range(400)])
    assert values.std() == pytest.approx(1.0, abs=0.05)  # 400 draws of 3 x 3 values of Z


def test_a_move_that_fails_changes_no_momentum() -> None:
    made = LowRankNoise(RANK, EVERY, 0.9, Scratch())
    [kept] = made.start([PART])
    draw = Draw(PART, TILES[0], SEED, 0)
    first = made.move(draw, None, 1.0, 1e-2, torch.empty(16, COLUMNS))[0].clone()
    assert not kept.any()
    again = made.move(draw, None, 1.0, 1e-2, torch.empty(16, COLUMNS))[0]
    assert torch.equal(first, again)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded model in NF4 files."""
    folder = tmp_path_factory.mktemp("stored") / "nf4"
    Quantization(DEMO, folder, kind="causal", bits="nf4", double_quant=False).run()
    return str(folder)


def test_small_weights_on_a_disk_are_replayed_and_go_on(stored: str, tmp_path: Path) -> None:
    """No block is present where a replay would show z to a curvature."""
    settings = {"model": stored, "space": "small", "residency": "disk", "steps": 4, "save_every": 2}
    config = TrainConfig(**short_run(tmp_path, test_examples=4, **settings))
    run = fit(config)
    assert replay(run.folder, 4, tmp_path / "replayed").differs == []
    last = checkpoint.path_of(run.folder / "checkpoints", 4)
    before = {path.name: path.read_bytes() for path in last.rglob("*.safetensors")}
    shutil.rmtree(last)
    fit(replace(config, resume=True))
    assert {path.name: path.read_bytes() for path in last.rglob("*.safetensors")} == before


@pytest.mark.parametrize(
    "space", ["lowrank", "subspace", "small", "sparse", pytest.param("mazo", marks=pytest.mark.grid)]
)
def test_streamed_equals_resident_to_the_bit(space: str, stored: str, tmp_path: Path) -> None:
    found = []
    own = {"momentum": 0.9, "noise_every": 2} if space == "lowrank" else {}
    for residency in ("resident", "disk"):
        settings = {"model": stored, "space": space, "residency": residency, "steps": 3, **own}
        run = fit(TrainConfig(**short_run(tmp_path / residency, test_examples=4, **settings)))
        files = {path.name: path.read_bytes() for path in (run.folder / "adapter").rglob("*.safetensors")}
        found.append((files, (run.folder / "journal.bin").read_bytes()))
    assert found[0][0]
    assert found[0] == found[1]


@pytest.mark.parametrize("residency", ["resident", "host", "disk"])
def test_momentum_is_as_if_memory_had_never_been_refused(stored: str, residency: str) -> None:
    found = []
    for refused in (False, True):
        model = load(stored, device="cpu", residency=residency)
        space, curvature = LowRank(momentum=0.9), NoCurvature()
        space.attach(model, 0)
        weights = space.weights
        curvature.start(weights.shapes, TorchArrays(model.device))
        for step in range(3):
            weights.begin(0, step, curvature, measured=False)
            weights.update(1e-3, 0.0, 1.0)
            part = weights.parts[len(weights.parts) // 2]
            with pytest.MonkeyPatch.context() as patch:
                if refused and step == 1:
                    patch.setattr(part, "move", raising)
                    with pytest.raises(MemoryError):
                        weights.flush()
            weights.flush()
        found.append(weights.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def raising(*_: object) -> None:
    raise MemoryError("refused")
