"""A quantized weight with a bf16 difference beside it: codes never change, updates go into the difference.

The idiom of master weights in mixed precision (Micikevicius et al., 1710.03740), with the large part
shared: W + R is kept to 8 bits of R, which shrinks with the update it holds, for 2 bytes a weight.

The product rounds W + R to its dtype once, as that of any weight. That is right for the weight itself: the
rounding is the same in every branch and cancels in the differences of losses. It would be wrong for the
perturbation, which differs between the branches and is below that rounding; it stays a separate product
(`spaces/weights.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hizoo_lite.device import like
from hizoo_lite.noise import Uniform
from hizoo_lite.quant.opaque import Opaque
from hizoo_lite.quant.packed import PackedWeight, Stored
from hizoo_lite.quant.rounding import round_to_dtype
from hizoo_lite.quant.rows import check_out, row_chunks

#: Elements that are summed in float32 at a time: on a CPU they stay in the cache. On a GPU a chunk is three
#: to five launches, and 7 billion weights in a CPU's chunks would be 50 000 of them an unpacking.
SUM_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}


class ResidualWeight(Opaque, PackedWeight):
    """base: any stored form. residual: (out_features, in_features) bf16, zeros at first."""

    residual: Tensor

    def __init__(self, base: PackedWeight) -> None:
        super().__init__()
        self.base = base
        self.bits, self.shape = base.bits, base.shape
        device = base.stored()[0].tensor.device  # meta while the block is offloaded
        self.register_buffer("residual", torch.zeros(base.shape, dtype=torch.bfloat16, device=device))

    def unpack(self, out: Tensor, first_row: int = 0) -> Tensor:
        """Write base + residual of rows `first_row` .. into `out`, summed in float32 and cast once."""
        check_out(out, self.shape, first_row)
        if out.dtype == torch.float32:
            return self._sum(out, first_row)
        elements = SUM_ELEMENTS[like(out.device)]
        for start, stop in row_chunks(out.shape[0], out.shape[1], 1, elements):
            chunk = torch.empty(stop - start, out.shape[1], device=out.device)
            out[start:stop] = self._sum(chunk, first_row + start)
        return out

    def values(self, out: Tensor, first_row: int = 0) -> Tensor:
        """As `unpack`: nothing is left out."""
        return self._sum(out, first_row)

    def store(self, values: Tensor, first_row: int, rounding: Uniform) -> None:
        """Put values - base into the residual, rounded at random."""
        base = self.base.values(torch.empty_like(values), first_row)
        rows = self.residual[first_row : first_row + values.shape[0]]
        rows.copy_(round_to_dtype(torch.sub(values, base, out=base), torch.bfloat16, rounding))

    def stored(self) -> list[Stored]:
        """Those of the base, and the residual."""
        return [*self.base.stored(), Stored(self, "residual", None)]

    def _sum(self, out: Tensor, first_row: int) -> Tensor:
        return self.base.values(out, first_row).add_(self.residual[first_row : first_row + out.shape[0]])
