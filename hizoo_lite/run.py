"""`fit`: a run from its configuration to its folder.

    run = fit(TrainConfig(model="path", task="sst2", data="data/sst2", out="run"))
    run = fit(model, task="sst2", data="data/sst2", space=LoRA(rank=8), estimator=HiZOO(), steps=1000)

One process a device; those that a launcher started share the batches (`ranks.py`). Process state and
trackers are accelerate's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hizoo_lite.base import Curvature, Estimator, Space, trained_count
from hizoo_lite.checkpoints.adapter import find_adapter
from hizoo_lite.checkpoints.fingerprint import of_model
from hizoo_lite.config import TrainConfig
from hizoo_lite.device import choose_device, choose_type, kind_of
from hizoo_lite.engine.budget import Budget, enforced, is_out_of_memory, loading
from hizoo_lite.engine.hidden import HiddenStates
from hizoo_lite.errors import BudgetError, StorageError, TooManyBadSteps, UserError
from hizoo_lite.memory.peak import PeakMeter
from hizoo_lite.memory.profiler import Profiler
from hizoo_lite.model.model import Model
from hizoo_lite.objectives import Function
from hizoo_lite.plan import ledger
from hizoo_lite.process import map_large, run_module
from hizoo_lite.registry import SPACES
from hizoo_lite.result import Run, checked_split
from hizoo_lite.tasks import Records, TaskLike, chat_templates
from hizoo_lite.tasks.files import Split
from hizoo_lite.tasks.forms import Understood
from hizoo_lite.tensors import threads
from hizoo_lite.train import (
    bars,
    checkpoint,
    components,
    config_file,
    distributed,
    identity,
    preflight,
    provenance,
    resume,
    saved,
)
from hizoo_lite.train.callbacks import Callbacks, Tracker, checked
from hizoo_lite.train.checkpoint import Position
from hizoo_lite.train.evaluate import Evaluation
from hizoo_lite.train.folder import RunFolder, next_free
from hizoo_lite.train.given import Given, check_device, configured, in_memory, object_of
from hizoo_lite.train.interrupt import Interrupt, Interrupted
from hizoo_lite.train.loop import Loop
from hizoo_lite.train.progress import Progress
from hizoo_lite.train.ranks import Ranks
from hizoo_lite.train.resolved import Resolved
from hizoo_lite.train.setup import Setup, build, calibrate, keeps_hidden_states
from hizoo_lite.train.step import Stepper
from hizoo_lite.train.summary import peaks_of_run, summarize

__all__ = ["Run", "categories", "evaluate", "fit"]

_log = logging.getLogger(__name__)

#: What ends a run early, with everything saved that could be.
_Failure = Interrupted | TooManyBadSteps | StorageError | BudgetError
#: The entry of run.json of a run that keeps hidden states: resumed, it does, and none that did not does.
_HIDDEN = "hidden_states"

#: What trackers call the name of a run. Others have the folder: TensorBoard shows its path.
_NAMED_BY = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "clearml": "task_name",
    "swanlab": "experiment_name",
}


def fit(
    model: TrainConfig | Model | str,
    *,
    task: TaskLike | list[str] | tuple[str, ...] | None = None,
    data: Any = None,
    space: Space | str | None = None,
    estimator: Estimator | str | None = None,
    curvature: Curvature | str | None = None,
    objective: Callable[..., float] | str | None = None,
    callbacks: Sequence[object] = (),
    progress: bool = True,
    **options: Any,
) -> Run:
    """Tune a model and write the run folder.

    Args:
        model: a whole configuration, a loaded model (with the residency it has, and the budgets it was loaded
            with unless `options` has others), or its folder or hub id.
        task: a name or file, as in the configuration; or the keys of a task's file, a function from a row to
            (prompt, completion), a `Task`. None: the form that the data has, see `tasks/forms.py`. Of a
            function the run folder has the name alone: to resume it, give it again. A list of names or files
            trains on all of them.
        data: a file or folder, or a data set of the hub, of several tasks a list; or rows in memory, or rows
            by part: dicts, a `datasets.Dataset` or `DatasetDict`, a DataFrame. Those in memory are written to
            the run folder, as data/train.jsonl.
        space: a name as in the configuration, or an object such as `spaces.LoRA(rank=8)`.
        estimator: likewise, such as `estimators.MeZO()`.
        curvature: likewise, such as `curvature.NoCurvature()`.
        objective: a name as in the configuration; or a function of (prompt, text, row), of (example, scores)
            or of (example, text), the higher the better (see `objectives`). To resume a run with a function,
            give it again.
        callbacks: objects with any of the methods of transformers' `TrainerCallback`, which may also ask the
            run to evaluate, save or end; see `train/callbacks.py`.
        progress: show a bar at a terminal or in a notebook, if `callbacks` has no display of its own.
        options: fields of `TrainConfig`, with a configuration those to replace; not what an object says too.
            The run folder is `out`; without it ./hizoo-run, with a number if that is taken.

    Returns:
        The run. SIGINT and SIGTERM end it after the step in progress, with everything saved.

    Raises:
        UserError: for bad input, before anything is written.
        TooManyBadSteps: if the loss of too many steps was not finite, with everything saved.
        BudgetError: if the memory budget does not suffice, with everything saved that could be.
        StorageError: if a file could not be read or written, likewise. No step that was taken is lost: the
            run can be resumed after it.

    Example:
        >>> import hizoo_lite as hz
        >>> run = hz.fit(
        ...     "embedded",  # the demo: model, task and data come with the package
        ...     task="embedded",
        ...     data="embedded",
        ...     space=hz.spaces.LoRA(rank=4),
        ...     steps=2,
        ...     batch_size=4,
        ...     test_examples=8,
        ...     device="cpu",
        ...     out="runs/first",
        ... )
        >>> run.summary["steps"], [line["kind"] for line in run.history]
        (2, ['eval', 'step', 'step', 'eval'])
        >>> hz.evaluate(run, examples=4).examples
        4
    """
    told = checked(callbacks)
    compare = None if objective is None or isinstance(objective, str) else Function.of(objective)
    members = {"space": space, "estimator": estimator, "curvature": curvature}
    names = {**members, "objective": objective if compare is None else compare.name}
    options |= {axis: name for axis, name in names.items() if isinstance(name, str)}
    objects: dict[str, Any] = {axis: object_of(axis, member) for axis, member in members.items()}
    found, records = in_memory(task, data, options)
    config, loaded = configured(model, **objects, options=options)
    config = config if objects["space"] is not None else provenance.begun_from(config)
    ranks = _join(config, loaded)
    named = config.out is not None
    folder = _folder(config, ranks)
    forms = components.understood(config, records) if found is None else []
    keys = task if isinstance(task, Mapping) else components.made_of(forms)
    found = components.of_sources(config, found or keys)
    given = Given(keys, records)
    config = _checked(_with_files(config, folder, given, is_form=bool(forms)), folder)
    config = replace(config, out=str(folder.path))
    ranks.wait()  # until the main one has found the folder to be free
    resolved = Resolved(config, found, loaded)
    limits = resolved.budgets
    if loaded is not None and limits.device_bytes is not None:
        map_large()  # which `load` does if it is told the budget
    with threads(config.threads), enforced(limits.device_bytes, resolved.device) as cap:
        with loading():
            setup = build(resolved, **objects, objective=compare, data=records)
        setup.stepper.ranks = ranks
        _check_groups(setup.stepper)
        if ranks.is_main and not named:
            _log.warning("no out was given: the run folder is %s", folder.path.absolute())
        calls = _callbacks(setup, folder, told, progress)
        _announce(setup, calls.message, forms)
        budget = Budget(limits, setup.model, calls.message, cap)
        try:
            return _run(setup, folder, calls, budget, given)
        finally:
            setup.stepper.close()


def evaluate(
    of: Run | Model | str | Path,
    *,
    task: TaskLike | list[str] | tuple[str, ...] | None = None,
    data: Any = None,
    split: Split = "test",
    examples: int | None = None,
    **options: Any,
) -> Evaluation:
    """Loss, metric and predictions of a model on a part of a data set, as `hizoo-lite eval` has them.

    Args:
        of: a run; its folder, or that of PEFT's adapter: the model with what was tuned; a loaded model as it
            is; a model's folder or hub id.
        task: as for `fit`; None: the run's.
        data: a file or folder, divided as a run with these options divides it; or rows in memory, which all
            count, or rows by part. None: the run's, or the hub.
        split: which part.
        examples: the first so many of the part; None: all.
        options: fields of `TrainConfig`, in place of the run's.

    Raises:
        UserError: for bad input.
        BudgetError: if the memory budget does not suffice.
    """
    checked_split(split)
    if examples is not None and examples < 1:
        raise UserError(f"examples: got {examples}, allowed: a whole number of 1 or more")
    given, records = in_memory(task, data, options)
    if records is not None and not isinstance(data, Mapping):
        records = Records({split: data})
    model, adapter = None, None
    if isinstance(of, Run):
        config, model = components.with_tasks(of.setup.config, options), of.setup.model
        given = of.setup.task if task is None else given
    elif isinstance(of, Model):
        config, model = configured(of, None, None, None, options)
    else:
        adapter = str(of) if provenance.is_tuned(of) else None
        if adapter is None and task is None and "task" not in options:
            raise UserError(f"task: missing, and {of} is no run or adapter, which would name one")
        options = config_file.with_profile(options if adapter else {"model": str(of), **options})
        config = provenance.eval_config(adapter, options)
    found = components.task_of(config, records) if given is None else given
    if records is None:
        part = components.split_part(config, found, split, examples)
    else:
        if len(found.parts) > 1:
            called = ", ".join(part.name for part in found.parts)
            raise UserError(f"data: got rows in memory, allowed with one task; these are several: {called}")
        lenient = components.leaves_out(config, found) and not config.strict
        part = found.load(records, split, [] if lenient else None)[:examples]
    return saved.measured(config, found, part, adapter, Progress(), model)[0]


def _join(config: TrainConfig, loaded: Model | None) -> Ranks:
    """The processes of the run. UserError if a loaded model is not on this one's device."""
    wanted = config.device if loaded is None else loaded.device.type
    ranks = distributed.join(choose_type(wanted)[0])
    if loaded is not None:
        check_device(loaded, choose_device(wanted), ranks)  # of this rank, which has its own
    return ranks


