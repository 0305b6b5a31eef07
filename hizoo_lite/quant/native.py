"""What is used of bitsandbytes: its 4-bit decoders, called on views, and its quantizers.

On CUDA the quantizers launch on the legacy default stream whatever the current one is, so they are called
with that as the current one.

On CPU the decoders of bitsandbytes' shared library are called through pointers, so that they write into
the caller's buffer: 4 to 6 times faster than `bitsandbytes.functional.dequantize_4bit`, which allocates
its result, and bit-equal to it. Codes are stored flat in row-major order and blocks run over row ends,
so a matrix is decoded as (blocks, block size) whatever its own shape is; this avoids the library's
AVX512 kernel being wrong if in_features is not a multiple of the block size, and failing for odd ones.
A kernel is used only after it decoded a probe exactly as the code table says; what it cannot do (the
ends of a range that are not whole blocks, machines without the shared library) is done in torch.

QLoRA 2305.14314, section 3, describes NF4 and double quantization.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from hizoo_lite.device import is_gpu, kind_of

FourBits = Literal["nf4", "fp4"]

#: Elements that the torch decoder handles at a time; its temporaries take about 20 bytes each.
_TORCH_CHUNK = 1 << 16

_SHORT_DTYPE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_log = logging.getLogger(__name__)


def _import_quietly() -> None:
    """Import bitsandbytes without its line about the optional package `kernels`."""
    noisy = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    finally:
        noisy.setLevel(level)


_import_quietly()

import bitsandbytes.functional as bnb  # noqa: E402 - after the logger was silenced
from bitsandbytes.cextension import lib  # noqa: E402


@functools.cache
def code_table(bits: FourBits) -> Tensor:
    """The 16 values a code stands for, (16,) float32 on CPU, in [-1, 1]."""
    return bnb.get_4bit_type(bits, device="cpu").to(torch.float32)


def quantize_blocks(values: Tensor, bits: FourBits, blocksize: int) -> tuple[Tensor, Tensor]:
    """Codes (ceil(n/2),) uint8, first element in the high half, and absmax (blocks,) float32 of n values."""
    with kind_of(values.device).on_default_stream(values.device):
        codes, absmax = torch.ops.bitsandbytes.quantize_4bit.default(values, blocksize, bits, torch.uint8)
    return codes.view(-1), absmax


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Double quantization: (codes uint8, absmax of blocks of 256, their code table (256,), offset ())."""
    offset = absmax.mean()
    with kind_of(absmax.device).on_default_stream(absmax.device):
        codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    return codes, state.absmax, state.code, offset


def dequantize_absmax(codes: Tensor, absmax: Tensor, table: Tensor, offset: Tensor) -> Tensor:
    """Undo `quantize_absmax`: (blocks,) float32. `codes` starts at a multiple of 256."""
    values = torch.ops.bitsandbytes.dequantize_blockwise.default(codes, absmax, table, 256, torch.float32)
    return values.add_(offset)


def quantize_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """LLM.int8 codes (rows, in) int8 and row absmax (rows,) float32 of (rows, in) float16."""
    with kind_of(rows.device).on_default_stream(rows.device):
        codes, absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(rows, 0.0)
    return codes, absmax


#: Rows that bitsandbytes has a product with packed weights for on every GPU; for more it depends on the GPU.
FEW_ROWS = 4
#: Rows up to which it is asked whether it has.
MOST_ROWS = 64


def multiplies_packed(device: torch.device, dtype: torch.dtype, rows: int, shape: tuple[int, int]) -> bool:
    """Whether `multiply_packed` takes so many rows, unpacks nothing, and is faster than unpacking.

    bitsandbytes' own table of GPUs says that. shape: (out_features, in_features) of the matrix. If it
    says no the same call would unpack the whole matrix, of which no plan of memory knows.
    """
    if not is_gpu(device) or rows > MOST_ROWS or not hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        return False
    if rows <= FEW_ROWS:
        return True
    kernels = sys.modules.get("bitsandbytes.backends.cuda.ops")
    asked = getattr(kernels, "_gemm_4bit_use_custom_fn", None)
    return asked is not None and bool(asked(device.index, dtype, rows, *shape))


