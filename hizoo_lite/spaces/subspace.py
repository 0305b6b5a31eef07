"""Weights within a subspace of low rank: SubZero (arXiv 2410.08989, algorithm 1).

A direction of a weight (m, n) is D = s U Z V', with Z (r, r) standard normal, drawn at every step, and U
(m, r) and V (n, r) with orthonormal columns, drawn every nu steps. s = sqrt(m n) / r, so that values of D
have a variance of one on average.

As published, but for s: the paper's D has the length of Z, and its mu and learning rate are those of that
length; ours are in the units of the other spaces. U and V are the Q of a QR decomposition in float64 on the
host and are held for their nu steps, r float32 values for each row and column of a weight. A step costs two
forwards, three with a curvature from losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hizoo_lite import noise
from hizoo_lite.model.model import Model
from hizoo_lite.spaces.dense import Dense
from hizoo_lite.spaces.lowrank import check_noise
from hizoo_lite.spaces.weights import Draw, Part, TileNoise


class SubspaceNoise(TileNoise):
    """z = s U Z V'."""

    def __init__(self, rank: int, every: int) -> None:
        self.rank, self.every = rank, every
        self._bases: dict[str, tuple[Tensor, Tensor]] = {}  # U (rows, r) and V' (r, columns) by part
        self._windows: dict[str, tuple[int, int]] = {}  # that they were drawn for
        self._core: tuple[tuple[str, int, int], Tensor] | None = None  # s Z V' of the last part

    def start(self, parts: Sequence[Part]) -> list[Tensor]:
        """U and V' of every part, which are drawn when they are needed."""
        for part in parts:
            rank = min(self.rank, *part.shape)
            shapes = (part.shape[0], rank), (rank, part.shape[1])
            u, v = (torch.empty(shape, device=part.device) for shape in shapes)
            self._bases[part.name] = u, v
        return [value for pair in self._bases.values() for value in pair]

    def fill(self, draw: Draw, out: Tensor) -> Tensor:
        """See `TileNoise.fill`."""
        u, _ = self._of(draw)
        return torch.mm(u[draw.part.rows(draw.tile)], self._columns(draw), out=out)

    def _columns(self, draw: Draw) -> Tensor:
        """s Z V', (r, columns): the same for all tiles of a part."""
        part, key = draw.part, (draw.part.name, draw.seed, draw.step)
        if self._core is None or self._core[0] != key:
            u, v = self._of(draw)
            rank = u.shape[1]
            z = torch.from_numpy(noise.drawn(draw.seed, draw.step, part.name, (rank, rank)))
            scale = math.sqrt(u.shape[0] * v.shape[1]) / rank
            self._core = key, torch.mm(z.to(part.device), v).mul_(scale)
        return self._core[1]

    def _of(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """U and V' of a part."""
        part, window = draw.part, (draw.seed, draw.step // self.every)
        u, v = self._bases[part.name]
        if self._windows.get(part.name) != window:
            words = (*window, part.name)
            u.copy_(torch.from_numpy(orthonormal(*u.shape, *words, "rows")))
            v.copy_(torch.from_numpy(orthonormal(v.shape[1], v.shape[0], *words, "columns").T))
            self._windows[part.name] = window
        return u, v


def orthonormal(size: int, rank: int, seed: int, *words: int | str) -> np.ndarray:
    """(size, rank) float32 with orthonormal columns: Q of normal values, a pure function of the arguments."""
    q, r = np.linalg.qr(noise.generator(seed, *words).standard_normal((size, rank)))
    return np.asarray(q * np.sign(np.diag(r)), dtype=np.float32)


class Subspace(Dense):
    """The dequantized weights, within a subspace of low rank (SubZero, arXiv 2410.08989, algorithm 1).

    A direction of a weight (m, n) is D = s U Z V', Z (r, r) standard normal and drawn at every step, U (m, r)
    and V (n, r) with orthonormal columns, drawn every nu steps, and s = sqrt(m n) / r. The factor s is ours:
    with it mu and the learning rate are in the units of the other spaces.
    """

    name = "subspace"

    def __init__(self, *, noise_rank: int = 24, noise_every: int = 1000, **dense: Any) -> None:
        """Nothing is changed before `attach`.

        Args:
            noise_rank: r, 1 or more.
            noise_every: nu, the steps after which U and V are drawn anew, 1 or more.
            dense: arguments of `Dense`.

        Raises:
            UserError: if an argument is out of range.
        """
        super().__init__(**dense)
        check_noise(noise_rank, noise_every)
        self.noise_rank, self.noise_every = noise_rank, noise_every

    def noise(self, model: Model) -> TileNoise:
        """z in the subspace."""
        return SubspaceNoise(self.noise_rank, self.noise_every)
