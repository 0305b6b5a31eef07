"""What the settings of a run mean for its model: each question has one answer, found when first asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from hizoo_lite.base import Bits, ModelKind
from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.config import TrainConfig
from hizoo_lite.device import choose_device
from hizoo_lite.engine.load import load
from hizoo_lite.engine.residency import Resident
from hizoo_lite.memory.limits import Budgets, ResidencyName
from hizoo_lite.model.build import choose_bits, choose_compute, compute_name
from hizoo_lite.model.kinds import find_kind, model_path
from hizoo_lite.model.model import Model
from hizoo_lite.registry import SPACES
from hizoo_lite.tasks import Task


@dataclass(frozen=True, eq=False)
class Resolved:
    """Settings with a task and, if one is loaded already, the model, which then answers for itself."""

    config: TrainConfig
    task: Task
    loaded: Model | None = None

    def with_config(self, config: TrainConfig) -> Resolved:
        """The same with other settings, of which the answers that were found do not depend."""
        made = replace(self, config=config)
        found = {name: answer for name, answer in vars(self).items() if name not in (*vars(made), "settings")}
        vars(made).update(found)
        return made

    @cached_property
    def source(self) -> str:
        """The folder or hub id of the model."""
        return model_path(self.config.model)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Its files."""
        if self.loaded is not None:
            return self.loaded.checkpoint
        return Checkpoint.open(self.source, revision=self.config.revision)

    @cached_property
    def kind(self) -> ModelKind:
        """The kind of model; a bare trunk is a classifier if the task has classes."""
        if self.loaded is not None:
            return self.loaded.kind
        if self.config.kind != "auto":
            return self.config.kind
        return find_kind(self.source, self.config.revision, self.task)

    @cached_property
    def bits(self) -> Bits:
        """The stored form of the blocks' linears."""
        if self.loaded is not None:
            return self.loaded.bits
        return choose_bits(self.config.bits, self.checkpoint.quantized_bits)

    @property
    def why_bits(self) -> str:
        """Why the blocks' linears have this stored form."""
        if self.checkpoint.quantized_bits is not None:
            return f"{self.bits}: the checkpoint is stored so"
        if self.config.bits is not None:
            form = "not quantized" if self.bits == "none" else f"quantized to {self.bits} on loading"
            return f"{form} (--bits, or the run's setting)"
        return f"{self.bits}: the default of --bits; with --bits none weights stay as the checkpoint has them"

    @cached_property
    def device(self) -> torch.device:
        """Where it computes."""
        return choose_device(self.config.device) if self.loaded is None else self.loaded.device

    @cached_property
    def compute(self) -> torch.dtype:
        """Of matrix products."""
        if self.loaded is not None:
            return self.loaded.compute
        return choose_compute(self.config.compute_dtype, self.device)

    @cached_property
    def double_quant(self) -> bool:
        """Whether scales are quantized as well, which those of a space inside the weights cannot be."""
        return self.config.double_quant and not SPACES.lines[self.config.space].in_weights

    @cached_property
    def budgets(self) -> Budgets:
        """What the run may take; on a CPU the smaller of both budgets."""
        return Budgets.parse(self.config.device_budget, self.config.host_budget, self.device)

    @cached_property
    def residency(self) -> ResidencyName:
        """Where the blocks may be: of a loaded model whose blocks are all there, there."""
        is_here = self.loaded is not None and isinstance(self.loaded.residency, Resident)
        return "resident" if is_here else self.config.residency

    @cached_property
    def settings(self) -> TrainConfig:
        """The settings with these answers in place of what was left open; what a run folder records."""
        compute = compute_name(self.compute)
        return replace(self.config, kind=self.kind, bits=self.bits, compute_dtype=compute)

    def model(self, residency: ResidencyName | None = None) -> Model:
        """The model: the loaded one, or as these settings load it, with its blocks where `residency` says."""
        if self.loaded is not None:
            return self.loaded
        return load(
            self.source,
            kind=self.kind,
            bits=self.config.bits,
            compute_dtype=self.config.compute_dtype,
            device=self.config.device,
            double_quant=self.double_quant,
            num_labels=self.task.num_labels or 2,
            seed=self.config.seed,
            revision=self.config.revision,
            residency=residency or self.config.residency,
            device_budget=self.config.device_budget,
            host_budget=self.config.host_budget,
            chat_template=self.config.chat_template,
        )
