"""What commands show of long work on stderr, when they write a checkpoint."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import typer

from hizoo_lite.train.bars import Bars, display
from hizoo_lite.train.progress import Lines
from hizoo_lite.units import format_bytes

if TYPE_CHECKING:
    from hizoo_lite.export.quantize import Quantization

__all__ = ["INTERRUPTED", "Bars", "display", "write_checkpoint"]

#: Exit code of a command that was interrupted.
INTERRUPTED = 130
_MIB = 1 << 20


class _Written(Lines):
    """A line at the end as well."""

    def finish(self) -> None:
        self.message(f"{self.label} {self.done}/{self.total}")


def write_checkpoint(
    work: Quantization, out: str, form: str, verb: str, began: float, quiet: bool
) -> tuple[dict[str, Any], str]:
    """Do the work, if it is not done already: what `quantize` and `export --to merged` share.

    Args:
        work: what writes the checkpoint.
        out: its folder, as it was given.
        form: what the folder holds, in words.
        verb: what the work is called.
        began: when the command did, of `time.perf_counter`.
        quiet: plain lines in place of a bar.

    Returns:
        Figures of what was written, for JSON; and a line.
    """
    was_complete = work.complete
    if not was_complete:
        _write(work, verb, quiet)
    files, seconds = len(work.layout.shards), time.perf_counter() - began
    figures = {"files": files, "bytes": work.total_bytes, "was_complete": was_complete, "seconds": seconds}
    if was_complete:
        return figures, f"{out} is complete already: {form}, {files} files"
    return figures, f"{out}: {form}, {files} files, {format_bytes(work.total_bytes)}, {seconds:.0f} s"


def _write(work: Quantization, verb: str, quiet: bool) -> None:
    """Do the work, watched in MiB. An interrupt ends the command with exit code 130."""
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
