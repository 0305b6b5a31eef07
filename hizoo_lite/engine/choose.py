"""Which residency a model gets: what was asked for, or the fastest that its budgets allow.

This is a first sorting by the size of the weights. How many blocks stay on the device is decided when the
first one is asked for (see `residency.py`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import psutil
import torch

from hizoo_lite.base import Bits, UserError
from hizoo_lite.errors import BudgetError
from hizoo_lite.quant import Checkpoint
from hizoo_lite.units import format_bytes, parse_bytes

ResidencyName = Literal["auto", "resident", "host", "disk"]
Place = Literal["resident", "host", "disk"]

#: Share of the host's free memory that blocks may take where no budget says so.
_HOST_SHARE = 0.8
_BYTES_AN_ELEMENT: dict[Bits, float] = {"nf4": 0.516, "fp4": 0.516, "int8": 1.0, "none": 2.0}


class Budgets(NamedTuple):
    """Memory that a run may take, in bytes; None where nothing was said."""

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


def choose(
    wanted: ResidencyName, device: torch.device, checkpoint: Checkpoint, bits: Bits, budgets: Budgets
) -> Place:
    """The residency to load for. Raises `UserError` for an unknown name."""
    if wanted not in get_args(ResidencyName):
        raise UserError(f"residency: got {wanted!r}, allowed are {', '.join(get_args(ResidencyName))}")
    if wanted != "auto":
        return wanted
    if budgets.device_bytes is None:
        return "resident"
    is_stored = bits == (checkpoint.quantized_bits or "none")
    if device.type == "cpu":
        return "disk" if is_stored else _refuse_too_large(checkpoint, bits, budgets.device_bytes)
    if not is_stored:
        return "host"
    weights_bytes = sum(checkpoint.nbytes(name) for name in checkpoint)
    host_bytes = budgets.host_bytes
    if host_bytes is None:
        host_bytes = int(psutil.virtual_memory().available * _HOST_SHARE)
    return "host" if weights_bytes <= host_bytes else "disk"


def _refuse_too_large(checkpoint: Checkpoint, bits: Bits, budget_bytes: int) -> Place:
    """On CPU weights that are quantized while they are loaded must fit as a whole."""
    elements = sum(checkpoint.nbytes(name) // checkpoint.dtype(name).itemsize for name in checkpoint)
    packed_bytes = int(elements * _BYTES_AN_ELEMENT[bits])
    if packed_bytes > budget_bytes:
        raise BudgetError(
            f"--device-budget: got {format_bytes(budget_bytes)}, but the weights take about "
            f"{format_bytes(packed_bytes)} in {bits}; quantize them once, they can then be streamed from "
            f"disk: hizoo-lite quantize --model {checkpoint.folder} --bits {bits} --out DIR"
        )
    return "resident"


def _bytes(name: str, size: str | int | None) -> int | None:
    if size is None or isinstance(size, int):
        return size
    try:
        return parse_bytes(size)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
