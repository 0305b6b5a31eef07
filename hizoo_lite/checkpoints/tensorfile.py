"""safetensors files with numpy and the standard library alone: the header's checks, small files as a whole.

The file is a little-endian u64 with the header's length, a JSON header with dtype, shape and byte range of
every tensor, and the bytes (https://github.com/huggingface/safetensors, "Format"). Adapters and curvature are
read and written here, so that a run beside onnxruntime needs no other library; weights of models are read by
`checkpoints/tensors.py`, with the same checks.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from hizoo_lite.errors import UserError
from hizoo_lite.files import parse_json

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_ALIGNMENT = 8
_MOST_DIMENSIONS, _MOST_VALUES = 32, 1 << 63  # what numpy and torch can say of an array

_DTYPES = {
    name: np.dtype(code)
    for name, code in {
        "F64": "<f8",
        "F32": "<f4",
        "F16": "<f2",
        "I64": "<i8",
        "I32": "<i4",
        "I16": "<i2",
        "I8": "i1",
        "U8": "u1",
        "BOOL": "?",
    }.items()
}
_FLOATS = {"BF16": np.dtype("<u2"), **{name: _DTYPES[name] for name in ("F32", "F16", "F64")}}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
#: Bytes of a value, of every dtype that any file here may have.
SIZES = {**{name: dtype.itemsize for name, dtype in _DTYPES.items()}, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


class Entry(NamedTuple):
    """Where a tensor lies in its file."""

    dtype: str  # the format's name, such as "F32"
    shape: tuple[int, ...]
    offset: int  # of its first byte, from the file's start
    nbytes: int


def load(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file, fresh. `UserError` if it is missing or not valid; bfloat16 is refused."""
    return _load(path, _DTYPES)


def load_floats(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file as float32. `UserError` if it is missing or not valid, or one is no float."""
    found = _load(path, _FLOATS)
    return {
        name: (value.astype("<u4") << 16).view("<f4")  # bfloat16 is the upper half of a float32
        if value.dtype == _FLOATS["BF16"]
        else value.astype(np.float32)
        for name, value in found.items()
    }


def _load(path: Path, dtypes: Mapping[str, np.dtype[Any]]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    entries = read_header(path, {name: dtype.itemsize for name, dtype in dtypes.items()})
    with reading(path) as file:
        for name, entry in entries.items():
            file.seek(entry.offset)
            value = np.frombuffer(bytearray(file.read(entry.nbytes)), dtype=dtypes[entry.dtype])
            found[name] = value.reshape(entry.shape)
    return found


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """The open file; a failure to read it is a `UserError` that names it."""
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def save(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file as a whole: whoever reads it finds the old one or the new one."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    values = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    begin = 0
    for name, value in values.items():
        stored = _NAMES[value.dtype]
        header[name] = {
            "dtype": stored,
            "shape": list(value.shape),
            "data_offsets": [begin, begin + value.nbytes],
        }
        begin += value.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in values.values():
            file.write(value.tobytes())
    os.replace(temporary, path)


def equal(first: Path, second: Path) -> bool:
    """Whether two files hold the same tensors, bit for bit; their metadata may differ."""
    a, b = (read_header(path, SIZES) for path in (first, second))
    if {n: (e.dtype, e.shape) for n, e in a.items()} != {n: (e.dtype, e.shape) for n, e in b.items()}:
        return False
    with open(first, "rb") as one, open(second, "rb") as other:
        return all(
            _bytes(one, entry.offset, entry.nbytes) == _bytes(other, b[name].offset, entry.nbytes)
            for name, entry in a.items()
        )


def _bytes(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    return file.read(count)


def read_header(path: Path, sizes: Mapping[str, int]) -> dict[str, Entry]:
    """The tensors of a file by name. `sizes`: bytes of a value of each dtype that is allowed.

    The header is not trusted: ranges must lie in the file, fit shape and dtype, and not overlap. Raises
    `UserError`, naming the file, if it is not valid.
    """
    with reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise UserError(
                f"{path}: not a safetensors file, or truncated: {size} bytes, its header claims {length}"
            )
        text = file.read(length)
    try:
        header = parse_json(text, object_pairs_hook=_unique)
    except ValueError as error:
        raise UserError(f"{path}: the safetensors header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: the safetensors header is not a JSON object")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, fields, 8 + length, sizes) for name, fields in header.items()}
    _check_ranges(path, entries, size)
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _entry(path: Path, name: str, fields: Any, data_start: int, sizes: Mapping[str, int]) -> Entry:
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
    count = math.prod(max(n, 1) for n in shape)
    if len(shape) > _MOST_DIMENSIONS or max(count, end) >= _MOST_VALUES:
        raise UserError(f"{path}: tensor {name}: no tensor has shape {shape!s:.80} at {[begin, end]!s:.80}")
    size = sizes.get(dtype_name) if isinstance(dtype_name, str) else None
    if size is None:
        raise UserError(f"{path}: tensor {name}: dtype {dtype_name!r}; allowed are {', '.join(sizes)}")
    if end - begin != math.prod(shape) * size:
        raise UserError(
            f"{path}: tensor {name}: {dtype_name} {shape} takes {math.prod(shape) * size} bytes, "
            f"its offsets give {end - begin}"
        )
    return Entry(dtype_name, tuple(shape), data_start + begin, end - begin)


def _check_ranges(path: Path, entries: dict[str, Entry], size: int) -> None:
    ordered = sorted((entry.offset, entry.nbytes, name) for name, entry in entries.items() if entry.nbytes)
    free = 0
    for offset, nbytes, name in ordered:
        if offset < free:
            raise UserError(f"{path}: tensor {name} overlaps another one")
        free = offset + nbytes
    if free > size:
        raise UserError(f"{path}: truncated: {size} bytes, its header claims {free}")
