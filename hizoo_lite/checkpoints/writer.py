"""Write safetensors files tensor by tensor, a few rows at a time, and never a half-written one.

The header is written first, from the declared dtypes and shapes; every tensor then has its place, so the
order of writing is free. A file is written beside its place, forced to disk and renamed: under its final name
there is a whole file or none. Tensors lie by falling size of their elements, then by name: the library maps
files and wants every tensor aligned without holes (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hizoo_lite.checkpoints.tensors import DTYPE_NAMES
from hizoo_lite.errors import UserError
from hizoo_lite.files import sync_folder, temporary_path, write_text

HASHED_CHUNK_BYTES = 8_000_000  # read at a time where a file is hashed


class Form(NamedTuple):
    """What a tensor is declared as before it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """One safetensors file in the making; a context manager.

    Leaving the context checks that exactly the declared bytes were written, forces them to disk, renames,
    and sets `sha256`, of the whole file. Leaving it with an exception removes what was written.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, Form], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Begin the file beside `path`. Raises `UserError`, naming it, if it cannot be written."""
        self.path = path
        self.sha256 = ""
        self._forms = dict(tensors)
        header, self._start = _header(self._forms, metadata)
        self._written = dict.fromkeys(self._forms, 0)
        self._hash, self._hashed = hashlib.sha256(), 0  # bytes from the start that are hashed already
        self.nbytes = file_bytes(self._forms, metadata)
        self._temporary = temporary_path(path)
        with named_errors(path):
            self._file = open(self._temporary, "w+b", buffering=0)  # noqa: SIM115 - closed by close
        try:
            self._put(memoryview(header), 0)
        except BaseException:
            self._abandon()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """The whole of a tensor, of the declared dtype and shape."""
        form = self._forms[name]
        if tuple(tensor.shape) != form.shape:
            raise ValueError(f"{name}: shape {form.shape} was declared, got {tuple(tensor.shape)}")
        self._append(name, tensor)

    def write_rows(self, name: str, rows: Tensor) -> None:
        """The next rows of a tensor, behind those written before."""
        form = self._forms[name]
        if tuple(rows.shape[1:]) != form.shape[1:]:
            raise ValueError(f"{name}: rows of {form.shape[1:]} were declared, got {tuple(rows.shape[1:])}")
        self._append(name, rows)

    def write_piece(self, name: str, flat: Tensor) -> None:
        """The next elements of a tensor in row-major order, as a vector."""
        self._append(name, flat)

    def close(self) -> None:
        """Finish the file. Raises ValueError, with the file removed, if tensors are not complete."""
        try:
            missing = [name for name, form in self._forms.items() if self._written[name] != form.nbytes]
            if missing:
                raise ValueError(f"{self.path}: {len(missing)} tensors are not complete: {missing[:3]}")
            with named_errors(self.path):
                os.fsync(self._file.fileno())
                self._hash_the_rest()
                self._file.close()
                os.replace(self._temporary, self.path)
                sync_folder(self.path.parent)
        except BaseException:
            self._abandon()
            raise
        self.sha256 = self._hash.hexdigest()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()

    def _append(self, name: str, tensor: Tensor) -> None:
        form, done = self._forms[name], self._written[name]
        if tensor.dtype != form.dtype:
            raise ValueError(f"{name}: {form.dtype} was declared, got {tensor.dtype}")
        nbytes = tensor.numel() * tensor.element_size()
        if done + nbytes > form.nbytes:
            raise ValueError(f"{name}: {form.nbytes} bytes were declared, got {done + nbytes}")
        if nbytes:
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            self._put(memoryview(flat.numpy().data), self._start[name] + done)
        self._written[name] = done + nbytes

    def _put(self, content: memoryview, offset: int) -> None:
        if offset == self._hashed:
            self._hash.update(content)
            self._hashed += len(content)
        with named_errors(self.path):
            _write_at(self._file, content, offset)

    def _hash_the_rest(self) -> None:
        """What was not written in the file's order is read back."""
        buffer = memoryview(bytearray(min(HASHED_CHUNK_BYTES, self.nbytes)))
        self._file.seek(self._hashed)
        while self._hashed < self.nbytes:
            count = self._file.readinto(buffer)
            if not count:
                raise OSError("it became shorter while it was written")
            self._hash.update(buffer[:count])
            self._hashed += count

    def _abandon(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()


def _write_at(file: io.FileIO, content: memoryview, offset: int) -> None:
    file.seek(offset)
    done = 0
    while done < len(content):  # one write moves at most 2 GiB
        done += file.write(content[done:])


def file_bytes(tensors: Mapping[str, Form], metadata: Mapping[str, str] | None = None) -> int:
    """The size of the file that `ShardWriter` makes of these tensors."""
    return len(_header(tensors, metadata)[0]) + sum(form.nbytes for form in tensors.values())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file as a whole. Raises `UserError`, naming it, if that fails."""
    with named_errors(path):
        write_text(path, json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def named_errors(path: Path, verb: str = "written") -> Iterator[None]:
    """Turn the system's errors (no space left, permission) into a `UserError` that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be {verb}: {error.strerror or error}") from error


def _header(tensors: Mapping[str, Form], metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int]]:
    """Length, JSON and padding; and where each tensor begins, from the file's start, in the file's order."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        form = tensors[name]
        offsets[name] = end
        end += form.nbytes
        fields[name] = {
            "dtype": DTYPE_NAMES[form.dtype],
            "shape": list(form.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}
