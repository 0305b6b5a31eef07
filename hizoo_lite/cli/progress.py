"""How a run is watched on stderr: a bar with loss, forwards a second and time left, or plain lines.

Lines are used where stderr is no terminal, and with --quiet.
"""

from __future__ import annotations

import sys

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
from hizoo_lite.train.watch import Lines, Watch


def listener(quiet: bool = False) -> Listener:
    """The watcher for this stderr."""
    return Lines() if quiet or not sys.stderr.isatty() else Bars()


class Bars(Watch):
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
