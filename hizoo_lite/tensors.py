"""torch's side of `arrays.py`, and batches as tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hizoo_lite.arrays import Arrays
from hizoo_lite.base import Batch


class TorchArrays(Arrays):
    """torch; parameters on `device`, state on the host."""

    xp = torch

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device or torch.device("cpu")
        self.name = f"torch-{self._device.type}"

    def from_numpy(self, value: np.ndarray) -> Tensor:
        """See `Arrays.from_numpy`."""
        return torch.from_numpy(value)

    def on_device(self, value: Tensor) -> Tensor:
        """Without waiting for it."""
        return value.to(self._device, non_blocking=True)

    def copied(self, value: Tensor | np.ndarray) -> Tensor:
        """See `Arrays.copied`."""
        return torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()

    def wide(self, value: Tensor, like: Tensor | None = None) -> Tensor:
        """See `Arrays.wide`."""
        return value.detach().to("cpu" if like is None else like.device, torch.float64, copy=True)

    def narrow(self, value: Tensor) -> Tensor:
        """See `Arrays.narrow`."""
        return value.float()

    def on_host(self, value: Tensor) -> Tensor:
        """See `Arrays.on_host`."""
        return value.cpu()

    def rsqrt(self, value: Tensor) -> Tensor:
        """See `Arrays.rsqrt`."""
        return value.rsqrt()

    def repeat(self, value: Tensor, times: int) -> Tensor:
        """See `Arrays.repeat`."""
        return value.repeat_interleave(times)

    def row_squares(self, rows: Tensor) -> Tensor:
        """No float64 copy of the rows is made."""
        return torch.linalg.vector_norm(rows.detach(), dim=1, dtype=torch.float64).square_()

    def add_by_group(self, values: Tensor, first_row: int, bundle: int, sums: Tensor) -> None:
        """See `Arrays.add_by_group`."""
        if values.device.type == "cpu":
            sums.index_add_(0, torch.arange(first_row, first_row + len(values)) // bundle, values)
        else:
            add_padded(values, first_row, bundle, sums)

    def add_scaled(self, value: Tensor, direction: Tensor, factor: float) -> None:
        """See `Arrays.add_scaled`."""
        value.add_(direction, alpha=factor)

    def without_gradients(self) -> AbstractContextManager[Any]:
        """See `Arrays.without_gradients`."""
        return torch.no_grad()


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
    """A batch of tensors, over the same memory where it is one of numpy arrays."""
    made: dict[str, Any] = {
        name: torch.as_tensor(value) for name, value in batch._asdict().items() if not isinstance(value, str)
        and value is not None
    }  # fmt: skip
    return batch._replace(**made)
