"""Where a run begins: at zero, or where an earlier process was killed, to the bit.

The newest sound checkpoint is loaded and the journal's later records are replayed, so that no step is lost
and none is computed twice. Metrics of steps that the journal does not have are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def resume(folder: RunFolder, stepper: Stepper, tell: Callable[[str], None]) -> Start:
    """Bring `stepper` to the last step that was recorded.

    `tell` is given a line for what was passed over. Raises UserError where the files are not of one run, or
    no checkpoint is sound, with nothing changed.
    """
    found, refused = checkpoint.sound(folder.checkpoints)
    for error in refused:
        tell(f"{error}; an older checkpoint is taken")
    records = read_journal(folder.journal) if folder.journal.is_file() else []
    position, halvings = Position(), 0
    if found is not None:
        position, halvings = Position(checkpoint.steps_of(found)), checkpoint.halvings(found)
    later = _following(folder, records, position.step)
    if found is not None:
        position = checkpoint.load(found, stepper)
    if later:
        tell(f"taking {len(later)} steps from the journal")
    for record in later:
        stepper.replay(record)
        position = after(position, record)
        halvings = record.halvings
    folder.keep_metrics(position.step)
    return Start(position, halvings)


def after(position: Position, record: Record) -> Position:
    """Where a run stands once a record's step is taken."""
    return Position(record.step + 1, position.bad_steps + 1 if record.skipped else 0)


def _following(folder: RunFolder, records: Sequence[Record], step: int) -> list[Record]:
    """The records from number `step` on; UserError where one is missing."""
    later = [record for record in records if record.step >= step]
    for number, record in enumerate(later, start=step):
        if record.step != number:
            raise UserError(
                f"{folder.journal}: lacks step {number} after the checkpoint of step {step}; "
                f"move the file away to go on from {checkpoint.path_of(folder.checkpoints, step)}"
            )
    return later
