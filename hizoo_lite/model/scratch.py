"""Buffers that are allocated once and used again by every layer of every step.

A fresh buffer above 32 MB is mapped and unmapped by glibc at each use, and half of a layer's time
goes into its page faults; a reused one costs nothing and makes the peak predictable.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor


class _Made(NamedTuple):
    """What a buffer holds, and from what it was made."""

    view: Tensor
    how: Hashable
    sources: list[tuple[weakref.ref[Tensor], int] | None]  # and the version of each

    def is_of(self, how: Hashable, sources: tuple[Tensor | None, ...]) -> bool:
        """Whether it was made so, from the same tensors, none of which has been written to since."""
        return (self.how, len(self.sources)) == (how, len(sources)) and all(
            map(_is_as_before, self.sources, sources)
        )


def _is_as_before(before: tuple[weakref.ref[Tensor], int] | None, source: Tensor | None) -> bool:
    if before is None or source is None:
        return before is None and source is None
    return before[0]() is source and before[1] == source._version


class Scratch:
    """Named byte buffers that grow to the largest request and are handed out as typed views.

    Two live views must have two names: asking for a name again hands out the same memory.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device], Tensor] = {}
        self._made: dict[str, _Made] = {}

    def clear(self) -> None:
        """Free every buffer; no view of one may be used any more."""
        self._made.clear()
        self._buffers.clear()

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialized contiguous tensor of `shape` that shares memory with earlier ones of `name`."""
        self._made.pop(name, None)
        needed_bytes = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get((name, device))
        if buffer is None or buffer.numel() < needed_bytes:
            self._buffers.pop((name, device), None)  # free the old one before the larger one is made
            buffer = torch.empty(needed_bytes, dtype=torch.uint8, device=device)
            self._buffers[name, device] = buffer
        return buffer[:needed_bytes].view(dtype).view(shape)

    def made(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        fill: Callable[[Tensor], object],
        how: Hashable,
        *sources: Tensor | None,
    ) -> Tensor:
        """As `take`, and filled; not again if it was last filled from the same `sources` in the same way.

        Nobody but `fill` may write to what is given.
        """
        how = shape, dtype, device, how
        known = self._made.get(name)
        if known is not None and known.is_of(how, sources):
            return known.view
        del known  # its view would keep a buffer that is to be replaced
        view = self.take(name, shape, dtype, device)
        fill(view)
        if not any(source is not None and source.is_inference() for source in sources):  # has no version
            versions = [None if s is None else (weakref.ref(s), s._version) for s in sources]
            self._made[name] = _Made(view, how, versions)
        return view
