"""Before a model is loaded: does the run fit its budget? The plan, or a refusal that says what would fit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from hizoo_lite.batch import Example
from hizoo_lite.config import TrainConfig
from hizoo_lite.device import like
from hizoo_lite.errors import BudgetError
from hizoo_lite.plan import hardware
from hizoo_lite.plan.hardware import Hardware
from hizoo_lite.plan.plan import Plan
from hizoo_lite.plan.planner import CannotPlan, plan_run
from hizoo_lite.plan.subject import framework_bytes
from hizoo_lite.plan.workload import Demand, Workload
from hizoo_lite.tasks import Encoder, Splits
from hizoo_lite.train.compared import answers_steps
from hizoo_lite.train.resolved import Resolved
from hizoo_lite.train.tokenizing import encoder_of
from hizoo_lite.units import format_bytes

_log = logging.getLogger(__name__)

#: Examples of a part that are encoded beforehand, about half a millisecond each. If there are more, the
#: longest row is taken to be as long as the limit allows.
MOST_ENCODED = 4096


def plan(resolved: Resolved, workload: Workload) -> Plan | None:
    """The plan of a run on such examples. Raises `BudgetError` if there is a budget that cannot be met.

    None for a model that cannot be run dry; with a budget that is an error, without one it only goes
    without a prediction.
    """
    config = resolved.config
    has_budget = config.device_budget is not None or config.host_budget is not None
    machine = _machine(config, resolved.device)
    # of a profile its rates count; dtype and libraries are those that are here
    framework = None if machine is None else framework_bytes()
    settled = replace(resolved.settings, residency=resolved.residency)
    try:
        found = plan_run(
            settled, resolved.checkpoint, resolved.kind, workload, hardware=machine, framework=framework
        )
    except CannotPlan as error:
        if has_budget:
            raise
        _log.warning("%s", error)
        return None
    if has_budget and not found.fits:
        raise BudgetError(_refusal(found))
    return found


def _machine(config: TrainConfig, device: torch.device) -> Hardware | None:
    """The profile's machine, for its rates; None without a profile, and for one of another kind of device."""
    if config.profile is None:
        return None
    machine = hardware.find(config.profile)
    if machine.device != like(device):
        _log.warning(
            "--profile: %s is a %s machine and the run is on %s: its budgets count, its rates do not",
            machine.name,
            machine.device,
            device.type,
        )
        return None
    return replace(machine, residency="auto")  # the configuration has the profile's where that counts


def find_encoder(resolved: Resolved) -> Encoder | None:
    """The encoder of a model that is not loaded yet; None without a tokenizer, which is refused later."""
    return encoder_of(resolved.checkpoint.folder, resolved.kind, resolved.task, resolved.config)


def workload(encoder: Encoder, splits: Splits, config: TrainConfig) -> Workload:
    """What the examples of a run make: those of training, and those that are evaluated."""
    evaluated = [*splits.test, *(splits.dev if config.eval_every > 0 else ())]
    training = _asked(encoder, splits.train, training=True)
    evaluation = _asked(encoder, evaluated, training=False)
    labels = len(encoder.label_tokens(splits.train, config.rank) or ())
    found = _workload(encoder, training.each, evaluation.each, max(training.longest, evaluation.longest))
    answered = _with_answer(encoder, found) if answers_steps(config, encoder) else 0
    return found._replace(
        labels=labels, examples=training.examples, tokens=training.tokens, answered=answered
    )


def evaluated(encoder: Encoder, examples: Sequence[Example]) -> Workload:
    """What examples make that are only evaluated."""
    found = _asked(encoder, examples, training=False)
    return _workload(encoder, found.each, found.each, found.longest)


def _workload(encoder: Encoder, training: Demand, evaluation: Demand, longest: int) -> Workload:
    length = min(encoder.max_length, longest + 1)  # a row ends before the last token of its answer
    writes = encoder.task.writes and encoder.model_kind == "causal"
    found = Workload(training, evaluation, length)
    return found._replace(written=_with_answer(encoder, found)) if writes else found


def _with_answer(encoder: Encoder, found: Workload) -> int:
    """Tokens of a prompt and what is written after it."""
    return min(encoder.max_length, (found.length or 0) + encoder.max_new_tokens)


class _Asked(NamedTuple):
    """What some examples ask of a pass."""

    each: Demand  # the most of one
    longest: int  # tokens of a row
    examples: int
    tokens: int | None  # of all rows together; None if not all were counted


def _asked(encoder: Encoder, examples: Sequence[Example], *, training: bool) -> _Asked:
    """Of more than `MOST_ENCODED` examples the first ones are encoded.

    Of the others only the answers are counted, if they are other answers, as if each took a row of its
    own.
    """
    rows = sites = longest = 1
    taught = list(filter(encoder.teaches, examples[:MOST_ENCODED]))
    tokens = 0
    for example in taught:
        encoded = encoder.encode(example, training=training)
        rows, sites = max(rows, len(encoded.rows)), max(sites, len(encoded.sites))
        longest = max(longest, *map(len, encoded.rows))
        tokens += sum(map(len, encoded.rows))
    if len(examples) <= MOST_ENCODED:
        return _Asked(Demand(rows, sites), longest, len(taught), tokens)
    only_one = encoder.model_kind != "causal" or encoder.task.kind == "lm" or encoder.task.chat
    if not only_one and not (training and encoder.loss == "answer"):
        seen = {tuple(example.answers) for example in examples[:MOST_ENCODED]}
        others = (e.answers for e in examples[MOST_ENCODED:] if tuple(e.answers) not in seen)
        rows = max(rows, max(map(len, others), default=1))
    return _Asked(Demand(rows, max(sites, rows)), encoder.max_length, len(examples), None)


def _refusal(found: Plan) -> str:
    """What does not fit, by category, and the nearest configuration that does."""
    budgets = [format_bytes(size) for size in (found.device_budget_bytes, found.host_budget_bytes) if size]
    lines = [f"--device-budget: the run does not fit {' and '.join(dict.fromkeys(budgets))}"]
    lines += [f"  {row[0]:<22}{row[1]:>12}" for row in found.table()]
    lines += [f"  not counted: {text}" for text in found.unaccounted]
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
