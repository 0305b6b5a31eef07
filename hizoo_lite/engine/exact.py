"""Exact gradients of what is above the blocks: a head's parameters, from states that the base branch has.

The blocks make no graph, since nothing in them requires a gradient: what is recorded begins at the head and
ends at the loss, which is softmax and a few products at the places where a loss is read. Gradients are summed
in float64, over all examples of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from hizoo_lite.batch import Batch
from hizoo_lite.branches import EVALUATION, Branches, BranchState
from hizoo_lite.tasks.losses import choice_losses, class_losses, score_gradients, slot_means
from hizoo_lite.tensors import TorchArrays

#: Logits that are recorded live on as float32, float64 and log-probabilities: chunks are 2^3 times smaller.
RECORDED_HALVINGS = 3
_HOST = TorchArrays()


@contextmanager
def recorded(exact: Mapping[str, Tensor]) -> Iterator[None]:
    """While this is open, what depends on these parameters has gradients; without any nothing has."""
    for value in exact.values():
        value.requires_grad_(True)
    try:
        with torch.set_grad_enabled(bool(exact)):
            yield
    finally:
        for value in exact.values():
            value.requires_grad_(False)


def theta(branches: Branches) -> tuple[int, ...]:
    """The branches that stand for theta: itself, or the two points of the first pair, on either side."""
    return (0,) if branches.base else (0, 1)


def flat_gradients(total: Tensor, exact: Mapping[str, Tensor]) -> Tensor:
    """The gradients of `total`, a number, one behind the other in the order of names; float64."""
    found = torch.autograd.grad(total, [exact[name] for name in sorted(exact)])
    return torch.cat([gradient.double().flatten() for gradient in found])


def with_reaches(gradients: Tensor, exact: Mapping[str, Tensor], state: BranchState) -> Tensor:
    """`Losses.exact` from gradients as `flat_gradients` gives them."""
    parts, begin = [], 0
    for name in sorted(exact):
        end = begin + exact[name].numel()
        parts += [gradients[begin:end], torch.stack(state.reaches[name])]
        begin = end
    return torch.cat(parts)


def class_gradients(
    logits: Tensor, gold: Tensor, branches: Branches, exact: Mapping[str, Tensor], state: BranchState
) -> Tensor:
    """`Losses.exact` of a classifier. logits: (branches, examples, classes) float64, recorded."""
    gold = gold.to(logits.device, non_blocking=True)
    losses = class_losses(_HOST, logits[list(theta(branches))], gold, EVALUATION.compared).per_example
    total = losses.sum(1).mean()
    return with_reaches(flat_gradients(total, exact), exact, state)


def token_gradients(scored: Tensor, batch: Batch) -> Tensor:
    """d loss / d log-probability of every scored token, of a batch whose loss is "choice"; on the host.

    scored: log-probabilities, (branches, scored tokens) float64. Gives the same shape and dtype.
    """
    if scored.is_meta:
        return torch.empty_like(scored)
    scored = scored.cpu()
    slots = len(batch.slot_example)
    scores = slot_means(_HOST, scored, batch.token_slot, slots)
    losses = choice_losses(_HOST, scores, batch.slot_example, batch.gold)
    by_slot = torch.from_numpy(score_gradients(losses, batch.gold))
    return by_slot[:, batch.token_slot] / torch.bincount(batch.token_slot, minlength=slots)[batch.token_slot]
