"""An .onnx_adapter: written as a whole, and loaded if it is of the export's base. Needs no torch.

The file itself says nothing of its base. What lies beside it does: run.json in the folder of a run on a
device, and export.json of the export that it is named in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from hizoo_lite.edge.folder import RECORD, RUN_ADAPTER, Base, Export, is_export, made_for, read_record
from hizoo_lite.errors import StorageError, UserError
from hizoo_lite.files import storage_errors, sync_file, temporary_path
from hizoo_lite.train import identity

_RUN = "run.json"
_LORA = re.compile(r"(.*)\.lora_([AB])")
_VERSION = 1  # of adapters, and of the models that they are for


def runtime() -> Any:
    """The onnxruntime module. UserError if it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("onnxruntime is not installed; run: pip install onnxruntime") from error
    return onnxruntime


def save_adapter(path: Path, values: Mapping[str, np.ndarray]) -> None:
    """Write an .onnx_adapter as a whole. values: by input of model.onnx, float32.

    Raises `StorageError` naming the file, with nothing of it left and what was there before kept.
    """
    ort, beside = runtime(), temporary_path(path)
    whole = {name: np.ascontiguousarray(value) for name, value in values.items()}  # OrtValues only borrow
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(_VERSION)
    adapter.set_model_version(_VERSION)
    adapter.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(v) for name, v in whole.items()})
    try:
        with storage_errors(path):
            adapter.export_adapter(str(beside))
            sync_file(beside)
            ort.AdapterFormat.read_adapter(str(beside))  # which sees that it is whole
            beside.replace(path)
    except StorageError:
        raise
    except RuntimeError as error:  # all that onnxruntime says; "FILE:LINE SIGNATURE Failed to ..." in C++
        reason = str(error)[max(str(error).find("Failed"), 0) :].strip()
        raise StorageError(f"{path}: cannot be written: {reason:.300}") from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def load_adapter(export: Export, path: Path) -> Any:
    """The `LoraAdapter` in a file.

    Raises `UserError`, naming file and tensor, if it is damaged, of another base or does not fit.
    """
    base = None if path.is_relative_to(export.path) else base_of(path)
    if base is not None and base.fingerprint != export.base.fingerprint:
        raise UserError(
            f"--adapter: {path} is of {base}; the export in {export.path} is of {export.base}, which is "
            "another model"
        )
    try:
        read = runtime().AdapterFormat.read_adapter(str(path))
        values = sorted(read.get_parameters().items())
        found = {name: (value.data_type(), value.shape()) for name, value in values}
        loaded = runtime().LoraAdapter()
        loaded.Load(str(path))
    except Exception as error:  # onnxruntime's own classes have no public common base
        raise UserError(f"{path}: not an adapter of onnxruntime, or truncated ({error!s:.300})") from error
    for name, (dtype, _) in found.items():
        if dtype != "tensor(float)":
            raise UserError(f"{path}: {name} is {dtype}, the exported base wants tensor(float)")
    _check_fits(export, path, {name: tuple(shape) for name, (_, shape) in found.items()})
    return loaded


def base_of(path: Path) -> Base | None:
    """What an .onnx_adapter was made for; None if nothing beside it says so."""
    path = path.resolve()
    folder = path.parent
    if path.name == RUN_ADAPTER and (folder / _RUN).is_file():
        made_of = identity.read(folder / _RUN)
        return Base(made_of["base"], made_of["base_fingerprint"]) if "base_fingerprint" in made_of else None
    for above in (folder, folder.parent):
        if is_export(above):
            record = read_record(above / RECORD)
            if path.relative_to(above).as_posix() in _named(record):
                return made_for(above / RECORD, record)
    return None


def _named(record: Mapping[str, Any]) -> list[Any]:
    """The adapters' files that an export.json, which may be of any form, names."""
    adapters = record["adapters"]
    entries = adapters.values() if isinstance(adapters, dict) else ()
    return [entry.get("file") for entry in entries if isinstance(entry, dict)]


def _check_fits(export: Export, path: Path, found: Mapping[str, tuple[int, ...]]) -> None:
    """UserError naming the tensor that the exported base has no input for, or one of another shape."""
    lora, head = export.adapter_inputs
    for name, shape in found.items():
        match = _LORA.fullmatch(name)
        if match is None or match[1] not in lora:
            if name not in head:
                raise UserError(f"{path}: {name}: the exported base has no input for it")
            _check_shape(path, name, shape, head[name])
            continue
        other = f"{match[1]}.lora_{'B' if match[2] == 'A' else 'A'}"
        if other not in found:
            raise UserError(f"{path}: has {name} without {other}")
        rank = found[f"{match[1]}.lora_A"][-1:]  # any, but that of both
        columns, rows = lora[match[1]]
        _check_shape(path, name, shape, (columns, *rank) if match[2] == "A" else (*rank, rows))


def _check_shape(path: Path, name: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if got != wanted:
        raise UserError(f"{path}: {name} has shape {got}, the exported base wants {wanted}")
