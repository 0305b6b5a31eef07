"""Rebuild what a run has trained, at any of its steps, from its initial state and its journal alone.

No loss is computed: every step's z is drawn again and moved along by the scalars that the journal keeps. A
space in memory needs no model for that, since its initial parameters are in checkpoints/step-000000; one
inside the weights begins at the model's own. The method is that of config.toml: options of objects given to
`fit` that no setting says are not known here, and show in the comparison.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hizoo_lite.arrays import Array, Arrays, NumpyArrays, Shape
from hizoo_lite.base import AttachedSpace
from hizoo_lite.checkpoints import tensorfile
from hizoo_lite.checkpoints.adapter import PEFT_METADATA, PEFT_PREFIX
from hizoo_lite.config import TrainConfig
from hizoo_lite.errors import UserError
from hizoo_lite.registry import SPACES
from hizoo_lite.train import checkpoint, components, identity
from hizoo_lite.train.checkpoint import ADAPTER, Position
from hizoo_lite.train.folder import RunFolder
from hizoo_lite.train.journal import Record, scan
from hizoo_lite.train.resume import after
from hizoo_lite.train.step import Stepper


class Replayed(NamedTuple):
    """What came of it."""

    steps: int
    folder: Path  # a checkpoint, with the adapter in it
    same: list[str]  # files that the run had of the same step, and that are the same
    differs: list[str]  # and those that are not


class StoredSpace(AttachedSpace):
    """The parameters that a space in memory has saved, without the model that they are for.

    `parameters` are in the order of `names`. exact: shapes of those with an exact gradient, which may be the
    first rows of what is saved. The file's other tensors were not trained.
    """

    weights = None

    def __init__(
        self, name: str, folder: Path, names: list[str], exact: Mapping[str, Shape], arrays: Arrays
    ) -> None:
        self.name, self.folder, self._arrays = name, folder, arrays
        found = self._read(folder)
        self._keys = {key.removeprefix(PEFT_PREFIX): key for key in found}
        if not {*names, *exact} <= set(self._keys):
            raise UserError(f"{folder}: does not hold the parameters that state.json beside it names")
        self._moved = {name: self._copied(found[self._keys[name]]) for name in (*names, *exact)}
        self.parameters = {name: self._moved[name] for name in names}
        self.exact = {name: self._moved[name][: shape[0]] for name, shape in exact.items()}
        self.frozen = {name: found[key] for name, key in self._keys.items() if name not in self._moved}

    def save(self, folder: Path | str) -> None:
        """Write the parameters beside the settings that they were read with."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        moved = {name: np.asarray(self._arrays.on_host(value)) for name, value in self._moved.items()}
        tensors = {self._keys[name]: value for name, value in {**self.frozen, **moved}.items()}
        tensorfile.save(_tensors_in(Path(folder)), tensors, PEFT_METADATA)

    def load(self, folder: Path | str) -> None:
        """Read others of the same shapes."""
        found = self._read(Path(folder))
        for name, value in self._moved.items():
            value[...] = self._copied(found[self._keys[name]])

    def _read(self, folder: Path) -> dict[str, np.ndarray]:
        return tensorfile.load(_tensors_in(folder))

    def _copied(self, value: np.ndarray) -> Array:
        return self._arrays.on_device(self._arrays.copied(value))


