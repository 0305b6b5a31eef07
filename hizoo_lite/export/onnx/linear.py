"""Linear layers as they are traced: their product is an operator that takes the stored form as it is.

| stored form | operator | exact |
|---|---|---|
| NF4, FP4 | com.microsoft MatMulBnb4 | decoded to the same float32 values |
| int8 | com.microsoft MatMulNBits, accuracy_level 0 or 4 | to float32 rounding; at 4 activations in 8 bits |
| 16/32 bits | Cast, com.microsoft FusedMatMul | as stored |

A layer has no weights while it is traced, only `Part`s that say how each one looks and how it is read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from typing import Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hizoo_lite.base import PackedWeight
from hizoo_lite.quant import FourBitWeight, Int8Weight

Int8Mode = Literal["exact", "fast"]

#: MatMulNBits computes in float32 at level 0; at 4 it quantizes the activations to 8 bits.
_ACCURACY_LEVEL: dict[Int8Mode, int] = {"exact": 0, "fast": 4}
#: Codes that share a scale in MatMulNBits: a row's scale is repeated for each, rows are padded to them.
NBITS_BLOCK = 128
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

    def __init__(self, weight: Int8Weight, read: ReadWeight, mode: Int8Mode) -> None:
        super().__init__()
        rows, columns = weight.shape
        blocks = -(-columns // NBITS_BLOCK)
        self.attributes = {"K": columns, "N": rows, "bits": 8, "block_size": NBITS_BLOCK}
        self.attributes["accuracy_level"] = _ACCURACY_LEVEL[mode]
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
class PlainProduct(Product):
    """weight: (out, in) bf16, fp16 or float32.

    A large one is cast and multiplied in tiles of rows, so that no whole copy in float32 is needed.
    """

    weight: Tensor
    operator = "FusedMatMul"

    def __init__(self, weight: Part) -> None:
        super().__init__()
        self.parts = {"weight": weight}
        rows, columns = weight.shape
        height = rows if weight.dtype == torch.float32 else max(1, TILE_BYTES // (4 * columns))
        self.tiles = [(first, min(first + height, rows)) for first in range(0, rows, height)]

    def forward(self, x: Tensor) -> Tensor:
        """See `Product`."""
        if len(self.tiles) == 1:
            return _transposed_product(x, self.weight.float())
        return torch.cat([_transposed_product(x, self.weight[i:j].float()) for i, j in self.tiles], dim=-1)


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
