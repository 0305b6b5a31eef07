"""Weights along directions of low rank: LOZO and LOZO-M (arXiv 2410.07698, algorithms 1 and 2).

A direction of a weight (m, n) is D = U V' / sqrt(r), with U (m, r) drawn at every step and V (n, r) every nu
steps, so that the moves of nu steps have a rank of r. With g the slope along D and lr the learning rate,

    W <- W - lr g D                                                       LOZO
    N <- b N + (1 - b) g U,    W <- W - lr N V' / sqrt(r)                 LOZO-M, b the momentum

and where V is drawn anew, N <- N V_old' V_new / n, what N is in the new V.

The paper perturbs by U V' and divides the move by r; with sqrt(r) in both places every value of D has a
variance of one, and its mu is ours over sqrt(r). What a step moves along is what it was perturbed along: the
published code's U is another one in a step that draws V. A step costs two forwards, three with a curvature
from losses, and holds the V of one layer at a time; LOZO-M r values for each row beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hizoo_lite import noise
from hizoo_lite.arrays import Array
from hizoo_lite.errors import UserError
from hizoo_lite.model.model import Model
from hizoo_lite.model.scratch import Scratch
from hizoo_lite.spaces.dense import Dense
from hizoo_lite.spaces.weights import Draw, Part, TileNoise


class LowRankNoise(TileNoise):
    """z = U V' / sqrt(r), and the momentum N in place of g U."""

    def __init__(self, rank: int, every: int, momentum: float, scratch: Scratch) -> None:
        self.rank, self.every, self.momentum, self.remembers = rank, every, momentum, momentum > 0.0
        self._scratch = scratch
        self._drawn: tuple[tuple[str, int, int], Tensor] | None = None  # V' / sqrt(r) of the last part
        self._kept: dict[str, Tensor] = {}  # N by part, (rows, r) float32, zero at first
        self._next: Tensor | None = None  # N of a tile that moves
        self._undo: list[tuple[Tensor, Tensor]] = []  # N of tiles that have moved, and what it was

    def start(self, parts: Sequence[Part]) -> list[Tensor]:
        """N of every part, with momentum."""
        if self.remembers:
            shapes = {part.name: (part.shape[0], self._rank(part)) for part in parts}
            self._kept = {part.name: torch.zeros(shapes[part.name], device=part.device) for part in parts}
        return list(self._kept.values())

    def fill(self, draw: Draw, out: Tensor) -> Tensor:
        """See `TileNoise.fill`."""
        return torch.mm(self._rows(draw), self._columns(draw, draw.step // self.every), out=out)

    def move(
        self, draw: Draw, before: int | None, coefficient: float, lr: float, out: Tensor
    ) -> tuple[Tensor, float]:
        """See `TileNoise.move`."""
        if not self.remembers:
            return super().move(draw, before, coefficient, lr, out)
        kept, window = self._tile(draw).clone(), draw.step // self.every
        if before is not None and before // self.every != window:
            old, new = self._columns(draw, before // self.every), self._columns(draw, window)
            kept = kept @ (old @ new.t()) * (self._rank(draw.part) / new.shape[1])
        added = (1 - self.momentum) * coefficient
        self._next = kept.mul_(self.momentum).add_(self._rows(draw), alpha=added)
        return torch.mm(self._next, self._columns(draw, window), out=out), lr

    def moved(self, draw: Draw) -> None:
        """N of the tile is what it has moved by."""
        if self._next is not None:
            kept = self._tile(draw)
            self._undo.append((kept, kept.clone()))
            kept.copy_(self._next)
            self._next = None

    def keep(self) -> None:
        """See `TileNoise.keep`."""
        self._undo.clear()

    def discard(self) -> None:
        """See `TileNoise.discard`."""
        for kept, before in self._undo:
            kept.copy_(before)
        self._undo.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """N of every part."""
        return {name: value.cpu() for name, value in self._kept.items()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """See `TileNoise.load_state_dict`."""
        for name, kept in self._kept.items():
            kept.copy_(torch.as_tensor(state[name])) if state else kept.zero_()

    def _rank(self, part: Part) -> int:
        return min(self.rank, *part.shape)

    def _rows(self, draw: Draw) -> Tensor:
        """U of a tile, (rows, r)."""
        part, tile, seed, step = draw
        shape = (tile.rows, self._rank(part))
        out = self._scratch.take("weights.u", shape, torch.float32, part.device)
        return noise.tile_normal(seed, step, part.name, tile.first, out)

    def _columns(self, draw: Draw, window: int) -> Tensor:
        """V' / sqrt(r) of a part in the steps `window` * every ..., (r, columns)."""
        part, key = draw.part, (draw.part.name, draw.seed, window)
        if self._drawn is None or self._drawn[0] != key:
            rank = self._rank(part)
            shape = (rank, part.shape[1])
            drawn = noise.generator(draw.seed, "columns", window, part.name).standard_normal(shape, "float32")
            self._drawn = key, (torch.from_numpy(drawn) / math.sqrt(rank)).to(part.device)
        return self._drawn[1]

    def _tile(self, draw: Draw) -> Tensor:
        """N of a tile, a view."""
        return self._kept[draw.part.name][draw.part.rows(draw.tile)]


class LowRank(Dense):
    """The dequantized weights, along directions of low rank (LOZO, arXiv 2410.07698, algorithms 1 and 2).

    A direction of a weight (m, n) is D = U V' / sqrt(r), U (m, r) drawn at every step and V (n, r) every nu
    steps. With g the slope along D and b the momentum:

        W <- W - lr g D                                                  LOZO
        N <- b N + (1 - b) g U,    W <- W - lr N V' / sqrt(r)            LOZO-M

    The paper's direction is U V', divided by r in the move; its mu is ours over sqrt(r).
    """

    name = "lowrank"

    def __init__(
        self, *, noise_rank: int = 2, noise_every: int = 50, momentum: float = 0.0, **dense: Any
    ) -> None:
        """Nothing is changed before `attach`.

        Args:
            noise_rank: r, 1 or more.
            noise_every: nu, the steps after which V is drawn anew, 1 or more.
            momentum: b, from 0 (LOZO) to below 1 (LOZO-M, which keeps 4 r bytes a row).
            dense: arguments of `Dense`.

        Raises:
            UserError: if an argument is out of range.
        """
        super().__init__(**dense)
        check_noise(noise_rank, noise_every)
        if not 0.0 <= momentum < 1.0:
            raise UserError(f"--momentum: got {momentum!r}, allowed: a number of 0 or more, below 1")
        self.noise_rank, self.noise_every, self.momentum = noise_rank, noise_every, momentum

    def noise(self, model: Model) -> TileNoise:
        """Low-rank z."""
        return LowRankNoise(self.noise_rank, self.noise_every, self.momentum, model.scratch)


def check_noise(rank: int, every: int) -> None:
    """UserError unless both are 1 or more."""
    for flag, value in (("--noise-rank", rank), ("--noise-every", every)):
        if value < 1:
            raise UserError(f"{flag}: got {value!r}, allowed: a whole number of 1 or more")
