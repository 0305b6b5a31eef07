"""A long folded batch goes through a block in chunks, the branches of a row kept together.

A block's inner activations (the MLP's above all) are several times the size of what it takes in and gives
out. In chunks a step takes about the memory of one plain forward of the batch. A block sees nothing of other
rows, so the losses are the same but for the rounding of products with fewer rows. If a chunk is a single
long row, its MLP, which sees nothing of other tokens either, goes through in slices of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from hizoo_lite.branches import BranchState
from hizoo_lite.device import like
from hizoo_lite.engine.overwritten import Overwritten
from hizoo_lite.model.linear import on_existing

#: Folded tokens below which a chunk saves little memory and costs one more unpacking of every weight. On a
#: GPU that is a quarter of the products of 1024 tokens (tools/roofline.py), and as many launches again.
LEAST_TOKENS = {"cpu": 512, "cuda": 8192}
#: The same for a space in the weights: a chunk costs one more drawing of the noise of every weight, 2.8 ms
#: a million on a CPU core, which is a sixth of the products of so many tokens.
LEAST_TOKENS_REDRAWN = {"cpu": 4096, "cuda": 8192}
#: Of one long row, folded tokens that go through its MLP together at least; and if noise is redrawn.
LEAST_SLICE = {"cpu": 512, "cuda": 1024}
LEAST_SLICE_REDRAWN = {"cpu": 4096, "cuda": 4096}

#: Slices of tokens beyond which an MLP's activations are not what fills the memory.
MOST_SLICES = 32

#: Tensors that a block is given which have no row axis, whatever their shape.
_WITHOUT_ROWS = frozenset({"cache_position", "rel_embeddings", "position_bias"})
#: Tensors whose first axis is rows times heads.
_ROWS_AND_HEADS = frozenset({"alibi"})


#: The part of a block that treats every token alike, by what the blocks of most architectures call it; or the
#: calls it consists of, one after the other, if it is no module of its own (OPT).
_TOKENWISE = (("mlp",), ("fc1", "activation_fn", "fc2"))


class Chunks(NamedTuple):
    """How a batch is cut up inside a block."""

    rows: int  # token sequences that go through together, with all their branches
    slices: int  # parts that the tokens of such a chunk are cut into for the MLP

    def of_one_branch(self, rows: int, branches: int) -> Chunks:
        """Of a block that only one of the branches goes through: as many tokens at once, if there are."""
        together = min(rows, self.rows * branches)
        return Chunks(together, -(-together * self.slices // (self.rows * branches)))


def plan_chunks(
    wanted: int | Literal["auto"],
    rows: int,
    length: int,
    branches: int,
    device_type: str,
    redrawn: bool = False,
    chunk_halvings: int = 0,
) -> Chunks:
    """For a batch of `rows` sequences of `length` tokens, folded `branches` times.

    auto: a few rows, fewer than the batch has, since all branches of all rows lie between the blocks.
    redrawn: the noise of weights is drawn in each chunk. chunk_halvings: how often chunks have been halved
    because memory ran out.
    """
    if wanted != "auto":
        together, slices = min(wanted, rows), 1
    else:
        kind = like(device_type)
        least = (LEAST_TOKENS_REDRAWN if redrawn else LEAST_TOKENS)[kind]
        least_slice = (LEAST_SLICE_REDRAWN if redrawn else LEAST_SLICE)[kind]
        together = min(rows, max(-(-rows // branches**2), -(-least // (branches * length))))
        slices = -(-branches * length // max(least_slice, rows * length)) if together == 1 else 1
    while chunk_halvings and together > 1:
        together, chunk_halvings = -(-together // 2), chunk_halvings - 1
    return Chunks(together, min(slices << chunk_halvings, MOST_SLICES, length))


def recorded_rows(
    wanted: int | Literal["auto"], rows: int, length: int, device_type: str, chunk_halvings: int
) -> int:
    """Sequences that go through a block together with a graph, whose activations live until its gradient.

    auto: a quarter of the tokens that a chunk without one has at least. The rest is as for `plan_chunks`.
    """
    if wanted != "auto":
        return max(1, min(wanted, rows) >> chunk_halvings)
    tokens = LEAST_TOKENS[like(device_type)] >> (2 + chunk_halvings)
    return min(rows, max(1, tokens // length))


class SlicedMLP:
    """Runs a block's token-wise part slice by slice; `slices` is set before the block runs.

    It hides the part under its own name in the block's instance dictionary, which Python reads before torch's
    table of children: the module tree, its names and its weights stay what they are.
    """

    def __init__(self, block: nn.Module, names: tuple[str, ...], state: BranchState) -> None:
        self.block, self.names, self.state, self.slices = block, names, state, 1
        for name in names[:-1]:
            block.__dict__[name] = _unchanged
        block.__dict__[names[-1]] = self

    def __call__(self, x: Tensor, *more: Tensor) -> Tensor:
        """x: (branches * rows, length, features), or its first two axes flattened; `more` alike."""
        kept = self.state.existing(x)
        if self.slices == 1 and kept is None:
            return self._run(x, *more)
        branches = self.state.branches.count
        folded = [value.reshape(branches, -1, value.shape[-1]) for value in (x, *more)]
        y = on_existing(lambda part: self._in_slices(part, *folded[1:]), folded[0], None if more else kept)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _in_slices(self, *folded: Tensor) -> Tensor:
        """folded: (branches, tokens, features) each."""
        branches, tokens = folded[0].shape[:2]
        size = -(-tokens // self.slices)
        diverged = self.state.mark()
        out = torch.empty(0)
        for first in range(0, tokens, size):
            part = slice(first, min(first + size, tokens))
            self.state.restore(diverged)
            with self.state.laid_out(branches, part.stop - part.start):
                y = self._run(*(value[:, part] for value in folded))
            if first == 0:
                out = torch.empty(branches, tokens, y.shape[-1], dtype=y.dtype, device=y.device)
            out[:, part] = y
        return out

    def _run(self, x: Any, *more: Any) -> Any:
        for name in self.names:
            x, more = self.block._modules[name](x, *more), ()  # type: ignore[misc]
        return x


def slice_mlp(block: nn.Module, state: BranchState) -> SlicedMLP | None:
    """Make the MLP of a block sliceable; None if its block has none by a known name."""
    for names in _TOKENWISE:
        if all(isinstance(block._modules.get(name), nn.Module) for name in names):
            return SlicedMLP(block, names, state)
    return None


def _unchanged(x: Tensor) -> Tensor:
    return x


def in_chunks(
    block: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    state: BranchState,
    rows: int,
    size: int,
    overwrite: bool = False,
) -> Any:
    """What `block(*args, **kwargs)` gives, computed `size` rows at a time.

    overwrite: replace the hidden states in place, chunk by chunk, so that one tensor serves all blocks of a
    pass; who reads the block's input after the block gets `ReadAgain` then. Of a tuple the first tensor is
    kept; attention probabilities are nobody's here. The first axis of what has `branches * rows` entries
    there is branch after branch.
    """
    hidden = args[0] if args else kwargs["hidden_states"]
    result: Any = None
    diverged = state.mark()
    for first in range(0, rows, size):
        part = slice(first, min(first + size, rows))
        state.restore(diverged)
        given, named = mapped(partial(cut, branches=state.branches.count, rows=rows, part=part), args, kwargs)
        kept = state.kept(hidden, part)
        with state.laid_out(state.branches.count * (part.stop - part.start), hidden.shape[1], kept):
            out = block(*given, **named)
        if result is None:
            overwrite = overwrite and _takes(hidden, out)
            result = _room(out, hidden if overwrite else None, state.branches.count, rows)
        result = _placed(out, result, part)
    if overwrite:
        Overwritten.mark(hidden)
    return _flat(result)


def has_cache(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a block is given what holds all rows and is written to: a cache, or the dict of Gemma 4."""
    return any(isinstance(value, Cache | MutableMapping) for value in (*args, *kwargs.values()))


