"""Where the bytes of absent blocks are: in the checkpoint's files, or in host memory.

A block is read into one buffer by its layout. What training changed is kept apart: the checkpoint is never
written to. Reads may come from another thread; there is one block at a time, which several threads may share.
"""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.device import is_gpu
from hizoo_lite.engine.layout import Layout
from hizoo_lite.errors import StorageError, UserError
from hizoo_lite.tensors import page_lock

#: Buffers that one preadv call takes; Linux allows 1024.
_MOST_BUFFERS = 512
#: Threads that read a block beside a GPU: one copies 2 to 3 GB/s out of the cache of files, and disks give 5
#: to 7 (estimates). On a CPU a second one would take a core from the computation.
READERS = 4
#: Bytes that one of several threads reads at a time.
PIECE_BYTES = 16 << 20


class Source(ABC):
    """The bytes of every block of a model."""

    @abstractmethod
    def read(self, block: int, out: Tensor) -> None:
        """Fill `out`, (nbytes of the block,) uint8 in host memory. Raises `StorageError` naming the file."""

    @abstractmethod
    def write(self, block: int, data: Tensor) -> None:
        """Take over the block's bytes, (nbytes,) uint8 in host memory; later reads give these."""

    def drop(self, block: int) -> None:  # noqa: B027 - most sources have nothing to free
        """The block will not be asked for again."""

    @abstractmethod
    def close(self) -> None:
        """Free files and memory."""


class _Run(NamedTuple):
    """Adjacent bytes of one file that go to several places of a block."""

    path: Path
    offset: int
    parts: list[slice]  # of the block's bytes, in the order of the file


class _Reading(NamedTuple):
    """Bytes of an open file, from an offset on, and where they go, one view after the other."""

    descriptor: int
    offset: int
    views: list[memoryview]
    name: str  # for messages


class DiskSource(Source):
    """Blocks in safetensors files. Changed ones go to an unnamed file in `scratch`."""

    def __init__(
        self, checkpoint: Checkpoint, layouts: Sequence[Layout], scratch: Path | None = None, readers: int = 1
    ) -> None:
        """scratch: folder for changed blocks; None: the system's. readers: threads that share a block."""
        self._layouts, self._scratch = layouts, scratch
        self._runs = [_runs(checkpoint, layout) for layout in layouts]
        self._files: dict[Path, int] = {}
        self._changed: set[int] = set()
        self._lost: set[int] = set()  # changed blocks that could not be written
        self._overlay: int | None = None
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="readers") if readers > 1 else None
        self._stride = max((layout.nbytes for layout in layouts), default=0)

    def read(self, block: int, out: Tensor) -> None:
        """Straight from the files into `out`; what a checkpoint does not have is zeros."""
        if block in self._lost:
            raise StorageError(f"{self._place()}: block {block} was changed and could not be written")
        if block in self._changed:
            assert self._overlay is not None
            whole = _views(out, [slice(0, self._layouts[block].nbytes)])
            self._fill([_Reading(self._overlay, block * self._stride, whole, "the file of changed blocks")])
            return
        for place in self._layouts[block].places:
            if place.source is None:
                out[place.offset : place.offset + place.nbytes] = 0
        self._fill(
            [
                _Reading(self._open(run.path), run.offset, _views(out, run.parts), str(run.path))
                for run in self._runs[block]
            ]
        )

    def write(self, block: int, data: Tensor) -> None:
        """Into the file of changed blocks. A block that cannot be written is never read again."""
        self._lost.add(block)
        if self._overlay is None:
            self._overlay = _unnamed_file(self._scratch)
        view = _bytes(data)[: self._layouts[block].nbytes]
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self._overlay, view[done:], block * self._stride + done)
            except OSError as error:
                raise StorageError(f"{self._place()}: a changed block cannot be written: {error}") from error
        self._changed.add(block)
        self._lost.remove(block)

    def close(self) -> None:
        """Close every file; the one of changed blocks is gone with that."""
        if self._readers is not None:
            self._readers.shutdown()
        for descriptor in [*self._files.values(), self._overlay]:
            if descriptor is not None:
                os.close(descriptor)
        self._files, self._overlay, self._changed, self._lost = {}, None, set(), set()

    def _fill(self, readings: Sequence[_Reading]) -> None:
        """All of them; if one fails the others have ended too, since the buffer may be gone after that."""
        if self._readers is None:
            for reading in readings:
                _read(*reading)
            return
        jobs = [self._readers.submit(_read, *piece) for one in readings for piece in _pieces(one)]
        wait(jobs)
        for job in jobs:
            job.result()

    def _place(self) -> str:
        return str(self._scratch or tempfile.gettempdir())

    def _open(self, path: Path) -> int:
        if path not in self._files:
            try:
                self._files[path] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            except OSError as error:
                raise StorageError(f"{path}: cannot be opened: {error.strerror}") from error
        return self._files[path]