def multiply_packed(
    rows: Tensor,
    codes: Tensor,
    shape: tuple[int, int],
    absmax: Tensor,
    bits: FourBits,
    blocksize: int,
    nested: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """rows W', (rows, out_features) in the dtype of `rows`, without an unpacked weight.

    rows: (rows, in_features), contiguous. codes, absmax as in `FourBitWeight`; nested: absmax of the absmax,
    its code table, and the offset. Needs in_features that are whole blocks.
    """
    more = () if nested is None else (absmax, nested[1], nested[2])
    scales = absmax if nested is None else nested[0]
    return torch.ops.bitsandbytes.gemm_4bit.default(
        rows, codes, list(shape), scales, blocksize, bits, None, *more
    )


def launch_all(device: torch.device, compute: torch.dtype) -> None:
    """Launch everything of bitsandbytes that a model may use, and a product, once on a GPU.

    A kernel is brought to the device at its first launch. If there is no memory left for that,
    bitsandbytes ends the process (csrc/compat.cuh), with nothing saved and no error raised. So it is done
    while there is.
    """
    if not is_gpu(device):
        return
    blocksize, count = 64, 256 * 64
    values = torch.linspace(-1, 1, count, device=device)
    kinds: tuple[FourBits, ...] = ("nf4", "fp4")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for bits in kinds:
            codes, absmax = quantize_blocks(values.to(dtype), bits, blocksize)
            out = torch.empty(count, dtype=dtype, device=device)
            _decode_whole_blocks(codes, absmax, out, bits, blocksize)
    dequantize_absmax(*quantize_absmax(absmax))
    _launch_products(device, compute)
    quantize_int8(values.half().view(-1, blocksize))
    square = torch.zeros(blocksize, blocksize, dtype=compute, device=device)
    torch.mm(square, square)
    torch.mm(square.float(), square.float())
    kind_of(device).synchronize(device)


def _launch_products(device: torch.device, compute: torch.dtype) -> None:
    """Those with packed weights: one row, and as many as a step of decoding may have."""
    shape, blocksize = (256, 256), 64
    codes, absmax = quantize_blocks(torch.ones(shape, dtype=compute, device=device), "nf4", blocksize)
    for count in (1, FEW_ROWS, MOST_ROWS):
        if multiplies_packed(device, compute, count, shape):
            rows = torch.ones(count, shape[1], dtype=compute, device=device)
            multiply_packed(rows, codes, shape, absmax, "nf4", blocksize)


def decode(
    codes: Tensor, absmax: Tensor, table: Tensor, out: Tensor, start: int, bits: FourBits, blocksize: int
) -> None:
    """Write elements `start` .. `start + out.numel()` of a packed matrix into flat `out`.

    codes: the whole matrix, (ceil(n/2),) uint8. absmax: float32, from the block of element `start` on.
    table: (16,) float32. out: (elements,) float32, bf16 or fp16. All on one device. Nothing here waits
    for the device.
    """
    if out.is_meta:  # a model that is only planned has no values
        return
    stop = start + out.numel()
    first_block = start // blocksize
    whole_start = -(-start // blocksize) * blocksize
    whole_stop = stop // blocksize * blocksize
    if whole_stop <= whole_start or not _has_kernel(bits, out, blocksize):
        decode_in_torch(codes, absmax, table, out, start, blocksize)
        return
    if start < whole_start:
        decode_in_torch(codes, absmax, table, out[: whole_start - start], start, blocksize)
    _decode_whole_blocks(
        codes[whole_start // 2 : whole_stop // 2],
        absmax[whole_start // blocksize - first_block : whole_stop // blocksize - first_block],
        out[whole_start - start : whole_stop - start],
        bits,
        blocksize,
    )
    if whole_stop < stop:
        last = absmax[whole_stop // blocksize - first_block :]
        decode_in_torch(codes, last, table, out[whole_stop - start :], whole_stop, blocksize)


def decode_in_torch(
    codes: Tensor, absmax: Tensor, table: Tensor, out: Tensor, start: int, blocksize: int
) -> None:
    """`decode` by table lookup, exact for every range; small temporaries only."""
    first_block = start // blocksize
    for done in range(0, out.numel(), _TORCH_CHUNK):
        begin = start + done
        count = min(_TORCH_CHUNK, out.numel() - done)
        packed = codes[begin // 2 : (begin + count + 1) // 2]
        halves = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)[begin % 2 : begin % 2 + count]
        block = torch.arange(begin, begin + count, device=codes.device) // blocksize - first_block
        out[done : done + count] = table[halves.int()] * absmax[block]


def _decode_whole_blocks(codes: Tensor, absmax: Tensor, out: Tensor, bits: FourBits, blocksize: int) -> None:
    if out.device.type == "cpu":
        _call_kernel(_kernel(bits, out.dtype), codes, absmax, out, blocksize)
        return
    torch.ops.bitsandbytes.dequantize_4bit.out(codes, absmax, blocksize, bits, out.shape, out.dtype, out=out)


def _has_kernel(bits: FourBits, out: Tensor, blocksize: int) -> bool:
    return is_gpu(out.device) or _kernel_is_exact(bits, out.dtype, blocksize)


def _kernel(bits: FourBits, dtype: torch.dtype) -> Callable[..., object]:
    return getattr(lib, f"cdequantize_blockwise_cpu_{bits}_{_SHORT_DTYPE[dtype]}")


def _call_kernel(
    kernel: Callable[..., object], codes: Tensor, absmax: Tensor, out: Tensor, blocksize: int
) -> None:
    kernel(
        ctypes.c_void_p(codes.data_ptr()),
        ctypes.c_void_p(absmax.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_longlong(blocksize),
        ctypes.c_longlong(out.numel() // blocksize),
        ctypes.c_longlong(blocksize),
    )


@functools.cache
def _kernel_is_exact(bits: FourBits, dtype: torch.dtype, blocksize: int) -> bool:
    """Whether the shared library has this decoder and it agrees with the code table on a probe."""
    blocks = 5
    codes = (torch.arange(blocks * blocksize // 2) * 37 % 256).to(torch.uint8)
    absmax = torch.linspace(0.011, 1.7, blocks)
    expected = torch.empty(blocks * blocksize, dtype=dtype)
    decode_in_torch(codes, absmax, code_table(bits), expected, 0, blocksize)
    got = torch.zeros_like(expected)
    try:
        _call_kernel(_kernel(bits, dtype), codes, absmax, got, blocksize)
    except (RuntimeError, AttributeError) as error:
        _log.warning("no native %s decoder to %s, decoding in torch: %s", bits, dtype, error)
        return False
    if not torch.equal(got, expected):
        _log.warning("the native %s decoder to %s is not exact here, decoding in torch", bits, dtype)
        return False
    return True
