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
    """Made by `load`. The module is in eval mode and nothing in it requires a gradient."""

    module: nn.Module  # the Hugging Face model; its linears are `BranchLinear`s
    tokenizer: Any | None  # None if the folder has none
    kind: ModelKind
    config: Any  # transformers' PretrainedConfig
    bits: Bits  # of the linears inside the blocks
    compute: torch.dtype  # of products with shared weights
    device: torch.device
    state: BranchState
    scratch: Scratch
    linears: dict[str, BranchLinear]  # by name in the module tree
    blocks: list[nn.Module]
    block_prefix: str  # block i is f"{block_prefix}.{i}" in the module tree
    source: str  # what was given to `load`
    folder: Path  # where the checkpoint's files are
    checkpoint: Checkpoint
    stored_names: dict[str, str]  # of the blocks' linears: name in the module tree -> in the checkpoint
    row_positions: RowPositions  # of codes that depend on a row's length
    residency: Residency  # where the blocks are while they do not run
    offloaded: set[str] = field(default_factory=set)  # stored names of matrices that are read when needed
    new_parameters: list[str] = field(default_factory=list)  # initialized here, not in the checkpoint
    originals: dict[str, Tensor] = field(default_factory=dict)  # of parameters that an adapter has replaced
    limits: Limits = field(default_factory=Limits)  # what `load` was told
    chat_template: str | None = None  # by name, in place of the tokenizer's own
    pending: PendingUpdates | None = None  # of a space that trains the blocks' own weights
    observer: Observer | None = None  # is told when a block or the head has run
    branch_chunk: int | Literal["auto"] = "auto"  # rows that go through a block together
    overwrites: bool = False  # whether blocks cut into chunks write over their input: in a traversal
    reads_again: bool = False  # inputs of blocks, after the block, so that they cannot be overwritten
    folds_first: bool = False  # all branches go through every block, since the model's own code needs them
    blocks_alike: int = 0  # the first ones, which one branch goes through for all: in a traversal
    chunk_halvings: int = 0  # of chunks and logits, because memory ran out
    reads_below: bool = False  # what lower blocks give, so that none can be left out
    part: Part | None = None  # the blocks that a pass runs; None: all
    boundaries: Boundaries | None = None  # what a pass keeps for exact gradients inside the blocks

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
        return None if most is None else int(most) - first_position(self.module)

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
        """The index of the block that a linear layer is in; None outside of the blocks."""
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
