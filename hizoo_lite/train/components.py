"""The components of a run that need no torch: data, encoder, method. `setup.py` adds the model."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hizoo_lite import estimators, tasks
from hizoo_lite.arrays import Arrays
from hizoo_lite.base import AttachedSpace, BranchLosses, Curvature, Estimator, ModelKind
from hizoo_lite.batch import Example
from hizoo_lite.config import DEMO, EMBEDDED, TrainConfig, as_one_or_several, one_or_several, refuse
from hizoo_lite.curvature import for_estimator
from hizoo_lite.errors import UserError
from hizoo_lite.optimizers import step_size
from hizoo_lite.registry import ESTIMATORS
from hizoo_lite.report import verdict
from hizoo_lite.tasks import Encoder, Records, Splits, Task, TaskLike, forms
from hizoo_lite.tasks.custom import SEVERAL
from hizoo_lite.tasks.forms import Understood
from hizoo_lite.tasks.mixture import MixedEncoder, Mixture, joined
from hizoo_lite.tasks.order import output_order
from hizoo_lite.tasks.task import LeftOut, check_mostly_good, part_of, where
from hizoo_lite.tasks.tokens import Tokenizer
from hizoo_lite.train.compared import answers_steps
from hizoo_lite.train.step import Stepper
from hizoo_lite.units import counted

_log = logging.getLogger(__name__)


def make_splits(config: TrainConfig, task: Task, data: Records | None = None) -> Splits:
    """The examples of a configuration: a function of its data (`data` in their place), limits and seed."""
    found = sources(config, task) if data is None else [data]
    if len(found) != len(task.parts):
        raise UserError(f"--data: got {len(found)}, allowed: one for each of {len(task.parts)} tasks")
    return joined([_part(config, part, source) for part, source in zip(task.parts, found, strict=True)])


def _part(config: TrainConfig, task: Task, source: Any) -> Splits:
    """The examples of one task."""
    left_out: list[LeftOut] | None = [] if leaves_out(config, task) and not config.strict else None
    return tasks.make_splits(
        task,
        source,
        train_examples=config.train_examples,
        dev_examples=config.dev_examples,
        test_examples=config.test_examples,
        k_shot=config.k_shot,
        seed=config.seed,
        exact=config.all_data == "auto",
        needs_dev=config.eval_every > 0,
        left_out=left_out,
    )


def sources(config: TrainConfig, task: Task) -> list[Path | None]:
    """Where the data of each task is."""
    given = one_or_several(config.data)
    return [data_path(path) for path in given] if given else [None] * len(task.parts)


def leaves_out(config: TrainConfig, task: Task) -> bool:
    """Whether examples that cannot be used are left out: of a user's own data."""
    return config.all_data == "auto" and not task.is_published


def understood(config: TrainConfig, data: Records | None = None) -> list[Understood]:
    """What each source of data is, if the task is a form; nothing for a task that says it.

    UserError if one is nothing.
    """
    if len(config.tasks) > 1 and any(map(forms.is_form, config.tasks)):
        raise UserError(
            f"--task: got {', '.join(config.tasks)}; allowed among several: built-in ones and task files "
            "(hizoo-lite data inspect DATA --write-task FILE makes one); without --task the form of each of "
            "several --data is found"
        )
    if not forms.is_form(config.tasks[0]):
        given = {"--text-field": config.text_field, "--label-field": config.label_field}
        refuse(
            [
                f"{name}: got {value!r}, but --task {config.task_name} says the columns; allowed with --task "
                f"{', '.join((forms.AUTO, *forms.WITH_FIELDS))}"
                for name, value in given.items()
                if value is not None
            ]
        )
        return []
    paths = one_or_several(config.data)
    if data is None and not paths:
        raise UserError(f"--data: missing; --task {config.task_name} has none of its own")
    if data is None and len(paths) > 1:
        return [_of_several(config, one, name) for one, name in zip(paths, _names(paths), strict=True)]
    return [_understood(config, data if data is not None else data_path(paths[0]))]


def _of_several(config: TrainConfig, source: str, name: str) -> Understood:
    """What one of several sources is, called `name`. UserError, naming the source, if it is nothing."""
    try:
        found = _understood(config, data_path(source))
    except UserError as error:
        raise UserError(f"--data {source}: {error}") from error
    return found._replace(keys={**found.keys, "name": name})


def _names(data: Sequence[str]) -> list[str]:
    """What several sources are called: by their files' names, in full if those are alike."""
    stems = [Path(one).stem or one for one in data]  # "." has none
    return stems if len(set(stems)) == len(stems) else list(data)


