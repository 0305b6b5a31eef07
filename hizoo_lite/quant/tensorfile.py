"""Read single tensors, or some of their rows, out of a safetensors file by plain reads.

Mapping the file would be simpler, but mapped pages count as the process's own (RssFile) for as long as
any tensor points at them, and a private mapping counts against RLIMIT_DATA. A read fills exactly one
fresh tensor. The file is a little-endian u64 with the header's length, a JSON header with dtype, shape
and byte range of every tensor, and the bytes (https://github.com/huggingface/safetensors, "Format").
The header is not trusted: ranges must lie in the file, fit shape and dtype, and not overlap.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hizoo_lite.base import UserError

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

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
        """Read and check the header. Raises `UserError`, naming the file, where it is not sound."""
        self.path = path
        self.entries = _read_header(path)

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
            raise _unreadable(self.path, error) from error
        return tensor


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read: {error.strerror or error}")


def _read_header(path: Path) -> dict[str, Entry]:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise UserError(
                    f"{path}: not a safetensors file, or truncated: {size} bytes, its header claims {length}"
                )
            text = file.read(length)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:
        raise UserError(f"{path}: the safetensors header is not sound JSON: {error}") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: the safetensors header is not a JSON object")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, fields, 8 + length) for name, fields in header.items()}
    _check_ranges(path, entries, size)
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _entry(path: Path, name: str, fields: Any, data_start: int) -> Entry:
    try:
        dtype_name, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: tensor {name}: dtype, shape and data_offsets wanted, got {fields}"
        ) from error
    if any(type(number) is not int or number < 0 for number in numbers):
        raise UserError(
            f"{path}: tensor {name}: shape {shape} and offsets {[begin, end]} must be integers >= 0"
        )
    dtype = _DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise UserError(f"{path}: tensor {name}: dtype {dtype_name!r}; allowed are {', '.join(_DTYPES)}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise UserError(
            f"{path}: tensor {name}: {dtype_name} {shape} takes {math.prod(shape) * dtype.itemsize} bytes, "
            f"its offsets give {end - begin}"
        )
    return Entry(dtype, tuple(shape), data_start + begin, end - begin)


def _check_ranges(path: Path, entries: dict[str, Entry], size: int) -> None:
    ordered = sorted((entry.offset, entry.nbytes, name) for name, entry in entries.items() if entry.nbytes)
    free = 0
    for offset, nbytes, name in ordered:
        if offset < free:
            raise UserError(f"{path}: tensor {name} overlaps another one")
        free = offset + nbytes
    if free > size:
        raise UserError(f"{path}: truncated: {size} bytes, its header claims {free}")
