"""A weight matrix in bitsandbytes' 4-bit form: NF4 or FP4 codes, one absmax a block, itself in 8 bits.

QLoRA 2305.14314, sections 3 (NF4, double quantization). The bytes are those of bitsandbytes; the forward
is not: codes are decoded into the caller's buffer, exactly for every shape (see `native.py`), and never
repacked in place. absmax of a double-quantized weight is undone at every call (0.13 bits a parameter
instead of 0.5; 7.6 instead of 7.5 ms for 11008 x 4096 to bf16 on 2 cores with AVX512), bit-equal to
bitsandbytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hizoo_lite.errors import UserError
from hizoo_lite.files import parse_json
from hizoo_lite.noise import Uniform
from hizoo_lite.quant import native
from hizoo_lite.quant.opaque import Opaque
from hizoo_lite.quant.packed import PackedWeight, Stored
from hizoo_lite.quant.rounding import Levels, grow, round_to_levels
from hizoo_lite.quant.rows import RowReader, check_finite, check_out, row_chunks

BLOCKSIZE = 64
NESTED_BLOCKSIZE = 256
#: Bytes that a GPU's product loads at once.
_VECTOR = 16
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class FourBitWeight(Opaque, PackedWeight):
    """NF4 or FP4 codes of a (out_features, in_features) matrix, flat in row-major order.

    codes: (ceil(out * in / 2),) uint8. absmax: (blocks,) float32, or uint8 if double-quantized; then
    also nested_absmax (ceil(blocks / 256),), nested_table (256,) and offset (), float32.
    """

    codes: Tensor
    absmax: Tensor
    table: Tensor
    nested_absmax: Tensor
    nested_table: Tensor
    offset: Tensor

    def __init__(
        self,
        bits: native.FourBits,
        shape: tuple[int, int],
        codes: Tensor,
        absmax: Tensor,
        nested: tuple[Tensor, Tensor, Tensor] | None = None,
        blocksize: int = BLOCKSIZE,
    ) -> None:
        """`nested` is (absmax of the absmax, its code table, offset). Raises ValueError on wrong sizes."""
        super().__init__()
        elements = shape[0] * shape[1]
        blocks = -(-elements // blocksize)
        if codes.numel() != (elements + 1) // 2 or absmax.numel() != blocks:
            raise ValueError(
                f"4-bit weight {shape}: {(elements + 1) // 2} bytes of codes and {blocks} blocks wanted, "
                f"got {codes.numel()} and {absmax.numel()}"
            )
        self.bits: native.FourBits = bits
        self.shape = shape
        self.blocksize = blocksize
        self.double_quant = nested is not None
        self.register_buffer("codes", codes.view(-1))
        self.register_buffer("absmax", absmax)
        device = torch.device("cpu") if codes.is_meta else codes.device
        self.register_buffer("table", native.code_table(bits).to(device))
        if nested is not None:
            self.register_buffer("nested_absmax", nested[0])
            self.register_buffer("nested_table", nested[1])
            self.register_buffer("offset", nested[2])

    @classmethod
    def quantize(
        cls,
        read: RowReader,
        shape: tuple[int, int],
        bits: native.FourBits,
        *,
        double_quant: bool = True,
        name: str = "weight",
    ) -> FourBitWeight:
        """Quantize a matrix row chunk by row chunk, on the CPU; bit-identical to quantizing it whole.

        Raises `UserError`, naming `name`, if values are not finite.
        """
        elements = shape[0] * shape[1]
        codes = torch.empty((elements + 1) // 2, dtype=torch.uint8)
        absmax = torch.empty(-(-elements // BLOCKSIZE), dtype=torch.float32)
        whole = BLOCKSIZE // math.gcd(BLOCKSIZE, shape[1])  # rows after which a block ends at a row's end
        for start, stop in row_chunks(*shape, multiple=whole):
            rows = read(start, stop).cpu().contiguous()
            chunk_codes, chunk_absmax = native.quantize_blocks(rows, bits, BLOCKSIZE)
            begin = start * shape[1]
            codes[begin // 2 : begin // 2 + chunk_codes.numel()] = chunk_codes
            absmax[begin // BLOCKSIZE : begin // BLOCKSIZE + chunk_absmax.numel()] = chunk_absmax
        check_finite(absmax, name, "its stored dtype")
        if not double_quant:
            return cls(bits, shape, codes, absmax)
        coded, *nested = native.quantize_absmax(absmax)
        return cls(bits, shape, codes, coded, (nested[0], nested[1], nested[2]))

    @classmethod
    def empty(
        cls, shape: tuple[int, int], bits: native.FourBits, *, double_quant: bool, device: torch.device
    ) -> FourBitWeight:
        """The parts of a matrix without values."""
        elements = shape[0] * shape[1]
        groups = -(-elements // BLOCKSIZE)
        codes = torch.empty((elements + 1) // 2, dtype=torch.uint8, device=device)
        if not double_quant:
            return cls(bits, shape, codes, torch.empty(groups, device=device))
        sizes = ((-(-groups // NESTED_BLOCKSIZE),), (256,), ())
        absmax, table, offset = (torch.empty(size, device=device) for size in sizes)
        coded = torch.empty(groups, dtype=torch.uint8, device=device)
        return cls(bits, shape, codes, coded, (absmax, table, offset))

    @classmethod
    def from_checkpoint(cls, tensors: Mapping[str, Tensor], name: str = "weight") -> FourBitWeight:
        """Take over the tensors that bitsandbytes saved for one layer, without the layer's prefix.

        Keys: weight, weight.absmax, weight.quant_map, weight.quant_state.bitsandbytes__nf4 (or fp4),
        and, double-quantized, weight.nested_absmax and weight.nested_quant_map. Raises `UserError`,
        naming `name` and the key, on missing tensors or a state that does not fit them.
        """
        key, state = _quant_state(tensors, name)
        bits, blocksize = state["quant_type"], state["blocksize"]
        if bits not in ("nf4", "fp4") or blocksize not in _BLOCKSIZES or len(state["shape"]) != 2:
            raise UserError(
                f"{name}: {key} says quant_type {bits!r}, blocksize {blocksize!r}, shape {state['shape']!r}; "
                f"allowed are nf4 or fp4, {_BLOCKSIZES} and two dimensions"
            )
        for wanted in ("weight", "weight.absmax", "weight.quant_map"):
            if wanted not in tensors:
                raise UserError(f"{name}: {wanted} is missing beside {key}")
        if not torch.equal(tensors["weight.quant_map"].cpu(), native.code_table(bits)):
            raise UserError(f"{name}: weight.quant_map is not the {bits} table of bitsandbytes")
        nested = None
        if "nested_offset" in state:
            nested = _nested_parts(tensors, state, name)
        codes = tensors["weight"].contiguous().view(torch.uint8).view(-1)
        shape = (int(state["shape"][0]), int(state["shape"][1]))
        try:
            return cls(bits, shape, codes, tensors["weight.absmax"], nested, blocksize)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error

    def unpack(self, out: Tensor, first_row: int = 0) -> Tensor:
        """Decode rows `first_row` .. into `out` (rows, in_features), contiguous bf16, fp16 or float32.

        Bit-equal to `bitsandbytes.functional.dequantize_4bit` to the same dtype if that is right.
        Raises ValueError if `out` does not fit.
        """
        check_out(out, self.shape, first_row)
        blocks = self.blocks(first_row, out.shape[0])
        return self.unpack_with(self._absmax(blocks.start, blocks.stop), out, first_row)

    def unpack_with(self, absmax: Tensor, out: Tensor, first_row: int) -> Tensor:
        """As `unpack`, with other scales than its own: (blocks,) float32 of any sign, of `blocks(...)`."""
        start = first_row * self.shape[1]
        native.decode(self.codes, absmax, self.table, out.view(-1), start, self.bits, self.blocksize)
        return out

    def product(self, rows: Tensor) -> Tensor | None:
        """rows W' without an unpacked weight; None if unpacking is as good, or all there is.

        rows: (rows, in_features), contiguous, in 16 or 32 bits. Gives (rows, out_features) in their dtype.
        """
        whole = self.shape[1] % self.blocksize == 0 and self.codes.data_ptr() % _VECTOR == 0
        if not whole or not native.multiplies_packed(rows.device, rows.dtype, len(rows), self.shape):
            return None
        nested = (self.nested_absmax, self.nested_table, self.offset) if self.double_quant else None
        return native.multiply_packed(
            rows, self.codes, self.shape, self.absmax, self.bits, self.blocksize, nested
        )

    def blocks(self, first_row: int, rows: int) -> slice:
        """The blocks that hold some of these rows."""
        start = first_row * self.shape[1]
        return slice(start // self.blocksize, -(-(start + rows * self.shape[1]) // self.blocksize))

    @property
    def tile_rows(self) -> int:
        """The rows after which a block ends at a row's end."""
        return self.blocksize // math.gcd(self.blocksize, self.shape[1])

    def store(self, values: Tensor, first_row: int, rounding: Uniform) -> None:
        """See `PackedWeight.store`. A block's absmax grows if a value exceeds it (see `rounding.grow`).

        Needs absmax in float32: see `undo_double_quant`.
        """
        assert not self.double_quant
        assert first_row % self.tile_rows == 0
        blocks, count = self.blocks(first_row, values.shape[0]), values.numel()
        flat = values.view(-1)
        if count % self.blocksize:  # the last block of the matrix
            flat = torch.nn.functional.pad(flat, (0, -count % self.blocksize))
        grouped = flat.view(-1, self.blocksize)
        inside, top = grow(grouped, self.absmax[blocks, None].clamp(min=0.0), rounding)
        levels = _levels(self.bits, self.table.device)
        chosen = round_to_levels(inside, top, levels, rounding)
        codes = torch.index_select(levels.codes, 0, chosen.view(-1))
        begin = first_row * self.shape[1] // 2
        packed = self.codes[begin : begin + (count + 1) // 2]
        pairs = codes.view(-1, 2)[: len(packed)]
        if self.bits == "fp4":  # it has two zeros, 0 and 8: a zero stays the one it was
            old = torch.stack((packed >> 4, packed & 15), dim=1)
            pairs = torch.where((pairs == 0) & (old == 8), old, pairs)
        if count % 2:
            pairs[-1, 1] = packed[-1] & 15
        joined = (pairs[:, 0] << 4) | pairs[:, 1]
        self.absmax[blocks] = top.squeeze(1)
        packed.copy_(joined)

    def scales(self) -> Tensor:
        """absmax of every block, (blocks,) float32, decoded if it is in 8 bits."""
        return self._absmax(0, self.absmax.numel())

    def undo_double_quant(self) -> None:
        """absmax in float32 from here on, bit-equal to what was decoded; ValueError while it is offloaded."""
        if not self.double_quant:
            return
        if self.absmax.is_meta and not self.nested_table.is_meta:  # which never is offloaded
            raise ValueError("absmax is not here")
        self.absmax = self.scales()
        self.double_quant = False
        del self.nested_absmax, self.nested_table, self.offset

    def stored(self) -> list[Stored]:
        """Codes and absmax; absmax of the absmax if it is in 8 bits."""
        found = [Stored(self, "codes", "weight"), Stored(self, "absmax", "weight.absmax")]
        if self.double_quant:
            found.append(Stored(self, "nested_absmax", "weight.nested_absmax"))
        return found

    def _absmax(self, first: int, last: int) -> Tensor:
        """absmax of blocks first .. last, float32."""
        if not self.double_quant:
            return self.absmax[first:last]
        aligned = first // NESTED_BLOCKSIZE * NESTED_BLOCKSIZE
        nested = self.nested_absmax[aligned // NESTED_BLOCKSIZE : -(-last // NESTED_BLOCKSIZE)]
        values = native.dequantize_absmax(self.absmax[aligned:last], nested, self.nested_table, self.offset)
        return values[first - aligned :]


@functools.cache
def _levels(bits: native.FourBits, device: torch.device) -> Levels:
    return Levels(*(part.to(device) for part in Levels.of(native.code_table(bits))))


def _quant_state(tensors: Mapping[str, Tensor], name: str) -> tuple[str, dict]:
    """The key and the JSON content of the layer's quant_state."""
    keys = [key for key in tensors if key.startswith("weight.quant_state.bitsandbytes__")]
    if len(keys) != 1:
        raise UserError(f"{name}: one weight.quant_state.bitsandbytes__* wanted, got {keys}")
    try:
        state = parse_json(tensors[keys[0]].cpu().numpy().tobytes())
        missing = {"quant_type", "blocksize", "shape"} - set(state)
    except (ValueError, TypeError) as error:
        raise UserError(f"{name}: {keys[0]} is not JSON: {error}") from error
    if missing:
        raise UserError(f"{name}: {keys[0]} lacks {sorted(missing)}")
    return keys[0], state


def _nested_parts(tensors: Mapping[str, Tensor], state: dict, name: str) -> tuple[Tensor, Tensor, Tensor]:
    blocksize = state.get("nested_blocksize")
    if blocksize != NESTED_BLOCKSIZE:
        raise UserError(f"{name}: nested_blocksize {blocksize!r}; allowed is {NESTED_BLOCKSIZE}")
    for wanted in ("weight.nested_absmax", "weight.nested_quant_map"):
        if wanted not in tensors:
            raise UserError(f"{name}: {wanted} is missing of a double-quantized weight")
    absmax = tensors["weight.nested_absmax"]
    table = tensors["weight.nested_quant_map"]  # never on the meta device, unlike what is streamed
    offset = torch.tensor(float(state["nested_offset"]), dtype=torch.float32, device=table.device)
    return absmax, table, offset
