"""A checkpoint being written, watched in MiB: what `quantize` and `export --to merged` share."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from hizoo_lite.export.quantize import Quantization
    from hizoo_lite.train.events import Listener

INTERRUPTED = 130
_MIB = 1 << 20


def write(work: Quantization, verb: str, quiet: bool) -> None:
    """Do the work; `verb` says on the bar what it is. An interrupt ends the command with exit code 130."""
    listener = _watcher(quiet)
    if work.bits != "none" and work.layout.unconverted:
        typer.echo(
            f"{work.out}: hizoo-lite will load it, transformers will not: that has no quantized form of "
            f"{', '.join(work.layout.unconverted)}, a class of this model's own",
            err=True,
        )
    written = work.done_bytes
    if written:
        listener.message(
            f"{work.out}: {work.files_done} of {len(work.layout.shards)} files are there already"
        )
    listener.phase(f"{verb}, MiB", work.total_bytes // _MIB, written // _MIB)

    def advanced(more_bytes: int) -> None:
        nonlocal written
        listener.advanced((written + more_bytes) // _MIB - written // _MIB)
        written += more_bytes

    try:
        work.run(advanced)
    except KeyboardInterrupt as error:
        typer.echo(f"{verb}: interrupted; the same call goes on behind the files that are finished", err=True)
        raise typer.Exit(INTERRUPTED) from error
    finally:
        listener.finish()


def _watcher(quiet: bool) -> Listener:
    """A bar, or a line every ten seconds."""
    from hizoo_lite.cli.progress import Bars, listener

    chosen = listener(quiet)
    return chosen if isinstance(chosen, Bars) else _lines()


def _lines() -> Listener:
    from hizoo_lite.train.watch import LINE_SECONDS, Lines

    class _Lines(Lines):
        """A line now and then, and at the end."""

        printed = time.perf_counter()

        def advanced(self, units: int) -> None:
            super().advanced(units)
            now = time.perf_counter()
            if now - self.printed >= LINE_SECONDS:
                self.printed = now
                self.message(f"{self.label} {self.done}/{self.total}")

        def finish(self) -> None:
            self.message(f"{self.label} {self.done}/{self.total}")

    return _Lines()