def _folder(config: TrainConfig, ranks: Ranks) -> RunFolder:
    """The run folder, which the main rank chooses if none was given, and which it alone writes."""
    path = str(config.out if config.out is not None else next_free("hizoo-run"))
    return RunFolder(ranks.gather(path)[0], writes=ranks.is_main)


def _with_files(config: TrainConfig, folder: RunFolder, given: Given, *, is_form: bool) -> TrainConfig:
    """The configuration with the names of the files that will be in the run folder."""
    if is_form:
        config = replace(config, text_field=None, label_field=None)  # which the task's file has
    if given.data is not None:
        config = replace(config, data=str(folder.data))
    return config if given.task is None else replace(config, task=str(folder.task))


def _checked(config: TrainConfig, folder: RunFolder) -> TrainConfig:
    """Refuse an impossible folder, tracker or launch; a resumed run keeps what it left open (kind, bits)."""
    preflight.check_tracker(config.tracker)
    if not config.resume:
        folder.check_new()
        return config
    old = folder.config()
    config = config_file.as_begun(old, config)
    config_file.check_same_run(old, config)
    return config


def _check_groups(stepper: Stepper) -> None:
    """UserError if both the estimator and the processes divide a batch."""
    count = stepper.ranks.count
    if count > 1 and stepper.estimator.groups > 1:
        raise UserError(
            f"--estimator: {stepper.estimator.name} divides a batch by itself; allowed in "
            f"{count} processes: those that do not"
        )


