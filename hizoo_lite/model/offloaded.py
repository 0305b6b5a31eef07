"""A 16/32-bit matrix that is not on the compute device: embeddings and heads of a model whose blocks stream.

Few rows of an embedding are needed at a time, and a head is used once a step, tile by tile, so neither has to
be there as a whole (262 MB each for Llama-2-7B). They are read from the checkpoint's file or host memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hizoo_lite.branches import BranchState
from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.errors import StorageError, UserError
from hizoo_lite.noise import Uniform
from hizoo_lite.quant.opaque import Opaque
from hizoo_lite.quant.packed import PackedWeight, Stored
from hizoo_lite.quant.rows import RowReader, check_out


class OffloadedWeight(Opaque, PackedWeight):
    """(rows, columns) floats that are read whenever they are asked for."""

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, read: RowReader, host: torch.device
    ) -> None:
        """read(start, stop): rows on `host`, in dtype."""
        super().__init__()
        self.bits, self.shape, self.dtype, self.read, self.host = "none", shape, dtype, read, host

    def unpack(self, out: Tensor, first_row: int = 0) -> Tensor:
        """Read rows `first_row` .. into `out` (rows, in_features), cast to its dtype."""
        check_out(out, self.shape, first_row)
        return out.copy_(self.read(first_row, first_row + out.shape[0]), non_blocking=True)

    def store(self, values: Tensor, first_row: int, rounding: Uniform) -> None:
        """Never: what is outside of the blocks is not trained in place."""
        raise NotImplementedError("a matrix that is offloaded cannot be written to")

    def stored(self) -> list[Stored]:
        """None: there is nothing that travels with a block."""
        return []

    def gather(self, rows: Tensor) -> Tensor:
        """The given rows, (count,) sorted int64, as (count, columns) on the host in the stored dtype."""
        out = torch.empty(rows.shape[0], self.shape[1], dtype=self.dtype, device=self.host)
        numbers = rows.tolist()
        first = 0
        for last in range(1, len(numbers) + 1):
            if last == len(numbers) or numbers[last] != numbers[last - 1] + 1:
                out[first:last] = self.read(numbers[first], numbers[last - 1] + 1)
                first = last
        return out


def from_disk(checkpoint: Checkpoint, name: str) -> OffloadedWeight:
    """A tensor of a checkpoint that stays in its file. Reading raises `StorageError`, naming it."""

    def read(start: int, stop: int) -> Tensor:
        try:
            return checkpoint.read_rows(name, start, stop)
        except (UserError, OSError) as error:
            raise StorageError(f"{name}: cannot be read any more: {error}") from error

    rows, columns = checkpoint.shape(name)
    return OffloadedWeight((rows, columns), checkpoint.dtype(name), read, checkpoint.device)


def from_host(matrix: Tensor) -> OffloadedWeight:
    """A matrix in host memory."""
    rows, columns = matrix.shape
    return OffloadedWeight(
        (rows, columns), matrix.dtype, lambda start, stop: matrix[start:stop], matrix.device
    )


def embed_from_offloaded(layer: nn.Embedding, weight: OffloadedWeight, state: BranchState) -> None:
    """Let an embedding have, while it runs, just the rows that its tokens need.

    Which those are is asked of the host, if it knows: a device would first have to finish what it has.
    """
    layer.padding_idx = None  # only of use to gradients, and not a row of the gathered table
    nothing = layer.weight

    def gather(module: nn.Embedding, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        given, ids = args[0], state.on_host(args[0])
        tokens, index = torch.unique(given if ids is None else ids, return_inverse=True)
        rows = weight.gather(tokens.cpu()).to(given.device, non_blocking=True)
        module.weight = nn.Parameter(rows, requires_grad=False)
        if ids is not None:
            index = index.to(given.device, non_blocking=True).repeat(state.branches.count, 1)
        return (index, *args[1:])

    def drop(module: nn.Embedding, args: tuple[Tensor, ...], output: Tensor) -> None:
        module.weight = nothing

    layer.register_forward_pre_hook(gather)
    layer.register_forward_hook(drop)
