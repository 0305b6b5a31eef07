"""Losses of a batch from log-probabilities of its scored tokens, for torch, numpy and traced graphs alike.

See `Batch` for slots and scored tokens. The score of a slot is the mean over its tokens. The loss "answer" is
minus the score of the gold slot, "choice" the cross-entropy over the slots of an example:

    loss = log sum_slots exp(score) - score_gold
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hizoo_lite.arrays import Array, Arrays


class ChoiceLosses(NamedTuple):
    """Of a batch whose loss is "choice"."""

    per_example: Array  # (branches, examples)
    log_p: Array  # (branches, slots): log-probability of every slot among those of its example


def slot_means(arrays: Arrays, by_token: Array, token_slot: Array, slots: int) -> Array:
    """The mean over the tokens of every slot: (rows, scored) float64 -> (rows, slots)."""
    xp = arrays.xp
    zeros = xp.zeros((by_token.shape[0], slots), dtype=xp.float64)
    ones = xp.ones_like(token_slot, dtype=xp.float64)
    counts = arrays.group_sums(ones[None], token_slot, xp.zeros((1, slots), dtype=xp.float64))
    return arrays.group_sums(by_token, token_slot, zeros) / counts


def score_gradients(losses: ChoiceLosses, gold: Array) -> np.ndarray:
    """d loss / d score of every slot, on the host: (branches, slots) float64."""
    found = np.exp(np.asarray(losses.log_p))
    found[:, np.asarray(gold)] -= 1.0
    return found


def choice_losses(arrays: Arrays, scores: Array, slot_example: Array, gold: Array) -> ChoiceLosses:
    """scores: (branches, slots) float64. gold: (examples,) index into the slots."""
    xp = arrays.xp
    chosen = arrays.take(scores, gold)
    peak = arrays.group_peaks(scores, slot_example, xp.full_like(chosen, -xp.inf))
    shares = xp.exp(scores - arrays.take(peak, slot_example))
    normalizer = peak + xp.log(arrays.group_sums(shares, slot_example, xp.zeros_like(chosen)))
    return ChoiceLosses(normalizer - chosen, scores - arrays.take(normalizer, slot_example))
