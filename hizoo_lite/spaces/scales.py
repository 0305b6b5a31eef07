"""QZO (arXiv 2505.13430): only the scales of a quantized model are trained; its codes stay.

The scales are absmax: one a block of 4-bit weights, one a row of 8-bit weights. A branch uses
absmax + k*mu*d, with k its point's offset; the matrix of its perturbation is the same codes decoded with d in
place of absmax. Scales stay at 1e-7 or above, and the projected gradient is clipped to 100 by default (the
stepper does that), as in the paper. We add what it leaves out: double quantization is undone, and Sigma is
learnt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hizoo_lite.errors import UserError
from hizoo_lite.model.linear import BranchLinear
from hizoo_lite.model.model import Model
from hizoo_lite.noise import Uniform
from hizoo_lite.quant import FourBitWeight, Int8Weight
from hizoo_lite.quant.packed import Stored
from hizoo_lite.spaces.inplace import InPlaceSpace, with_own_scales
from hizoo_lite.spaces.weights import Factors, Part, Tile

#: No scale becomes smaller.
LEAST = 1e-7


class ScalesPart(Part):
    """absmax of every block or row, (blocks,) or (out_features,)."""

    def __init__(self, linear: BranchLinear, device: torch.device) -> None:
        assert isinstance(linear.weight, FourBitWeight | Int8Weight)
        self.buffer = "absmax" if isinstance(linear.weight, FourBitWeight) else "scb"
        super().__init__(linear, "absmax", linear.weight.get_buffer(self.buffer).shape, device)

    def rows(self, tile: Tile) -> slice:
        """The blocks of a tile's rows; the rows themselves for 8 bits."""
        if isinstance(self.linear.weight, FourBitWeight):
            return self.linear.weight.blocks(tile.first, tile.rows)
        return slice(tile.first, tile.first + tile.rows)

    def operand(self, z: Tensor, factors: Factors, tile: Tile) -> tuple[Tensor, Tensor]:
        """The tile's codes, decoded with d. 8-bit codes are exact and d is their row factor."""
        weight, linear = self.linear.weight, self.linear
        d = z.mul_(self._factor(factors, tile))
        shape = (tile.rows, linear.in_features)
        out = linear.scratch.take("weights.tile", shape, linear.compute, z.device)
        if isinstance(weight, FourBitWeight):
            return weight.unpack_with(d, out, tile.first), torch.ones((), device=z.device)
        return weight.unpack(out, tile.first), d * (128.0 / 127.0)

    def move(
        self, z: Tensor, factors: Factors, tile: Tile, amount: float, decay: float, rounding: Uniform
    ) -> None:
        """In float32; nothing is rounded."""
        scales = self.linear.weight.get_buffer(self.buffer)[self.rows(tile)]
        moved = scales * (1 - decay) if decay else scales.clone()
        scales.copy_(moved.add_(z.mul_(self._factor(factors, tile)), alpha=-amount).clamp_(min=LEAST))

    def changed(self) -> list[Stored]:
        """The scales."""
        return [stored for stored in self.linear.weight.stored() if stored.name == self.buffer]

    def _factor(self, factors: Factors, tile: Tile) -> Tensor:
        return factors.rows[self.rows(tile)] if factors.rows.ndim else factors.rows


class Scales(InPlaceSpace):
    """The scales of the quantized weights of chosen linear layers (QZO, arXiv 2505.13430); codes stay.

    They are absmax: one a block of 4-bit weights, one a row of 8-bit weights. They stay at 1e-7 or above, and
    the projected gradient is clipped to 100, as in the paper; double quantization is undone, which the paper
    leaves out.
    """

    name = "scales"
    clip = 100.0  # as QZO has it

    def part(self, model: Model, linear: BranchLinear) -> ScalesPart:
        """The scales of a layer's weight, in float32. UserError if it has none."""
        if not isinstance(linear.weight, FourBitWeight | Int8Weight):
            raise UserError(
                f"--space scales: {linear.name} has no scales to train; allowed: --bits nf4, fp4 or int8"
            )
        with_own_scales(linear)
        return ScalesPart(linear, model.device)
