"""The training graph: per-branch, per-example losses of a batch, as `engine/traversal.py` computes them.

The Hugging Face forward is traced as a whole; its trunk gives the head hidden states at the sites alone, so
that logits are there only where a label is. Every size is dynamic: branches, rows, length, sites, scored
tokens, slots, examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from hizoo_lite.batch import Batch, Losses
from hizoo_lite.edge.graph import COMPARED, DIVERGENCES, LOSSES, SCORES
from hizoo_lite.engine.head import with_hidden
from hizoo_lite.export.onnx.interface import encoder_inputs
from hizoo_lite.export.onnx.linear import InputValues
from hizoo_lite.export.onnx.skeleton import Skeleton
from hizoo_lite.export.onnx.trace import Input
from hizoo_lite.export.onnx_train.deltas import BranchedAdapter, BranchedHead, by_branch
from hizoo_lite.model.model import Model
from hizoo_lite.spaces import LoRA
from hizoo_lite.tasks.collate import Loss
from hizoo_lite.tasks.losses import class_losses, sides, slot_losses
from hizoo_lite.tensors import TorchArrays

OUTPUTS = (LOSSES, SCORES, DIVERGENCES)
#: Sizes of the example's dynamic dimensions: above 1, and all different.
_SIZES = {
    "branches": 3,
    "rows": 4,
    "length": 6,
    "sites": 7,
    "scored": 11,
    "slots": 5,
    "examples": 2,
    "directions": 8,
}
#: The dimensions of a batch's arrays.
_TOKENS = ("rows", "length")
_PLACES = {
    "site_row": "sites",
    "site_position": "sites",
    "token_site": "scored",
    "token_id": "scored",
    "token_slot": "scored",
    "slot_example": "slots",
    "gold": "examples",
}


class TrainInterface(NamedTuple):
    """A module to trace, with the skeleton's module as its child `hf`, and what it is called with."""

    wrapper: nn.Module
    inputs: list[Input]


def train_interface(
    model: Model, skeleton: Skeleton, space: LoRA, loss: Loss, *, token_types: bool
) -> TrainInterface:
    """That of a model with `space` attached: the batch's arrays, then the parameters by PEFT name.

    token_types: whether the tokenizer makes them; they are an input if the model has several, too.
    """
    values = InputValues()
    tokens = [name for name in encoder_inputs(model) if token_types or name != "token_type_ids"]
    inputs = [_integers(name, *_TOKENS) for name in tokens]
    if model.kind == "classifier":
        inputs.append(_integers("gold", "rows"))  # a row is an example
    else:
        inputs += [_integers(name, size) for name, size in _PLACES.items()]
    inputs.append(Input(COMPARED, torch.zeros(_SIZES["directions"], 2, dtype=torch.int64), {0: "directions"}))
    tensors = {**space.frozen, **space.exact, **space.parameters}
    inputs += [_parameter(name, value) for name, value in tensors.items()]
    for name in space.adapted:
        skeleton.linears[name].delta = BranchedAdapter(values, space.scaling)
    for name in space.head_names:
        skeleton.linears[name].delta = BranchedHead(values)
    module = skeleton.module
    if model.kind != "classifier":
        trunk = module.get_submodule(model.trunk_name)
        picked = _AtSites(values, next(iter(space.parameters)))
        getattr(trunk, "decoder", trunk).register_forward_hook(picked)  # OPT asks its trunk's decoder
    no_cache = {"use_cache": False} if model.kind == "causal" else {}
    names = [given.name for given in inputs]
    return TrainInterface(_Losses(module, values, names, tokens, no_cache, loss), inputs)


@final
class _AtSites:
    """Replaces the trunk's hidden states by those at the sites: (branches, sites, features)."""

    def __init__(self, inputs: InputValues, parameter: str) -> None:
        self.inputs, self.parameter = inputs, parameter

    def __call__(self, trunk: nn.Module, args: object, output: Sequence[Tensor]) -> Any:
        values, hidden = self.inputs.values, output[0]
        places = values["site_row"] * hidden.shape[1] + values["site_position"]
        picked = by_branch(hidden, values[self.parameter]).index_select(1, places)
        return with_hidden(output, picked)


