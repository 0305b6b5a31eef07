"""Checkpoints: everything that a step reads and changes, so that a resumed run is bitwise the same.

`checkpoints/step-000100/` holds the state *after* 100 steps: what the space saves (`adapter/`),
`curvature.safetensors`, and `state.json` with the step size's state. Noise and batches need no state:
they are functions of (seed, step). A checkpoint is written aside and renamed: one that has its name is
complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hizoo_lite import tensorfile
from hizoo_lite.base import UserError
from hizoo_lite.train.step import Stepper

_NAME = re.compile(r"step-(\d+)")
_STATE = "state.json"
_CURVATURE = "curvature.safetensors"
_ADAPTER = "adapter"


class Position(NamedTuple):
    """Where a run stands."""

    step: int = 0  # steps taken; the next one has this number
    bad_steps: int = 0  # steps in a row, up to here, whose losses were not finite


def newest(folder: Path) -> Path | None:
    """The checkpoint with the most steps in a `checkpoints` folder, None where there is none."""
    found = [p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return max(found, key=lambda p: int(p.name.removeprefix("step-")), default=None)


def save(folder: Path, position: Position, stepper: Stepper) -> Path:
    """Write the state after `position.step` steps; the checkpoint's path. One that exists is kept."""
    path = folder / f"step-{position.step:06d}"
    if path.exists():
        return path
    aside = folder / f".{path.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    stepper.space.save(aside / _ADAPTER)
    state = {name: np.asarray(value) for name, value in stepper.curvature.state_dict().items()}
    tensorfile.save(aside / _CURVATURE, state)
    record = {**position._asdict(), "step_size": stepper.step_size.state_dict()}
    (aside / _STATE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, path)
    return path


def load(path: Path, stepper: Stepper) -> Position:
    """Bring `stepper` to the state of a checkpoint. UserError where files are missing or do not fit."""
    try:
        record = json.loads((path / _STATE).read_text(encoding="utf-8"))
        curvature = tensorfile.load(path / _CURVATURE)
        position = Position(int(record["step"]), int(record["bad_steps"]))
        step_size = {name: float(value) for name, value in record["step_size"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a complete checkpoint ({type(error).__name__}: {error})") from error
    stepper.space.load(path / _ADAPTER)
    stepper.curvature.load_state_dict(curvature)
    stepper.step_size.load_state_dict(step_size)
    return position
