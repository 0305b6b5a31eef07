"""Linear layers as they are traced: their product is an operator that takes the stored form as it is.

| stored form | operator | exact |
|---|---|---|
| NF4, FP4 | com.microsoft MatMulBnb4 | decoded to the same float32 values |
| int8 | com.microsoft MatMulNBits | to float32 rounding |
| 16/32 bits | Cast, com.microsoft FusedMatMul | as stored |
| any, with a bf16 difference | that of the codes, and FusedMatMul | W x + R x: as stored, in another order |

In the format "fast" 4-bit weights are coded anew, evenly and in short blocks, for MatMulNBits, which
onnxruntime multiplies in its stored form; it and int8 round activations to 8 bits (accuracy_level 4).

A layer has no weights while it is traced, only `Part`s that say how each one looks and how it is read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from typing import Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hizoo_lite.quant import FourBitWeight, Int8Weight, ResidualWeight
from hizoo_lite.quant.packed import PackedWeight
from hizoo_lite.quant.rows import row_chunks

Format = Literal["exact", "fast"]

#: MatMulNBits computes in float32 at level 0; at 4 it quantizes the activations to 8 bits.
_ACCURACY_LEVEL: dict[Format, int] = {"exact": 0, "fast": 4}
#: Codes that share a scale in MatMulNBits: a row's scale is repeated for each, rows are padded to them.
NBITS_BLOCK = 128
#: 4-bit codes that share a scale and a zero point if they are made anew.
RECODED_BLOCK = 32
_TOP = 15  # the largest of them
#: The largest block that MatMulBnb4 takes. A longer one is written as several with the same absmax.
_LARGEST_BLOCK = 256
#: A tile of a 16-bit matrix, in float32.
TILE_BYTES = 64 << 20
_QUANT_TYPE = {"fp4": 0, "nf4": 1}

#: A weight with its values, from wherever they are.
ReadWeight = Callable[[], PackedWeight]


class Part(NamedTuple):
    """A tensor of the exported model that is read when it is written, and then dropped."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    shared: Hashable = None  # parts of the same value, other than None, are one tensor


class Product(nn.Module, ABC):
    """`x W'` of one stored form. `parts` are its buffers; `operator` is what export.json says of it."""

    operator: str
    parts: Mapping[str, Part]

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features), float32."""


@final
class FourBitProduct(Product):
    """codes: (ceil(out * in / 2),) uint8. absmax: (blocks,) float32, not quantized itself."""

    codes: Tensor
    absmax: Tensor
    operator = "MatMulBnb4"

    def __init__(self, weight: FourBitWeight, read: ReadWeight) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.block = min(weight.blocksize, _LARGEST_BLOCK)
        self.attributes = {"K": columns, "N": rows, "block_size": self.block}
        self.attributes["quant_type"] = _QUANT_TYPE[weight.bits]
        blocks = -(-rows * columns // self.block)
        self.parts = {
            "codes": Part(tuple(weight.codes.shape), torch.uint8, lambda: four_bit(read()).codes),
            "absmax": Part((blocks,), torch.float32, lambda: _scales(four_bit(read()), blocks)),
        }

    def forward(self, x: Tensor) -> Tensor:
        """See `Product`."""
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulBnb4",
            (x, self.codes, self.absmax),
            dict(self.attributes),
            dtype=torch.float32,
            shape=(*x.shape[:-1], self.attributes["N"]),
            version=1,
        )


@final
class Int8Product(Product):
    """codes: (out, blocks, block) uint8 around 128. scales: (out * blocks,) float32, of one code's step."""

    codes: Tensor
    scales: Tensor
    operator = "MatMulNBits"

    def __init__(self, weight: Int8Weight, read: ReadWeight, format: Format) -> None:
        super().__init__()
        rows, columns = weight.shape
        blocks = -(-columns // NBITS_BLOCK)
        self.attributes = {"K": columns, "N": rows, "bits": 8, "block_size": NBITS_BLOCK}
        self.attributes["accuracy_level"] = _ACCURACY_LEVEL[format]
        self.parts = {
            "codes": Part((rows, blocks, NBITS_BLOCK), torch.uint8, lambda: _padded_codes(int8(read()))),
            "scales": Part(
                (rows * blocks,),
                torch.float32,
                lambda: (int8(read()).scb / 127).repeat_interleave(blocks),
            ),
        }

    def forward(self, x: Tensor) -> Tensor:
        """See `Product`."""
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.codes, self.scales),
            dict(self.attributes),
            dtype=torch.float32,
            shape=(*x.shape[:-1], self.attributes["N"]),
            version=1,
        )