def cut(
    tensor: Tensor, name: str, branches: int, rows: int, part: slice, of_branches: slice = slice(None)
) -> Tensor:
    """Rows `part` of what a block is given by that name, in some branches; all of it if it has no rows."""
    folded = branches * rows
    heads = tensor.shape[0] // folded if name in _ROWS_AND_HEADS and tensor.ndim else 1
    if name in _WITHOUT_ROWS or tensor.ndim < 2 or tensor.shape[0] != folded * heads:
        return tensor
    by_row = tensor.view(branches, rows, heads, *tensor.shape[1:])
    return by_row[of_branches, part].reshape(-1, *tensor.shape[1:])


def mapped(
    function: Callable[[Tensor, str], Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`function` on every tensor that a block is given, with its name, "" if it has none."""
    named = {name: _mapped(function, value, name) for name, value in kwargs.items()}
    return tuple(_mapped(function, value, "") for value in args), named


def _mapped(function: Callable[[Tensor, str], Tensor], value: Any, name: str) -> Any:
    """`function` on every tensor in nested tuples and lists."""
    if isinstance(value, Tensor):
        return function(value, name)
    if type(value) in (tuple, list):
        return type(value)(_mapped(function, item, name) for item in value)
    return value


def _room(chunk: Any, hidden: Tensor | None, branches: int, rows: int) -> Any:
    """Where a block's output goes, of the form of a chunk's; tensors are (branches, rows, ...).

    That is over `hidden`, if there is one.
    """
    if isinstance(chunk, Tensor):
        if hidden is not None:
            return hidden.view(branches, rows, *hidden.shape[1:])
        return torch.empty(branches, rows, *chunk.shape[1:], dtype=chunk.dtype, device=chunk.device)
    if type(chunk) in (tuple, list) and len(chunk) > 0:
        return type(chunk)([_room(chunk[0], hidden, branches, rows), *(None for _ in chunk[1:])])
    return None


def _takes(hidden: Tensor, chunk: Any) -> bool:
    """Whether a block's output can lie where the hidden states are."""
    if type(chunk) in (tuple, list) and len(chunk) > 0:
        return _takes(hidden, chunk[0])
    if not isinstance(chunk, Tensor) or not may_overwrite(hidden):
        return False
    return chunk.shape[1:] == hidden.shape[1:] and chunk.dtype == hidden.dtype


def may_overwrite(hidden: Tensor) -> bool:
    """Whether other values can lie where hidden states are: nobody has a view of them that is not known."""
    if type(hidden) is not Tensor or not hidden.is_contiguous():
        return False
    return hidden._base is None or type(hidden._base) is Overwritten


def _placed(chunk: Any, whole: Any, part: slice) -> Any:
    """Copy a chunk's output to its rows of the whole."""
    if isinstance(chunk, Tensor):
        whole[:, part] = chunk.view(whole.shape[0], part.stop - part.start, *chunk.shape[1:])
        return whole
    if type(chunk) in (tuple, list) and len(chunk) > 0:
        rest = (None if isinstance(item, Tensor) else item for item in chunk[1:])
        return type(chunk)([_placed(chunk[0], whole[0], part), *rest])
    return chunk


def _flat(whole: Any) -> Any:
    if isinstance(whole, Tensor):
        return whole.flatten(0, 1)
    return type(whole)(_flat(item) for item in whole) if type(whole) in (tuple, list) else whole