def _understood(config: TrainConfig, source: Any) -> Understood:
    found = forms.recognise(source, config.tasks[0], config.text_field, config.label_field)
    if "answers" in found.keys and ESTIMATORS[config.estimator].secret:
        raise UserError(
            f"--task: labels that are found in the examples are not private; allowed with --estimator "
            f"{config.estimator}: a task's file that says them (hizoo-lite data inspect --write-task FILE)"
        )
    return found


def task_of(config: TrainConfig, data: Records | None = None) -> Task:
    """The task of a configuration: the one it names, or what its data is."""
    return of_sources(config, made_of(understood(config, data)))


def made_of(found: Sequence[Understood]) -> dict[str, Any] | None:
    """The keys of a task's file that says what data was found to be; None of nothing."""
    if not found:
        return None
    return found[0].keys if len(found) == 1 else {SEVERAL: [one.keys for one in found]}


def steps_of(config: TrainConfig, splits: Splits) -> TrainConfig:
    """The configuration with the steps that its epochs are, and the dev examples that are held out."""
    if config.epochs is not None:
        steps = math.ceil(config.epochs * len(splits.train) / config.batch_size)
        config = replace(config, steps=steps, epochs=None)
    if config.dev_examples == "auto" and splits.dev_size is not None:
        config = replace(config, dev_examples=splits.dev_size)
    return config


def length_line(config: TrainConfig, examples: int) -> str:
    """What a run's steps are of its training examples: a default of many steps is many epochs of a few."""
    epochs = config.steps * config.batch_size / examples
    batch, steps = counted(config.batch_size, "example"), counted(config.steps, "step")
    return f"{steps} of {batch}: {epochs:.1f} epochs of {examples:,}"


def division_lines(config: TrainConfig, splits: Splits, task: Task) -> list[str]:
    """What a run tells of its examples: how they are divided, and how often they are seen."""
    few = few_held_out(config, splits, task.metric)
    seen = length_line(config, len(splits.train))
    return [*splits.lines(task.name), *filter(None, [few, _chosen_loss(config, task)]), seen]


def _chosen_loss(config: TrainConfig, task: Task) -> str:
    """What is to be told of `--loss auto` where it is another one than a task alone would have; else ""."""
    if config.loss != "auto" or not _is_mixed(task.parts):
        return ""
    return "--loss answer: choices that stand beside texts are trained on their answers' tokens, as texts are"


def _is_mixed(parts: Sequence[Task]) -> bool:
    """Whether there are choices beside others."""
    return len({part.kind == "choice" for part in parts}) > 1


def few_held_out(config: TrainConfig, splits: Splits, metric: str) -> str:
    """What is to be told if the test examples, or dev ones that are evaluated, are too few; else ""."""
    held_out = {"test": splits.test, "dev": splits.dev if config.eval_every else []}
    of_tasks = {part: Counter(map(part_of, found)).values() for part, found in held_out.items()}
    return verdict.too_few({part: min(counts, default=0) for part, counts in of_tasks.items()}, metric)


def find_task(name: str | tuple[str, ...]) -> Task:
    """A built-in task, one in a .toml file, or the embedded one; several as one."""
    return tasks.of_tasks(_found(name))


def form_lines(found: Sequence[Understood], splits: Splits, *, of_objective: bool = False) -> list[str]:
    """What is told of data that was recognised, see `Understood.lines`; of several sources each by name."""
    counts = splits.sizes or (splits.total + len(splits.left_out),)
    names = [f"{one.keys['name']}, " if len(found) > 1 else "" for one in found]
    each = zip(found, names, counts, strict=False)
    return [name + line for one, name, count in each for line in one.lines(count, of_objective=of_objective)]


def of_sources(config: TrainConfig, task: TaskLike | None = None) -> Task:
    """The task of a configuration whose data is no form, or `task`: of several sources, each with its weight.

    A single task of several sources is one of each, which are called by the sources.

    Raises:
        UserError: if there are as many neither of data nor of weights.
    """
    given, weights = one_or_several(config.data), one_or_several(config.task_weight)
    found = _found(config.task) if task is None else list(tasks.get(task).parts)
    if len(found) == 1 and len(given) > 1:
        found = [replace(found[0], name=name) for name in _names(given)]
    for name, count in (("data", len(given)), ("task-weight", len(weights))):
        if count not in (0, len(found)):
            raise UserError(f"--{name}: got {count}, allowed: one for each of {len(found)} tasks, or none")
    return tasks.of_tasks(found, weights)


def _found(name: str | tuple[str, ...]) -> list[Task]:
    """The tasks of these names; a file may have several."""
    found = [tasks.get(DEMO / "task.toml" if one == EMBEDDED else one) for one in one_or_several(name)]
    return [part for task in found for part in task.parts]


def data_path(data: str | None) -> Path | None:
    """Where the data is; None means the hub."""
    if data is None:
        return None
    return DEMO if data == EMBEDDED else Path(data)


