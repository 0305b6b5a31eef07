"""Which examples a model can learn from: what is too long, and what has nothing to predict."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

from hizoo_lite.batch import Example
from hizoo_lite.errors import UserError
from hizoo_lite.tasks.encoder import Encoder
from hizoo_lite.tasks.task import LeftOut, where

#: Conversations that are encoded: what a chat template does otherwise than it should shows in a few.
_ENCODED = 1000


class Usable(NamedTuple):
    """Examples that can be encoded, and what was done to have them.

    Attributes:
        examples: those that can be used.
        left_out: those that cannot, and why.
        cut: how many examples are seen in part.
        divided: how many texts became several examples each.
    """

    examples: list[Example]
    left_out: list[LeftOut]
    cut: int = 0
    divided: int = 0

    def lines(self, encoder: Encoder) -> list[str]:
        """What the user is to be told of the examples that `encoder` was to encode."""
        found, task, count = [], encoder.task, len(self.examples)
        longer = f"longer than --max-length {encoder.max_length}"
        if self.cut:
            what = f"the {task.cut_side} of {task.cut!r} is cut off"
            what = "oldest turns are not seen" if task.chat else what
            found.append(f"{self.cut} of {count} examples are {longer}: {what}")
        if self.divided:
            found.append(f"{self.divided} texts are {longer} and are divided: {count} examples")
        if self.left_out:
            first = self.left_out[0]
            found.append(f"{len(self.left_out)} left out, the first: {first.where}: {first.why}")
        return found


def usable(
    encoder: Encoder, examples: Sequence[Example], *, training: bool, strict: bool, answered: bool = False
) -> Usable:
    """The examples that can be encoded.

    Every one is encoded, about half a millisecond each, and not kept; of conversations, which take three
    times as long, those behind the first thousand are only measured. Published data sets are taken as usable.

    Args:
        encoder: that they are to be encoded by.
        examples: as they were read.
        training: whether they are to be trained on.
        strict: refuse an example that cannot be encoded, in place of leaving it out.
        answered: answers are written to them, for which there must be room.

    Raises:
        UserError: if strict, for the first example that cannot be encoded.
    """
    cut: set[str] = set()
    watched = {part: copy.copy(part) for part in encoder.parts}
    for one in watched.values():
        one.on_cut = lambda example: cut.add(where(example))
    kept: list[Example] = []
    left_out: list[LeftOut] = []
    divided = 0
    for number, example in enumerate(examples):
        own = encoder.of(example)
        if own.task.is_published:
            kept.append(example)
            continue
        parts = own.divided(example)
        divided += len(parts) > 1
        for part in parts:
            try:
                if not own.teaches(part):
                    raise UserError(f"{where(part)}: a text of a single token, and nothing to predict")
                if number < _ENCODED or not own.fits(part):
                    watched[own].encode(part, training=training)
                if answered:
                    _check_room(watched[own], part)
            except UserError as error:
                if strict:
                    raise
                why = str(error).replace(f"{where(part)}: ", "").replace(f"{where(part)} needs", "it needs")
                left_out.append(LeftOut(where(part), why))
            else:
                kept.append(part)
    return Usable(kept, left_out, len(cut), divided)


def _check_room(encoder: Encoder, example: Example) -> None:
    """UserError if the prompt leaves no room for what is to be written."""
    try:
        encoder.prompt_ids(example)
    except UserError as error:
        raise UserError(
            f"{error} (of --max-length {encoder.max_length}, {encoder.max_new_tokens} are for the answer)"
        ) from error
