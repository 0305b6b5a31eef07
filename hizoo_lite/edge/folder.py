"""The folder of an export, and export.json, which says what is in it. Needs no torch.

export.json             written last and replaced as a whole: a folder without it is no export
model.onnx, model.onnx.data   the base
adapters/NAME.onnx_adapter    one file for each adapter
genai_config.json       of causal models, for onnxruntime-genai
tokenizer.json, ...     as the model has them
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, final, get_args

from hizoo_lite.base import ModelKind
from hizoo_lite.checkpoints.adapter import find_adapter
from hizoo_lite.checkpoints.fingerprint import sha256_of
from hizoo_lite.errors import UserError
from hizoo_lite.files import is_inside, read_json, storage_errors, write_text

FORMAT = 1
RECORD, GRAPH, WEIGHTS, ADAPTERS = "export.json", "model.onnx", "model.onnx.data", "adapters"
ADAPTER_SUFFIX = ".onnx_adapter"
RUN_ADAPTER = f"adapter{ADAPTER_SUFFIX}"  # in the folder of a run on a device
_FIELDS = {"format", "kind", "form", "bits", "products", "base", "tuned", "model", "adapters", "check"}


class Base(NamedTuple):
    """The model that something was made for; the fingerprint is that of `fingerprint.of_model`."""

    model: str
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.model!r} (fingerprint {self.fingerprint:.12})"


class AdapterInputs(NamedTuple):
    """What an adapter of a base may bring: layers that take A and B, and tensors of the head."""

    lora: Mapping[str, tuple[int, int]]  # layer -> (in_features, out_features)
    head: Mapping[str, tuple[int, ...]]  # input -> its shape


@final
class Export:
    """An export that is there. `record` is the content of export.json."""

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path, self.record = path, record

    @classmethod
    def open(cls, path: Path | str) -> Export:
        """Read export.json and see that the model's files are there as they were written.

        Adapters are looked at when they are asked for (`find_adapter`). Of the weights the size alone is
        compared: they may be gigabytes; `verify` reads them too. Raises `UserError`, naming file and field,
        if one is missing, truncated or changed.
        """
        export = cls(Path(path), read_record(Path(path) / RECORD))
        try:
            files = _files(export)
            for part in ("inputs", "outputs", "cache", "adapter_inputs", "adapters"):
                getattr(export, part)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            where = f"{export.path / RECORD}: not as export writes it"
            raise UserError(f"{where} ({type(error).__name__}: {error})") from error
        for key, (name, _) in files.items():
            _check_inside(export.path, key, name)
        for name, about in export.record["model"]["files"].items():
            _check_content(export.path / name, about, hashed=name != WEIGHTS)
        return export

    def verify(self) -> None:
        """Compare every file with its checksum, the weights too. UserError naming one that is damaged."""
        for name, about in _files(self).values():
            _check_content(self.path / name, about)

    @property
    def graph(self) -> Path:
        """The ONNX file."""
        return self.path / GRAPH

    @property
    def kind(self) -> ModelKind:
        """causal, masked or classifier."""
        return self.record["kind"]

    @property
    def base(self) -> Base:
        """The model that this is of. UserError if export.json does not say."""
        return made_for(self.path / RECORD, self.record)

    @property
    def inputs(self) -> list[str]:
        """The inputs that every run gives: tokens, and a causal model's caches."""
        return [given["name"] for given in self.record["model"]["inputs"]]

    @property
    def outputs(self) -> list[str]:
        """The outputs in order; the first are the logits."""
        return list(self.record["model"]["outputs"])

    @property
    def cache(self) -> list[tuple[int, int]]:
        """(heads, features of a head) of every layer's keys and values; empty without a cache."""
        return [(heads, features) for heads, features in self.record["model"]["cache"]]

    @property
    def adapter_inputs(self) -> AdapterInputs:
        """What an adapter may bring."""
        found = self.record["model"]["adapter_inputs"]
        lora = {name: (sizes[0], sizes[1]) for name, sizes in found["lora"].items()}
        return AdapterInputs(lora, {name: tuple(shape) for name, shape in found["head"].items()})

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters."""
        return list(self.record["adapters"])

    def find_adapter(self, adapter: str) -> Path:
        """Where an adapter is: the file of its name here, its own file, or that in the folder of an edge run.

        Without a file in it, the folder of a run or of PEFT, whose adapter `adapter.convert` takes.
        UserError if there is none, or if the file of a name is not as it was written.
        """
        if adapter in self.record["adapters"]:
            about = self.record["adapters"][adapter]
            _check_content(self.path / about["file"], about)
            return self.path / about["file"]
        given = Path(adapter)
        for path in (given, given / RUN_ADAPTER):
            if path.suffix == ADAPTER_SUFFIX and path.is_file():
                return path
        try:
            find_adapter(given)
        except UserError as error:
            known = ", ".join(self.adapters) or "none"
            raise UserError(
                f"--adapter: got {adapter!r}, allowed: an adapter of {self.path} ({known}), a file "
                f"*{ADAPTER_SUFFIX}, or the folder of a run or of a PEFT adapter"
            ) from error
        return given

    def write(self) -> None:
        """Replace export.json: a reader sees the old one or the new one. StorageError if that fails."""
        path = self.path / RECORD
        with storage_errors(path):
            write_text(path, json.dumps(self.record, indent=2, allow_nan=False) + "\n")


def is_export(path: Path) -> bool:
    """Whether the folder says that it is one."""
    return (path / RECORD).is_file()


def describe(path: Path) -> dict[str, Any]:
    """What export.json says of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _files(export: Export) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """The files that export.json names, by the key that does: (name, what it says of it)."""
    files = {f"model.files.{name}": (name, about) for name, about in export.record["model"]["files"].items()}
    for name, about in export.record["adapters"].items():
        if not isinstance(about["file"], str):
            raise TypeError(f"adapters.{name}.file: a text wanted")
        files[f"adapters.{name}.file"] = (about["file"], about)
    for key, (_, about) in files.items():
        if type(about["bytes"]) is not int or not isinstance(about.get("sha256", ""), str):
            raise TypeError(f"{key}: bytes, and sha256 as a text, wanted")
    return files


