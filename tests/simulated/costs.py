"""What a pass of a real model costs a GPU, by what takes it: counted on the simulated one, without memory.

As `shapes.py`, whose model it takes: the traversal, the linear layers, chunks and LoRA are the package's
own. A pass of many blocks is that of two, and the difference between three and two for each further one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hizoo_lite.batch import Batch
from hizoo_lite.branches import Branches
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.model.attention import repeat_groups
from hizoo_lite.model.linear import BranchLinear
from hizoo_lite.model.model import Model
from hizoo_lite.quant import FourBitWeight
from hizoo_lite.spaces.lora import LoRA
from tests.simulated import gpu, shapes

_FLOAT32 = 4


class Costs(NamedTuple):
    """Of a pass, or of a part of one. Bytes are read and written; operations count a multiply-add as two."""

    launches: float = 0.0
    products: float = 0.0  # operations of products in 16 bits
    unpacking: float = 0.0  # bytes of decoding weights, for as many chunks as there are
    unpacking_once: float = 0.0  # the same where each weight is decoded once
    linear_bytes: float = 0.0  # of all else that shared products do: operands before, branches after
    least_linear_bytes: float = 0.0  # the same with one reading and one writing, operands of one x shared
    other_bytes: float = 0.0  # of the model's own operations on float32, and of the losses
    least_other_bytes: float = 0.0  # the same with one kernel for each of what a block is described by
    adapter_bytes: float = 0.0  # of products in float32
    attention: float = 0.0  # operations of attention in float32
    packed_bytes: float = 0.0  # of the weights as they are stored and travel
    head_bytes: float = 0.0  # of the matrix of the head

    def plus(self, other: Costs, times: float = 1.0) -> Costs:
        """The sum, with `times` the other."""
        return Costs(*(a + times * b for a, b in zip(self, other, strict=True)))


class _Costing:
    """A watcher of the simulated GPU that adds up what it sees."""

    def __init__(self) -> None:
        self.counted = shapes._Count()
        self.found: dict[str, float] = dict.fromkeys(Costs._fields, 0.0)
        self._in_product = False
        self._last: Tensor | None = None  # the input of the last shared product
        self._unpacked: set[int] = set()

    def __call__(self, op: Any, args: Any, kwargs: Any) -> None:
        name, found = str(op), self.found
        before = sum(self.counted.moved.values())
        launched = self.counted.launches
        self.counted(op, args, kwargs)
        if self.counted.launches == launched:
            return
        found["launches"] += 1
        moved = sum(self.counted.moved.values()) - before
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, gpu.DeviceTensor)]
        if "bitsandbytes" in name:
            found["unpacking"] += sum(map(shapes._bytes, tensors))
        elif "attention" in name:
            found["attention"] += _attention(*tensors[:3], causal=_is_causal(op, args, kwargs))
        elif "mm" in name.split(".")[1]:
            factors = [t for t in args if isinstance(t, gpu.DeviceTensor)][-2:]
            operations = 2.0 * factors[0].numel() * factors[1].shape[-1]
            if factors[0].dtype == torch.float32:
                made = factors[0].numel() // factors[0].shape[-1] * factors[1].shape[-1] * _FLOAT32
                found["adapter_bytes"] += sum(map(shapes._bytes, factors)) + made * (
                    2 if "badd" in name else 1
                )
            else:
                found["products"] += operations
        else:
            found["linear_bytes" if self._in_product else "other_bytes"] += moved

    def product(
        self,
        real: Callable[..., Tensor],
        layer: BranchLinear,
        x: Tensor,
        branches: Branches,
        *sources: Tensor | None,
    ) -> Tensor:
        """`BranchLinear.shared_product`, with what it would take at least."""
        narrow = layer.compute.itemsize
        same = self._last is not None and _place(self._last) == _place(x)
        self._last = x  # which keeps its place from becoming another's
        made = x.shape[0] * x.shape[1] * layer.out_features
        read = 0 if same else x.numel() * (_FLOAT32 + narrow)
        self.found["least_linear_bytes"] += read + made * (_FLOAT32 + narrow)
        elements = layer.out_features * layer.in_features
        if not isinstance(layer.weight, FourBitWeight):
            self.found["head_bytes"] += elements * narrow
        elif id(layer) not in self._unpacked:
            self._unpacked.add(id(layer))
            packed = layer.weight.nbytes()
            self.found["packed_bytes"] += packed
            self.found["unpacking_once"] += packed + elements * narrow
        self._in_product = True
        try:
            return real(layer, x, branches, *sources)
        finally:
            self._in_product = False


def _place(tensor: Tensor) -> tuple[int, int, torch.Size]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape


def _attention(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> float:
    rows, heads, length, width = query.shape
    whole = 2.0 * rows * heads * length * key.shape[2] * (width + value.shape[-1])
    return whole / 2 if causal else whole


def _is_causal(op: Any, args: Any, kwargs: Any) -> bool:
    names = [argument.name for argument in op._schema.arguments]
    number = names.index("is_causal")
    return bool(args[number] if number < len(args) else kwargs.get("is_causal", False))


@contextmanager
def _costing() -> Iterator[_Costing]:
    costing, real = _Costing(), BranchLinear.shared_product
    gpu.WATCHERS.append(costing)
    try:
        with patch.object(
            BranchLinear,
            "shared_product",
            lambda *given: costing.product(real, *given),
        ):
            yield costing
    finally:
        gpu.WATCHERS.remove(costing)


def of_pass(shape: dict[str, int], rows: int, length: int, rank: int = 8) -> Costs:
    """Of a step's pass in three branches: LoRA on q and v of every block, nf4, bf16, answers of one token.

    shape: of LlamaConfig, with `num_hidden_layers`. rows, length: of a batch without padding, cut into the
    chunks that the package takes.
    """
    two, three = (_counted({**shape, "num_hidden_layers": layers}, rows, length, rank) for layers in (2, 3))
    block = three.plus(two, -1.0)
    whole = two.plus(block, shape["num_hidden_layers"] - 2.0)
    saved = block.other_bytes - Branches.of().count * rows * length * _least_bytes(shape)
    return whole._replace(least_other_bytes=whole.other_bytes - saved * shape["num_hidden_layers"])


def _least_bytes(shape: dict[str, int]) -> float:
    """Of a token in a block of a Llama: what its own operations on float32 read and write at least.

    Two norms, rotary codes of queries and keys, the gate times what it gates, two sums with the residual.
    """
    hidden, inner, heads = (
        shape[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    keys = hidden // heads * shape.get("num_key_value_heads", heads)
    return _FLOAT32 * (2 * 2 * hidden + 2 * (hidden + keys) + 3 * inner + 2 * 3 * hidden)


def _counted(shape: dict[str, int], rows: int, length: int, rank: int) -> Costs:
    with shapes.without_memory():
        model: Model = shapes._model(shape)
        repeat_groups(model.module)
        space = LoRA(rank=rank, blocks="all")
        space.attach(model, seed=0)
        directions = {
            name: torch.zeros(1, *value.shape, device=shapes.DEVICE)
            for name, value in space.parameters.items()
        }
        with _costing() as costing:
            Traversal(model).losses(_batch(rows, length), Branches.of(), 1e-3, directions)
    return Costs(**costing.found)


def _batch(rows: int, length: int) -> Batch:
    """Full rows whose last token is the answer."""
    each, ids = torch.arange(rows), torch.zeros(rows, length, dtype=torch.int64)
    position = torch.full((rows,), length - 2)
    return Batch(ids, torch.ones_like(ids), None, each, position, each, each * 0, each, each, each, "answer")
