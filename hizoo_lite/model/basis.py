"""The even/odd basis: what a shared bf16 product is given, and how branches are rebuilt from it.

A step needs the tiny differences of its losses. Rounding each branch to bf16 before a product destroys
them; rounding the differences themselves does not. So a linear layer multiplies

    common = x0                       (or (x+ + x-)/2 of the first pair if there is no base branch)
    odd    = (x+ - x-)                (twice the odd part)
    even   = (x+ + x-) - 2 common     (twice the even part)

and rebuilds, in float32, y+- = W common + (W even +- W odd)/2. Exact in exact arithmetic because the
product is linear; the rounding of W common is the same for every branch and cancels; that of the odd
and even parts is relative to them. Same number of rows, same cost. A first pair without base has
even = 0 by construction and leaves it out: rows are 2 a pair, or 1 + 2 a pair with a base.

One-sided points, which have a base, are given as x_k - x0: y_k = W common + W (x_k - x0). Offsets do not
matter: a pair at +-r mu d is split like one at +-mu d.

The factors of two are kept out of the operands (halving is exact and is done at the rebuild). For
fp16, whose smallest steps are near 1e-7, odd and even parts are scaled up by powers of two before they
are rounded, which is exact too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hizoo_lite.branches import Branches


class Gains(NamedTuple):
    """Powers of two that odd and even parts are multiplied by before they are rounded."""

    odd: float = 1.0
    even: float = 1.0


def gains(dtype: torch.dtype, mu: float) -> Gains:
    """fp16 has five exponent bits: lift parts of size mu and mu^2 above its smallest steps. Others need none.

    mu: times the largest offset of a point. At most 512: a part that outliers make large must not overflow.
    """
    if dtype != torch.float16 or mu <= 0:
        return Gains()
    lift = min(2.0 ** math.floor(-math.log2(mu)), 512.0)
    return Gains(odd=lift, even=lift)


def split(x: Tensor, out: Tensor, branches: Branches, gain: Gains) -> None:
    """Write the operands of a shared product.

    x: (branches, tokens, features) float32. out: (branches, tokens, features) in the product's dtype:
    common, then odd and even of every pair (only odd for the first pair if there is no base), then what
    every one-sided point differs from the base by.
    """
    if branches.directions == 0:
        out.copy_(x)
        return
    if branches.base:
        common, first = x[0], 1
    else:
        common, first = (x[0] + x[1]).mul_(0.5), 0
    out[0].copy_(common)
    row = 1
    for pair in range(branches.pairs):
        plus, minus = x[first + 2 * pair], x[first + 2 * pair + 1]
        _write(out[row], plus - minus, gain.odd)
        row += 1
        if branches.base or pair > 0:
            _write(out[row], torch.add(plus, minus).sub_(common, alpha=2), gain.even)
            row += 1
    for point in range(row, branches.count):
        _write(out[point], x[point] - common, gain.odd)


def rebuild(
    product: Tensor,
    out: Tensor,
    branches: Branches,
    gain: Gains,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Write each branch's result from the products of its parts: y * scale + bias.

    product: (branches, tokens, features) in the product's dtype, in the order that `split` wrote.
    out: (branches, tokens, features) float32; may be a slice of columns. scale, bias: (features,) float32;
    None: 1, 0.
    """
    _rebuild(product, out, branches, gain)
    if scale is not None:
        out *= scale
    if bias is not None:
        out += bias


def _rebuild(product: Tensor, out: Tensor, branches: Branches, gain: Gains) -> None:
    if branches.directions == 0:
        out.copy_(product)
        return
    common = product[0].float()
    first = 0
    if branches.base:
        out[0].copy_(common)
        first = 1
    row = 1
    for pair in range(branches.pairs):
        odd = product[row]
        row += 1
        middle = common
        if branches.base or pair > 0:
            middle = torch.add(common, product[row], alpha=0.5 / gain.even)
            row += 1
        plus, minus = out[first + 2 * pair], out[first + 2 * pair + 1]
        torch.add(middle, odd, alpha=0.5 / gain.odd, out=plus)
        torch.sub(middle, odd, alpha=0.5 / gain.odd, out=minus)
    for point in range(row, branches.count):
        torch.add(common, product[point], alpha=1.0 / gain.odd, out=out[point])


def _write(out: Tensor, part: Tensor, gain: float) -> None:
    out.copy_(part if gain == 1.0 else part.mul_(gain))
