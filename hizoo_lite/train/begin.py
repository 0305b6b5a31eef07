"""Where a run begins: at zero, or where an earlier process was killed, to the bit.

The newest sound checkpoint is loaded and the journal's later records are replayed, so that no step is lost
and none is computed twice. What metrics.jsonl and journal.bin do not both have is dropped: after a power
failure the disk may have lost more of one than of the other, and those few steps are computed again.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NamedTuple

from hizoo_lite.base import UserError
from hizoo_lite.train import checkpoint
from hizoo_lite.train.checkpoint import Position
from hizoo_lite.train.folder import RunFolder
from hizoo_lite.train.journal import Journal, Record
from hizoo_lite.train.journal import read as read_journal
from hizoo_lite.train.step import Stepper


class Start(NamedTuple):
    """Where a run goes on."""

    position: Position
    halvings: int = 0  # of chunks, in the steps before: the same ones round alike


def open_journal(folder: RunFolder, stepper: Stepper, position: Position) -> Journal:
    """The journal of a run that stands at `position`. The folder must be there."""
    journal = Journal(folder.journal, stepper.estimator.branches(0).count)
    journal.truncate(position.step)
    return journal


def resume(folder: RunFolder, stepper: Stepper, steps: int, tell: Callable[[str], None]) -> Start:
    """Bring `stepper` to the last step that was recorded, of a run that is to have `steps`.

    `tell` is given a line for what was passed over. Raises UserError where the files are not of one run, no
    checkpoint is sound, or more steps have been taken, with nothing changed.
    """
    found, refused = checkpoint.sound(folder.checkpoints)
    for error in refused.values():
        tell(f"{error}; an older checkpoint is taken")
    records = read_journal(folder.journal) if folder.journal.is_file() else []
    position, halvings = Position(), 0
    if found is not None:
        position, halvings = Position(checkpoint.steps_of(found)), checkpoint.halvings(found)
    later = _following(folder, records, position.step)
    taken = position.step + len(later)
    if taken > steps:
        raise UserError(f"--steps: got {steps}, the run has taken {taken} already; allowed: {taken} or more")
    if found is not None:
        position = checkpoint.load(found, stepper)
    if later:
        tell(f"taking {len(later)} steps from the journal")
    for record in later:
        stepper.replay(record)
        position = after(position, record)
        halvings = record.halvings
    for path in refused if folder.writes else ():
        checkpoint.set_aside(path)
    folder.keep_metrics(position.step, ended=position.step == steps)
    return Start(position, halvings)


def where_it_stands(folder: RunFolder, position: Position) -> str:
    """What a user is told whose run was ended by a failure."""
    found = checkpoint.newest(folder.checkpoints)
    kept = "no checkpoint was made so far" if found is None else f"{found} is the last good state"
    return (
        f"{kept}, --resume goes on after {position.step} steps once this is mended "
        f"(--resume --out {shlex.quote(str(folder.path))})"
    )


def after(position: Position, record: Record) -> Position:
    """Where a run stands once a record's step is taken."""
    return Position(record.step + 1, position.bad_steps + 1 if record.skipped else 0)


def _following(folder: RunFolder, records: Sequence[Record], step: int) -> list[Record]:
    """The records from number `step` on that metrics.jsonl has too; UserError where one is missing."""
    later = [record for record in records if record.step >= step]
    for number, record in enumerate(later, start=step):
        if record.step != number:
            raise UserError(
                f"{folder.journal}: lacks step {number} after the checkpoint of step {step}; "
                f"move the file away to go on from {checkpoint.path_of(folder.checkpoints, step)}"
            )
    known = {line["step"] for line in folder.read_metrics() if line["kind"] == "step"}
    return list(takewhile(lambda record: record.step in known, later))
