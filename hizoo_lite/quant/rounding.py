"""Rounding at random without bias: the expectation of what is stored is the value that was to be stored.

An update of a quantized weight is far below a step of its grid and vanishes unless rounding is stochastic
(QuZO 2502.12346, section 3). Between two neighbours a <= v <= b of a grid, b is taken with probability
(v - a) / (b - a); that is unbiased inside the grid. Beyond its ends the group's range has to grow (`grow`).
Exact up to float32: probabilities are multiples of 2^-24.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hizoo_lite.noise import Uniform

#: A group that must grow gets this much more range, at least.
GROWTH = 1 / 8

#: Cells of the table that finds a level: no two levels of a 4-bit type are in one.
_CELLS = 1024


def uniform(like: Tensor, rounding: Uniform) -> Tensor:
    """Numbers in [0, 1) of the shape of `like`, float32."""
    return rounding.fill(torch.empty_like(like, dtype=torch.float32))


def grow(values: Tensor, top: Tensor, rounding: Uniform) -> tuple[Tensor, Tensor]:
    """Make room for values beyond the range of their group: (values inside of the new range, new top).

    values: (groups, size) float32. top: (groups, 1) float32 >= 0, the largest size each group's grid holds.

    With e the largest excess |v| - A of a group, A' = A (1 + GROWTH), or A + e if that is more. With
    probability p = e / (A' - A) the group's top becomes A' and every exceeding v is put at
    A + (|v| - A) / p <= A'; otherwise the top stays A and every exceeding v is put at A. So
    E = p (A + (|v| - A) / p) + (1 - p) A = |v|. Values that do not exceed A are inside either range and are
    rounded on either grid without bias, so E[E[rounded | grid]] = v for them too. A range grows rarely:
    by as much, in expectation, as its largest value exceeds it.
    """
    size = values.abs()
    excess = (size.amax(dim=1, keepdim=True) - top).clamp_(min=0.0)
    wider = torch.maximum(top * (1 + GROWTH), top + excess)
    chance = (excess / (wider - top)).clamp_(max=1.0)  # 0/0 where the group is zero: it does not grow
    grown = uniform(top, rounding) < chance
    stretch = torch.where(grown, 1.0 / chance, 0.0)
    new_top = torch.where(grown, wider, top)
    beyond = torch.addcmul(top, size - top, stretch).minimum(new_top).copysign_(values)
    return torch.where(size > top, beyond, values), new_top


class Levels(NamedTuple):
    """A grid of at most 16 values in [-1, 1], in order, ready to be searched."""

    values: Tensor  # (levels,) float32
    codes: Tensor  # (levels,) uint8, what stands for each
    below: Tensor  # (_CELLS,) int32: the last level at or below the cell's start

    @classmethod
    def of(cls, table: Tensor) -> Levels:
        """The levels of a code table, (16,) float32; the smallest of the codes of a level stands for it."""
        values, codes = torch.sort(table, stable=True)
        first = torch.ones_like(values, dtype=torch.bool)
        first[1:] = values[1:] != values[:-1]
        values, codes = values[first], codes[first].to(torch.uint8)
        starts = torch.arange(_CELLS, device=table.device, dtype=torch.float64) * (2 / _CELLS) - 1
        below = torch.searchsorted(values.double(), starts, right=True) - 1
        return cls(values, codes, below.clamp_(0, len(values) - 2).int())


def round_to_levels(values: Tensor, top: Tensor, levels: Levels, rounding: Uniform) -> Tensor:
    """Indices of levels whose value times `top` has expectation `values`; (groups, size) int32.

    values: (groups, size) float32 inside +-top; top: (groups, 1) float32.
    """
    relative = values / top.clamp(min=torch.finfo(torch.float32).tiny)
    cell = torch.add(relative, 1.0).mul_(_CELLS / 2).clamp_(0, _CELLS - 1).int().view(-1)
    lower = _looked_up(levels.below, cell)  # at most the last level but one, so there is a level above it
    lower += relative.view(-1) >= _looked_up(levels.values[1:], lower)
    lower.clamp_(max=len(levels.values) - 2)
    # Compared as the values that a decoder makes, so that a value of the grid stays the one it is.
    low = _looked_up(levels.values, lower).view_as(values).mul_(top)
    high = _looked_up(levels.values[1:], lower).view_as(values).mul_(top)
    chance = torch.sub(values, low).div_(high.sub_(low))
    return lower.view_as(values).add_(uniform(values, rounding) < chance)


def _looked_up(table: Tensor, index: Tensor) -> Tensor:
    return torch.index_select(table, 0, index)  # three times as fast as table[index]


def round_to_dtype(values: Tensor, dtype: torch.dtype, rounding: Uniform) -> Tensor:
    """`values`, float32, in bf16 or fp16: one of the two neighbours; the largest finite value beyond it."""
    most = torch.finfo(dtype).max
    values = values.clamp(-most, most)
    size, near = values.abs(), values.to(dtype)
    bits = near.view(torch.int16)  # sign and magnitude: one more is the neighbour away from zero
    bits -= (near.float().abs_() > size).to(torch.int16)
    low = near.float().abs_()
    high = (bits + 1).view(dtype).float().abs_()
    chance = (size - low).div_(high.sub_(low))
    bits += (uniform(values, rounding) < chance).to(torch.int16)
    return near
