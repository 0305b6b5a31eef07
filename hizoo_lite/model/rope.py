"""Position codes that depend on a row's length (longrope, dynamic NTK), of each row in a batch as of itself.

transformers takes the longest row's for all: a short text beside a long one would have another loss than
alone. Dynamic NTK also keeps the codes of the longest row there ever was. So the model's own code is asked
once for every length that makes a difference, with as many positions as that has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from hizoo_lite.branches import BranchState
from hizoo_lite.errors import UserError

_TYPES = frozenset({"longrope", "dynamic"})


@final
class RowPositions:
    """Hooks on the position codes of a model that depend on lengths; does nothing if there are none."""

    def __init__(self, module: nn.Module, state: BranchState) -> None:
        self.state = state
        self.lengths: list[int] | None = None  # of the rows of the batch at hand
        self.modules = [layer for layer in module.modules() if _TYPES & set(_types(layer).values())]
        for layer in self.modules:
            layer.register_forward_hook(self._codes, with_kwargs=True)

    @contextmanager
    def of(self, lengths: Sequence[int]) -> Iterator[None]:
        """While this is open the model runs on a right-padded batch with rows of these lengths."""
        self.lengths = list(lengths)
        try:
            yield
        finally:
            self.lengths = None

    def depend_on(self, length: int) -> bool:
        """Whether any position codes of a row of this length are others than those of a shorter one."""
        return any(length > _original(layer, kind) for layer in self.modules for kind in _types(layer))

    def forget(self) -> None:
        """Have codes made as if no row had been before."""
        for layer in self.modules:
            for kind, rope in _types(layer).items():
                if rope == "dynamic":
                    device = next(layer.buffers()).device
                    first = torch.zeros(1, 1, dtype=torch.int64, device=device)
                    _ask(layer, torch.zeros(1, 1, 1, device=device), first, kind)

    def _codes(self, layer: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        """What the layer is to give: its own output, or codes of shape (rows, length, ...) instead of it."""
        given = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | dict(kwargs)
        kind, positions = given.get("layer_type"), given["position_ids"]
        rope, original, length = _types(layer)[kind], _original(layer, kind), positions.shape[1]
        if self.lengths is None or rope not in _TYPES:
            return output
        if rope == "dynamic":
            reaches = [min(length, max(row, original)) for row in self.lengths]
        else:
            reaches = [length if row > original else min(length, original) for row in self.lengths]
        if set(reaches) == {length} and (rope != "dynamic" or length < original):
            return output
        folded = reaches * self.state.branches.count
        if positions.shape[0] not in (1, len(folded)):
            raise UserError(
                f"model: {type(layer).__name__} makes position codes, which depend on a row's length, of "
                f"{positions.shape[0]} of {len(folded)} rows; this architecture is not supported"
            )
        made = {}
        for reach in set(reaches):
            _ask(layer, given["x"], positions[:, :1], kind)
            made[reach] = _ask(layer, given["x"], positions[:, :reach], kind)
        rows = [_of_row(made[reach], row, length) for row, reach in enumerate(folded)]
        return tree_map(lambda *values: torch.stack(values), *rows)


def _ask(layer: nn.Module, x: Tensor, positions: Tensor, kind: str | None) -> Any:
    return layer.forward(x, positions, **({} if kind is None else {"layer_type": kind}))


def _of_row(codes: Any, row: int, length: int) -> Any:
    """One row's, with nothing where its padding is."""

    def padded(tensor: Tensor) -> Tensor:
        own = tensor[row if tensor.shape[0] > 1 else 0]
        out = own.new_zeros(length, *own.shape[1:])
        out[: own.shape[0]] = own
        return out

    return tree_map_only(Tensor, padded, codes)


def _types(layer: nn.Module) -> dict[str | None, str]:
    """The rope type by the type of attention layer, None if all have one; empty for other modules."""
    types = getattr(layer, "rope_type", None)
    if isinstance(types, str):
        return {None: types}
    return dict(types) if isinstance(types, Mapping) else {}


def _original(layer: nn.Module, kind: str | None) -> int:
    """The length up to which the codes are those of training."""
    if _types(layer)[kind] != "longrope":
        return int(layer.original_max_seq_len)  # type: ignore[arg-type]
    config: Any = layer.config
    rope = config.rope_parameters if kind is None else config.rope_parameters[kind]
    return int(rope["original_max_position_embeddings"])
