"""The peak of memory of each phase of a run, and of the whole.

Of the host: as the kernel counts it (process.py), or the largest of the readings if it does not. Of a GPU:
the peak of torch's allocator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from hizoo_lite.process import reset_peak, resident, trim

if TYPE_CHECKING:
    import torch


class _GpuPeak(NamedTuple):
    """What is asked of a GPU's allocator."""

    read: Callable[[], int]
    reset: Callable[[], None]


def _gpu_peak(device: torch.device | None) -> _GpuPeak | None:
    """None for the host."""
    if device is None:  # without torch
        return None
    from hizoo_lite.device import gpu_of, is_gpu

    if not is_gpu(device):
        return None
    gpu = gpu_of(device)
    return _GpuPeak(lambda: gpu.peak_bytes(device), lambda: gpu.reset_peak(device))


class PeakMeter:
    """The peak of each phase of a run, and of the whole.

    Of anonymous memory, which a budget is about; on a `device` that is a GPU, of torch's allocator there.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._gpu = _gpu_peak(device)
        self._overall_bytes = self._phase_bytes = 0
        self._resettable = False  # whether VmHWM begins with the last call of `host_lap_bytes`

    def restart(self) -> None:
        """Begin a new phase, with freed pages given back. The peak so far is kept for `overall_bytes`."""
        self.overall_bytes()
        self._phase_bytes = 0
        if self._gpu is None:
            trim()
        self._reset()

    def lap_bytes(self) -> int:
        """The peak since the last lap or `restart`; begins the next lap. Nothing is given back."""
        lap = self._read()
        self._phase_bytes = max(self._phase_bytes, lap)
        self._reset()
        return lap

    def host_lap_bytes(self) -> int | None:
        """On a GPU: the peak of the host's anonymous memory since the last call, page-locked blocks included.

        What is held now if the kernel does not permit the reset; None on a CPU, whose peak `lap_bytes` is.
        """
        if self._gpu is None:
            return None
        now = resident()
        peak_bytes = now.peak_bytes if self._resettable else None
        self._resettable = reset_peak()
        return (now.total_bytes if peak_bytes is None else peak_bytes) - (now.file_bytes or 0)

    def phase_bytes(self) -> int:
        """The peak since `restart`; an upper bound of it if the kernel does not permit the reset."""
        return max(self._phase_bytes, self._read())

    def _reset(self) -> None:
        if self._gpu is None:
            reset_peak()
        else:
            self._gpu.reset()

    def _read(self) -> int:
        if self._gpu is not None:
            return self._gpu.read()
        now = resident()
        peak_bytes = now.total_bytes if now.peak_bytes is None else now.peak_bytes
        return peak_bytes - (now.file_bytes or 0)  # mapped files are clean and reclaimable

    def overall_bytes(self) -> int:
        """The peak of all phases."""
        self._overall_bytes = max(self._overall_bytes, self.phase_bytes())
        return self._overall_bytes
