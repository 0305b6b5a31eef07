"""What glibc does with large freed buffers: keep them (fast), or give them back (exact).

By default glibc maps every buffer above 32 MB anew and unmaps it when it is freed; the page faults of
fresh pages are then a large part of a layer's time. Told to keep them (`keep_heap`), it hands out the pages
that the layer before has just freed. That halves a short step (605 -> 313 ms, 3 x 64 tokens of a 2-layer
Llama 4096/11008). The price is a heap with holes: buffers of different sizes come and go, and what is
resident is more than what was ever alive together, by an amount that changes from run to run (one forward of
4 x 256 tokens of a 3-layer Llama 2048/5632, 121 MiB alive at most: 145 to 194 MiB). Where memory counts,
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
