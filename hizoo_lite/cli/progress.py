"""How a run is watched on stderr: a bar with loss, forwards a second and time left, or plain lines.

Lines are used where stderr is no terminal, and with --quiet.
"""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hizoo_lite.train.events import Listener
from hizoo_lite.train.step import StepRecord

#: Share of the newest loss in the one that is shown, and of the newest step in forwards a second.
_SMOOTH = 0.05
#: Seconds between two plain lines.
LINE_SECONDS = 10.0


def listener(quiet: bool = False) -> Listener:
    """The watcher for this stderr."""
    return Lines() if quiet or not sys.stderr.isatty() else Bars()


class _Watch(Listener):
    """The running means that both kinds show."""

    def __init__(self) -> None:
        self.label, self.total, self.done = "", 0, 0
        self.loss: float | None = None
        self.forwards_per_second: float | None = None
        self._last = time.perf_counter()

    def phase(self, label: str, total: int, done: int = 0) -> None:
        """Note what is counted from now on."""
        self.label, self.total, self.done = label, total, done
        self._last = time.perf_counter()

    def stepped(self, record: StepRecord) -> None:
        """Take in a step."""
        self.done += 1
        now = time.perf_counter()
        self.forwards_per_second = _mean(
            self.forwards_per_second, record.forwards / max(now - self._last, 1e-9)
        )
        self._last = now
        if not record.skipped:
            self.loss = _mean(self.loss, sum(record.losses) / len(record.losses))

    def advanced(self, units: int) -> None:
        """Take in examples of an evaluation."""
        self.done += units

    def state(self) -> str:
        """Loss and speed, as far as they are known."""
        parts = [] if self.loss is None else [f"loss {self.loss:.4f}"]
        parts += [] if self.forwards_per_second is None else [f"{self.forwards_per_second:.1f} forwards/s"]
        return ", ".join(parts)


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + _SMOOTH * (new - old)


class Bars(_Watch):
    """One bar for each stretch of work."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def message(self, text: str) -> None:
        """Above the bar."""
        self.console.print(text, highlight=False, markup=False)

    def phase(self, label: str, total: int, done: int = 0) -> None:
        """Begin a bar."""
        self.finish()
        super().phase(label, total, done)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, *times, console=self.console)
        self._task = self._bar.add_task(label, total=total, completed=done, state="")
        self._bar.start()

    def stepped(self, record: StepRecord) -> None:
        """Move the bar."""
        super().stepped(record)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, state=self.state())

    def advanced(self, units: int) -> None:
        """Move the bar."""
        super().advanced(units)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)

    def finish(self) -> None:
        """End the bar, as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Lines(_Watch):
    """A line every ten seconds of training, and every message."""

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
        """Print now and then."""
        super().stepped(record)
        now = time.perf_counter()
        if now - self._printed >= LINE_SECONDS or self.done == self.total:
            self._printed = now
            left = (now - self._began) / (self.done - self._first) * (self.total - self.done)
            self.message(f"{self.label} {self.done}/{self.total}: {self.state()}, ETA {left:.0f} s")