def run_splits(config: TrainConfig, task: Task, data: Records | None = None) -> Splits:
    """`make_splits`, with what a run needs: test examples, and dev ones if they are asked for."""
    splits = make_splits(config, task, data)
    if config.eval_every and not splits.dev:
        raise UserError("--eval-every: there are no dev examples; allowed: 0, or --dev-examples above 0")
    if not splits.test:
        raise UserError(
            f"--data: {config.data} leaves no test examples; give more data or fewer --dev-examples"
        )
    for name in ("dev", "test") if config.eval_every else ("test",):
        there = {part_of(example) for example in getattr(splits, name)}
        for number, part in enumerate(task.parts):
            if number not in there:
                raise UserError(f"--data: there are no {name} examples of task {part.name}; give more data")
    return splits


def with_tasks(run: TrainConfig, given: Mapping[str, Any]) -> TrainConfig:
    """A run's settings with the given ones, to evaluate on: of its tasks those that are given, their data."""
    changes = {"task_weight": None, **given}
    names = one_or_several(as_one_or_several(changes.get("task")))
    each = _own_tasks(run) if names else []
    own = {called: (task, data) for called, task, data in each}
    if len({task for _, task, _ in each}) == len(each):  # which name one, too
        own |= {task: (task, data) for _, task, data in each}
    if names and set(names) <= set(own):
        changes["task"] = as_one_or_several([own[name][0] for name in names])
        if "data" not in changes and run.data is not None:
            changes["data"] = as_one_or_several([own[name][1] for name in names])
        if run.loss == "auto" and _is_mixed(_found(run.task)):
            changes.setdefault("loss", "answer")  # as each has it in the run, beside the others
    return replace(run, resume=False, **changes)


def of_each(config: TrainConfig) -> list[TrainConfig]:
    """The configuration of each of several sources by itself. UserError as of `of_sources`."""
    given = one_or_several(config.data)
    if len(given) < 2:
        return [config]
    if forms.is_form(config.tasks[0]):
        return [replace(config, data=one) for one in given]
    of_sources(config)
    return [replace(config, task=task, data=data) for _, task, data in _own_tasks(config)]


def _own_tasks(run: TrainConfig) -> list[tuple[str, str, str | None]]:
    """What each task of a run is called, the setting that names it, and that of its data."""
    given = one_or_several(run.data)
    called = as_set = run.tasks
    if len(run.tasks) == 1 < len(given):
        parts = [part.name for part in _found(run.task)]
        called = tuple(parts if len(parts) > 1 else _names(given))
        as_set = tuple(f"{run.tasks[0]}:{part}" if len(parts) > 1 else run.tasks[0] for part in called)
    return list(zip(called, as_set, given or (None,) * len(called), strict=True))


def split_part(config: TrainConfig, task: Task, split: str, limit: int | None) -> list[Example]:
    """The first `limit` examples, of each task, of a part of the data. UserError if it is empty.

    split "all": every example of a file that `is_whole`.
    """
    if split == "all":
        [path] = sources(config, task)
        left_out: list[LeftOut] | None = [] if leaves_out(config, task) and not config.strict else None
        return task.load(path, "train", left_out)[:limit]
    settled = config.dev_examples != "auto" or len(task.parts) == 1  # else a run may have held out none
    splits = make_splits(replace(config, eval_every=1) if split == "dev" and settled else config, task)
    every: list[Example] = getattr(splits, split)
    own = [[example for example in every if part_of(example) == part] for part in range(len(task.parts))]
    part = [example for examples in own for example in examples[:limit]]
    if not part:
        raise UserError(f"--split: the {split} part of {config.data} is empty; allowed: another part")
    return part


def which_part(given: str | None, config: TrainConfig, task: Task, *, names_data: bool) -> str:
    """The part that is evaluated: as given, else test; of a file that `is_whole`, all if it is named anew.

    UserError for "all" of other data.
    """
    whole = is_whole(config, task)
    if given == "all" and not whole:
        refuse(["--split: got 'all', allowed with one file of your own data: train, dev, test elsewhere"])
    return given or ("all" if names_data and whole else "test")


def is_whole(config: TrainConfig, task: Task) -> bool:
    """Whether the data is a single file of the user's own, which nothing says how to divide."""
    found = sources(config, task)
    return len(found) == 1 and not task.is_published and found[0] is not None and found[0].is_file()


def learnable(encoder: Encoder, examples: list[Example]) -> list[Example]:
    """The examples without texts of a single token, which are counted in the log.

    UserError if none is left.
    """
    kept = [example for example in examples if encoder.teaches(example)]
    if len(kept) < len(examples):
        first = next(where(example) for example in examples if not encoder.teaches(example))
        if not kept:
            raise UserError(f"{first}: no text here has more than one token; there is nothing to predict")
        _log.warning(
            "%d of %d texts are left out: a single token each, and nothing to predict; the first is %s",
            *(len(examples) - len(kept), len(examples), first),
        )
    return kept


