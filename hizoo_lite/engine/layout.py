"""Where the stored buffers of a block lie when the block travels as one run of bytes.

A block is moved as it is stored: codes, scales, 16-bit matrices, one after the other, each at an address
that suits every kernel. Norms and biases are small and stay on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hizoo_lite.quant.packed import Stored

if TYPE_CHECKING:
    from hizoo_lite.model.model import Model

#: Every buffer begins at a multiple of this: a cache line on CPU, a coalesced access on CUDA.
ALIGNMENT = 256


class Place(NamedTuple):
    """One buffer of a block: whose it is, and where it lies in the block's bytes."""

    stored: Stored
    source: str | None  # the tensor in the checkpoint; None for one that is zeros at first
    dtype: torch.dtype
    shape: torch.Size
    offset: int
    nbytes: int
    meta: Tensor  # on the meta device: what the weight has while its block is offloaded


class Layout(NamedTuple):
    """The places of one block, in the order of its layers."""

    places: tuple[Place, ...]
    nbytes: int

    def bind(self, buffer: Tensor) -> None:
        """Make the block's weights views of `buffer`, (at least nbytes,) uint8 on the compute device."""
        for place in self.places:
            part = buffer[place.offset : place.offset + place.nbytes]
            place.stored.owner._buffers[place.stored.name] = part.view(place.dtype).view(place.shape)

    def unbind(self) -> None:
        """Leave tensors without memory in the weights, so that using an absent block is an error."""
        for place in self.places:
            place.stored.owner._buffers[place.stored.name] = place.meta

    def pack(self, buffer: Tensor) -> None:
        """Copy the weights' own tensors into `buffer`, (at least nbytes,) uint8; offloaded ones stay out."""
        for place in self.places:
            tensor = place.stored.tensor
            if not tensor.is_meta:
                part = buffer[place.offset : place.offset + place.nbytes]
                part.copy_(tensor.contiguous().view(-1).view(torch.uint8))


def layouts(model: Model) -> list[Layout]:
    """The layout of every block of a model, from the buffers that its weights have now."""
    found: list[Layout] = []
    linears: list[list[str]] = [[] for _ in model.blocks]
    for name in model.linears:
        block = model.block_of(name)
        if block is not None:
            linears[block].append(name)
    for names in linears:
        places: list[Place] = []
        end = 0
        for name in names:
            stem = model.stored_names.get(name, f"{name}.weight").removesuffix("weight")
            for stored in model.linears[name].weight.stored():
                tensor = stored.tensor
                offset = -(-end // ALIGNMENT) * ALIGNMENT
                end = offset + tensor.numel() * tensor.itemsize
                source = None if stored.key is None else stem + stored.key
                meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                places.append(Place(stored, source, meta.dtype, meta.shape, offset, end - offset, meta))
        found.append(Layout(tuple(places), -(-end // ALIGNMENT) * ALIGNMENT))
    return found
