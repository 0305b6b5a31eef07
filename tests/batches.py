"""Batches of random tokens for tests that need no task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hizoo_lite.base import ModelKind
from hizoo_lite.batch import Batch
from tests.architectures import tiny_batch


def tiny_task_batch(
    kind: ModelKind, rows: int = 3, length: int = 12, seed: int = 1, ends: Sequence[int] | None = None
) -> Batch:
    """A right-padded batch: next-token loss (causal), some positions (masked) or class labels.

    ends: how many tokens each row has, in place of a few less than `length`.
    """
    ids, mask = tiny_batch(rows, length, seed)
    if ends is not None:
        mask = (torch.arange(length) < torch.tensor(ends)[:, None]).long()
        ids = torch.where(mask.bool(), ids, 0)
    if kind == "classifier":
        none = torch.empty(0, dtype=torch.int64)
        return Batch(ids, mask, None, none, none, none, none, none, none, torch.arange(rows) % 2, "class")
    row, position = mask[:, 1:].nonzero(as_tuple=True)
    targets = ids[row, position + 1]
    if kind == "masked":
        position = position + 1
    sites = torch.arange(row.shape[0])
    examples = torch.arange(rows)
    return Batch(ids, mask, None, row, position, sites, targets, row, examples, examples, "answer")


def reference_losses(module: torch.nn.Module, batch: Batch) -> Tensor:
    """Per-example losses of a plain transformers model through all of its logits, (examples,) float64."""
    logits = module(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.double()
    if batch.loss == "class":
        return torch.nn.functional.cross_entropy(logits, batch.gold, reduction="none")
    picked = logits.log_softmax(-1)[batch.site_row, batch.site_position, batch.token_id]
    sums = torch.zeros(batch.examples, dtype=torch.float64).index_add_(0, batch.token_slot, picked)
    return -sums / torch.bincount(batch.token_slot)
