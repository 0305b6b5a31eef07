"""Page-locked host memory: copies between it and a GPU run beside the computation."""

from __future__ import annotations

import contextlib
import logging
import weakref

import torch
from torch import Tensor

_log = logging.getLogger(__name__)


def page_lock(data: Tensor) -> bool:
    """cudaHostRegister: exactly these bytes, where torch's pinned allocator rounds up to a power of two.

    They are unlocked when `data` itself is gone. Where it is refused, copies are slower; False then.
    """
    pointer = data.data_ptr()
    status = int(torch.cuda.cudart().cudaHostRegister(pointer, data.numel() * data.itemsize, 0))
    if status != 0:
        _log.warning("host memory could not be page-locked (CUDA error %d); copies are slower", status)
        _forget_error()
        return False
    weakref.finalize(data, _unlock, pointer)
    return True


def _unlock(pointer: int) -> None:
    if int(torch.cuda.cudart().cudaHostUnregister(pointer)) != 0:
        _forget_error()


def _forget_error() -> None:
    """CUDA keeps the last error, and torch would raise it at the next launch, whatever that is."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
