"""Which of the blocks that pass through the slots are there, and which is fetched next.

Nothing is moved here: `residency.py` moves what is asked for, and the planner counts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, final

from hizoo_lite.base import Residency

#: Blocks that are on the device while they pass: one computes, the next one comes.
SLOTS = 2


class Fetches(Protocol):
    """As far as a fetcher is needed here."""

    def fetch(self, block: int, slot: int) -> None:
        """Begin to fill a slot that nothing uses any more."""
        ...


@final
class Passing:
    """The blocks that do not stay, in the slots. Where passes begin and turn is what `course` says."""

    def __init__(self, course: Residency, order: Sequence[int], slots: int, fetcher: Fetches) -> None:
        """order: those blocks, rising."""
        self._course, self._order, self._fetcher = course, order, fetcher
        self._held: list[int | None] = [None for _ in order[:slots]]  # what each slot has, or will have

    def slot_of(self, block: int) -> int:
        """The slot with the block in it, or on its way; else one is taken and the fetch begun."""
        if block in self._held:
            return self._held.index(block)
        slot = next((i for i, held in enumerate(self._held) if held is None), 0)
        self._fetch(block, slot)
        return slot

    def prefetch(self, block: int, slot: int) -> None:
        """Block `block` is in `slot`: begin to fetch the one that is asked for after it into the other."""
        if len(self._held) == 1:
            return
        following = self._following(self._order.index(block))
        if following not in self._held:
            self._fetch(following, 1 - slot)

    def lost(self, slot: int) -> None:
        """What is in the slot is no block any more."""
        self._held[slot] = None

    def _following(self, position: int) -> int:
        """The block that is asked for after the one at `position` of the order."""
        course, order = self._course, self._order
        first = next((block for block in order if block >= course.starts_at), order[0])
        if not course.falls and position + 1 < len(order):
            return order[position + 1]
        if course.turns_at is None:
            return first
        below = order[position - 1] if position else -1
        return below if below >= course.turns_at else first

    def _fetch(self, block: int, slot: int) -> None:
        self._held[slot] = None
        self._fetcher.fetch(block, slot)
        self._held[slot] = block
