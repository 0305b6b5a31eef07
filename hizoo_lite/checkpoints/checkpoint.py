"""A Hugging Face model folder: its config.json and its tensors, read one at a time.

Whatever is read is a fresh tensor; no file stays mapped and no copy of the model is held.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from hizoo_lite.base import Bits
from hizoo_lite.checkpoints import hub
from hizoo_lite.checkpoints.fingerprint import sha256_of
from hizoo_lite.checkpoints.tensors import Entry, TensorFile
from hizoo_lite.checkpoints.writer import HASHED_CHUNK_BYTES, named_errors
from hizoo_lite.errors import UserError
from hizoo_lite.files import is_inside, read_json

_log = logging.getLogger(__name__)

_SHA256 = re.compile(r"[0-9a-f]{64}")
_HASHING_THREADS = 2  # hashlib gives the interpreter's lock up; more would only compete for the disk


class Place(NamedTuple):
    """Where the bytes of a tensor lie."""

    path: Path
    offset: int
    nbytes: int


class Checkpoint:
    """Names, shapes and bytes of a model's tensors. Made by `Checkpoint.open`."""

    #: Where what is read lies.
    device = torch.device("cpu")

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        files: dict[str, TensorFile],
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.config = config
        self.metadata: Mapping[str, Any] = metadata or {}  # of the index; empty if there is none
        self._files = files  # by tensor name

    @classmethod
    def open(cls, source: str | Path, *, revision: str | None = None) -> Checkpoint:
        """Open a local folder or a Hub id (downloaded first, `revision` a branch, tag or commit).

        Raises `UserError`, naming the file, if config.json or weights are missing, if only pickled
        weights are there, and if a file is truncated or malformed. Of a single file and an index beside
        it, the file is read, as transformers does.
        """
        folder = hub.resolve(source, revision)
        config = _read_json(folder / "config.json")
        metadata = None
        if (folder / hub.SINGLE_FILE).exists():
            file = TensorFile(folder / hub.SINGLE_FILE)
            files = dict.fromkeys(file.entries, file)
            if (folder / hub.INDEX_FILE).exists():
                _log.warning(
                    "%s: has %s and %s; the first is read, as transformers does, and the shards are not",
                    *(folder, hub.SINGLE_FILE, hub.INDEX_FILE),
                )
        elif (folder / hub.INDEX_FILE).exists():
            index = _read_json(folder / hub.INDEX_FILE)
            files = _indexed_files(folder, index)
            metadata = index.get("metadata")
        else:
            raise UserError(_no_weights(folder))
        return cls(folder, config, files, metadata if isinstance(metadata, dict) else None)

    def names(self) -> list[str]:
        return list(self._files)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's stored dtype."""
        return self._entry(name).dtype

    def nbytes(self, name: str) -> int:
        """A tensor's stored size."""
        return self._entry(name).nbytes

    def read(self, name: str) -> Tensor:
        """The tensor, fresh, on CPU, in its stored dtype. Raises KeyError for an unknown name."""
        return self._files[name].read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start .. stop of the tensor's first dimension, like `read`. Raises ValueError outside."""
        return self._files[name].read_rows(name, start, stop)

    def place(self, name: str) -> Place:
        """The file that holds a tensor, and where in it. Raises KeyError for an unknown name."""
        entry = self._entry(name)
        return Place(self._files[name].path, entry.offset, entry.nbytes)

    def files(self) -> list[Path]:
        """The files that hold the tensors, each once."""
        return list(dict.fromkeys(file.path for file in self._files.values()))

    def checksums(self) -> dict[Path, tuple[str, str]]:
        """The files whose SHA-256 is recorded: path -> (hex digits, where it is recorded).

        Recorded in the index (`hizoo-lite quantize` does that), or as a blob's name in the Hub's cache.
        """
        recorded = self.metadata.get("sha256")
        found = {}
        for path in self.files():
            name = path.relative_to(self.folder).as_posix()
            wanted = recorded.get(name) if isinstance(recorded, dict) else None
            blob = path.resolve()
            if isinstance(wanted, str) and _SHA256.fullmatch(wanted):
                found[path] = (wanted, f"recorded in {hub.INDEX_FILE}")
            elif blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
                found[path] = (blob.name, "that names it in the Hub's cache")
        return found

    def verify(self, progress: Callable[[int], None] | None = None) -> int:
        """Compare every file that has a recorded checksum with it; how many bytes those files have.

        progress: called with the number of bytes that were read since the last call, one call at a time.
        Raises `UserError`, naming the file, for the first one that differs.
        """
        lock, cancelled = threading.Lock(), threading.Event()
        buffers = [bytearray(HASHED_CHUNK_BYTES) for _ in range(_HASHING_THREADS)]

        def advanced(count: int) -> None:
            if cancelled.is_set():
                raise _Cancelled
            if progress is not None:
                with lock:
                    progress(count)

        def check(path: Path, wanted: str, recorded: str) -> None:
            buffer = buffers.pop()
            try:
                with named_errors(path, "read"):
                    if not cancelled.is_set() and sha256_of(path, buffer, advanced) != wanted:
                        raise UserError(_damaged(path, self.folder, recorded))
            except _Cancelled:
                return
            except BaseException:
                cancelled.set()
                raise
            finally:
                buffers.append(buffer)

        checksums = self.checksums()
        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            jobs = [pool.submit(check, path, *wanted) for path, wanted in checksums.items()]
            try:
                for job in jobs:
                    job.result()
            finally:
                cancelled.set()  # where the caller is interrupted too
        return sum(path.stat().st_size for path in checksums)

    @cached_property
    def quantized_bits(self) -> Bits | None:
        """How bitsandbytes has quantized this checkpoint; None if it is in 16 or 32 bits.

        Its tensors say so: models that were merged by hand often keep the config.json of the quantized base,
        which is logged. Raises `UserError` for other quantization methods, naming them.
        """
        named, stored = self._named_bits(), self._stored_bits()
        if named != stored:
            _log.warning(
                "%s: quantization_config says %s, but the tensors are %s; the tensors count",
                *(self.folder / "config.json", named or "nothing", stored or "in 16 or 32 bits"),
            )
        return stored

    def _stored_bits(self) -> Bits | None:
        """By the names of what bitsandbytes keeps beside a weight."""
        marks: dict[Bits, str] = {"int8": ".SCB", "nf4": "bitsandbytes__nf4", "fp4": "bitsandbytes__fp4"}
        found = [bits for bits, mark in marks.items() if any(name.endswith(mark) for name in self)]
        if len(found) > 1:
            raise UserError(
                f"{self.folder}: its tensors are quantized in several ways: {', '.join(found)}; one is wanted"
            )
        return found[0] if found else None

    def _named_bits(self) -> Bits | None:
        """What config.json says. Raises `UserError` for other methods than bitsandbytes."""
        quantization = self.config.get("quantization_config")
        if not quantization:
            return None
        where = f"{self.folder / 'config.json'}: quantization_config"
        if not isinstance(quantization, dict):
            raise UserError(f"{where}: an object wanted, got {quantization!r:.80}")
        method = str(quantization.get("quant_method", "bitsandbytes"))
        if method != "bitsandbytes":
            raise UserError(
                f"{where}: quant_method {method!r} is not supported; allowed are bitsandbytes and "
                "checkpoints in 16 or 32 bits"
            )
        if quantization.get("load_in_8bit"):
            return "int8"
        kind = quantization.get("bnb_4bit_quant_type", "fp4")
        if not quantization.get("load_in_4bit") or kind not in get_args(Bits):
            raise UserError(f"{where}: load_in_4bit (nf4 or fp4) or load_in_8bit wanted, got {quantization}")
        return kind

    def _entry(self, name: str) -> Entry:
        return self._files[name].entries[name]


