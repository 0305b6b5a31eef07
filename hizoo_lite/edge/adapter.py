"""From a PEFT adapter to an .onnx_adapter beside an exported base. Needs numpy, onnxruntime and safetensors.

A (rank, in) becomes the input A' (in, rank), B (out, rank) becomes B' (rank, out) times alpha / rank, so that
the graph computes x A' B' and nothing else. Layers that the adapter does not touch keep the base's default
of rank 0. A tuned head goes along in full.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hizoo_lite.checkpoints import tensorfile
from hizoo_lite.checkpoints.adapter import (
    PEFT_PREFIX,
    PEFT_WEIGHTS,
    SPACE_FILE,
    find_adapter,
    read_peft_config,
    scaling,
)
from hizoo_lite.checkpoints.fingerprint import of_model
from hizoo_lite.edge.folder import ADAPTER_SUFFIX, ADAPTERS, RECORD, Export, describe
from hizoo_lite.edge.onnx_adapter import save_adapter
from hizoo_lite.errors import StorageError, UserError
from hizoo_lite.files import parse_toml, storage_errors

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LORA = re.compile(r"(.*)\.lora_([AB])\.weight")


class Converted(NamedTuple):
    """An adapter as the graph takes it."""

    values: dict[str, np.ndarray]  # by input, float32
    rank: int


def convert(export: Export, source: Path | str) -> Converted:
    """The adapter of a run, or a PEFT folder.

    Raises `UserError` if it was made for another base, or does not fit this one.
    """
    folder = find_adapter(source)
    if (folder / SPACE_FILE).is_file():
        raise UserError(f"{source}: space: its weights were tuned, it is no adapter; export it as a model")
    config = read_peft_config(folder)
    check_base(export, Path(source), config)
    return Converted(graph_values(export, folder, config), int(config["r"]))


def add_adapter(
    export: Export, source: Path | str, name: str, *, overwrite: bool = False
) -> dict[str, Any] | None:
    """Write the adapter of a run (or a PEFT folder) to the export, and name it in export.json.

    Rewrites nothing else. overwrite: the name may be taken already. Then what export.json said of that
    adapter is returned, and its file is still there: see `remove_adapter` and `remove_file`. Raises
    `UserError` if the name is taken or not allowed, if the adapter was made for another base, or does not
    fit this one.
    """
    converted = convert(export, source)
    check_name(name)
    for known in export.adapters:
        if name.casefold() == known.casefold() and not (overwrite and name == known):
            # one file, where disks take both for the same name
            raise UserError(
                f"--name: {known!r} is in {export.path / RECORD} already; give another name"
                + (", or --overwrite" if name == known else "")
            )
    path = _free_file(export.path / ADAPTERS, name)
    with storage_errors(path):
        path.parent.mkdir(exist_ok=True)
    save_adapter(path, converted.values)
    before = export.record["adapters"].get(name)
    export.record["adapters"][name] = {
        "file": f"{ADAPTERS}/{path.name}",
        **describe(path),
        "source": str(source),
        "rank": converted.rank,
        "inputs": len(converted.values),
        "check": None,
    }
    try:
        export.write()
    except StorageError:
        _put_back(export, name, before)
        path.unlink()
        raise
    return before


def remove_adapter(export: Export, name: str, before: dict[str, Any] | None = None) -> None:
    """Take an adapter out of the export again; before: put what it replaced in its place."""
    about = export.record["adapters"][name]
    _put_back(export, name, before)
    export.write()
    remove_file(export, about)


def remove_file(export: Export, about: dict[str, Any]) -> None:
    """The file of an adapter that export.json does not name any more."""
    (export.path / about["file"]).unlink(missing_ok=True)


def _put_back(export: Export, name: str, before: dict[str, Any] | None) -> None:
    if before is None:
        del export.record["adapters"][name]
    else:
        export.record["adapters"][name] = before


def _free_file(folder: Path, name: str) -> Path:
    """One that is not there: what is replaced stays until the new one is named."""
    path, number = folder / f"{name}{ADAPTER_SUFFIX}", 1
    while path.exists():
        number += 1
        path = folder / f"{name}.{number}{ADAPTER_SUFFIX}"
    return path


def check_base(export: Export, source: Path, config: dict[str, Any]) -> None:
    """UserError if an adapter was made for another model, or for its weights in another form."""
    base, made_for = export.record["base"], str(config.get("base_model_name_or_path") or "")
    folder = Path(made_for)
    known = made_for != "" and (folder / "config.json").is_file()
    same = of_model(folder) == base["fingerprint"] if known else made_for == base["model"]
    if not same:
        raise UserError(
            f"{source}: base_model_name_or_path: got {made_for!r}; the export in {export.path} is of "
            f"{base['model']!r}, which is another model"
        )
    bits = _tuned_bits(source)
    if bits not in (None, export.record["bits"]):
        raise UserError(
            f"{source / 'config.toml'}: bits: got {bits!r}; the export in {export.path} has "
            f"{export.record['bits']!r}"
        )


def graph_values(export: Export, folder: Path, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The graph's inputs by name, float32, contiguous. UserError, naming tensor and shape, for others."""
    path = folder / PEFT_WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: no such file; a PEFT adapter folder holds {PEFT_WEIGHTS}")
    tensors = {name.removeprefix(PEFT_PREFIX): value for name, value in tensorfile.load_floats(path).items()}
    lora, head = export.adapter_inputs
    values: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        match = _LORA.fullmatch(name)
        if match is None:
            _check_shape(path, name, value.shape, head.get(name))
            values[name] = value
            continue
        layer, side = match[1], match[2]
        rank = int(config["r"])
        sizes = lora.get(layer)
        wanted = None if sizes is None else ((rank, sizes[0]) if side == "A" else (sizes[1], rank))
        _check_shape(path, name, value.shape, wanted)
        values[f"{layer}.lora_{side}"] = value.T if side == "A" else value.T * np.float32(scaling(config))
    for name in values:
        other = name[:-1] + ("B" if name.endswith("A") else "A")
        if name.endswith((".lora_A", ".lora_B")) and other not in values:
            raise UserError(f"{path}: has {name} without {other}")
    if not values:
        raise UserError(f"{path}: holds no tensors")
    return {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in values.items()}


def _check_shape(path: Path, name: str, got: tuple[int, ...], wanted: tuple[int, ...] | None) -> None:
    if wanted is None:
        raise UserError(f"{path}: {name}: the exported base has no input for it")
    if got != wanted:
        raise UserError(f"{path}: {name} has shape {got}, the exported base wants {wanted}")


def check_name(name: str) -> None:
    """UserError if an adapter cannot be called so: the name becomes a file's."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"--name: got {name!r}, which is the run folder's name if none is given; give --name with "
            "letters, digits, '.', '_' and '-'"
        )


def _tuned_bits(source: Path) -> str | None:
    """The bits that a run's config.toml names; None if it names none, or there is none."""
    path = source / "config.toml"
    if not path.is_file():
        return None
    try:
        return parse_toml(path.read_text(encoding="utf-8")).get("bits")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
