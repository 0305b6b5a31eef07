"""The ranks that `accelerate launch` or torchrun started, through accelerate.

What they exchange are a few numbers of the host, so it goes through gloo whatever the device is: with NCCL
the host would wait for the device twice a step, and a rank that is lost would be no error in the others but a
wait that no signal ends.
"""

from __future__ import annotations

import json
import os

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from hizoo_lite.errors import StorageError
from hizoo_lite.train.ranks import ONE, Item, Ranks


class LaunchedRanks(Ranks):
    """Several processes. A lost one is an error in all others at their next exchange."""

    def __init__(self, state: PartialState) -> None:
        self._group = dist.new_group(backend="gloo")
        self.rank, self.count = state.process_index, state.num_processes
        self.exchanges = 0
        self.sent_bytes = 0  # that this rank has given to each of the others

    def sum(self, values: np.ndarray) -> np.ndarray:
        """See `Ranks.sum`. Every rank adds the same numbers in the same order."""
        parts = self._all(torch.from_numpy(np.asarray(values, dtype=np.float64)))
        total = parts[0].numpy().copy()
        for part in parts[1:]:
            total += part.numpy()
        return total

    def gather(self, value: Item) -> list[Item]:
        """See `Ranks.gather`; of what JSON can say. Nothing is unpickled, here as elsewhere."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [int(length) for length in self._all(torch.tensor([len(text)]))]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(text)] = text
        parts = self._all(padded)
        return [
            json.loads(part[:length].numpy().tobytes()) for part, length in zip(parts, lengths, strict=True)
        ]

    def wait(self) -> None:
        self._all(torch.zeros(1, dtype=torch.uint8))

    def _all(self, mine: Tensor) -> list[Tensor]:
        """The tensor of every rank, on the host. All are of one shape."""
        parts = [torch.empty_like(mine) for _ in range(self.count)]
        self.exchanges += 1
        self.sent_bytes += mine.numel() * mine.itemsize
        try:
            dist.all_gather(parts, mine, group=self._group)
            return parts
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            raise StorageError(
                f"another process of this run has ended ({first}); start all of them again with --resume"
            ) from error


def join(device_type: str) -> Ranks:
    """The ranks that this process is one of, each with its own GPU; `ONE` if no launcher started it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return ONE
    state = PartialState(cpu=device_type != "cuda")
    return LaunchedRanks(state) if state.num_processes > 1 else ONE
