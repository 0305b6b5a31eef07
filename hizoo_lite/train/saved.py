"""What a run (or PEFT) has saved, put back on a model: for `eval`, `generate` and Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from hizoo_lite.base import ModelKind, Space
from hizoo_lite.batch import Example
from hizoo_lite.branches import EVALUATION
from hizoo_lite.checkpoints.adapter import find_adapter
from hizoo_lite.config import TrainConfig
from hizoo_lite.engine.budget import Budget, enforced, loading
from hizoo_lite.engine.load import load
from hizoo_lite.engine.residency import Streamed
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import UserError
from hizoo_lite.model import kinds
from hizoo_lite.model.model import Model
from hizoo_lite.plan.dry_run import pass_bytes
from hizoo_lite.plan.workload import cache_bytes
from hizoo_lite.spaces import saved_in
from hizoo_lite.tasks import Task, shown
from hizoo_lite.train import components, planning, setup
from hizoo_lite.train.evaluate import Evaluation, evaluate, report
from hizoo_lite.train.progress import Progress
from hizoo_lite.train.provenance import asked_by_run, base_model, saved_config, saved_kind
from hizoo_lite.train.resolved import Resolved

#: Settings of a run that are arguments of `load`, too.
_OF_LOADING = (
    *("bits", "compute_dtype", "device", "double_quant", "revision", "chat_template"),
    *("residency", "device_budget", "host_budget"),
)


def kind_of(path: Path | str, base: Path) -> ModelKind:
    """`saved_kind`, else what the architecture of its model in folder `base` says."""
    return saved_kind(path) or kinds.find_kind(str(base), None, None)


def attach_adapter(
    model: Model, path: Path | str, prepare: Callable[[], None] = lambda: None, **options: Any
) -> Space:
    """Hang a saved adapter on the model's linear layers, or give them their tuned weights.

    `path` as for `find_adapter`. `prepare` is called before blocks are first asked for, to say how much
    memory a pass will need. options: of the space, beside those that were saved. Raises UserError if what
    was saved does not fit the model, or is of a form that is not supported.
    """
    folder = find_adapter(path)
    space = saved_in(folder, model, **options)
    space.attach(model, seed=0, labels=[])  # those that it has are saved
    prepare()
    space.load(folder)
    return space


def load_to_write(
    source: str | None,
    adapter: str | None,
    flags: dict[str, Any],
    length: int,
    rows: int = 1,
    *,
    scores: bool = False,
) -> Model:
    """A causal model that will write, with its adapter.

    Args:
        source: folder or hub id; None: the one that the adapter was made for.
        adapter: a run folder, or a folder that PEFT made; None for none.
        flags: arguments of `load`, in place of the run's.
        length: characters or tokens of the text with what is written; a streamed model has room for it.
        rows: texts that go through it together.
        scores: whether the logits of every token are read.
    """
    run = saved_config(adapter)
    if run is not None:
        flags = {**{name: asdict(run)[name] for name in _OF_LOADING}, **flags}
        source = source or run.model
    if source is None and adapter is not None:
        source = base_model(adapter)
    if not source:
        raise UserError("--model: missing; give a folder or hub id, or an --adapter that names one")
    loaded = load(kinds.model_path(source), kind="causal", **flags)
    if isinstance(loaded.residency, Streamed):
        tokens = min(length, loaded.positions or length)
        cache = cache_bytes(loaded.config, rows, tokens)
        sites = rows * tokens if scores else rows
        loaded.residency.reserved_bytes = pass_bytes(loaded, rows, tokens, EVALUATION, sites) + cache
        loaded.residency.scratch = None if adapter is None else find_adapter(adapter)
    if adapter is not None:
        attach_adapter(loaded, adapter)
    return loaded


def answered(model: Model, adapter: str | None, text: str) -> str | None:
    """What a model with the adapter of a run answers to a text, as the run's task asks about one.

    Of a choice it is the answer that the model finds likeliest, else what it writes. None as of
    `provenance.asked_by_run`.
    """
    found = asked_by_run(adapter, text)
    if found is None:
        return None
    run, task, example = found
    encoder = setup.make_encoder(model, task, run.max_length, run.loss)
    predictions = evaluate(Traversal(model), encoder, [example], 1).predictions
    return shown.answer(task, example, predictions[0]) if predictions else None


def evaluated(
    config: TrainConfig, adapter: str | None, split: str, limit: int | None, progress: Progress
) -> dict[str, Any]:
    """The result as it is printed: scores by name, the loss first. split "all": every row of a file."""
    task = components.task_of(config)
    part = components.split_part(config, task, split, limit)
    found, model = measured(config, task, part, adapter, progress)
    about = {"bits": model.bits, "device": str(model.device), "residency": model.residency.name}
    return report(found, config, adapter, split) | about


def measured(
    config: TrainConfig,
    task: Task,
    part: list[Example],
    adapter: str | None,
    progress: Progress,
    model: Model | None = None,
) -> tuple[Evaluation, Model]:
    """The result on the examples `part`, and the model that is loaded for it if none is given."""
    resolved = Resolved(config, task, model)
    with enforced(resolved.budgets.device_bytes if model is None else None, resolved.device) as cap:
        with loading():
            given, model = model, resolved.model()
        if given is None:
            progress.message(f"{config.model}: {model}; {resolved.why_bits}")
        encoder = setup.make_encoder(model, task, config.max_length, config.loss)
        part = components.fitting(encoder, part, config)
        prepare = partial(setup.prepare_blocks, model, resolved, planning.evaluated(encoder, part))
        if adapter is not None:
            attach_adapter(model, adapter, prepare)
        prepare()
        traversal = Traversal(model)
        traversal.guard = Budget(resolved.budgets, model, progress.message, cap).fitting
        progress.phase("evaluate", len(part))
        found = evaluate(traversal, encoder, part, config.eval_batch_size, advanced=progress.advanced)
        progress.finish()
    return found, model
