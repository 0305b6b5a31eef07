"""The small ones of the weights: Sparse-MeZO (arXiv 2402.15751, algorithm 1 and section 3.3).

    m = [|w| <= h],    theta +- mu (m * z),    theta <- theta - lr g (m * z)

with h for each layer such that a share of its weights is that small at the start. m is made of the weights
as they are whenever z is drawn, and never stored: it is the same in the forward passes of a step and in its
move, since a weight moves no sooner than that.

As published (the paper's sparsity is one minus the share, 0.75 to 0.8), except that h is found to a 4096th of
a layer's largest weight, so that no layer is sorted. z is 0 for most weights: nothing is learnt of curvature
from its squares, Sigma is the identity. A step costs two forwards, three with a curvature from losses, and
unpacks every tile once more for each draw; it holds one number a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hizoo_lite.arrays import Array
from hizoo_lite.errors import UserError
from hizoo_lite.model.model import Model
from hizoo_lite.model.scratch import Scratch
from hizoo_lite.spaces.dense import Dense
from hizoo_lite.spaces.weights import Draw, Part, Tile, TileNoise

#: Of the sizes of a layer's weights, from 0 to the largest.
BINS = 4096


class SmallNoise(TileNoise):
    """z where a weight is small, 0 elsewhere."""

    def __init__(self, share: float, scratch: Scratch) -> None:
        self.share, self._scratch = share, scratch
        self._limits: dict[str, Tensor] = {}  # h by part, () float32
        self._found: set[str] = set()  # the parts that have one

    def start(self, parts: Sequence[Part]) -> list[Tensor]:
        """h of every part, found when its block is present."""
        self._limits = {part.name: torch.zeros((), device=part.device) for part in parts}
        return list(self._limits.values())

    def fill(self, draw: Draw, out: Tensor) -> Tensor:
        """See `TileNoise.fill`."""
        part, z = draw.part, super().fill(draw, out)
        if part.name not in self._found:
            self._limits[part.name].copy_(self._limit(part))
            self._found.add(part.name)
        return z.mul_(self._sizes(part, draw.tile) <= self._limits[part.name])

    def state_dict(self) -> dict[str, Tensor]:
        """h of the parts that have one."""
        return {name: self._limits[name].cpu().view(1) for name in sorted(self._found)}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """See `TileNoise.load_state_dict`."""
        self._found = set(state)
        for name, value in state.items():
            self._limits[name].copy_(torch.as_tensor(value).view(()))

    def _limit(self, part: Part) -> Tensor:
        """The upper end of the first bins that have the share of a part's weights."""
        if part.device.type == "meta":
            return torch.zeros((), device=part.device)
        largest = torch.stack([self._sizes(part, tile).amax() for tile in part.tiles]).amax()
        counts = torch.zeros(BINS, dtype=torch.float64, device=part.device)
        for tile in part.tiles:
            counts += torch.histc(self._sizes(part, tile), BINS, 0.0, float(largest)).double()
        filled = int((counts.cumsum(0) < self.share * counts.sum()).sum()) + 1
        return largest * (filled / BINS)

    def _sizes(self, part: Part, tile: Tile) -> Tensor:
        """|w| of a tile, (rows, columns) float32, until the next one is asked for."""
        shape = (tile.rows, *part.shape[1:])
        out = self._scratch.take("weights.sizes", shape, torch.float32, part.device)
        part.linear.weight.values(out, tile.first)
        return out.abs_()


class Small(Dense):
    """The dequantized weights that are small (Sparse-MeZO, arXiv 2402.15751, algorithm 1 and section 3.3).

    Directions are m * z with m = [|w| <= h], made anew of the weights whenever z is drawn. The limit h is
    fixed for each layer so that a share of its weights is that small at the start; it is found to a 4096th of
    the layer's largest weight, which is our deviation. The paper's sparsity is one minus the share.
    """

    name = "small"

    def __init__(self, *, share: float = 0.25, **dense: Any) -> None:
        """Nothing is changed before `attach`.

        Args:
            share: of each layer's weights, above 0 and up to 1.
            dense: arguments of `Dense`.

        Raises:
            UserError: if an argument is out of range.
        """
        super().__init__(**dense)
        if not 0.0 < share <= 1.0:
            raise UserError(f"--small-share: got {share!r}, allowed: a number above 0 and up to 1")
        self.share = share

    def noise(self, model: Model) -> TileNoise:
        """z of small weights."""
        return SmallNoise(self.share, model.scratch)
