"""What a plan is about: a model, dissected, a run's settings, and the bytes that follow from both.

Nothing here chooses; `planner.py` asks for one configuration after the other.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from hizoo_lite.base import EVALUATION, Bits, Branches, ModelKind, UserError
from hizoo_lite.config import TrainConfig
from hizoo_lite.curvature import CURVATURES
from hizoo_lite.device import choose_device, like
from hizoo_lite.estimators import make_estimator
from hizoo_lite.memory.limits import Budgets, Place
from hizoo_lite.model import build
from hizoo_lite.plan.hardware import Hardware
from hizoo_lite.plan.ledger import tensor_bytes
from hizoo_lite.plan.outline import Outline, dissect
from hizoo_lite.plan.rehearsal import Activations, Pass, Rehearsal, Trained, few_blocks
from hizoo_lite.plan.workload import Demand, Workload, cache_bytes
from hizoo_lite.process import resident
from hizoo_lite.spaces.targets import resolve_targets
from hizoo_lite.tensors import TorchArrays

#: Anonymous memory of a process that has imported a run's libraries: torch 2.13 (CPU), transformers 5.23,
#: bitsandbytes 0.50, Python 3.13; 305 MiB, measured. For machines other than this one.
FRAMEWORK_BYTES = 320_000_000
#: What the first steps add to it: kernels of oneDNN, modules that are imported late, gaps in the heap between
#: small buffers; 8 to 12 MiB, measured.
FIRST_USE_BYTES = 11 << 20
#: What drawing noise and rounding updates, tile by tile, leave in the heap; 2 to 18 MiB, measured.
DRAWING_BYTES = 8 << 20


@functools.cache
def framework_bytes() -> int:
    """Anonymous memory of this process at the first call; `hizoo_lite.run` has been imported by then."""
    return resident().anon_bytes or FRAMEWORK_BYTES


class Unknown(Exception):
    """The architecture is not one that can be rehearsed."""


class Option(NamedTuple):
    """One configuration to look at."""

    place: Place
    batch: int
    length: int
    halvings: int = 0  # of chunks and logits


class Subject:
    """What is to be planned: the model, dissected, and everything about the run that does not change."""

    def __init__(
        self,
        config: TrainConfig,
        outline: Outline,
        kind: ModelKind,
        workload: Workload,
        hardware: Hardware | None,
        framework: int | None,
    ) -> None:
        self.config, self.outline, self.kind, self.hardware = config, outline, kind, hardware
        self.workload = workload
        self.length = workload.length or config.max_length  # tokens of the longest row
        self.bits: Bits = build.choose_bits(config.bits, outline.bits)
        self.device = hardware.device if hardware else like(choose_device(config.device))
        self.compute = self._compute()
        self.budgets = self._budgets()
        self.framework = self._framework(framework)
        if self.device == "cpu":
            self.framework += FIRST_USE_BYTES
        self.in_weights = config.space != "lora"
        self.residual = config.space == "dense" and config.dense_update == "residual"
        double_quant = config.double_quant and not self.in_weights
        try:
            self.model_config = build.read_config(outline.folder, kind, num_labels=2)
            self.module = build.build(self.model_config, kind)
        except UserError as error:
            raise Unknown(str(error)) from error
        self.anatomy = dissect(outline, self.module, kind, self.bits, double_quant, self.device)
        self.trained = Trained(
            config.space,
            self._targets(),
            config.rank,
            self.residual,
            config.train_a,
        )
        self.shapes = self._trainable()
        self.trained = self.trained._replace(targets=self._leaves())
        few_blocks(self.module, self.anatomy.prefix, self.model_config)
        twice = any(len(linear.stored) == 3 for linear in self.anatomy.inside())
        self.needs_own_scales = self.in_weights and not self.residual and twice
        self.can_stream = self.bits == (outline.bits or "none") and not self.needs_own_scales
        self._rehearsals: dict[bool, Rehearsal] = {}
        self._passes: dict[tuple[Any, ...], Activations] = {}

    # ------------------------------------------------------------------------------------- settings

    def _compute(self) -> torch.dtype:
        names = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}
        if self.config.compute_dtype != "auto":
            return names[self.config.compute_dtype]
        if self.hardware is not None:
            return names[self.hardware.compute]
        return build.choose_compute("auto", choose_device(self.config.device))

    def _budgets(self) -> Budgets:
        given = Budgets.parse(self.config.device_budget, self.config.host_budget, torch.device(self.device))
        if self.hardware is None:
            return given
        device, host = self.hardware.device_budget_bytes, self.hardware.host_budget_bytes
        return Budgets(given.device_bytes or device, given.host_bytes or host or device)

    def _framework(self, given: int | None) -> int:
        if given is not None:
            return given
        if self.hardware is not None:
            return FRAMEWORK_BYTES
        return framework_bytes()

    def _targets(self) -> str:
        if self.config.targets != "auto":
            return self.config.targets
        return "all-linear" if self.in_weights else "attention"

    def _trainable(self) -> dict[str, torch.Size]:
        """Shapes of what is trained, by name: in memory or in the blocks."""
        linears = {linear.name: linear for linear in self.anatomy.linears}
        stand_in: Any = _Named(linears, self.anatomy.prefix, self.model_config)
        blocks = "all" if self.in_weights and self.config.blocks == "auto" else self.config.blocks
        chosen = resolve_targets(stand_in, self.trained.targets, blocks)
        self.chosen = chosen
        self.first_trained = min(linears[name].block or 0 for name in chosen)
        shapes: dict[str, torch.Size] = {}
        self.frozen: dict[str, torch.Size] = {}
        for name in chosen:
            rows, columns = linears[name].shape
            if self.config.space == "lora":
                held = shapes if self.config.train_a else self.frozen
                held[f"{name}.lora_A.weight"] = torch.Size((self.config.rank, columns))
                shapes[f"{name}.lora_B.weight"] = torch.Size((rows, self.config.rank))
            elif self.config.space == "dense":
                shapes[f"{name}.weight"] = torch.Size((rows, columns))
            else:
                count = rows if self.bits == "int8" else -(-rows * columns // 64)
                shapes[f"{name}.absmax"] = torch.Size((count,))
        self.heads = self._heads(linears)
        return {**shapes, **self.heads}

    def _leaves(self) -> str:
        """The last parts of what is trained: the rehearsed blocks, the first ones, have them all."""
        return ",".join(sorted({name.rsplit(".", 1)[-1] for name in self.chosen}))

    def _heads(self, linears: Mapping[str, Any]) -> dict[str, torch.Size]:
        if self.kind != "classifier":
            return {}
        trunk = str(self.module.base_model_prefix) + "."
        found = {}
        for name, linear in linears.items():
            if not name.startswith(trunk) or f"{name}.weight" in self.anatomy.outside:
                found[f"{name}.weight"] = torch.Size(linear.shape)
                if self.module.get_submodule(name).bias is not None:
                    found[f"{name}.bias"] = torch.Size(linear.shape[:1])
        return found

    # ------------------------------------------------------------------------------------ quantities

    def adapter_bytes(self) -> int:
        """Of adapters and heads in memory."""
        return self.trained_bytes() + 4 * sum(shape.numel() for shape in self.frozen.values())

    def trained_bytes(self) -> int:
        """Those of them that are trained, and have noise."""
        shapes = self.shapes if not self.in_weights else self.heads
        return 4 * sum(shape.numel() for shape in shapes.values())

    def curvature_bytes(self) -> int:
        """Of Sigma's state, from the class itself; the diagonal one is as large as the adapters."""
        if self.config.estimator == "mezo" or self.config.curvature == "none":
            return 0
        if self.config.curvature == "diagonal":
            return 4 * sum(shape.numel() for shape in self.shapes.values())
        state = CURVATURES.configured(self.config)
        state.start(self.shapes, TorchArrays())
        return tensor_bytes(vars(state))

    def weight_noise_bytes(self) -> int:
        """What drawing leaves, and of HiZOO-L the factors and the sums over rows and columns, in float64."""
        if not self.in_weights:
            return 0
        drawing = DRAWING_BYTES if self.device == "cpu" else 0
        if self.config.curvature != "factored" or self.config.estimator == "mezo":
            return drawing
        return drawing + 24 * sum(sum(shape) for name, shape in self.shapes.items() if name not in self.heads)

    def block_bytes(self, streamed: bool) -> list[int]:
        """Of every block as the run holds it."""
        extra = 2 if self.residual else 0
        if streamed:
            return self.anatomy.travel_bytes(extra)
        sizes = self.anatomy.block_bytes(extra)
        if self.in_weights and not self.residual:
            for linear in self.anatomy.inside():  # double quantization is undone
                if len(linear.stored) == 3:
                    sizes[linear.block or 0] += 3 * linear.stored[1] - linear.stored[2]
        return sizes

    def branches(self) -> Branches:
        """The most branches of a step."""
        return Branches(make_estimator(self.config).points(0))

    def shared_elements(self) -> int:
        """Of the weights below the first trained block: their products are the same in all branches."""
        inside = self.anatomy.inside()
        return sum(math.prod(x.shape) for x in inside if (x.block or 0) < self.first_trained)

    def rows(self, batch: int) -> int:
        """Token sequences of a step."""
        return batch * self.workload.training.rows

    def sites(self, batch: int, demand: Demand, length: int) -> int:
        """Positions whose logits are read: every one of lm and chat tasks, else what the examples make."""
        every = batch * demand.rows * length
        return every if self.config.task in ("lm", "chat") else min(every, batch * demand.sites)

    def eval_batch(self, batch: int) -> int:
        """Examples of an evaluation: what was asked for, less where the batch had to become smaller."""
        asked = self.config.eval_batch_size
        return asked if batch >= self.config.batch_size else min(asked, 2 * batch)

    def passes(self, option: Option) -> tuple[Activations, Activations]:
        """A step's traversal and an evaluation's."""
        away = option.place != "resident"
        at_once = -(-option.batch // self.config.accumulate)
        training = self._pass(at_once, self.workload.training, option, self.branches())
        batch = self.eval_batch(option.batch)
        evaluation = self._rehearsed(
            away, self._pass(batch, self.workload.evaluation, option, EVALUATION), None
        )
        return self._rehearsed(away, training, self.trained), self._with_cache(evaluation, batch, option)

    def _pass(self, batch: int, demand: Demand, option: Option, branches: Branches) -> Pass:
        sites = self.sites(batch, demand, option.length)
        rows, chunk = batch * demand.rows, self.config.branch_chunk
        return Pass(rows, option.length, branches, sites, chunk, option.halvings)

    def _with_cache(self, evaluation: Activations, batch: int, option: Option) -> Activations:
        """Where an evaluation writes, keys and values are beside what its passes make."""
        length = self.workload.written
        if not length:
            return evaluation
        if option.length < self.length:
            length = min(length, option.length)
        cache = cache_bytes(self.model_config, batch, length)
        worst = {**evaluation.worst, "cache": cache}
        return evaluation._replace(worst=worst, peak_bytes=evaluation.peak_bytes + cache)

    def _rehearsed(self, away: bool, wanted: Pass, trained: Trained | None) -> Activations:
        key = (away, wanted, trained)
        if key not in self._passes:
            if away not in self._rehearsals:
                self._rehearsals[away] = Rehearsal(
                    copy.deepcopy(self.module),
                    self.model_config,
                    self.kind,
                    self.anatomy,
                    self.bits,
                    self.compute,
                    self.device,
                    away,
                )
            self._passes[key] = self._rehearsals[away].run(wanted, trained)
        return self._passes[key]


class _Named(NamedTuple):
    """What `resolve_targets` asks of a model."""

    linears: Mapping[str, Any]
    block_prefix: str
    config: Any
