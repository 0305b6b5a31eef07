"""What training in the weights is compared with: whole directions, float64 models, a fake streamer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hizoo_lite.base import Curvature
from hizoo_lite.batch import Batch
from hizoo_lite.engine.load import load
from hizoo_lite.model.model import Model
from hizoo_lite.noise import tile_normal
from hizoo_lite.quant import FourBitWeight, Int8Weight
from hizoo_lite.quant.packed import PackedWeight, Stored
from hizoo_lite.spaces.inplace import InPlaceSpace
from hizoo_lite.spaces.weights import Part
from tests.batches import reference_losses

AUTO = {
    "causal": transformers.AutoModelForCausalLM,
    "classifier": transformers.AutoModelForSequenceClassification,
}


def tiny(folder: Path, bits: str, kind: str = "causal", compute: str = "float32") -> Model:
    """The model that `save_tiny` has put into `folder`, with scales of its own."""
    return load(folder, kind=kind, bits=bits, compute_dtype=compute, device="cpu", double_quant=False)


def decoded(weight: PackedWeight) -> Tensor:
    """The true values of a weight, float32."""
    return weight.values(torch.empty(weight.shape))


def whole_z(part: Part, seed: int, step: int) -> Tensor:
    """z of a parameter, all tiles of it, float32."""
    z = torch.zeros(part.shape)
    for tile in part.tiles:
        rows = part.rows(tile)
        tile_normal(seed, step, part.name, tile.first, z[rows])
    return z


def as_matrix(part: Part, d: Tensor) -> Tensor:
    """The change of the weight matrix, float64, when the parameter moves by `d`."""
    weight = part.linear.weight
    if part.name.endswith(".weight"):
        return d.double()
    if isinstance(weight, Int8Weight):
        return weight.codes.double() / 127 * d.double()[:, None]
    assert isinstance(weight, FourBitWeight)
    halves = torch.stack((weight.codes >> 4, weight.codes & 15), dim=1).view(-1).long()
    levels = weight.table.double()[halves][: weight.shape[0] * weight.shape[1]]
    by_element = d.double().repeat_interleave(weight.blocksize)[: levels.numel()]
    return (levels * by_element).view(weight.shape)


def twin(folder: Path, model: Model) -> nn.Module:
    """The plain transformers model with the decoded weights, float64."""
    plain = AUTO[model.kind].from_pretrained(folder, attn_implementation="eager").eval().double()
    for name, layer in model.linears.items():
        plain.get_submodule(name).weight.data.copy_(decoded(layer.weight))
    return plain


def moved(plain: nn.Module, changes: dict[str, Tensor], amount: float) -> nn.Module:
    """A copy with weights W + amount * change, by the layer's name."""
    other = copy.deepcopy(plain)
    for name, change in changes.items():
        other.get_submodule(name).weight.data.add_(change, alpha=amount)
    return other


def changes(space: InPlaceSpace, seed: int, step: int, curvature: Curvature) -> dict[str, Tensor]:
    """D = Sigma^(1/2) z of every layer as a change of its matrix, float64, by the layer's name."""
    assert space.weights is not None
    return {
        part.linear.name: as_matrix(part, curvature.scale(part.name) * whole_z(part, seed, step))
        for part in space.weights.parts
    }


@torch.no_grad()
def loss(plain: nn.Module, batch: Batch) -> float:
    """The mean loss of a plain model."""
    return float(reference_losses(plain, batch).mean())


def slope_and_bend(plain: nn.Module, batch: Batch, along: dict[str, Tensor]) -> tuple[float, float]:
    """The directional derivative and d' H d by autograd, in float64."""
    names = list(along)
    weights = [plain.get_submodule(name).weight for name in names]
    for weight in plain.parameters():
        weight.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    mean = reference_losses(plain, batch).mean()
    gradient = torch.autograd.grad(mean, weights, create_graph=True)
    slope = sum((g * along[n]).sum() for g, n in zip(gradient, names, strict=True))
    product = torch.autograd.grad(slope, weights)
    bend = sum((h * along[n]).sum() for h, n in zip(product, names, strict=True))
    return float(slope.detach()), float(bend.detach())


class Streamed:
    """A residency that takes every block's stored buffers away between two uses, and counts."""

    name = "streamed"

    def __init__(self, model: Model) -> None:
        self.model, self.present, self.kept = model, None, 0
        self._home: dict[tuple[str, str], Tensor] = {}
        model.residency = self
        for block in range(len(model.blocks)):
            self._take_away(block, first=True)

    def acquire(self, block: int) -> None:
        """Views into one fresh buffer, so that what is changed without `mark_dirty` is lost."""
        assert self.present is None
        self.present = block
        for key, stored in self._stored(block):
            if key not in self._home:
                assert stored.key is None  # starts as zeros
                self._home[key] = torch.zeros(stored.tensor.shape, dtype=stored.tensor.dtype)
        homes = [self._home[key] for key, _ in self._stored(block)]
        slot = torch.empty(sum(-(-home.nbytes // 64) * 64 for home in homes), dtype=torch.uint8)
        begin = 0
        for (_, stored), home in zip(self._stored(block), homes, strict=True):
            view = slot[begin : begin + home.nbytes].view(home.dtype).view(home.shape)
            stored.owner._buffers[stored.name] = view.copy_(home)
            begin += -(-home.nbytes // 64) * 64

    def mark_dirty(self, block: int) -> None:
        """What is here now is what comes back."""
        assert self.present == block
        self.kept += 1
        for key, stored in self._stored(block):
            self._home[key] = stored.tensor.clone()

    def release(self, block: int) -> None:
        """Away."""
        assert self.present == block
        self.present = None
        self._take_away(block)

    def close(self) -> None:
        """Nothing is open."""

    def _take_away(self, block: int, first: bool = False) -> None:
        for key, stored in self._stored(block):
            if first:
                self._home[key] = stored.tensor.clone()
            stored.owner._buffers[stored.name] = stored.tensor.to("meta")

    def _stored(self, block: int) -> list[tuple[tuple[str, str], Stored]]:
        return [
            ((name, stored.name), stored)
            for name, linear in self.model.linears.items()
            if self.model.block_of(name) == block
            for stored in linear.weight.stored()
        ]


def state(model: Model) -> dict[str, Tensor]:
    """Every stored buffer of the blocks, cloned, one block after the other."""
    from hizoo_lite.engine.block import each_block

    found: dict[str, Any] = {}
    for block in each_block(model):
        for name, linear in model.linears.items():
            if model.block_of(name) == block:
                found |= {f"{name}.{s.name}": s.tensor.clone() for s in linear.weight.stored()}
    return found


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Equal names and bits."""
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
