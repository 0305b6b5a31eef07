"""What one sample reads, and the thread that watches where the kernel keeps no resettable high-water mark.

On Linux a sample is one `pread` of /proc/self/statm, kept open: resident and shared pages, whose difference
is RssAnon (2 microseconds, where /proc/self/status takes 10 to 30 and says the same). "file" is RssFile
and RssShmem together. Elsewhere psutil gives the resident size alone. On a GPU torch's allocator is
asked as well.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, final

import psutil

if TYPE_CHECKING:
    import torch

Held = dict[str, int]
Reader = Callable[[], Held]

_STATM = Path("/proc/self/statm")
#: Seconds between two looks of the watching thread.
POLL_SECONDS = 0.01


def make_reader(device: torch.device) -> Reader:
    """Reads what is held now: anon_bytes and file_bytes (or total_bytes), on a GPU allocated and reserved."""
    host = _statm_reader() if _STATM.is_file() else _total_reader()
    from hizoo_lite.device import gpu_of, is_gpu

    if not is_gpu(device):
        return host
    gpu = gpu_of(device)

    def read() -> Held:
        allocated_bytes, reserved_bytes = gpu.held_bytes(device)
        return {"allocated_bytes": allocated_bytes, "reserved_bytes": reserved_bytes, **host()}

    return read


def _statm_reader() -> Reader:
    descriptor, page_bytes = _open_statm(os.getpid()), os.sysconf("SC_PAGE_SIZE")

    def read() -> Held:
        resident, shared = os.pread(descriptor, 128, 0).split()[1:3]
        file_bytes = int(shared) * page_bytes
        return {"anon_bytes": int(resident) * page_bytes - file_bytes, "file_bytes": file_bytes}

    return read


@functools.cache
def _open_statm(process: int) -> int:
    """Opened once a process and never closed: an open file keeps naming the process that opened it."""
    return os.open(_STATM, os.O_RDONLY)


def _total_reader() -> Reader:
    process = psutil.Process()
    return lambda: {"total_bytes": process.memory_info().rss}


def host_bytes(held: Held) -> int:
    """The resident size of a sample."""
    return held.get("total_bytes", held.get("anon_bytes", 0) + held.get("file_bytes", 0))


@final
class Watcher:
    """A thread that looks every ten milliseconds and remembers the most. A peak in between is missed."""

    def __init__(self, read: Reader, seconds: float = POLL_SECONDS) -> None:
        self._read, self._seconds = read, seconds
        self._most = 0
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)
        self._thread.start()

    def lap_bytes(self) -> int:
        """The most since the last lap; begins the next one."""
        now = host_bytes(self._read())
        with self._lock:
            most, self._most = max(self._most, now), now
        return most

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._seconds):
            now = host_bytes(self._read())
            with self._lock:
                self._most = max(self._most, now)
