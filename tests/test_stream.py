"""Streaming: a block may be anywhere while it does not run, and no loss depends on where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hizoo_lite.base import Branches
from hizoo_lite.model.load import load
from hizoo_lite.model.model import Model
from hizoo_lite.noise import normal
from hizoo_lite.spaces.lora import LoRA
from hizoo_lite.stream.residency import Streamed
from hizoo_lite.stream.traversal import Traversal
from tests.architectures import TINY_CONFIGS, save_tiny
from tests.batches import tiny_task_batch

MU = 1e-3
ALL = sorted(TINY_CONFIGS)


def checkpoint(name: str, bits: str, folder: Path, **changes: Any) -> Path:
    """A block-sharded quantized checkpoint of a tiny random model; in 32 bits for "none"."""
    from hizoo_lite.quant.quantize import quantize

    save_tiny(name, folder / "source", **changes)
    if bits == "none":
        return folder / "source"
    quantize(folder / "source", folder / bits, bits=bits, kind=TINY_CONFIGS[name].kind)
    return folder / bits


def open_model(folder: Path, name: str, residency: str, **options: Any) -> Model:
    options = {"compute_dtype": "float32", "device": "cpu", **options}
    return load(folder, kind=TINY_CONFIGS[name].kind, residency=residency, **options)


def step_losses(model: Model, name: str, rows: int = 3, length: int = 12) -> torch.Tensor:
    """Losses of a step's three branches with a LoRA that is not zero, (3, examples) float64."""
    space = LoRA(rank=4, targets="all-linear")
    space.attach(model, seed=0)
    for key, value in space.parameters.items():
        value.add_(normal(3, 0, key, value.shape), alpha=0.05)
    directions = {k: normal(5, 0, k, p.shape) for k, p in space.parameters.items()}
    batch = tiny_task_batch(TINY_CONFIGS[name].kind, rows, length)
    return Traversal(model).losses(batch, Branches(), MU, directions).per_example


@pytest.mark.parametrize("bits", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("name", ALL)
def test_streamed_losses_equal_resident_losses_bitwise(name: str, bits: str, tmp_path: Path) -> None:
    folder = checkpoint(name, bits, tmp_path)
    wanted = step_losses(open_model(folder, name, "resident"), name)
    assert torch.isfinite(wanted).all()
    for where in ("disk", "host"):
        model = open_model(folder, name, where)
        assert isinstance(model.residency, Streamed)
        first, second = step_losses(model, name), step_losses(model, name)
        assert torch.equal(first, wanted), where
        assert torch.equal(second, wanted), where
        model.residency.close()


@pytest.mark.parametrize("where", ["disk", "host"])
def test_16_bit_blocks_stream_too(where: str, tmp_path: Path) -> None:
    folder = checkpoint("llama", "none", tmp_path, dtype=torch.bfloat16)
    wanted = step_losses(open_model(folder, "llama", "resident", bits="none"), "llama")
    model = open_model(folder, "llama", where, bits="none")
    assert torch.equal(step_losses(model, "llama"), wanted)
