"""A transformer block that is brought in before it runs, run chunk by chunk, and let go afterwards.

`PresentBlock` takes the place of a block in the module tree of the Hugging Face model, so that whatever
runs the model (a step, an evaluation, `generate`) streams it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hizoo_lite.engine.chunks import (
    Chunks,
    cut,
    has_cache,
    in_chunks,
    mapped,
    plan_chunks,
    recorded_rows,
    slice_mlp,
)
from hizoo_lite.engine.fanout import is_alike, run_for_one
from hizoo_lite.engine.hidden import NotComputed
from hizoo_lite.engine.overwritten import OneBranch

if TYPE_CHECKING:
    from hizoo_lite.engine.backward import Given
    from hizoo_lite.model.model import Model


class PresentBlock(nn.Module):
    """Runs block `index` of a model while its weights are there.

    It has the block's own children and parameters, under their own names, and answers for its attributes
    (models ask their blocks for `attention_type` and the like).
    """

    def __init__(self, model: Model, index: int) -> None:
        super().__init__()
        self.model, self.index = [model], index  # in a list: the model is no child of its own block
        self.block = [model.blocks[index]]
        for kind in ("_modules", "_parameters", "_buffers"):
            object.__setattr__(self, kind, getattr(self.block[0], kind))
        self.training = self.block[0].training
        self._mlp = slice_mlp(self.block[0], model.state)
        self._beside: tuple[Any, ...] | None = None  # what it gives besides hidden states; None: no tuple

    def __getattr__(self, name: str) -> Any:
        """The block's, if this has no such attribute."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"][0], name)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's own; a long batch goes through in chunks, and one branch if all are alike."""
        part, boundaries = self.model[0].part, self.model[0].boundaries
        if part is not None:
            if not part.runs(self.index):
                handed_on = part.left_out(args[0] if args else kwargs["hidden_states"])
                return handed_on if self._beside is None else (handed_on, *self._beside)
            args, kwargs = part.given(self.index, args, kwargs)
        if boundaries is None:
            return self._forward(args, kwargs)
        boundaries.enter(self.index, args, kwargs)
        return boundaries.leave(self.index, self._forward(args, kwargs))

    def _forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        model = self.model[0]
        hidden = args[0] if args else kwargs["hidden_states"]
        branches = model.state.branches.count
        rows = hidden.shape[0] if type(hidden) is OneBranch else hidden.shape[0] // branches
        chunks = plan_chunks(
            model.branch_chunk,
            rows,
            hidden.shape[1],
            branches,
            model.device.type,
            redrawn=model.pending is not None,
            chunk_halvings=model.chunk_halvings,
        )
        if is_alike(model, self.index, hidden, args, kwargs):
            run = partial(self._run, rows, chunks.of_one_branch(rows, branches))
            out = run_for_one(model, run, args, kwargs, is_last=self.index + 1 == model.blocks_alike)
        else:
            out = self._run(rows, chunks, args, kwargs)
        if not isinstance(out, Tensor):
            self._beside = tuple(NotComputed.nothing() if isinstance(i, Tensor) else i for i in out[1:])
        return out

    def _run(self, rows: int, chunks: Chunks, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """On `rows` rows of every branch."""
        model, block = self.model[0], self.block[0]
        hidden = args[0] if args else kwargs["hidden_states"]
        if self._mlp is not None:
            self._mlp.slices = chunks.slices
        with present(model, self.index), model.state.keeping():
            if chunks.rows >= rows or has_cache(args, kwargs):
                kept = model.state.kept(hidden, slice(0, rows))
                with model.state.laid_out(hidden.shape[0], hidden.shape[1], kept):
                    return block(*args, **kwargs)
            return in_chunks(block, args, kwargs, model.state, rows, chunks.rows, model.overwrites)

    def backward(
        self, given: Given, gradient: Tensor, exact: Mapping[str, Tensor], found: dict[str, Tensor]
    ) -> Tensor:
        """The gradient of the block's input from that of its output, both (rows, length, features) float32.

        Args:
            given: as the block was given it, one branch. Its hidden states may be on the host.
            exact: parameters of this block. Their gradients, float64, are added to `found`.
        """
        model, block = self.model[0], self.block[0]
        hidden = given.args[0] if given.args else given.kwargs["hidden_states"]
        rows, length = hidden.shape[:2]
        size = recorded_rows(model.branch_chunk, rows, length, model.device.type, model.chunk_halvings)
        if self._mlp is not None:
            self._mlp.slices = 1
        below = torch.empty_like(gradient)
        with present(model, self.index), model.state.keeping():
            for first in range(0, rows, size):
                part = slice(first, min(first + size, rows))
                own = partial(cut, branches=1, rows=rows, part=part)
                args, kwargs = mapped(own, given.args, given.kwargs)
                x = (args[0] if args else kwargs["hidden_states"]).to(model.device).requires_grad_(True)
                args, kwargs = ((x, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": x})
                kept = model.state.kept(hidden, part)
                with model.state.laid_out(part.stop - part.start, length, kept), torch.enable_grad():
                    out = block(*args, **kwargs)
                    out = out[0] if type(out) in (tuple, list) else out
                    wanted = [x, *exact.values()]
                    gradients = torch.autograd.grad(out, wanted, gradient[part])
                below[part] = gradients[0]
                for name, value in zip(exact, gradients[1:], strict=True):
                    found[name] = found[name] + value if name in found else value.double()
        return below


class present:
    """While this is open, block `index` is on the device and has every update that waited for it."""

    def __init__(self, model: Model, index: int) -> None:
        self.model, self.index = model, index

    def __enter__(self) -> None:
        self.model.residency.acquire(self.index)
        try:
            if self.model.pending is not None and self.model.pending.apply(self.index):
                self.model.residency.mark_dirty(self.index)
        except BaseException:
            self.model.residency.release(self.index)
            raise

    def __exit__(self, *_: object) -> None:
        if self.model.observer is not None:
            self.model.observer.reached(self.index)
        self.model.residency.release(self.index)


@torch.no_grad()
def each_block(model: Model) -> Iterator[int]:
    """Every block in order, by index; each is present and up to date until the next one is asked for."""
    for index in range(len(model.blocks)):
        with present(model, index):
            yield index


def install(model: Model) -> None:
    """Put a `PresentBlock` in the place of every block."""
    layers = model.module.get_submodule(model.block_prefix)
    assert isinstance(layers, nn.ModuleList)
    for index in range(len(model.blocks)):
        layers[index] = model.blocks[index] = PresentBlock(model, index)
