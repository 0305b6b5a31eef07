"""How a run is watched on stderr: a bar with loss, forwards a second and time left, or plain lines.

Lines are used where stderr is no terminal, and with --quiet.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import rich.progress
import typer
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

if TYPE_CHECKING:
    from hizoo_lite.export.quantize import Quantization

#: Exit code of a command that was interrupted.
INTERRUPTED = 130
_MIB = 1 << 20


def display(quiet: bool = False) -> Progress:
    """The watcher for this stderr."""
    return Lines() if quiet or not sys.stderr.isatty() else Bars()


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


class _Written(Lines):
    """A line at the end as well."""

    def finish(self) -> None:
        self.message(f"{self.label} {self.done}/{self.total}")


def write_checkpoint(work: Quantization, verb: str, quiet: bool) -> None:
    """Do the work, watched in MiB: what `quantize` and `export --to merged` share.

    `verb` says on the bar what it is. An interrupt ends the command with exit code 130.
    """
    watching = display(quiet)
    if not isinstance(watching, Bars):
        watching = _Written()
    if work.bits != "none" and work.layout.unconverted:
        typer.echo(
            f"{work.out}: hizoo-lite will load it, transformers will not: that has no quantized form of "
            f"{', '.join(work.layout.unconverted)}, a class of this model's own",
            err=True,
        )
    written = work.done_bytes
    if written:
        watching.message(
            f"{work.out}: {work.files_done} of {len(work.layout.shards)} files are there already"
        )
    watching.phase(f"{verb}, MiB", work.total_bytes // _MIB, written // _MIB)

    def advanced(more_bytes: int) -> None:
        nonlocal written
        watching.advanced((written + more_bytes) // _MIB - written // _MIB)
        written += more_bytes

    try:
        work.run(advanced)
    except KeyboardInterrupt as error:
        typer.echo(f"{verb}: interrupted; the same call goes on behind the files that are finished", err=True)
        raise typer.Exit(INTERRUPTED) from error
    finally:
        watching.finish()
