"""A Hugging Face model folder: its config.json and its tensors, read one at a time.

Whatever is read is a fresh tensor; no file stays mapped and no copy of the model is held.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import torch
from torch import Tensor

from hizoo_lite.base import Bits, UserError
from hizoo_lite.quant import hub
from hizoo_lite.quant.tensorfile import Entry, TensorFile


class Checkpoint:
    """Names, shapes and bytes of a model's tensors. Made by `Checkpoint.open`."""

    def __init__(self, folder: Path, config: dict[str, Any], files: dict[str, TensorFile]) -> None:
        self.folder = folder
        self.config = config
        self._files = files  # by tensor name

    @classmethod
    def open(cls, source: str | Path, *, revision: str | None = None) -> Checkpoint:
        """Open a local folder or a Hub id (downloaded first, `revision` a branch, tag or commit).

        Raises `UserError`, naming the file, where config.json or weights are missing, where only pickled
        weights are there, and where a file is truncated or malformed.
        """
        folder = hub.resolve(source, revision)
        config = _read_json(folder / "config.json")
        if (folder / hub.INDEX_FILE).exists():
            files = _indexed_files(folder)
        elif (folder / hub.SINGLE_FILE).exists():
            file = TensorFile(folder / hub.SINGLE_FILE)
            files = dict.fromkeys(file.entries, file)
        else:
            raise UserError(_no_weights(folder))
        return cls(folder, config, files)

    def names(self) -> list[str]:
        """The tensors' names."""
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

    @property
    def quantized_bits(self) -> Bits | None:
        """How bitsandbytes has quantized this checkpoint; None where it is in 16 or 32 bits.

        Raises `UserError` for other quantization methods, naming them.
        """
        quantization = self.config.get("quantization_config")
        if not quantization:
            return None
        method = str(quantization.get("quant_method", "bitsandbytes"))
        where = f"{self.folder / 'config.json'}: quantization_config"
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing; a Hugging Face model folder is wanted") from error
    except ValueError as error:
        raise UserError(f"{path}: not sound JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object wanted, got {type(content).__name__}")
    return content


def _indexed_files(folder: Path) -> dict[str, TensorFile]:
    index = folder / hub.INDEX_FILE
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: weight_map: an object of tensor name -> file wanted, got {names!r}")
    shards = {shard: _shard(folder, index, shard) for shard in dict.fromkeys(names.values())}
    for name, shard in names.items():
        if name not in shards[shard].entries:
            raise UserError(f"{index}: tensor {name} is not in {shard}")
    return {name: shards[shard] for name, shard in names.items()}


def _shard(folder: Path, index: Path, shard: Any) -> TensorFile:
    relative = PurePosixPath(str(shard))
    inside = isinstance(shard, str) and not relative.is_absolute() and ".." not in relative.parts
    if not inside or "\\" in shard or ":" in shard or relative.suffix != ".safetensors":
        raise UserError(
            f"{index}: weight_map names {shard!r}; a .safetensors file inside the folder is wanted"
        )
    path = folder / relative
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
