"""Where a run begins: at zero, or where an earlier process was killed, to the bit.

The newest valid checkpoint is loaded and the journal's later records are replayed, so that no step is lost
and none is computed twice. After a power failure the disk may have lost the end of the journal: those steps
are computed again; or of metrics.jsonl: its lines of steps are written again from the journal.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from hizoo_lite.branches import Branches
from hizoo_lite.errors import UserError
from hizoo_lite.train import checkpoint, journal
from hizoo_lite.train.checkpoint import Position
from hizoo_lite.train.folder import RunFolder
from hizoo_lite.train.journal import Form, Found, Journal, Record
from hizoo_lite.train.step import Stepper, StepRecord


class Start(NamedTuple):
    """Where a run goes on."""

    position: Position
    chunk_halvings: int = 0  # of chunks, in the steps before: the same ones round alike


def open_journal(folder: RunFolder, stepper: Stepper, position: Position) -> Journal:
    """The journal of a run that stands at `position`. The folder must be there."""
    opened = Journal(folder.journal, *form_of(stepper))
    opened.truncate(position.step)
    return opened


def form_of(stepper: Stepper) -> Form:
    """What a record of its steps holds."""
    branches = Branches(stepper.estimator.points(0))
    estimator = stepper.estimator
    count = branches.count * estimator.groups
    return Form(count, estimator.directions_of_step, stepper.head.count)


def resume(folder: RunFolder, stepper: Stepper, steps: int, tell: Callable[[str], None]) -> Start:
    """Bring `stepper` to the last step that was recorded, of a run that is to have `steps`.

    `tell` is given a line for what was passed over or is lost. Raises UserError if the files are not of
    one run, no checkpoint is valid, or more steps have been taken, with nothing changed.
    """
    found, refused = checkpoint.newest_valid(folder.checkpoints)
    for error in refused.values():
        tell(f"{error}; an older checkpoint is taken")
    held = journal.scan(folder.journal) if folder.journal.is_file() else Found([], 0, 0)
    position, chunk_halvings = Position(), 0
    if found is not None:
        position, chunk_halvings = Position(checkpoint.steps_of(found)), checkpoint.chunk_halvings(found)
    later = _judged(folder, _following(held.records, position.step))
    taken = position.step + len(later)
    if taken > steps:
        raise UserError(f"--steps: got {steps}, the run has taken {taken} already; allowed: {taken} or more")
    size = journal.record_bytes(*form_of(stepper))
    for line in _lost(folder, held, position.step, taken, size):
        tell(line)
    if found is not None:
        position = checkpoint.load(found, stepper)
    elif later and folder.writes and stepper.space.weights is None:
        checkpoint.save(folder.checkpoints, position, stepper, later[0].chunk_halvings)  # for `replay`
    if later:
        tell(f"taking {len(later)} steps from the journal")
    for record in later:
        stepper.replay(record)
        position = after(position, record)
        chunk_halvings = record.chunk_halvings
    for path in refused if folder.writes else ():
        checkpoint.set_aside(path)
    folder.keep_metrics(position.step, ended=position.step == steps)
    points = stepper.estimator.points
    _restore_metrics(folder, held.records, position.step, lambda step: len(points(step)), tell)
    return Start(position, chunk_halvings)


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


def _following(records: Sequence[Record], step: int) -> list[Record]:
    """The records of step number `step` and those after it, up to the first that is missing."""
    later = [record for record in records if record.step >= step]
    return [record for number, record in enumerate(later, start=step) if record.step == number]


def _judged(folder: RunFolder, records: list[Record]) -> list[Record]:
    """Where the best is kept, those up to an evaluation on dev that metrics.jsonl lost: it is made again."""
    config = folder.config()
    if config.keep != "best" or not config.eval_every:
        return records
    judged = {line["step"] for line in folder.evaluations() if line["when"] == "dev"}

    def may_follow(record: Record) -> bool:
        return record.step in judged or record.step == 0 or record.step % config.eval_every != 0

    return list(takewhile(may_follow, records))


def _lost(folder: RunFolder, held: Found, start: int, taken: int, size: int) -> Iterator[str]:
    """What is to be said of a journal that does not hold every step up to `start`, or holds too much."""
    last = len(_following(held.records, 0))
    count = -(-held.lost_bytes // size)
    if count:
        behind = f"{count} records after the first {len(held.records)}"
        yield f"{folder.journal}: {behind} do not hold, as after a power failure: dropped"
    if last < start:
        missing = f"step {last}" if last + 1 == start else f"steps {last} to {start - 1}"
        kept = f"replay --step goes up to {last}" if last else "replay is over for this run"
        yield f"{folder.journal}: lacks {missing}: the run goes on from its checkpoint, but {kept}"
    dropped = sum(record.step >= taken for record in held.records)
    if dropped:
        yield f"{folder.journal}: {dropped} steps after {taken} are taken again"


def _restore_metrics(
    folder: RunFolder,
    records: Sequence[Record],
    step: int,
    forwards: Callable[[int], int],
    tell: Callable[[str], None],
) -> None:
    """Write the lines of earlier steps that metrics.jsonl lacks, as far as the journal has them."""
    there = {line["step"] for line in folder.read_metrics() if line["kind"] == "step"}
    lacks = set(range(step)) - there
    if not lacks or not folder.writes:
        return
    found = [_line(record, forwards(record.step)) for record in records if record.step in lacks]
    folder.insert_metrics(found)
    tell(
        f"{folder.metrics}: lacks {len(lacks)} of {step} steps; {len(found)} are written again from the "
        "journal, without their time and tokens; evaluations that were made among them are lost"
    )


def _line(record: Record, forwards: int) -> dict[str, Any]:
    """The line of a step in metrics.jsonl, as far as its record tells."""
    known = {name: value for name, value in record._asdict().items() if name in StepRecord._fields}
    step = StepRecord(**known, forwards=forwards)
    return {"kind": "step", **step.metrics(), "seconds": None, "tokens": None}
