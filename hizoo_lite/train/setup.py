"""From a configuration to everything a run is made of: data, model, space, estimator, step.

What is cheap is checked first: a wrong task or data file is reported before a model is read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from hizoo_lite.base import Curvature, Estimator, Space
from hizoo_lite.branches import EVALUATION
from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.config import TrainConfig
from hizoo_lite.device import choose_device, is_gpu
from hizoo_lite.engine.load import load
from hizoo_lite.engine.residency import Resident, Streamed
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import UserError
from hizoo_lite.memory.limits import Budgets
from hizoo_lite.model.kinds import find_kind, model_path
from hizoo_lite.model.model import Model
from hizoo_lite.plan.dry_run import pass_bytes
from hizoo_lite.plan.plan import Plan
from hizoo_lite.plan.workload import ONE_ROW, Workload, cache_bytes
from hizoo_lite.registry import SPACES
from hizoo_lite.tasks import Encoder, Records, Splits, Task
from hizoo_lite.tasks.order import output_order
from hizoo_lite.tensors import TorchArrays
from hizoo_lite.train import planning
from hizoo_lite.train.parts import data_path as data_path
from hizoo_lite.train.parts import find_task as find_task
from hizoo_lite.train.parts import learnable_splits, run_splits, task_encoder
from hizoo_lite.train.parts import make_splits as make_splits
from hizoo_lite.train.parts import make_stepper as make_stepper
from hizoo_lite.train.step import Stepper


@dataclass(frozen=True, eq=False)
class Setup:
    """The parts of a run. `config` is the one that was given, `model` what it resolved to."""

    config: TrainConfig
    model: Model
    task: Task
    splits: Splits
    encoder: Encoder
    traversal: Traversal
    space: Space
    stepper: Stepper
    plan: Plan | None  # of its memory; None where the model could not be run dry

    @property
    def halvings(self) -> int:
        """See `Parts.halvings`."""
        return self.model.halvings

    @property
    def budgets(self) -> Budgets:
        """What the run may take on the model's device; on a CPU the smaller of both budgets."""
        return budgets(self.config, self.model)


def build(
    config: TrainConfig,
    *,
    model: Model | None = None,
    space: Space | None = None,
    estimator: Estimator | None = None,
    curvature: Curvature | None = None,
    task: Task | None = None,
    data: Records | None = None,
) -> Setup:
    """Read the data, load the model, attach the space. The objects given stand in for what `config` says."""
    task = find_task(config.task) if task is None else task
    splits = run_splits(config, task, data)
    plan, workload = planned(config, task, splits, model)
    model = model or load_model(_as_planned(config, plan), task)
    encoder = make_encoder(model, task, config.max_length, config.loss)
    splits = learnable_splits(encoder, splits)
    space = space or SPACES.configured(config)
    space.attach(model, config.seed)
    traversal = Traversal(model)
    stepper = make_stepper(config, traversal, TorchArrays(model.device), space, estimator, curvature)
    if plan is not None:  # the plan's chunks, not usual ones, fit
        model.halvings = max(model.halvings, plan.halvings)
    prepare_blocks(model, config, workload, plan)
    return Setup(config, model, task, splits, encoder, traversal, space, stepper, plan)


def _as_planned(config: TrainConfig, plan: Plan | None) -> TrainConfig:
    """Where all blocks fit on a GPU they are loaded there at once, and embedding and head with them.

    Left to itself, `auto` loads for blocks that travel wherever there is a budget.
    """
    if plan is None or (config.residency, plan.residency) != ("auto", "resident"):
        return config
    return replace(config, residency="resident") if is_gpu(choose_device(config.device)) else config


def planned(
    config: TrainConfig, task: Task, splits: Splits, model: Model | None
) -> tuple[Plan | None, Workload]:
    """The plan of the run, and what its examples make; `BudgetError` where it does not fit.

    `model`: one that is loaded already, whose blocks stay where they are.
    """
    if model is None:
        source = model_path(config.model)
        kind = find_kind(source, config.revision, task) if config.kind == "auto" else config.kind
        checkpoint = Checkpoint.open(source, revision=config.revision)
    else:
        kind, checkpoint = model.kind, model.checkpoint
        if isinstance(model.residency, Resident):
            config = replace(config, residency="resident")
    encoder = planning.find_encoder(config, checkpoint, kind, task)
    workload = ONE_ROW
    if encoder is not None:
        workload = planning.workload(encoder, splits, dev=config.eval_every > 0)
    return planning.plan(config, checkpoint, kind, workload), workload


def prepare_blocks(model: Model, config: TrainConfig, workload: Workload, plan: Plan | None = None) -> None:
    """Lay out the blocks of a streamed model for passes over such examples; without a plan they evaluate.

    Raises `BudgetError` where the budget does not allow it, before anything is written.
    """
    model.branch_chunk = config.branch_chunk
    if not isinstance(model.residency, Streamed):
        return
    if model.limits.residency == "auto" and not model.residency.is_laid_out:  # of the run, not of loading
        model.residency.budget_bytes = budgets(config, model).device_bytes
    if model.residency.budget_bytes is not None:
        needed = _evaluation_bytes(model, config, workload) if plan is None else plan.pass_bytes
        model.residency.reserved_bytes = needed
    model.residency.scratch = None if config.out is None else Path(config.out)
    model.residency.prepare()


def _evaluation_bytes(model: Model, config: TrainConfig, workload: Workload) -> int:
    """What passes of an evaluation need besides the weights."""
    batch, each = config.eval_batch_size, workload.evaluation
    length = workload.length or config.max_length
    needed = pass_bytes(model, batch * each.rows, length, EVALUATION, batch * each.sites)
    return needed + (cache_bytes(model.config, batch, workload.written) if workload.written else 0)


def budgets(config: TrainConfig, model: Model) -> Budgets:
    """What the run may take on the model's device; on a CPU the smaller of both budgets."""
    return Budgets.parse(config.device_budget, config.host_budget, model.device)


def load_model(config: TrainConfig, task: Task) -> Model:
    """The model of a configuration, for a task."""
    source = model_path(config.model)
    kind = find_kind(source, config.revision, task) if config.kind == "auto" else config.kind
    return load(
        source,
        kind=kind,
        bits=config.bits,
        compute_dtype=config.compute_dtype,
        device=config.device,
        double_quant=config.double_quant and not SPACES.lines[config.space].in_weights,
        num_labels=task.num_labels or 2,
        seed=config.seed,
        revision=config.revision,
        residency=config.residency,
        device_budget=config.device_budget,
        host_budget=config.host_budget,
    )


def make_encoder(model: Model, task: Task, max_length: int, loss: str = "auto") -> Encoder:
    """The task's encoder for the model's tokenizer. UserError where the model has none."""
    if model.tokenizer is None:
        raise UserError(f"--model: {model.source} has no tokenizer files; a run needs text in and out")
    limit = min(max_length, model.positions or max_length)
    order = output_order(task, model.config.id2label) if model.kind == "classifier" else None
    encoder = task_encoder(
        model.tokenizer, model.kind, task, limit, loss, order=order, vocabulary=model.vocabulary
    )
    if model.kind == "classifier":
        # A decoder's classifier reads the last token that is not padding, and asks its config which that is.
        if model.config.pad_token_id is None:
            model.config.pad_token_id = encoder.pad_id
        elif encoder.pad_id != model.tokenizer.pad_token_id:  # the tokenizer has none that the model knows
            encoder.pad_id = model.config.pad_token_id
    return encoder