def _tensors_in(folder: Path) -> Path:
    """The one file with tensors. UserError if there is none, or another."""
    found = list(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise UserError(f"{folder}: holds {len(found)} files of tensors, a space in memory saves one")
    return found[0]


def replay(
    run: Path,
    step: int | None = None,
    out: Path | None = None,
    stepped: Callable[[int, int], None] = lambda done, total: None,
) -> Replayed:
    """The state of the run in folder `run` after `step` steps (None: all), as a checkpoint in `out`.

    out: by default `replayed` in the run folder; the checkpoint is `out/step-000123`. What the run folder has
    of the same step (a checkpoint; the adapter) is compared bit for bit. `stepped` is told how many steps of
    how many are done. Raises UserError for a step that the journal does not have, a run that this machine
    cannot replay, or an `out` that another process uses; `StorageError` if the checkpoint cannot be
    written.
    """
    folder = RunFolder(run)
    config = folder.config()
    records = _records(folder, step)
    out = folder.path / "replayed" if out is None else out
    target = checkpoint.path_of(out, len(records))
    with RunFolder(out).locked():
        if target.exists():
            raise UserError(f"--out: {target} exists already; allowed: a folder without it")
        with _stepper(folder, config) as stepper:
            position = Position()
            for record in records:
                stepper.replay(record)
                position = after(position, record)
                stepped(position.step, len(records))
            written = checkpoint.save(out, position, stepper)
    return _compared(folder, written, position.step)


def _records(folder: RunFolder, step: int | None) -> list[Record]:
    """Those of the steps before number `step`, None: of all. UserError if one of them is lost."""
    found = scan(folder.journal)
    records = [record for number, record in enumerate(found.records) if record.step == number]
    most = len(records)
    broken = len(found.records) > most or found.lost_bytes > 0
    if step is None and broken:
        raise UserError(
            f"{folder.journal}: the record of step {most} is missing or damaged; what the run had trained "
            f"before it can be rebuilt: --step 0 to --step {most}"
        )
    if step is not None and not 0 <= step <= most:
        raise UserError(
            f"--step: got {step}, allowed: 0 to {most}, the steps of {folder.journal}"
            + (f", whose record of step {most} is missing or damaged" if broken else "")
        )
    return records[:step]


@contextmanager
def _stepper(folder: RunFolder, config: TrainConfig) -> Iterator[Stepper]:
    """The step of the run, in its initial state; it ends with this."""
    with _threads(identity.read(folder.identity).get("library", ""), config.threads):
        in_memory = not SPACES.lines[config.space].in_weights
        made = _without_model(folder, config) if in_memory else _with_model(folder, config)
        try:
            yield made
        finally:
            made.close()


def _threads(library: str, count: int | None) -> AbstractContextManager[None]:
    """As many as the run had: sums of another number may round otherwise."""
    if library == "numpy":
        return nullcontext()
    from hizoo_lite.tensors import threads

    return threads(count)


def _without_model(folder: RunFolder, config: TrainConfig) -> Stepper:
    first = checkpoint.path_of(folder.checkpoints, 0)
    checkpoint.check(first)
    arrays = _arrays(checkpoint.library(first), first)
    known = checkpoint.parameters(first), checkpoint.exact_shapes(first)
    space = StoredSpace(config.space, first / ADAPTER, *known, arrays)
    return components.make_stepper(config, None, arrays, space)


def _arrays(library: str, where: Path) -> Arrays:
    if library == "numpy":
        return NumpyArrays()
    from hizoo_lite.device import choose_device, has
    from hizoo_lite.tensors import TorchArrays

    device = library.removeprefix("torch-")
    if not has(device):
        raise UserError(f"{where}: the run was computed with {library}, which is not on this machine")
    return TorchArrays(choose_device(device))


def _with_model(folder: RunFolder, config: TrainConfig) -> Stepper:
    """Blocks are brought in one after the other, as the updates want them. UserError for another model."""
    from hizoo_lite.tensors import TorchArrays
    from hizoo_lite.train.resolved import Resolved

    model = Resolved(config, components.find_task(config.task)).model()
    space = SPACES.configured(config)
    space.attach(model, config.seed)
    stepper = components.make_stepper(config, None, TorchArrays(model.device), space)
    found = {**identity.of_model(model.folder), "library": stepper.library}
    identity.check(folder.identity, {**found, **identity.of_device(model.device, drawn=True)})
    return stepper


def _compared(folder: RunFolder, written: Path, step: int) -> Replayed:
    """Against what the run itself has written of that step."""
    found: dict[str, bool] = {}
    theirs = checkpoint.path_of(folder.checkpoints, step)
    if theirs.is_dir():
        found = _same_tensors(written, theirs)
        state = theirs / checkpoint.STATE
        found[str(state)] = checkpoint.numbers(written) == checkpoint.numbers(theirs)
    if folder.adapter.is_dir() and step == folder.read_summary().get("adapter_step"):
        found |= _same_tensors(written / ADAPTER, folder.adapter)
    return Replayed(
        step,
        written,
        [name for name, same in found.items() if same],
        [name for name, same in found.items() if not same],
    )


def _same_tensors(ours: Path, theirs: Path) -> dict[str, bool]:
    """By file of theirs, whether ours holds the same."""
    names = {file.relative_to(folder) for folder in (ours, theirs) for file in folder.rglob("*.safetensors")}
    return {
        str(theirs / name): all((folder / name).is_file() for folder in (ours, theirs))
        and tensorfile.equal(ours / name, theirs / name)
        for name in sorted(names)
    }
