"""The machine a run is on, in a few words: for memory.json and whoever compares two runs."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    import torch

_CPUINFO = Path("/proc/cpuinfo")


def describe(device: torch.device) -> dict[str, Any]:
    """Processor, memory, system, and the GPU if the run is on one."""
    import torch

    from hizoo_lite.device import gpu_of, is_gpu

    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
    }
    if is_gpu(device):
        gpu = gpu_of(device)
        found |= {"gpu": gpu.name(device), "gpu_memory_bytes": gpu.total_bytes(device)}
    return found


def _processor() -> str:
    for line in _CPUINFO.read_text(errors="replace").splitlines() if _CPUINFO.is_file() else []:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