def _announce(setup: Setup, tell: Callable[[str], None], forms: Sequence[Understood]) -> None:
    """What the run is of. UserError if its estimator cannot do with that."""
    tell(f"{setup.config.model}: {setup.model}, {trained_count(setup.space):,} trainable parameters")
    for line in components.form_lines(forms, setup.splits, of_objective=setup.objective.of_row):
        tell(line)
    if lacking := chat_templates.lacking(setup.model.tokenizer, setup.task):
        tell(lacking)
    for line in components.division_lines(setup.config, setup.splits, setup.task):
        tell(line)
    for line in components.begin(setup.stepper.estimator, setup.config, setup.splits):
        tell(line)
    could_be_exact = setup.config.is_of_loss and not setup.stepper.estimator.secret
    if could_be_exact and setup.config.estimates and setup.config.space in SPACES.having("exact_blocks"):
        count = _trained_blocks(setup)
        tell(
            f"gradients inside blocks are estimated, from forwards alone; --exact-blocks {count} has them "
            "exact, in about the same memory, and learns in a fraction of the steps"
        )


def _trained_blocks(setup: Setup) -> int:
    """In how many blocks something is trained."""
    return len({setup.model.block_of(name) for name in setup.space.target_names})


def _callbacks(setup: Setup, folder: RunFolder, told: Sequence[object], progress: bool) -> Callbacks:
    """Those that were given, on the main rank alone, and what transformers gives every one of them.

    progress: add a bar if none of them has a display of its own.
    """
    if progress and not any(isinstance(each, Progress) for each in told):
        told = (*told, bars.of_python())
    absent = ("optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")
    about = {"model": setup.model.module, "processing_class": setup.model.tokenizer, **dict.fromkeys(absent)}
    metric, examples = setup.task.metric, len(setup.splits.train)
    told = told if setup.stepper.ranks.is_main else ()
    return Callbacks(told, setup.config, folder, metric=metric, examples=examples, about=about)


