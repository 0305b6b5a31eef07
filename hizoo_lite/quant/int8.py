"""A weight matrix in the form of LLM.int8: one int8 code an element, one absmax a row.

LLM.int8 2208.07339, section 2.1 (absmax quantization by row). Ours deviates from bitsandbytes' layer in
the forward: activations are not quantized and no outlier columns are picked over the batch, so branches
that share a batch cannot influence each other. The codes are multiplied as they are (int8 is exact in
bf16, fp16 and float32) and the row's scale is applied to the product.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hizoo_lite.device import is_gpu
from hizoo_lite.errors import UserError
from hizoo_lite.noise import Uniform
from hizoo_lite.quant import native
from hizoo_lite.quant.opaque import Opaque
from hizoo_lite.quant.packed import PackedWeight, Stored
from hizoo_lite.quant.rounding import grow, uniform
from hizoo_lite.quant.rows import RowReader, check_finite, check_out, row_chunks


class Int8Weight(Opaque, PackedWeight):
    """codes: (out_features, in_features) int8. scb: (out_features,) float32, each row's absmax."""

    codes: Tensor
    scb: Tensor

    def __init__(self, codes: Tensor, scb: Tensor) -> None:
        """Raises ValueError if sizes or dtypes are wrong."""
        super().__init__()
        if codes.ndim != 2 or codes.dtype != torch.int8 or scb.numel() != codes.shape[0]:
            raise ValueError(
                f"8-bit weight: (out, in) int8 codes and one absmax a row wanted, got {tuple(codes.shape)} "
                f"{codes.dtype} and {scb.numel()}"
            )
        self.bits = "int8"
        self.shape = (codes.shape[0], codes.shape[1])
        self.register_buffer("codes", codes)
        self.register_buffer("scb", scb.view(-1).float())

    @classmethod
    def quantize(
        cls,
        read: RowReader,
        shape: tuple[int, int],
        *,
        name: str = "weight",
    ) -> Int8Weight:
        """Quantize row chunk by row chunk, from float16 as bitsandbytes does; rows are independent.

        Raises `UserError`, naming `name`, if values are not finite or too large for float16.
        """
        codes = torch.empty(shape, dtype=torch.int8)
        scb = torch.empty(shape[0], dtype=torch.float32)
        for start, stop in row_chunks(*shape, multiple=1):
            rows = read(start, stop).to(device="cpu", dtype=torch.float16).contiguous()
            codes[start:stop], scb[start:stop] = native.quantize_int8(rows)
        check_finite(scb, name, "float16")
        return cls(codes, scb)

    @classmethod
    def from_checkpoint(cls, tensors: Mapping[str, Tensor], name: str = "weight") -> Int8Weight:
        """Take over weight (int8) and SCB of one layer that bitsandbytes saved, without its prefix.

        Raises `UserError`, naming `name`, on other storage formats than row-major, or wrong tensors.
        """
        layout = tensors.get("weight_format")
        if layout is not None and int(layout.max()) != 0:
            raise UserError(f"{name}: weight_format {int(layout.max())}; allowed is 0 (row-major)")
        if "weight" not in tensors or "SCB" not in tensors:
            raise UserError(f"{name}: weight and SCB wanted, got {sorted(tensors)}")
        try:
            return cls(tensors["weight"], tensors["SCB"])
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error

    def unpack(self, out: Tensor, first_row: int = 0) -> Tensor:
        """Write the codes / 128 of rows `first_row` .. into `out` (rows, in_features), exactly.

        The scale is left out; the power of two keeps fp16 products in range.
        """
        check_out(out, self.shape, first_row)
        codes = self.codes[first_row : first_row + out.shape[0]]
        if is_gpu(out.device):
            return torch.mul(codes, 1 / 128, out=out)  # 3 bytes a weight moved in place of 7
        return out.copy_(codes).mul_(1 / 128)  # on a CPU that takes a fifth of the time

    def store(self, values: Tensor, first_row: int, rounding: Uniform) -> None:
        """See `PackedWeight.store`. A row's absmax grows if a value exceeds it (see `rounding.grow`)."""
        rows = slice(first_row, first_row + values.shape[0])
        step = self.row_scale[rows, None] / 128  # as `values` decodes
        inside, top = grow(values, step * 127, rounding)
        grown = top != step * 127
        scb = torch.where(grown, top, self.scb[rows, None])
        step = scb * (128.0 / 127.0) / 128
        lower = (inside / step.clamp(min=torch.finfo(torch.float32).tiny)).floor_().clamp_(-127, 126)
        low = lower * step
        chance = inside.sub_(low).div_(((lower + 1) * step).sub_(low))
        codes = lower.add_(uniform(values, rounding) < chance).to(torch.int8)
        self.scb[rows] = scb.squeeze(1)
        self.codes[rows] = codes

    def stored(self) -> list[Stored]:
        """Codes and the rows' absmax."""
        return [Stored(self, "codes", "weight"), Stored(self, "scb", "SCB")]

    @property
    def row_scale(self) -> Tensor:
        """(out_features,) float32: what the codes' product is multiplied by."""
        return self.scb * (128.0 / 127.0)
