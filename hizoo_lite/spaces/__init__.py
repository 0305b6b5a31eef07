"""Spaces: what is trainable, and how each branch's own parameters enter a linear layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hizoo_lite.base import Space
from hizoo_lite.checkpoints.adapter import SPACE_FILE, read_record
from hizoo_lite.errors import UserError
from hizoo_lite.model.model import Model
from hizoo_lite.quant import native  # noqa: F401 - imports bitsandbytes quietly, before peft does so aloud
from hizoo_lite.registry import SPACES
from hizoo_lite.spaces.changes import Changes
from hizoo_lite.spaces.dense import Dense
from hizoo_lite.spaces.lora import LoRA
from hizoo_lite.spaces.lowrank import LowRank
from hizoo_lite.spaces.mazo import MaZO
from hizoo_lite.spaces.scales import Scales
from hizoo_lite.spaces.small import Small
from hizoo_lite.spaces.sparse import Sparse
from hizoo_lite.spaces.subspace import Subspace

__all__ = [
    "SPACES",
    "Dense",
    "LoRA",
    "LowRank",
    "MaZO",
    "Scales",
    "Small",
    "Sparse",
    "Subspace",
    "get",
    "of_folder",
    "of_peft",
    "read_changes",
    "saved_in",
]

#: See `Registry.make`.
get = SPACES.make


def of_peft(config: Any) -> LoRA:
    """The space of a `peft.LoraConfig`; see `LoRA.of_config`."""
    return LoRA.of_config(config)


def of_folder(folder: Path) -> type[Space]:
    """The space that has saved an adapter folder; adapters of PEFT are LoRA's. UserError for another one."""
    if not (folder / SPACE_FILE).is_file():
        return LoRA
    name, known = read_record(folder)["space"], [name for name in SPACES if name != LoRA.name]
    if name not in known:
        raise UserError(f"{folder / SPACE_FILE}: space: got {name!r}, supported: {', '.join(known)}")
    return SPACES[name]


def saved_in(folder: Path, model: Model, **options: Any) -> Space:
    """A space that can load what is saved in an adapter folder, not yet attached.

    Args:
        folder: written by a space's `save`, or PEFT's.
        model: that it is to be attached to.
        options: further arguments of LoRA.

    Raises:
        UserError: if what was saved does not fit the model, or is of a form that is not supported.
    """
    name = of_folder(folder).name
    if name == LoRA.name:
        return LoRA.of_adapter(folder, model, **options)
    record = read_record(folder)
    kept = {key: record[key] for key in SPACES.arguments(name) if key in record}
    if "head" in record:
        kept["head"] = "estimated" if record["head"] else "none"
    return SPACES.make(name, **kept, blocks="all")


def read_changes(folder: Path) -> Changes:
    """What was tuned, to be merged into weights. UserError, naming the file, if it cannot be."""
    member = of_folder(folder)
    if member.changes is None:
        raise UserError(f"{folder}: what --space {member.name} trains cannot be exported")
    changes: Changes = member.changes(folder)
    return changes
