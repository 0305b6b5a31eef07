"""A loaded model: the Hugging Face module with packed linears, and what every other part asks of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hizoo_lite.base import Bits, Boundaries, ModelKind, Observer, Part, PendingUpdates, Residency
from hizoo_lite.branches import BranchState
from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.memory.limits import Limits
from hizoo_lite.model.build import vocabulary_of
from hizoo_lite.model.linear import BranchLinear
from hizoo_lite.model.rope import RowPositions
from hizoo_lite.model.scratch import Scratch


@final
@dataclass(eq=False, repr=False)
class Model:
    """A loaded model, made by `load`: in eval mode, and nothing in it requires a gradient.

    Attributes:
        module: the Hugging Face model; its linear layers are `BranchLinear`s.
        tokenizer: Hugging Face's; None if the folder has none.
        kind: "causal", "masked" or "classifier".
        config: transformers' `PretrainedConfig`.
        bits: of the linear layers inside the blocks.
        compute: dtype of products with shared weights.
        device: that it computes on.
        state: the branches that are in flight, which all its linear layers share.
        scratch: memory for intermediate results, used again and again.
        linears: the linear layers, by name in the module tree.
        blocks: the transformer layers.
        block_prefix: block i is f"{block_prefix}.{i}" in the module tree.
        source: what was given to `load`.
        folder: where the checkpoint's files are.
        checkpoint: those files.
        stored_names: of the blocks' linear layers, by name in the module tree: the name in the checkpoint.
        row_positions: of position codes that depend on a row's length.
        residency: where the blocks are while they do not run.
        offloaded: stored names of matrices that are read when they are needed.
        new_parameters: those that the checkpoint lacks, which were initialized here.
        originals: values of parameters that an adapter has replaced, by name.
        limits: the residency and budgets that `load` was told.
        chat_template: by name, in place of the tokenizer's own.
        pending: updates that wait for their block, of a space that trains the blocks' own weights.
        observer: is told when a block or the head has run.
        branch_chunk: rows that go through a block together.
        overwrites: whether blocks that are cut into chunks write over their input, in a pass.
        reads_again: whether a block's input is read after the block, so that it cannot be overwritten.
        folds_first: whether all branches must go through every block, since the model's own code needs them.
        blocks_alike: how many of the first blocks one branch goes through for all, in a pass.
        chunk_halvings: how often chunks and logits were halved because memory ran out.
        reads_below: whether the outputs of lower blocks are read again, so that none can be left out.
        part: the blocks that a pass runs; None: all.
        boundaries: what a pass keeps for exact gradients inside the blocks.
    """

    module: nn.Module
    tokenizer: Any | None
    kind: ModelKind
    config: Any
    bits: Bits
    compute: torch.dtype
    device: torch.device
    state: BranchState
    scratch: Scratch
    linears: dict[str, BranchLinear]
    blocks: list[nn.Module]
    block_prefix: str
    source: str
    folder: Path
    checkpoint: Checkpoint
    stored_names: dict[str, str]
    row_positions: RowPositions
    residency: Residency
    offloaded: set[str] = field(default_factory=set)
    new_parameters: list[str] = field(default_factory=list)
    originals: dict[str, Tensor] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    chat_template: str | None = None
    pending: PendingUpdates | None = None
    observer: Observer | None = None
    branch_chunk: int | Literal["auto"] = "auto"
    overwrites: bool = False
    reads_again: bool = False
    folds_first: bool = False
    blocks_alike: int = 0
    chunk_halvings: int = 0
    reads_below: bool = False
    part: Part | None = None
    boundaries: Boundaries | None = None

    def __str__(self) -> str:
        """What it is and where, in one line."""
        compute = str(self.compute).removeprefix("torch.")
        megabytes = self.nbytes() / 2**20
        return f"{self.kind}, {self.bits}, {megabytes:.1f} MiB on {self.device}, products in {compute}"

    def __repr__(self) -> str:
        return f"Model({self.source}: {self})"

    @property
    def trunk_name(self) -> str:
        """Name of the child of the module that is everything but the head, such as "model" or "bert"."""
        return str(self.module.base_model_prefix)

    @property
    def vocabulary(self) -> int | None:
        """How many tokens have an embedding; None if the configuration does not say."""
        return vocabulary_of(self.config)

    @property
    def positions(self) -> int | None:
        """Tokens that the position codes reach; None if the configuration does not say."""
        most = getattr(self.config, "max_position_embeddings", None)
        return None if not most else int(most) - first_position(self.module)

    @cached_property
    def leaves_out_padding(self) -> bool:
        """Whether what lies at padding reaches no token, so that nothing need be computed there.

        Padding is behind the tokens: a causal model does not look there. Of the others, those whose attention
        is transformers' common one, which takes the mask, and that mix tokens in no other way (a convolution
        does, and FNet, which has no such attention).
        """
        if self.kind == "causal":
            return True
        mixing = any(isinstance(m, _ConvNd) for block in self.blocks for m in block.modules())
        return bool(getattr(self.module, "_supports_sdpa", False)) and not mixing

    def block_of(self, linear: str) -> int | None:
        """The index of the block that the layer called `linear` is in; None outside of the blocks."""
        inside = linear.removeprefix(self.block_prefix + ".")
        return None if inside == linear else int(inside.split(".", 1)[0])

    def nbytes(self) -> int:
        """Bytes of all parameters and buffers, wherever they are; shared memory is counted once."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        here = [t.untyped_storage() for t in tensors if not t.is_meta]
        offloaded = sum(t.numel() * t.itemsize for t in self.module.buffers() if t.is_meta)
        offloaded += sum(self.checkpoint.nbytes(name) for name in self.offloaded)
        return offloaded + sum({storage.data_ptr(): storage.nbytes() for storage in here}.values())


def first_position(module: nn.Module) -> int:
    """The row of the table of positions that a text begins at: RoBERTa counts from behind the padding's."""
    tables = [m for n, m in module.named_modules() if n.endswith("position_embeddings")]
    padding = [getattr(table, "padding_idx", None) for table in tables]
    return max((row + 1 for row in padding if row is not None), default=0)
