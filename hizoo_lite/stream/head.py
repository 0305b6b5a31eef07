"""Logits at chosen positions only, through the model's own head, in chunks.

A head is more than `lm_head(hidden)`: Gemma soft-caps, Cohere and Granite scale, BERT transforms. So
the model's own `forward` is run with a stand-in for its trunk that returns given hidden states. No
architecture is named here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils import ModelOutput

#: Bytes of float32 logits a chunk of positions holds at most, over all branches.
LOGITS_BYTES = 64 << 20


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """A trunk's output with other hidden states, of the same class: heads ask for more than those.

    All that depends on the trunk's tokens (caches, router logits) is None.
    """
    known = isinstance(output, ModelOutput) and fields(output)[0].name == "last_hidden_state"
    form = type(output) if known else BaseModelOutputWithPastAndCrossAttentions
    return form(last_hidden_state=hidden)


class _StandInTrunk(nn.Module):
    """Answers any call with the hidden states it was given; for all else the trunk itself is asked."""

    def __init__(self, trunk: nn.Module, output: Any) -> None:
        super().__init__()
        self.trunk = [trunk]  # in a list: it is no child of its own stand-in
        self.output = with_hidden(output, torch.empty(0))
        self.hidden: Tensor = torch.empty(0)

    @property
    def decoder(self) -> _StandInTrunk:
        """OPT asks its trunk's decoder."""
        return self

    def __getattr__(self, name: str) -> Any:
        """The trunk's, where this has no such attribute."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["trunk"][0], name)

    def forward(self, *args: object, **kwargs: object) -> Any:
        return with_hidden(self.output, self.hidden)


@contextmanager
def _stand_in(module: nn.Module, trunk_name: str, output: Any) -> Iterator[_StandInTrunk]:
    trunk = module.get_submodule(trunk_name)
    stand_in = _StandInTrunk(trunk, output)
    module._modules[trunk_name] = stand_in  # in place: the order of children, and all hooks, stay
    try:
        yield stand_in
    finally:
        module._modules[trunk_name] = trunk


def logits_at(
    module: nn.Module,
    trunk_name: str,
    output: Any,
    hidden: Tensor,
    rows: Tensor,
    positions: Tensor,
    vocabulary: int,
    limit_bytes: int = LOGITS_BYTES,
) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of logits at (row, position), as pairs (slice of the sites, logits).

    output: the trunk's; hidden: of it, (branches, rows, length, features) float32. rows, positions: (sites,)
    on hidden's device. limit_bytes: of a chunk's logits. Each chunk is (branches, sites in the chunk,
    vocabulary) float32.
    """
    branches, sites = hidden.shape[0], rows.shape[0]
    chunk = max(1, limit_bytes // (4 * branches * vocabulary))
    with _stand_in(module, trunk_name, output) as trunk:
        for first in range(0, sites, chunk):
            part = slice(first, min(first + chunk, sites))
            trunk.hidden = hidden[:, rows[part], positions[part]]
            placeholder = torch.zeros(
                branches, trunk.hidden.shape[1], dtype=torch.int64, device=hidden.device
            )
            yield part, module(input_ids=placeholder).logits.float()
