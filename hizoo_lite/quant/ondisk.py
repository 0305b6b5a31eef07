"""A 16/32-bit matrix that stays in its file: embeddings and heads of a model that streams from disk on CPU.

Few rows of an embedding are needed at a time, and a head is used once a step, tile by tile, so neither has to
be in memory as a whole (262 MB each for Llama-2-7B).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hizoo_lite.base import PackedWeight, Stored
from hizoo_lite.errors import StorageError, UserError
from hizoo_lite.quant.checkpoint import Checkpoint
from hizoo_lite.quant.rows import check_out


class OnDiskWeight(PackedWeight):
    """(rows, columns) floats of one tensor of a checkpoint, read whenever they are asked for."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        super().__init__()
        rows, columns = checkpoint.shape(name)
        self.bits = "none"
        self.shape = (rows, columns)
        self.checkpoint, self.name = checkpoint, name

    def unpack(self, out: Tensor, first_row: int = 0) -> Tensor:
        """Read rows `first_row` .. into `out` (rows, in_features), cast to its dtype."""
        check_out(out, self.shape, first_row)
        return out.copy_(self._read(first_row, first_row + out.shape[0]))

    def stored(self) -> list[Stored]:
        """None: there is nothing in memory."""
        return []

    def nbytes(self) -> int:
        """Of the tensor in its file."""
        return self.checkpoint.nbytes(self.name)

    def gather(self, rows: Tensor) -> Tensor:
        """The given rows, (count,) sorted int64, as (count, columns) in the stored dtype."""
        dtype = self.checkpoint.dtype(self.name)
        out = torch.empty(rows.shape[0], self.shape[1], dtype=dtype)
        numbers = rows.tolist()
        first = 0
        for last in range(1, len(numbers) + 1):
            if last == len(numbers) or numbers[last] != numbers[last - 1] + 1:
                out[first:last] = self._read(numbers[first], numbers[last - 1] + 1)
                first = last
        return out

    def _read(self, start: int, stop: int) -> Tensor:
        try:
            return self.checkpoint.read_rows(self.name, start, stop)
        except (UserError, OSError) as error:
            raise StorageError(f"{self.name}: cannot be read any more: {error}") from error


def embed_from_disk(layer: nn.Embedding, weight: OnDiskWeight) -> None:
    """Let an embedding have, while it runs, just the rows that its tokens need."""
    layer.padding_idx = None  # only of use to gradients, and not a row of the gathered table

    def gather(module: nn.Embedding, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        tokens, index = torch.unique(args[0], return_inverse=True)
        module.weight = nn.Parameter(weight.gather(tokens), requires_grad=False)
        return (index, *args[1:])

    def drop(module: nn.Embedding, args: tuple[Tensor, ...], output: Tensor) -> None:
        module.weight = away

    away = layer.weight
    layer.register_forward_pre_hook(gather)
    layer.register_forward_hook(drop)