def _run(setup: Setup, folder: RunFolder, callbacks: Callbacks, budget: Budget, given: Given) -> Run:
    """The steps, from where the run begins; what ended it early is raised once everything is saved."""
    setup.traversal.guard, ranks = budget.fitting, setup.stepper.ranks
    accelerator = _accelerator(setup, folder)
    if setup.config.tracker != "none":
        callbacks.add(Tracker(accelerator.log))
    with ExitStack() as open_things:
        enter = open_things.enter_context
        enter(folder.locked())
        if not setup.config.resume:
            folder.check_new()  # another run may have begun here since
        earlier = folder.read_summary() if setup.config.resume else {}
        enter(callbacks)
        position = _begin(setup, folder, callbacks.message, given)
        ranks.wait()  # until every one has read the journal
        journal = enter(resume.open_journal(folder, setup.stepper, position)) if ranks.is_main else None
        _start_tracker(accelerator, setup.config)
        meter = PeakMeter(setup.model.device)
        hidden = _hidden_states(setup, folder)
        interrupt, profiler = enter(Interrupt()), enter(_profiled(setup, meter, budget))
        loop = Loop(
            setup,
            folder,
            position,
            journal,
            callbacks=callbacks,
            interrupt=interrupt,
            meter=meter,
            profiler=profiler,
            memory=lambda: profiler.record(categories(setup)),
            hidden=hidden,
        )
        failure = _looped(loop)
        if hidden is not None and ranks.is_main:
            hidden.close(finished=failure is None)
        if not ranks.is_main:
            return _of_other_rank(setup, folder, loop, failure)
        summary: dict[str, Any] = {}
        try:
            _save(setup, loop, failure)
            summary = _summary(setup, loop, profiler, budget, earlier, isinstance(failure, Interrupted))
            folder.write_summary(summary)
            _report(folder, callbacks.message)
        except (RuntimeError, MemoryError, BudgetError) as error:  # after another one, much may be gone
            again = error if isinstance(error, StorageError | BudgetError) else _refused(error)
            failure = failure if isinstance(failure, StorageError | BudgetError) else again
        if not isinstance(failure, StorageError | BudgetError):  # then the others go on, or have ended
            ranks.wait()
        accelerator.end_training()
    _raise(failure, loop)
    return Run(folder.path, summary, setup, loop.before, loop.after)


