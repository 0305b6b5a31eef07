"""A traversal on the meta device: what a pass makes, and how much of it is alive at the worst moment.

The Hugging Face model itself runs, with its first blocks, on tensors without memory; so do the block
wrapper, the chunks, the branch-aware linears and the head of `stream/` and `model/`. There are no formulas
of an architecture here. What is put in their place: the noise of weights, whose shapes are known, and the
tiles of a product, of which one, the largest, is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.pytorch_utils import Conv1D

from hizoo_lite.base import Bits, Branches, BranchState, ModelKind
from hizoo_lite.device import is_gpu, like
from hizoo_lite.engine.block import PresentBlock
from hizoo_lite.engine.head import HELD_BYTES, LOGITS_BYTES, head_of, logits_at, with_hidden
from hizoo_lite.engine.overwritten import ReadAgain
from hizoo_lite.engine.residency import Resident
from hizoo_lite.model.linear import TILE_BYTES, BranchLinear
from hizoo_lite.model.scratch import Scratch
from hizoo_lite.philox import workspace_bytes
from hizoo_lite.plan.outline import Anatomy
from hizoo_lite.plan.tally import FusedAttention, Tally, nbytes
from hizoo_lite.quant.opaque import Opaque
from hizoo_lite.quant.residual import SUM_ELEMENTS
from hizoo_lite.spaces.heads import HeadDelta
from hizoo_lite.spaces.lora import LoRADelta
from hizoo_lite.spaces.targets import resolve_targets
from hizoo_lite.spaces.weights import Tile, WeightDelta, tiles

META = torch.device("meta")
_FLOAT32 = 4
#: Blocks that are rehearsed: the first, whose input is the embeddings, and one whose input is a block's.
_BLOCKS = 2
#: The part of a block that treats every token alike, by its first and last module.
_MLPS = (("mlp", "mlp"), ("fc1", "fc2"), ("intermediate", "output"))
#: Bytes an element of a tile that storing an update takes beside the tile itself; a tile has 2^19 elements on
#: a CPU. Counted from the temporaries of `PackedWeight.store`.
_STORE_BYTES = {"nf4": 36, "fp4": 40, "int8": 28, "none": 20}


class Trained(NamedTuple):
    """What a space trains."""

    space: Literal["lora", "dense", "scales"]
    targets: str = "attention"
    rank: int = 8
    residual: bool = False
    train_a: bool = False


class Pass(NamedTuple):
    """One traversal."""

    rows: int
    length: int
    branches: Branches
    sites: int  # positions whose logits are read, over all rows
    chunk: int | Literal["auto"] = "auto"
    halvings: int = 0  # of chunks and logits, so that it fits


class Activations(NamedTuple):
    """Bytes of what a traversal makes."""

    worst: Mapping[str, int]  # alive at the worst moment, by owner: between, attention, mlp, logits
    moments: Mapping[str, int]  # the most that was alive while that part ran
    scratch: Mapping[str, int]  # reused buffers by name
    peak_bytes: int  # of worst and scratch together


class _Weight(Opaque):
    """Answers what a linear layer asks of a packed weight."""

    def __init__(self, shape: tuple[int, int], bits: Bits, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.shape, self.bits, self.dtype = shape, bits, dtype
        scaled = bits == "int8" and dtype is None
        self.row_scale = torch.empty(shape[0], device=META) if scaled else None
        self.tile_rows = 1
        self._matrix = torch.empty(shape, dtype=dtype, device=META) if dtype is not None else None

    def ready(self, dtype: torch.dtype) -> Tensor | None:
        return self._matrix if self.dtype == dtype else None

    def unpack(self, out: Tensor, first_row: int = 0) -> Tensor:
        return out


class _Buffers(Scratch):
    """Notes the largest request of every name."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.tally, self.sizes = tally, dict[str, int]()

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        self.sizes[name] = max(self.sizes.get(name, 0), nbytes(shape, dtype))
        with self.tally.paused():
            return torch.empty(shape, dtype=dtype, device=META)


