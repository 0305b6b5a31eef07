"""What a pass of a real model launches, moves and waits for: its shapes on a simulated GPU without memory.

The traversal, the linear layers and LoRA are the package's own; the tensors of the simulated GPU lie on
torch's meta device, so that a model of 7 billion parameters passes in seconds. A block's share is that of
three blocks less that of two.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

from hizoo_lite.branches import Branches, BranchState
from hizoo_lite.engine.block import install
from hizoo_lite.engine.residency import Resident
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.model import build
from hizoo_lite.model.blocks import find_blocks
from hizoo_lite.model.linear import BranchLinear
from hizoo_lite.model.model import Model
from hizoo_lite.model.rope import RowPositions
from hizoo_lite.model.scratch import Scratch
from hizoo_lite.quant import FourBitWeight, PlainWeight
from hizoo_lite.spaces.lora import LoRA
from tests.batches import tiny_task_batch
from tests.simulated import gpu

LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
DEVICE = torch.device(gpu.NAME, 0)
#: Ops that launch nothing, beside views.
_FREE = (
    *("aten.empty", "aten.new_empty", "aten._unsafe_view", "aten.detach", "aten.lift", "aten.alias"),
    "aten._local_scalar_dense",
)


class Counted(NamedTuple):
    """Of one pass of LoRA on q and v in three branches, nf4 and bf16 products, unpadded."""

    launches_per_block: int
    bytes_per_token_block: float  # read and written by all but products and unpacking
    syncs_per_pass: int  # losses with divergences


class _Count:
    """Launches, and bytes through memory by what they are for."""

    def __init__(self) -> None:
        self.launches = 0
        self.moved: collections.Counter[str] = collections.Counter()

    def __call__(self, op: Any, args: Any, kwargs: Any) -> None:
        name, schema = str(op), op._schema
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, gpu.DeviceTensor)]
        if is_view or name.startswith(_FREE) or not given:
            return
        self.launches += 1
        to_host = getattr(kwargs.get("device"), "type", None) == "cpu"
        if to_host or "mm" in name.split(".")[1] or "bitsandbytes" in name or "attention" in name:
            return
        written = [
            value
            for number, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
            for value in [args[number] if number < len(args) else kwargs.get(argument.name)]
            if isinstance(value, Tensor)
        ]
        fills = ("aten.copy_", "aten.fill_", "aten.zero_", "hizoo_lite.")
        filled = name.endswith(".out") or name.startswith(fills)
        read = [t for t in given if not (filled and any(t is w for w in written))]
        self.moved["read"] += sum(map(_bytes, read))
        if written:
            self.moved["written"] += sum(map(_bytes, written))
        else:
            made = op(*_on_meta(args), **_on_meta(kwargs))
            self.moved["written"] += sum(_bytes(t) for t in tree_leaves(made) if isinstance(t, Tensor))


def _on_meta(values: Any) -> Any:
    return torch.utils._pytree.tree_map(gpu._below, values)


def _bytes(tensor: Tensor) -> int:
    """Those that differ: what is expanded is read once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0)
    return math.prod(sizes) * tensor.itemsize


@contextmanager
def without_memory() -> Iterator[None]:
    """While this is open tensors of the simulated GPU have no memory."""
    with gpu.installed() as memory, patch.object(gpu, "BELOW", ["meta"]):
        memory.total_bytes = 1 << 50
        yield


def count(shape: dict[str, int] | None = None, rows: int = 4, length: int = 64) -> Counted:
    """Run a pass of two blocks and one of three."""
    found = []
    for layers in (2, 3):
        with without_memory():
            model = _model({**LLAMA_2_7B, **(shape or {}), "num_hidden_layers": layers})
            model.branch_chunk = rows
            space = LoRA(rank=8, blocks="all")
            space.attach(model, seed=0)
            directions = {name: torch.zeros_like(value) for name, value in space.parameters.items()}
            batch = tiny_task_batch("causal", rows=rows, length=length)
            batch = batch._replace(attention_mask=torch.ones_like(batch.attention_mask))
            counted = _Count()
            gpu.SYNCS.clear()
            gpu.WATCHERS.append(counted)
            try:
                Traversal(model).losses(batch, Branches.of(), 1e-3, directions)
            finally:
                gpu.WATCHERS.remove(counted)
            found.append((counted.launches, sum(counted.moved.values()), sum(gpu.SYNCS.values())))
            tokens = batch.input_ids.numel()
    two, three = found
    return Counted(three[0] - two[0], (three[1] - two[1]) / tokens, three[2])


def _model(shape: dict[str, int]) -> Model:
    """A Llama of such a shape in nf4 with double quantization."""
    config = LlamaConfig(**shape, vocab_size=32000, max_position_embeddings=4096, tie_word_embeddings=False)
    module, state, scratch = build.build(config, "causal"), BranchState(), Scratch()
    blocks, linears = find_blocks(module), {}
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear):
            weight: Any = PlainWeight(_empty(layer.weight.shape, torch.bfloat16))
            if name.startswith(blocks.prefix + "."):
                weight = _packed(layer.weight.shape)
            linears[name] = BranchLinear(weight, None, state, torch.bfloat16, scratch, name)
            module.set_submodule(name, linears[name])
    for layer in module.modules():
        for name, value in list(layer._parameters.items()):
            if value is not None:
                dtype = torch.bfloat16 if isinstance(layer, nn.Embedding) else torch.float32
                layer._parameters[name] = nn.Parameter(_empty(value.shape, dtype), requires_grad=False)
        for name, buffer in list(layer._buffers.items()):
            if buffer is not None and not isinstance(buffer, gpu.DeviceTensor):
                layer._buffers[name] = _empty(buffer.shape, buffer.dtype)
        if isinstance(layer, nn.Embedding):
            layer.register_forward_hook(lambda module, args, output: output.float())
    nothing: Any = SimpleNamespace(nbytes=lambda name: 0)
    model = Model(
        module=module,
        tokenizer=None,
        kind="causal",
        config=config,
        bits="nf4",
        compute=torch.bfloat16,
        device=DEVICE,
        state=state,
        scratch=scratch,
        linears=linears,
        blocks=blocks.modules,
        block_prefix=blocks.prefix,
        source="shapes",
        folder=Path(),
        checkpoint=nothing,
        stored_names={},
        row_positions=RowPositions(module, state),
        residency=Resident(),
    )
    install(model)
    return model


def _packed(shape: Any) -> FourBitWeight:
    rows, columns = shape
    elements, scales = rows * columns, rows * columns // 64
    nested = (
        _empty((-(-scales // 256),), torch.float32),
        _empty((256,), torch.float32),
        _empty((), torch.float32),
    )
    codes, absmax = _empty((elements // 2,), torch.uint8), _empty((scales,), torch.uint8)
    return FourBitWeight("nf4", (rows, columns), codes, absmax, nested)


def _empty(shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=DEVICE)