def _looped(loop: Loop) -> _Failure | None:
    """Run it to its end; what ended it before."""
    try:
        loop.run()
    except (Interrupted, TooManyBadSteps, StorageError, BudgetError) as error:
        return error
    except (RuntimeError, MemoryError) as error:
        return _refused(error)
    return None


def _save(setup: Setup, loop: Loop, failure: _Failure | None) -> None:
    """The last checkpoint and the adapter, if the state in memory is that of a step."""
    if isinstance(failure, BudgetError):  # smaller chunks did not help, and would round otherwise
        setup.model.chunk_halvings = loop.chunk_halvings
    if loop.is_whole:
        loop.save()
        checkpoint.save_adapter(setup.stepper.space, loop.folder.adapter)


def _summary(
    setup: Setup,
    loop: Loop,
    profiler: Profiler,
    budget: Budget,
    earlier: Mapping[str, Any],
    interrupted: bool,
) -> dict[str, Any]:
    """summary.json; `earlier` is that of the run that this one continues."""
    peak = max(loop.meter.overall_bytes(), earlier.get("measured_peak_bytes") or 0)
    figures = {} if setup.stepper.estimator.secret else peaks_of_run(earlier, profiler.figures())
    return {
        **summarize(setup, loop.folder.read_metrics(), peak, interrupted),
        "trained_blocks": _trained_blocks(setup),
        "memory_retries": budget.retries + (earlier.get("memory_retries") or 0),
        **figures,
        "adapter_step": loop.adapter_step if loop.is_whole else earlier.get("adapter_step"),
        "ranks": loop.ranks.count,
        **loop.account(),
    }


def _raise(failure: _Failure | None, loop: Loop) -> None:
    """What ended the run, unless that was a signal alone; of a failure with how to go on."""
    if isinstance(failure, StorageError | BudgetError):
        raise type(failure)(f"{failure}; {resume.where_it_stands(loop.folder, loop.position)}") from failure
    if isinstance(failure, TooManyBadSteps):
        raise failure
    if loop.callbacks.failure is not None:
        raise loop.callbacks.failure


def _refused(error: RuntimeError | MemoryError) -> BudgetError:
    """Memory that was refused, as an error of ours; any other error is raised."""
    if not is_out_of_memory(error):
        raise error
    said = str(error)
    return BudgetError(f"memory ran out: {said}" if said else "memory ran out")


def _of_other_rank(setup: Setup, folder: RunFolder, loop: Loop, failure: _Failure | None) -> Run:
    """The end of a rank that writes nothing: the result is the main one's."""
    if isinstance(failure, StorageError | BudgetError):
        raise failure
    setup.stepper.ranks.wait()
    if failure is not None and not isinstance(failure, Interrupted):
        raise failure
    return Run(folder.path, folder.read_summary(), setup, loop.before, loop.after)


@contextmanager
def _profiled(setup: Setup, meter: PeakMeter, budget: Budget) -> Iterator[Profiler]:
    """A profiler that the model's blocks report to while this is open, and that tells the budget of peaks."""
    profiler = Profiler(setup.model.device, meter)
    profiler.on_peak = budget.check
    setup.model.observer = profiler
    try:
        yield profiler
    finally:
        setup.model.observer = None
        profiler.close()


def _report(folder: RunFolder, tell: Callable[[str], None]) -> None:
    """report.html, its PNG and its JSON; the run is saved by now, so that a full disk costs only them.

    They are drawn in a process of its own, so that matplotlib does not count in this one's memory.
    """
    if os.environ.get("HIZOO_LITE_REPORT") == "0":
        return
    done = run_module("hizoo_lite.cli", "report", str(folder.path))
    if done.returncode == 0:
        tell(f"report: {done.stdout.splitlines()[0]}")
    else:
        last = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        tell(f"no report: {last.removeprefix('error: ')}")


