"""Training the dequantized weights themselves: MeZO's and HiZOO's full tuning, on a quantized model.

A step moves every weight by less than its grid can hold, so the update is rounded to the grid at random and
without bias ("requantize", as QuZO 2502.12346 but from the true value rather than between integers), or
kept in a bf16 difference beside the codes ("residual", 2 bytes a weight, far less noise).

Requantizing has a price that no learning rate removes. Moving a weight by u between neighbours a step apart
adds a variance of up to u * step, so a step adds about lr |g| step tr(H) / 2 to the loss, while it takes off
about lr |gradient|^2: both are proportional to lr. On a 4-bit grid the noise wins in the end (tools/LOG.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hizoo_lite.errors import UserError
from hizoo_lite.model.linear import BranchLinear
from hizoo_lite.model.model import Model
from hizoo_lite.noise import Uniform
from hizoo_lite.quant import FourBitWeight, ResidualWeight
from hizoo_lite.quant.packed import Stored
from hizoo_lite.spaces.heads import HeadMode
from hizoo_lite.spaces.inplace import InPlaceSpace, with_own_scales
from hizoo_lite.spaces.targets import Blocks
from hizoo_lite.spaces.weights import Factors, Part, Tile


class DensePart(Part):
    """The whole weight, (out_features, in_features)."""

    def __init__(self, linear: BranchLinear, device: torch.device) -> None:
        super().__init__(linear, "weight", torch.Size(linear.weight.shape), device)

    def rows(self, tile: Tile) -> slice:
        """Those of the tile."""
        return slice(tile.first, tile.first + tile.rows)

    def operand(self, z: Tensor, factors: Factors, tile: Tile) -> tuple[Tensor, Tensor]:
        """z itself; Sigma's row factor goes to the product."""
        matrix = z
        if self.linear.compute != torch.float32:
            matrix = self.linear.scratch.take("weights.tile", tuple(z.shape), self.linear.compute, z.device)
            matrix.copy_(z)
        return matrix, self._row_factor(factors, tile).squeeze(-1)

    def move(
        self, z: Tensor, factors: Factors, tile: Tile, amount: float, decay: float, rounding: Uniform
    ) -> None:
        """Decode, add, store."""
        values = self.linear.scratch.take("weights.values", tuple(z.shape), torch.float32, z.device)
        self.linear.weight.values(values, tile.first)
        if decay:
            values.mul_(1 - decay)
        direction = z.mul_(self._row_factor(factors, tile))
        if factors.columns is not None:
            direction.mul_(factors.columns)
        self.linear.weight.store(values.add_(direction, alpha=-amount), tile.first, rounding)

    def changed(self) -> list[Stored]:
        """The residual and the float32 scales that it is beside, else everything."""
        stored = self.linear.weight.stored()
        if not isinstance(self.linear.weight, ResidualWeight):
            return stored
        has_own_scales = not any(s.name == "nested_absmax" for s in stored)
        return [s for s in stored if s.name == "residual" or (s.name == "absmax" and has_own_scales)]

    def reconcile(self, saved: dict[str, Tensor], into: dict[str, Tensor], where: str) -> None:
        """Scales beside a residual never change; a model that has them in 8 bits must decode to the same."""
        weight, name = self.linear.weight, f"{self.linear.name}.absmax"
        if not isinstance(weight, ResidualWeight) or (name in saved) == (name in into):
            return
        into.pop(name, None)
        scales = saved.pop(name, None)
        if scales is None or not isinstance(weight.base, FourBitWeight):
            return
        if not torch.equal(weight.base.scales().cpu(), scales):
            raise UserError(f"{where}: {name} differs from the model's: it was made for another one")

    def _row_factor(self, factors: Factors, tile: Tile) -> Tensor:
        """(rows, 1), or (1,) if there is one value for all rows."""
        return factors.rows[self.rows(tile)] if factors.rows.ndim == 2 else factors.rows.view(1)


class Dense(InPlaceSpace):
    """The dequantized weights of chosen linear layers: full tuning of a quantized model.

    Updates are smaller than a step of the grid of the codes, so they go into a bf16 matrix beside them, 2
    bytes a weight, or are rounded to the grid at random and without bias (after QuZO, arXiv 2502.12346).

    Example:
        >>> Dense(targets=["q_proj"], update="requantize").update
        'requantize'
    """

    name = "dense"

    def __init__(
        self,
        targets: str | Sequence[str] = "all-linear",
        update: Literal["requantize", "residual"] = "residual",
        head: HeadMode | None = None,
        blocks: Blocks = "all",
    ) -> None:
        """Nothing is changed before `attach`.

        Args:
            targets: as of `LoRA`; by default all linear layers.
            update: "residual" adds a bf16 matrix to each weight; "requantize" changes the stored codes and
                scales, which in 4 bits adds more noise than a long run can bear (tools/LOG.md).
            head: as of `LoRA`, without rows for label words.
            blocks: how many blocks are trained, from the top, or "all".

        Raises:
            UserError: if update or head is not one of these.
        """
        super().__init__(targets, head, blocks)
        if update not in ("requantize", "residual"):
            raise UserError(f"--dense-update: got {update!r}, allowed are requantize, residual")
        self.update, self.needs_own_scales = update, update == "requantize"

    def options(self) -> dict[str, Any]:
        """The kind of update."""
        return {"update": self.update}

    def part(self, model: Model, linear: BranchLinear) -> DensePart:
        """The weight, with a residual or with scales in float32, which can grow."""
        has_residual = isinstance(linear.weight, ResidualWeight)
        if has_residual and self.update == "requantize":
            raise UserError(f"--dense-update: {linear.name} has a residual already; load the model anew")
        offloaded = model.residency.name == "disk"
        if (
            self.update == "requantize" or not offloaded
        ):  # so that what is saved says all of the weight's scales
            with_own_scales(linear)
        if self.update == "residual" and not has_residual:
            linear.weight = ResidualWeight(linear.weight)
        return DensePart(linear, model.device)
