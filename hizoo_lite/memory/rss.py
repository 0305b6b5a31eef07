"""What this process holds and held at most, as the kernel counts it.

`ru_maxrss` is inherited across fork and exec, so the peak is read as VmHWM of /proc/self/status; writing
5 to /proc/self/clear_refs sets it back to what is resident now. Where /proc is missing (macOS, Windows)
psutil gives the resident size and the peak is the largest of the readings. On CUDA the allocator's own
peak counts instead.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hizoo_lite.memory.allocator import trim

if TYPE_CHECKING:
    import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


class Resident(NamedTuple):
    """Resident memory in bytes. None where the system does not tell."""

    total_bytes: int
    peak_bytes: int | None  # VmHWM: the most since the start, or since `reset_peak`
    anon_bytes: int | None  # RssAnon: what was allocated
    file_bytes: int | None  # RssFile: mapped files, clean and reclaimable


def resident() -> Resident:
    """The memory of this process now."""
    if not _STATUS.is_file():
        import psutil

        return Resident(psutil.Process().memory_info().rss, None, None, None)
    fields: dict[str, int] = {}
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM", "RssAnon", "RssFile"):
            fields[name] = int(value.split()[0]) * 1024
    return Resident(fields["VmRSS"], fields.get("VmHWM"), fields.get("RssAnon"), fields.get("RssFile"))


def private_bytes() -> int | None:
    """VmData: private writable memory that is mapped, touched or not; what RLIMIT_DATA limits. Linux only."""
    if not _STATUS.is_file():
        return None
    lines = _STATUS.read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")), None)


def thread_count() -> int:
    """The threads of this process, those of libraries as well. Linux only."""
    return len(list(Path("/proc/self/task").iterdir()))


def reset_peak() -> bool:
    """Set VmHWM back to the resident size; False where the system does not permit it."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


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

        What is held now where the kernel does not permit the reset; None on a CPU, whose peak `lap_bytes` is.
        """
        if self._gpu is None:
            return None
        now = resident()
        peak_bytes = now.peak_bytes if self._resettable else None
        self._resettable = reset_peak()
        return (now.total_bytes if peak_bytes is None else peak_bytes) - (now.file_bytes or 0)

    def phase_bytes(self) -> int:
        """The peak since `restart`; an upper bound of it where the kernel does not permit the reset."""
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
