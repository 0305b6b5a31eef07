"""What the spaces share that train a model's own weights: attaching, and saving what has changed.

A folder holds `hizoo_space.json` (what it is and what it was made for), `head.safetensors` if a
classification head was trained, and `block-00000.safetensors` ... with the changed buffers of every trained
layer as they are stored, under "layer.buffer". One block is in memory at a time.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from hizoo_lite.base import Space
from hizoo_lite.checkpoints.adapter import SPACE_FILE, SPACE_FORMAT, read_record
from hizoo_lite.checkpoints.tensors import load_tensors, save_tensors
from hizoo_lite.engine.block import each_block
from hizoo_lite.engine.residency import Streamed
from hizoo_lite.errors import UserError
from hizoo_lite.model.linear import BranchLinear
from hizoo_lite.model.model import Model
from hizoo_lite.quant import FourBitWeight
from hizoo_lite.quant.packed import Stored
from hizoo_lite.spaces.changes import InPlaceChanges
from hizoo_lite.spaces.heads import HeadMode, attach_head, check_mode
from hizoo_lite.spaces.targets import Blocks, release, resolve_targets
from hizoo_lite.spaces.weights import Part, TileNoise, WeightDelta, Weights

_HEAD = "head.safetensors"


class InPlaceSpace(Space):
    """Trains parts of the chosen linear layers' weights, and classification heads in memory."""

    weights: Weights | None = None
    needs_own_scales = True
    changes = InPlaceChanges

    def __init__(
        self,
        targets: str | Sequence[str] = "all-linear",
        head: HeadMode | None = None,
        blocks: Blocks = "all",
    ) -> None:
        """Nothing is changed before `attach`.

        Args:
            targets: as of `LoRA`; by default all linear layers.
            head: as of `LoRA`, without rows for label words.
            blocks: how many blocks are trained, from the top, or "all".
        """
        self.targets, self.head = targets, check_mode(head)
        self.blocks: Blocks = "all" if blocks == "auto" else blocks
        self.parameters: dict[str, Tensor] = {}  # of heads
        self.exact: dict[str, Tensor] = {}  # likewise
        self.frozen: dict[str, Tensor] = {}

    @abstractmethod
    def part(self, model: Model, linear: BranchLinear) -> Part:
        """Prepare the weight of a layer, `linear` of `model`, and say what is trained of it.

        Raises:
            UserError: if it cannot be trained.
        """

    def noise(self, model: Model) -> TileNoise:
        """What draws z for `model`."""
        return TileNoise()

    def options(self) -> dict[str, Any]:
        """What a space of this name must be made with to read what this one saved, beside the targets."""
        return {}

    def attach(self, model: Model, seed: int, labels: Sequence[int] | None = None) -> None:
        """Hang a delta on each target, in place of others. The weights start as they are; no seed is used."""
        if isinstance(model.residency, Streamed) and model.residency.is_laid_out:
            raise UserError(
                f"--space {self.name}: the blocks of this model have been streamed already; load it anew"
            )
        release(model)
        self.model, self.parameters, self.exact, self.frozen = model, {}, {}, {}
        self.target_names = resolve_targets(model, self.targets, self.blocks)
        parts = [self.part(model, model.linears[target]) for target in self.target_names]
        self.weights = Weights(model, parts, self.noise(model))
        for part in parts:
            part.linear.delta = WeightDelta(part, self.weights)
        model.pending = self.weights
        self.head_names = attach_head(model, self.head, self.parameters, self.exact, self.frozen)

    def detach(self) -> None:
        """Take every delta off again. The weights keep what they have learnt."""
        release(self.model)

    def save(self, folder: Path | str) -> None:
        """Write the folder, with every update."""
        assert self.weights is not None
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for block in each_block(self.model):  # which applies what waits
            tensors = {key: stored.tensor for key, stored in self._changed(block).items()}
            save_tensors(tensors, folder / _block_file(block))
        if self.head_names:
            save_tensors(self._head(), folder / _HEAD)
        save_record(self, folder)

    def load(self, folder: Path | str) -> None:
        """Read what `save` wrote; `UserError`, naming the file, if it does not fit."""
        assert self.weights is not None
        folder = Path(folder)
        check_record(self, folder)
        if self.head_names:
            _copy(load_tensors(folder / _HEAD), self._head(), folder / _HEAD)
        self.weights.drop()
        for block in each_block(self.model):
            self._restore(block, folder / _block_file(block))
            self.model.residency.mark_dirty(block)

    def _head(self) -> dict[str, Tensor]:
        return {**self.frozen, **self.exact, **self.parameters}

    def _restore(self, block: int, path: Path) -> None:
        assert self.weights is not None
        changed = {key: stored.tensor for key, stored in self._changed(block).items()}
        saved = load_tensors(path)
        for part in self.weights.parts:
            if self.model.block_of(part.linear.name) == block:
                part.reconcile(saved, changed, str(path))
        _copy(saved, changed, path)

    def _changed(self, block: int) -> dict[str, Stored]:
        assert self.weights is not None
        return {
            f"{part.linear.name}.{stored.name}": stored
            for part in self.weights.parts
            if self.model.block_of(part.linear.name) == block
            for stored in part.changed()
        }


class Recorded(Protocol):
    """A space whose folder has a `hizoo_space.json`; it is attached."""

    name: str
    model: Model
    target_names: list[str]
    head_names: list[str]

    def options(self) -> dict[str, Any]:
        """See `InPlaceSpace.options`."""
        ...


def save_record(space: Recorded, folder: Path) -> None:
    """Write `hizoo_space.json`."""
    record = {
        "format": SPACE_FORMAT,
        "space": space.name,
        **space.options(),
        "targets": space.target_names,
        "base_model": str(space.model.source),
        "kind": space.model.kind,
        "bits": space.model.bits,
        "head": bool(space.head_names),
    }
    (folder / SPACE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def check_record(space: Recorded, folder: Path) -> None:
    """UserError unless `hizoo_space.json` is of such a space on such a model."""
    record = read_record(folder)
    wanted = {"space": space.name, **space.options(), "bits": space.model.bits}
    wanted["targets"] = space.target_names
    for key, value in wanted.items():
        if record.get(key) != value:
            raise UserError(f"{folder / SPACE_FILE}: {key}: it has {record.get(key)!r}, this run {value!r}")


def with_own_scales(linear: BranchLinear) -> None:
    """Give a 4-bit weight its scales in float32; `UserError` if they are offloaded, in 8 bits."""
    weight = linear.weight
    if isinstance(weight, FourBitWeight) and weight.double_quant:
        try:
            weight.undo_double_quant()
        except ValueError as error:
            raise UserError(
                f"{linear.name} has scales in 8 bits that are not in memory; quantize the model again with "
                "hizoo-lite quantize --no-double-quant, or use --residency host or resident, or "
                "--space dense with --dense-update residual"
            ) from error


def _block_file(block: int) -> str:
    return f"block-{block:05d}.safetensors"


def _copy(saved: Mapping[str, Tensor], into: Mapping[str, Tensor], path: Path) -> None:
    wrong = sorted(set(saved) ^ set(into))
    if wrong:
        raise UserError(f"{path}: does not fit this model and space; first of {len(wrong)}: {wrong[0]!r}")
    for name, value in into.items():
        got = saved[name]
        if got.shape != value.shape or got.dtype != value.dtype:
            raise UserError(
                f"{path}: {name} is {tuple(got.shape)} {got.dtype}, the model wants {tuple(value.shape)} "
                f"{value.dtype}"
            )
        value.copy_(got)
