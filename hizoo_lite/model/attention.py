"""Attention of grouped-query models on a GPU, without a (length x length) matrix.

transformers hands groups to torch as they are (`enable_gqa`) if there is no mask. For float32, which
activations are here, no fused kernel of torch 2.13 takes them so on CUDA: flash attention refuses the dtype
and memory-efficient attention the groups, and torch computes it plainly, without a word and with a matrix of
every query and key (pytorch#181528): 12.6 GiB for one row of 4096 tokens of Llama-3-8B in three branches.
So keys and values are repeated first, which takes as much as the queries; a single query, of a text that is
being written, is no matrix, and its groups become the positions of a query instead.

And masks without a question to the device (`nothing_packed`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "hizoo_lite_sdpa"


class _Ungrouped(nn.Module):
    """What sdpa_attention_forward asks of a layer, of one that has no groups."""

    num_key_value_groups = 1

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.is_causal = getattr(layer, "is_causal", True)


def attend(
    layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As transformers' sdpa_attention_forward, which it calls, never with groups.

    query: (rows, heads, length, features); key and value with fewer heads. The result is (rows, length,
    heads, features).
    """
    groups = getattr(layer, "num_key_value_groups", 1)
    plain, bias = _Ungrouped(layer), options.get("position_bias")
    if groups == 1:
        return sdpa_attention_forward(plain, query, key, value, attention_mask, **options)
    rows, heads, length, features = query.shape
    for_all_heads = attention_mask is None or attention_mask.shape[1] == 1
    if length > 1 or bias is not None or not for_all_heads:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        return sdpa_attention_forward(plain, query, key, value, attention_mask, **options)
    folded = query.reshape(rows, heads // groups, groups, features)
    options = {**options, "is_causal": False}
    found, _ = sdpa_attention_forward(plain, folded, key, value, attention_mask, **options)
    return found.transpose(1, 2).reshape(rows, 1, heads, -1), None


def repeat_groups(module: nn.Module) -> None:
    """Give a model of torch's scaled_dot_product_attention this one, if its layers have groups."""
    grouped = any(getattr(layer, "num_key_value_groups", 1) > 1 for layer in module.modules())
    if grouped and module.config._attn_implementation == "sdpa":  # type: ignore[union-attr]
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        module.set_attn_implementation(NAME)  # type: ignore[operator]


@contextmanager
def nothing_packed() -> Iterator[None]:
    """While this is open every row is one text, and transformers does not look for others in it.

    Without an attention mask it asks the device whether the positions have a gap, and the host waits for the
    answer. Rows of several texts are nothing that a batch has here.
    """
    ask = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = ask
