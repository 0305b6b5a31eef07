"""`split` and `rebuild` of `basis.py` as one kernel each, in Triton, launched on the current GPU.

The same bits as `basis.py`: the same operations in the same order in float32, each rounded by itself
(`enable_fp_fusion` is off, since a row's scale is no power of two), and casts to nearest even. A program has
one token of every branch and up to `_BLOCK` of its features, so that every element is read and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Features that a program has.
_BLOCK = 1024


@triton.jit
def _split(
    x,
    x_branch,
    x_token,
    out,
    out_branch,
    out_token,
    features,
    odd,
    even,
    BASE: tl.constexpr,
    PAIRS: tl.constexpr,
    ONE_SIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < features
    given = x + token * x_token + column
    written = out + token * out_token + column
    if BASE == 1:
        common = tl.load(given, mask=inside)
        given += x_branch
    else:
        common = (tl.load(given, mask=inside) + tl.load(given + x_branch, mask=inside)) * 0.5
    tl.store(written, common.to(out.dtype.element_ty), mask=inside)
    for pair in tl.static_range(PAIRS):
        plus = tl.load(given, mask=inside)
        given += x_branch
        minus = tl.load(given, mask=inside)
        given += x_branch
        written += out_branch
        tl.store(written, ((plus - minus) * odd).to(out.dtype.element_ty), mask=inside)
        if BASE + pair > 0:
            written += out_branch
            part = ((plus + minus) - common * 2.0) * even
            tl.store(written, part.to(out.dtype.element_ty), mask=inside)
    for _ in tl.static_range(ONE_SIDED):
        part = (tl.load(given, mask=inside) - common) * odd
        given += x_branch
        written += out_branch
        tl.store(written, part.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _finish(value, scale, bias, column, inside, SCALED: tl.constexpr, BIASED: tl.constexpr):
    if SCALED == 1:
        value *= tl.load(scale + column, mask=inside)
    if BIASED == 1:
        value += tl.load(bias + column, mask=inside)
    return value


@triton.jit
def _rebuild(
    product,
    product_branch,
    product_token,
    out,
    out_branch,
    out_token,
    features,
    odd,
    even,
    single,
    scale,
    bias,
    BASE: tl.constexpr,
    PAIRS: tl.constexpr,
    ONE_SIDED: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < features
    given = product + token * product_token + column
    written = out + token * out_token + column
    common = tl.load(given, mask=inside).to(tl.float32)
    if BASE == 1:
        tl.store(written, _finish(common, scale, bias, column, inside, SCALED, BIASED), mask=inside)
        written += out_branch
    for pair in tl.static_range(PAIRS):
        given += product_branch
        difference = tl.load(given, mask=inside).to(tl.float32) * odd
        middle = common
        if BASE + pair > 0:
            given += product_branch
            middle = common + tl.load(given, mask=inside).to(tl.float32) * even
        plus = _finish(middle + difference, scale, bias, column, inside, SCALED, BIASED)
        tl.store(written, plus, mask=inside)
        written += out_branch
        minus = _finish(middle - difference, scale, bias, column, inside, SCALED, BIASED)
        tl.store(written, minus, mask=inside)
        written += out_branch
    for _ in tl.static_range(ONE_SIDED):
        given += product_branch
        point = common + tl.load(given, mask=inside).to(tl.float32) * single
        tl.store(written, _finish(point, scale, bias, column, inside, SCALED, BIASED), mask=inside)
        written += out_branch


def split(x: Tensor, out: Tensor, base: bool, pairs: int, one_sided: int, odd: float, even: float) -> None:
    """See `basis.split`. x: (branches, tokens, features) float32; out alike, in bf16, fp16 or float32."""
    x = _in_rows(x)
    tokens, features = x.shape[1:]
    if x.numel() == 0:
        return
    _split[_grid(tokens, features)](
        *(x, x.stride(0), x.stride(1)),
        *(out, out.stride(0), out.stride(1)),
        *(features, odd, even, int(base), pairs, one_sided, _BLOCK),
        enable_fp_fusion=False,
    )


def rebuild(
    product: Tensor,
    out: Tensor,
    base: bool,
    pairs: int,
    one_sided: int,
    odd: float,
    even: float,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """See `basis.rebuild`. out: (branches, tokens, features) float32, whose features lie side by side."""
    product = _in_rows(product)
    tokens, features = product.shape[1:]
    if product.numel() == 0:
        return
    _rebuild[_grid(tokens, features)](
        *(product, product.stride(0), product.stride(1)),
        *(out, out.stride(0), out.stride(1)),
        *(features, 0.5 / odd, 0.5 / even, 1.0 / odd),
        *(out if scale is None else scale, out if bias is None else bias),  # not read where None
        *(int(base), pairs, one_sided, int(scale is not None), int(bias is not None), _BLOCK),
        enable_fp_fusion=False,
    )


def probe(device: torch.device) -> None:
    """Compile and launch both once. Raises whatever is in the way."""
    x = torch.ones(3, 1, 16, device=device)
    operands = torch.empty_like(x)
    split(x, operands, True, 1, 0, 1.0, 1.0)
    rebuild(operands, x, True, 1, 0, 1.0, 1.0)


def _grid(tokens: int, features: int) -> tuple[int, int]:
    return tokens, triton.cdiv(features, _BLOCK)


def _in_rows(tensor: Tensor) -> Tensor:
    """With the features of a token side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
