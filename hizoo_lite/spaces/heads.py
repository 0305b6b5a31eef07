"""Heads beside the blocks: a classifier's layers in full, or the rows of a language model's head for labels.

The gradient of a head is known exactly for the price of the base branch: it is (p - y) h', with h the hidden
states that the branch has anyway. With "exact" no branch perturbs the head, and a step moves it along that
gradient (`optimizers/exact.py`). Of several layers only the last one moves, whose gradient a journal can
keep; a new pooler below it stays as it was drawn: trained as well, it learns no more from a thousand
sentences and its loss is the worse for it (tools/LOG.md). "estimated" perturbs a classifier's head like all
else, which is what a runtime without gradients can do.

A language model that answers with label words has no head of its own. What takes its place are rows added to
its output matrix, one for every token that the answers are made of: as a LoRA adapter of the head, with A the
rows and B their places. At the start the prior of the labels is wrong first of all, and in these rows it is
mended in a few steps (tools/LOG.md).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from hizoo_lite.base import LinearDelta
from hizoo_lite.branches import BranchState
from hizoo_lite.errors import UserError
from hizoo_lite.model.model import Model

HeadMode = Literal["exact", "estimated", "none"]


def branch_values(value: Tensor, name: str | None, state: BranchState) -> Tensor:
    """The parameter at every branch: (branches, *shape) float32.

    A direction of the parameter's own shape is the only one. name: None of one that no branch perturbs.
    """
    points = state.branches.points
    out = value.expand(len(points), *value.shape)
    if name is None:
        return out
    out = out.clone()
    for branch, (direction, offset) in enumerate(points):
        if offset:
            along = state.directions[name].view(-1, *value.shape)[direction]
            out[branch].add_(along, alpha=offset * state.mu)
    return out


class HeadDelta(LinearDelta):
    """A layer trained in full: every branch has its own weight (out, in) and bias, float32.

    exact: they are the same in all branches, and have gradients; `step` is how many nats an output may then
    move by.
    """

    replaces_base = True

    def __init__(
        self, weight: Tensor, bias: Tensor | None, names: tuple[str, str], exact: bool, step: float = 1.0
    ) -> None:
        self.weight, self.bias, self.names, self.exact, self.step = weight, bias, names, exact, step

    def apply(self, x: Tensor, y: Tensor | None, state: BranchState) -> Tensor:
        weight_name, bias_name = (None, None) if self.exact else self.names
        weight = branch_values(self.weight, weight_name, state)
        if self.bias is None:
            out = torch.bmm(x, weight.transpose(1, 2))
        else:
            bias = branch_values(self.bias, bias_name, state)
            out = torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))
        if self.weight.requires_grad:
            out.register_hook(partial(state.reached, self.names[0], x.detach(), step=self.step))
            ones = torch.ones_like(x[..., :1])
            out.register_hook(partial(state.reached, self.names[1], ones, step=self.step))
        return out


def attach_head(
    model: Model,
    mode: HeadMode | None,
    parameters: dict[str, Tensor],
    exact: dict[str, Tensor],
    frozen: dict[str, Tensor],
    step: float = 1.0,
) -> list[str]:
    """Make the classification head trainable; the names of its linear layers. Nothing for another model.

    Adds its weights to `parameters`; with "exact" the last layer's to `exact` and the others' to `frozen`.
    step: see `HeadDelta`.
    """
    if mode == "none":
        return []
    found = head_layers(model)
    for name in found:
        linear = model.linears[name]
        weight = torch.empty(linear.out_features, linear.in_features, device=model.device)
        linear.weight.unpack(weight)
        names = (f"{name}.weight", f"{name}.bias")
        into = parameters if mode != "exact" else exact if name == found[-1] else frozen
        into[names[0]] = weight
        bias = None if linear.bias is None else linear.bias.clone()
        if bias is not None:
            into[names[1]] = bias
        linear.delta = HeadDelta(weight, bias, names, mode == "exact", step)
    return found


def head_layers(model: Model) -> list[str]:
    """The linear layers of a classifier's head; none of another model.

    Everything outside the trunk belongs to it, and what the checkpoint lacked (a BERT pooler).
    """
    if model.kind != "classifier":
        return []
    trunk, new = model.trunk_name + ".", set(model.new_parameters)
    return [n for n in model.linears if not n.startswith(trunk) or f"{n}.weight" in new]


def check_mode(mode: HeadMode | None) -> HeadMode | None:
    """`mode`; UserError for what is none. None: as the run's settings say, estimated without any."""
    if mode not in ("exact", "estimated", "none", None):
        raise UserError(f"--head: got {mode!r}, allowed: exact, estimated, none")
    return mode


def beside_heads(model: Model, heads: Sequence[str]) -> dict[str, Tensor]:
    """What the heads' children of the model have beside their linear layers, by name, such as norms.

    It is not trained here. PEFT, which saves a child as a whole, may have trained it.
    """
    children = tuple({name.split(".")[0] + "." for name in heads} - {model.trunk_name + "."})
    return {name: p.data for name, p in model.module.named_parameters() if name.startswith(children)}


def saved_modules(heads: Sequence[str], trunk: str, unsaved: Collection[str]) -> list[str]:
    """What PEFT is to have in full: whole children of the model, or those layers alone if some is unsaved.

    heads: linear layers. trunk: the child that is no head. unsaved: parameters that the file has not.
    """
    found = set()
    for name in heads:
        child = name.split(".")[0]
        is_whole = child != trunk and not any(other.startswith(child + ".") for other in unsaved)
        found.add(child if is_whole else name)
    return sorted(found)
