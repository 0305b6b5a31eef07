"""What a user says about memory: where blocks may be, and how much a run may take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from hizoo_lite.errors import UserError
from hizoo_lite.units import parse_bytes

if TYPE_CHECKING:
    import torch

ResidencyName = Literal["auto", "resident", "host", "disk"]
Place = Literal["resident", "host", "disk"]


class Budgets(NamedTuple):
    """Memory that a run may take, in bytes; None if nothing was said."""

    device_bytes: int | None  # of the compute device; on a CPU that is the host
    host_bytes: int | None

    @classmethod
    def parse(cls, device: str | int | None, host: str | int | None, place: torch.device) -> Budgets:
        """From sizes such as "24GiB". On CPU one memory serves as both: the smaller budget counts."""
        given = [_bytes("device_budget", device), _bytes("host_budget", host)]
        if place.type == "cpu":
            smallest = min((value for value in given if value is not None), default=None)
            return cls(smallest, smallest)
        return cls(given[0], given[1])


class Limits(NamedTuple):
    """What `load` was told about memory, as it was given; a run of the model has the same, unless told."""

    residency: ResidencyName = "auto"
    device_budget: str | int | None = None
    host_budget: str | int | None = None

    def settings(self) -> dict[str, str]:
        """Those that were given, as fields of `TrainConfig`."""
        sizes = {"device_budget": self.device_budget, "host_budget": self.host_budget}
        texts = {k: f"{v}B" if isinstance(v, int) else v for k, v in sizes.items() if v is not None}
        return {"residency": self.residency, **texts}


def _bytes(name: str, size: str | int | None) -> int | None:
    if size is None or isinstance(size, int):
        return size
    try:
        return parse_bytes(size)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
