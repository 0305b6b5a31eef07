"""Hidden states between blocks that are not what the model takes them for, and what follows if it reads them.

A block's output is written over its input (chunks.py), and blocks that all branches go through alike give
those of one branch (fanout.py), or none if they are known (hidden.py). Few models read such states
anywhere but in the next block: DeBERTa-v2-xlarge has a convolution beside its first block. Which ones is not
known, so whoever asks for the values raises, and the pass is repeated in a plainer way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hizoo_lite.model.model import Model

Result = TypeVar("Result")

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


class Unsuited(Exception):
    """A pass cannot be run in the way it was on this model; `note` is the model's attribute that says so."""

    note: ClassVar[str]


class ReadAgain(Unsuited):
    """A block's input was read after the block: inputs of this model's blocks cannot be overwritten."""

    note = "reads_again"


class FoldFirst(Unsuited):
    """What the first blocks give or are given is of all branches: none can be left out there."""

    note = "folds_first"


def until_suited(model: Model, work: Callable[[], Result]) -> Result:
    """`work()`, again for each way of running this model that it has shown to be unsuited."""
    for _ in Unsuited.__subclasses__():
        try:
            return work()
        except Unsuited as found:
            setattr(model, found.note, True)
    return work()


class Unreadable(Tensor):
    """A tensor that raises `error` whenever its values are asked for."""

    error: ClassVar[type[Unsuited]]

    @classmethod
    def mark(cls, tensor: Tensor) -> None:
        """Make a tensor one of these, for everybody who holds it."""
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
            raise cls.error(getattr(func, "__name__", str(func)))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@final
class Overwritten(Unreadable):
    """A tensor that has other values by now than its owner thinks."""

    error = ReadAgain


@final
class OneBranch(Unreadable):
    """What a block gives of one branch, (rows, ...), where the model thinks it has all of them.

    room: a tensor of the form of all branches' hidden states that nobody reads any more; None: there is none.
    """

    error = FoldFirst
    room: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor, room: Tensor | None) -> Tensor:
        """A view of a tensor that a block gives."""
        made = readable(tensor)
        cls.mark(made)
        made.room = room  # type: ignore[attr-defined]
        return made


def readable(tensor: Tensor) -> Tensor:
    """A view of a tensor, whatever it is marked as."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.view(tensor.shape)
