"""Where a block's weights are while it is not being computed. Members: `Resident`, `Streamed`.

A residency is called around every block of a traversal (see `block.py`); it brings the weights in and lets
them go. `Streamed` keeps as many blocks on the compute device as the budget allows and moves the others
through two buffers of the largest block's size: while one block computes, the next one is fetched; while the
head runs, the first of the next pass. (With one buffer, if memory counts more than time, nothing is
fetched ahead.) Only packed bytes travel. ZO2 (arXiv 2503.12668) streams 16-bit blocks of hand-written models
from RAM in the same manner; ours takes any model, quantized, from RAM or disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from hizoo_lite.device import is_gpu, kind_of
from hizoo_lite.engine.fetch import Fetcher, make_fetcher
from hizoo_lite.engine.layout import Layout, layouts
from hizoo_lite.engine.passing import SLOTS, Passing
from hizoo_lite.engine.storage import READERS, DiskSource, HostSource, Source
from hizoo_lite.errors import BudgetError
from hizoo_lite.units import format_bytes

if TYPE_CHECKING:
    from hizoo_lite.model.model import Model

Where = Literal["host", "disk"]


class Resident:
    """Every block stays on the compute device from loading to the end of the run."""

    name = "resident"
    turns_at: int | None = None
    falls = False
    starts_at = 0

    def acquire(self, block: int) -> None:
        """Nothing to bring in."""

    def mark_dirty(self, block: int) -> None:
        """Buffers that are here were changed where they are."""

    def discard(self, block: int) -> bool:
        """There is no other copy."""
        return False

    def release(self, block: int) -> None:
        """Nothing to let go."""

    def close(self) -> None:
        """Nothing is open."""


class Streamed:
    """Blocks live in host memory or on disk; those that fit stay on the device.

    It is laid out when the first block is asked for, because only then is it known what the weights hold
    (a space may have added to them) and how much memory everything else has taken.
    """

    def __init__(self, model: Model, where: Where, budget_bytes: int | None = None) -> None:
        """`budget_bytes`: what may be taken in all; None keeps no block on the device."""
        self.name: str = where
        self.turns_at: int | None = None
        self.falls = False
        self.starts_at = 0
        self.budget_bytes = budget_bytes
        self.reserved_bytes = 0  # for what a pass needs besides the weights; set before the first one
        self.mostly_from = 0  # most passes begin at this block; set before the first one
        self.slots = SLOTS  # with 1 no block is fetched while another computes
        self.scratch: Path | None = None  # folder for changed blocks; None: the system's
        self._model = [model]
        self._fetcher: Fetcher | None = None  # from the first acquire on
        self._kept: dict[int, Tensor] = {}  # block -> its bytes, on the device for good
        self._slots: list[Tensor] = []
        self._passing: Passing | None = None  # likewise
        self._present: tuple[int, int] | None = None  # (block, slot) of the one that runs

    # ---------------------------------------------------------------------------------- residency

    def acquire(self, block: int) -> None:
        """Bring block `block` in, and begin to fetch the streamed one after it."""
        fetcher = self.prepare()
        if block in self._kept:
            return
        assert self._passing is not None
        slot = self._passing.slot_of(block)
        try:
            fetcher.wait(slot)
        except BaseException:
            self._passing.lost(slot)
            raise
        self._layouts[block].bind(self._slots[slot])
        self._present = (block, slot)
        self._passing.prefetch(block, slot)

    def prepare(self) -> Fetcher:
        """Lay everything out, if that is not done yet. Raises `BudgetError` if it does not fit."""
        return self._fetcher or self._start()

    def mark_dirty(self, block: int) -> None:
        """The changed bytes go where the next fetch finds them; a block that stays keeps them itself."""
        if block not in self._kept:
            fetcher, (_, slot) = self._running()
            fetcher.store(slot, block)

    def discard(self, block: int) -> bool:
        """What is in the slot is fetched anew; a block that stays has no other copy."""
        if block in self._kept:
            return False
        _, (_, slot) = self._running()
        assert self._passing is not None
        self._passing.lost(slot)
        return True

    def release(self, block: int) -> None:
        """Take the weights away; their bytes stay in the slot until it is needed."""
        if block not in self._kept:
            fetcher, (_, slot) = self._running()
            self._layouts[block].unbind()
            self._present = None
            fetcher.free(slot)

    def close(self) -> None:
        """End the thread, close the files, free the slots. Changed blocks are lost: save before."""
        if self._fetcher is not None:
            for block in self._kept:
                self._layouts[block].unbind()
            self._fetcher.close()
            self._fetcher.source.close()
            self._fetcher, self._kept, self._slots = None, {}, []

    # ------------------------------------------------------------------------------------ figures

    @property
    def kept_blocks(self) -> list[int]:
        """The blocks that stay on the device; known after the first acquire."""
        return sorted(self._kept)

    @property
    def is_laid_out(self) -> bool:
        """Whether a block has been asked for: from then on the weights cannot get other buffers."""
        return self._fetcher is not None

    @property
    def slot_bytes(self) -> int:
        return sum(slot.numel() for slot in self._slots)

    @property
    def waited_seconds(self) -> float:
        """What the loop has spent waiting for bytes."""
        return 0.0 if self._fetcher is None else self._fetcher.waited_seconds

    @property
    def moved_bytes(self) -> int:
        """Bytes that were fetched."""
        return 0 if self._fetcher is None else self._fetcher.moved_bytes

    # -------------------------------------------------------------------------------------- parts

    def _running(self) -> tuple[Fetcher, tuple[int, int]]:
        assert self._fetcher is not None
        assert self._present is not None
        return self._fetcher, self._present

    def _start(self) -> Fetcher:
        model = self._model[0]
        self._layouts = layouts(model)
        _settle(self._layouts, model.device)
        largest_bytes = max((layout.nbytes for layout in self._layouts), default=0)
        affordable = self._affordable(model.device, largest_bytes)
        staying = spread(len(self._layouts), affordable, self.mostly_from)
        source = self._make_source(model)
        order = [block for block in range(len(self._layouts)) if block not in staying]
        size = max((self._layouts[block].nbytes for block in order), default=0)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=model.device) for _ in order[: self.slots]]
        fetcher = make_fetcher(source, self._layouts, self._slots, model.device)
        self._passing = Passing(self, order, self.slots, fetcher)
        for block, layout in enumerate(self._layouts):
            layout.unbind()
            if block in staying:
                self._kept[block] = fetcher.whole(block)
                source.drop(block)
                layout.bind(self._kept[block])
        self._fetcher = fetcher
        return fetcher

    def _make_source(self, model: Model) -> Source:
        offloaded = any(place.stored.tensor.is_meta for layout in self._layouts for place in layout.places)
        readers = READERS if is_gpu(model.device) else 1
        disk = DiskSource(model.checkpoint, self._layouts, self.scratch, readers) if offloaded else None
        if self.name == "disk":
            assert disk is not None
            return disk
        host = HostSource(self._layouts, model.device)
        for block, layout in enumerate(self._layouts):
            host.fill(block, disk)
            layout.unbind()
        if disk is not None:
            disk.close()
        return host

    def _affordable(self, device: torch.device, largest_bytes: int) -> int:
        """How many blocks may stay on the device. Raises `BudgetError` if not even the slots fit."""
        if self.budget_bytes is None:
            return 0
        sizes = [layout.nbytes for layout in self._layouts]
        kind = kind_of(device)
        free = kind.allowance(self.budget_bytes, device) - kind.taken_bytes(device) - self.reserved_bytes
        if sum(sizes) <= free:
            return len(sizes)
        slots = min(self.slots, len(sizes)) * largest_bytes
        if free < slots:
            needed = format_bytes(self.budget_bytes - free + slots)
            raise BudgetError(
                f"--device-budget: got {format_bytes(self.budget_bytes)}, at least {needed} is needed: "
                f"{format_bytes(self.budget_bytes - free - self.reserved_bytes)} for what is there already, "
                f"{format_bytes(self.reserved_bytes)} for a pass, {format_bytes(slots)} for passing blocks; "
                "a smaller --batch-size, --max-length or --branch-chunk makes the pass smaller"
            )
        return min(len(sizes) - self.slots, (free - slots) // largest_bytes)


def spread(blocks: int, kept: int, first: int = 0) -> set[int]:
    """Which blocks stay, evenly among the others: each gives the fetch behind it time.

    Those from `first` on come before the others.
    """
    upper = min(kept, blocks - first)
    found = {first + (2 * i + 1) * (blocks - first) // (2 * upper) for i in range(upper)}
    return found | (spread(first, kept - upper) if first and kept > upper else set())


def _settle(laid_out: Sequence[Layout], device: torch.device) -> None:
    """The small buffers of weights (tables, offsets), which have no place, go to the device for good."""
    places = [place.stored for layout in laid_out for place in layout.places]
    travelling = {(id(stored.owner), stored.name) for stored in places}
    for owner in {id(stored.owner): stored.owner for stored in places}.values():
        for name, buffer in owner._buffers.items():
            if buffer is not None and (id(owner), name) not in travelling:
                owner._buffers[name] = buffer.to(device)
