"""Logits at chosen positions only, through the model's own head, in chunks.

A head is more than `lm_head(hidden)`: Gemma soft-caps, Cohere and Granite scale, BERT transforms. So
the model's own `forward` is run with a stand-in for its trunk that returns given hidden states. No
architecture is named here.

If the matrix of the head is not on the device (model/offloaded.py), each chunk would bring all of it
there. So `forward` is first run to where it asks the matrix for its product, for many chunks; then tiles of
the matrix are outside and chunks inside, and each tile comes once; then `forward` is run again with those
products. They are of the same operands in the same shapes, hence the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils import ModelOutput

from hizoo_lite.branches import Branches
from hizoo_lite.device import like
from hizoo_lite.model.linear import BranchLinear
from hizoo_lite.quant import PlainWeight

#: Bytes of float32 logits a chunk of positions holds at most, over all branches.
LOGITS_BYTES = 64 << 20
#: Rows of logits, of all branches, that a chunk has at most on a CPU: unpacking a matrix that is there costs
#: as much as the products of about 25.
MOST_ROWS = 64
#: The same of chunks that wait together where the matrix of the head comes to the device tile by tile. On a
#: CPU it comes from disk through the cache of files, and memory counts more.
HELD_BYTES = {"cpu": 0, "cuda": 1 << 30}


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
        """The trunk's, if this has no such attribute."""
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


def head_of(linears: Mapping[str, BranchLinear], trunk_name: str, vocabulary: int) -> BranchLinear | None:
    """The linear layer that makes the logits; None if its products cannot be made apart from it."""
    outside = [layer for name, layer in linears.items() if not name.startswith(trunk_name + ".")]
    found = [layer for layer in outside if layer.out_features == vocabulary and not _is_replaced(layer)]
    return found[0] if len(found) == 1 else None


def _is_replaced(layer: BranchLinear) -> bool:
    return layer.delta is not None and layer.delta.replaces_base


def logits_at(
    module: nn.Module,
    trunk_name: str,
    output: Any,
    hidden: Tensor,
    rows: Tensor,
    positions: Tensor,
    vocabulary: int,
    limit_bytes: int = LOGITS_BYTES,
    offloaded: BranchLinear | None = None,
    held_bytes: int = 0,
) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of logits at (row, position), as pairs (slice of the sites, logits).

    output: the trunk's; hidden: of it, (branches, rows, length, features) float32. rows, positions: (sites,)
    on hidden's device. limit_bytes: of a chunk's logits. offloaded: the head, if its matrix is not on the
    device; held_bytes: of the logits of chunks for which it comes there once. Each chunk is (branches, sites
    in the chunk, vocabulary) float32.
    """
    branches, sites = hidden.shape[0], rows.shape[0]
    chunk = limit_bytes // (4 * branches * vocabulary)
    if like(hidden.device) == "cpu":  # the same wherever the matrix is: gradients are summed over chunks
        chunk = min(chunk, MOST_ROWS // branches)
    chunk = max(1, chunk)
    most_bytes = max(held_bytes, limit_bytes)
    together = 1 if offloaded is None else max(1, most_bytes // (4 * branches * vocabulary * chunk))
    parts = [slice(first, min(first + chunk, sites)) for first in range(0, sites, chunk)]

    with _stand_in(module, trunk_name, output) as trunk:

        def run(part: slice) -> Tensor:
            trunk.hidden = hidden[:, rows[part], positions[part]]
            placeholder = torch.zeros(
                branches, trunk.hidden.shape[1], dtype=torch.int64, device=hidden.device
            )
            logits: Tensor = module(input_ids=placeholder).logits
            return logits.float()

        for first in range(0, len(parts), together):
            group = parts[first : first + together]
            if offloaded is None or len(group) == 1:
                yield from ((part, run(part)) for part in group)
                continue
            products = _products(offloaded, [_asked(offloaded, run, part) for part in group])
            yield from ((part, _given(offloaded, run, part, products.pop(0))) for part in group)


class _Asked(Exception):
    """What the head is asked for: `x` (branches, sites, features) float32, and its branches."""

    def __init__(self, x: Tensor, branches: Branches) -> None:
        super().__init__()
        self.x, self.branches = x, branches


class _Operand(NamedTuple):
    x: Tensor
    branches: Branches


@contextmanager
def _product_is(head: BranchLinear, function: Callable[..., Tensor]) -> Iterator[None]:
    """While this is open `function` is the head's `shared_product`."""
    head.__dict__["shared_product"] = function
    try:
        yield
    finally:
        del head.__dict__["shared_product"]


def _asked(head: BranchLinear, run: Callable[[slice], Tensor], part: slice) -> _Operand:
    """What the model asks its head for at these sites."""

    def ask(x: Tensor, branches: Branches, *sources: Tensor | None) -> Tensor:
        raise _Asked(x, branches)

    try:
        with _product_is(head, ask):
            run(part)
    except _Asked as asked:
        return _Operand(asked.x, asked.branches)
    raise AssertionError(f"{head.name} makes no logits")


def _given(head: BranchLinear, run: Callable[[slice], Tensor], part: slice, product: Tensor) -> Tensor:
    """The logits at these sites, if the head's product is known."""
    with _product_is(head, lambda x, branches, *sources: product):
        return run(part)


class _Tile(BranchLinear):
    """Some rows of a head's matrix, which are on the device."""

    def _tiles(self, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        whole = self.weight.ready(self.compute)
        assert whole is not None
        yield 0, whole


def _products(head: BranchLinear, operands: Sequence[_Operand]) -> list[Tensor]:
    """`head.shared_product` of each, (branches, sites, vocabulary) float32; its tiles come once for all."""
    out = [torch.empty(*x.shape[:2], head.out_features, device=x.device) for x, _ in operands]
    for first, rows in head._tiles(operands[0].x.device):
        bias = None if head.bias is None else head.bias[first : first + len(rows)]
        tile = _Tile(PlainWeight(rows), bias, head.state, head.compute, head.scratch, head.name)
        for (x, branches), product in zip(operands, out, strict=True):
            product[:, :, first : first + len(rows)] = tile.shared_product(x, branches)
    return out
