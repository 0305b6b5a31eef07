"""A space of the tests' own: a gain for each row of the targets, y <- (1 + g) y, in memory.

It is what `extending` a space comes to: this file and a line in the registry.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hizoo_lite.base import LinearDelta, Space
from hizoo_lite.branches import BranchState
from hizoo_lite.checkpoints.adapter import PEFT_METADATA, SPACE_FILE, SPACE_FORMAT
from hizoo_lite.checkpoints.tensors import load_tensors, save_tensors
from hizoo_lite.model.model import Model
from hizoo_lite.spaces.heads import branch_values
from hizoo_lite.spaces.targets import release, resolve_targets

FILE = "gains.safetensors"


class GainDelta(LinearDelta):
    """y_k <- (1 + g_k) y_k; g: (out_features,) float32."""

    def __init__(self, gain: Tensor, name: str) -> None:
        self.gain, self.name = gain, name

    def apply(self, x: Tensor, y: Tensor | None, state: BranchState) -> Tensor:
        assert y is not None
        return y.mul_(1 + branch_values(self.gain, self.name, state).unsqueeze(1))


class Gains(Space):
    """One gain a row of every target."""

    name = "gains"
    weights = None
    frozen: dict[str, Any]
    clip = 50.0

    def __init__(self, targets: Any = "all-linear", blocks: Any = "all") -> None:
        self.targets, self.blocks = targets, "all" if blocks == "auto" else blocks
        self.parameters, self.exact, self.frozen = {}, {}, {}

    def attach(self, model: Any, seed: int, labels: Any = None) -> None:
        release(model)
        self.model: Model = model
        self.target_names = resolve_targets(model, self.targets, self.blocks)
        for target in self.target_names:
            linear, name = model.linears[target], f"{target}.gain"
            self.parameters[name] = torch.zeros(linear.out_features, device=model.device)
            linear.delta = GainDelta(self.parameters[name], name)

    def save(self, folder: Any) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self.parameters, folder / FILE, PEFT_METADATA)
        about = {"base_model": str(self.model.source), "kind": self.model.kind, "bits": self.model.bits}
        record = {"format": SPACE_FORMAT, "space": self.name, "targets": self.target_names, **about}
        (folder / SPACE_FILE).write_text(json.dumps(record))

    def load(self, folder: Any) -> None:
        for name, value in load_tensors(Path(folder) / FILE).items():
            self.parameters[name].copy_(value)
