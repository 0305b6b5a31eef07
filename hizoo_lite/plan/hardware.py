"""Machines that a run can be planned for: TOML files in profiles/hardware, or a file of one's own.

Keys: `name`, `device` ("cuda" or "cpu"), `device_memory`, `device_reserved` (what the system needs of it),
`host_memory`, `host_reserved`, sizes such as "24GiB"; `device_bandwidth`, `host_to_device`, `disk`, bytes a
second such as "1008GB"; `residency` and `batch_size`, the defaults of a plan; `efficiency`, the share of the
published rates that a real product reaches; and a table `operations` of dense products' operations a second
by dtype (`bf16`, `fp16`, `float32`). On a CPU there is one memory, and no `host_*`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hizoo_lite.errors import UserError
from hizoo_lite.files import parse_toml
from hizoo_lite.units import ALLOWED_SIZES, parse_bytes

_SIZES = ("device_memory", "device_reserved", "host_memory", "host_reserved")
_RATES = ("device_bandwidth", "host_to_device", "disk")
_CHOICES = {"device": ("cuda", "cpu"), "residency": ("auto", "resident", "host", "disk")}
_DTYPES: tuple[Literal["bf16", "fp16", "float32"], ...] = ("bf16", "fp16", "float32")
_LARGEST = sys.float_info.max
_ON_GPU_ONLY = ("host_memory", "host_reserved", "host_to_device")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A machine. Sizes in bytes, rates in bytes or operations a second."""

    name: str
    device: Literal["cuda", "cpu"]
    device_memory_bytes: int
    device_reserved_bytes: int
    host_memory_bytes: int
    host_reserved_bytes: int
    device_bandwidth: int
    host_to_device: int
    disk: int
    operations: Mapping[str, float]
    efficiency: float = 0.5
    residency: Literal["auto", "resident", "host", "disk"] = "auto"
    batch_size: int | None = None

    @property
    def device_budget_bytes(self) -> int:
        """What a run may take of the device."""
        return self.device_memory_bytes - self.device_reserved_bytes

    @property
    def host_budget_bytes(self) -> int | None:
        """What a run may take of the host; None if the device is the host."""
        return self.host_memory_bytes - self.host_reserved_bytes if self.device == "cuda" else None

    @property
    def compute(self) -> Literal["bf16", "fp16", "float32"]:
        """The dtype of products: the first of bf16, fp16, float32 that it multiplies."""
        return next(dtype for dtype in _DTYPES if dtype in self.operations)

    def settings(self, given: Container[str]) -> dict[str, Any]:
        """The settings of a run on this machine by their names in `TrainConfig`, but for those `given`.

        On a CPU there is one budget: who gave either has given it.
        """
        budgets = {"device_budget": self.device_budget_bytes, "host_budget": self.host_budget_bytes}
        if self.device == "cpu" and "host_budget" in given:
            budgets = {}
        found: dict[str, Any] = {name: f"{size}B" for name, size in budgets.items() if size is not None}
        if self.device == "cpu":
            found["device"] = "cpu"
        if self.residency != "auto":
            found["residency"] = self.residency
        if self.batch_size is not None:
            found["batch_size"] = self.batch_size
        return {name: value for name, value in found.items() if name not in given}

    def rate(self, dtype: str) -> float | None:
        """Operations a second that a product in `dtype` really reaches."""
        best = self.operations.get(dtype)
        return None if best is None else best * self.efficiency


def folder() -> Path:
    """Where the shipped ones are."""

    return profiles_folder() / "hardware"


def names() -> list[str]:
    """The shipped ones."""
    return sorted(path.stem for path in folder().glob("*.toml"))


def find(name_or_file: str) -> Hardware:
    """A shipped profile by name, or a file. `UserError` with all of its problems."""
    path = Path(name_or_file)
    if not os.path.isfile(path):  # False also where no file can have such a name
        path = folder() / f"{name_or_file}.toml"
        if Path(name_or_file).name != name_or_file or not os.path.isfile(path):
            raise UserError(
                f"--profile: got {name_or_file!r}, which is no file; allowed: a TOML file, or one of "
                f"{', '.join(names())}"
            )
    return read(path)


