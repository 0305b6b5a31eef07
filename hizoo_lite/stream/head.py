"""Logits at chosen positions only, through the model's own head, in chunks.

A head is more than `lm_head(hidden)`: Gemma soft-caps, Cohere and Granite scale, BERT transforms. So
the model's own `forward` is run with a stand-in for its trunk that returns given hidden states. No
architecture is named here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

#: Bytes of float32 logits a chunk of positions holds at most, over all branches.
LOGITS_BYTES = 64 << 20


class _StandInTrunk(nn.Module):
    """Answers any call with the hidden states it was given, whatever part of the trunk is asked for."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.hidden: Tensor | None = None
        self.config = getattr(trunk, "config", None)

    @property
    def decoder(self) -> _StandInTrunk:
        """OPT asks its trunk's decoder."""
        return self

    def forward(self, *args: object, **kwargs: object) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.hidden)


@contextmanager
def _stand_in(module: nn.Module, trunk_name: str) -> Iterator[_StandInTrunk]:
    trunk = module.get_submodule(trunk_name)
    stand_in = _StandInTrunk(trunk)
    module._modules[trunk_name] = stand_in  # in place: the order of children, and all hooks, stay
    try:
        yield stand_in
    finally:
        module._modules[trunk_name] = trunk


def logits_at(
    module: nn.Module,
    trunk_name: str,
    hidden: Tensor,
    rows: Tensor,
    positions: Tensor,
    vocabulary: int,
    limit_bytes: int = LOGITS_BYTES,
) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of logits at (row, position), as pairs (slice of the sites, logits).

    hidden: (branches, rows, length, features) float32. rows, positions: (sites,) on hidden's device.
    limit_bytes: of a chunk's logits. Each chunk is (branches, sites in the chunk, vocabulary) float32.
    """
    branches, sites = hidden.shape[0], rows.shape[0]
    chunk = max(1, limit_bytes // (4 * branches * vocabulary))
    with _stand_in(module, trunk_name) as trunk:
        for first in range(0, sites, chunk):
            part = slice(first, min(first + chunk, sites))
            trunk.hidden = hidden[:, rows[part], positions[part]]
            placeholder = torch.zeros(
                branches, trunk.hidden.shape[1], dtype=torch.int64, device=hidden.device
            )
            yield part, module(input_ids=placeholder).logits.float()
