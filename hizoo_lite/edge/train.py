"""A run beside onnxruntime: the same loop, steps, noise and files as `hizoo-lite train`, without torch.

The run folder has config.toml, run.json, metrics.jsonl, journal.bin, checkpoints/, adapter/ (PEFT format),
adapter.onnx_adapter, summary.json and memory.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hizoo_lite.checkpoints import fingerprint
from hizoo_lite.config import TrainConfig, default, settings
from hizoo_lite.edge.graph import SCORES, GraphSpace, TrainGraph
from hizoo_lite.edge.memory import Memory
from hizoo_lite.edge.tokenizer import EdgeTokenizer
from hizoo_lite.errors import StorageError, TooManyBadSteps, UserError
from hizoo_lite.memory.peak import PeakMeter
from hizoo_lite.noise import GENERATORS
from hizoo_lite.process import resident
from hizoo_lite.tasks import Encoder, Splits, Task
from hizoo_lite.tasks.tokens import usable_length
from hizoo_lite.train import checkpoint, components, config_file, identity, resume
from hizoo_lite.train.callbacks import Callbacks, checked
from hizoo_lite.train.checkpoint import Position
from hizoo_lite.train.folder import RunFolder, next_free
from hizoo_lite.train.interrupt import Interrupt, Interrupted
from hizoo_lite.train.loop import Loop
from hizoo_lite.train.step import Stepper
from hizoo_lite.train.summary import outcome, versions

#: What a graph has decided, or cannot do.
_NOT_HERE = ("loss", "tracker", "run_name", "objective", "hidden_states")
#: The settings that a run on a device can choose; the others are the graph's.
SETTINGS = (
    *("task", "data", "text_field", "label_field", "out", "threads"),
    *(
        name
        for name, field in settings().items()
        if field.metadata["group"] in ("Method", "Run") and name not in _NOT_HERE
    ),
)
_CONFIG, _ONNX_ADAPTER = "config.toml", "adapter.onnx_adapter"
_PACKAGES = ("hizoo-lite", "numpy", "onnxruntime", "tokenizers")


@dataclass(frozen=True, eq=False)
class EdgeSetup:
    """The parts of a run."""

    config: TrainConfig
    task: Task
    splits: Splits
    encoder: Encoder
    traversal: TrainGraph
    stepper: Stepper
    chunk_halvings: int = 0  # onnxruntime takes a batch as a whole


def resolve(folder: Path, flags: Mapping[str, str | bool]) -> TrainConfig:
    """The exported configuration with the flags on top; of a run to be resumed, its own."""
    path = folder / _CONFIG
    if not path.is_file():
        raise UserError(f"{path}: no such file; allowed: a folder of: hizoo-lite export --to onnx-train")
    return config_file.resolve(None if flags.get("resume") is True else str(path), flags)


def train(folder: Path, config: TrainConfig, callbacks: Sequence[object] = ()) -> tuple[Path, dict[str, Any]]:
    """Tune the graph in `folder` and write the run folder; its path, and the summary.

    callbacks: as for `fit`; none of them is given a model.

    Raises UserError for bad input, before anything is written; TooManyBadSteps with everything saved.
    SIGINT and SIGTERM end the run after the step in progress, with everything saved.
    """
    told = checked(callbacks)
    run = RunFolder(config.out if config.out is not None else next_free("hizoo-run"))
    if config.resume:
        config = config_file.as_begun(run.config(), config)
        config_file.check_same_run(run.config(), config, begins=False)
    else:
        run.check_new()
    config = replace(config, out=str(run.path), device="cpu", compute_dtype="float32")
    start_bytes = resident().held_bytes
    setup = _build(folder, config)
    config = setup.config
    count = _trained(setup)
    metric, examples = setup.task.metric, len(setup.splits.train)
    calls = Callbacks(told, config, run, metric=metric, examples=examples, about={"model": None})
    calls.message(
        f"{folder}: {setup.traversal.record.kind}, {setup.traversal.record.bits}, "
        f"{setup.traversal.session.nbytes() / 2**20:.1f} MiB, {count:,} trainable parameters"
    )
    for line in components.division_lines(config, setup.splits, setup.task):
        calls.message(line)
    try:
        for line in components.begin(setup.stepper.estimator, config, setup.splits):
            calls.message(line)
        return run.path, _run(setup, run, folder, calls, start_bytes)
    finally:
        setup.stepper.close()


def _trained(setup: EdgeSetup) -> int:
    """Values that the run moves."""
    return sum(math.prod(value.shape) for value in setup.traversal.parameters.values())


def _build(folder: Path, config: TrainConfig) -> EdgeSetup:
    if not config.is_of_loss:
        raise UserError(f"objective: got {config.objective!r}, allowed here: {default('objective')}")
    task = components.task_of(config)
    splits = components.run_splits(config, task)
    graph = TrainGraph(folder, config.threads)
    tokenizer = EdgeTokenizer(folder, token_types=graph.token_types)
    most = usable_length(config.max_length, graph.record.positions)
    record = graph.record
    encoder = components.task_encoder(
        *(tokenizer, record.kind, task, most, config.loss),
        classes=record.id2label,
        vocabulary=record.vocabulary,
    )
    if encoder.loss != graph.record.loss:
        raise UserError(
            f"--task: {task.name} has the loss {encoder.loss!r}, the graph in {folder} computes "
            f"{graph.record.loss!r}; allowed: a task with that loss"
        )
    if graph.record.kind == "classifier":
        graph.session.check_classes(task, SCORES)
    splits = components.usable_splits(encoder, splits, config)
    splits = components.learnable_splits(encoder, splits)
    config = components.steps_of(config, splits)
    stepper = components.make_stepper(config, graph, graph.arrays, GraphSpace(config.space, graph))
    return EdgeSetup(config, task, splits, encoder, graph, stepper)


def _run(
    setup: EdgeSetup, folder: RunFolder, exported: Path, callbacks: Callbacks, start_bytes: int
) -> dict[str, Any]:
    """The steps, from where the run begins; what ended it early is raised once everything is saved."""
    resuming = setup.config.resume
    meter = PeakMeter()
    memory = Memory(meter, start_bytes)
    with ExitStack() as open_things:
        enter = open_things.enter_context
        enter(folder.locked())
        enter(callbacks)
        if not resuming:
            folder.check_new()  # another run may have begun here since
        earlier = folder.read_summary() if resuming else {}
        position = _begin(setup, folder, exported, callbacks)
        journal = enter(resume.open_journal(folder, setup.stepper, position))
        interrupt = enter(Interrupt())
        loop = Loop(
            setup,
            folder,
            position,
            journal,
            callbacks=callbacks,
            interrupt=interrupt,
            meter=meter,
            profiler=memory,
            memory=memory.record,
        )
        failure: Interrupted | TooManyBadSteps | StorageError | None = None
        try:
            loop.run()
        except (Interrupted, TooManyBadSteps, StorageError) as error:
            failure = error
        summary: dict[str, Any] = {}
        try:
            if loop.is_whole:
                loop.save()
                _save_adapter(setup, folder)
            summary = _summary(setup, loop, memory, earlier, isinstance(failure, Interrupted))
            folder.write_summary(summary)
        except StorageError as error:
            failure = failure if isinstance(failure, StorageError) else error
    if isinstance(failure, StorageError):
        raise StorageError(f"{failure}; {resume.where_it_stands(folder, loop.position)}") from failure
    if isinstance(failure, TooManyBadSteps):
        raise failure
    if callbacks.failure is not None:
        raise callbacks.failure
    return summary


def _begin(setup: EdgeSetup, folder: RunFolder, exported: Path, callbacks: Callbacks) -> Position:
    """Where the run starts: at zero in a new folder, or after the last step of the run that is there."""
    position = Position()
    model = fingerprint.of_files(exported.glob("train*"))
    made_of = identity.of_run(setup.splits, setup.task, model, exported, setup.stepper.library)
    if base := setup.traversal.record.base:  # which `--adapter` of an export asks for
        made_of |= {"base": base.model, "base_fingerprint": base.fingerprint}
    if setup.config.resume:
        identity.check(folder.identity, made_of)
        position, _ = resume.resume(folder, setup.stepper, setup.config.steps, callbacks.message)
        callbacks.message(f"resuming after {position.step} of {setup.config.steps} steps")
    folder.create(replace(setup.config, resume=False))
    folder.write_identity(made_of)
    if not setup.stepper.estimator.secret:
        folder.write_left_out(setup.splits.left_out)
    return position


def _save_adapter(setup: EdgeSetup, folder: RunFolder) -> None:
    space = setup.stepper.space
    assert isinstance(space, GraphSpace)
    checkpoint.save_adapter(space, folder.adapter)
    space.save_onnx_adapter(folder.path / _ONNX_ADAPTER)


def _summary(
    setup: EdgeSetup, loop: Loop, memory: Memory, earlier: Mapping[str, Any], interrupted: bool
) -> dict[str, Any]:
    """The keys of summary.json that have a meaning here; `earlier` is that of the run that is continued."""
    config, graph = setup.config, setup.traversal
    return {
        **outcome(loop.folder.read_metrics(), setup.task),
        "trainable_parameters": _trained(setup),
        "budget_bytes": None,
        "profile": None,
        "predicted_peak_bytes": None,
        "measured_peak_bytes": max(loop.meter.overall_bytes(), earlier.get("measured_peak_bytes") or 0),
        "model_bytes": graph.session.nbytes(),
        "device": "cpu",
        "bits": graph.record.bits,
        "compute_dtype": "float32",
        "kind": graph.record.kind,
        "space": config.space,
        "estimator": setup.stepper.estimator.name,
        "objective": config.objective,
        "curvature": setup.stepper.curvature.name,
        "residency": "resident",
        "noise": GENERATORS["parameters"],
        "model": config.model,
        "task": config.task_name,
        "seed": config.seed,
        "interrupted": interrupted,
        "versions": versions(_PACKAGES),
        **({} if setup.stepper.estimator.secret else memory.figures()),
        "adapter_step": loop.adapter_step if loop.is_whole else earlier.get("adapter_step"),
        "ranks": 1,
        **loop.account(),
    }
