"""Exact gradients inside the blocks, by reverse mode, one block at a time: memory is that of one block.

The forward pass keeps what goes into each block that has parameters with exact gradients, and into those
above it, of the branches that stand for theta (`Boundaries`); inside a block nothing is kept. Then the blocks
come back from the last one down, through the same residency. Each is run once more, with a graph, in chunks
of rows, and gives the gradient of its input to the one below (activation checkpointing: Chen et al., arXiv
1604.06174, section 4.1, with a segment a block). The packed weights are unpacked again for the product with
the gradient, as for the product with the input; no unpacked matrix lives on in a graph.

Reverse mode is right only if a block's output is the next one's input and nothing else of a block is read
elsewhere. Other models are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from hizoo_lite.device import like
from hizoo_lite.engine.chunks import cut, has_cache, mapped
from hizoo_lite.engine.overwritten import OneBranch
from hizoo_lite.errors import UserError
from hizoo_lite.process import trim

if TYPE_CHECKING:
    from hizoo_lite.model.model import Model


class NoReverse(UserError):
    """The model's blocks allow no reverse mode: `why`, in words."""

    def __init__(self, why: str) -> None:
        super().__init__(f"--exact-blocks: {why}; allowed for this model: 0")
        self.why = why


class Given(NamedTuple):
    """What a block was given, of the branches that stand for theta."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Boundaries:
    """What goes into the blocks from `lowest` on, in a forward pass, and what comes out of the last one."""

    def __init__(self, model: Model, lowest: int, standing: int) -> None:
        """standing: how many of the first branches stand for theta."""
        self.model, self.lowest, self.standing = model, lowest, standing
        self.given: dict[int, Given] = {}
        self.output: Tensor | None = None  # of the last block, (branches * rows, ...): a graph begins there
        self._before: tuple[int, Any] = (0, None)  # where the last output lies
        self._others: set[int] = set()  # where blocks' further outputs lie

    def enter(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep what block `index` is given, if it is one of these."""
        if index < self.lowest:
            return
        model, hidden = self.model, args[0] if args else kwargs["hidden_states"]
        if index > self.lowest and self._before != _place(hidden):
            self._refuse("does more between its blocks than hand hidden states on")
        if has_cache(args, kwargs) or type(hidden) is OneBranch:
            self._refuse("gives its blocks what is not theirs alone")
        branches = self.model.state.branches.count
        rows = hidden.shape[0] // branches

        def kept(tensor: Tensor, name: str) -> Tensor:
            if not tensor.is_meta and tensor.data_ptr() in self._others:
                self._refuse("hands more than hidden states from block to block")
            if tensor is not hidden:
                return cut(tensor, name, branches, rows, slice(None), slice(self.standing))
            own = cut(tensor, "", branches, rows, slice(None), slice(self.standing))
            # another block may be written over it; a GPU's memory is for what is at work
            if like(model.device) == "cuda":
                return own if own.is_meta else own.to("cpu")
            return own.clone()

        self.given[index] = Given(*mapped(kept, args, kwargs))

    def leave(self, index: int, out: Any) -> Any:
        """What block `index` gives, which the next one is to be given; the last one's begins a graph."""
        if index < self.lowest:
            return out
        first = out[0] if type(out) in (tuple, list) else out
        if index + 1 == len(self.model.blocks):
            self.output = first.detach().requires_grad_(True)
            return type(out)([self.output, *out[1:]]) if type(out) in (tuple, list) else self.output
        self._before = _place(first)
        if type(out) in (tuple, list):
            self._others |= {item.data_ptr() for item in out[1:] if isinstance(item, Tensor)}
        return out

    def _refuse(self, why: str) -> None:
        raise NoReverse(f"{self.model.config.model_type} {why}")

    def gradients(self, gradient: Tensor, exact: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of the blocks' parameters among `exact`, float64, by name.

        gradient: of the loss with respect to `output`, of the branches that stand for theta,
            (standing * rows, length, features).
        """
        model = self.model
        found: dict[str, Tensor] = {}
        if like(model.device) == "cpu":
            trim()  # what the forward pass and the head had is of other sizes, and would stay beside
        model.residency.falls = True
        for index in reversed(range(self.lowest, len(model.blocks))):
            own = {name: value for name, value in exact.items() if model.block_of(name) == index}
            gradient = model.blocks[index].backward(self.given.pop(index), gradient, own, found)  # type: ignore[operator]
        return found


@contextmanager
def kept_boundaries(model: Model, exact: Mapping[str, Tensor], standing: int) -> Iterator[Boundaries | None]:
    """While this is open a pass keeps what exact gradients of these parameters need; None: nothing.

    standing: how many of the first branches stand for theta.
    """
    lowest = lowest_exact(model, exact)
    if lowest is None:
        yield None
        return
    made = model.boundaries = Boundaries(model, lowest, standing)
    model.residency.turns_at = made.lowest
    try:
        yield made
    finally:
        model.boundaries = model.residency.turns_at = None
        model.residency.falls = False


def lowest_exact(model: Model, exact: Iterable[str]) -> int | None:
    """The first block that any parameters or layers of these names are in; None: all are outside."""
    return min((block for name in exact if (block := model.block_of(name)) is not None), default=None)


def _place(tensor: Tensor) -> tuple[int, Any]:
    return (0 if tensor.is_meta else tensor.data_ptr()), tensor.shape
