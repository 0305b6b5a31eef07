"""Writing and reading tensors of a space."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hizoo_lite.errors import StorageError, UserError


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file of the tensors, from whatever device. `StorageError` where it cannot be written."""
    try:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, path, metadata=metadata)
    except SafetensorError as error:  # the library's word for what the system says
        raise StorageError(f"{path}: cannot be written: {error}") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. `UserError` naming it where it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
