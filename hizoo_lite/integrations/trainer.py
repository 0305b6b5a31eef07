"""A Trainer in the shape of transformers', whose steps are forward passes alone: a thin layer over `run.fit`.

    trainer = HiZOOTrainer(model, TrainingArguments("runs/mine", max_steps=500), train_dataset=rows,
                           eval_dataset=held_out, processing_class=tokenizer, rank=8)
    trainer.train()

Where it differs: the loss of a batch is the mean over its examples, of each the mean over its tokens; the
blocks' weights are quantized unless `bits` says otherwise; without `eval_dataset` a tenth of the rows is held
out; the output folder is a run folder, with the model that was given beside it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import (
    DefaultFlowCallback,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import IntervalStrategy, PredictionOutput, TrainOutput

from hizoo_lite import run as engine
from hizoo_lite import tasks
from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.config import AXES
from hizoo_lite.engine.load import saved_model
from hizoo_lite.errors import UserError
from hizoo_lite.integrations import arguments
from hizoo_lite.integrations.told import Compute, Told, computed
from hizoo_lite.model.kinds import kind_of, model_path
from hizoo_lite.model.model import Model
from hizoo_lite.registry import SPACES
from hizoo_lite.tasks import Records, TaskLike, forms
from hizoo_lite.tasks.tokenized import COLUMNS
from hizoo_lite.train.evaluate import Evaluation
from hizoo_lite.train.folder import RunFolder, next_free
from hizoo_lite.train.progress import Lines

_log = logging.getLogger(__name__)

Rows = list[dict[str, Any]]
#: What else the labels are called in rows for a Trainer.
_LABELS = ("label", "label_ids")
#: Columns of tokenized rows that transformers' models or TRL's collator read.
_UNREAD = ("position_ids", "inputs_embeds", "completion_mask", "assistant_masks")


class HiZOOTrainer:
    """transformers' `Trainer` with the steps of `fit`: forward passes alone unless `exact_blocks` is given.

    `state` is transformers' `TrainerState`; `run` is the `Run`, once it is trained.

    Args:
        model: a model of transformers, a folder or hub id, or a `Model` of `hizoo_lite.load`.
        args: transformers' arguments; what cannot be honoured is refused, see `arguments.py`.
        data_collator: is called with each row alone, once.
        train_dataset: tokenized rows, which may go through `data_collator`; or rows that a task recognises as
            they are.
        eval_dataset: likewise; None: a tenth of the training rows is held out.
        callbacks: transformers' callbacks, or their classes.
        processing_class: the tokenizer, saved with a model of transformers.
        compute_metrics: of a classifier's `EvalPrediction`.
        task: of rows that are not tokenized, as for `fit`; None: the form that they have.
        read: arguments beside transformers' that a class of this one reads.
        options: fields of `TrainConfig`, and what else `fit` takes; they count more than `args`.

    Raises:
        UserError: for bad input, and for arguments that cannot be honoured.

    Example:
        >>> from transformers import TrainingArguments
        >>> rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(9)]
        >>> args = TrainingArguments("runs/trainer", max_steps=2, use_cpu=True, disable_tqdm=True)
        >>> trainer = HiZOOTrainer("embedded", args, train_dataset=rows, rank=4)
        >>> trainer.options["steps"], trainer.options["rank"]  # trainer.train() runs it
        (2, 4)
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Compute | None = None,
        callbacks: Sequence[Any] | None = None,
        *,
        task: TaskLike | None = None,
        read: frozenset[str] = frozenset(),
        **options: Any,
    ) -> None:
        self.model, self.args = model, args or TrainingArguments("trainer_output")
        self.data_collator, self.compute_metrics = data_collator, compute_metrics
        self.processing_class = processing_class or getattr(data_collator, "tokenizer", None)
        self.options = {**arguments.of(self.args, read), **options}
        if args is not None and "lr" not in self.options:
            _log.warning(
                "learning_rate: %g is %s's default and counts as not given: lr is auto; "
                "%s(..., lr=%g) takes it",
                *(args.learning_rate, type(args).__name__, type(self).__name__, args.learning_rate),
            )
        if "steps" in options:
            self.options.pop("epochs", None)
        self.task, self.state = task, TrainerState()
        self.run: engine.Run | None = None
        self.train_dataset = None if train_dataset is None else self._rows("train_dataset", train_dataset)
        self.eval_dataset = None if eval_dataset is None else self._rows("eval_dataset", eval_dataset)
        shown = [PrinterCallback] if self.args.disable_tqdm else []
        told = [DefaultFlowCallback, *shown, *_checked(callbacks or ())]
        self.callback_handler = CallbackHandler(told, model, self.processing_class, None, None)
        self._told = Told(self.callback_handler, self.args, self.state, compute_metrics)
        self.callback_handler.on_init_end(self.args, self.state, self.control)

    control = property(lambda self: self._told.control)

    def add_callback(self, callback: Any) -> None:
        """Add another `callback`, or its class."""
        self.callback_handler.add_callback(*_checked([callback]))

    def train(self, resume_from_checkpoint: bool | str | None = None) -> TrainOutput:
        """Train to the end.

        Args:
            resume_from_checkpoint: go on with the run in the output folder (True), or in the one that is
                named. What was given is compared with what that run was begun with; a resumed run equals an
                undisturbed one.

        Raises:
            UserError: for bad input; see also `fit`.
        """
        if self.train_dataset is None:
            raise UserError("train_dataset: missing, it is what is trained on")
        if resume_from_checkpoint not in (None, False, True):
            self.options["out"] = str(resume_from_checkpoint)
        self.options["resume"] = bool(resume_from_checkpoint)
        if self.options["resume"]:
            self.__dict__.pop("_source", None)  # `evaluate` may have saved the model anew
        data, dev = {"train": self.train_dataset}, self.eval_dataset
        strategy = "steps" if self.options["eval_every"] else IntervalStrategy(self.args.eval_strategy).value
        if dev is None and strategy != "no":
            raise UserError(f"eval_strategy: got '{strategy}', but there is no eval_dataset; allowed: 'no'")
        if self.options["resume"] and self.options.pop("epochs", None):
            self.options["steps"] = RunFolder(self.options["out"]).config().steps
        if dev is not None:
            data |= {"dev": dev, "test": dev}
            self.options.setdefault("dev_examples", len(dev))
        self._check_metrics()
        shown = [] if self.args.disable_tqdm else [Lines()]
        told = [self._told, *shown]
        settings = self._settings(data)
        self.run = engine.fit(
            self._source, task=self._task, data=data, callbacks=told, progress=False, **settings
        )
        steps = [line for line in self.run.history if line["kind"] == "step" and not line["skipped"]]
        losses = [np.mean(line["losses"]) for line in steps if line["losses"]]
        loss = float(np.mean(losses)) if losses else float("nan")
        seconds = sum(line["seconds"] or 0.0 for line in steps)
        metrics = {"train_runtime": seconds, "train_loss": loss, "epoch": self.state.epoch}
        return TrainOutput(self.state.global_step, loss, metrics)

    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss and metrics of the model as it is, trained or not; they are logged, and callbacks are told.

        Args:
            eval_dataset: rows as for the constructor; None: those that were given there.
            metric_key_prefix: put before the names of the metrics.

        Raises:
            UserError: if there are no rows.
        """
        rows = self.eval_dataset if eval_dataset is None else self._rows("eval_dataset", eval_dataset)
        metrics = self._scores(self._evaluated("eval_dataset", rows), metric_key_prefix)
        self._told.log(self.state, metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, test_dataset: Any, metric_key_prefix: str = "test") -> PredictionOutput:
        """A classifier's outputs for each row, else answers, and the scores.

        Args:
            test_dataset: rows as for the constructor.
            metric_key_prefix: put before the names of the metrics.
        """
        found = self._evaluated("test_dataset", self._rows("test_dataset", test_dataset))
        metrics = self._scores(found, metric_key_prefix)
        self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        predictions = np.array(found.logits if found.logits else found.predictions)
        return PredictionOutput(predictions, np.array(found.gold) if found.gold else None, metrics)

    def save_model(self, output_dir: str | None = None) -> Path:
        """Write the adapter as a folder of PEFT; if weights were trained, the whole model, merged.

        Args:
            output_dir: a new or empty folder; None: "model" in the run folder.

        Raises:
            UserError: if nothing is trained yet.
        """
        if self.run is None:
            raise UserError("save_model: nothing is trained yet; allowed: after train()")
        out = output_dir or str(self.run.folder / "model")
        whole = SPACES.lines[self.run.setup.config.space].in_weights
        return self.run.export_merged(out) if whole else self.run.save_pretrained(out)

    # ------------------------------------------------------------------------------ data and model

    def _rows(self, name: str, given: Any) -> Rows:
        """The rows of a data set, those with tokens with the columns that are read."""
        if hasattr(given, "to_dict") and hasattr(given, "columns"):
            given = given.to_dict(orient="records")
        if isinstance(given, Mapping) or not hasattr(given, "__len__"):
            raise UserError(f"{name}: got a {type(given).__name__}, allowed: one data set that has a length")
        rows = [given[index] for index in range(len(given))]
        if not rows or not all(isinstance(row, Mapping) for row in rows):
            raise UserError(f"{name}: got {rows[:1]!r:.80}, allowed: rows, one at least, that are mappings")
        unread = [column for column in _UNREAD if any("input_ids" in row and column in row for row in rows)]
        if unread:
            raise UserError(
                f"{name}: the columns {', '.join(unread)} are not read here; leave them out; tokens whose "
                "label is -100 have no loss"
            )
        found = (
            rows if self.data_collator is None else [self._collated(name, *each) for each in enumerate(rows)]
        )
        return [_tokens(row) if "input_ids" in row else dict(row) for row in found]

    def _collated(self, name: str, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row as the collator has it, in a batch of its own."""
        assert self.data_collator is not None
        if getattr(self.data_collator, "mlm", False):
            raise UserError(
                "data_collator: got mlm=True, but tokens are trained causally; allowed: mlm=False"
            )
        if self.args.remove_unused_columns and "input_ids" in row:
            row = {column: row[column] for column in (*COLUMNS, *_LABELS) if column in row}
        try:
            batch = self.data_collator([row])
            return {column: batch[column][0] for column in COLUMNS if column in batch}
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"data_collator: {name} row {number}: {type(error).__name__}: {error}") from error

    @cached_property
    def _source(self) -> Model | str:
        """What is trained; a model of transformers is saved beside the run, for when it is resumed."""
        if isinstance(self.model, Model | str):
            return self.model
        if isinstance(self.model, Path):
            return str(self.model)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("model: got one in memory, allowed in several processes: its folder")
        out = self.options["out"]
        if self.options.get("resume"):
            return RunFolder(out).config().model
        return saved_model(self.model, self.processing_class, next_free(f"{out}-model"))

    @cached_property
    def _kind(self) -> str:
        if isinstance(self._source, Model):
            return self._source.kind
        return self.options.get("kind") or kind_of(self._config, self._source)

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        """The content of the model's config.json."""
        if isinstance(self._source, Model):
            return dict(self._source.config.to_dict())
        return Checkpoint.open(model_path(self._source), revision=self.options.get("revision")).config

    @property
    def _task(self) -> TaskLike | None:
        """What the rows are: of tokenized ones the keys of a task's file."""
        rows = self.train_dataset or self.eval_dataset or []
        if self.task is not None or not rows or "input_ids" not in rows[0]:
            return self.task
        if self._kind != "classifier":
            return {"name": "tokens", "kind": "tokens"}
        most = max((row["labels"] for row in rows if isinstance(row.get("labels"), int)), default=1)
        named = self._config.get("id2label") or range(max(2, most + 1))
        in_order = isinstance(named, Mapping)  # of their numbers, which a JSON file may have otherwise
        names = [named[key] for key in sorted(named, key=int)] if in_order else list(map(str, named))
        return {"name": "tokens", "kind": "tokens", "answers": {name: name for name in names}}

    def _settings(self, parts: Mapping[str, Rows]) -> dict[str, Any]:
        """The options, with room for the longest of the tokenized rows."""
        lengths = [len(row["input_ids"]) for rows in parts.values() for row in rows if "input_ids" in row]
        return {"max_length": max(8, *lengths), **self.options} if lengths else self.options

    def _check_metrics(self) -> None:
        """UserError for metrics that nothing is computed for."""
        if self.compute_metrics is not None and self._kind != "classifier":
            raise UserError(
                f"compute_metrics: the model is {self._kind}, whose logits over the vocabulary are not kept; "
                "allowed with a classifier; the loss and the task's own metrics are always there"
            )
        wanted = (self.args.metric_for_best_model or "").removeprefix("eval_")
        if not wanted or not self.train_dataset:
            return
        task = self._task
        if task is None or (isinstance(task, str) and forms.is_form(task)):
            columns = (self.options.get(name) for name in ("text_field", "label_field"))
            records = Records({"train": self.train_dataset})
            task = forms.recognise(records, task or forms.AUTO, *columns).keys
        metric = tasks.get(task).metric
        if wanted != metric or bool(self.args.greater_is_better) == (metric == "loss"):
            raise UserError(
                f"metric_for_best_model: got {wanted!r}, greater_is_better {self.args.greater_is_better}; "
                f"allowed: {metric!r}, {metric != 'loss'}, which the best is kept by"
            )

    def _evaluated(self, name: str, rows: Rows | None) -> Evaluation:
        if not rows:
            raise UserError(f"{name}: missing, it is what is evaluated")
        settings = self._settings({"test": rows})
        if self.run is not None:
            room = {name: settings[name] for name in ("max_length",) if name in settings}
            return engine.evaluate(self.run, data=rows, **room)
        self._check_metrics()
        objects = {axis.axis for axis in AXES if not isinstance(settings.get(axis.axis, ""), str)}
        own = {key: value for key, value in settings.items() if key not in {"out", "resume", *objects}}
        return engine.evaluate(self._source, task=self._task or forms.AUTO, data=rows, **own)

    def _scores(self, found: Evaluation, prefix: str) -> dict[str, float]:
        """By transformers' names."""
        scores = {"loss": found.loss, **{metric.name: metric.value for metric in found.metrics}}
        scores["runtime"] = found.seconds
        named = {f"{prefix}_{name}": value for name, value in scores.items()}
        return {**named, **computed(self.compute_metrics, found, prefix), "epoch": self.state.epoch}


def _checked(callbacks: Sequence[Any]) -> list[Any]:
    """UserError for what is none of transformers' callbacks."""
    for callback in callbacks:
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise UserError(f"callbacks: got {callback!r:.80}, allowed: transformers' TrainerCallback")
    return list(callbacks)


def _tokens(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a tokenized row that are read, as plain numbers."""
    named = {("labels" if name in _LABELS else name): value for name, value in row.items()}
    plain = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in named.items()}
    return {name: plain[name] for name in COLUMNS if plain.get(name) is not None}
