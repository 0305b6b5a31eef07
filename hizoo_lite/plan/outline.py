"""What a model is made of, from its configuration and the headers of its files alone: names, shapes, bytes.

Mirrors what `model/weights.py` makes of a checkpoint, without reading a weight: which matrices are packed and
how large their parts are, what is outside of the blocks, what is small and stays on the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hizoo_lite.base import Bits, ModelKind, UserError
from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.checkpoints.writer import Form
from hizoo_lite.engine.layout import ALIGNMENT
from hizoo_lite.model.blocks import find_blocks
from hizoo_lite.model.names import Names
from hizoo_lite.model.weights import SMALL_ELEMENTS
from hizoo_lite.quant.fourbit import BLOCKSIZE, NESTED_BLOCKSIZE

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_FOUR_BITS = ("nf4", "fp4")
#: Of a 4-bit weight that is quantized twice: the table of its absmax, and their offset, float32.
_NESTED_CONSTANTS = 256 * 4 + 4


class Outline(NamedTuple):
    """A checkpoint's tensors as they are declared, and its config.json."""

    folder: Path
    config: Mapping[str, Any]
    forms: Mapping[str, Form]
    bits: Bits | None  # what it is quantized to; None for 16 or 32 bits
    unaccounted: tuple[str, ...] = ()

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Outline:
        """From the headers of its files."""
        forms = {name: Form(checkpoint.dtype(name), checkpoint.shape(name)) for name in checkpoint}
        try:
            bits: Bits | None = checkpoint.quantized_bits
        except UserError as error:
            return cls(
                checkpoint.folder,
                checkpoint.config,
                forms,
                None,
                (f"{error}; its tensors are counted as they are stored",),
            )
        return cls(checkpoint.folder, checkpoint.config, forms, bits)

    @classmethod
    def of_shapes(cls, folder: Path, config: Mapping[str, Any], module: nn.Module) -> Outline:
        """A checkpoint in 16 or 32 bits of which only the configuration is known. module: the empty model."""
        name = str(config.get("dtype") or config.get("torch_dtype") or "none given").removeprefix("torch.")
        dtype = getattr(torch, name, None)
        unknown: tuple[str, ...] = (
            "sizes of the weights: from the shapes of the architecture, no header was read",
        )
        if not isinstance(dtype, torch.dtype) or dtype not in _FLOATS:
            unknown += (f"dtype {name!r} of {folder}: counted as 32 bits",)
            dtype = torch.float32
        if config.get("quantization_config"):
            unknown += ("quantization_config: sizes are those of the unquantized weights",)
        ties = set(getattr(module, "all_tied_weights_keys", None) or ())
        forms = {n: Form(dtype, tuple(p.shape)) for n, p in module.named_parameters() if n not in ties}
        return cls(folder, config, forms, None, unknown)


class Linear(NamedTuple):
    """A linear layer of the model as it will be held."""

    name: str
    block: int | None  # None outside of the blocks
    shape: tuple[int, int]  # (out_features, in_features)
    stored: tuple[int, ...]  # bytes of each buffer that travels with a block
    constants: int  # bytes of tables that stay, and of a bias in float32
    dtype: torch.dtype | None  # of a matrix that is not packed


