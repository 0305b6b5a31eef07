"""Buffers that are allocated once and used again by every layer of every step.

A fresh buffer above 32 MB is mapped and unmapped by glibc at each use, and half of a layer's time
goes into its page faults; a reused one costs nothing and makes the peak predictable.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Scratch:
    """Named byte buffers that grow to the largest request and are handed out as typed views.

    Two live views must have two names: asking for a name again hands out the same memory.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device], Tensor] = {}

    def clear(self) -> None:
        """Free every buffer; no view of one may be used any more."""
        self._buffers.clear()

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialized contiguous tensor of `shape` that shares memory with earlier ones of `name`."""
        needed_bytes = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get((name, device))
        if buffer is None or buffer.numel() < needed_bytes:
            self._buffers.pop((name, device), None)  # free the old one before the larger one is made
            buffer = torch.empty(needed_bytes, dtype=torch.uint8, device=device)
            self._buffers[name, device] = buffer
        return buffer[:needed_bytes].view(dtype).view(shape)
