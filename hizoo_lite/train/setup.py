"""From a configuration to everything a run is made of: data, model, space, estimator, step.

What is cheap is checked first: a wrong task or data file is reported before a model is read.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import torch

from hizoo_lite import objectives
from hizoo_lite.base import Curvature, Estimator, Objective, Space
from hizoo_lite.batch import Example
from hizoo_lite.branches import EVALUATION
from hizoo_lite.config import AXES, TrainConfig, by_members, default
from hizoo_lite.device import is_gpu
from hizoo_lite.engine.hidden import first_trained, worth_keeping
from hizoo_lite.engine.residency import Streamed
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import UserError
from hizoo_lite.memory.limits import ResidencyName
from hizoo_lite.model.model import Model
from hizoo_lite.plan.dry_run import pass_bytes
from hizoo_lite.plan.plan import Plan
from hizoo_lite.plan.workload import ONE_ROW, Workload, cache_bytes
from hizoo_lite.registry import SPACES
from hizoo_lite.tasks import Encoder, Records, Splits, Task
from hizoo_lite.tasks.task import part_of
from hizoo_lite.tasks.tokens import usable_length
from hizoo_lite.tensors import TorchArrays
from hizoo_lite.train import checkpoint, planning
from hizoo_lite.train.compared import Compared, given_by
from hizoo_lite.train.components import (
    learnable_splits,
    make_stepper,
    run_splits,
    steps_of,
    task_encoder,
    usable_splits,
)
from hizoo_lite.train.folder import RunFolder
from hizoo_lite.train.resolved import Resolved
from hizoo_lite.train.step import Stepper

_log = logging.getLogger(__name__)

#: Settings that say how gradients are estimated, and what is made of the estimates.
_OF_ESTIMATES = (
    *("estimator", "curvature", "curvature_from", "curvature_mode", "curvature_per", "curvature_every"),
    *("directions", "mu", "smoothing", "smoothing_schedule", "clip", "weight_decay", "train_a"),
)


@dataclass(frozen=True, eq=False, repr=False)
class Setup:
    """The parts of a run. `resolved` is what was given and what it means."""

    resolved: Resolved
    model: Model
    splits: Splits
    encoder: Encoder
    traversal: Traversal
    space: Space
    stepper: Stepper
    plan: Plan | None  # of its memory; None if the model could not be run dry
    objective: Objective

    @property
    def config(self) -> TrainConfig:
        """The settings that were given."""
        return self.resolved.config

    @property
    def task(self) -> Task:
        """What the examples are put to the model for."""
        return self.resolved.task

    @property
    def chunk_halvings(self) -> int:
        """See `Components.chunk_halvings`."""
        return self.model.chunk_halvings


def build(
    resolved: Resolved,
    *,
    space: Space | None = None,
    estimator: Estimator | None = None,
    curvature: Curvature | None = None,
    objective: Objective | None = None,
    data: Records | None = None,
) -> Setup:
    """Read the data, load the model, attach the space. The objects given stand in for what settings say."""
    config, task = resolved.config, resolved.task
    objective = objective or objectives.configured(config)
    given = given_by(objective, task, resolved.kind, config.loss)
    splits = run_splits(config, task.with_rows() if objective.of_row else task, data)
    before = planning.find_encoder(resolved)
    if before is not None:
        splits = usable_splits(before, splits, config)
    config = steps_of(config, splits)
    resolved = resolved.with_config(config)
    plan, workload = planned(resolved, splits, before)
    model = resolved.model(_residency(resolved, plan))
    encoder = make_encoder(model, task, config.max_length, config.loss)
    if before is None or encoder.max_length < before.max_length:
        splits = usable_splits(encoder, splits, config)
    splits = learnable_splits(encoder, splits)
    space = SPACES.complete(space or SPACES.configured(config), config)
    labels = _label_tokens(config, encoder, splits)
    space.attach(model, config.seed, labels)
    _say_if_too_many(config, labels or ())
    _say_what_is_unused(config)
    traversal = Traversal(model)
    losses = traversal if given is None else Compared(objective, traversal, encoder, given)
    stepper = make_stepper(config, losses, TorchArrays(model.device), space, estimator, curvature)
    if plan is not None:  # the plan's chunks, not usual ones, fit
        model.chunk_halvings = max(model.chunk_halvings, plan.chunk_halvings)
    if isinstance(model.residency, Streamed) and keeps_hidden_states(config, splits, space, model):
        model.residency.mostly_from = first_trained(model)
    prepare_blocks(model, resolved, workload, plan)
    return Setup(resolved, model, splits, encoder, traversal, space, stepper, plan, objective)


def calibrate(setup: Setup) -> None:
    """Show the space, if it asks for them, the first training examples, as many as a pass of a step has.

    Of several tasks they come by turns, and there is one of each.

    All ranks look at the same ones, and take what the main one has found: others may round otherwise.
    """
    space, estimator = setup.space, setup.stepper.estimator
    if not space.calibrates:
        return
    if space.without_losses and estimator.secret:
        raise UserError(
            f"--space: what {space.name} trains is chosen by gradients of the examples, which are no noisy "
            f"sums; allowed with --estimator {estimator.name}: {space.without_losses}"
        )
    together = max(-(-setup.config.batch_size // setup.config.accumulate), len(setup.task.parts))
    examples = _by_turns(setup.splits.train)[:together]
    encoded = [setup.encoder.encode(example, training=True) for example in examples]
    batch = setup.encoder.collate(encoded)._replace(made_of=tuple(examples))
    setup.space.calibrate(setup.traversal, batch)
    ranks = setup.stepper.ranks
    for value in setup.space.frozen.values() if ranks.count > 1 else ():
        mine = value.cpu().double().numpy()
        value.copy_(torch.from_numpy(ranks.sum(mine if ranks.is_main else np.zeros_like(mine))))


def _by_turns(examples: Sequence[Example]) -> list[Example]:
    """One of each task after the other."""
    parts: dict[int, list[Example]] = {}
    for example in examples:
        parts.setdefault(part_of(example), []).append(example)
    turns = chain.from_iterable(zip_longest(*parts.values()))
    return [example for example in turns if example is not None]


def keeps_hidden_states(config: TrainConfig, splits: Splits, space: Space, model: Model) -> bool:
    """Whether a new run keeps those of its training examples."""
    drawn = config.steps * config.batch_size
    return config.hidden_states == "auto" and worth_keeping(model, space, drawn, len(splits.train))


def _label_tokens(config: TrainConfig, encoder: Encoder, splits: Splits) -> list[int] | None:
    """Tokens with rows of the head; a run that was begun without any, by an older program, has none."""
    labels = encoder.label_tokens(splits.train, config.rank)
    if not (labels and config.resume and config.out):
        return labels
    for path in checkpoint.every(RunFolder(config.out).checkpoints):
        with suppress(UserError):  # it is damaged, as is said later
            return labels if checkpoint.exact_shapes(path) else None
    return labels


def _say_if_too_many(config: TrainConfig, labels: Sequence[int]) -> None:
    """Tokens that have no rows of the head, though they would have been wanted."""
    has_rows = config.head == "exact" and config.space in SPACES.having("rank")
    if has_rows and config.exact_blocks == 0 and len(labels) > config.rank:
        _log.warning(
            "--head: answers begin with %d tokens, an adapter of --rank %d has no rows for as many",
            *(len(labels), config.rank),
        )


def _say_what_is_unused(config: TrainConfig) -> None:
    """Settings that were given and that nothing reads: of members that are not there, or of estimates."""
    if config.estimates:
        unread = {
            field
            for axis in AXES
            for field, setting in axis.settings.items()
            if getattr(config, field) != setting.default
            and getattr(config, axis.axis) not in axis.having(field)
        }
        if unread:
            named = ", ".join("--" + name.replace("_", "-") for name in sorted(unread))
            _log.warning("these are settings of other methods, and not used: %s", named)
        return
    left = by_members(config)
    given = [name for name in _OF_ESTIMATES if getattr(config, name) != left.get(name, default(name))]
    if given:
        _log.warning(
            "--exact-blocks: nothing is estimated, so these are not used: %s",
            ", ".join("--" + name.replace("_", "-") for name in given),
        )


def _residency(resolved: Resolved, plan: Plan | None) -> ResidencyName:
    """Where all blocks fit on a GPU they are loaded there at once, and embedding and head with them.

    Left to itself, `auto` loads for blocks that travel wherever there is a budget.
    """
    wanted = resolved.config.residency
    fits = plan is not None and (wanted, plan.residency) == ("auto", "resident")
    return "resident" if fits and is_gpu(resolved.device) else wanted


def planned(resolved: Resolved, splits: Splits, encoder: Encoder | None) -> tuple[Plan | None, Workload]:
    """The plan of the run, and what its examples make; `BudgetError` if it does not fit."""
    workload = ONE_ROW
    if encoder is not None:
        workload = planning.workload(encoder, splits, resolved.config)
    return planning.plan(resolved, workload), workload


def prepare_blocks(model: Model, resolved: Resolved, workload: Workload, plan: Plan | None = None) -> None:
    """Lay out the blocks of a streamed model for passes over such examples; without a plan they evaluate.

    Raises `BudgetError` if the budget does not allow it, before anything is written.
    """
    config = resolved.config
    model.branch_chunk = config.branch_chunk
    if not isinstance(model.residency, Streamed):
        return
    if model.limits.residency == "auto" and not model.residency.is_laid_out:  # of the run, not of loading
        model.residency.budget_bytes = resolved.budgets.device_bytes
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


def make_encoder(model: Model, task: Task, max_length: int, loss: str = "auto") -> Encoder:
    """The task's encoder for the model's tokenizer. UserError if the model has none."""
    if model.tokenizer is None:
        raise UserError(f"--model: {model.source} has no tokenizer files; a run needs text in and out")
    limit = usable_length(max_length, model.positions)
    classes = model.config.id2label if model.kind == "classifier" else None
    encoder = task_encoder(
        model.tokenizer, model.kind, task, limit, loss, classes=classes, vocabulary=model.vocabulary
    )
    if model.kind == "classifier":
        # A decoder's classifier reads the last token that is not padding, and asks its config which that is.
        if model.config.pad_token_id is None:
            model.config.pad_token_id = encoder.pad_id
        elif encoder.pad_id != model.tokenizer.pad_token_id:  # the tokenizer has none that the model knows
            for one in (encoder, *encoder.parts):
                one.pad_id = model.config.pad_token_id
    return encoder
