"""What a run has changed of its model, read one layer at a time: for merging it into the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hizoo_lite.base import ModelKind
from hizoo_lite.checkpoints.adapter import (
    PEFT_FILE,
    PEFT_PREFIX,
    PEFT_WEIGHTS,
    SPACE_FILE,
    check_heads,
    read_peft_config,
    read_record,
    scaling,
)
from hizoo_lite.checkpoints.tensors import TensorFile
from hizoo_lite.errors import UserError
from hizoo_lite.quant import FourBitWeight, ResidualWeight
from hizoo_lite.quant.packed import PackedWeight

_HEAD = "head.safetensors"


class Changes(Protocol):
    """The tuned part of a model, by names of its module tree."""

    space: str
    linears: set[str]  # changed layers of the blocks
    residuals: set[str]  # those of them with a difference beside their weight
    heads: dict[str, Tensor]  # parameters that were trained in full, float32
    files: list[Path]  # everything is in these

    def weight(self, linear: str, base: PackedWeight) -> PackedWeight:
        """The base's weight as the run has stored it; `base` itself may be changed."""
        ...

    def add(self, linear: str, rows: Tensor, first_row: int) -> None:
        """Add to rows `first_row` .. of a weight, (rows, in_features) float32, what is tuned beside it."""
        ...


class LoRAChanges:
    """W + scaling * B A (2106.09685), in float32."""

    space = "lora"

    def __init__(self, folder: Path) -> None:
        """Raises `UserError` for adapters of other forms, and if A and B do not fit together."""
        self._scaling = scaling(read_peft_config(folder))
        self._file = _open(folder / PEFT_WEIGHTS)
        self.files = [folder / PEFT_FILE, folder / PEFT_WEIGHTS]
        self.linears, self.heads = set(), {}
        self.residuals: set[str] = set()
        for key, entry in self._file.entries.items():
            name = key.removeprefix(PEFT_PREFIX)
            linear, found, leaf = name.partition(".lora_")
            if not found:
                self.heads[name] = self._file.read(key).float()
                continue
            other = self._file.entries.get(_key(linear, "B" if leaf == "A.weight" else "A"))
            if leaf not in ("A.weight", "B.weight") or other is None or len(entry.shape) != 2:
                raise UserError(f"{self._file.path}: {key}: pairs of lora_A.weight and lora_B.weight wanted")
            self.linears.add(linear)

    def pair(self, linear: str) -> tuple[Tensor, Tensor]:
        """A (rank, in_features) and B (out_features, rank) of a layer, float32."""
        a, b = (self._file.read(_key(linear, half)).float() for half in "AB")
        return a, b

    def weight(self, linear: str, base: PackedWeight) -> PackedWeight:
        """The base itself. Raises `UserError` if the adapter has another shape."""
        if linear in self.linears:
            self._check_shape(linear, base.shape)
        return base

    def check_fits(self, module: nn.Module, model: Path, kind: ModelKind) -> None:
        """UserError, naming a layer or a tensor, if this is no adapter of `module`, which is empty."""
        check_heads(self._file.path, self.heads, kind, str(module.base_model_prefix))
        layers = dict(module.named_modules())
        parameters = dict(module.named_parameters(remove_duplicate=False))
        lacking = sorted(
            {name for name in self.linears if not isinstance(layers.get(name), nn.Linear | Conv1D)}
            | (set(self.heads) - set(parameters))
        )
        if lacking:
            raise UserError(
                f"{self._file.path.parent}: does not fit {model}; first of {len(lacking)} names that the "
                f"model lacks: {lacking[0]!r}"
            )
        for linear in sorted(self.linears):
            rows, columns = layers[linear].get_parameter("weight").shape
            transposed = isinstance(layers[linear], Conv1D)
            self._check_shape(linear, (columns, rows) if transposed else (rows, columns))
        for name, value in self.heads.items():
            check_head(self._file.path, name, value, parameters[name])

    def _check_shape(self, linear: str, wanted: tuple[int, ...]) -> None:
        a, b = (self._file.entries[_key(linear, half)].shape for half in "AB")
        if (b[0], a[1]) != wanted or a[0] != b[1]:
            raise UserError(
                f"{self._file.path}: {linear} has A {a} and B {b}, the model's weight is {wanted}"
            )

    def add(self, linear: str, rows: Tensor, first_row: int) -> None:
        """scaling * B A of these rows."""
        if linear in self.linears:
            a = self._file.read(_key(linear, "A")).float()
            b = self._file.read_rows(_key(linear, "B"), first_row, first_row + len(rows)).float()
            rows.addmm_(b, a, alpha=self._scaling)


