"""Give every parameter of an empty module its tensor, reading and quantizing one tensor at a time.

Linears inside the blocks are packed, a few rows at a time, and replaced by `BranchLinear` (only described,
if the blocks are streamed from disk); linears outside of them (heads, poolers) become `BranchLinear`
over the stored 16/32-bit matrix, shared with the embedding if the two are tied. Embeddings stay as
stored and give float32; everything else becomes float32.
"""

from __future__ import annotations

import logging
import math
from typing import Literal

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hizoo_lite.base import Bits, ModelKind
from hizoo_lite.branches import BranchState
from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.device import is_gpu
from hizoo_lite.errors import UserError
from hizoo_lite.model.blocks import find_blocks, no_linear
from hizoo_lite.model.linear import BranchLinear
from hizoo_lite.model.names import Names
from hizoo_lite.model.offloaded import OffloadedWeight, embed_from_offloaded, from_disk, from_host
from hizoo_lite.model.scratch import Scratch
from hizoo_lite.quant import PlainWeight, from_checkpoint, pack_rows
from hizoo_lite.quant.packed import PackedWeight
from hizoo_lite.tensors import page_lock

_log = logging.getLogger(__name__)

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

Where = Literal["device", "host", "disk"]

#: What a streamed block leaves in its file, behind the name of a layer: everything that grows with the layer.
_TRAVELLING = frozenset({"weight", "weight.absmax", "weight.nested_absmax", "SCB"})

#: A parameter of a block that is no linear and no embedding may have this many elements.
SMALL_ELEMENTS = 1 << 16

#: Elements of embedding and head compared at a time if both of a tied pair are stored.
_COMPARED_ELEMENTS = 1 << 19


#: Seconds that loading takes before it has a bar.
SHOWN_AFTER = 2.0


