"""Matrices handed over a few rows at a time, so that no full-precision copy of one is ever needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hizoo_lite.errors import UserError

#: `read(start, stop)` gives rows start .. stop of a matrix, (stop - start, in_features).
RowReader = Callable[[int, int], Tensor]

#: Elements of a chunk. The quantizers take about 20 bytes of temporaries an element: 10 MB.
CHUNK_ELEMENTS = 1 << 19


def row_chunks(
    rows: int, columns: int, multiple: int, elements: int | None = None
) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about `elements` elements that start at a multiple of `multiple` rows.

    elements: None for `CHUNK_ELEMENTS`.
    """
    height = max(1, (elements or CHUNK_ELEMENTS) // max(columns, 1) // multiple) * multiple
    for start in range(0, rows, height):
        yield start, min(start + height, rows)


def check_out(out: Tensor, shape: tuple[int, int], first_row: int) -> None:
    """Raise ValueError unless `out` can take rows of a (out_features, in_features) matrix."""
    if out.ndim != 2 or out.shape[1] != shape[1] or not out.is_contiguous():
        raise ValueError(f"out: contiguous (rows, {shape[1]}) wanted, got {tuple(out.shape)}")
    if first_row < 0 or first_row + out.shape[0] > shape[0]:
        raise ValueError(
            f"rows {first_row} .. {first_row + out.shape[0]} are outside of a matrix of {shape[0]} rows"
        )
    if out.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"out: bfloat16, float16 or float32 wanted, got {out.dtype}")


def check_finite(absmax: Tensor, name: str, stored_as: str) -> None:
    """Raise `UserError` if a block's or row's largest magnitude is not a finite number."""
    if not bool(torch.isfinite(absmax).all()):
        raise UserError(f"{name}: holds values that are not finite (in {stored_as}); it cannot be quantized")
