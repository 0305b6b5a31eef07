"""The interface of a weight matrix in its stored form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from hizoo_lite.base import Bits
from hizoo_lite.noise import Uniform

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Stored(NamedTuple):
    """One buffer of a weight whose bytes travel when its block is streamed."""

    owner: nn.Module  # whose buffer it is
    name: str  # of the buffer
    key: str | None  # behind the layer's name in a checkpoint, such as "weight.absmax"; None: zeros at first

    @property
    def tensor(self) -> Tensor:
        """The buffer as it is now; on the meta device while its block is offloaded."""
        return self.owner.get_buffer(self.name)


class PackedWeight(ABC):
    """A weight matrix in its stored form; a member is an `nn.Module` too. Use never changes its buffers.

    `shape` is (out_features, in_features). The product of a linear layer is
    `x @ unpacked.T * row_scale`, where `unpacked` is what `unpack` writes. Only `store` changes a buffer.
    """

    bits: Bits
    shape: tuple[int, int]
    layer: str  # name of the layer that it is of, for messages

    @abstractmethod
    def unpack(self, out: Tensor, first_row: int = 0) -> Tensor:
        """Fill `out` with the rows from `first_row` on.

        out: (rows, in_features), contiguous, bf16, fp16 or float32.
        """

    def ready(self, dtype: torch.dtype) -> Tensor | None:
        """The stored matrix itself if it needs no unpacking for a product in `dtype`, else None."""
        return None

    @property
    def row_scale(self) -> Tensor | None:
        """A factor of every output feature, (out_features,) float32, that `unpack` leaves out; or None."""
        return None

    @property
    def tile_rows(self) -> int:
        """`store` takes rows from a multiple of this on, and as many, or all that are left."""
        return 1

    def values(self, out: Tensor, first_row: int = 0) -> Tensor:
        """Fill `out`, (rows, in_features) contiguous float32, with the true values from `first_row` on."""
        self.unpack(out, first_row)
        if self.row_scale is not None:
            out *= self.row_scale[first_row : first_row + out.shape[0], None]
        return out

    @abstractmethod
    def store(self, values: Tensor, first_row: int, rounding: Uniform) -> None:
        """Replace rows `first_row` .. by `values`, (rows, in_features) contiguous float32, in place.

        What the stored form cannot hold is rounded at random so that the expectation of what is decoded
        is `values`; `rounding` is on their device. Values that were decoded are stored as they were.
        If memory is refused, nothing has been changed.
        """

    @abstractmethod
    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """The module's."""

    @abstractmethod
    def get_buffer(self, target: str) -> Tensor:
        """The module's."""

    def nbytes(self) -> int:
        """Bytes of the stored form."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    @abstractmethod
    def stored(self) -> list[Stored]:
        """The buffers that hold the matrix; not what is small and constant (code tables, offsets)."""
