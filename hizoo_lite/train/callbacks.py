"""Callbacks: whoever is told how a run goes, and may ask it to evaluate, to save or to end.

Names, arguments and attributes are those of transformers' `TrainerCallback`, so that its callbacks do as
well: `on_step_end(args, state, control, **kwargs)` and so on, any of `EVENTS`. With `logs` or `metrics` come
`line`, that of metrics.jsonl, with `on_evaluate` and `on_predict` `found`, the whole `Evaluation`, and with
`on_step_end` `record`, all that the step was. The progress display
and the trackers are callbacks too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from types import TracebackType
from typing import Any

from hizoo_lite.config import TrainConfig, default
from hizoo_lite.errors import UserError
from hizoo_lite.train.checkpoint import path_of
from hizoo_lite.train.evaluate import Evaluation
from hizoo_lite.train.folder import RunFolder

#: What a callback may have a method for. Of our own: `on_message(text=)`, a line worth reading, and
#: `on_evaluate_begin(when=, examples=)`. `on_evaluate` is of the dev examples; `on_predict` of the test
#: examples, before and after the run. `on_prediction_step` says how many `examples` more are done. Hidden
#: states of the training examples that are computed once are told as an evaluation without a result.
EVENTS = (
    *("on_train_begin", "on_step_begin", "on_step_end", "on_log", "on_evaluate", "on_predict", "on_save"),
    *("on_prediction_step", "on_train_end", "on_message", "on_evaluate_begin"),
)
#: `when` of those hidden states.
HIDDEN = "hidden states"
#: What transformers calls the part of the data an evaluation is of.
_PREFIXES = {"dev": "eval", "before": "test", "after": "test"}


@dataclass(frozen=True)
class Arguments:
    """The settings of a run by the names of transformers' `TrainingArguments`, for its callbacks.

    Attributes:
        output_dir: the run folder.
        max_steps, num_train_epochs: of the whole run.
        per_device_train_batch_size, per_device_eval_batch_size: examples of a step, and of an evaluation.
        gradient_accumulation_steps: parts in which a batch goes through.
        learning_rate, lr_scheduler_type, warmup_steps, weight_decay, seed: as of `TrainConfig`; the rate may
            be "auto".
        eval_strategy, eval_steps: "steps" or "no", and between evaluations on dev.
        save_strategy, save_steps, save_total_limit: likewise of checkpoints.
        load_best_model_at_end: whether the adapter is the best step's in the end.
        metric_for_best_model, greater_is_better: the task's main metric.
        objective: what the points of a step are compared by; transformers has no such argument.
        logging_strategy, logging_steps, logging_first_step, eval_delay, disable_tqdm: constant; every step is
            logged.
    """

    output_dir: str
    max_steps: int
    num_train_epochs: float
    per_device_train_batch_size: int
    per_device_eval_batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float | str
    lr_scheduler_type: str
    warmup_steps: int
    weight_decay: float
    seed: int
    eval_strategy: str
    eval_steps: int | None
    save_strategy: str
    save_steps: int
    save_total_limit: int | None
    load_best_model_at_end: bool
    metric_for_best_model: str
    greater_is_better: bool
    objective: str = default("objective")
    logging_strategy: str = "steps"
    logging_steps: int = 1
    logging_first_step: bool = True
    eval_delay: int = 0
    disable_tqdm: bool = True

    @classmethod
    def of(cls, config: TrainConfig, folder: RunFolder, metric: str, examples: int) -> Arguments:
        """Those of a run.

        Args:
            config: its settings.
            folder: its folder.
            metric: the task's main metric.
            examples: to train on.
        """
        return cls(
            output_dir=str(folder.path),
            max_steps=config.steps,
            num_train_epochs=config.steps * config.batch_size / examples,
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=config.eval_batch_size,
            gradient_accumulation_steps=config.accumulate,
            learning_rate=config.lr,
            lr_scheduler_type=config.lr_schedule,
            warmup_steps=config.warmup_steps,
            weight_decay=config.weight_decay,
            seed=config.seed,
            eval_strategy="steps" if config.eval_every else "no",
            eval_steps=config.eval_every or None,
            save_strategy="steps" if config.save_every else "no",
            save_steps=config.save_every,
            save_total_limit=config.save_total_limit or None,
            load_best_model_at_end=config.keep == "best",
            metric_for_best_model=metric,
            greater_is_better=metric != "loss",
            objective=config.objective,
        )

    def to_dict(self) -> dict[str, Any]:
        """By name."""
        return asdict(self)

    def to_json_string(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=2)


@dataclass
class State:
    """Where the run stands, as transformers' `TrainerState`.

    Attributes:
        max_steps: of the whole run.
        num_train_epochs: of the whole run.
        train_batch_size: examples of a step.
        eval_steps: between evaluations on dev; None without any.
        save_steps: between checkpoints.
        read_history: reads what was logged before.
        logging_steps: 1.
        global_step: steps taken.
        epoch: epochs that are over, with a fraction.
        best_metric: of the evaluations on dev before the one that is being told; None before the first.
        best_global_step: the step it is of.
        best_model_checkpoint: folder of that step's checkpoint, if it was saved.
        is_local_process_zero: True: callbacks are called in the main process alone.
        is_world_process_zero: likewise.
        is_hyper_param_search: False.
    """

    max_steps: int
    num_train_epochs: float
    train_batch_size: int
    eval_steps: int | None
    save_steps: int
    read_history: Callable[[], list[dict[str, Any]]]
    logging_steps: int = 1
    global_step: int = 0
    epoch: float = 0.0
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False

    @cached_property
    def log_history(self) -> list[dict[str, Any]]:
        """What `on_log` was told so far, of a resumed run from its start; each with its `step`."""
        return self.read_history()


@dataclass
class Control:
    """What callbacks ask for, looked at once a step is over; as transformers' `TrainerControl`.

    Attributes:
        should_training_stop: end the run as if it had no more steps.
        should_epoch_stop: changes nothing: batches go on from one epoch to the next.
        should_save: write a checkpoint.
        should_evaluate: evaluate on dev.
        should_log: changes nothing: every step is logged.

    Example:
        >>> class StopsEarly:
        ...     def on_step_end(self, args, state, control, **kwargs):
        ...         control.should_training_stop = state.global_step >= 100
        >>> control = Control()  # fit(..., callbacks=[StopsEarly()]) makes one
        >>> StopsEarly().on_step_end(None, State(500, 1.0, 16, None, 500, list, global_step=100), control)
        >>> control.should_training_stop
        True
    """

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False


def checked(callbacks: Sequence[object]) -> tuple[object, ...]:
    """The `callbacks`; UserError if one of them has no method of a callback."""
    for callback in callbacks:
        if isinstance(callback, type) or not any(callable(getattr(callback, name, None)) for name in EVENTS):
            raise UserError(
                f"callbacks: got {callback!r:.80}, allowed: objects with a method of {', '.join(EVENTS)}"
            )
    return tuple(callbacks)


class Callbacks:
    """The callbacks of a run, called in their order; open from its begin to its end.

    One that raises ends the run as a signal does: after the step in progress, with everything saved. The
    error is `failure`, for who runs the loop to raise.
    """

    def __init__(
        self,
        callbacks: Sequence[object],
        config: TrainConfig,
        folder: RunFolder,
        *,
        metric: str,
        examples: int,
        about: Mapping[str, Any],
    ) -> None:
        """`examples` to train on; `about`: what every event comes with, such as the model."""
        self._callbacks, self._folder, self._about = callbacks, folder, about
        self._examples, self._batch_size = examples, config.batch_size
        self._begun = False
        self.args = args = Arguments.of(config, folder, metric, examples)
        lengths = args.max_steps, args.num_train_epochs, config.batch_size
        self.state = State(*lengths, args.eval_steps, args.save_steps, self._history)
        self.control: Any = Control()
        self.failure: Exception | None = None

    def __enter__(self) -> Callbacks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._begun:
            self.call("on_train_end")

    def add(self, callback: object) -> None:
        """Another one."""
        self._callbacks = (*self._callbacks, callback)

    def call(self, event: str, **more: Any) -> None:
        """Tell all of them."""
        for callback in self._callbacks:
            method = getattr(callback, event, None)
            if method is None:
                continue
            try:
                answer = method(self.args, self.state, self.control, **self._about, **more)
            except Exception as error:
                self.fail(error)
            else:
                self.control = self.control if answer is None else answer

    def fail(self, error: Exception) -> None:
        """End the run; the first error counts."""
        self.failure = error if self.failure is None else self.failure

    def message(self, text: str) -> None:
        """A line worth reading: what was loaded, an evaluation's result, where something was saved."""
        self.call("on_message", text=text)

    def begin(self, step: int) -> None:
        """The run begins, or goes on after so many steps."""
        self._begun = True
        self._reached(step)
        for line in self._folder.evaluations():
            self._note_best(line)
        self.call("on_train_begin")

    def step_begin(self) -> None:
        """What was asked for at the last step is done, or was not asked for in time."""
        self.control.should_save = self.control.should_evaluate = self.control.should_log = False
        self.call("on_step_begin")

    def step_end(self, record: Any, line: Mapping[str, Any]) -> None:
        """A step is done; a skipped one is not logged."""
        self._reached(record.step + 1)
        self.call("on_step_end", record=record)
        if not record.skipped:
            self._log(line)

    def evaluation(self, when: str, examples: int) -> None:
        """An evaluation begins."""
        self.call("on_evaluate_begin", when=when, examples=examples)

    def advanced(self, examples: int) -> None:
        """So many more examples of it are done."""
        self.call("on_prediction_step", examples=examples)

    def evaluated(self, line: Mapping[str, Any], found: Evaluation) -> None:
        """An evaluation is done."""
        self._log(line)
        is_dev = line["when"] == "dev"
        self.control.should_evaluate = self.control.should_evaluate and not is_dev
        event = "on_evaluate" if is_dev else "on_predict"
        self.call(event, metrics=self._logs(line), line=line, found=found)
        self._note_best(line)

    def saved(self) -> None:
        """A checkpoint is there."""
        self.control.should_save = False
        self._find_best_checkpoint()
        self.call("on_save")

    def _reached(self, step: int) -> None:
        self.state.global_step, self.state.epoch = step, self._epochs(step)

    def _epochs(self, steps: int) -> float:
        """How many epochs so many steps are; a whole number where one ends."""
        return steps * self._batch_size / self._examples

    def _log(self, line: Mapping[str, Any]) -> None:
        logs = self._logs(line)
        if "log_history" in vars(self.state):
            self.state.log_history.append(self._entry(line))
        self.call("on_log", logs=logs, line=line)

    def _logs(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """A line of metrics.jsonl by transformers' names."""
        if line["kind"] == "step":
            found = _loss(line) | {"learning_rate": line["lr"]}
            found |= {name: line[name] for name in ("projected_grad", "curvature") if line[name] is not None}
        else:
            prefix = _PREFIXES[line["when"]]
            found = {f"{prefix}_{name}": value for name, value in scores(line).items()}
            found[f"{prefix}_runtime"] = line["seconds"]
        return found | {"epoch": self._epochs(_step(line))}

    def _entry(self, line: Mapping[str, Any]) -> dict[str, Any]:
        return {**self._logs(line), "step": _step(line)}

    def _history(self) -> list[dict[str, Any]]:
        return [self._entry(line) for line in self._folder.read_metrics() if not line.get("skipped")]

    def _note_best(self, line: Mapping[str, Any]) -> None:
        """Take in an evaluation on dev."""
        state, value = self.state, line.get(self.args.metric_for_best_model)
        if line["when"] != "dev" or value is None:
            return
        best = state.best_metric
        if best is None or (value > best if self.args.greater_is_better else value < best):
            state.best_metric, state.best_global_step = value, line["step"]
        self._find_best_checkpoint()

    def _find_best_checkpoint(self) -> None:
        step = self.state.best_global_step
        path = None if step is None else path_of(self._folder.checkpoints, step)
        self.state.best_model_checkpoint = str(path) if path is not None and path.is_dir() else None


class Tracker:
    """Sends what a run learns to accelerate's trackers."""

    def __init__(self, log: Callable[[dict[str, float], int], object]) -> None:
        self._log = log

    def on_log(self, args: Any, state: Any, control: Any, *, line: Mapping[str, Any], **more: Any) -> None:
        """A step or an evaluation."""
        group = line.get("when", "train")
        found = scores(line) if line["kind"] == "eval" else _scalars(line)
        self._log({f"{group}/{name}": value for name, value in found.items()}, line["step"])


def scores(line: Mapping[str, Any]) -> dict[str, float]:
    """Loss and metrics of an evaluation's line."""
    beside = ("kind", "when", "step", "examples", "seconds", "inference_peak_bytes")
    return {name: value for name, value in line.items() if name not in beside}


def _scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Of a step's line."""
    names = ("projected_grad", "lr", "seconds", "curvature")
    return _loss(line) | {name: line[name] for name in names if line[name] is not None}


def _loss(line: Mapping[str, Any]) -> dict[str, float]:
    """Of a step's line; nothing if it tells none."""
    losses = line["losses"]
    return {"loss": sum(losses) / len(losses)} if losses else {}


def _step(line: Mapping[str, Any]) -> int:
    """Steps taken when a line was written."""
    return int(line["step"]) + (line["kind"] == "step")
