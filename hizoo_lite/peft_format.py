"""The folder in which PEFT keeps an adapter: its files, its names, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hizoo_lite.base import Shape
from hizoo_lite.errors import UserError

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
#: What PEFT puts before the name of every parameter.
PREFIX = "base_model.model."
#: Of the tensor file.
METADATA = {"format": "pt"}


def tensor_file(folder: Path | str) -> Path:
    """The adapter's tensors. UserError where the folder has none."""
    path = Path(folder) / TENSOR_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; a PEFT adapter folder holds {TENSOR_FILE}")
    return path


def check_fits(path: Path, found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> None:
    """UserError unless a file has the wanted names (without PREFIX) and shapes."""
    wrong = sorted(set(found) ^ set(wanted))
    if wrong:
        raise UserError(f"{path}: does not fit this model and space; first of {len(wrong)}: {wrong[0]!r}")
    for name, shape in wanted.items():
        if tuple(found[name]) != tuple(shape):
            got, want = tuple(found[name]), tuple(shape)
            raise UserError(f"{path}: {name} has shape {got}, the model wants {want}")
