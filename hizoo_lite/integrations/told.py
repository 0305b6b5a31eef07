"""Callbacks of transformers on a run: its own handler, arguments, state and control, fed with our events.

The flow (when to log, evaluate and save) is transformers' `DefaultFlowCallback`; the loop does what its
control asks for. Evaluations before and after the run, on the test part, are told to none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import EvalPrediction, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import denumpify_detensorize

from hizoo_lite.errors import UserError
from hizoo_lite.train.evaluate import Evaluation
from hizoo_lite.train.step import StepRecord

Compute = Callable[[EvalPrediction], Mapping[str, float]]
#: What of the run's state is that of transformers'.
_SAME = (
    *("global_step", "epoch", "max_steps", "train_batch_size", "best_metric", "best_global_step"),
    *("best_model_checkpoint", "is_local_process_zero", "is_world_process_zero"),
)
_FILE = "trainer_state.json"


class Told:
    """A callback of `fit`. Every method returns the control, which the loop then looks at."""

    def __init__(
        self, handler: CallbackHandler, args: TrainingArguments, state: TrainerState, compute: Compute | None
    ) -> None:
        self.handler, self.args, self.state, self.compute = handler, args, state, compute
        self.control = TrainerControl()
        self._losses: list[float] = []  # of the steps since the last log
        self._file: Path | None = None  # with the state, beside the run
        self._epochs = 0  # that have ended
        self._ended_one = False  # with the last step

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **more: Any) -> Any:
        """What was logged before the run was resumed is still there."""
        self.handler.model, self._file = model, Path(args.output_dir) / _FILE
        if state.global_step and self._file.is_file():
            earlier = TrainerState.load_from_json(str(self._file)).log_history
            self.state.log_history = [entry for entry in earlier if entry["step"] <= state.global_step]
            last = max((entry["step"] for entry in self.state.log_history if "loss" in entry), default=0)
            steps = (entry for entry in state.log_history if "loss" in entry and entry["step"] > last)
            self._losses = [entry["loss"] for entry in steps]
        self.state.num_train_epochs = math.ceil(args.num_train_epochs)
        self.state.compute_steps(self.args, args.max_steps)
        self._epochs, self._ended_one = math.floor(state.epoch), False
        self._tell("on_train_begin", state)
        return self._tell("on_epoch_begin", state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        """An epoch may begin too."""
        if self._ended_one:
            self._tell("on_epoch_begin", state)
        return self._tell("on_step_begin", state)

    def on_step_end(self, args: Any, state: Any, control: Any, *, record: StepRecord, **more: Any) -> Any:
        """The loss that is logged is the mean of the steps since."""
        if record.losses and not record.skipped:
            self._losses.append(sum(record.losses) / len(record.losses))
        self._tell("on_step_end", state)
        self._log_step(state, record.lr)
        ended = math.floor(state.epoch)
        self._ended_one, self._epochs = ended > self._epochs, ended
        if self._ended_one:
            self._tell("on_epoch_end", state)
            self._log_step(state, record.lr)
        return self.control

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        metrics: Mapping[str, float],
        found: Evaluation,
        **more: Any,
    ) -> Any:
        """Of the dev part."""
        whole = {**metrics, **computed(self.compute, found, "eval")}
        self.log(state, whole)
        return self._tell("on_evaluate", state, metrics=whole)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        """A batch of an evaluation."""
        return self._tell("on_prediction_step", state)

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        """A checkpoint is there."""
        return self._tell("on_save", state)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        """However it ended."""
        return self._tell("on_train_end", state)

    def log(self, state: Any, logs: Mapping[str, float]) -> None:
        """An entry of the history."""
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._tell("on_log", state, logs=dict(logs))
        if self._file is not None:
            self.state.save_to_json(str(self._file))

    def _log_step(self, state: Any, lr: float) -> None:
        if self.control.should_log and self._losses:
            logs = {"loss": float(np.mean(self._losses)), "learning_rate": lr, "epoch": state.epoch}
            self._losses.clear()
            self.log(state, logs)

    def _tell(self, event: str, state: Any, **more: Any) -> TrainerControl:
        if state is not self.state:
            for name in _SAME:
                setattr(self.state, name, getattr(state, name))
        self.control = getattr(self.handler, event)(self.args, self.state, self.control, **more)
        return self.control


def computed(compute: Compute | None, found: Evaluation, prefix: str) -> dict[str, float]:
    """What `compute_metrics` makes of an evaluation of a classifier."""
    if compute is None:
        return {}
    scores = compute(EvalPrediction(predictions=np.array(found.logits), label_ids=np.array(found.gold)))
    if not isinstance(scores, Mapping):
        raise UserError(f"compute_metrics: got {scores!r:.80}, allowed: numbers by name")
    plain: dict[str, float] = denumpify_detensorize(dict(scores))
    own = f"{prefix}_"
    return {name if name.startswith(own) else own + name: value for name, value in plain.items()}
