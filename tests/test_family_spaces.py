"""The noise and the moves of spaces of low rank against float64 references from the papers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hizoo_lite import noise
from hizoo_lite.model.scratch import Scratch
from hizoo_lite.spaces.lowrank import LowRankNoise
from hizoo_lite.spaces.subspace import SubspaceNoise
from hizoo_lite.spaces.weights import Draw, Tile, TileNoise
from tests import family

SEED, ROWS, COLUMNS, RANK, EVERY = 5, 24, 40, 3, 4
#: Sums of a few float32 products.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
TILES = [Tile(0, 16), Tile(16, 8)]
PART: Any = SimpleNamespace(
    name="layer.weight",
    shape=torch.Size((ROWS, COLUMNS)),
    device=torch.device("cpu"),
    rows=lambda tile: slice(tile.first, tile.first + tile.rows),
)


def filled(made: TileNoise, step: int) -> np.ndarray:
    """z of the whole weight, tile by tile."""
    parts = [
        made.fill(Draw(PART, tile, SEED, step), torch.empty(tile.rows, COLUMNS)).clone() for tile in TILES
    ]
    return torch.cat(parts).double().numpy()


def rows_of(step: int) -> np.ndarray:
    """U of a step, as tiles draw it."""
    drawn = [noise.tile_normal(SEED, step, PART.name, t.first, torch.empty(t.rows, RANK)) for t in TILES]
    return torch.cat(drawn).double().numpy()


def columns_of(step: int) -> np.ndarray:
    """V of a step, (columns, r)."""
    drawn = noise.generator(SEED, "columns", step // EVERY, PART.name).standard_normal((RANK, COLUMNS), "f4")
    return drawn.T.astype(np.float64)


def test_directions_of_low_rank_are_the_papers() -> None:
    made = LowRankNoise(RANK, EVERY, 0.0, Scratch())
    for step in range(2 * EVERY):
        np.testing.assert_allclose(
            filled(made, step), family.lozo_direction(rows_of(step), columns_of(step)), **CLOSE
        )
    together = np.vstack([filled(made, step) for step in range(EVERY)])
    assert np.linalg.matrix_rank(together, tol=1e-3) == RANK
    values = np.concatenate([filled(made, step) for step in range(200 * EVERY)])
    assert values.std() == pytest.approx(1.0, abs=0.03)  # 200 windows of 40 x 3 values of V


def test_momentum_is_the_papers_over_two_windows() -> None:
    made = LowRankNoise(RANK, EVERY, 0.9, Scratch())
    made.start([PART])
    kept, v_old, before = np.zeros((ROWS, RANK)), columns_of(0), None
    for step, slope in enumerate([0.5, -1.0, 2.0, 0.0, 1.5, -0.5, 0.25, 1.0, -2.0, 0.125]):
        v = v_old if step % EVERY else columns_of(step)
        kept, expected = family.lozo_m(kept, rows_of(step), v, v_old if step else v, slope, 0.9)
        found = []
        for tile in TILES:
            draw = Draw(PART, tile, SEED, step)
            along, amount = made.move(draw, before, slope, 1e-2, torch.empty(tile.rows, COLUMNS))
            assert amount == 1e-2
            found.append(along.clone())
            made.moved(draw)
        np.testing.assert_allclose(torch.cat(found).double().numpy(), expected, **CLOSE)
        before, v_old = step, v


def test_a_move_that_fails_changes_no_momentum() -> None:
    made = LowRankNoise(RANK, EVERY, 0.9, Scratch())
    [kept] = made.start([PART])
    draw = Draw(PART, TILES[0], SEED, 0)
    first = made.move(draw, None, 1.0, 1e-2, torch.empty(16, COLUMNS))[0].clone()
    assert not kept.any()
    again = made.move(draw, None, 1.0, 1e-2, torch.empty(16, COLUMNS))[0]
    assert torch.equal(first, again)


def test_directions_in_a_subspace_are_the_papers() -> None:
    made = SubspaceNoise(RANK, EVERY)
    u, v = (value for value in made.start([PART]))
    for step in range(2 * EVERY):
        found = filled(made, step)
        left, right = u.double().numpy(), v.double().numpy().T
        for basis in (left, right):
            np.testing.assert_allclose(basis.T @ basis, np.eye(RANK), atol=1e-6)
        z = noise.drawn(SEED, step, PART.name, (RANK, RANK)).astype(np.float64)
        np.testing.assert_allclose(found, family.subzero_direction(left, z, right), **CLOSE)
    values = np.concatenate([filled(made, step) for step in range(400)])
    assert values.std() == pytest.approx(1.0, abs=0.05)  # 400 draws of 3 x 3 values of Z
