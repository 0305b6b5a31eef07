"""What this process holds and held at most, as the kernel counts it; and what glibc does with freed buffers.

`ru_maxrss` is inherited across fork and exec, so the peak is read as VmHWM of /proc/self/status; writing
5 to /proc/self/clear_refs sets it back to what is resident now. If /proc is missing (macOS, Windows),
psutil gives the resident size and there is no peak.

By default glibc maps every buffer above 32 MB anew and unmaps it when it is freed; the page faults of
fresh pages are then a large part of a layer's time. Told to keep them (`keep_heap`), it hands out the pages
that the layer before has just freed. That halves a short step (605 -> 313 ms, 3 x 64 tokens of a 2-layer
Llama 4096/11008). The price is a heap with holes: buffers of different sizes come and go, and what is
resident is more than what was ever alive together, by an amount that changes from run to run (one forward of
4 x 256 tokens of a 3-layer Llama 2048/5632, 121 MiB alive at most: 145 to 194 MiB). If memory counts,
`map_large` has every buffer above 1 MiB mapped and unmapped on its own: the peak is what is alive (125 MiB),
every time, for up to a third more time. A run with a budget is loaded so.

What is kept between steps is given back by `trim`. Only glibc is touched; elsewhere these functions do
nothing. HIZOO_LITE_KEEP_HEAP=0 leaves glibc as it is.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


class Resident(NamedTuple):
    """Resident memory in bytes. None if the system does not tell."""

    total_bytes: int
    peak_bytes: int | None  # VmHWM: the most since the start, or since `reset_peak`
    anon_bytes: int | None  # RssAnon: what was allocated
    file_bytes: int | None  # RssFile: mapped files, clean and reclaimable

    @property
    def held_bytes(self) -> int:
        """What was allocated; all of it if the system does not tell."""
        return self.total_bytes if self.anon_bytes is None else self.anon_bytes


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
    """Set VmHWM back to the resident size; False if the system does not permit it."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def run_module(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a module of this package in a fresh process, with the imports of this one; its output is caught."""
    beside = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-m", name, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(beside)},
    )


_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1
#: Buffers from here on are mapped on their own by `map_large`; below it are no activations of real models.
_MAPPED_BYTES = 1 << 20


@functools.cache
def keep_heap() -> bool:
    """Keep what is freed; whether that was done."""
    return _set(_LARGEST, _LARGEST)


def map_large() -> bool:
    """Give large buffers back when they are freed; whether that was done. `keep_heap` undoes it."""
    keep_heap.cache_clear()
    return _set(_MAPPED_BYTES, _MAPPED_BYTES)


def _set(mmap_threshold: int, trim_threshold: int) -> bool:
    if os.environ.get("HIZOO_LITE_KEEP_HEAP") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    wanted = ((_M_MMAP_THRESHOLD, mmap_threshold), (_M_TRIM_THRESHOLD, trim_threshold))
    return all(library.mallopt(option, value) == 1 for option, value in wanted)


def trim() -> None:
    """Give the freed pages back to the kernel now."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