class _Cancelled(Exception):
    """Another file differs already."""


def _damaged(path: Path, folder: Path, recorded: str) -> str:
    remedy = "quantize again or restore it" if "index" in recorded else "remove it and download it again"
    return (
        f"{path.relative_to(folder)}: its sha256 is not the one {recorded}: the file was changed or damaged; "
        f"{remedy} ({folder})"
    )


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, "a JSON object, in the folder of a Hugging Face model")


def _indexed_files(folder: Path, content: Mapping[str, Any]) -> dict[str, TensorFile]:
    index = folder / hub.INDEX_FILE
    names = content.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: weight_map: an object of tensor name -> file wanted, got {names!r}")
    for shard in names.values():
        if not is_inside(shard) or not shard.endswith(".safetensors"):
            raise UserError(
                f"{index}: weight_map names {shard!r}; a .safetensors file inside the folder is wanted"
            )
    shards = {shard: _shard(folder, index, shard) for shard in dict.fromkeys(names.values())}
    for name, shard in names.items():
        if name not in shards[shard].entries:
            raise UserError(f"{index}: tensor {name} is not in {shard}")
    return {name: shards[shard] for name, shard in names.items()}


def _shard(folder: Path, index: Path, shard: str) -> TensorFile:
    path = folder / shard
    if not path.is_file():
        raise UserError(f"{index}: names {shard}, which is missing")
    return TensorFile(path)


def _no_weights(folder: Path) -> str:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        return (
            f"{folder}: has only pickled weights ({', '.join(pickled[:3])}), which can run code and are "
            "never read; convert them to safetensors"
        )
    return f"{folder}: neither {hub.SINGLE_FILE} nor {hub.INDEX_FILE} is there"
