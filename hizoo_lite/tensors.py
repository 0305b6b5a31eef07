"""torch's side of `arrays.py`, and batches as tensors."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hizoo_lite.arrays import Arrays
from hizoo_lite.batch import Batch
from hizoo_lite.device import Event, gpu_of, is_gpu

_log = logging.getLogger(__name__)

#: Terms of a sum that a GPU takes in float32; sums of those are in float64.
BLOCK = 1024


class TorchArrays(Arrays):
    """torch; parameters on `device`, state on the host."""

    xp = torch

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device or torch.device("cpu")
        self.name = f"torch-{self._device.type}"
        self._outbox: Tensor | None = None  # page-locked, where directions leave for a GPU
        self._left: Event | None = None  # they have

    def from_numpy(self, value: np.ndarray) -> Tensor:
        return torch.from_numpy(value)

    def on_device(self, value: Tensor) -> Tensor:
        """Without waiting for it."""
        return value.to(self._device, non_blocking=True)

    def copied(self, value: Tensor | np.ndarray) -> Tensor:
        return torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()

    def wide(self, value: Tensor, like: Tensor | None = None) -> Tensor:
        return value.detach().to("cpu" if like is None else like.device, torch.float64, copy=True)

    def zeros(self, count: int, like: Tensor) -> Tensor:
        return torch.zeros(count, dtype=torch.float64, device=like.device)

    def together(self, values: Sequence[Tensor], like: Tensor) -> list[Tensor]:
        return brought(values, like.device)

    def home(self, values: Sequence[Tensor]) -> list[Tensor]:
        return brought(values, torch.device("cpu"))

    def excess(self, z: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """On a GPU in float32, but for the sums of sums of up to `BLOCK` terms.

        A consumer's GPU has 1/64 of its float32 rate in float64, and this is done for every weight in every
        step. No term is negative, so that a sum of n of them in float32 is off by n 2^-24 of itself at most,
        in whatever order: 6e-5 for 1024. What is summed is one draw of a z^2, whose sum over n terms is off
        by 1 / sqrt(n) of its mean: 1.6e-2 for 4096.
        """
        if not is_gpu(z.device):
            return super().excess(z, rows, columns)
        sample = torch.square(z).sub_(1.0).abs_()
        return _sums(sample, columns.float()), _sums(sample.T, rows.float())

    def directions(self, scale: Callable[[str], Tensor], z: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """To a GPU in one copy, out of page-locked memory, so that nobody waits for it."""
        if not z or not is_gpu(self._device):
            return super().directions(scale, z)
        total = sum(value.numel() for value in z.values())
        if self._outbox is None or self._outbox.numel() != total:
            self._outbox = torch.empty(total)
            page_lock(self._outbox, self._device)
        elif self._left is not None:
            self._left.synchronize()
        here = _cut(self._outbox, z.values())
        for (name, value), out in zip(z.items(), here, strict=True):
            torch.mul(scale(name), value, out=out)
        there = self._outbox.to(self._device, non_blocking=True)
        gpu = gpu_of(self._device)
        self._left = gpu.event()
        self._left.record(gpu.current_stream(self._device))
        return dict(zip(z, _cut(there, z.values()), strict=True))

    def add_all(self, values: Sequence[Tensor], directions: Sequence[Tensor], factor: float) -> None:
        """On a GPU in a few launches."""
        if values and is_gpu(self._device):
            torch._foreach_add_(list(values), list(directions), alpha=factor)
        else:
            super().add_all(values, directions, factor)

    def narrow(self, value: Tensor) -> Tensor:
        return value.float()

    def on_host(self, value: Tensor) -> Tensor:
        return value.cpu()

    def rsqrt(self, value: Tensor) -> Tensor:
        return value.rsqrt()

    def repeat(self, value: Tensor, times: int) -> Tensor:
        return value.repeat_interleave(times)

    def row_squares(self, rows: Tensor) -> Tensor:
        """No float64 copy of the rows is made."""
        return torch.linalg.vector_norm(rows.detach(), dim=1, dtype=torch.float64).square_()

    def add_by_group(self, values: Tensor, first_row: int, bundle: int, sums: Tensor) -> None:
        if values.device.type == "cpu":
            sums.index_add_(0, torch.arange(first_row, first_row + len(values)) // bundle, values)
        else:
            add_padded(values, first_row, bundle, sums)

    def take(self, values: Tensor, index: Tensor) -> Tensor:
        return values.index_select(1, index)

    def rows(self, values: Tensor, index: np.ndarray) -> Tensor:
        """A view if the entries are evenly spaced, as they are unless a step has both kinds of points."""
        wanted = index.tolist()
        apart = {later - earlier for earlier, later in pairwise(wanted)} or {1}
        if len(apart) > 1 or min(apart) < 0:
            return values[wanted]
        [step], count = apart, len(wanted)
        if step == 0:
            return values[wanted[0]].expand(count, *values.shape[1:])
        return values[wanted[0] : wanted[-1] + 1 : step] if count else values[:0]

    def picked(self, values: Tensor, index: Tensor) -> Tensor:
        return values.gather(2, index.view(1, -1, 1).expand(values.shape[0], -1, 1)).squeeze(2)

    def log_softmax(self, values: Tensor) -> Tensor:
        return F.log_softmax(values, dim=-1)

    def group_sums(self, values: Tensor, group: Tensor, zeros: Tensor) -> Tensor:
        """See `Arrays.group_sums`; on the host, since a GPU has no order."""
        return zeros.scatter_add(1, group.expand_as(values), values)

    def group_peaks(self, values: Tensor, group: Tensor, least: Tensor) -> Tensor:
        return least.scatter_reduce(1, group.expand_as(values), values, "amax")

    def add_scaled(self, value: Tensor, direction: Tensor, factor: float) -> None:
        value.add_(direction, alpha=factor)

    def without_gradients(self) -> AbstractContextManager[Any]:
        return torch.no_grad()


def brought(values: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The values, of one dtype, on `device`; those that are elsewhere, in one place, come in one copy.

    Onto a GPU without waiting for it.
    """
    away = [value for value in values if value.device != device]
    if not away:
        return list(values)
    flat = torch.cat([value.reshape(-1) for value in away]).to(device, non_blocking=is_gpu(device))
    came = iter(_cut(flat, away))
    return [value if value.device == device else next(came) for value in values]


