"""The one module that knows about branches: a linear layer over a packed weight.

The Hugging Face model runs unchanged on a batch of branches x rows; every linear layer in it is one of
these. The base product is computed for all branches together from one unpacking of the weight, in the
even/odd basis (see `basis.py`); the layer's `delta`, set by a space, adds what differs per branch.
Weights are unpacked in tiles of rows into one buffer that all layers share, and each tile is used while
it is in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hizoo_lite.base import LinearDelta
from hizoo_lite.branches import EVALUATION, Branches, BranchState
from hizoo_lite.device import like
from hizoo_lite.errors import UserError
from hizoo_lite.model.basis import gains
from hizoo_lite.model.everyrow import EveryRow
from hizoo_lite.model.fused import rebuild, split
from hizoo_lite.model.scratch import Scratch
from hizoo_lite.quant.packed import PackedWeight

#: Unpacked weight a tile holds at most. 2 to 8 MB keep a tile in the last-level cache of a CPU;
#: on a GPU larger tiles keep the products large.
TILE_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}


def on_existing(layer: Callable[[Tensor], Tensor], folded: Tensor, kept: Tensor | None) -> Tensor:
    """What a layer that treats every token alike gives, with zeros where padding is.

    folded: (branches, tokens, features). kept: the tokens that exist, see `BranchState.kept`; None: all.
    """
    if kept is None:
        return layer(folded)
    y = layer(folded.index_select(1, kept))
    out = torch.zeros(*folded.shape[:2], y.shape[-1], dtype=y.dtype, device=y.device)
    return out.index_copy_(1, kept, y)


class _Product(torch.autograd.Function):
    """`BranchLinear.shared_product` with a gradient: no tensor is kept for it, only the layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: BranchLinear, branches: Branches) -> Tensor:
        """x: (branches, tokens, in_features) float32 -> (..., out_features) float32."""
        ctx.layer = layer
        return layer.shared_product(x.detach(), branches)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x."""
        return ctx.layer.transposed_product(gradients[0]), None, None


class BranchLinear(nn.Module):
    """`y = x W' + bias (+ delta)` for every branch of the folded batch.

    weight: packed, (out_features, in_features). bias: (out_features,) float32 or None. compute: dtype of
    the product. Input and output are float32 whatever the compute dtype.
    """

    bias: Tensor | None

    def __init__(
        self,
        weight: PackedWeight,
        bias: Tensor | None,
        state: BranchState,
        compute: torch.dtype,
        scratch: Scratch,
        name: str,
    ) -> None:
        super().__init__()
        self.weight = weight
        weight.layer = name
        self.register_buffer("bias", bias)
        self.state = state
        self.compute = compute
        self.scratch = scratch
        self.name = name
        self.out_features, self.in_features = weight.shape
        self.delta: LinearDelta | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: (branches * rows, ..., in_features) -> (branches * rows, ..., out_features), float32."""
        branches = self.state.branches
        if not self.state.is_folded(x.shape):
            return self._of_all_rows(x)
        folded = x.float().reshape(branches.count, -1, self.in_features)
        kept = self.state.existing(x)
        y = on_existing(lambda part: self._layer(x, part, kept), folded, kept)
        return y.view(*x.shape[:-1], self.out_features)

    def _layer(self, x: Tensor, folded: Tensor, kept: Tensor | None) -> Tensor:
        """The layer's input, and its tokens that exist, (branches, tokens, in_features) -> their outputs."""
        branches = self.state.branches
        alike = self.state.same_in_all(x)
        if self.delta is not None:
            self.state.diverges(x)
            if self.delta.replaces_base:
                return self.delta.apply(folded, None, self.state)
        if folded.requires_grad and torch.is_grad_enabled():
            y = _Product.apply(folded, self, branches)
        elif alike and branches.count > 1:  # before the first trainable layer one product serves all branches
            y = self.shared_product(folded[:1], EVALUATION, x, kept).repeat(branches.count, 1, 1)
        else:
            y = self.shared_product(folded, branches, x, kept)
        if self.delta is not None:
            self.delta.apply(folded, y, self.state)
        return y

    def _of_all_rows(self, x: Tensor) -> Tensor:
        """x: (1, ..., in_features), the same for all rows, such as codes of relative positions.

        Gives (1, ..., out_features); if the branches differ, one for every folded row (see `EveryRow`).
        Raises `UserError` for inputs whose rows are elsewhere.
        """
        rows = self.state.rows
        if x.ndim < 3 or x.shape[0] != 1 or rows is None:
            raise UserError(
                f"model: {self.name} is given {tuple(x.shape)}, whose first axis is not that of the "
                f"{rows} rows; this architecture is not supported"
            )
        count = self.state.branches.count
        folded = x.float().reshape(1, -1, self.in_features)
        shape = (*x.shape[1:-1], self.out_features)
        if self.delta is not None:
            self.state.diverges(x)
            folded = folded.expand(count, -1, -1)
            if self.delta.replaces_base:
                return EveryRow.of(self.delta.apply(folded, None, self.state).view(count, *shape), rows)
        y = self.shared_product(folded[:1], EVALUATION)
        if self.delta is None:
            return y.view(1, *shape)
        y = self.delta.apply(folded, y.repeat(count, 1, 1), self.state)
        return EveryRow.of(y.view(count, *shape), rows)

    def shared_product(self, x: Tensor, branches: Branches, *sources: Tensor | None) -> Tensor:
        """x: (branches, tokens, in_features) float32 -> x W' + bias, (..., out_features) float32.

        sources: what x was made from, all of it, if that is known. The layer before this one may have been
        given the same (query, key and value are): the operands are there then.
        """
        gain = gains(self.compute, self.state.spread(branches))
        tokens = x.shape[1]
        operands = self.scratch.made(
            *("operands", tuple(x.shape), self.compute, x.device),
            lambda out: split(x, out, branches, gain),
            (branches, gain),
            *(sources or (x,)),
        )
        rows = operands.view(-1, self.in_features)
        y = torch.empty(branches.count, tokens, self.out_features, device=x.device)
        scale, bias = self.weight.row_scale, self.bias
        for first, tile in self._tiles(x.device):
            height = tile.shape[0]
            product = self.scratch.take("product", (rows.shape[0], height), self.compute, x.device)
            torch.mm(rows, tile.t(), out=product)
            part = slice(first, first + height)
            rebuild(
                product.view(branches.count, tokens, height),
                y[:, :, part],
                branches,
                gain,
                None if scale is None else scale[part],
                None if bias is None else bias[part],
            )
        return y

    def transposed_product(self, gradient: Tensor) -> Tensor:
        """The gradient of an input: (..., out_features) float32 -> (..., in_features) float32.

        Products are in the compute dtype, sums over tiles float32. Gradients are far smaller than what
        float16 holds: they are scaled to at most 1 before.
        """
        largest = gradient.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        rows = (gradient / largest).reshape(-1, self.out_features)
        if self.weight.row_scale is not None:
            rows = rows * self.weight.row_scale
        operands, out = rows.to(self.compute), torch.zeros(len(rows), self.in_features, device=rows.device)
        for first, tile in self._tiles(rows.device):
            out += operands[:, first : first + len(tile)] @ tile
        return (out * largest).view(*gradient.shape[:-1], self.in_features)

    def _tiles(self, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """First row and unpacked rows, (rows, in_features), tile by tile."""
        row_bytes = self.in_features * self.compute.itemsize
        height = max(64, TILE_BYTES[like(device)] // row_bytes // 64 * 64)
        ready = self.weight.ready(self.compute)
        for first in range(0, self.out_features, height):
            count = min(height, self.out_features - first)
            if ready is not None:
                yield first, ready[first : first + count]
            else:
                tile = self.scratch.take("weight", (count, self.in_features), self.compute, device)
                yield first, self.weight.unpack(tile, first)

    def extra_repr(self) -> str:
        """Shape, stored form and product dtype, for `print(model)`."""
        return f"{self.in_features} -> {self.out_features}, {self.weight.bits}, compute={self.compute}"