@final
class RecodedProduct(Product):
    """4-bit weights on an even grid with a zero point in every block of a row; not the values they were.

    codes: (out, blocks, 16) uint8, two each, the first one low. scales: (out * blocks,) float32.
    zeros: (out * ceil(blocks / 2),) uint8, packed likewise in every row.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    operator = "MatMulNBits"

    def __init__(self, shape: tuple[int, int], read: ReadWeight) -> None:
        super().__init__()
        rows, columns = shape
        blocks = -(-columns // RECODED_BLOCK)
        self.attributes = {"K": columns, "N": rows, "bits": 4, "block_size": RECODED_BLOCK}
        self.attributes["accuracy_level"] = _ACCURACY_LEVEL["fast"]
        self.parts = {
            "codes": Part((rows, blocks, RECODED_BLOCK // 2), torch.uint8, lambda: recode(read()).codes),
            "scales": Part((rows * blocks,), torch.float32, lambda: recode(read()).scales),
            "zeros": Part((rows * -(-blocks // 2),), torch.uint8, lambda: recode(read()).zeros),
        }

    def forward(self, x: Tensor) -> Tensor:
        """See `Product`."""
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.codes, self.scales, self.zeros),
            dict(self.attributes),
            dtype=torch.float32,
            shape=(*x.shape[:-1], self.attributes["N"]),
            version=1,
        )


@final
class PlainProduct(Product):
    """weight: (out, in) bf16, fp16 or float32.

    A large one is cast and multiplied in tiles of rows, so that no whole copy in float32 is needed. Where a
    tile begins depends on the product before it: onnxruntime would cut out all of them ahead of everything
    else (250 MiB of a head of 32 000 x 4096). `is_whole`: in one piece, which a session casts once.
    """

    weight: Tensor
    operator = "FusedMatMul"

    def __init__(self, weight: Part, is_whole: bool = False) -> None:
        super().__init__()
        self.parts = {"weight": weight}
        rows, columns = weight.shape
        as_it_is = is_whole or weight.dtype == torch.float32
        height = rows if as_it_is else max(1, TILE_BYTES // (4 * columns))
        self.tiles = [(first, min(first + height, rows)) for first in range(0, rows, height)]

    def forward(self, x: Tensor) -> Tensor:
        """See `Product`."""
        if len(self.tiles) == 1:
            return _transposed_product(x, self.weight.float())
        products = [x]
        for first, last in self.tiles:
            tile = _rows_after(products[-1], self.weight, first, last)
            products.append(_transposed_product(x, tile.float()))
        return torch.cat(products[1:], dim=-1)


@final
class SumProduct(Product):
    """The codes' product and that of the difference beside them."""

    def __init__(self, codes: Product, residual: Part) -> None:
        super().__init__()
        self.parts = {}
        self.codes, self.residual = codes, PlainProduct(residual)
        self.operator = f"{codes.operator} + {self.residual.operator}"

    def forward(self, x: Tensor) -> Tensor:
        """See `Product`."""
        return self.codes(x) + self.residual(x)


def _rows_after(before: Tensor, weight: Tensor, first: int, last: int) -> Tensor:
    """Rows first .. last of a matrix, cut out once `before` is there."""
    nothing = torch.onnx.ops.symbolic(
        "Shape", (before,), {"start": 0, "end": 1}, dtype=torch.int64, shape=(1,)
    )
    bounds = (nothing * 0 + first, torch.tensor([last]), torch.tensor([0]))
    return torch.onnx.ops.symbolic(
        "Slice", (weight, *bounds), dtype=weight.dtype, shape=(last - first, weight.shape[1])
    )


def _transposed_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W', without a transposed copy of W."""
    return torch.onnx.ops.symbolic(
        "com.microsoft::FusedMatMul",
        (x, weight),
        {"transB": 1},
        dtype=torch.float32,
        shape=(*x.shape[:-1], weight.shape[0]),
        version=1,
    )


