"""A weight matrix as it is, in 16 or 32 bits: heads, and every layer of a run with `bits="none"`."""

from __future__ import annotations

import torch
from torch import Tensor

from hizoo_lite.noise import Uniform
from hizoo_lite.quant.opaque import Opaque
from hizoo_lite.quant.packed import PackedWeight, Stored
from hizoo_lite.quant.rounding import round_to_dtype
from hizoo_lite.quant.rows import check_out


class PlainWeight(Opaque, PackedWeight):
    """weight: (out_features, in_features) bf16, fp16 or float32. The tensor is shared, not copied."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        """Raises ValueError for other dtypes or another number of dimensions."""
        super().__init__()
        if weight.ndim != 2 or weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(
                f"weight: (out, in) in bfloat16, float16 or float32 wanted, got {tuple(weight.shape)} "
                f"{weight.dtype}"
            )
        self.bits = "none"
        self.shape = (weight.shape[0], weight.shape[1])
        self.register_buffer("weight", weight.detach())

    def unpack(self, out: Tensor, first_row: int = 0) -> Tensor:
        """Cast rows `first_row` .. into `out` (rows, in_features)."""
        check_out(out, self.shape, first_row)
        return out.copy_(self.weight[first_row : first_row + out.shape[0]])

    def ready(self, dtype: torch.dtype) -> Tensor | None:
        """The stored matrix if its dtype is `dtype`."""
        return self.weight if self.weight.dtype == dtype else None

    def store(self, values: Tensor, first_row: int, rounding: Uniform) -> None:
        """See `PackedWeight.store`: exact in float32, to a neighbour at random in 16 bits."""
        rows = self.weight[first_row : first_row + values.shape[0]]
        exact = rows.dtype == torch.float32
        rows.copy_(values if exact else round_to_dtype(values, rows.dtype, rounding))

    def stored(self) -> list[Stored]:
        """The matrix."""
        return [Stored(self, "weight", "weight")]
