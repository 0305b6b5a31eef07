"""Safetensors files as far as an export needs them without torch: adapters, and what tells models apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hizoo_lite.checkpoints import tensorfile
from hizoo_lite.errors import UserError
from hizoo_lite.files import is_inside, parse_json

_FLOATS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "F64": np.dtype("<f8")}
_INDEX_FILE, _SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
_SAMPLE_BYTES = 1024  # of a tensor's beginning


def read_floats(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a small file as float32. UserError, naming the file, where one is no float."""
    import safetensors  # evaluation on a device goes without

    try:
        entries = safetensors.deserialize(path.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    return {name: _float32(path, name, entry) for name, entry in entries}


def _float32(path: Path, name: str, entry: Mapping[str, Any]) -> np.ndarray:
    kind, shape = entry["dtype"], entry["shape"]
    if kind == "BF16":  # the upper half of a float32
        halves = np.frombuffer(entry["data"], dtype="<u2").astype("<u4")
        return (halves << 16).view("<f4").reshape(shape)
    if kind not in _FLOATS:
        raise UserError(f"{path}: tensor {name} is {kind}, allowed are BF16, {', '.join(_FLOATS)}")
    return np.frombuffer(entry["data"], dtype=_FLOATS[kind]).astype(np.float32).reshape(shape)


def fingerprint(folder: Path) -> str:
    """What tells a model from another: SHA-256 of every tensor's name, dtype, shape and first bytes.

    Independent of how the tensors lie in files. Seconds even for the largest models. UserError, naming the
    file, where one is missing or not valid.
    """
    samples: dict[str, bytes] = {}
    for path in weight_files(folder):
        samples.update(_samples(path))
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(name.encode() + b"\0" + samples[name])
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, which need not be there. UserError where its index is not valid."""
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


def _samples(path: Path) -> dict[str, bytes]:
    found = {}
    entries = tensorfile.read_header(path, tensorfile.SIZES)
    try:
        with path.open("rb") as file:
            for name, entry in entries.items():
                file.seek(entry.offset)
                form = json.dumps([entry.dtype, entry.shape]).encode()
                found[name] = form + file.read(min(_SAMPLE_BYTES, entry.nbytes))
    except OSError as error:
        raise tensorfile.unreadable(path, error) from error
    return found
