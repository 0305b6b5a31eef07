"""How long work is watched: a bar with loss, forwards a second and time left, or plain lines.

Lines are used if stderr is no terminal, and with --quiet. In a notebook rich draws the bar in the cell.
"""

from __future__ import annotations

import sys

import rich.progress
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hizoo_lite.train.progress import Lines, Progress, RunningMeans
from hizoo_lite.train.step import StepRecord


def display(quiet: bool = False) -> Progress:
    """The watcher for this stderr."""
    return Lines() if quiet or not sys.stderr.isatty() else Bars()


def of_python() -> Progress:
    """What a call from Python shows by itself: a bar for people, nothing in a script's log."""
    if Console().is_jupyter:
        return Bars(Console())
    return Bars() if sys.stderr.isatty() else Progress()


class Bars(RunningMeans):
    """One bar for each stretch of work."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or Console(stderr=True)
        self._bar: rich.progress.Progress | None = None
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
        self._bar = rich.progress.Progress(*columns, *times, console=self.console)
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
