"""Classification heads, trained in full and in memory beside whatever else a space trains."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from hizoo_lite.base import LinearDelta
from hizoo_lite.branches import BranchState
from hizoo_lite.errors import UserError
from hizoo_lite.model.model import Model


def branch_values(value: Tensor, name: str, state: BranchState) -> Tensor:
    """The parameter at every branch: (branches, *shape) float32.

    A direction of the parameter's own shape is the only one.
    """
    points = state.branches.points
    out = value.expand(len(points), *value.shape).clone()
    for branch, (direction, offset) in enumerate(points):
        if offset:
            along = state.directions[name].view(-1, *value.shape)[direction]
            out[branch].add_(along, alpha=offset * state.mu)
    return out


class HeadDelta(LinearDelta):
    """A layer trained in full: every branch has its own weight (out, in) and bias, float32."""

    replaces_base = True

    def __init__(self, weight: Tensor, bias: Tensor | None, names: tuple[str, str]) -> None:
        self.weight, self.bias, self.names = weight, bias, names

    def apply(self, x: Tensor, y: Tensor | None, state: BranchState) -> Tensor:
        """See `LinearDelta.apply`."""
        weight = branch_values(self.weight, self.names[0], state)
        if self.bias is None:
            return torch.bmm(x, weight.transpose(1, 2))
        bias = branch_values(self.bias, self.names[1], state)
        return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))


def attach_head(model: Model, wanted: bool | None, parameters: dict[str, Tensor]) -> list[str]:
    """Make the classification head trainable, adding to `parameters`; the names of its linear layers.

    wanted: None means classifiers only.
    """
    if wanted is False or (wanted is None and model.kind != "classifier"):
        return []
    if model.kind != "classifier":
        raise UserError(f"head: only a classifier's head can be trained, the model is {model.kind!r}")
    found = head_layers(model)
    for name in found:
        linear = model.linears[name]
        weight = torch.empty(linear.out_features, linear.in_features, device=model.device)
        linear.weight.unpack(weight)
        names = (f"{name}.weight", f"{name}.bias")
        parameters[names[0]] = weight
        bias = None if linear.bias is None else linear.bias.clone()
        if bias is not None:
            parameters[names[1]] = bias
        linear.delta = HeadDelta(weight, bias, names)
    return found


def head_layers(model: Model) -> list[str]:
    """The linear layers of a classifier's head; none of another model.

    Everything outside the trunk belongs to it, and what the checkpoint lacked (a BERT pooler).
    """
    if model.kind != "classifier":
        return []
    trunk, new = model.trunk_name + ".", set(model.new_parameters)
    return [n for n in model.linears if not n.startswith(trunk) or f"{n}.weight" in new]


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