def fitting(encoder: Encoder, examples: list[Example], config: TrainConfig) -> list[Example]:
    """The examples of an evaluation: left out and divided as those of a run are."""
    if not leaves_out(config, encoder.task):
        return learnable(encoder, examples)
    found = tasks.usable(encoder, examples, training=False, strict=config.strict)
    check_mostly_good(f"--data: {config.data}", found.left_out, len(examples))
    for line in found.lines(encoder):
        _log.warning("%s", line)
    return found.examples


def usable_splits(encoder: Encoder, splits: Splits, config: TrainConfig, *, refuses: bool = True) -> Splits:
    """The examples that can be learnt from and evaluated, for this tokenizer and length.

    UserError if most cannot be and `refuses`, or with --strict for the first that cannot.
    """
    if not leaves_out(config, encoder.task):
        return splits
    made = {
        name: tasks.usable(
            encoder,
            getattr(splits, name),
            training=name == "train",
            strict=config.strict,
            answered=name == "train" and answers_steps(config, encoder),
        )
        for name in ("train", "dev", "test")
    }
    count = sum(len(getattr(splits, name)) for name in made)
    left_out = [one for part in made.values() for one in part.left_out]
    if refuses:
        check_mostly_good(f"--data: {config.data}", left_out, count)
    notes = tuple(f"{name}: {line}" for name, part in made.items() for line in part.lines(encoder))
    train, dev, test = (part.examples for part in made.values())
    for name in ("train", "test") if refuses else ():
        if not made[name].examples:
            raise UserError(f"--data: all {name} examples are left out; the first: {': '.join(left_out[0])}")
    left = (*splits.left_out, *left_out)
    return replace(splits, train=train, dev=dev, test=test, left_out=left, notes=(*splits.notes, *notes))


def learnable_splits(encoder: Encoder, splits: Splits) -> Splits:
    """`learnable` of every part."""
    train, dev, test = (learnable(encoder, part) for part in (splits.train, splits.dev, splits.test))
    return replace(splits, train=train, dev=dev, test=test)


def task_encoder(
    tokenizer: Tokenizer,
    kind: ModelKind,
    task: Task,
    limit: int,
    loss: str,
    *,
    classes: Any = None,
    vocabulary: int | None = None,
) -> Encoder:
    """The task's encoder for sequences of at most `limit` tokens; `loss` is one of `TrainConfig`'s.

    classes: what the model calls its own, `id2label`. vocabulary: as `Encoder` takes it.
    """
    chosen: Any = None if loss == "auto" else loss
    if chosen is None and kind == "causal" and any(part.kind != "choice" for part in task.parts):
        chosen = "answer"  # of choices beside others, too
    most = min(limit, tokenizer.model_max_length)
    found = []
    for part in task.parts:
        order = output_order(part, classes) if kind == "classifier" else None
        found.append(Encoder(tokenizer, kind, part, most, loss=chosen, order=order, vocabulary=vocabulary))
    return MixedEncoder(task, found) if isinstance(task, Mixture) else found[0]


def begin(estimator: Estimator, config: TrainConfig, splits: Splits) -> list[str]:
    """`Estimator.begin` of a run's examples."""
    parts = ["dev"] * bool(config.eval_every) + ["test"]
    evaluated = [
        f"evaluations on {part} examples" + " (out of the training file)" * (part in splits.carved)
        for part in parts
    ]
    return estimator.begin(len(splits.train), config.batch_size, config.steps, evaluated)


def make_stepper(
    config: TrainConfig,
    traversal: BranchLosses | None,
    arrays: Arrays,
    space: AttachedSpace,
    estimator: Estimator | None = None,
    curvature: Curvature | None = None,
) -> Stepper:
    """The step of a configuration; `traversal`, `arrays` and `space` as `Stepper` takes them."""
    if estimator is None or not config.estimates:
        estimator = estimators.configured(config)
    if curvature is None:
        curvature = for_estimator(config, estimator)
    course = step_size.Schedule(config.lr_schedule, 1.0, config.warmup_steps, config.steps)
    smoothing = step_size.Smoothing(config.smoothing_schedule, config.smoothing, total_steps=config.steps)
    return Stepper(
        traversal,
        arrays,
        space,
        estimator,
        curvature,
        step_size.step_size(
            config.lr,
            course,
            estimator.measures_within(config.steps),
            estimator.predicts,
            estimator.directions_of_step,
        ),
        seed=config.seed,
        mu=float(config.mu),
        smoothing=smoothing,
        weight_decay=config.weight_decay,
        clip=space.clip if config.clip is None else config.clip,
        course=course,
    )
