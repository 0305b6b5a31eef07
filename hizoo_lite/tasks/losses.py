"""Losses of a batch and the divergences between its branches, for torch, numpy and traced graphs alike.

See `Batch` for slots, scored tokens and what each loss is of. The score of a slot is the mean over its
tokens. The loss "answer" is minus the score of the gold slot, "choice" the cross-entropy over the slots of
an example, "class" that over its classes:

    loss = log sum_slots exp(score) - score_gold

How far apart the predictions of two branches are is the symmetric Kullback-Leibler divergence:

    KL(p || q) + KL(q || p) = sum_i (p_i - q_i) (log p_i - log q_i)

No term is negative, not even by rounding. For p and q at theta +- mu d the sum is (2 mu)^2 d' G d to leading
order, with G the Gauss-Newton matrix of the loss, which for a log-likelihood is the Fisher matrix (Martens,
arXiv 1412.1193, section 9): curvature from first differences of predictions, where losses would take a
second difference.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hizoo_lite.arrays import Array, Arrays
from hizoo_lite.batch import Batch, Losses


class ChoiceLosses(NamedTuple):
    """Of a batch whose loss is "choice"."""

    per_example: Array  # (branches, examples)
    log_p: Array  # (branches, slots): log-probability of every slot among those of its example


def class_losses(arrays: Arrays, logits: Array, gold: Array, compared: Array) -> Losses:
    """logits: (branches, examples, classes) float64. compared: see `Branches.compared`."""
    log_p = arrays.log_softmax(logits)
    divergences = arrays.last_sums(divergence_terms(arrays, *sides(arrays, log_p, compared)))
    return Losses(-arrays.picked(log_p, gold), logits, divergences)


def slot_losses(arrays: Arrays, scored: Array, between: Array, batch: Batch, compared: Array) -> Losses:
    """Of a batch with slots, whose loss is "answer" or "choice".

    scored: log-probabilities, (branches, scored tokens) float64. between: if the loss is "answer", the
    divergences over the vocabulary, (directions, sites) float64. compared: see `Branches.compared`.
    """
    slots = batch.slot_example.shape[0]
    scores = slot_means(arrays, scored, batch.token_slot, slots)
    if batch.loss == "answer":
        apart = slot_means(arrays, arrays.take(between, batch.token_site), batch.token_slot, slots)
        return Losses(-arrays.take(scores, batch.gold), scores, arrays.take(apart, batch.gold))
    losses, log_p = choice_losses(arrays, scores, batch.slot_example, batch.gold)
    terms = divergence_terms(arrays, *sides(arrays, log_p, compared))
    zeros = arrays.xp.zeros((terms.shape[0], losses.shape[1]), dtype=arrays.xp.float64)
    return Losses(losses, scores, arrays.group_sums(terms, batch.slot_example, zeros))


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


def sides(arrays: Arrays, by_branch: Array, compared: Array) -> tuple[Array, Array]:
    """Of values by branch, those on both sides of each direction: see `Branches.compared`."""
    return arrays.rows(by_branch, compared[:, 0]), arrays.rows(by_branch, compared[:, 1])


def divergence_terms(arrays: Arrays, log_p: Array, log_q: Array) -> Array:
    """The terms of the divergence's sum, from log-probabilities of one shape, float64.

    An outcome that is impossible under both (-inf) adds nothing.
    """
    xp = arrays.xp
    terms = (xp.exp(log_p) - xp.exp(log_q)) * (log_p - log_q)
    return xp.where(log_p == log_q, xp.zeros_like(terms), terms)
