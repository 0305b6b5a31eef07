"""Encoded examples as plain lists, and their collation into a `Batch`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from hizoo_lite.batch import Batch

Loss = Literal["answer", "choice", "class"]


class Encoded(NamedTuple):
    """One example as tokens; the words are those of `Batch`, the numbers its own, from 0.

    Attributes:
        rows: token ids of each row.
        types: token type ids of each row; None if the model has none.
        sites: (row, position whose logits are read).
        tokens: (site, vocabulary index, slot).
        slots: how many candidate answers; 0 for a classifier.
        gold: slot of the gold answer; of a classifier the class.
        loss: as of `Batch`.
    """

    rows: list[list[int]]
    types: list[list[int]] | None
    sites: list[tuple[int, int]]
    tokens: list[tuple[int, int, int]]
    slots: int
    gold: int
    loss: Loss


def score_candidates(
    candidates: Sequence[Sequence[int]], start: int
) -> tuple[list[list[int]], list[tuple[int, int]], list[tuple[int, int, int]]]:
    """The rows, sites and tokens that score every candidate's tokens from position `start` on.

    A candidate is a whole causal sequence, prompt included. What predicts its last token is the sequence
    without it, so a row holds that much, and a candidate whose predicting part begins another's shares that
    row: candidates that differ in one token share row and site.
    """
    rows: list[list[int]] = []
    home: dict[int, int] = {}
    for slot in sorted(range(len(candidates)), key=lambda index: -len(candidates[index])):
        context = list(candidates[slot][:-1])
        row = next((i for i, longer in enumerate(rows) if longer[: len(context)] == context), None)
        if row is None:
            row = len(rows)
            rows.append(context)
        home[slot] = row
    sites: dict[tuple[int, int], int] = {}
    tokens = []
    for slot, candidate in enumerate(candidates):
        for position in range(start, len(candidate)):
            site = sites.setdefault((home[slot], position - 1), len(sites))
            tokens.append((site, candidate[position], slot))
    return rows, list(sites), tokens


def collate(encoded: Sequence[Encoded], pad_id: int) -> Batch:
    """The batch of some examples: rows padded on the right, numbers shifted to the batch's own.

    Raises ValueError for no examples, or for examples of different losses.
    """
    if not encoded or len({example.loss for example in encoded}) > 1:
        raise ValueError("collate: expected one or more examples with the same loss")
    rows = [row for example in encoded for row in example.rows]
    length = max(len(row) for row in rows)
    types = [kind for example in encoded for kind in example.types or ()]
    sites: list[tuple[int, int]] = []
    tokens: list[tuple[int, int, int]] = []
    slots: list[int] = []
    gold: list[int] = []
    first_row = 0
    for number, example in enumerate(encoded):
        gold.append(example.gold + (len(slots) if example.slots else 0))
        tokens += [(site + len(sites), token, slot + len(slots)) for site, token, slot in example.tokens]
        sites += [(row + first_row, position) for row, position in example.sites]
        slots += [number] * example.slots
        first_row += len(example.rows)
    return Batch(
        input_ids=_int64([row + [pad_id] * (length - len(row)) for row in rows]),
        attention_mask=_int64([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        token_type_ids=_int64([kind + [0] * (length - len(kind)) for kind in types]) if types else None,
        site_row=_int64([row for row, _ in sites]),
        site_position=_int64([position for _, position in sites]),
        token_site=_int64([site for site, _, _ in tokens]),
        token_id=_int64([token for _, token, _ in tokens]),
        token_slot=_int64([slot for _, _, slot in tokens]),
        slot_example=_int64(slots),
        gold=_int64(gold),
        loss=encoded[0].loss,
    )


def _int64(values: Sequence[int] | Sequence[Sequence[int]]) -> np.ndarray:
    return np.array(values, dtype=np.int64)
