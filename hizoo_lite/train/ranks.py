"""The processes of a data parallel run, as the loop sees them. One process is the usual case.

Every rank holds the whole model, takes its share of a batch's examples through all branches, and learns the
sums of the losses from the others: a few numbers a step, whatever the model's size, because z and so the
update is a function of (seed, step, name) on every rank. Ranks stay bit-identical without exchanging a
parameter (MeZO 2305.17333, section 2.1, notes how little a step communicates). `distributed.py` has the ranks
of a launcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


class Ranks:
    """One process; also what a run beside onnxruntime has."""

    rank, count = 0, 1

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run folder."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This rank's part of `items`, the parts in the order of the ranks; none if there are too few."""
        bounds = [len(items) * rank // self.count for rank in (self.rank, self.rank + 1)]
        return items[bounds[0] : bounds[1]]

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The sum over the ranks, float64, the same bits on each."""
        return values

    def gather(self, value: Item) -> list[Item]:
        """The value of every rank, in their order."""
        return [value]

    def wait(self) -> None:
        """Until every rank has come here."""


ONE = Ranks()
