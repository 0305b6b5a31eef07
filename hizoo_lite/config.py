"""Every setting of a run: one frozen dataclass that is signature, flags, TOML keys and help.

A field says its type, default, allowed values and help here and nowhere else: `cli/options.py` makes the
flags of `hizoo-lite train` from it and `config_file.py` reads and writes it as TOML. All problems are
reported together. Which members an axis has, and the settings that are theirs, is in `registry.py`: those
become fields behind the axis. This module does not import torch, so that `--help` answers at once.
"""

# ruff: noqa: RUF009 - `_setting` is `dataclasses.field` with its metadata spelled out

from __future__ import annotations

import inspect
import math
import re
import sys
import types
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from hizoo_lite.errors import UserError
from hizoo_lite.registry import CURVATURES, ESTIMATORS, OBJECTIVES, SPACES, Registry
from hizoo_lite.units import ALLOWED_SIZES, parse_bytes

BitsName = Literal["nf4", "fp4", "int8", "none"]
ComputeName = Literal["auto", "bf16", "fp16", "float32"]
ScheduleName = Literal["constant", "linear", "cosine", "stages"]
KindName = Literal["auto", "causal", "masked", "classifier"]
TrackerName = Literal[
    "none", "tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"
]

#: What `--task` is called that data says by itself.
AUTO = "auto"
#: What `--model`, `--task` and `--data` call the tiny model and the task inside the package.
EMBEDDED = "embedded"
#: Of a run folder: the task that was made of the data.
TASK_FILE = "task.toml"
#: The folder of all three.
DEMO = Path(__file__).resolve().parent / "demo"


def _setting(default: Any, help: str, *, group: str, **rules: Any) -> Any:
    """A field with its help. Rules: minimum, above, maximum (numbers), size, pattern (texts), several.

    several: as many as are given, of a type that has a tuple beside the type of one; see `one_or_several`.
    """
    return field(default=default, metadata={"help": help, "group": group, **rules})


def _axis(registry: Registry[Any], help: str = "", *, group: str, **rules: Any) -> Any:
    """A field that names a member of an axis; with `pattern`, which `called` is in words, or another text."""
    metadata = {"help": help, "group": group, "axis": registry, **rules}
    return field(default=next(iter(registry)), metadata=metadata)


Made = TypeVar("Made")


def _with_members(made: type[Made]) -> type[Made]:
    """The class with a field for every setting of a member, behind the one that names the member."""
    written, annotations = made.__annotations__, {}
    for name, annotation in written.items():
        annotations[name] = annotation
        rules = getattr(made, name).metadata
        for own, setting in rules["axis"].settings.items() if "axis" in rules else ():
            annotations[own] = setting.kind
            setattr(made, own, _setting(setting.default, setting.help, group=rules["group"], **setting.rules))
    made.__annotations__ = annotations
    return made


