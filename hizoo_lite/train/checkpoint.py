"""Checkpoints: everything that a step reads and changes, so that a resumed run is bitwise the same.

`checkpoints/step-000100/` holds the state *after* 100 steps: what the space saves (`adapter/`),
`curvature.safetensors`, `optimizer.safetensors` and `head.safetensors` if these have a state, and
`state.json` with the step size's state, a checksum of every other file and one of itself. Noise and batches
need no state: they are functions of (seed, step), or are drawn anew by a secret estimator. A checkpoint is
written beside its place, forced to the disk and renamed: one that has its name is complete. One whose
checksums are wrong is passed over for an older one, and renamed once the run goes on from there.
`step-000000` of a space in memory is where `replay` begins.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hizoo_lite.base import AttachedSpace
from hizoo_lite.checkpoints import tensorfile
from hizoo_lite.checkpoints.fingerprint import sha256_of
from hizoo_lite.errors import UserError
from hizoo_lite.files import is_inside, parse_json, storage_errors, sync_file, sync_folder
from hizoo_lite.train.step import Stepper

_NAME = re.compile(r"step-(\d{6,})")
STATE = "state.json"
_CURVATURE = "curvature.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_HEAD = "head.safetensors"
_WEIGHTS = "weights.safetensors"
ADAPTER = "adapter"
#: Of state.json: 1, without the entries `format` and `checksum`, was written up to version 0.1.
_FORMAT = 2
_ENTRIES = {"step", "bad_steps", "step_size", "halvings", "library", "parameters", "files"}


class Position(NamedTuple):
    """Where a run stands."""

    step: int = 0  # steps taken; the next one has this number
    bad_steps: int = 0  # steps in a row, up to here, whose losses were not finite


def every(folder: Path) -> list[Path]:
    """The checkpoints in a `checkpoints` folder, the one with the most steps first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=steps_of, reverse=True)


def steps_of(path: Path) -> int:
    """The steps after which a checkpoint was made."""
    return int(path.name.removeprefix("step-"))


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is, or would be."""
    return folder / f"step-{step:06d}"


def newest(folder: Path) -> Path | None:
    """The checkpoint with the most steps, None if there is none."""
    return next(iter(every(folder)), None)


def newest_valid(folder: Path) -> tuple[Path | None, dict[Path, UserError]]:
    """The newest checkpoint whose files are as they were written, and what is wrong with those after it.

    Raises UserError if there are checkpoints and none is valid.
    """
    refused: dict[Path, UserError] = {}
    for path in every(folder):
        try:
            check(path)
        except UserError as error:
            refused[path] = error
        else:
            return path, refused
    if refused:
        raise UserError(
            "no checkpoint can be used:\n  "
            + "\n  ".join(map(str, refused.values()))
            + f"\nmove {folder} away: --resume then takes the steps of the journal again from the start, and "
            "computes those that it lacks"
        )
    return None, {}


def check(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint whose other files have the checksums that it names. Else UserError."""
    state = _state(path)
    for name, wanted in state["files"].items():
        try:
            found = sha256_of(path / name)
        except OSError as error:
            raise UserError(f"{path / name}: cannot be read: {error.strerror or error}") from error
        if found != wanted:
            raise UserError(f"{path / name}: is damaged: its checksum is not that of {path / STATE}")
    return state


def save(folder: Path, position: Position, stepper: Stepper, chunk_halvings: int = 0) -> Path:
    """Write the state after `position.step` steps; the checkpoint's path. One that exists is kept.

    chunk_halvings: of the chunks in which the run computes. `StorageError` if it cannot be written; then
    nothing of it is left.
    """
    path = path_of(folder, position.step)
    if path.exists():
        return path
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        temporary = folder / f".{path.name}.tmp"
        temporary.mkdir()
        try:
            _write(temporary, position, stepper, chunk_halvings)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # a full disk gets its room back
            raise
        os.replace(temporary, path)
        sync_folder(folder)
    return path


