"""What long work shows of itself. The default is silent; the command line draws bars.

Of a run it is a callback (`callbacks.py`), which makes these few words of the run's events.
"""

from __future__ import annotations

from typing import Any

from hizoo_lite.train.step import StepRecord


class Listener:
    """Every method may be overridden; none needs to be. Calls come from the work's own thread."""

    _trains = False  # a stretch of training is being shown

    def message(self, text: str) -> None:
        """A line worth reading: what was loaded, an evaluation's result, where something was saved."""

    def phase(self, label: str, total: int, done: int = 0) -> None:
        """A stretch of work of `total` units (steps, examples) begins, or goes on after `done` of them."""

    def stepped(self, record: StepRecord) -> None:
        """A training step is done."""

    def advanced(self, units: int) -> None:
        """`units` more examples of an evaluation are done."""

    def finish(self) -> None:
        """The stretch of work has ended."""

    def on_message(self, args: Any, state: Any, control: Any, *, text: str, **more: Any) -> None:
        """A line."""
        self.message(text)

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The first step, or the first after an evaluation, begins a stretch."""
        if not self._trains:
            self._trains = True
            self.phase("train", state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, *, record: StepRecord, **more: Any) -> None:
        """A step."""
        self.stepped(record)

    def on_evaluate_begin(
        self, args: Any, state: Any, control: Any, *, when: str, examples: int, **more: Any
    ) -> None:
        """Another stretch."""
        self._end()
        self.phase(f"evaluate {when}", examples)

    def on_prediction_step(self, args: Any, state: Any, control: Any, *, examples: int, **more: Any) -> None:
        """A batch of an evaluation."""
        self.advanced(examples)

    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The end of one."""
        self._end()

    on_predict = on_train_end = on_evaluate

    def _end(self) -> None:
        self._trains = False
        self.finish()