def _check_inside(folder: Path, key: str, name: str) -> None:
    """UserError naming a file that is outside of the folder."""
    path = folder / name
    if not is_inside(name) or not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder / RECORD}: {key}: {path} is outside of the folder")


def _check_content(path: Path, about: Mapping[str, Any], *, hashed: bool = True) -> None:
    """UserError naming a file that is missing or not as it was written."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; {RECORD} names it")
    size = path.stat().st_size
    if size != about["bytes"]:
        raise UserError(f"{path}: has {size} bytes, {about['bytes']} were written: truncated or changed")
    if hashed and "sha256" in about and sha256_of(path) != about["sha256"]:
        raise UserError(f"{path}: its sha256 is not the one in {RECORD}: changed or damaged")


def made_for(path: Path, record: Mapping[str, Any]) -> Base:
    """The model that an export.json, in the file `path`, says that it is of. UserError if it does not."""
    base = record["base"]
    if not isinstance(base, dict) or not isinstance(base.get("fingerprint"), str):
        raise UserError(f"{path}: base: not as export writes it, with model and fingerprint")
    return Base(str(base.get("model")), base["fingerprint"])


def read_record(path: Path) -> dict[str, Any]:
    """The content of an export.json. UserError, naming file and field, if it is none."""
    record = read_json(path, "a folder of: hizoo-lite export --to onnx")
    if record.get("format") != FORMAT:
        raise UserError(f"{path}: format: got {record.get('format')!r}, allowed: {FORMAT}")
    missing = sorted(_FIELDS - set(record))
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}")
    if record["kind"] not in get_args(ModelKind):
        known = ", ".join(get_args(ModelKind))
        raise UserError(f"{path}: kind: got {record['kind']!r}, allowed: {known}")
    return record