def categories(setup: Setup) -> list[dict[str, Any]]:
    """What the plan says of each category of memory, and what its live objects hold."""
    predicted = setup.plan.categories if setup.plan is not None else {}
    found = ledger.measure(setup.model, setup.space, setup.stepper.curvature, setup.stepper.head)
    return ledger.category_list(predicted, {**found.device, **found.host})


def _hidden_states(setup: Setup, folder: RunFolder) -> HiddenStates | None:
    """Those of a run that keeps them."""
    entries = identity.read(folder.identity)
    if entries.get(_HIDDEN) != "kept":
        return None
    of: dict[str, str] = {
        name: entries[name] for name in ("train", "task", "tokenizer", "model") if name in entries
    }
    return HiddenStates(setup.traversal, folder.path, of)


def _identity(setup: Setup, folder: RunFolder) -> dict[str, str]:
    """What the run is made of: the entries of run.json."""
    model = setup.model
    made_of = identity.of_run(
        setup.splits, setup.task, of_model(model.folder), model.folder, setup.stepper.library
    )
    if setup.objective.source is not None:
        made_of["objective"] = setup.objective.source
    if setup.objective.of_row:
        made_of["rows"] = identity.of_rows(setup.splits.train)
    made_of |= identity.of_device(model.device, drawn=setup.space.weights is not None)
    if setup.config.resume:
        before = identity.read(folder.identity)
        made_of |= {name: value for name, value in before.items() if name == _HIDDEN}
    elif keeps_hidden_states(setup.config, setup.splits, setup.space, model):
        made_of[_HIDDEN] = "kept"
    return made_of


def _begin(setup: Setup, folder: RunFolder, tell: Callable[[str], None], given: Given) -> Position:
    """Where the run starts: at zero in a new folder, or after the last step of the run that is there."""
    start = resume.Start(Position())
    made_of = _identity(setup, folder)
    if setup.config.resume:
        identity.check(folder.identity, made_of)
        for words in identity.changes(folder.identity, made_of):
            tell(f"{words}: steps from here on may round otherwise than the ones before")
    if checkpoint.newest(folder.checkpoints) is None:
        calibrate(setup)
        if setup.config.init_adapter is not None:
            setup.space.begin_from(find_adapter(setup.config.init_adapter))
    if setup.config.resume:
        start = resume.resume(folder, setup.stepper, setup.config.steps, tell)
        setup.model.chunk_halvings = max(setup.model.chunk_halvings, start.chunk_halvings)
        step, total = start.position.step, setup.config.steps
        tell(f"resuming after {step} of {total} steps" + ": it is only evaluated again" * (step == total))
    folder.create(replace(setup.resolved.settings, resume=False, out=str(folder.path)))
    if folder.writes:
        given.write(folder)
    folder.write_identity(made_of)
    if not setup.stepper.estimator.secret:
        folder.write_left_out(setup.splits.left_out)
    _write_plan(folder, setup)
    return start.position


def _write_plan(folder: RunFolder, setup: Setup) -> None:
    plan = setup.plan
    if plan is None:
        return
    folder.write_plan(
        {
            **plan.to_json(),
            "owners": plan.categories,
            "predicted_peak_bytes": plan.peak_bytes,
            "budget_bytes": plan.device_budget_bytes,
            "profile": setup.config.profile,
        }
    )


def _accelerator(setup: Setup, folder: RunFolder) -> Accelerator:
    """accelerate's process state and trackers."""
    tracker = setup.config.tracker
    log_with = None if tracker == "none" else tracker
    accelerator = Accelerator(log_with=log_with, project_dir=str(folder.path))
    kind_of(setup.model.device).prepare()  # its configuration may have allowed TF32
    return accelerator


def _start_tracker(accelerator: Accelerator, config: TrainConfig) -> None:
    if config.tracker != "none":
        values = {name: "" if value is None else value for name, value in vars(config).items()}
        settings = {name: str(value) if isinstance(value, tuple) else value for name, value in values.items()}
        named = _NAMED_BY.get(config.tracker)
        name = config.run_name or Path(str(config.out)).absolute().name
        accelerator.init_trackers(
            "hizoo_lite", config=settings, init_kwargs={config.tracker: {named: name}} if named else {}
        )
