"""Writing tensors of a space."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hizoo_lite.errors import StorageError


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file of the tensors, from whatever device. `StorageError` where it cannot be written."""
    try:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, path, metadata=metadata)
    except SafetensorError as error:  # the library's word for what the system says
        raise StorageError(f"{path}: cannot be written: {error}") from error
