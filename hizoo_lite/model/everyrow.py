"""A result that is the same for all rows of a branch, where a block expects one for all rows there are.

DeBERTa applies layers of its attention to codes of relative positions too, (1, codes, features). The layer's
branches make different results of it, so they are given for every row, branch after branch. What broadcasts
takes that as it is. DeBERTa-v2 repeats the result once a row itself, and nothing is left to do then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor

from hizoo_lite.errors import UserError

#: What leaves the rows in front: the result is still one of every row.
_RESHAPING = frozenset(
    {Tensor.view, Tensor.reshape, Tensor.permute, Tensor.transpose, Tensor.contiguous, Tensor.unsqueeze}
)


@final
class EveryRow(Tensor):
    """(rows, ...) of the folded batch; its `repeat` once a row gives it as it is."""

    rows: int

    @classmethod
    def of(cls, by_branch: Tensor, rows: int) -> Tensor:
        """by_branch: (branches, tokens, features) -> (rows, tokens, features), branch after branch."""
        return cls._made(by_branch.repeat_interleave(rows // by_branch.shape[0], dim=0), rows)

    @classmethod
    def _made(cls, value: Tensor, rows: int) -> Tensor:
        made = value.as_subclass(cls)
        made.rows = rows
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.repeat:
                return _repeated(args[0], args[1:])
            result = func(*args, **(kwargs or {}))
            return cls._made(result, args[0].rows) if func in _RESHAPING else result


def _repeated(value: EveryRow, sizes: tuple[Any, ...]) -> Tensor:
    counts = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    if counts[0] != value.rows or any(count != 1 for count in counts[1:]):
        raise UserError(
            f"model: a block repeats {counts} times what is the same for all of {value.rows} rows; this "
            "architecture is not supported"
        )
    return value.as_subclass(Tensor)