def read(path: Path) -> Hardware:
    """A profile from its file. `UserError` with all of its problems."""
    try:
        document = parse_toml(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error
    found = _problems(document)
    if found:
        count = f"{len(found)} problems" if len(found) > 1 else "one problem"
        raise UserError("\n  ".join([f"{path}: {count} in the profile", *found]))
    sizes: dict[str, Any] = {
        f"{key}_bytes": parse_bytes(document[key]) if document.get(key, "0B") != "0B" else 0 for key in _SIZES
    }
    rates: dict[str, Any] = {key: parse_bytes(document[key]) for key in _RATES if key in document}
    rates.setdefault("host_to_device", rates["device_bandwidth"])
    rest = {key: document[key] for key in ("efficiency", "residency", "batch_size") if key in document}
    operations = {key: float(value) for key, value in document["operations"].items()}
    return Hardware(
        name=document["name"], device=document["device"], operations=operations, **sizes, **rates, **rest
    )


def _problems(document: Mapping[str, Any]) -> list[str]:
    known = {"name", "operations", "efficiency", "batch_size", *_SIZES, *_RATES, *_CHOICES}
    found = [
        f"{key}: unknown key; allowed: {', '.join(sorted(known))}" for key in document if key not in known
    ]
    on_gpu = document.get("device") == "cuda"
    for key in ("name", "device", "operations", *_SIZES, *_RATES):
        if key not in document and (on_gpu or key not in _ON_GPU_ONLY):
            found.append(f"{key}: missing")
        elif key in document and not on_gpu and key in _ON_GPU_ONLY:
            found.append(f"{key}: got {document[key]!r}; allowed: nothing, the device is the host")
    for key in (*_SIZES, *_RATES):
        if key in document and not _is_size(document[key]):
            found.append(f"{key}: got {document[key]!r}, allowed: {ALLOWED_SIZES}")
    for key, allowed in _CHOICES.items():
        if key in document and document[key] not in allowed:
            found.append(f"{key}: got {document[key]!r}, allowed: {', '.join(allowed)}")
    found += _number_problems(document)
    if not found and parse_bytes(document["device_memory"]) <= _bytes(document["device_reserved"]):
        found.append("device_reserved: leaves nothing of device_memory")
    return found


def _number_problems(document: Mapping[str, Any]) -> list[str]:
    found = []
    operations = document.get("operations", {})
    if not isinstance(operations, dict) or ("operations" in document and not operations):
        found.append(f"operations: got {operations!r}, allowed: a table of {', '.join(_DTYPES)}")
        operations = {}
    for key, value in operations.items():
        if key not in _DTYPES or not _is_number(value) or value <= 0:
            found.append(
                f"operations.{key}: got {value!r}, allowed: {', '.join(_DTYPES)} with a number above 0"
            )
    share = document.get("efficiency", 0.5)
    if not _is_number(share) or not 0 < share <= 1:
        found.append(f"efficiency: got {share!r}, allowed: a number above 0 and up to 1")
    batch = document.get("batch_size", 1)
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        found.append(f"batch_size: got {batch!r}, allowed: a whole number of 1 or more")
    if "name" in document and not isinstance(document["name"], str):
        found.append(f"name: got {document['name']!r}, allowed: a text")
    return found


def _is_number(value: Any) -> bool:
    """A finite one, as a float too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _bytes(text: Any) -> int:
    return 0 if text == "0B" else parse_bytes(text)


def _is_size(text: Any) -> bool:
    if text == "0B":
        return True
    try:
        parse_bytes(text)
    except (ValueError, TypeError):
        return False
    return True


def profiles_folder() -> Path:
    """Where the shipped profiles are: inside the installed package, or beside it in a source checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "profiles"
    return installed if installed.is_dir() else package.parent / "profiles"
