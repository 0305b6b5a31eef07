"""Page-locked host memory: copies between it and a GPU run beside the computation."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

_log = logging.getLogger(__name__)


def page_lock(data: Tensor) -> None:
    """cudaHostRegister: exactly these bytes, where torch's pinned allocator rounds up to a power of two."""
    status = torch.cuda.cudart().cudaHostRegister(data.data_ptr(), data.numel() * data.itemsize, 0)
    if int(status) != 0:
        _log.warning("host memory could not be page-locked (%s); copies to the device are slower", status)


def unlock(data: Tensor) -> None:
    """Undo `page_lock`, before the memory is freed."""
    torch.cuda.cudart().cudaHostUnregister(data.data_ptr())
