"""What long work shows of itself: nothing, or plain lines on stderr. The command line draws bars.

Of a run it is a callback (`callbacks.py`), which makes these few words of the run's events.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from hizoo_lite.config import default
from hizoo_lite.train.callbacks import HIDDEN
from hizoo_lite.train.step import StepRecord

#: Share of the newest loss in the one that is shown, and of the newest step in forwards a second.
_SMOOTH = 0.05
#: Seconds between two plain lines.
LINE_SECONDS = 10.0


class Progress:
    """Every method may be overridden; none needs to be.

    Calls come from the work's own thread; a message may come from another, while that one is in a long call.
    """

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
        self.message(text)

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """The first step, or the first after an evaluation, begins a stretch."""
        if not self._trains:
            self._trains = True
            self.phase("train", state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, *, record: StepRecord, **more: Any) -> None:
        self.stepped(record)

    def on_evaluate_begin(
        self, args: Any, state: Any, control: Any, *, when: str, examples: int, **more: Any
    ) -> None:
        """Another stretch."""
        self._end()
        self.phase(when if when == HIDDEN else f"evaluate {when}", examples)

    def on_prediction_step(self, args: Any, state: Any, control: Any, *, examples: int, **more: Any) -> None:
        """A batch of an evaluation."""
        self.advanced(examples)

    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._end()

    on_predict = on_train_end = on_evaluate

    def _end(self) -> None:
        self._trains = False
        self.finish()


class RunningMeans(Progress):
    """The running means that every kind shows."""

    def __init__(self) -> None:
        self.label, self.total, self.done = "", 0, 0
        self.loss: float | None = None  # or the objective's value, as `called` says
        self.called, self._sign = default("objective"), 1
        self.forwards_per_second: float | None = None
        self._last = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if args.objective != self.called:
            self.called, self._sign = f"objective {args.objective}", -1

    def phase(self, label: str, total: int, done: int = 0) -> None:
        """Note what is counted from now on."""
        self.label, self.total, self.done = label, total, done
        self._last = time.perf_counter()

    def stepped(self, record: StepRecord) -> None:
        self.done += 1
        now = time.perf_counter()
        self.forwards_per_second = _mean(
            self.forwards_per_second, record.forwards / max(now - self._last, 1e-9)
        )
        self._last = now
        if record.losses and not record.skipped:
            self.loss = _mean(self.loss, self._sign * sum(record.losses) / len(record.losses))

    def advanced(self, units: int) -> None:
        """Take in examples of an evaluation."""
        self.done += units

    def state(self) -> str:
        """The running mean of the training loss (or objective), and speed, as far as they are known."""
        parts = [] if self.loss is None else [f"mean {self.called} {self.loss:.4f}"]
        parts += [] if self.forwards_per_second is None else [f"{self.forwards_per_second:.1f} forwards/s"]
        return ", ".join(parts)


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + _SMOOTH * (new - old)


class Lines(RunningMeans):
    """A line on stderr every ten seconds, and every message: if it is no terminal, or --quiet."""

    def __init__(self) -> None:
        super().__init__()
        self._began = self._printed = time.perf_counter()
        self._first = 0

    def message(self, text: str) -> None:
        """A line on stderr."""
        print(text, file=sys.stderr, flush=True)

    def phase(self, label: str, total: int, done: int = 0) -> None:
        """Begin to count."""
        super().phase(label, total, done)
        self._began = self._printed = time.perf_counter()
        self._first = done

    def stepped(self, record: StepRecord) -> None:
        """Print now and then, and at the end."""
        super().stepped(record)
        self._line(f": {self.state()}", is_last=self.done == self.total)

    def advanced(self, units: int) -> None:
        """Print now and then."""
        super().advanced(units)
        self._line("")

    def _line(self, state: str, is_last: bool = False) -> None:
        now, made = time.perf_counter(), self.done - self._first
        if made and (is_last or now - self._printed >= LINE_SECONDS):
            self._printed = now
            left = (now - self._began) / made * (self.total - self.done)
            self.message(f"{self.label} {self.done}/{self.total}{state}, ETA {left:.0f} s")
