"""Below the first block with anything trained all branches are alike, so one of them goes through.

The model's own code (masks, position codes, heads) is run on the batch once a branch, so that its shapes are
those of one batch. A block below the first trained one is given the rows of one branch, of everything that
has rows, and gives as many; behind the last of these blocks there are all branches again. They lie where the
embeddings were, as they do when blocks write over their input (chunks.py).

Which models do more with hidden states than hand them from block to block is not known: the states of one
branch are `OneBranch`, and reading those outside of a block raises `FoldFirst`. So does a block in whose
arguments the branches are not found. Such a model has all branches go through every block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hizoo_lite.engine.budget import is_out_of_memory
from hizoo_lite.engine.chunks import cut, has_cache, mapped, may_overwrite
from hizoo_lite.engine.hidden import first_trained
from hizoo_lite.engine.overwritten import FoldFirst, OneBranch, Overwritten, readable

if TYPE_CHECKING:
    from hizoo_lite.model.model import Model

#: Runs a block on arguments.
Run = Callable[[tuple[Any, ...], Mapping[str, Any]], Any]


def blocks_alike(model: Model, branches: int) -> int:
    """How many blocks there are in front of the first that makes branches differ."""
    if branches == 1 or model.folds_first:
        return 0
    return first_trained(model)


def is_alike(
    model: Model, index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether one branch is enough in block `index`, given these hidden states."""
    if index >= model.blocks_alike or model.state.mark() is not None or has_cache(args, kwargs):
        return False
    return type(hidden) is OneBranch or (type(hidden) is Tensor and hidden.shape[0] == model.state.rows)


def run_for_one(
    model: Model, run: Run, args: tuple[Any, ...], kwargs: Mapping[str, Any], is_last: bool
) -> Any:
    """What a block gives of one branch, `OneBranch`; if it is the last such block, of all branches.

    run: the block. args, kwargs: its own, of all branches but for what blocks before it have given.
    """
    hidden = args[0] if args else kwargs["hidden_states"]
    branches = model.state.branches.count
    rows = (model.state.rows or 0) // branches
    given, named = mapped(partial(_one_branch, branches=branches, rows=rows, hidden=hidden), args, kwargs)
    room = None
    if model.overwrites:
        room = hidden.room if type(hidden) is OneBranch else hidden if may_overwrite(hidden) else None
    if room is not None:
        Overwritten.mark(hidden)
    with model.state.one_branch(), _fitting():
        out = run(given, named)
    first = out[0] if type(out) in (tuple, list) and out else out
    if not isinstance(first, Tensor) or first.shape[0] != rows:
        raise FoldFirst("a block gives other rows than it was given")

    def passed_on(tensor: Tensor, name: str) -> Tensor:
        if tensor.ndim < 2 or tensor.shape[0] != rows:
            return tensor
        if is_last:
            return _all_branches(tensor, branches, room if tensor is first else None)
        return OneBranch.of(tensor, room if tensor is first else None)

    (out,), _ = mapped(passed_on, (out,), {})
    return out


@contextmanager
def _fitting() -> Iterator[None]:
    """While this is open, shapes that do not go together are those of one branch and of all."""
    try:
        yield
    except (RuntimeError, IndexError) as error:
        if type(error) not in (RuntimeError, IndexError) or is_out_of_memory(error):
            raise
        raise FoldFirst(str(error)) from error


def _one_branch(tensor: Tensor, name: str, branches: int, rows: int, hidden: Tensor) -> Tensor:
    """The first one's part of what a block is given."""
    if type(tensor) is OneBranch:
        return readable(tensor)
    found = cut(tensor, name, branches, rows, slice(None), slice(1))
    if rows > 1 or tensor is hidden or found is tensor or tensor.is_meta:
        return found
    if not all(torch.equal(found, other) for other in tensor.split(len(found))):
        raise FoldFirst(f"{name} has another axis of {branches} in front, which looks like that of one row")
    return found


def _all_branches(tensor: Tensor, branches: int, room: Tensor | None) -> Tensor:
    """Once a branch; in `room`, if there is one that takes it."""
    whole = None if room is None else readable(room)
    if whole is None or whole.shape[1:] != tensor.shape[1:] or whole.dtype != tensor.dtype:
        return tensor.repeat(branches, *(1 for _ in tensor.shape[1:]))
    by_branch = whole.view(branches, *tensor.shape)
    there = int(tensor.data_ptr() == whole.data_ptr())  # it is the first branch's already
    by_branch[there:] = tensor
    return whole
