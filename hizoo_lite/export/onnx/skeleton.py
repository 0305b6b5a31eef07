"""A loaded model without its weights, ready to be traced, and the `Part`s that its tensors are read from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hizoo_lite.errors import UserError
from hizoo_lite.export.onnx.linear import (
    ExportLinear,
    Format,
    FourBitProduct,
    Int8Product,
    Part,
    PlainProduct,
    Product,
    RecodedProduct,
    SumProduct,
    residual,
)
from hizoo_lite.model import build
from hizoo_lite.model.linear import BranchLinear
from hizoo_lite.model.model import Model
from hizoo_lite.model.names import Names
from hizoo_lite.model.offloaded import OffloadedWeight
from hizoo_lite.quant import FourBitWeight, Int8Weight, PlainWeight, from_checkpoint
from hizoo_lite.quant.packed import PackedWeight
from hizoo_lite.spaces.changes import Changes


@final
@dataclass(frozen=True, eq=False)
class Skeleton:
    """module: the Hugging Face model; its tensors are fakes of `mode`. parts: by their names in it."""

    module: nn.Module
    linears: dict[str, ExportLinear]
    parts: dict[str, Part]
    mode: FakeTensorMode


def make_skeleton(model: Model, format: Format = "exact", changes: Changes | None = None) -> Skeleton:
    """The model's architecture with an `ExportLinear` for every linear; nothing is read.

    Every value will be the loaded model's own, from its tensors, or from its files if it streams;
    of layers in `changes`, what was tuned. Raises `UserError` if a layer has a form that cannot be
    exported.
    """
    source = _Source(model, changes)
    module = build.build(copy.deepcopy(model.config), model.kind)
    linears = {}
    for name, linear in model.linears.items():
        linears[name] = ExportLinear(name, _product(source, linear, format), source.bias(linear))
        module.set_submodule(name, linears[name])
    for layer in module.modules():
        if isinstance(layer, nn.Embedding):
            layer.register_forward_hook(_output_to_float32)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return Skeleton(module, linears, _fake(module, source, mode), mode)


def _product(source: _Source, linear: BranchLinear, format: Format) -> Product:
    if format == "fast" and isinstance(linear.weight, FourBitWeight):  # with its difference, if it has one
        return RecodedProduct(linear.weight.shape, lambda: source.packed(linear))
    if not source.has_residual(linear):
        return _stored_product(source, linear, lambda: source.packed(linear), format)
    codes = _stored_product(source, linear, lambda: residual(source.packed(linear)).base, format)
    shape = linear.weight.shape
    return SumProduct(codes, Part(shape, torch.bfloat16, lambda: residual(source.packed(linear)).residual))


def _stored_product(
    source: _Source, linear: BranchLinear, read: Callable[[], PackedWeight], format: Format
) -> Product:
    weight = linear.weight
    if isinstance(weight, FourBitWeight):
        return FourBitProduct(weight, read)
    if isinstance(weight, Int8Weight):
        return Int8Product(weight, read, format)
    if isinstance(weight, PlainWeight | OffloadedWeight):
        return PlainProduct(source.matrix(linear, weight, read), is_whole=format == "fast")
    raise UserError(f"{linear.name}: a weight of the form {type(weight).__name__} cannot be exported")


def _fake(module: nn.Module, source: _Source, mode: FakeTensorMode) -> dict[str, Part]:
    """Give every tensor of the module a fake in its place; the parts by name."""
    parts = {}
    for path, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, ExportLinear | Product):
            own = dict(layer.parts)
        else:
            names = [*layer._parameters, *layer._buffers]
            own = {n: source.part(_join(path, n)) for n in names if getattr(layer, n) is not None}
        for name, part in own.items():
            parts[_join(path, name)] = part
            with mode:
                fake = torch.empty(part.shape, dtype=part.dtype)
            if name in layer._parameters:
                layer._parameters[name] = nn.Parameter(fake, requires_grad=False)
            else:
                layer.register_buffer(name, fake)
    return parts


class _Source:
    """Where the values of a loaded model's tensors are, and of those that were changed."""

    def __init__(self, model: Model, changes: Changes | None) -> None:
        self.model, self._changes = model, changes
        self._names = Names(model.checkpoint.names(), model.module)

    def has_residual(self, linear: BranchLinear) -> bool:
        """Whether a difference was tuned beside the weight."""
        return self._changes is not None and linear.name in self._changes.residuals

    def packed(self, linear: BranchLinear) -> PackedWeight:
        """The weight itself, or a copy from the checkpoint while its block is not here or it was changed."""
        weight = linear.weight
        if any(stored.tensor.is_meta for stored in weight.stored()):
            weight = self._read(self.model.stored_names[linear.name])
        elif self._is_changed(linear):
            weight = copy.deepcopy(weight)
        return self._changes.weight(linear.name, weight) if self._changes is not None else weight

    def _read(self, stored_name: str) -> PackedWeight:
        checkpoint, beside = self.model.checkpoint, self._names.beside(stored_name)
        if not beside:
            return PlainWeight(checkpoint.read(stored_name))
        tensors = {s: checkpoint.read(full) for s, full in {**beside, "weight": stored_name}.items()}
        return from_checkpoint(tensors, name=stored_name)

    def _is_changed(self, linear: BranchLinear) -> bool:
        return self._changes is not None and linear.name in self._changes.linears

    def matrix(
        self, linear: BranchLinear, weight: PlainWeight | OffloadedWeight, read: Callable[[], PackedWeight]
    ) -> Part:
        """A weight in 16 or 32 bits; shared with the embedding that it is tied to. `read`: a changed one."""
        tuned = self._head(f"{linear.name}.weight")
        if tuned is not None:
            return _here(tuned)
        if isinstance(weight, OffloadedWeight):
            return self._stored_part(self._stored(f"{linear.name}.weight"))
        if self._is_changed(linear):
            return Part(weight.shape, weight.weight.dtype, lambda: read().get_buffer("weight"))
        if weight.weight.is_meta:
            return self._stored_part(self.model.stored_names[linear.name])
        return _here(weight.weight)

    def bias(self, linear: BranchLinear) -> Part | None:
        """The bias of a linear; it never is offloaded."""
        tuned = self._head(f"{linear.name}.bias")
        if tuned is not None:
            return _here(tuned)
        return None if linear.bias is None else _here(linear.bias)

    def _head(self, name: str) -> Tensor | None:
        """A head's tensor that was tuned in full."""
        return self._changes.heads.get(name) if self._changes is not None else None

    def part(self, name: str) -> Part:
        """A parameter or buffer that is of no linear layer."""
        owner, _, leaf = name.rpartition(".")
        tensor = getattr(self.model.module.get_submodule(owner), leaf)
        if not tensor.is_meta:
            return _here(tensor)
        return self._stored_part(self._stored(name))

    def _stored_part(self, stored: str) -> Part:
        checkpoint = self.model.checkpoint
        shape, dtype = checkpoint.shape(stored), checkpoint.dtype(stored)
        return Part(shape, dtype, lambda: checkpoint.read(stored), stored)

    def _stored(self, name: str) -> str:
        stored = self._names.find(name) or self._names.find_tied(name)
        assert stored is not None, name
        return stored


def _here(tensor: Tensor) -> Part:
    """A tensor in memory. `shared` is the memory, so that tied tensors are recognized."""
    return Part(
        tuple(tensor.shape), tensor.dtype, lambda: tensor.detach().cpu(), (tensor.data_ptr(), tensor.shape)
    )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _output_to_float32(module: nn.Module, args: tuple[object, ...], output: Tensor) -> Tensor:
    return output.float()
