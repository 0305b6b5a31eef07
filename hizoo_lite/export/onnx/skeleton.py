"""A loaded model without its weights, ready to be traced, and the `Part`s that its tensors are read from."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hizoo_lite.base import PackedWeight, UserError
from hizoo_lite.export.onnx.linear import (
    ExportLinear,
    FourBitProduct,
    Int8Mode,
    Int8Product,
    Part,
    PlainProduct,
    Product,
)
from hizoo_lite.model import skeleton
from hizoo_lite.model.linear import BranchLinear
from hizoo_lite.model.model import Model
from hizoo_lite.model.names import Names
from hizoo_lite.quant import FourBitWeight, Int8Weight, PlainWeight, from_checkpoint
from hizoo_lite.quant.away import AwayWeight


@final
@dataclass(frozen=True, eq=False)
class Skeleton:
    """module: the Hugging Face model; its tensors are fakes of `mode`. parts: by their names in it."""

    module: nn.Module
    linears: dict[str, ExportLinear]
    parts: dict[str, Part]
    mode: FakeTensorMode


def make_skeleton(model: Model, int8: Int8Mode) -> Skeleton:
    """The model's architecture with an `ExportLinear` for every linear; nothing is read.

    Every value will be the loaded model's own: from its tensors, or where blocks are away from its files.
    Raises `UserError` where a layer has a form that cannot be exported.
    """
    source = _Source(model)
    module = skeleton.build(copy.deepcopy(model.config), model.kind)
    linears = {}
    for name, linear in model.linears.items():
        linears[name] = ExportLinear(name, _product(source, linear, int8), source.bias(linear))
        module.set_submodule(name, linears[name])
    for layer in module.modules():
        if isinstance(layer, nn.Embedding):
            layer.register_forward_hook(_output_to_float32)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return Skeleton(module, linears, _fake(module, source, mode), mode)


def _product(source: _Source, linear: BranchLinear, int8: Int8Mode) -> Product:
    weight = linear.weight

    def read() -> PackedWeight:
        return source.packed(linear)

    if isinstance(weight, FourBitWeight):
        return FourBitProduct(weight, read)
    if isinstance(weight, Int8Weight):
        return Int8Product(weight, read, int8)
    if isinstance(weight, PlainWeight | AwayWeight):
        return PlainProduct(source.matrix(linear, weight))
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
    """Where the values of a loaded model's tensors are."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._names = Names(model.checkpoint.names(), model.module)

    def packed(self, linear: BranchLinear) -> PackedWeight:
        """The weight itself, or a copy from the checkpoint while its block is away."""
        if not any(stored.tensor.is_meta for stored in linear.weight.stored()):
            return linear.weight
        checkpoint, stored_name = self.model.checkpoint, self.model.stored_names[linear.name]
        beside = {**self._names.beside(stored_name), "weight": stored_name}
        tensors = {short: checkpoint.read(full) for short, full in beside.items()}
        return from_checkpoint(tensors, name=stored_name)

    def matrix(self, linear: BranchLinear, weight: PlainWeight | AwayWeight) -> Part:
        """A weight in 16 or 32 bits; shared with the embedding that it is tied to."""
        if isinstance(weight, AwayWeight):
            return self._stored_part(self._stored(f"{linear.name}.weight"))
        if weight.weight.is_meta:
            return self._stored_part(self.model.stored_names[linear.name])
        return _here(weight.weight)

    def bias(self, linear: BranchLinear) -> Part | None:
        """The bias of a linear; it never is away."""
        return None if linear.bias is None else _here(linear.bias)

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