class WeightLoader:
    """Gives every parameter of an empty module its tensor, replacing linears by `BranchLinear`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        module: nn.Module,
        kind: ModelKind,
        bits: Bits,
        double_quant: bool,
        compute: torch.dtype,
        device: torch.device,
        seed: int,
        where: Where = "device",
    ) -> None:
        """`where` the packed weights of the blocks go: to the device, to host memory, or nowhere yet."""
        self.checkpoint = checkpoint
        self.module = module
        self.kind = kind
        self.bits = bits
        self.double_quant = double_quant
        self.compute = compute
        self.device = device
        self.where = where
        self.stored_names: dict[str, str] = {}  # of the blocks' linears: name -> weight in the checkpoint
        self.names = Names(checkpoint.names(), module)
        self.blocks = find_blocks(module)
        self.state, self.scratch = BranchState(), Scratch()
        self.new: list[str] = []
        self._generator = torch.Generator().manual_seed(seed)
        self._missing: list[str] = []
        self._vocabulary = module.get_input_embeddings()  # type: ignore[operator]
        self.offloaded: dict[
            str, OffloadedWeight
        ] = {}  # large matrices outside of streamed blocks, by stored name
        self.absent: set[str] = set()  # the module's names of embeddings among them
        self._embedded: set[str] = set()  # of all embeddings
        self._embeddings: dict[str, Tensor] = {}  # by the checkpoint's name, for heads tied to them

    def fill(self) -> dict[str, BranchLinear]:
        """Fill the module on its device. Raises `UserError` if the checkpoint does not fit it."""
        self._refuse_unpackable()
        layers = list(self.module.named_modules())
        for name, layer in layers:
            if isinstance(layer, nn.Embedding):
                self._fill_embedding(name, layer)
        linears = {}
        silent = True if self.device.type == "meta" else None  # None: without a terminal
        bar = tqdm(
            layers, "loading the model", leave=False, disable=silent, delay=SHOWN_AFTER, unit=" layers"
        )
        for name, layer in bar:
            if isinstance(layer, nn.Linear | Conv1D):
                linear = self._linear(name, layer)
                if linear is not None:
                    self.module.set_submodule(name, linear)
                    linears[name] = linear
        self._fill_small()
        self._check_complete()
        self._settle()
        self.module.eval()
        return linears

    def _settle(self) -> None:
        """Computed buffers to the device; everything else is there, or will come when it is needed."""
        for name, layer in self.module.named_modules():
            if isinstance(layer, PackedWeight) and self.where != "device" and self._in_block(name):
                continue
            for leaf, buffer in layer._buffers.items():
                if isinstance(buffer, Tensor):
                    layer._buffers[leaf] = buffer.to(self.device)

    def _in_block(self, name: str) -> bool:
        return name.startswith(self.blocks.prefix + ".")

    def _refuse_unpackable(self) -> None:
        for number, block in enumerate(self.blocks.modules):
            for name, layer in block.named_modules():
                if isinstance(layer, nn.Linear | Conv1D | nn.Embedding):
                    continue
                for leaf, parameter in layer.named_parameters(recurse=False):
                    if parameter.ndim >= 3 or parameter.numel() > SMALL_ELEMENTS:
                        path = ".".join(p for p in (self.blocks.prefix, str(number), name, leaf) if p)
                        raise no_linear(self.module, path, parameter.shape)
        for name, buffer in self.module.named_buffers():
            if buffer.is_meta:
                raise UserError(
                    f"{type(self.module).__name__}: {name} is computed from a weight when the model is made, "
                    "before there are weights; this architecture is not supported"
                )

    def _fill_embedding(self, name: str, layer: nn.Embedding) -> None:
        stored = self._find(f"{name}.weight", layer.weight)
        if stored is None:
            return
        self._embedded.add(f"{name}.weight")
        if self._is_offloaded(name, stored) and layer is self._vocabulary:
            self.absent.add(f"{name}.weight")
            embed_from_offloaded(layer, self._offloaded(stored), self.state)
            layer.register_forward_hook(_output_to_float32)
            return
        if stored not in self._embeddings:
            self._embeddings[stored] = self._read_float(stored).to(self.device)
        layer.weight = nn.Parameter(self._embeddings[stored], requires_grad=False)
        layer.register_forward_hook(_output_to_float32)

    def _linear(self, name: str, layer: nn.Linear | Conv1D) -> BranchLinear | None:
        weight = self._packed(name, layer)
        if weight is None:
            return None
        bias = None
        if layer.bias is not None:
            bias = self._small(f"{name}.bias", layer.bias)
            if bias is None:
                return None
        return BranchLinear(weight, bias, self.state, self.compute, self.scratch, name)

    def _packed(self, name: str, layer: nn.Linear | Conv1D) -> PackedWeight | None:
        """The matrix of a layer, (out_features, in_features), as it is stored here; None if it is missing."""
        transposed = isinstance(layer, Conv1D)
        rows, columns = reversed(layer.weight.shape) if transposed else layer.weight.shape
        parameter = f"{name}.weight"
        stored = self.names.find(parameter) or self.names.find_tied(parameter)
        if stored is None:
            if not self._may_be_new(parameter):
                self._missing.append(parameter)
                return None
            return PlainWeight(self._initial(parameter, layer.weight))
        inside = self._in_block(name)
        if inside:
            self.stored_names[name] = stored
        if self.names.beside(stored):
            packed = self._quantized(stored, inside)
            self._check_shape(stored, packed.shape, (rows, columns))
            return packed
        self._check_shape(stored, self.checkpoint.shape(stored), tuple(layer.weight.shape))
        if self._is_offloaded(name, stored) and not transposed:
            return self._offloaded(stored)
        shared = self._tied_embedding(parameter, stored)
        if shared is not None:
            return PlainWeight(shared)
        return self._of_floats(stored, (rows, columns), inside, transposed)

    def _quantized(self, stored: str, inside: bool) -> PackedWeight:
        """A matrix that the checkpoint has quantized."""
        away = _TRAVELLING if inside and self.where == "disk" else frozenset()
        device = self._place(inside)
        tensors = {
            short: self._described(full) if short in away else self._read(full, device)
            for short, full in {**self.names.beside(stored), "weight": stored}.items()
        }
        return from_checkpoint(tensors, name=stored)

    def _of_floats(self, stored: str, shape: tuple[int, int], inside: bool, transposed: bool) -> PackedWeight:
        """A matrix that the checkpoint has in floats, quantized here if it is inside a block."""
        bits: Bits = self.bits if inside and self.checkpoint.quantized_bits is None else "none"
        dtype = self._float_dtype(stored)
        if inside and self.where == "disk":
            self._refuse_conversion(stored, bits, transposed)
            return PlainWeight(self._described(stored))
        whole = self.checkpoint.read(stored).t() if transposed else None

        def read(start: int, stop: int) -> Tensor:
            return self.checkpoint.read_rows(stored, start, stop) if whole is None else whole[start:stop]

        return pack_rows(
            read,
            shape,
            bits,
            dtype=dtype,
            double_quant=self.double_quant,
            device=self._place(inside),
            name=stored,
        )

    def _place(self, inside: bool) -> torch.device:
        """Where a matrix is brought that is inside a block, or not."""
        return self.checkpoint.device if inside and self.where != "device" else self.device

    def _is_offloaded(self, name: str, stored: str) -> bool:
        """Large matrices outside of the blocks, if the blocks stream."""
        outside = self.where != "device" and not self._in_block(name)
        is_float = self.checkpoint.dtype(stored) in (torch.bfloat16, torch.float16, torch.float32)
        return outside and is_float and math.prod(self.checkpoint.shape(stored)) > SMALL_ELEMENTS

    def _offloaded(self, stored: str) -> OffloadedWeight:
        """The one offloaded form of a stored matrix; a tied head shares the embedding's."""
        if stored not in self.offloaded:
            if self.where == "disk":
                self.offloaded[stored] = from_disk(self.checkpoint, stored)
            else:
                matrix = self.checkpoint.read(stored)
                if is_gpu(self.device):
                    page_lock(matrix, self.device)
                self.offloaded[stored] = from_host(matrix)
        return self.offloaded[stored]

    def _read(self, stored: str, device: torch.device) -> Tensor:
        """A tensor on a device; of a model that is only planned what is looked at stays where it is."""
        tensor = self.checkpoint.read(stored)
        return tensor if device.type == "meta" else tensor.to(device)

    def _described(self, stored: str) -> Tensor:
        """A tensor's shape and dtype without its values."""
        return torch.empty(self.checkpoint.shape(stored), dtype=self.checkpoint.dtype(stored), device="meta")

    def _refuse_conversion(self, stored: str, bits: Bits, transposed: bool) -> None:
        """What is streamed from disk is used as it is stored."""
        if bits == "none" and not transposed and self.checkpoint.dtype(stored) != torch.float64:
            return
        example = "nf4" if bits == "none" else bits
        raise UserError(
            f"--residency: got disk, but {self.checkpoint.folder} stores {stored} in another form than it "
            "is used in; use --residency resident or host, or quantize it once: hizoo-lite quantize "
            f"--model {self.checkpoint.folder} --bits {example} --out DIR"
        )

    def _tied_embedding(self, parameter: str, stored: str) -> Tensor | None:
        """The embedding that a head shares: the same stored tensor, or a stored copy of it."""
        if stored in self._embeddings:
            return self._embeddings[stored]
        tied = self.names.find_tied(parameter)
        if tied is None or tied not in self._embeddings:
            return None
        embedding = self._embeddings[tied]
        if embedding.is_meta:  # a model that is only planned
            return embedding
        height = max(1, _COMPARED_ELEMENTS // embedding.shape[1])
        for start in range(0, embedding.shape[0], height):
            rows = self.checkpoint.read_rows(stored, start, min(start + height, embedding.shape[0]))
            if not torch.equal(rows.to(embedding), embedding[start : start + height]):
                _log.warning("%s differs from %s, which the config ties it to; kept apart", stored, tied)
                return None
        return embedding

    def _fill_small(self) -> None:
        """Norms and other parameters, in float32, and buffers that the checkpoint has values for."""
        for name, parameter in list(self.module.named_parameters(remove_duplicate=False)):
            if parameter.is_meta and name not in self._embedded and not self._is_missing(name):
                tensor = self._small(name, parameter)
                if tensor is not None:
                    parent, _, leaf = name.rpartition(".")
                    frozen = nn.Parameter(tensor, requires_grad=False)
                    self.module.get_submodule(parent).register_parameter(leaf, frozen)
        persistent = set(self.module.state_dict())
        for name, buffer in self.module.named_buffers():
            stored = self.names.find(name) if name in persistent else None
            if stored is not None:
                self._check_shape(stored, self.checkpoint.shape(stored), tuple(buffer.shape))
                buffer.copy_(self.checkpoint.read(stored))

    def _small(self, name: str, parameter: Tensor) -> Tensor | None:
        """The float32 tensor of a parameter on the device; None, noted, if it is missing."""
        stored = self._find(name, parameter, may_be_new=True)
        if stored is not None:
            return self._read_float(stored).to(self.device, torch.float32)
        if self._may_be_new(name):
            return self._initial(name, parameter)
        return None

    def _find(self, name: str, parameter: Tensor, may_be_new: bool = False) -> str | None:
        stored = self.names.find(name) or self.names.find_tied(name)
        if stored is None:
            if not (may_be_new and self._may_be_new(name)):
                self._missing.append(name)
            return None
        self._check_shape(stored, self.checkpoint.shape(stored), tuple(parameter.shape))
        return stored

    def _may_be_new(self, name: str) -> bool:
        """Heads of classifiers, and the pooler that a checkpoint trained without one lacks."""
        return self.kind == "classifier" and (not self.names.in_trunk(name) or ".pooler." in name)

    def _initial(self, name: str, parameter: Tensor) -> Tensor:
        """A new float32 parameter: matrices normal(0, initializer_range), biases 0, norms 1."""
        self.new.append(name)
        values = torch.zeros(parameter.shape)
        if parameter.ndim >= 2:
            deviation = float(getattr(self.module.config, "initializer_range", 0.02))
            values.normal_(0.0, deviation, generator=self._generator)
        elif name.endswith("weight"):
            values.fill_(1.0)
        return values.to(self.device)

    def _read_float(self, stored: str) -> Tensor:
        return self.checkpoint.read(stored).to(self._float_dtype(stored))

    def _float_dtype(self, stored: str) -> torch.dtype:
        """The dtype that an unquantized tensor is kept in: its own, float32 for float64."""
        dtype = self.checkpoint.dtype(stored)
        if dtype not in _FLOATS:
            raise UserError(
                f"{self.checkpoint.folder}: tensor {stored} is stored as {dtype} without quantization "
                "tensors beside it; allowed are 16/32-bit floats and bitsandbytes' formats"
            )
        return torch.float32 if dtype == torch.float64 else dtype

    def _check_shape(self, stored: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if tuple(got) == tuple(wanted):
            return
        hint = ""
        if self.kind == "classifier" and not self.names.in_trunk(stored) and got[:1] != wanted[:1]:
            hint = f" (num_labels: the checkpoint's head has {got[0]} outputs)"
        raise UserError(
            f"{self.checkpoint.folder}: tensor {stored} has shape {tuple(got)}, but the configuration wants "
            f"{tuple(wanted)}{hint}"
        )

    def _is_missing(self, name: str) -> bool:
        return name in self._missing or f"{name.rpartition('.')[0]}.weight" in self._missing

    def _check_complete(self) -> None:
        if self._missing:
            more = ", ..." if len(self._missing) > 5 else ""
            raise UserError(
                f"{self.checkpoint.folder}: {len(self._missing)} tensors that {type(self.module).__name__} "
                f"needs are not in the checkpoint: {', '.join(self._missing[:5])}{more}"
            )

    def warn_of_leftovers(self) -> None:
        """Log the names of tensors that the model has no use for."""
        rest = self.names.leftovers()
        if rest:
            _log.warning(
                "%s: %d tensors are not used: %s", self.checkpoint.folder, len(rest), ", ".join(rest)
            )


def _output_to_float32(module: nn.Module, args: tuple[object, ...], output: Tensor) -> Tensor:
    return output.float()
