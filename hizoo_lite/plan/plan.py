"""What the planner answers: whether a run fits, its bytes by category, and how fast it can be at most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hizoo_lite.plan.ledger import CATEGORIES, Ledger
from hizoo_lite.units import format_bytes

#: Categories of what is there while a pass runs, and not before the first one.
_OF_A_PASS = (
    "noise",
    "scratch",
    "between_blocks",
    "batch_states",
    "attention",
    "mlp",
    "logits",
    "update",
    "loading",
    "cache",
)


@dataclass(frozen=True)
class Plan:
    """One configuration, planned. On a CPU there is one memory, called device."""

    fits: bool
    ledger: Ledger  # at the worst moment
    residency: Literal["resident", "host", "disk"]
    blocks: int
    blocks_on_device: int
    batch_size: int
    eval_batch_size: int
    max_length: int
    branch_chunk: int | Literal["auto"]
    chunk_halvings: int  # of chunks and logits, so that a pass fits
    device_type: str
    device_budget_bytes: int | None
    host_budget_bytes: int | None
    gives_back: bool  # the allocator gives large buffers back: see process.map_large
    peaks: Mapping[str, int] = field(default_factory=dict)  # activations while each part runs, at most
    moved_bytes: int = 0  # to the device, each step
    bounds: Mapping[str, float] = field(default_factory=dict)  # least seconds of a step, by what takes them
    why: str = ""
    nearest: Plan | None = None  # where this does not fit: what would
    unaccounted: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()  # where the examples are not known

    @property
    def categories(self) -> dict[str, int]:
        """Bytes by category, of device and host."""
        return {**self.ledger.device, **self.ledger.host}

    @property
    def peak_bytes(self) -> int:
        """Of the device."""
        return self.ledger.device_bytes

    @property
    def pass_bytes(self) -> int:
        """Of the device, what a pass needs besides what is there already."""
        return sum(self.ledger.device.get(category, 0) for category in _OF_A_PASS)

    @property
    def host_peak_bytes(self) -> int:
        """Of the host; on a CPU that is the device."""
        return self.ledger.host_bytes or self.peak_bytes

    @property
    def seconds_lower_bound(self) -> float | None:
        """Of a step: computing and moving go on beside each other. None if no rates are known."""
        if not self.bounds:
            return None
        moving = max(self.bounds.get("host_to_device", 0.0), self.bounds.get("disk", 0.0))
        return max(sum(self.bounds.get(k, 0.0) for k in ("products", "unpacking", "noise")), moving)

    def to_json(self) -> dict[str, Any]:
        """For plan.json and --json; bytes are whole numbers, times seconds."""
        return {
            "fits": self.fits,
            "residency": self.residency,
            "blocks": self.blocks,
            "blocks_on_device": self.blocks_on_device,
            "batch_size": self.batch_size,
            "eval_batch_size": self.eval_batch_size,
            "max_length": self.max_length,
            "branch_chunk": self.branch_chunk,
            "halvings": self.chunk_halvings,
            "device": self.device_type,
            "peak_bytes": self.peak_bytes,
            "host_peak_bytes": self.host_peak_bytes,
            "device_budget_bytes": self.device_budget_bytes,
            "host_budget_bytes": self.host_budget_bytes,
            "gives_back": self.gives_back,
            "ledger": self.ledger.to_json(),
            "moments": dict(self.peaks),
            "moved_bytes": self.moved_bytes,
            "bounds": dict(self.bounds),
            "seconds_lower_bound": self.seconds_lower_bound,
            "why": self.why,
            "nearest": None if self.nearest is None else self.nearest.to_json(),
            "unaccounted": list(self.unaccounted),
            "assumed": list(self.assumed),
        }

    def table(self) -> list[list[str]]:
        """Rows of category, bytes, and what that is; the largest first, the sum last."""
        rows = []
        for place, categories in (
            ("", self.ledger.device),
            ("host: ", self.ledger.host),
            ("disk: ", self.ledger.disk),
        ):
            for name, size in sorted(categories.items(), key=lambda item: -item[1]):
                if size:
                    rows.append([place + name.replace("_", " "), format_bytes(size), CATEGORIES[name]])
            if categories and place != "disk: ":
                budget = self.host_budget_bytes if place else self.device_budget_bytes
                of = "" if budget is None else f"of {format_bytes(budget)}"
                rows.append([f"{place}peak", format_bytes(sum(categories.values())), of])
        return rows

    def settings(self) -> str:
        """What was chosen, in words."""
        where = {"resident": "all blocks resident", "host": "host memory", "disk": "disk"}[self.residency]
        if self.residency != "resident" and self.blocks_on_device == self.blocks:
            where = f"all blocks on the device, embeddings and head from {where}"
        elif self.residency != "resident":
            where = f"{self.blocks_on_device} of {self.blocks} blocks on the device, the others from {where}"
        chunk = "" if self.branch_chunk == "auto" else f", branch chunk {self.branch_chunk}"
        if self.chunk_halvings:
            chunk += f", chunks 1/{2**self.chunk_halvings} of the usual"
        return f"{where}, batch {self.batch_size} x {self.max_length}{chunk}"
