"""A checkpoint of which only the headers are known, which the loader takes for a real one.

What is read of a `Described` checkpoint has no memory, but for what the loader looks at: code tables and the
descriptions that bitsandbytes puts beside its weights, which are made here from the shapes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hizoo_lite.base import Bits, ModelKind
from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.checkpoints.tensors import Entry
from hizoo_lite.checkpoints.writer import Form
from hizoo_lite.errors import UserError
from hizoo_lite.model.names import Names
from hizoo_lite.quant import native
from hizoo_lite.quant.fourbit import BLOCKSIZE, NESTED_BLOCKSIZE

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_STATE = ".quant_state.bitsandbytes__"


class Inventory(NamedTuple):
    """A checkpoint's tensors as they are declared, and its config.json."""

    folder: Path
    config: Mapping[str, Any]
    forms: Mapping[str, Form]
    bits: Bits | None  # what it is quantized to; None for 16 or 32 bits
    unaccounted: tuple[str, ...] = ()

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Inventory:
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
    def of_shapes(cls, folder: Path, config: Mapping[str, Any], module: nn.Module) -> Inventory:
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


class Described(Checkpoint):
    """An inventory in the place of a checkpoint; what is missing or unknown is replaced, and named."""

    device = torch.device("meta")

    def __init__(self, inventory: Inventory, module: nn.Module, kind: ModelKind) -> None:
        """module: the empty model."""
        super().__init__(inventory.folder, dict(inventory.config), {})
        self.forms = dict(inventory.forms)
        self.unaccounted = list(inventory.unaccounted)
        self._names = Names(list(self.forms), module)
        self._shapes: dict[str, tuple[int, ...]] = {}  # of matrices, by stored name
        self._buffers = {self._names.find(name) for name, _ in module.named_buffers()}
        for name, parameter in module.named_parameters():
            self._declare(name, tuple(parameter.shape), kind)
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear | Conv1D):
                first, second = layer.weight.shape
                shape = (second, first) if isinstance(layer, Conv1D) else (first, second)
                self._shapes[self._names.find(f"{name}.weight") or ""] = shape

    def _declare(self, name: str, shape: tuple[int, ...], kind: ModelKind) -> None:
        """Have a tensor for a parameter that the loader can take."""
        stored = self._names.find(name) or self._names.find_tied(name)
        is_head = kind == "classifier" and (not self._names.in_trunk(name) or ".pooler." in name)
        if stored is None:
            if not is_head:
                self.unaccounted.append(f"{name}: not in the checkpoint")
                self.forms[name] = Form(torch.float32, shape)
            return
        form = self.forms[stored]
        if self._names.beside(stored):
            return
        if form.dtype not in _FLOATS:
            replaced = torch.float32 if form.dtype.itemsize > 2 else torch.bfloat16
            self.unaccounted.append(
                f"{stored} is stored as {form.dtype}: counted as {replaced}, it cannot be loaded"
            )
            form = Form(replaced, form.shape)
        self.forms[stored] = Form(form.dtype, shape) if is_head else form  # the task says how many classes

    def names(self) -> list[str]:
        return list(self.forms)

    def __iter__(self) -> Iterator[str]:
        return iter(self.forms)

    def __contains__(self, name: object) -> bool:
        return name in self.forms

    def read(self, name: str) -> Tensor:
        """A tensor without memory, or one of the few that the loader looks at."""
        form = self.forms[name]
        if _STATE in name:
            return torch.frombuffer(bytearray(self._state(name)), dtype=torch.uint8)
        if name.endswith(".weight.quant_map"):
            return native.code_table(cast(native.FourBits, self.quantized_bits))
        if name.endswith(".weight_format") or name in self._buffers:
            return torch.zeros(form.shape, dtype=form.dtype)
        return torch.empty(form.shape, dtype=form.dtype, device="meta")

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """The same of some rows."""
        form = self.forms[name]
        return torch.empty((stop - start, *form.shape[1:]), dtype=form.dtype, device="meta")

    def _state(self, name: str) -> bytes:
        """What bitsandbytes says about a weight beside it."""
        weight, bits = name.split(_STATE)
        shape = self._shapes[weight]
        groups = math.prod(self.forms[f"{weight}.absmax"].shape)
        sizes = [BLOCKSIZE, *(32 << doubling for doubling in range(8))]
        size = next((s for s in sizes if -(-math.prod(shape) // s) == groups), BLOCKSIZE)
        state: dict[str, Any] = {"quant_type": bits, "blocksize": size, "shape": shape}
        if f"{weight}.nested_absmax" in self.forms:
            state |= {"nested_offset": 0.0, "nested_blocksize": NESTED_BLOCKSIZE}
        return json.dumps(state).encode()

    def _named_bits(self) -> Bits | None:
        """What its tensors say: what config.json says was looked at before."""
        return self._stored_bits()

    def _entry(self, name: str) -> Entry:
        form = self.forms[name]
        return Entry(form.dtype, form.shape, 0, form.nbytes)
