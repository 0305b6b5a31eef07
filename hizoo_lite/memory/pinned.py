"""Page-locked host memory: copies between it and a GPU run beside the computation."""

from __future__ import annotations

import logging
import weakref

import torch
from torch import Tensor

from hizoo_lite.device import gpu_of

_log = logging.getLogger(__name__)


def page_lock(data: Tensor, device: torch.device) -> bool:
    """For copies to and from `device`, a GPU.

    Exactly these bytes, where torch's pinned allocator rounds up to a power of two. They are unlocked when
    `data` itself is gone. Where it is refused, copies are slower; False then.
    """
    pointer = data.data_ptr()
    gpu = gpu_of(device)
    status = gpu.page_lock(pointer, data.numel() * data.itemsize, device)
    if status != 0:
        _log.warning("host memory could not be page-locked (CUDA error %d); copies are slower", status)
        return False
    weakref.finalize(data, gpu.page_unlock, pointer, device)
    return True
