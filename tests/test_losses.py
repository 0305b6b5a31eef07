"""The losses of a batch, one formula for torch and numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from batches import tiny_task_batch
from torch import Tensor

from hizoo_lite.arrays import NumpyArrays
from hizoo_lite.batch import Losses
from hizoo_lite.branches import EVALUATION, Branches
from hizoo_lite.tasks.losses import class_losses, sides, slot_losses
from hizoo_lite.tensors import TorchArrays

BOTH = Branches.of(pairs=1, one_sided=2)
#: exp and log of the two libraries differ in the last bit, and divergences are differences of their results.
LAST_BITS = {"rtol": 1e-12, "atol": 1e-14}


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def assert_same(found: Losses, wanted: Losses) -> None:
    for ours, theirs in zip(found[:3], wanted[:3], strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), **LAST_BITS)


def test_a_classifiers_loss_is_torchs_cross_entropy() -> None:
    logits, gold = drawn(BOTH.count, 6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    found = class_losses(TorchArrays(), logits, gold, BOTH.compared)
    for branch in range(BOTH.count):
        wanted = torch.nn.functional.cross_entropy(logits[branch], gold, reduction="none")
        assert torch.equal(found.per_example[branch], wanted)
    p, q = (logits[branch].softmax(-1) for branch in (1, 2))
    kl = torch.nn.functional.kl_div
    wanted = kl(q.log(), p, reduction="none") + kl(p.log(), q, reduction="none")
    np.testing.assert_allclose(found.divergences[0], wanted.sum(-1), **LAST_BITS)


@pytest.mark.parametrize("branches", [EVALUATION, Branches.of(), BOTH])
def test_a_classifiers_losses_of_numpy_are_torchs(branches: Branches) -> None:
    logits, gold = drawn(branches.count, 6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    found = class_losses(NumpyArrays(), logits.numpy(), gold.numpy(), branches.compared)
    assert found.divergences.shape == (branches.directions, 6)
    assert_same(found, class_losses(TorchArrays(), logits, gold, branches.compared))


@pytest.mark.parametrize("loss", ["answer", "choice"])
@pytest.mark.parametrize("branches", [EVALUATION, Branches.of(), BOTH])
def test_losses_of_slots_of_numpy_are_torchs(branches: Branches, loss: Any) -> None:
    batch = tiny_task_batch("causal", 4, 12)
    one_each = torch.arange(len(batch.slot_example))
    batch = batch._replace(slot_example=one_each.clamp(max=1), gold=one_each[:2], loss=loss)
    scored = -drawn(branches.count, len(batch.token_id)).square()
    between = drawn(branches.directions, len(batch.site_row)).square()
    arrays = {name: value.numpy() for name, value in batch._asdict().items() if torch.is_tensor(value)}
    found = slot_losses(
        NumpyArrays(), scored.numpy(), between.numpy(), batch._replace(**arrays), branches.compared
    )
    assert found.divergences.shape == (branches.directions, 2)
    assert_same(found, slot_losses(TorchArrays(), scored, between, batch, branches.compared))


@pytest.mark.parametrize(
    ("branches", "copied"),
    [
        (EVALUATION, False),
        (Branches.of(pairs=3), False),
        (Branches.of(pairs=0, one_sided=3), False),
        (BOTH, True),
    ],
)
def test_compared_branches_are_views_unless_a_step_has_both_kinds(branches: Branches, copied: bool) -> None:
    values = drawn(branches.count, 4)
    for column, side in enumerate(sides(TorchArrays(), values, branches.compared)):
        assert torch.equal(side, values[torch.from_numpy(branches.compared[:, column])])
        assert (side.untyped_storage().data_ptr() != values.untyped_storage().data_ptr()) == copied