def _cut(flat: Tensor, forms: Iterable[Tensor]) -> list[Tensor]:
    """A vector as views of these shapes, one after the other."""
    shapes = [form.shape for form in forms]
    return [part.view(s) for part, s in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]


def _sums(matrix: Tensor, weights: Tensor) -> Tensor:
    """matrix @ weights, (rows,) float64, of float32; the columns in equal blocks of at most `BLOCK`."""
    rows, columns = matrix.shape
    blocks = next(count for count in range(-(-columns // BLOCK), columns + 1) if columns % count == 0)
    stacked = matrix.reshape(rows, blocks, -1).transpose(0, 1)
    found = torch.bmm(stacked, weights.view(blocks, -1, 1))
    return found.sum(0, dtype=torch.float64).view(-1)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many CPU threads of torch while this is open; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def add_padded(values: Tensor, first_row: int, bundle: int, sums: Tensor) -> None:
    """`Arrays.add_by_group` for a GPU, where index_add_ has no order."""
    before = first_row % bundle
    padded = F.pad(values, (before, -(before + len(values)) % bundle)).view(-1, bundle)
    first = first_row // bundle
    sums[first : first + len(padded)] += padded.sum(1)


def batch_tensors(batch: Batch) -> Batch:
    """A batch of tensors, over the same memory if it is one of numpy arrays."""
    made: dict[str, Any] = {
        name: torch.as_tensor(value)
        for name, value in batch._asdict().items()
        if value is not None and not isinstance(value, str | tuple)
    }
    return batch._replace(**made)


def page_lock(data: Tensor, device: torch.device) -> bool:
    """For copies to and from `device`, a GPU.

    Exactly these bytes, where torch's pinned allocator rounds up to a power of two. They are unlocked when
    `data` itself is gone. If it is refused, copies are slower; False then.
    """
    pointer = data.data_ptr()
    gpu = gpu_of(device)
    status = gpu.page_lock(pointer, data.numel() * data.itemsize, device)
    if status != 0:
        _log.warning("host memory could not be page-locked (CUDA error %d); copies are slower", status)
        return False
    weakref.finalize(data, gpu.page_unlock, pointer, device)
    return True
