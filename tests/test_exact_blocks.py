"""Exact gradients inside the blocks: those of autograd through PEFT's model, in every way of running them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from hizoo_lite.branches import EVALUATION
from hizoo_lite.engine.load import load
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.model.model import Model
from hizoo_lite.spaces import LoRA
from tests.architectures import TINY_CONFIGS, save_tiny
from tests.batches import reference_losses, tiny_task_batch
from tests.test_exact_head import TOLERANCE, split

_AUTO = {
    "causal": transformers.AutoModelForCausalLM,
    "masked": transformers.AutoModelForMaskedLM,
    "classifier": transformers.AutoModelForSequenceClassification,
}


def attached(model: Model, **options: Any) -> LoRA:
    """An adapter with a trained B, on all linear layers."""
    space = LoRA(rank=4, **{"targets": "all-linear", "exact_blocks": "all", "head": "none", **options})
    space.attach(model, seed=0)
    draw = torch.Generator().manual_seed(1)
    for value in [*space.parameters.values(), *space.exact.values()]:
        value.add_(0.05 * torch.randn(value.shape, generator=draw))
    return space


def reference(folder: Path, kind: Any, space: LoRA, batch: Any) -> dict[str, Tensor]:
    """Gradients of the losses' sum by autograd through PEFT's model, by our names."""
    space.save(folder / "adapter")
    theirs = peft.PeftModel.from_pretrained(
        _AUTO[kind].from_pretrained(folder, dtype=torch.float32), folder / "adapter", is_trainable=True
    ).eval()
    reference_losses(theirs, batch).sum().backward()
    return {
        name.removeprefix("base_model.model.").replace(".default.", "."): p.grad
        for name, p in theirs.named_parameters()
        if p.grad is not None
    }


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
@pytest.mark.parametrize("name", sorted(TINY_CONFIGS))
def test_gradients_are_those_of_autograd(name: str, tmp_path: Path) -> None:
    kind = TINY_CONFIGS[name].kind
    save_tiny(name, tmp_path, kind=kind)
    model = load(tmp_path, kind=kind, bits="none", compute_dtype="float32", device="cpu")
    space, batch = attached(model), tiny_task_batch(kind, rows=4)
    found = Traversal(model).losses(batch, EVALUATION, exact=space.exact)
    wanted = reference(tmp_path, kind, space, batch)
    ours = split(found.exact, space)
    assert len(ours) == len(space.target_names)
    for layer, (gradient, reach) in ours.items():
        torch.testing.assert_close(gradient.float(), wanted[layer], rtol=1e-3, atol=TOLERANCE)
        assert reach > 0
    assert max(gradient.abs().max() for gradient, _ in ours.values()) > 1e-3
