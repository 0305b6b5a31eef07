"""Attention of grouped-query models on a GPU: the same numbers, and never torch's grouped form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hizoo_lite.engine.load import load
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.model import attention
from hizoo_lite.plan.meter import KernelMemory, MemoryMeter
from tests.architectures import TINY_CONFIGS, save_tiny
from tests.batches import tiny_task_batch

GROUPED = [name for name, tiny in TINY_CONFIGS.items() if "num_key_value_heads" in tiny.arguments]


def layer(groups: int) -> nn.Module:
    """What attention asks of a layer."""
    made: Any = nn.Module()
    made.num_key_value_groups, made.is_causal = groups, True
    return made


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("length", "keys"), [(7, 7), (1, 1), (1, 9)])
def test_attention_without_groups_is_attention_with_groups(
    length: int, keys: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(3, 6, length, 8, generator=draw)
    key, value = (torch.randn(3, 2, keys, 8, generator=draw) for _ in range(2))
    mask = None
    if masked:
        mask = torch.ones(3, 1, length, keys, dtype=torch.bool).tril(keys - length)
        mask[1, ..., 0] = keys == 1
        mask[..., -1] = True
    wanted, _ = sdpa_attention_forward(layer(3), query, key, value, mask, scaling=0.3)
    seen: list[bool] = []
    real = nn.functional.scaled_dot_product_attention

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(kwargs.get("enable_gqa", False))
        return real(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    got, _ = attention.attend(layer(3), query, key, value, mask, scaling=0.3)
    assert seen == [False]
    assert got.shape == (3, length, 6, 8)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_layers_without_groups_are_left_to_transformers() -> None:
    query = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    wanted, _ = sdpa_attention_forward(layer(1), query, query, query, None)
    assert torch.equal(attention.attend(layer(1), query, query, query, None)[0], wanted)


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("rows", [1, 3])  # a single row has no padding, so no mask
def test_whole_models_give_the_same_losses(name: str, rows: int, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    model = load(tmp_path, bits="none", compute_dtype="float32", device="cpu")
    batch = tiny_task_batch("causal", rows=rows)
    wanted = Traversal(model).losses(batch).per_example
    before = model.module.config._attn_implementation  # type: ignore[union-attr]
    attention.repeat_groups(model.module)
    after = model.module.config._attn_implementation  # type: ignore[union-attr]
    assert (before, after) in {("sdpa", attention.NAME), ("eager", "eager")}
    got = Traversal(model).losses(batch).per_example
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6)  # float32 sums in another order
    assert attention.NAME not in str(model.module.config.to_dict())  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("name", ["bert", "opt", "gpt2"])
def test_models_without_groups_keep_their_attention(name: str, tmp_path: Path) -> None:
    kind = TINY_CONFIGS[name].kind
    save_tiny(name, tmp_path, kind=kind)
    model = load(tmp_path, kind=kind, bits="none", device="cpu")
    attention.repeat_groups(model.module)
    assert model.module.config._attn_implementation == "sdpa"  # type: ignore[union-attr]


def test_repeated_keys_and_values_are_planned() -> None:
    query = torch.empty(3, 32, 128, 64, device="meta")
    key = torch.empty(3, 8, 128, 64, device="meta")
    peaks = []
    for repeats in (False, True):
        meter = MemoryMeter()
        with KernelMemory(repeats), meter:
            nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
        peaks.append(meter.peak_bytes)
    size = query.numel() * query.itemsize
    assert peaks[1] - peaks[0] == 2 * size
    assert peaks[1] < 4 * size  # and no matrix of every query and key