class Recoded(NamedTuple):
    """A matrix as `RecodedProduct` has it."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor


def recode(weight: PackedWeight) -> Recoded:
    """A weight's values on an even grid from the least to the largest of each block, a few rows at a time."""
    rows, columns = weight.shape
    blocks = -(-columns // RECODED_BLOCK)
    codes = torch.empty(rows, blocks, RECODED_BLOCK // 2, dtype=torch.uint8)
    scales, zeros = torch.empty(rows, blocks), torch.zeros(rows, blocks + blocks % 2, dtype=torch.uint8)
    for start, stop in row_chunks(rows, columns, multiple=1):
        values = weight.values(torch.empty(stop - start, columns), start)
        values = F.pad(values, (0, blocks * RECODED_BLOCK - columns)).view(-1, blocks, RECODED_BLOCK)
        low, high = values.amin(-1, keepdim=True).clamp(max=0), values.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / _TOP).clamp(min=torch.finfo(torch.float32).tiny)
        zero = (-low / scale).round_()
        chosen = (values / scale).round_().add_(zero).clamp_(0, _TOP).to(torch.uint8)
        codes[start:stop] = _pairs(chosen)
        scales[start:stop] = scale.squeeze(-1)
        zeros[start:stop, :blocks] = zero.squeeze(-1).to(torch.uint8)
    return Recoded(codes, scales.view(-1), _pairs(zeros).view(-1))


def _pairs(codes: Tensor) -> Tensor:
    """Two codes a byte along the last dimension, the first one in the low bits."""
    return codes[..., ::2] | codes[..., 1::2] << 4


class InputValues:
    """What the graph is given at every run beside its tokens, while it is traced: tensors by name."""

    def __init__(self) -> None:
        self.values: Mapping[str, Tensor] = {}


class ExportLinear(nn.Module):
    """`y = x W' + bias`, or what its `delta` makes of that. bias: (out_features,) float32 or None."""

    bias: Tensor | None

    def __init__(self, name: str, product: Product, bias: Part | None) -> None:
        super().__init__()
        self.name, self.product = name, product
        self.parts = {} if bias is None else {"bias": bias}
        self.delta: Callable[[Tensor, ExportLinear], Tensor] | None = None
        if bias is None:
            self.register_buffer("bias", None)

    def base(self, x: Tensor) -> Tensor:
        """The product of the stored weight: (..., in_features) -> (..., out_features), float32."""
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features), float32."""
        return self.base(x) if self.delta is None else self.delta(x, self)


@final
class AdapterDelta:
    """Adds x A B; A: (in, rank) and B: (rank, out) are inputs, alpha / rank is in B. Rank 0 adds nothing."""

    def __init__(self, inputs: InputValues) -> None:
        self.inputs = inputs

    def __call__(self, x: Tensor, linear: ExportLinear) -> Tensor:
        a, b = (self.inputs.values[name] for name in lora_inputs(linear.name))
        return linear.base(x) + torch.matmul(torch.matmul(x, a), b)


@final
class HeadDelta:
    """A layer that adapters bring along in full: weight (out, in) and bias (out,) are inputs."""

    def __init__(self, inputs: InputValues) -> None:
        self.inputs = inputs

    def __call__(self, x: Tensor, linear: ExportLinear) -> Tensor:
        values = self.inputs.values
        return F.linear(x, values[f"{linear.name}.weight"], values.get(f"{linear.name}.bias"))


def lora_inputs(linear: str) -> tuple[str, str]:
    """The names of a linear layer's adapter inputs."""
    return f"{linear}.lora_A", f"{linear}.lora_B"


def four_bit(weight: PackedWeight) -> FourBitWeight:
    """The weight, known to be in 4 bits."""
    assert isinstance(weight, FourBitWeight)
    return weight


def residual(weight: PackedWeight) -> ResidualWeight:
    """The weight, known to have a difference beside it."""
    assert isinstance(weight, ResidualWeight)
    return weight


def int8(weight: PackedWeight) -> Int8Weight:
    """The weight, known to be in 8 bits."""
    assert isinstance(weight, Int8Weight)
    return weight


def _scales(weight: FourBitWeight, blocks: int) -> Tensor:
    return weight.scales().repeat_interleave(-(-weight.blocksize // _LARGEST_BLOCK))[:blocks]


def _padded_codes(weight: Int8Weight) -> Tensor:
    rows, columns = weight.shape
    blocks = -(-columns // NBITS_BLOCK)
    codes = torch.full((rows, blocks * NBITS_BLOCK), 128, dtype=torch.uint8)
    codes[:, :columns] = weight.codes.view(torch.uint8) ^ 128  # two's complement, shifted by 128
    return codes.view(rows, blocks, NBITS_BLOCK)
