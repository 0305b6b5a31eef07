"""Moving the bytes of blocks into the slots of the compute device beside the computation.

On CPU a thread reads into the slot itself. On a GPU a second stream copies page-locked host memory into it;
events order the two streams, so that the loop does not wait for the device (but where changed blocks go to
disk). From disk to a GPU the thread reads into one of two page-locked buffers first. There is one thread and
one copy stream, each in order: a block that is stored and then fetched again comes back changed.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from hizoo_lite.device import Event, gpu_of, is_gpu
from hizoo_lite.engine.layout import Layout
from hizoo_lite.engine.storage import HostSource, Source
from hizoo_lite.tensors import page_lock


class Fetcher(ABC):
    """Fills slots with blocks. `waited_seconds` is what the loop has spent waiting for bytes."""

    def __init__(self, source: Source, layouts: Sequence[Layout], slots: Sequence[Tensor]) -> None:
        self.source, self.layouts, self.slots = source, layouts, slots
        self.waited_seconds = 0.0
        self.moved_bytes = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="blocks")
        self._jobs: list[Future[None] | None] = [None for _ in slots]

    def fetch(self, block: int, slot: int) -> None:
        """Begin to fill a slot that nothing uses any more."""
        self.moved_bytes += self.layouts[block].nbytes
        self._begin(block, slot)

    @abstractmethod
    def _begin(self, block: int, slot: int) -> None: ...

    def wait(self, slot: int) -> None:
        """On return the slot may be used on the compute device. Raises what the fetch has raised."""
        job, self._jobs[slot] = self._jobs[slot], None
        if job is not None:
            began = time.perf_counter()
            job.result()
            self.waited_seconds += time.perf_counter() - began

    @abstractmethod
    def store(self, slot: int, block: int) -> None:
        """Hand the slot's bytes to the source; the slot is not written to before `free`."""

    @abstractmethod
    def free(self, slot: int) -> None:
        """What was submitted to the device until now is the last that uses the slot."""

    @abstractmethod
    def whole(self, block: int) -> Tensor:
        """A block in a buffer of its own on the device."""

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)


class HostFetcher(Fetcher):
    """For models that compute on CPU: slots are host memory."""

    def _begin(self, block: int, slot: int) -> None:
        self._jobs[slot] = self._thread.submit(self.source.read, block, self._part(block, slot))

    def store(self, slot: int, block: int) -> None:
        """By the thread, beside the block's computation; in order with the fetches."""
        self._jobs[slot] = self._thread.submit(self.source.write, block, self._part(block, slot))

    def free(self, slot: int) -> None:
        """A store that is still under way must have ended: its error belongs to this block."""
        self.wait(slot)

    def whole(self, block: int) -> Tensor:
        """Read at once."""
        buffer = torch.empty(self.layouts[block].nbytes, dtype=torch.uint8)
        self.source.read(block, buffer)
        return buffer

    def _part(self, block: int, slot: int) -> Tensor:
        return self.slots[slot][: self.layouts[block].nbytes]


class GpuFetcher(Fetcher):
    """For models that compute on a GPU: a copy stream, page-locked memory, events; see the module."""

    def __init__(
        self, source: Source, layouts: Sequence[Layout], slots: Sequence[Tensor], device: torch.device
    ) -> None:
        super().__init__(source, layouts, slots)
        self._device, self._gpu = device, gpu_of(device)
        self._copies = self._gpu.stream(device)
        # These two the reader's thread waits for, if the source is a disk: it leaves its core to the loop.
        self._ready = [self._gpu.event(sleeps=True) for _ in slots]  # the slot was filled, or its bytes taken
        self._free = [self._gpu.event() for _ in slots]  # the slot has been computed with
        for event in self._free:  # its memory may have been a tensor's that is still being computed with
            event.record(self._gpu.current_stream(device))
        sizes = [] if isinstance(source, HostSource) else [slot.numel() for slot in slots]
        self._staging = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        for staging in self._staging:
            page_lock(staging, device)
        self._staged = [self._gpu.event(sleeps=True) for _ in self._staging]  # the buffer was copied from

    def _begin(self, block: int, slot: int) -> None:
        if isinstance(self.source, HostSource):
            self._copy_in(self.source.whole(block), slot, self.layouts[block].nbytes)
        else:
            self._jobs[slot] = self._thread.submit(self._read_and_copy, block, slot)

    def _read_and_copy(self, block: int, slot: int) -> None:
        nbytes = self.layouts[block].nbytes
        self._staged[slot].synchronize()  # in the thread: the loop goes on
        self.source.read(block, self._staging[slot][:nbytes])
        self._copy_in(self._staging[slot], slot, nbytes)
        self._staged[slot].record(self._copies)

    def _copy_in(self, host: Tensor, slot: int, nbytes: int) -> None:
        with self._gpu.on_stream(self._copies, self._device):
            self._copies.wait_event(self._free[slot])
            self.slots[slot][:nbytes].copy_(host[:nbytes], non_blocking=True)
            self._ready[slot].record(self._copies)

    def wait(self, slot: int) -> None:
        """The compute stream waits, not the host (but for bytes that are still being read from disk)."""
        super().wait(slot)
        self._gpu.current_stream(self._device).wait_event(self._ready[slot])

    def store(self, slot: int, block: int) -> None:
        """Copied out on the copy stream once the update is done, in order with the fetches."""
        nbytes = self.layouts[block].nbytes
        updated = self._gpu.event()
        updated.record(self._gpu.current_stream(self._device))
        if isinstance(self.source, HostSource):
            self._copy_out(self.source.whole(block), slot, nbytes, updated)
        else:
            self._jobs[slot] = self._thread.submit(self._copy_and_write, block, slot, nbytes, updated)

    def _copy_and_write(self, block: int, slot: int, nbytes: int, updated: Event) -> None:
        self._staged[slot].synchronize()
        self._copy_out(self._staging[slot], slot, nbytes, updated)
        self._ready[slot].synchronize()  # in the thread
        self.source.write(block, self._staging[slot][:nbytes])

    def _copy_out(self, host: Tensor, slot: int, nbytes: int, updated: Event) -> None:
        with self._gpu.on_stream(self._copies, self._device):
            self._copies.wait_event(updated)
            host[:nbytes].copy_(self.slots[slot][:nbytes], non_blocking=True)
            self._ready[slot].record(self._copies)

    def close(self) -> None:
        """End the thread; a copy under way must not meet memory that is somebody else's by then."""
        super().close()
        self._copies.synchronize()

    def __del__(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._copies.synchronize()

    def free(self, slot: int) -> None:
        """A marker in the compute stream. A store to disk under way is waited for to its end.

        The marker first: if the store has failed, what comes into the slot is still after its computation.
        """
        self._free[slot].record(self._gpu.current_stream(self._device))
        super().wait(slot)

    def whole(self, block: int) -> Tensor:
        """Read, then copied."""
        if isinstance(self.source, HostSource):
            return self.source.whole(block).to(self._device)
        buffer = torch.empty(self.layouts[block].nbytes, dtype=torch.uint8)
        self.source.read(block, buffer)
        return buffer.to(self._device)


def make_fetcher(
    source: Source, layouts: Sequence[Layout], slots: Sequence[Tensor], device: torch.device
) -> Fetcher:
    """The fetcher for a compute device."""
    if is_gpu(device):
        return GpuFetcher(source, layouts, slots, device)
    return HostFetcher(source, layouts, slots)
