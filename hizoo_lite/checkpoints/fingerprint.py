"""What tells files and models apart: SHA-256 of whole files, of samples, of tensors wherever they lie.

All in hex digits. They are written into run.json, exports and checkpoints, so what they are of never changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from hizoo_lite.checkpoints import tensorfile
from hizoo_lite.errors import UserError
from hizoo_lite.files import is_inside, parse_json

_INDEX_FILE, _SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
#: Of a tensor's beginning, in `of_model`.
_FIRST_BYTES = 1024
#: Up to here a file is looked at as a whole, and a model's weights together.
WHOLE_BYTES = 64 << 20
#: A larger file is looked at in so many places; all tensors of larger weights together in so many.
_SAMPLES, _TENSOR_SAMPLES = 256, 1 << 14
_FEWEST_SAMPLES = 2  # of a tensor: its beginning and its end
_SAMPLE_BYTES = 4096


def sha256_of(
    path: Path, buffer: bytearray | None = None, advanced: Callable[[int], None] | None = None
) -> str:
    """Of a whole file, read into `buffer` if one is given. OSError if it cannot be read.

    advanced: told how many more bytes were read.
    """
    with open(path, "rb", buffering=0) as file:
        if buffer is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        found, view = hashlib.sha256(), memoryview(buffer)
        while count := file.readinto(view):
            found.update(view[:count])
            if advanced is not None:
                advanced(count)
    return found.hexdigest()


def of_files(paths: Iterable[Path]) -> str:
    """Of files' names, sizes and contents, large ones by samples."""
    digest = hashlib.sha256()
    for path in sorted(set(paths)):
        if path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}\0".encode())
            with path.open("rb") as file:
                for piece in pieces(file, 0, size, WHOLE_BYTES, _SAMPLES):
                    digest.update(piece)
    return digest.hexdigest()


def of_model(folder: Path) -> str:
    """Of every tensor's name, dtype, shape and first bytes; how the tensors lie in files does not count.

    Seconds even for the largest models. UserError, naming the file, if one is missing or not valid.
    """
    samples: dict[str, bytes] = {}
    for path, header in _headers(weight_files(folder)).items():
        with tensorfile.reading(path) as file:
            for name, entry in header.items():
                file.seek(entry.offset)
                form = json.dumps([entry.dtype, entry.shape]).encode()
                samples[name] = form + file.read(min(_FIRST_BYTES, entry.nbytes))
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(name.encode() + b"\0" + samples[name])
    return digest.hexdigest()


def of_weights(files: Sequence[Path]) -> str:
    """Of every tensor's name, dtype, shape and bytes; how the tensors lie in files does not count.

    Every byte of up to 64 MiB of weights; of larger ones 4 KiB at 16384 places, the same number in every
    tensor and at least two: 64 MiB of a model of 70 billion parameters. UserError, naming the file, if one
    is not valid.
    """
    headers = _headers(files)
    entries = [entry for header in headers.values() for entry in header.values()]
    whole = sum(entry.nbytes for entry in entries) <= WHOLE_BYTES
    count = max(_FEWEST_SAMPLES, _TENSOR_SAMPLES // max(1, len(entries)))
    hashes = {}
    for path, header in headers.items():
        with tensorfile.reading(path) as file:
            for name, entry in header.items():
                digest = hashlib.sha256(f"{entry.dtype} {entry.shape}\0".encode())
                limit = entry.nbytes if whole else count * _SAMPLE_BYTES
                for piece in pieces(file, entry.offset, entry.nbytes, limit, count):
                    digest.update(piece)
                hashes[name] = digest.hexdigest()
    return hashlib.sha256(repr(sorted(hashes.items())).encode()).hexdigest()


def _headers(files: Sequence[Path]) -> dict[Path, dict[str, tensorfile.Entry]]:
    return {path: tensorfile.read_header(path, tensorfile.SIZES) for path in files}


def pieces(
    file: BinaryIO, offset: int, size: int, limit: int, count: int, piece_bytes: int = _SAMPLE_BYTES
) -> Iterator[bytes]:
    """What is looked at of `size` bytes: all of them up to `limit`, otherwise `count` pieces, evenly."""
    if size <= limit:
        file.seek(offset)
        yield file.read(size)
        return
    for number in range(count):
        file.seek(offset + number * max(0, size - piece_bytes) // (count - 1))
        yield file.read(piece_bytes)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, which need not be there. UserError if its index is not valid."""
    index, single = folder / _INDEX_FILE, folder / _SINGLE_FILE
    if single.is_file() or not index.is_file():  # of both, transformers reads the single one
        return [single]
    try:
        shards = set(parse_json(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: not a valid index: {error}") from error
    if not all(map(is_inside, shards)):
        raise UserError(f"{index}: weight_map: a file outside of the folder is named")
    return [folder / name for name in sorted(shards)]
