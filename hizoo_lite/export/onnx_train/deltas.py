"""Linear layers with parameters of every branch's own, as they are traced.

The rows of the batch are folded over the branches: the base product is computed once for all of them, what
is trained is an input, (branches, *shape) float32, and its products are batched. See `spaces/lora.py` and
`spaces/heads.py`, which these follow.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from hizoo_lite.export.onnx.linear import ExportLinear, InputValues


@final
class BranchedAdapter:
    """Adds scaling * x_k A_k' B_k'; A: (branches, rank, in), B: (branches, out, rank)."""

    def __init__(self, inputs: InputValues, scaling: float) -> None:
        self.inputs, self.scaling = inputs, scaling

    def __call__(self, x: Tensor, linear: ExportLinear) -> Tensor:
        a, b = (self.inputs.values[f"{linear.name}.lora_{side}.weight"] for side in "AB")
        inner = torch.bmm(by_branch(x, a), a.transpose(1, 2))
        own = torch.bmm(inner, b.transpose(1, 2) * self.scaling)
        return linear.base(x) + own.reshape(*x.shape[:-1], own.shape[-1])


@final
class BranchedHead:
    """A layer trained in full; weight: (branches, out, in), bias: (branches, out) or none."""

    def __init__(self, inputs: InputValues) -> None:
        self.inputs = inputs

    def __call__(self, x: Tensor, linear: ExportLinear) -> Tensor:
        weight = self.inputs.values[f"{linear.name}.weight"]
        y = torch.bmm(by_branch(x, weight), weight.transpose(1, 2))
        bias = self.inputs.values.get(f"{linear.name}.bias")
        if bias is not None:
            y = y + bias.unsqueeze(1)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def by_branch(x: Tensor, parameter: Tensor) -> Tensor:
    """x: (branches * rows, ..., features) -> (branches, rows * ..., features), as many as `parameter` has."""
    return x.reshape(parameter.shape[0], -1, x.shape[-1])