class _Linear(BranchLinear):
    """One tile, the largest, in place of all; with the tile of the device that is planned for."""

    device_type = "cpu"

    def _tiles(self, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        height = max(
            64, TILE_BYTES[like(self.device_type)] // (self.in_features * self.compute.itemsize) // 64 * 64
        )
        shape = (min(height, self.out_features), self.in_features)
        ready = self.weight.ready(self.compute)
        if ready is not None:
            yield 0, ready[: shape[0]]
        else:
            yield 0, self.scratch.take("weight", shape, self.compute, device)


class _TwoChunks:
    """A block that answers from its third chunk on with tensors of the right shapes: nothing is new then."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.calls = block, 0
        self.forms: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls > 2:
            rows = (args[0] if args else kwargs["hidden_states"]).shape[0]
            return tree_map_only(_Form, lambda form: form.made(rows), self.forms)
        out = self.block(*args, **kwargs)
        self.forms = tree_map_only(Tensor, lambda t: _Form(tuple(t.shape[1:]), t.dtype), out)
        return out


class _Form:
    """Shape behind the rows, and dtype."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    def made(self, rows: int) -> Tensor:
        return torch.empty(rows, *self.shape, dtype=self.dtype, device=META)


def few_blocks(module: nn.Module, prefix: str, config: Any) -> nn.Module:
    """The module without the blocks that need not be rehearsed; every kind of layer stays."""
    layers = module.get_submodule(prefix)
    assert isinstance(layers, nn.ModuleList)
    types = list(getattr(config.get_text_config(), "layer_types", None) or [])
    count = max([_BLOCKS, *(types.index(kind) + 1 for kind in set(types))])
    del layers[count:]
    return module


class Rehearsal:
    """A model on the meta device, ready to run. `module` is taken over: it is of no other use afterwards."""

    def __init__(
        self,
        module: nn.Module,
        config: Any,
        kind: ModelKind,
        anatomy: Anatomy,
        bits: Bits,
        compute: torch.dtype,
        device_type: str,
        away: bool,
    ) -> None:
        """away: embeddings and head are read when they are needed."""
        self.module, self.config, self.kind, self.anatomy = module.to(META), config, kind, anatomy
        self.bits, self.compute, self.device_type, self.away = bits, compute, device_type, away
        self.tally, self.state = Tally(), BranchState()
        self.overwrites = True
        self.buffers = _Buffers(self.tally)
        self.trunk_name = str(module.base_model_prefix)
        if kind == "classifier" and config.get_text_config().pad_token_id is None:  # the encoder will say
            config.get_text_config().pad_token_id = module.config.get_text_config().pad_token_id = 0  # type: ignore[union-attr, operator]
        self._keep_few_blocks()
        self.linears = {linear.name: linear for linear in anatomy.linears}
        self.placed: dict[str, _Linear] = {}
        self._place_linears()
        self._place_embeddings()

    def run(self, wanted: Pass, trained: Trained | None = None) -> Activations:
        """Rehearse one traversal; with `trained`, its branches differ by that."""
        try:
            return self._run(wanted, trained)
        except ReadAgain:
            self.overwrites = False
        return self._run(wanted, trained)

    def _run(self, wanted: Pass, trained: Trained | None) -> Activations:
        self.tally.__init__()  # type: ignore[misc]
        self.buffers.sizes = {}
        directions = self._attach(trained) if trained is not None else {}
        moves = SimpleNamespace(apply=lambda block: False)  # of a space in the weights: none here
        stand_in = SimpleNamespace(
            blocks=self.blocks,
            state=self.state,
            device=torch.device(self.device_type),
            pending=moves if trained is not None and trained.space != "lora" else None,
            branch_chunk=wanted.chunk,
            halvings=wanted.halvings,
            residency=Resident(),
            observer=None,
            overwrites=self.overwrites,
        )
        layers: Any = self.module.get_submodule(self.anatomy.prefix)
        for index, block in enumerate(self.blocks):
            present = PresentBlock(stand_in, index)  # type: ignore[arg-type]
            present.block[0] = _TwoChunks(block)  # type: ignore[call-overload]
            layers[index] = present
            block.train(False)
        try:
            along = max(1, wanted.branches.directions)
            every = {name: d.expand(along, *d.shape) for name, d in directions.items()}
            self.state.set(wanted.branches, 1e-3, every)
            with torch.no_grad(), FusedAttention(is_gpu(self.device_type)), self.tally:
                self._traverse(wanted)
        finally:
            for index, block in enumerate(self.blocks):
                layers[index] = block
                for names in (("mlp",), ("fc1", "activation_fn", "fc2")):
                    for name in names:
                        block.__dict__.pop(name, None)
            for linear in self.placed.values():
                linear.delta = None
        if trained is not None and trained.residual and self.compute != torch.float32:
            kind = like(self.device_type)
            most = min(SUM_ELEMENTS[kind], TILE_BYTES[kind] // self.compute.itemsize)
            largest = max(math.prod(linear.shape) for linear in self.anatomy.inside())
            self.buffers.sizes["residual"] = _FLOAT32 * min(most, largest)
        update = self._update_bytes(trained)
        scratch = dict(self.buffers.sizes)
        worst = dict(self.tally.worst)
        if update > sum(worst.values()):
            worst = {"update": update}
        return Activations(
            worst, dict(self.tally.moments), scratch, sum(worst.values()) + sum(scratch.values())
        )

    # ------------------------------------------------------------------------------------ the model

    def _keep_few_blocks(self) -> None:
        few_blocks(self.module, self.anatomy.prefix, self.config)
        layers: Any = self.module.get_submodule(self.anatomy.prefix)
        self.blocks = list(layers)
        for block in self.blocks:
            block.register_forward_pre_hook(partial(self._enter, "attention"))
            block.register_forward_hook(partial(self._leave, "between"))
            for first, last in _MLPS:
                if first in block._modules and last in block._modules:
                    block._modules[first].register_forward_pre_hook(partial(self._enter, "mlp"))
                    block._modules[last].register_forward_hook(partial(self._leave, "attention"))
                    break

    def _enter(self, owner: str, *_: Any) -> None:
        self.tally.owner = owner

    def _leave(self, owner: str, *_: Any) -> None:
        self.tally.owner = owner

    def _place_linears(self) -> None:
        for name, layer in list(self.module.named_modules()):
            if not isinstance(layer, nn.Linear | Conv1D):
                continue
            known = self.linears[name]
            stays_away = self.away and known.block is None
            dtype = None if stays_away else known.dtype
            bits: Bits = "none" if dtype is not None or known.block is None else self.bits
            weight = _Weight(known.shape, bits, dtype)
            bias = None if layer.bias is None else torch.empty(known.shape[0], device=META)
            linear = _Linear(weight, bias, self.state, self.compute, self.buffers, name)  # type: ignore[arg-type]
            linear.device_type = self.device_type
            self.module.set_submodule(name, linear)
            self.placed[name] = linear

    def _place_embeddings(self) -> None:
        dtypes = {linear.dtype for linear in self.anatomy.linears if linear.block is None and linear.dtype}
        stored = next(iter(dtypes), torch.bfloat16)  # heads and embeddings of a checkpoint have one dtype
        vocabulary = self.module.get_input_embeddings()  # type: ignore[operator]
        for layer in self.module.modules():
            if isinstance(layer, nn.Embedding):
                dtype = stored if stored in (torch.bfloat16, torch.float16) else torch.float32
                layer.weight = nn.Parameter(layer.weight.to(dtype), requires_grad=False)
                if self.away and layer is vocabulary:
                    layer.register_forward_pre_hook(self._gather)
                layer.register_forward_hook(lambda module, args, output: output.float())

    def _gather(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """The rows that the tokens need, at most one a token of a branch."""
        tokens = args[0].numel() // self.state.branches.count
        weight: Any = module.weight
        module.rows = torch.empty(
            min(tokens, weight.shape[0]), weight.shape[1], dtype=weight.dtype, device=META
        )
        module.register_forward_hook(lambda owner, given, output: setattr(owner, "rows", None))

    # ------------------------------------------------------------------------------------- the pass

    def _traverse(self, wanted: Pass) -> None:
        tally, count = self.tally, wanted.branches.count
        tally.owner = "between"
        ids = torch.zeros(count * wanted.rows, wanted.length, dtype=torch.int64, device=META)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.kind == "classifier":
            self.module(**inputs)
            return
        cache = {"use_cache": False} if self.kind == "causal" else {}
        output = self.module.get_submodule(self.trunk_name)(**inputs, **cache)
        hidden = output[0].view(count, wanted.rows, wanted.length, -1)
        output = with_hidden(output, hidden)  # what else it has need not live on
        tally.owner = "logits"
        sites = torch.zeros(wanted.sites, dtype=torch.int64, device=META)
        vocabulary = self.config.get_text_config().vocab_size
        head = head_of(self.placed, self.trunk_name, vocabulary) if self.away else None
        held_bytes = HELD_BYTES[like(self.device_type)]
        limits = LOGITS_BYTES >> wanted.halvings, head, held_bytes >> wanted.halvings
        pieces = logits_at(self.module, self.trunk_name, output, hidden, sites, sites, vocabulary, *limits)
        for _, (_, logits) in zip(range(2), pieces, strict=False):
            wide = logits.double()
            exponentials = torch.empty_like(wide)  # inside of logsumexp
            del exponentials

    # ------------------------------------------------------------------------------ what is trained

    def _attach(self, trained: Trained) -> dict[str, Tensor]:
        """Deltas on the targets of the blocks at hand; the directions of adapters and heads."""
        present = SimpleNamespace(
            linears=self.placed, block_prefix=self.anatomy.prefix, config=self.config, scratch=self.buffers
        )
        directions: dict[str, Tensor] = {}
        for name in resolve_targets(present, trained.targets):  # type: ignore[arg-type]
            linear = self.placed[name]
            if trained.space == "lora":
                names = (f"{name}.lora_A.weight", f"{name}.lora_B.weight")
                a = torch.empty(trained.rank, linear.in_features, device=META)
                b = torch.empty(linear.out_features, trained.rank, device=META)
                directions[names[1]] = torch.empty_like(b)
                if trained.train_a:
                    directions[names[0]] = torch.empty_like(a)
                linear.delta = LoRADelta(a, b, names if trained.train_a else (None, names[1]), 1.0)
            else:
                linear.delta = self._weight_delta(linear, trained, present)
        if self.kind == "classifier":
            for name, linear in self.placed.items():
                if not name.startswith(self.trunk_name + "."):
                    directions |= self._train_head(name, linear)
        return directions

    def _train_head(self, name: str, linear: _Linear) -> dict[str, Tensor]:
        names = (f"{name}.weight", f"{name}.bias")
        found = {names[0]: torch.empty(linear.out_features, linear.in_features, device=META)}
        if linear.bias is not None:
            found[names[1]] = torch.empty(linear.out_features, device=META)
        linear.delta = HeadDelta(found[names[0]], found.get(names[1]), names)
        return found

    def _weight_delta(self, linear: _Linear, trained: Trained, present: Any) -> WeightDelta:
        """The tiles of the perturbation of a weight, of which the first, the largest, is taken."""
        first = tiles(linear.weight.shape, 1, self.device_type)[0]
        elements = first.rows * linear.in_features

        def direction(part: Any, tile: Tile) -> tuple[Tensor, Any]:
            drawn = elements if trained.space == "dense" else elements // 64
            z = self.buffers.take("weights.z", (drawn,), torch.float32, META)
            torch.empty(self._drawing_bytes(drawn), dtype=torch.uint8, device=META)
            return z, SimpleNamespace(rows=torch.empty((), device=META), columns=None)

        def operand(z: Tensor, factors: Any, tile: Tile) -> tuple[Tensor, Tensor]:
            own = trained.space == "scales" or linear.compute != torch.float32
            name = "weights.tile" if own else "weights.z"
            shape = (first.rows, linear.in_features)
            return self.buffers.take(name, shape, linear.compute, META), torch.empty((), device=META)

        part = SimpleNamespace(linear=linear, tiles=[first], operand=operand)
        return WeightDelta(part, SimpleNamespace(model=present, direction=direction))  # type: ignore[arg-type]

    def _update_bytes(self, trained: Trained | None) -> int:
        """Of a block's update: values of a tile, and what storing them takes."""
        if trained is None or trained.space == "lora":
            return 0
        shapes = [linear.weight.shape for name, linear in self.placed.items() if linear.delta is not None]
        shapes = shapes or [linear.shape for linear in self.anatomy.inside()]
        first = [tiles(shape, 1, self.device_type)[0].rows * shape[1] for shape in shapes]
        elements = max(first, default=0)
        if trained.space == "scales":
            return max(elements // 8, self._drawing_bytes(elements // 64))
        self.buffers.sizes["weights.values"] = 4 * elements
        stored: Bits = "none" if trained.residual else self.bits
        return elements * _STORE_BYTES[stored] + self._drawing_bytes(elements)

    def _drawing_bytes(self, elements: int) -> int:
        """What drawing so many numbers takes beside them; a CPU draws them in place."""
        return workspace_bytes(elements) if is_gpu(self.device_type) else 0
