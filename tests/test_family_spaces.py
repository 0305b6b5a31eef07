"""The noise and the moves of spaces of low rank against float64 references from the papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hizoo_lite.model.scratch import Scratch
from hizoo_lite.registry import SPACES
from hizoo_lite.spaces.lowrank import LowRankNoise
from hizoo_lite.spaces.subspace import SubspaceNoise
from hizoo_lite.spaces.weights import Draw
from tests import family
from tests.family import COLUMNS, EVERY, PART, RANK, SEED, TILES

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