class HostSource(Source):
    """Blocks in host memory, page-locked if the compute device is a GPU, so that copies run beside it."""

    def __init__(self, layouts: Sequence[Layout], device: torch.device) -> None:
        """`device`: the one that computes."""
        self._layouts, self._device = layouts, device
        self._blocks: dict[int, Tensor] = {}

    def fill(self, block: int, first: Source | None) -> None:
        """Take in a block: from the weights' own tensors, and what is not there from `first`."""
        layout = self._layouts[block]
        data = torch.empty(layout.nbytes, dtype=torch.uint8)
        if first is not None:
            first.read(block, data)
        else:
            data.zero_()
        layout.pack(data)
        if is_gpu(self._device):
            page_lock(data, self._device)
        self._blocks[block] = data

    def whole(self, block: int) -> Tensor:
        """The block's bytes where they are, (nbytes,) uint8."""
        return self._blocks[block]

    def read(self, block: int, out: Tensor) -> None:
        """A copy."""
        data = self._blocks[block]
        out[: data.numel()].copy_(data)

    def write(self, block: int, data: Tensor) -> None:
        """A copy."""
        own = self._blocks[block]
        own.copy_(data[: own.numel()])

    def drop(self, block: int) -> None:
        """Free its memory."""
        self._blocks.pop(block, None)

    def close(self) -> None:
        """Free all of it."""
        for block in list(self._blocks):
            self.drop(block)


def _runs(checkpoint: Checkpoint, layout: Layout) -> list[_Run]:
    """What to read for a block, adjacent bytes of a file together. UserError if a tensor does not fit."""
    pieces = []
    for place in layout.places:
        if place.source is None:
            continue
        path, offset, nbytes = checkpoint.place(place.source)
        if nbytes != place.nbytes:
            raise UserError(
                f"{path}: tensor {place.source} takes {nbytes} bytes, {place.nbytes} are wanted; "
                "it cannot be streamed as it is stored"
            )
        if nbytes:
            pieces.append((path, offset, slice(place.offset, place.offset + nbytes)))
    runs: list[_Run] = []
    end = -1
    for path, offset, part in sorted(pieces, key=lambda piece: (str(piece[0]), piece[1])):
        if not runs or runs[-1].path != path or offset != end or len(runs[-1].parts) >= _MOST_BUFFERS:
            runs.append(_Run(path, offset, []))
        runs[-1].parts.append(part)
        end = offset + part.stop - part.start
    return runs


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.numpy().data)


def _views(out: Tensor, parts: Sequence[slice]) -> list[memoryview]:
    whole = _bytes(out)
    return [whole[part] for part in parts]


def _pieces(whole: _Reading) -> Iterator[_Reading]:
    """The same in pieces of `PIECE_BYTES` at most."""
    offset, size = whole.offset, 0
    some: list[memoryview] = []
    for view in whole.views:
        while len(view):
            part = view[: PIECE_BYTES - size]
            some, size, view = [*some, part], size + len(part), view[len(part) :]
            if size == PIECE_BYTES:
                yield whole._replace(offset=offset, views=some)
                offset, some, size = offset + size, [], 0
    if some:
        yield whole._replace(offset=offset, views=some)


def _read(descriptor: int, offset: int, views: list[memoryview], name: str) -> None:
    """Fill the views, one after the other, from `offset` on."""
    while views:
        try:
            count = os.preadv(descriptor, views, offset)
        except OSError as error:
            raise StorageError(f"{name}: reading at byte {offset} failed: {error.strerror}") from error
        if count == 0:
            raise StorageError(f"{name}: ends at byte {offset}, inside of a block: it was truncated")
        offset += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]


def _unnamed_file(folder: Path | None) -> int:
    """A file without a name: the system frees it when the process ends, however it ends."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.dup(file.fileno())
    except OSError as error:
        raise StorageError(f"{folder or tempfile.gettempdir()}: cannot be written: {error}") from error
