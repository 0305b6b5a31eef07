"""Block inputs that were overwritten by the block's output, and what happens where the model reads one again.

Few models do: DeBERTa-v2-xlarge has a convolution beside its first block. Which ones is not known, so an
overwritten input raises whenever its values are asked for, and the pass is repeated without overwriting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor

#: What is asked about a tensor without reading its values.
_DESCRIBING = frozenset(
    {
        *(
            getattr(Tensor, name).__get__
            for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "is_meta")
        ),
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        Tensor.__len__,
        Tensor.is_floating_point,
    }
)


class ReadAgain(Exception):
    """A block's input was read after the block: inputs of this model's blocks cannot be overwritten."""


@final
class Overwritten(Tensor):
    """A tensor that has other values by now than its owner thinks."""

    @classmethod
    def mark(cls, tensor: Tensor) -> None:
        """Make an overwritten tensor one of these, for everybody who holds it."""
        tensor.__class__ = cls

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func not in _DESCRIBING:
            raise ReadAgain(getattr(func, "__name__", str(func)))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