class InPlaceChanges:
    """Weights that were trained where they are: scales, codes, or a difference beside them."""

    def __init__(self, folder: Path) -> None:
        """Raises `UserError`, naming the file, if something is missing or not valid."""
        record = read_record(folder)
        self.space, self.heads = str(record["space"]), {}
        self.linears = set(record["targets"])
        blocks = sorted(folder.glob("block-*.safetensors"))
        self.files = [folder / SPACE_FILE, *blocks]
        self._saved: dict[str, dict[str, TensorFile]] = {}  # linear -> buffer -> the file that has it
        for file in map(TensorFile, blocks):
            for key in file.entries:
                linear, _, buffer = key.rpartition(".")
                self._saved.setdefault(linear, {})[buffer] = file
        self.residuals = {linear for linear, saved in self._saved.items() if "residual" in saved}
        missing = sorted(self.linears ^ set(self._saved))
        if missing:
            raise UserError(f"{folder}: {SPACE_FILE} and the block files differ about {missing[0]!r}")
        if record.get("head"):
            head = _open(folder / _HEAD)
            self.files.append(head.path)
            self.heads = {name: head.read(name).float() for name in head.entries}

    def weight(self, linear: str, base: PackedWeight) -> PackedWeight:
        """With the saved buffers. Raises `UserError` if they are of another model."""
        files = self._saved.get(linear, {})
        saved = {buffer: file.read(f"{linear}.{buffer}") for buffer, file in files.items()}
        where = next((str(file.path) for file in files.values()), "")
        if isinstance(base, FourBitWeight) and "absmax" in saved:
            base.undo_double_quant()
        residual = saved.pop("residual", None)
        if residual is not None:
            return self._beside(base, residual, saved, f"{where}: {linear}")
        for buffer, value in saved.items():
            own = {stored.name: stored.tensor for stored in base.stored()}.get(buffer)
            _check_same_form(f"{where}: {linear}.{buffer}", value, own)
            setattr(base, buffer, value)
        return base

    def add(self, linear: str, rows: Tensor, first_row: int) -> None:
        """Nothing: it is in the weight."""

    def _beside(
        self, base: PackedWeight, residual: Tensor, saved: dict[str, Tensor], where: str
    ) -> ResidualWeight:
        scales = saved.get("absmax")  # never changed beside a residual
        if scales is not None and not (
            isinstance(base, FourBitWeight) and torch.equal(base.scales(), scales.view(-1))
        ):
            raise UserError(f"{where}: its scales differ from the model's: it was made for another one")
        weight = ResidualWeight(base)
        _check_same_form(f"{where}.residual", residual, weight.residual)
        weight.residual = residual
        return weight


def check_head(path: Path, name: str, got: Tensor, wanted: Tensor) -> None:
    """UserError if a parameter that was trained in full, read from `path`, has another shape."""
    if got.shape != wanted.shape:
        raise UserError(f"{path}: {name} has shape {tuple(got.shape)}, the model wants {tuple(wanted.shape)}")


def _key(linear: str, half: str) -> str:
    return f"{PEFT_PREFIX}{linear}.lora_{half}.weight"


def _open(path: Path) -> TensorFile:
    if not path.is_file():
        raise UserError(f"{path}: no such file; it holds what was tuned")
    return TensorFile(path)


def _check_same_form(where: str, got: Tensor, wanted: Tensor | None) -> None:
    if wanted is None or (got.shape, got.dtype) != (wanted.shape, wanted.dtype):
        has = "none" if wanted is None else f"{tuple(wanted.shape)} {wanted.dtype}"
        raise UserError(f"{where} is {tuple(got.shape)} {got.dtype}, the model has {has}")
