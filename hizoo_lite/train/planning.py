"""Before a model is loaded: does the run fit its budget? The plan, or a refusal that says what would fit."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from hizoo_lite.base import Example, ModelKind, UserError
from hizoo_lite.errors import BudgetError
from hizoo_lite.memory.plan import Plan
from hizoo_lite.memory.planner import plan_run
from hizoo_lite.memory.sizes import format_bytes
from hizoo_lite.model.skeleton import read_tokenizer
from hizoo_lite.quant import Checkpoint
from hizoo_lite.tasks import Encoder, Task
from hizoo_lite.train.config import TrainConfig

_log = logging.getLogger(__name__)

#: What a Hugging Face model may raise on tensors without memory, where its forward looks at values.
_REHEARSAL_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError)

#: Examples that are encoded beforehand, to see how many token sequences one makes.
_SAMPLE = 32


def plan(
    config: TrainConfig, checkpoint: Checkpoint, kind: ModelKind, task: Task, examples: Sequence[Example]
) -> Plan | None:
    """The plan of a run on such examples. Raises `BudgetError` where there is a budget that cannot be met.

    None for a model that cannot be rehearsed; with a budget that is an error, without one it only goes
    without a prediction.
    """
    has_budget = config.device_budget is not None or config.host_budget is not None
    rows = _rows(config, checkpoint, kind, task, examples)
    try:
        found = plan_run(config, checkpoint, kind, rows)
    except _REHEARSAL_ERRORS as error:
        if has_budget or isinstance(error, UserError):
            raise
        _log.warning("%s: cannot be planned: %s", checkpoint.folder, error)
        return None
    if has_budget and not found.fits:
        raise BudgetError(_refusal(found))
    return found


def _rows(
    config: TrainConfig, checkpoint: Checkpoint, kind: ModelKind, task: Task, examples: Sequence[Example]
) -> int:
    """The most token sequences that an example makes; 1 without a tokenizer, which is refused later."""
    tokenizer = read_tokenizer(checkpoint.folder)
    if tokenizer is None:
        return 1
    loss = None if config.loss == "auto" else config.loss
    limit = min(config.max_length, tokenizer.model_max_length)
    encoder = Encoder(tokenizer, kind, task, limit, loss=loss)
    return rows_per_example(encoder, examples, training=True)


def rows_per_example(encoder: Encoder, examples: Sequence[Example], *, training: bool) -> int:
    """The most token sequences that one of the first examples makes."""
    return max((len(encoder.encode(e, training=training).rows) for e in examples[:_SAMPLE]), default=1)


def _refusal(found: Plan) -> str:
    """What does not fit, by owner, and the nearest configuration that does."""
    budgets = [format_bytes(size) for size in (found.device_budget_bytes, found.host_budget_bytes) if size]
    lines = [f"--device-budget: the run does not fit {' and '.join(dict.fromkeys(budgets))}"]
    lines += [f"  {row[0]:<22}{row[1]:>12}" for row in found.table()]
    lines += [f"  not accounted for: {text}" for text in found.unaccounted]
    if found.nearest is not None:
        near = found.nearest
        lines.append(
            f"the nearest that fits: --residency {near.residency} --batch-size {near.batch_size} "
            f"--eval-batch-size {near.eval_batch_size} --max-length {near.max_length} "
            f"--branch-chunk {near.branch_chunk}, {format_bytes(near.peak_bytes)}"
        )
    elif found.why:
        lines.append(found.why)
    return "\n".join(lines)