def _write(temporary: Path, position: Position, stepper: Stepper, chunk_halvings: int) -> None:
    """The files of a checkpoint, forced to the disk."""
    stepper.space.save(temporary / ADAPTER)
    _save_state(temporary / _CURVATURE, stepper.curvature.state_dict())
    if state := stepper.optimizer.state_dict():
        _save_state(temporary / _OPTIMIZER, state)
    if state := stepper.head.state_dict():
        _save_state(temporary / _HEAD, state)
    weights = stepper.space.weights
    if weights is not None and (state := weights.state_dict()):
        _save_state(temporary / _WEIGHTS, state)
    written = sorted(file for file in temporary.rglob("*") if file.is_file())
    record: dict[str, Any] = {
        "format": _FORMAT,
        **position._asdict(),
        "step_size": stepper.step_size.state_dict(),
        "halvings": chunk_halvings,
        "library": stepper.library,
        "parameters": list(stepper.space.parameters),
        "files": {file.relative_to(temporary).as_posix(): sha256_of(file) for file in written},
    }
    record["checksum"] = _checksum(record)
    (temporary / STATE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    _sync(temporary)


def _save_state(path: Path, state: Mapping[str, Any]) -> None:
    tensorfile.save(path, {name: np.asarray(value) for name, value in state.items()})


def _checksum(record: Mapping[str, Any]) -> str:
    """SHA-256 of the entries of state.json as JSON in one form, hex digits."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def save_adapter(space: AttachedSpace, folder: Path) -> None:
    """Replace the folder with what the space saves now, as a whole. `StorageError` leaves the old one."""
    temporary, old = (folder.with_name(f".{folder.name}.{ending}") for ending in ("tmp", "old"))
    with storage_errors(folder):
        if old.exists() and not folder.exists():  # killed between the two renames
            os.replace(old, folder)
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)
        try:
            space.save(temporary)
            _sync(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Force everything in a folder to the disk."""
    inside = sorted(folder.rglob("*"))
    for file in inside:
        if file.is_file():
            sync_file(file)
    for part in [*(path for path in inside if path.is_dir()), folder]:
        sync_folder(part)


def set_aside(path: Path) -> None:
    """Give a damaged checkpoint another name, so that it is looked at no more and can be made again."""
    name = path.name.replace("step-", "damaged-step-")
    shutil.rmtree(path.with_name(name), ignore_errors=True)
    with storage_errors(path):
        os.replace(path, path.with_name(name))


def load(path: Path, stepper: Stepper) -> Position:
    """Bring `stepper` to the state of a checkpoint. UserError if files are missing or do not fit."""
    record = _state(path)
    curvature = tensorfile.load(path / _CURVATURE)
    optimizer = tensorfile.load(path / _OPTIMIZER) if _OPTIMIZER in record["files"] else {}
    head = tensorfile.load(path / _HEAD) if _HEAD in record["files"] else {}
    stepper.space.load(path / ADAPTER)
    if stepper.space.weights is not None:
        weights = tensorfile.load(path / _WEIGHTS) if _WEIGHTS in record["files"] else {}
        stepper.space.weights.load_state_dict(weights)
    stepper.head.load_state_dict(head)
    stepper.curvature.load_state_dict(curvature)
    stepper.optimizer.load_state_dict(optimizer)
    stepper.step_size.load_state_dict(record["step_size"])
    return Position(record["step"], record["bad_steps"])


def chunk_halvings(path: Path) -> int:
    """Those of the chunks in which the run computed when the checkpoint was made."""
    return int(_state(path)["halvings"])


def library(path: Path) -> str:
    """What the run computed with: `Stepper.library`."""
    return str(_state(path)["library"])


def parameters(path: Path) -> list[str]:
    """The names of the parameters in memory, in the order in which the run has them."""
    return list(_state(path)["parameters"])


def exact_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters with an exact gradient, by name."""
    if _HEAD not in _state(path)["files"]:
        return {}
    entries = tensorfile.load(path / _HEAD)
    found = {name.removesuffix(".first"): value for name, value in entries.items() if name.endswith(".first")}
    return {name: tuple(value.shape) for name, value in found.items()}


def numbers(path: Path) -> dict[str, Any]:
    """What is kept of a state beside its tensors."""
    return {name: value for name, value in _state(path).items() if name in (*Position._fields, "step_size")}


def keep(folder: Path, limit: int, also: Iterable[int] = ()) -> None:
    """Remove all but the newest `limit` checkpoints, that of the start, and those after `also` steps.

    limit: 0 keeps all. `StorageError` if one cannot be removed.
    """
    if limit < 1:
        return
    kept = {0, *also}
    for path in every(folder)[limit:]:
        if steps_of(path) not in kept:
            temporary = folder / f".{path.name}.old"
            with storage_errors(path):
                os.replace(path, temporary)  # a killed process leaves no half checkpoint under its name
            shutil.rmtree(temporary, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what a killed process left."""
    for path in [*folder.glob(".step-*.tmp"), *folder.glob(".step-*.old")]:
        shutil.rmtree(path, ignore_errors=True)


def _state(path: Path) -> dict[str, Any]:
    """The entries of state.json, checked. UserError if they are not what was written for `path`."""
    try:
        record = parse_json((path / STATE).read_text(encoding="utf-8"))
        found: dict[str, Any] = {
            **{key: _count(record[key]) for key in ("step", "bad_steps", "halvings")},
            "step_size": {str(name): float(value) for name, value in record["step_size"].items()},
            "library": str(record["library"]),
            "parameters": [str(name) for name in record["parameters"]],
            "files": {_inside(path, name): str(value) for name, value in record["files"].items()},
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: not a complete checkpoint ({type(error).__name__}: {error})") from error
    others = {name: value for name, value in record.items() if name not in _ENTRIES}
    if others:  # none in format 1
        if others.get("format", _FORMAT) != _FORMAT:
            raise UserError(
                f"{path / STATE}: format: got {others['format']!r:.80}, this program reads 1 and {_FORMAT}"
            )
        if others != {"format": _FORMAT, "checksum": _checksum({"format": _FORMAT, **found})}:
            raise UserError(f"{path / STATE}: is damaged: its checksum is not that of its entries")
    if path.name != path_of(path, found["step"]).name:
        raise UserError(f"{path / STATE}: step: got {found['step']}, the folder is {path.name}")
    if _CURVATURE not in found["files"] or not any(name.startswith(f"{ADAPTER}/") for name in found["files"]):
        raise UserError(f"{path / STATE}: files: {_CURVATURE} and those of {ADAPTER} are not all named")
    return found


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.80} is not a count")
    return value


def _inside(path: Path, name: str) -> str:
    """A file's name, which must not lead out of the checkpoint."""
    if not is_inside(name):
        raise UserError(f"{path / STATE}: files: {name!r} is not inside the checkpoint")
    return name