@dataclass(frozen=True, kw_only=True)
@_with_members
class TrainConfig:
    """Every setting of a run. `hizoo-lite train` has a flag for each, and TOML files a key.

    Raises:
        UserError: naming every field that is wrong, what was got and what is allowed.

    Example:
        >>> config = TrainConfig(model="embedded", task="embedded", space="lora", rank=4, steps=100)
        >>> config.rank, config.mu, config.estimator
        (4, 0.001, 'hizoo')
    """

    model: str = _setting(
        "", "folder or hub id of a Hugging Face model; 'embedded' is the demo's", group="What"
    )
    revision: str | None = _setting(None, "branch, tag or commit of a hub model", group="What")
    kind: KindName = _setting("auto", "kind of model; auto reads the architecture's name", group="What")
    task: str | tuple[str, ...] = _setting(
        "auto",
        "a built-in task, a task's .toml, or a form of data: messages, sharegpt, completion, alpaca, "
        "classification, text; auto: the form that the data has; 'embedded' is the demo's; several that are "
        "named train one model on all",
        group="What",
        several=True,
    )
    data: str | tuple[str, ...] | None = _setting(
        None,
        "file or folder, or a data set of the hub (org/name, org/name:split), of several tasks one each in "
        "their order; several of one task, or of forms, are trained on together; without it, the task's own "
        "on the hub",
        group="What",
        several=True,
    )
    text_field: str | None = _setting(
        None,
        "column of the texts, of a form (of completion the prompts, of alpaca the instructions); without it "
        "by its name",
        group="What",
    )
    label_field: str | None = _setting(
        None,
        "column of the labels, of a classification (of completion the completions, of alpaca the outputs); "
        "without it by its name",
        group="What",
    )
    task_weight: float | tuple[float, ...] | None = _setting(
        None,
        "of several tasks, or of several --data, one each in their order: their shares of the examples of "
        "every batch; without it all count the same",
        group="What",
        several=True,
        above=0.0,
    )
    chat_template: str | None = _setting(
        None,
        "of conversations, for a base model that has none, or in place of its own: chatml, zephyr, alpaca, "
        "or a .jinja file; goes with exports",
        group="What",
    )
    out: str | None = _setting(
        None, "run folder, new or empty; without it ./hizoo-run, with a number if that is taken", group="What"
    )

    bits: BitsName | None = _setting(
        None,
        "stored form of the blocks' linear layers; without it what the checkpoint has, else nf4",
        group="Weights",
    )
    double_quant: bool = _setting(True, "quantize the 4-bit scales as well", group="Weights")
    compute_dtype: ComputeName = _setting(
        "auto", "dtype of matrix products; activations stay float32", group="Weights"
    )
    device: str = _setting(
        "auto", "auto, cpu, cuda or cuda:N", group="Weights", pattern="auto|cpu|cuda(:\\d+)?"
    )

    threads: int | None = _setting(
        None, "CPU threads of a product; without it torch's choice", group="Weights", minimum=1
    )

    space: str = _axis(SPACES, group="Space")
    targets: str = _setting(
        "auto",
        "attention (query and value), all-linear, or names of linear layers with commas; "
        "auto: attention for adapters, all-linear for weights",
        group="Space",
    )
    blocks: int | Literal["all", "auto"] = _setting(
        "auto",
        "how many of the model's blocks are trained, from the top; auto: a third for adapters, all for "
        "weights, and if targets names blocks",
        group="Space",
        minimum=1,
    )
    exact_blocks: int | Literal["all"] = _setting(
        0,
        "in how many blocks, from the top, adapters have exact gradients, by reverse mode a block at a time; "
        "auto of --blocks is then as many, and nothing is estimated",
        group="Space",
        minimum=0,
    )
    head: Literal["auto", "exact", "estimated", "none"] = _setting(
        "auto",
        "a classifier's head, or rows added to a language model's head for the tokens of label words: exact "
        "has their gradient from the base branch; estimated perturbs a classifier's head, which a runtime "
        "without gradients can do, and adds no rows; nor are there any beside --exact-blocks; auto: exact, "
        "and estimated with another objective than the loss, or an estimator that is differentially private",
        group="Space",
    )

    init_adapter: str | None = _setting(
        None,
        "begin with the values of this adapter, a run folder or one of PEFT's, and with its layers, rank and "
        "alpha",
        group="Space",
    )

    estimator: str = _axis(ESTIMATORS, group="Method")
    objective: str = _axis(
        OBJECTIVES,
        "what the points of a step are compared by; or FILE.py:NAME, such as rewards.py:brevity, a function "
        "of (prompt, text, row), or of (example, scores or the text written), to a number, the higher the "
        "better: the file is run",
        group="Method",
        pattern=r".+\.py:\w+|in memory:.+",
        called="FILE.py:NAME",
    )
    curvature: str = _axis(CURVATURES, "how the diagonal Hessian is kept", group="Method")
    smoothing: float = _setting(
        0.01, "weight of a new curvature measurement", group="Method", above=0.0, maximum=1.0
    )
    smoothing_schedule: ScheduleName = _setting("constant", "its course over the run", group="Method")
    mu: float | Literal["auto"] = _setting(
        "auto",
        "perturbation scale; auto: 0.001, and 0.3 for adapters with another objective than the loss, where "
        "answers must change for a slope to be seen",
        group="Method",
        above=0.0,
    )
    lr: float | Literal["auto"] = _setting(
        "auto", "learning rate; auto derives it from the measured curvature", group="Method", above=0.0
    )
    lr_schedule: ScheduleName = _setting(
        "linear",
        "course of the learning rate, on top of auto too: zero behind the last step, or halved in stages of "
        "doubled length (DP-ZOSO)",
        group="Method",
    )
    warmup_steps: int = _setting(
        0, "steps in which the learning rate grows from zero", group="Method", minimum=0
    )
    clip: float | None = _setting(
        None,
        "largest size of the projected gradient; without it the space's: 100 in QZO, else no limit",
        group="Method",
        above=0.0,
    )
    weight_decay: float = _setting(
        0.0, "decoupled, times the learning rate; not on biases and norms", group="Method", minimum=0.0
    )

    steps: int = _setting(1000, "steps of the whole run", group="Run", minimum=1)
    epochs: float | None = _setting(
        None, "in place of --steps: how often every training example comes", group="Run", above=0.0
    )
    batch_size: int = _setting(16, "examples of a step", group="Run", minimum=1)
    balanced: Literal["auto", "off"] = _setting(
        "auto",
        "of tasks with choices: auto gives every batch as many of each class if none has above 1.5 times "
        "the examples of another, and the proportions of the whole otherwise; off if the estimator draws "
        "batches itself",
        group="Run",
    )
    by_length: Literal["auto", "off"] = _setting(
        "auto",
        "auto sorts examples by length among every 8 batches (fewer if an epoch has few) of which a third "
        "or more is padding; off if the estimator draws batches itself",
        group="Run",
    )
    hidden_states: Literal["auto", "off"] = _setting(
        "auto",
        "auto keeps those of the training examples below the first trained block in the run folder, if every "
        "example comes twice or more: a step then runs the blocks above alone",
        group="Run",
    )
    accumulate: int = _setting(
        1, "parts in which a batch goes through, one after the other, to save memory", group="Run", minimum=1
    )
    max_length: int = _setting(256, "tokens a prompt and its answer may have", group="Run", minimum=8)
    loss: Literal["auto", "choice", "answer"] = _setting(
        "auto",
        "choice: cross-entropy over the candidates; answer: over the answer's tokens; auto: choice if every "
        "task has candidates",
        group="Run",
    )
    seed: int = _setting(0, "of splits, batches, new parameters and noise", group="Run", minimum=0)
    train_examples: int | Literal["auto"] = _setting(
        "auto",
        "examples to train on, at most; auto: all, 1000 of a published task",
        group="Run",
        minimum=1,
    )
    dev_examples: int | Literal["auto"] = _setting(
        "auto",
        "for --eval-every; auto: of a file at most 500; if there is none, a tenth of the train file, at "
        "most 200, is held out if --eval-every is given, 500 of a published task",
        group="Run",
        minimum=0,
    )
    test_examples: int | Literal["auto"] = _setting(
        "auto",
        "evaluated before and after the run; auto: of a file at most 1000; if there is none, a tenth of "
        "the train file, at most 200, is held out, 1000 of a published task",
        group="Run",
        minimum=1,
    )
    all_data: Literal["auto", "off"] = _setting(
        "auto",
        "auto uses own data as a whole: limits are those given, long texts are divided, what cannot be used "
        "is left out and listed; off: as earlier versions did, where parts share a small train file in "
        "proportion to their limits, a bad row ends the run and a long text ends at --max-length",
        group="Run",
    )
    strict: bool = _setting(
        False, "refuse data with an example that cannot be used, in place of leaving it out", group="Run"
    )
    k_shot: int | None = _setting(
        None, "training examples of each class, in place of --train-examples", group="Run", minimum=1
    )
    eval_every: int = _setting(0, "steps between evaluations on dev; 0 for none", group="Run", minimum=0)
    eval_batch_size: int = _setting(32, "examples of an evaluation batch", group="Run", minimum=1)
    save_every: int = _setting(500, "steps between checkpoints; 0 for the end only", group="Run", minimum=0)
    save_total_limit: int = _setting(
        0,
        "checkpoints that are kept, the newest, beside the first and the best; 0 for all",
        group="Run",
        minimum=0,
    )
    keep: Literal["final", "best"] = _setting(
        "final", "what adapter/ holds in the end: the last step's, or the best on dev", group="Run"
    )
    resume: bool = _setting(False, "continue the run that is in the folder, to the bit", group="Run")
    tracker: TrackerName = _setting("none", "experiment tracker, through accelerate", group="Run")
    run_name: str | None = _setting(
        None, "what the tracker calls the run; without it as its folder is called", group="Run"
    )

    profile: str | None = _setting(
        None,
        "machine, by the name of a hardware profile or its file: its budgets, residency and batch size "
        "if none are given, its rates in the plan",
        group="Memory",
    )
    device_budget: str | None = _setting(
        None,
        "memory of the device that the run may take, e.g. 24GiB; exit code 3 if it cannot do with it",
        group="Memory",
        size=True,
    )
    host_budget: str | None = _setting(
        None,
        "memory of the host, e.g. 32GiB; on a CPU the smaller of the two counts",
        group="Memory",
        size=True,
    )
    residency: Literal["auto", "resident", "host", "disk"] = _setting(
        "auto",
        "where the blocks are kept: on the device, in host memory, or on disk; "
        "auto keeps as many as the budget allows on the device",
        group="Memory",
    )
    branch_chunk: int | Literal["auto"] = _setting(
        "auto",
        "token sequences that go through a block together, with all their branches; "
        "auto: a few, so that a step takes about the memory of a plain forward",
        group="Memory",
        minimum=1,
    )

    if TYPE_CHECKING:  # the settings of members

        def __getattr__(self, name: str) -> Any: ...

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, which are mostly one."""
        return one_or_several(self.task)

    @property
    def task_name(self) -> str:
        """The task or tasks, in words; of one that is made of the data, the data as it was given."""
        data = one_or_several(self.data) or (None,) * len(self.tasks)
        tasks = self.tasks if len(self.tasks) > 1 else self.tasks * len(data)
        return ", ".join(dict.fromkeys(map(_task_name, tasks, data)))

    @property
    def estimates(self) -> bool:
        """Whether a step estimates any gradient: not if all blocks that are trained have exact ones."""
        return _estimates(self.exact_blocks, self.blocks)

    @property
    def is_of_loss(self) -> bool:
        """Whether the points of a step are compared by the loss."""
        return self.objective == next(iter(OBJECTIVES))

    def __post_init__(self) -> None:
        for name, field_ in settings().items():
            if "several" in field_.metadata:
                object.__setattr__(self, name, as_one_or_several(getattr(self, name)))
        for name, value in by_members(self).items():
            if getattr(self, name) == "auto":
                object.__setattr__(self, name, value)
        refuse(problems({f.name: getattr(self, f.name) for f in fields(self)}))


def _task_name(task: str, data: str | None) -> str:
    path = Path(task)
    is_runs = path.name == TASK_FILE and (path.parent / "config.toml").is_file()
    if data is None or not (is_runs or task == AUTO):
        return task
    return "rows in memory" if is_runs and Path(data).parent == path.parent else data


def one_or_several(value: Any) -> tuple[Any, ...]:
    """Of a setting that may have several: each; nothing of None."""
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def as_one_or_several(value: Any) -> Any:
    """A list as a tuple; what is in it, if it is one alone: a single one is said and stored by itself."""
    if not isinstance(value, list | tuple):
        return value
    return value[0] if len(value) == 1 else tuple(value)


def by_members(config: TrainConfig) -> dict[str, Any]:
    """What `auto` is of settings that objective and estimator decide; a configuration that is made has it."""
    found: dict[str, Any] = {"head": "exact", "mu": 1e-3}
    if not config.is_of_loss:
        space = SPACES.lines.get(config.space)
        found = {"head": "estimated", "mu": 1e-3 if space is None or space.in_weights else 0.3}
    if config.estimator in ESTIMATORS and ESTIMATORS[config.estimator].secret:
        found |= {"head": "estimated", "balanced": "off", "by_length": "off"}
    return found


def _estimates(exact_blocks: Any, blocks: Any) -> bool:
    """Whether blocks that are trained are more than those with exact gradients."""
    if exact_blocks in (0, "all") or blocks == "all":
        return bool(exact_blocks != "all")
    return bool(blocks != "auto" and blocks > exact_blocks)


AXES: tuple[Registry[Any], ...] = (SPACES, ESTIMATORS, OBJECTIVES, CURVATURES)

#: Of the numbers that a setting may have: a float can say it.
LARGEST = sys.float_info.max

#: What may differ between a run and its continuation: none of these changes what a step computes.
MAY_CHANGE_ON_RESUME = {
    *("out", "resume", "eval_every", "save_every", "eval_batch_size", "tracker", "run_name"),
    *("save_total_limit", "keep"),
    *("profile", "device_budget", "host_budget", "residency"),  # streamed equals resident bitwise
}


def refuse(found: Sequence[str], heading: str = "") -> None:
    """UserError with every problem on a line of its own; nothing if there is none."""
    if found:
        _raise(heading, found)


def _raise(heading: str, found: Sequence[str]) -> NoReturn:
    if len(found) == 1:
        raise UserError(": ".join(filter(None, (heading, found[0]))))
    count = f"{len(found)} problems in the configuration"
    raise UserError("\n  ".join([f"{heading}: {count}" if heading else count, *found]))


@cache
def settings() -> Mapping[str, Field[Any]]:
    """The fields of `TrainConfig` by name, in order."""
    return types.MappingProxyType({f.name: f for f in fields(TrainConfig)})


@cache
def _hints() -> Mapping[str, Any]:
    return get_type_hints(TrainConfig)


def kinds() -> Mapping[str, Any]:
    """The types of the fields, by name; of an axis the literals of its members, or a text if that may be."""
    found: dict[str, Any] = {axis.axis: Literal[tuple(axis)] for axis in AXES}
    open_ones = {name: found[name] | str for name in found if "pattern" in settings()[name].metadata}
    return {**_hints(), **found, **open_ones}


def help_of(name: str) -> str:
    """What field `name` is, and of which members if others lack it; of an axis what each member is."""
    text, axis = (settings()[name].metadata.get(key) for key in ("help", "axis"))
    if axis is not None:
        return "; ".join(filter(None, [text, *(f"{m}: {line.help}" for m, line in axis.lines.items())]))
    owners = next(filter(None, (axis.having(name) for axis in AXES)), [])
    is_shared = any(set(owners) == set(axis) for axis in AXES)
    return f"of {' and '.join(owners)}: {text}" if owners and not is_shared else str(text)


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, the type itself otherwise."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def choices(annotation: Any) -> tuple[str, ...]:
    """The texts that a Literal in this type allows."""
    return tuple(v for m in members(annotation) if get_origin(m) is Literal for v in get_args(m))


def allowed(name: str) -> str:
    """What field `name` may be, in words."""
    annotation, rules = kinds()[name], settings()[name].metadata
    parts = list(choices(annotation))
    if int in members(annotation):
        parts.append("a whole number" + _range(rules))
    if float in members(annotation):
        parts.append("a number" + _range(rules))
    if bool in members(annotation):
        parts.append("true or false")
    if str in members(annotation):
        text = rules.get("called", rules.get("pattern", "a text"))
        parts.append(ALLOWED_SIZES if rules.get("size") else text)
    if rules.get("several"):
        parts.append("several of them")
    return ", ".join(parts)


def _range(rules: Mapping[str, Any]) -> str:
    words = {"minimum": "of {} or more", "above": "above {:g}", "maximum": "up to {:g}"}
    found = [text.format(rules[rule]) for rule, text in words.items() if rule in rules]
    return " " + " and ".join(found) if found else ""


def problems(values: Mapping[str, Any], where: Callable[[str], str] = str) -> list[str]:
    """What is wrong with the settings `values`. `where` names a field as the user did (a flag, a key)."""
    found = [
        f"{where(name)}: got {value!r}, allowed: {allowed(name)}"
        for name, value in values.items()
        if not _fits(name, value)
    ]
    missing = [name for name in ("model", "task") if values.get(name, settings()[name].default) == ""]
    if values.get("task", AUTO) == AUTO and values.get("data") is None:
        missing.append("task")
    found += [f"{where(name)}: missing, it has no default" for name in missing]
    return found + _conflicts({f: values.get(f, settings()[f].default) for f in settings()}, where)


def _fits(name: str, value: Any) -> bool:
    annotation, rules = kinds()[name], settings()[name].metadata
    types_ = members(annotation)
    if value is None:
        return type(None) in types_
    if isinstance(value, tuple):
        return (
            "several" in rules and bool(value) and all(one is not None and _fits(name, one) for one in value)
        )
    if isinstance(value, bool):
        return bool in types_
    if isinstance(value, str):
        if value in choices(annotation):
            return True
        if "pattern" in rules and not re.fullmatch(rules["pattern"], value):
            return False
        return str in types_ and (not rules.get("size") or _is_size(value))
    if isinstance(value, int | float):
        whole_only = float not in types_
        if not (int in types_ or float in types_) or (whole_only and not isinstance(value, int)):
            return False
        return abs(value) <= LARGEST and _in_range(value, rules)
    return False


def _in_range(value: float, rules: Mapping[str, Any]) -> bool:
    return (
        value >= rules.get("minimum", -math.inf)
        and value > rules.get("above", -math.inf)
        and value <= rules.get("maximum", math.inf)
    )


def _is_size(text: str) -> bool:
    try:
        parse_bytes(text)
    except ValueError:
        return False
    return True


def _conflicts(values: Mapping[str, Any], where: Callable[[str], str]) -> list[str]:
    """Settings that are fine alone and not together, or not available yet."""
    named = all(_fits(axis.axis, values[axis.axis]) for axis in AXES)
    found = _member_conflicts(values, where) if named else []
    steps, warmup = values["steps"], values["warmup_steps"]
    if values["epochs"] is not None and steps != default("steps"):
        found.append(
            f"{where('epochs')}: got {values['epochs']!r} beside {where('steps')}; allowed: one of them"
        )
    if isinstance(steps, int) and isinstance(warmup, int) and warmup > steps >= 1:
        found.append(f"{where('warmup_steps')}: got {warmup}, allowed: up to the {steps} of {where('steps')}")
    found += _task_conflicts(values, where)
    if values["epochs"] is not None and isinstance(values["task"], tuple):
        found.append(
            f"{where('epochs')}: got {values['epochs']!r} with several tasks; allowed: {where('steps')}"
        )
    if values["keep"] == "best" and values["eval_every"] == 0:
        found.append(f"{where('keep')}: got 'best', but {where('eval_every')} is 0; allowed: final")
    if values["resume"] is True and values["out"] is None:
        found.append(f"{where('out')}: missing, it names the run folder that is to be resumed")
    return found


def _task_conflicts(values: Mapping[str, Any], where: Callable[[str], str]) -> list[str]:
    """Several tasks, and what is to be said of each of them."""
    if not _fits("task", values["task"]):
        return []
    tasks = one_or_several(values["task"])
    found = [
        f"{where('task')}: got {name!r} twice, allowed: each once"
        for name, count in Counter(tasks).items()
        if count > 1
    ]
    data, weights = (len(one_or_several(values[name])) for name in ("data", "task_weight"))
    if len(tasks) > 1 and data not in (0, len(tasks)):
        allowed = f"one for each of {len(tasks)} tasks, or none"
        found.append(f"{where('data')}: got {values['data']!r}, allowed: {allowed}")
    several = max(len(tasks), data)
    if weights and (several == 1 or weights != several):
        of = f"{several} tasks, or none" if several > 1 else f"several {where('task')} or {where('data')}"
        found.append(f"{where('task_weight')}: got {values['task_weight']!r}, allowed: one for each of {of}")
    return found


def _member_conflicts(values: Mapping[str, Any], where: Callable[[str], str]) -> list[str]:
    """What the members that are named cannot do together, or with other settings."""
    of = (_gradient_conflicts, _objective_conflicts, _estimator_conflicts, _space_conflicts)
    return [problem for conflicts in of for problem in conflicts(values, where)]


def _gradient_conflicts(values: Mapping[str, Any], where: Callable[[str], str]) -> list[str]:
    """Exact gradients, what they begin from, and the learning rate."""
    found, space = [], values["space"]
    valid = all(_fits(name, values[name]) for name in ("exact_blocks", "blocks"))
    estimates = not valid or _estimates(values["exact_blocks"], values["blocks"])
    if not estimates and values["lr"] != "auto":
        found.append(
            f"{where('lr')}: got {values['lr']!r}, but {where('exact_blocks')} has its own; allowed: auto"
        )
    if values["exact_blocks"] != 0 and space not in SPACES.having("exact_blocks"):
        found.append(
            f"{where('exact_blocks')}: got {values['exact_blocks']!r}, allowed with {where('space')} "
            f"{space}: 0"
        )
    if values["init_adapter"] is not None and space not in SPACES.having("rank"):
        allowed = ", ".join(SPACES.having("rank"))
        found.append(
            f"{where('init_adapter')}: got {values['init_adapter']!r}, allowed with --space {allowed}"
        )
    estimator = values["estimator"]
    if values["lr"] == "auto" and estimates and not ESTIMATORS[estimator].measures_curvature:
        found.append(f"{where('lr')}: got 'auto', but {estimator} measures no curvature; allowed: a number")
    return found


def _objective_conflicts(values: Mapping[str, Any], where: Callable[[str], str]) -> list[str]:
    """What there is of the loss alone, beside another objective."""
    if values["objective"] == next(iter(OBJECTIVES)):
        return []
    wrong = _exact(values) | {"curvature_from": (values["curvature_from"] == "losses", "predictions")}
    why = f"which is of the loss, but {where('objective')} is {values['objective']}"
    return _messages(wrong, why, values, where)


def _exact(values: Mapping[str, Any]) -> dict[str, tuple[bool, str]]:
    """Of settings that ask for exact gradients: whether they do, and what does not."""
    return {
        "exact_blocks": (values["exact_blocks"] != 0, "0"),
        "head": (values["head"] == "exact", "auto, estimated, none"),
    }


def _messages(
    wrong: Mapping[str, tuple[bool, str]], why: str, values: Mapping[str, Any], where: Callable[[str], str]
) -> list[str]:
    """A message for each setting that is wrong, with what is allowed."""
    return [
        f"{where(name)}: got {values[name]!r}, {why}; allowed: {allowed}"
        for name, (is_wrong, allowed) in wrong.items()
        if is_wrong
    ]


def _estimator_conflicts(values: Mapping[str, Any], where: Callable[[str], str]) -> list[str]:
    """What an estimator cannot do with its own settings, or with what others say."""
    name = values["estimator"]
    estimator, space = ESTIMATORS[name], values["space"]
    found = _unreleased(values, where) if estimator.secret else []
    own = ESTIMATORS.arguments(name)
    found += estimator.conflicts({k: values[v] for k, v in own.items()}, lambda name: where(own[name]))
    if SPACES.lines[space].in_weights and not estimator.for_weights:
        allowed = ", ".join(name for name, member in ESTIMATORS.items() if member.for_weights)
        found.append(
            f"{where('estimator')}: got {name!r}, but {where('space')} {space} trains weights inside the "
            f"blocks, along one direction with a pair of points; allowed: {allowed}"
        )
    divides = name in ESTIMATORS.having("groups")
    groups, batch = values["groups"], values["batch_size"]
    if divides and all(_fits(name, values[name]) for name in ("groups", "batch_size")) and groups > batch:
        found.append(
            f"{where('groups')}: got {groups}, but {where('batch_size')} is {batch}; allowed: up to that"
        )
    return found if estimator.secret else found + _unspent(values, where)


def _space_conflicts(values: Mapping[str, Any], where: Callable[[str], str]) -> list[str]:
    """What a space of weights, or of scales, cannot do."""
    found, name = [], values["space"]
    space = SPACES.lines[name]
    if values["directions"] not in ("auto", 1):
        estimator = values["estimator"]
        allowed = f"{where('directions')}: got {values['directions']}, allowed: 1 or auto with"
        if "directions" not in ESTIMATORS.arguments(estimator).values():
            found.append(f"{allowed} {where('estimator')} {estimator}")
        if space.in_weights:
            found.append(f"{allowed} {where('space')} {name}")
    if space.in_weights and not space.structured and not CURVATURES[values["curvature"]].sees_tiles:
        allowed = ", ".join(name for name, curvature in CURVATURES.items() if curvature.sees_tiles)
        found.append(
            f"{where('curvature')}: got {values['curvature']!r}, a value for every weight, with "
            f"{where('space')} {name}; allowed: {allowed}"
        )
    if space.of_scales and values["bits"] == "none":
        found.append(
            f"{where('bits')}: got 'none', but {where('space')} {name} trains the scales of quantized "
            "weights; allowed: nf4, fp4, int8"
        )
    return found


def _unspent(values: Mapping[str, Any], where: Callable[[str], str]) -> list[str]:
    """Settings of privacy that were given to an estimator without any."""
    private = {
        field: (name, setting.default)
        for name, line in ESTIMATORS.lines.items()
        for field, setting in line.settings.items()
        if ESTIMATORS[name].secret
    }
    return [
        f"{where(field)}: got {values[field]!r}, but {where('estimator')} is {values['estimator']}; allowed "
        f"with it: {default}, or {where('estimator')} {name}"
        for field, (name, default) in private.items()
        if values[field] != default
    ]


def _unreleased(values: Mapping[str, Any], where: Callable[[str], str]) -> list[str]:
    """Settings that make more of losses than a secret estimator releases."""
    found, estimator = [], f"{where('estimator')} {values['estimator']}"
    if values["task_weight"] is not None:
        found.append(
            f"{where('task_weight')}: got {values['task_weight']!r}, but {estimator} draws every example "
            "with the same probability; allowed: none"
        )
    loss = next(iter(OBJECTIVES))
    wrong = _exact(values) | {"objective": (values["objective"] != loss, loss)}
    why = f"but {estimator} releases noisy sums of differences of losses alone"
    return found + _messages(wrong, why, values, where)


def default(name: str) -> Any:
    """The default of field `name`."""
    value = settings()[name].default
    assert value is not MISSING, name
    return value


_ATTRIBUTES = "\n".join(f"    {name}: {help_of(name)}" for name in settings())
TrainConfig.__doc__ = f"{inspect.cleandoc(TrainConfig.__doc__ or '')}\n\nAttributes:\n{_ATTRIBUTES}\n"
