"""From a full-precision matrix, or from tensors that bitsandbytes saved, to a `PackedWeight`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor

from hizoo_lite.base import Bits
from hizoo_lite.errors import UserError
from hizoo_lite.quant.fourbit import FourBitWeight
from hizoo_lite.quant.int8 import Int8Weight
from hizoo_lite.quant.packed import PackedWeight
from hizoo_lite.quant.plain import PlainWeight
from hizoo_lite.quant.rows import RowReader, row_chunks


def pack(weight: Tensor, bits: Bits, *, double_quant: bool = True, name: str = "weight") -> PackedWeight:
    """Quantize a (out_features, in_features) matrix on its device. `bits="none"` shares the tensor.

    Codes and statistics are bit-identical to bitsandbytes' (block size 64; int8 by row from float16).
    Raises `UserError` for unknown bits, and for values that are not finite.
    """
    if bits == "none":
        return PlainWeight(weight)
    shape = (weight.shape[0], weight.shape[1])
    return pack_rows(
        lambda start, stop: weight[start:stop],
        shape,
        bits,
        dtype=weight.dtype,
        double_quant=double_quant,
        device=weight.device,
        name=name,
    )


def pack_rows(
    read: RowReader,
    shape: tuple[int, int],
    bits: Bits,
    *,
    dtype: torch.dtype,
    double_quant: bool = True,
    device: torch.device | str = "cpu",
    name: str = "weight",
) -> PackedWeight:
    """Like `pack`, reading the matrix a few rows at a time; the result is the same and lies on `device`.

    dtype: what `bits="none"` stores. Beside the result only one chunk of rows is held.

    Quantized on the CPU, whatever `device` is: bitsandbytes' CUDA kernels divide with fewer bits, so that up
    to 3e-4 of the codes of int8 would differ, and losses would depend on where a block is kept.
    """
    if torch.device(device).type == "meta":  # a model that is only planned
        return _empty(shape, bits, dtype, double_quant, torch.device(device))
    if bits == "nf4" or bits == "fp4":
        return FourBitWeight.quantize(read, shape, bits, double_quant=double_quant, name=name).to(device)
    if bits == "int8":
        return Int8Weight.quantize(read, shape, name=name).to(device)
    if bits != "none":
        raise UserError(f"bits: got {bits!r}, allowed are {', '.join(get_args(Bits))}")
    weight = torch.empty(shape, dtype=dtype, device=device)
    for start, stop in row_chunks(*shape, multiple=1):
        weight[start:stop] = read(start, stop)
    return PlainWeight(weight)


def _empty(
    shape: tuple[int, int], bits: Bits, dtype: torch.dtype, double_quant: bool, device: torch.device
) -> PackedWeight:
    """What `pack_rows` gives, without values."""
    if bits == "nf4" or bits == "fp4":
        return FourBitWeight.empty(shape, bits, double_quant=double_quant, device=device)
    if bits == "int8":
        codes = torch.empty(shape, dtype=torch.int8, device=device)
        return Int8Weight(codes, torch.empty(shape[0], device=device))
    return PlainWeight(torch.empty(shape, dtype=dtype, device=device))


def from_checkpoint(tensors: Mapping[str, Tensor], *, name: str = "weight") -> PackedWeight:
    """The stored form of one linear layer from the tensors of a checkpoint, without the layer's prefix.

    4-bit: weight, weight.absmax, weight.quant_map, weight.quant_state.*, weight.nested_*; 8-bit: weight,
    SCB, weight_format; otherwise weight alone, in 16 or 32 bits. The bytes are used as they are.
    Raises `UserError`, naming `name`, if they do not fit together.
    """
    if any(key.startswith("weight.quant_state.") for key in tensors):
        return FourBitWeight.from_checkpoint(tensors, name)
    if "SCB" in tensors:
        return Int8Weight.from_checkpoint(tensors, name)
    if "weight" not in tensors:
        raise UserError(f"{name}: weight is missing, got {sorted(tensors)}")
    try:
        return PlainWeight(tensors["weight"])
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
