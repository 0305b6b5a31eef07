"""Stored forms of weight matrices (4-bit, 8-bit, 16/32-bit).

`pack` and `pack_rows` quantize; `from_checkpoint` takes over what bitsandbytes has quantized before.
"""

from __future__ import annotations

from hizoo_lite.quant.fourbit import FourBitWeight
from hizoo_lite.quant.int8 import Int8Weight
from hizoo_lite.quant.packing import from_checkpoint, pack, pack_rows
from hizoo_lite.quant.plain import PlainWeight
from hizoo_lite.quant.residual import ResidualWeight

__all__ = [
    "FourBitWeight",
    "Int8Weight",
    "PlainWeight",
    "ResidualWeight",
    "from_checkpoint",
    "pack",
    "pack_rows",
]
