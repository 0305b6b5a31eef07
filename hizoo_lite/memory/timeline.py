"""Memory samples of a run, kept few: whole traversals are dropped when there are too many, never parts.

A traversal is one step, or one batch of an evaluation: the samples between its start and its end, one a
block. The first ones are kept for good, because a run that will not fit shows it there.
"""

from __future__ import annotations

from typing import Any, NamedTuple, final

#: Traversals at the start of a run that are never dropped.
FIRST_KEPT = 8
#: A sample is some 100 bytes of JSON.
MOST_SAMPLES = 3000
MOST_PEAKS = 1000


class Sample(NamedTuple):
    """What was held at one moment."""

    seconds: float  # since the profiler was made
    step: int
    phase: str  # "evaluate", "inference", "train" or "save"
    block: int | str | None  # the block that has just run, "head", "update" (of a step), "end"; None: before
    held: dict[str, int]  # bytes by name, see `sampling.py`

    def record(self) -> dict[str, Any]:
        """As it is written to memory.json."""
        place = {"seconds": round(self.seconds, 6), "step": self.step, "phase": self.phase}
        return {**place, "block": self.block, **self.held}


@final
class Timeline:
    """Samples by traversal, in order. `coarser` doubles whenever every second traversal was dropped."""

    def __init__(self, most: int = MOST_SAMPLES) -> None:
        self.most, self.coarser, self.count = most, 1, 0
        self._traversals: list[list[Sample]] = [[]]

    def begin(self) -> None:
        """What is added from now on belongs to a new traversal."""
        self._traversals.append([])

    def add(self, sample: Sample) -> None:
        """Take in a sample; older ones go where there are too many."""
        self._traversals[-1].append(sample)
        self.count += 1
        if self.count > self.most:
            self._thin()

    def samples(self) -> list[Sample]:
        """All that are kept, in the order they were taken."""
        return [sample for traversal in self._traversals for sample in traversal]

    def _thin(self) -> None:
        last = len(self._traversals) - 1
        if last > FIRST_KEPT:
            kept = [t for i, t in enumerate(self._traversals) if i < FIRST_KEPT or i % 2 == 0 or i == last]
            self.coarser *= 2
        else:  # few traversals of a very deep model: every second block
            kept = [traversal[::2] for traversal in self._traversals]
        self._traversals, self.count = kept, sum(map(len, kept))


@final
class Peaks:
    """The peak of every stretch of steps, as (last step, bytes); neighbours are merged when too many."""

    def __init__(self, most: int = MOST_PEAKS) -> None:
        self.most = most
        self.entries: list[tuple[int, int]] = []

    def add(self, step: int, peak_bytes: int) -> None:
        """The peak of all steps since the last entry, up to `step`."""
        if self.entries and self.entries[-1][0] == step:  # of what came between this step and the next phase
            peak_bytes = max(peak_bytes, self.entries.pop()[1])
        self.entries.append((step, peak_bytes))
        if len(self.entries) > self.most:
            pairs = [self.entries[i : i + 2] for i in range(0, len(self.entries), 2)]
            self.entries = [(pair[-1][0], max(peak for _, peak in pair)) for pair in pairs]
