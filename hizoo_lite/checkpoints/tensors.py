"""Read single tensors, or some of their rows, out of a safetensors file by plain reads.

Mapping the file would be simpler, but mapped pages count as the process's own (RssFile) for as long as
any tensor points at them, and a private mapping counts against RLIMIT_DATA. A read fills exactly one
fresh tensor. The file is a little-endian u64 with the header's length, a JSON header with dtype, shape
and byte range of every tensor, and the bytes (https://github.com/huggingface/safetensors, "Format").
The header is not trusted, see `tensorfile.read_header`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hizoo_lite.checkpoints.tensorfile import read_header
from hizoo_lite.errors import StorageError, UserError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
#: The format's name of each dtype.
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Entry(NamedTuple):
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte, from the file's start
    nbytes: int


class TensorFile:
    """One safetensors file. Holds the header, no open file: reads may come from several threads."""

    def __init__(self, path: Path) -> None:
        """Read and check the header. Raises `UserError`, naming the file, if it is not valid."""
        self.path = path
        sizes = {name: dtype.itemsize for name, dtype in _DTYPES.items()}
        self.entries = {
            name: Entry(_DTYPES[found.dtype], found.shape, found.offset, found.nbytes)
            for name, found in read_header(path, sizes).items()
        }

    def read(self, name: str) -> Tensor:
        """The whole tensor, fresh, on CPU, in its stored dtype."""
        entry = self.entries[name]
        return self._read(entry.offset, entry.nbytes, entry.dtype, entry.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Entries start .. stop of the first dimension, fresh, on CPU, in the stored dtype."""
        entry = self.entries[name]
        if not entry.shape or not 0 <= start <= stop <= entry.shape[0]:
            raise ValueError(f"{name}: rows {start} .. {stop} are outside of shape {entry.shape}")
        row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        shape = (stop - start, *entry.shape[1:])
        return self._read(entry.offset + start * row_bytes, (stop - start) * row_bytes, entry.dtype, shape)

    def _read(self, offset: int, nbytes: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        if nbytes == 0:
            return tensor
        target = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(offset)
                done = 0
                while done < nbytes:  # one read moves at most 2 GiB
                    count = file.readinto(target[done:])
                    if not count:
                        raise UserError(
                            f"{self.path}: truncated: ends at byte {offset + done} inside a tensor"
                        )
                    done += count
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        return tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file of the tensors, from whatever device. `StorageError` if it cannot be written."""
    try:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, path, metadata=metadata)
    except SafetensorError as error:  # the library's word for what the system says
        raise StorageError(f"{path}: cannot be written: {error}") from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. `UserError` naming it if it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