class Anatomy(NamedTuple):
    """The parts of a model in the form in which a run holds them, in bytes."""

    linears: tuple[Linear, ...]
    blocks: int
    prefix: str
    outside: Mapping[str, int]  # embeddings and heads by stored name; shared ones once
    away: Mapping[str, int]  # those of them that stay away where the blocks stream
    small_bytes: int  # norms, biases, constants and buffers, on the device always
    parameters: int  # elements inside the blocks' linears
    largest_bytes: int  # of a tensor as it is stored: what loading holds beside the rest
    unaccounted: tuple[str, ...]

    def block_bytes(self, extra: int = 0) -> list[int]:
        """Bytes of every block's buffers, `extra` bytes an element beside the packed ones."""
        sums = [0] * self.blocks
        for linear in self.inside():
            sums[linear.block or 0] += sum(linear.stored) + extra * math.prod(linear.shape)
        return sums

    def travel_bytes(self, extra: int = 0) -> list[int]:
        """The same as it travels: each buffer begins at a multiple of 256 bytes."""
        sums = [0] * self.blocks
        for linear in self.inside():
            parts = [*linear.stored, *([extra * math.prod(linear.shape)] if extra else [])]
            sums[linear.block or 0] += sum(-(-part // ALIGNMENT) * ALIGNMENT for part in parts)
        return sums

    def inside(self) -> Iterator[Linear]:
        """The linears of the blocks."""
        return (linear for linear in self.linears if linear.block is not None)


def dissect(
    outline: Outline, module: nn.Module, kind: ModelKind, bits: Bits, double_quant: bool, device: str
) -> Anatomy:
    """module: the empty model. bits: of the blocks' linears, quantized on loading if need be."""
    return _Dissection(outline, module, kind, bits, double_quant, device).result()


class _Dissection:
    def __init__(
        self,
        outline: Outline,
        module: nn.Module,
        kind: ModelKind,
        bits: Bits,
        double_quant: bool,
        device: str,
    ) -> None:
        self.outline, self.module, self.kind = outline, module, kind
        self.bits, self.double_quant, self.device = bits, double_quant, device
        self.names = Names(list(outline.forms), module)
        self.blocks = find_blocks(module)
        self.outside: dict[str, int] = {}
        self.away: dict[str, int] = {}
        self.unknown = list(outline.unaccounted)
        self.small_bytes = 64 if bits in _FOUR_BITS and device == "cpu" else 0  # one code table for all
        self._vocabulary = module.get_input_embeddings()  # type: ignore[operator]

    def result(self) -> Anatomy:
        taken: set[str] = set()
        linears = []
        for name, layer in self.module.named_modules():
            if isinstance(layer, nn.Embedding):
                self._embedding(name, layer)
                taken.add(f"{name}.weight")
            elif isinstance(layer, nn.Linear | Conv1D):
                linears.append(self._linear(name, layer))
                taken |= {f"{name}.weight", f"{name}.bias"}
        small = {n: p for n, p in self.module.named_parameters() if n not in taken}
        for name, parameter in small.items():
            if parameter.ndim > 2 or (parameter.numel() > SMALL_ELEMENTS and self._block(name) is not None):
                self.unknown.append(f"{name} {tuple(parameter.shape)}: no linear layer, not supported")
        buffers = {b.data_ptr() or id(b): b.numel() * b.itemsize for b in self.module.buffers()}
        self.small_bytes += 4 * sum(p.numel() for p in small.values()) + sum(buffers.values())
        self.small_bytes += sum(linear.constants for linear in linears)
        return Anatomy(
            tuple(linears),
            len(self.blocks.modules),
            self.blocks.prefix,
            self.outside,
            self.away,
            self.small_bytes,
            sum(math.prod(linear.shape) for linear in linears if linear.block is not None),
            max((form.nbytes for form in self.outline.forms.values()), default=0),
            tuple(dict.fromkeys(self.unknown)),
        )

    def _block(self, name: str) -> int | None:
        inside = name.removeprefix(self.blocks.prefix + ".")
        return None if inside == name else int(inside.split(".", 1)[0])

    def _embedding(self, name: str, layer: nn.Embedding) -> None:
        parameter = f"{name}.weight"
        stored = self.names.find(parameter) or self.names.find_tied(parameter)
        if stored is None:
            self.unknown.append(f"{parameter}: not in the checkpoint")
            return
        size = self._float_bytes(stored)
        self.outside[stored] = size
        if layer is self._vocabulary and math.prod(self.outline.forms[stored].shape) > SMALL_ELEMENTS:
            self.away[stored] = size

    def _linear(self, name: str, layer: nn.Linear | Conv1D) -> Linear:
        transposed = isinstance(layer, Conv1D)
        first, second = layer.weight.shape
        shape = (second, first) if transposed else (first, second)
        bias = 4 * shape[0] if layer.bias is not None else 0
        parameter, block = f"{name}.weight", self._block(name)
        found = self.names.find(parameter)
        stored = found or self.names.find_tied(parameter)
        if stored is None:
            if self.kind != "classifier":
                self.unknown.append(f"{parameter}: not in the checkpoint")
            self.outside[parameter] = 4 * math.prod(shape)
            return Linear(name, block, shape, (), bias, torch.float32)
        beside = self.names.beside(stored)
        if block is None:
            form = self.outline.forms[stored]
            tied = self.names.find_tied(parameter)
            if not (tied in self.outside and tied != stored):  # a stored copy of the embedding is shared
                self.outside[stored] = self._float_bytes(stored)
                if not transposed and math.prod(form.shape) > SMALL_ELEMENTS:
                    self.away[stored] = self.outside[stored]
            return Linear(name, None, shape, (), bias, form.dtype)
        if beside:
            parts, constants = self._quantized(stored, beside)
            return Linear(name, block, shape, parts, constants + bias, None)
        dtype = self.outline.forms[stored].dtype
        if dtype not in _FLOATS:
            self.unknown.append(f"{stored} is stored as {dtype}: counted as it is, it cannot be loaded")
            return Linear(name, block, shape, (self.outline.forms[stored].nbytes,), bias, dtype)
        if self.bits == "none" or self.outline.bits is not None:
            return Linear(name, block, shape, (self._float_bytes(stored),), bias, dtype)
        parts, constants = packed_bytes(shape, self.bits, self.double_quant)
        return Linear(name, block, shape, parts, constants + bias + self._table(), None)

    def _quantized(self, stored: str, beside: Mapping[str, str]) -> tuple[tuple[int, ...], int]:
        """Bytes of the buffers and of the constants of a layer that bitsandbytes quantized."""
        forms = self.outline.forms
        parts = [forms[stored].nbytes]
        if "SCB" in beside:
            return (parts[0], 4 * math.prod(forms[beside["SCB"]].shape)), 0
        if not any(short.startswith("weight.quant_state.") for short in beside):
            self.unknown.append(f"{stored}: tensors beside it that are not known: {sorted(beside)}")
        nested = "weight.nested_absmax" in beside
        for short in ("weight.absmax", "weight.nested_absmax"):
            if short in beside:
                parts.append(forms[beside[short]].nbytes)
        return tuple(parts), (_NESTED_CONSTANTS if nested else 0) + self._table()

    def _table(self) -> int:
        """The code table: on a GPU every layer has its own."""
        return 64 if self.device != "cpu" else 0

    def _float_bytes(self, stored: str) -> int:
        form = self.outline.forms[stored]
        if form.dtype not in _FLOATS:
            self.unknown.append(f"{stored} is stored as {form.dtype}: counted as it is, it cannot be loaded")
        return form.nbytes // (2 if form.dtype == torch.float64 else 1)


def packed_bytes(shape: tuple[int, int], bits: Bits, double_quant: bool) -> tuple[tuple[int, ...], int]:
    """Bytes of the buffers of a matrix that is quantized here, and of its constants but the code table."""
    elements = math.prod(shape)
    if bits == "int8":
        return (elements, 4 * shape[0]), 0
    codes, groups = (elements + 1) // 2, -(-elements // BLOCKSIZE)
    if not double_quant:
        return (codes, 4 * groups), 0
    return (codes, groups, 4 * -(-groups // NESTED_BLOCKSIZE)), _NESTED_CONSTANTS
