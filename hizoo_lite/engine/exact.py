"""Exact gradients of what is above the blocks: a head's parameters, from states that the base branch has.

The blocks make no graph: what is recorded begins behind them and ends at the loss, which is softmax and a few
products at the places where a loss is read (of what is inside the blocks see backward.py). Gradients are
summed in float64, over all examples of the batch.
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

#: Logits that are recorded live on beside their gradient: chunks are 2^3 times smaller.
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


def gradients_of(
    total: Tensor, exact: Mapping[str, Tensor], of_total: Tensor | None = None
) -> dict[str, Tensor]:
    """The gradients of `total`, a number, by name, float64.

    of_total: a gradient with respect to `total`, which then may be any tensor.
    """
    found = torch.autograd.grad(total, list(exact.values()), of_total)
    return {name: gradient.double() for name, gradient in zip(exact, found, strict=True)}


def with_reaches(gradients: Mapping[str, Tensor], state: BranchState) -> Tensor:
    """`Losses.exact` from the gradients of all parameters that have one; 0 inputs of those that tell none."""
    parts: list[Tensor] = []
    for name in sorted(gradients):
        reach = state.reaches.get(name)
        found = gradients[name].flatten()
        parts += [found, found.new_zeros(2) if reach is None else torch.stack(reach)]
    return torch.cat(parts)


def class_loss(logits: Tensor, gold: Tensor, branches: Branches) -> Tensor:
    """A classifier's loss at theta, the sum over the examples.

    logits: (branches, examples, classes) float64.
    """
    gold = gold.to(logits.device, non_blocking=True)
    losses = class_losses(_HOST, logits[list(theta(branches))], gold, EVALUATION.compared).per_example
    return losses.sum(1).mean()


def token_gradients(scored: Tensor, batch: Batch) -> Tensor:
    """d loss / d log-probability of every scored token; on the host.

    batch: whose loss is "choice" or "answer". scored: log-probabilities, (branches, scored tokens) float64.
    Gives the same shape and dtype.
    """
    if scored.is_meta:
        return torch.empty_like(scored)
    scored = scored.cpu()
    slots = len(batch.slot_example)
    share = 1 / torch.bincount(batch.token_slot, minlength=slots)[batch.token_slot].double()
    if batch.loss == "answer":
        is_gold = torch.zeros(slots, dtype=torch.float64).index_fill(0, batch.gold, 1.0)
        return -(is_gold[batch.token_slot] * share).expand_as(scored)
    scores = slot_means(_HOST, scored, batch.token_slot, slots)
    losses = choice_losses(_HOST, scores, batch.slot_example, batch.gold)
    by_slot = torch.from_numpy(score_gradients(losses, batch.gold))
    return by_slot[:, batch.token_slot] * share
