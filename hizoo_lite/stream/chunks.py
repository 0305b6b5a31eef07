"""A long folded batch goes through a block in chunks of rows, the branches of a row kept together.

A block's inner activations (the MLP's above all) are several times the size of what it takes in and gives
out. In chunks they take no more than one plain forward of the batch would. A block sees nothing of other
rows, so the losses are the same but for the rounding of products with fewer rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from hizoo_lite.base import BranchState

#: Folded tokens below which a chunk saves little memory and costs one more unpacking of every weight.
LEAST_TOKENS = {"cpu": 256, "cuda": 1024}

#: Tensors that a block is given which have no row axis, whatever their shape.
_WITHOUT_ROWS = frozenset({"cache_position", "rel_embeddings"})
#: Tensors whose first axis is rows times heads.
_ROWS_AND_HEADS = frozenset({"alibi"})


def chunk_rows(wanted: int | Literal["auto"], hidden: Tensor, branches: int) -> int:
    """Rows (token sequences) of a chunk. hidden: (branches * rows, length, features).

    auto: a chunk with all its branches is as large as the batch with one.
    """
    rows = hidden.shape[0] // branches
    if wanted != "auto":
        return min(wanted, rows)
    least = -(-LEAST_TOKENS[hidden.device.type] // (branches * hidden.shape[1]))
    return min(rows, max(-(-rows // branches), least))


def in_chunks(
    block: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    state: BranchState,
    rows: int,
    size: int,
) -> Any:
    """What `block(*args, **kwargs)` gives, computed `size` rows at a time.

    The first axis of everything that has `branches * rows` entries there is branch after branch.
    """
    folded = state.branches.count * rows
    result: Any = None
    diverged = state.mark()
    for first in range(0, rows, size):
        part = slice(first, min(first + size, rows))

        def cut(tensor: Tensor, name: str, part: slice = part) -> Tensor:
            heads = tensor.shape[0] // folded if name in _ROWS_AND_HEADS else 1
            if name in _WITHOUT_ROWS or tensor.ndim < 2 or tensor.shape[0] != folded * heads:
                return tensor
            by_row = tensor.view(state.branches.count, rows, heads, *tensor.shape[1:])
            return by_row[:, part].reshape(-1, *tensor.shape[1:])

        state.restore(diverged)
        given = [_mapped(cut, value, "") for value in args]
        named = {name: _mapped(cut, value, name) for name, value in kwargs.items()}
        result = _placed(block(*given, **named), result, state.branches.count, rows, part)
    return _flat(result)


def has_cache(kwargs: Mapping[str, Any]) -> bool:
    """Whether a block is asked to read and extend a key-value cache, which holds all rows."""
    return any(kwargs.get(name) is not None for name in ("past_key_values", "past_key_value", "layer_past"))


def _mapped(function: Callable[[Tensor, str], Tensor], value: Any, name: str) -> Any:
    """`function` on every tensor in nested tuples and lists."""
    if isinstance(value, Tensor):
        return function(value, name)
    if type(value) in (tuple, list):
        return type(value)(_mapped(function, item, name) for item in value)
    return value


def _placed(chunk: Any, whole: Any, branches: int, rows: int, part: slice) -> Any:
    """Copy a chunk's output to its rows of the whole, (branches, rows, ...), which the first chunk makes."""
    if isinstance(chunk, Tensor):
        by_row = chunk.view(branches, part.stop - part.start, *chunk.shape[1:])
        if whole is None:
            whole = torch.empty(branches, rows, *chunk.shape[1:], dtype=chunk.dtype, device=chunk.device)
        whole[:, part] = by_row
        return whole
    if type(chunk) in (tuple, list):
        parts: Iterator[Any] = iter(whole if whole is not None else [None] * len(chunk))
        return type(chunk)(_placed(item, next(parts), branches, rows, part) for item in chunk)
    return chunk


def _flat(whole: Any) -> Any:
    if isinstance(whole, Tensor):
        return whole.flatten(0, 1)
    return type(whole)(_flat(item) for item in whole) if type(whole) in (tuple, list) else whole