@final
class _Losses(nn.Module):
    """Losses and scores of every branch, and how far apart the predictions of compared ones are; float64."""

    def __init__(
        self,
        hf: nn.Module,
        inputs: InputValues,
        names: Sequence[str],
        tokens: Sequence[str],
        no_cache: Mapping[str, bool],
        loss: Loss,
    ) -> None:
        super().__init__()
        self.hf, self.inputs, self.names, self.tokens = hf, inputs, list(names), list(tokens)
        self.no_cache, self.loss = dict(no_cache), loss

    def forward(self, *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """given: the inputs, in order.

        (branches, examples); (branches, slots or examples, classes); (directions, examples).
        """
        values = self.inputs.values = dict(zip(self.names, given, strict=True))
        batch = Batch._make(values.get(field) for field in Batch._fields)._replace(loss=self.loss)
        branches, compared = given[-1].shape[0], values[COMPARED]
        folded = {name: values[name].repeat(branches, 1) for name in self.tokens}
        logits = self.hf(**folded, **self.no_cache).logits
        if self.loss == "class":
            wide = by_branch(logits, given[-1]).double()
            return _outputs(class_losses(_ARRAYS, wide, batch.gold, compared))
        wide = logits.double()
        normalizer = torch.logsumexp(wide, dim=-1)
        scored = _log_probabilities(logits, normalizer, batch)
        between = _between_sites(wide, normalizer, compared) if self.loss == "answer" else scored
        return _outputs(slot_losses(_ARRAYS, scored, between, batch, compared))


@final
class _TracedArrays(TorchArrays):
    """torch as it is traced: which branches are compared is an input."""

    def rows(self, values: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        return values.index_select(0, index)

    def last_sums(self, values: Tensor) -> Tensor:
        """A product: onnxruntime's sum over an axis of a tensor without elements keeps that axis."""
        return torch.matmul(values.unsqueeze(-2), torch.ones_like(values).unsqueeze(-1)).flatten(1)


_ARRAYS = _TracedArrays()


def _outputs(losses: Losses) -> tuple[Tensor, Tensor, Tensor]:
    return losses.per_example, losses.scores, losses.divergences


def _between_sites(wide: Tensor, normalizer: Tensor, compared: Tensor) -> Tensor:
    """Divergences over the vocabulary, in few tensors of its size: (directions, sites).

    wide: logits, (branches, sites, vocabulary) float64. As a product of p - q and log p - log q: onnxruntime
    makes no tensor of terms, and in an evaluation, which compares nothing, nothing at all.
    """
    (one, other), (of_one, of_other) = (
        sides(_ARRAYS, values, compared) for values in (wide, normalizer.unsqueeze(-1))
    )
    more, moved = (one - of_one).exp() - (other - of_other).exp(), one - other
    moved = torch.where(moved.isnan(), torch.zeros_like(moved), moved)  # impossible in both: -inf less -inf
    apart = torch.matmul(more.unsqueeze(-2), moved.unsqueeze(-1))
    return apart.clamp_min(0.0).flatten(1)  # it rounds, terms do not


def _log_probabilities(logits: Tensor, normalizer: Tensor, batch: Batch) -> Tensor:
    """Of every scored token. logits: (branches, sites, vocabulary) float32 -> (branches, scored) float64."""
    site, token = batch.token_site, batch.token_id
    chosen = logits.flatten(1).index_select(1, site * logits.shape[-1] + token)
    return chosen.double() - normalizer.index_select(1, site)


def _integers(name: str, *dimensions: str) -> Input:
    example = torch.zeros([_SIZES[size] for size in dimensions], dtype=torch.int64)
    return Input(name, example, dict(enumerate(dimensions)))


def _parameter(name: str, value: Tensor) -> Input:
    return Input(name, torch.zeros(_SIZES["branches"], *value.shape), {0: "branches"})
