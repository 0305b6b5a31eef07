"""The model that a run would load, on the meta device: what it holds, and what a pass makes.

The loader, the space, the traversal, the chunks, the linears and the update of weights are those of a run; so
is the Hugging Face model. Only tensors have no memory, and a meter counts those that a pass makes
(`meter.py`). The meta device stands for the one that is planned for, which need not be here: what depends on
the kind of device, such as the size of a tile, is that one's. There are no formulas of an architecture here.

A pass is run with the model's first blocks, and each of them on two chunks of a batch; of a weight the first
tile, the largest, is multiplied, perturbed and updated. What would follow is like what was before. Of a run
that keeps hidden states one more block lies below, and is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hizoo_lite.base import Bits, Curvature, ModelKind, Space
from hizoo_lite.batch import Batch
from hizoo_lite.branches import EVALUATION, Branches, BranchState
from hizoo_lite.device import is_gpu, like, meta_as
from hizoo_lite.engine.backward import kept_boundaries
from hizoo_lite.engine.block import PresentBlock, install
from hizoo_lite.engine.head import HELD_BYTES, LOGITS_BYTES
from hizoo_lite.engine.hidden import first_trained
from hizoo_lite.engine.layout import layouts
from hizoo_lite.engine.load import assemble
from hizoo_lite.engine.overwritten import until_suited
from hizoo_lite.engine.passing import SLOTS, Passing
from hizoo_lite.engine.residency import Resident, spread
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.memory.limits import Place
from hizoo_lite.model import build
from hizoo_lite.model.blocks import Blocks
from hizoo_lite.model.model import Model
from hizoo_lite.model.scratch import Scratch
from hizoo_lite.model.weights import WeightLoader
from hizoo_lite.plan.inventory import Described, Inventory
from hizoo_lite.plan.ledger import held
from hizoo_lite.plan.meter import KernelMemory, MemoryMeter
from hizoo_lite.quant import FourBitWeight
from hizoo_lite.spaces.inplace import InPlaceSpace
from hizoo_lite.tasks.collate import Loss
from hizoo_lite.tensors import TorchArrays

Result = TypeVar("Result")
META = torch.device("meta")
#: Blocks that a pass is run with: the first, whose input is the embeddings, and one whose input is a block's.
_BLOCKS = 2
#: Steps after which every one moves the same blocks.
_STEPS = 3
#: The part of a block that treats every token alike, by its first and last module.
_MLPS = (("mlp", "mlp"), ("fc1", "fc2"), ("intermediate", "output"))


class Pass(NamedTuple):
    """One traversal."""

    rows: int
    length: int
    branches: Branches
    sites: int  # positions whose logits are read, over all rows
    chunk: int | Literal["auto"] = "auto"
    chunk_halvings: int = 0  # of chunks and logits, so that it fits


class Activations(NamedTuple):
    """Bytes of what a traversal makes."""

    worst: Mapping[str, int]  # alive at the worst moment: between, attention, mlp, logits, update
    peaks: Mapping[str, int]  # the most that was alive while that part ran
    scratch: Mapping[str, int]  # reused buffers by name
    peak_bytes: int  # of worst and scratch together

    def beside(self, category: str, size: int) -> Activations:
        """With bytes that are there while it runs, and that it does not make."""
        return self._replace(worst={**self.worst, category: size}, peak_bytes=self.peak_bytes + size)


class Source(NamedTuple):
    """What a model is made of, before it is: what the loader is told."""

    inventory: Inventory
    config: Any  # transformers' PretrainedConfig
    kind: ModelKind
    bits: Bits
    double_quant: bool
    compute: torch.dtype
    device: str  # the type of the planned one


class _Placed(Resident):
    """Says where the blocks would be; a block without memory need not be brought."""

    def __init__(self, name: Place) -> None:
        self.name = name


class _Buffers(Scratch):
    """Reused buffers, which no meter sees: what they are is read off them."""

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            return super().take(name, shape, dtype, device)


def load(
    source: Source, place: Place, module: nn.Module, few: int | None = None, buffers: Scratch | None = None
) -> Model:
    """The model of a source as a run loads it, on the meta device, which must stand for the planned one.

    module: the empty one, which is taken over. few: how many of its blocks; None: all.
    """
    described = Described(source.inventory, module, source.kind)
    where: Literal["device", "host"] = "device" if place == "resident" else "host"
    told = source.kind, source.bits, source.double_quant, source.compute, META, 0, where
    loader = WeightLoader(described, module, *told)
    if few is not None:
        layers: Any = module.get_submodule(loader.blocks.prefix)
        assert isinstance(layers, nn.ModuleList)
        del layers[few:]
        loader.blocks = Blocks(loader.blocks.prefix, list(layers))
    loader.scratch = buffers or Scratch()
    model = assemble(loader, source.config, str(source.inventory.folder))
    model.residency = _Placed(place)
    for name in loader.absent:  # it has no memory, and as it is on the meta device that must be said
        embedding: Any = module.get_submodule(name.removesuffix(".weight"))
        embedding.weight = nn.Parameter(torch.empty(0, device=META), requires_grad=False)
    _constants_to_meta(model, shared=like(source.device) == "cpu")
    return model


def fewest_blocks(config: Any, below: int = 0) -> int:
    """How many a pass is run with, of a model that has as many, and `below` under them.

    Every kind of layer is among them.
    """
    types = list(getattr(config.get_text_config(), "layer_types", None) or [])[below:]
    return max([_BLOCKS, *(types.index(kind) + 1 for kind in set(types))])


def _constants_to_meta(model: Model, shared: bool) -> None:
    """What a weight has beside its matrix; shared: on a CPU all have the same code table."""
    tables: dict[str, Tensor] = {}
    for layer in model.module.modules():
        for name, buffer in layer._buffers.items():
            layer._buffers[name] = None if buffer is None else buffer.to(META)
        if isinstance(layer, FourBitWeight) and shared:
            layer.table = tables.setdefault(layer.bits, layer.table)


# ------------------------------------------------------------------------------------- what is held


class Held:
    """A model and a space as a run holds them after loading, by category, in bytes."""

    def __init__(
        self, source: Source, place: Place, module: nn.Module, space: Space, labels: Sequence[int] | None
    ) -> None:
        with meta_as(source.device):
            self.model, self.space = load(source, place, module), space
            space.attach(self.model, 0, labels)
            self.categories = held(self.model, space)
            self.unaccounted = tuple(dict.fromkeys(self.model.checkpoint.unaccounted))  # type: ignore[attr-defined]
            if place == "resident":
                self.block_bytes = [0] * len(self.model.blocks)
                for name, linear in self.model.linears.items():
                    block = self.model.block_of(name)
                    if block is not None:
                        tensors = (stored.tensor for stored in linear.weight.stored())
                        self.block_bytes[block] += sum(tensor.nbytes for tensor in tensors)
            else:
                self.block_bytes = [layout.nbytes for layout in layouts(self.model)]
            self.offloaded_bytes = sum(self.model.checkpoint.nbytes(name) for name in self.model.offloaded)

    def moved_bytes(self, kept: int, first: int) -> int:
        """What each step fetches if `kept` blocks stay on the device and passes begin at block `first`."""
        blocks, residency = range(len(self.block_bytes)), self.model.residency
        staying, moves = spread(len(blocks), kept, first), _Counted(self.block_bytes)
        passing = Passing(residency, [block for block in blocks if block not in staying], SLOTS, moves)

        def run(asked: Iterable[int]) -> None:
            for block in asked:
                if block not in staying:
                    passing.prefetch(block, passing.slot_of(block))

        residency.starts_at = first
        for _ in range(_STEPS):
            moves.nbytes = 0
            with kept_boundaries(self.model, self.space.exact, 1) as boundaries:
                run(blocks[first:])
                if boundaries is not None:
                    residency.falls = True
                    run(reversed(blocks[boundaries.lowest :]))
        return moves.nbytes


class _Counted:
    """In place of a fetcher: the bytes that it would move."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes, self.nbytes = sizes, 0

    def fetch(self, block: int, slot: int) -> None:
        """See `Fetches.fetch`."""
        self.nbytes += self.sizes[block]


# ----------------------------------------------------------------------------------------- a pass


class DryRun:
    """A model with few blocks and, if one is given, a space on it: ready to be run on any batch.

    features: of the hidden states that batches come with, as a run keeps them; 0: they come without.
    """

    def __init__(
        self,
        source: Source,
        place: Place,
        module: nn.Module,
        space: Space | None = None,
        curvature: Curvature | None = None,
        labels: Sequence[int] | None = None,
        below: int = 0,
    ) -> None:
        """`module` is taken over. curvature: of a space that trains weights, for their Sigma; not started.

        labels: as `Space.attach` takes them. below: blocks that are added under the first trained one, for
            runs that keep what goes into that. The space must leave them out.
        """
        self.device, self.space = source.device, space
        pads: Any = source.config.get_text_config()
        if source.kind == "classifier" and pads.pad_token_id is None:  # the encoder will say
            pads.pad_token_id = 0
            module.config.get_text_config().pad_token_id = 0  # type: ignore[union-attr, operator]
        with meta_as(self.device):
            self.buffers, self.meter = _Buffers(), MemoryMeter()
            few = below + fewest_blocks(source.config, below)
            self.model = model = load(source, place, module, few, self.buffers)
            self._see_owners()
            install(model)
            if space is not None:
                space.attach(model, 0, labels)
        self.curvature = curvature
        if isinstance(space, InPlaceSpace) and space.weights is not None:
            assert curvature is not None
            curvature.start(space.weights.shapes, TorchArrays())
            for part in space.weights.parts:
                part.tiles = part.tiles[:1]
        for linear in model.linears.values():
            linear.__dict__["_tiles"] = partial(_first, linear._tiles)
        self.blocks = [_TwoChunks(cast(PresentBlock, present), model.state) for present in model.blocks]
        self.features = self._features() if below else 0

    def _features(self) -> int:
        """0 for a model that reads what the blocks below give: it runs in full."""
        batch, traversal = self._batch(Pass(1, 2, EVALUATION, 1)), Traversal(self.model)

        def outcome(batch: Batch) -> None:
            self._anew(lambda: traversal.outcome(batch, EVALUATION, 0.0, {}))

        with meta_as(self.device), torch.no_grad(), KernelMemory(is_gpu(self.device)), MemoryMeter():
            outcome(batch)  # so that it is known what blocks give
            hidden = self._anew(lambda: traversal.taken(batch, first_trained(self.model)))
            outcome(batch._replace(hidden=hidden))
        return 0 if self.model.reads_below else hidden.shape[-1]

    def _anew(self, work: Callable[[], Result]) -> Result:
        """One traversal, none of whose blocks has been run before."""

        def begun() -> Result:
            for block in self.blocks:
                block.calls = 0
            return work()

        return until_suited(self.model, begun)

    def run(self, wanted: Pass) -> Activations:
        """One traversal, with the branches' directions if it has some and an update if one may wait."""
        with meta_as(self.device):
            return self._anew(lambda: self._run(wanted))

    def calibrate(self, wanted: Pass) -> Activations:
        """What the space does with such a batch before the first step."""
        with meta_as(self.device):
            return self._anew(lambda: self._calibrate(wanted))

    def _calibrate(self, wanted: Pass) -> Activations:
        assert self.space is not None
        self._begin(wanted)
        return self._metered(partial(self.space.calibrate, Traversal(self.model), self._batch(wanted)))

    def _begin(self, wanted: Pass) -> None:
        model = self.model
        model.branch_chunk, model.chunk_halvings = wanted.chunk, wanted.chunk_halvings
        self.buffers.clear()

    def _run(self, wanted: Pass) -> Activations:
        self._begin(wanted)
        along = wanted.branches.directions
        parameters = {} if self.space is None or not along else self.space.parameters
        directions = {name: torch.empty(along, *p.shape, device=META) for name, p in parameters.items()}
        self._let_an_update_wait()
        batch = self._batch(wanted)
        if self.features:
            states = torch.empty(wanted.rows, wanted.length, self.features, device=META)
            batch = batch._replace(hidden=states)
        given = batch, wanted.branches, 1e-3, directions, self._exact()
        return self._metered(partial(Traversal(self.model).outcome, *given))

    def _metered(self, work: Callable[[], object]) -> Activations:
        self.meter = meter = MemoryMeter()
        with torch.no_grad(), KernelMemory(is_gpu(self.device)), meter:
            work()
        scratch = {name: buffer.nbytes for (name, _), buffer in self.buffers._buffers.items()}
        made = sum(meter.worst.values()) + sum(scratch.values())
        return Activations(dict(meter.worst), dict(meter.peaks), scratch, made)

    def _exact(self) -> Mapping[str, Tensor]:
        """Parameters with exact gradients, in a step."""
        return self.space.exact if self.space is not None else {}

    def _batch(self, wanted: Pass) -> Batch:
        """All tokens differ, so that the most rows of an embedding are asked for; one is padding."""
        rows, length = wanted.rows, wanted.length
        vocabulary = self.model.vocabulary or 1
        ids = torch.arange(rows * length).remainder(vocabulary).view(rows, length)
        mask = torch.ones_like(ids)
        mask[-1, -1] = 0
        sites = torch.arange(self._sites(wanted, vocabulary))
        zeros, examples = torch.zeros_like(sites), torch.zeros(rows, dtype=torch.int64)
        at = sites.remainder(rows), sites.div(rows, rounding_mode="floor").remainder(length)
        loss: Loss = "class" if self.model.kind == "classifier" else "answer"
        if loss == "answer" and self._exact():
            loss = "choice"
        return Batch(ids, mask, None, *at, sites, zeros, sites, zeros, examples, loss)

    def _sites(self, wanted: Pass, vocabulary: int) -> int:
        """As many as make two chunks of logits, and of chunks that wait together all, and one more."""
        each = 4 * wanted.branches.count * vocabulary
        chunk = max(1, (LOGITS_BYTES >> wanted.chunk_halvings) // each)
        together = max(1, (HELD_BYTES[like(self.device)] >> wanted.chunk_halvings) // (each * chunk))
        return min(wanted.sites, chunk * max(2, together + 1))

    def _let_an_update_wait(self) -> None:
        """As in every step but the first; the directions of this one are drawn anew."""
        if isinstance(self.space, InPlaceSpace) and self.space.weights is not None:
            assert self.curvature is not None
            weights = self.space.weights
            weights.drop()
            weights.begin(0, 0, self.curvature, measured=False)
            weights.update(1.0, 0.1)
            self.model.pending = _Owned(weights.apply, self._enter)

    def _see_owners(self) -> None:
        """What is made belongs to the part of the model that runs."""
        for block in self.model.blocks:
            block.register_forward_pre_hook(partial(self._hook, "attention"))
            block.register_forward_hook(partial(self._hook, "between"))
            for first, last in _MLPS:
                if first in block._modules and last in block._modules:
                    block.get_submodule(first).register_forward_pre_hook(partial(self._hook, "mlp"))
                    block.get_submodule(last).register_forward_hook(partial(self._hook, "attention"))
                    break
        if self.model.kind != "classifier":
            trunk = self.model.module.get_submodule(self.model.trunk_name)
            trunk.register_forward_hook(partial(self._hook, "logits"))

    def _hook(self, category: str, *_: Any) -> None:
        self._enter(category)

    def _enter(self, category: str) -> None:
        self.meter.category = category


def _first(tiles: Callable[[torch.device], Iterator[Any]], device: torch.device) -> Iterator[Any]:
    return islice(tiles(device), 1)


class _Owned(NamedTuple):
    """Pending updates of weights; what they make belongs to the update."""

    move: Callable[[int], bool]
    enter: Callable[[str], None]

    def apply(self, block: int) -> bool:
        """See `PendingUpdates.apply`."""
        self.enter("update")
        moved = self.move(block)
        self.enter("between")
        return moved


class _TwoChunks:
    """A block that answers from its third chunk on with tensors of the right shapes: nothing is new then.

    So does its MLP from its third slice on.
    """

    def __init__(self, present: PresentBlock, state: BranchState) -> None:
        """Takes the place of the block."""
        self.block, self.calls = present.block[0], 0
        self.forms: Any = None
        self.mlp = None if present._mlp is None else _TwoSlices(present._mlp._run, state)
        if present._mlp is not None:
            present._mlp._run = self.mlp  # type: ignore[method-assign, assignment]
        present.block[0] = cast(nn.Module, self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls > 2 and not torch.is_grad_enabled():  # a graph is needed for every chunk
            rows = (args[0] if args else kwargs["hidden_states"]).shape[0]
            return tree_map_only(_Form, lambda form: form.made(rows), self.forms)
        if self.mlp is not None:
            self.mlp.calls = 0
        out = self.block(*args, **kwargs)
        self.forms = tree_map_only(Tensor, lambda t: _Form(tuple(t.shape[1:]), t.dtype), out)
        return out


class _TwoSlices:
    """The MLP of a block that is run slice by slice."""

    def __init__(self, run: Callable[..., Tensor], state: BranchState) -> None:
        self.run, self.state, self.calls = run, state, 0
        self.width, self.diverged = 0, state.mark()

    def __call__(self, x: Tensor, *more: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 2 and not torch.is_grad_enabled():
            self.state.restore(self.diverged)
            return torch.empty(*x.shape[:-1], self.width, device=META)
        y = self.run(x, *more)
        self.width, self.diverged = y.shape[-1], self.state.mark()
        return y


class _Form:
    """Shape behind the rows, and dtype."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    def made(self, rows: int) -> Tensor:
        return torch.empty(rows, *self.shape, dtype=self.dtype, device=META)


def pass_bytes(model: Model, rows: int, length: int, branches: Branches, sites: int | None = None) -> int:
    """What a traversal of `rows` sequences of `length` tokens makes on a model that is loaded.

    Nothing is trained. sites: positions whose logits are read; without it one a row.
    """
    config = copy.deepcopy(model.config)
    source = Source(
        Inventory.of(model.checkpoint),
        config,
        model.kind,
        model.bits,
        False,
        model.compute,
        model.device.type,
    )
    place: Place = "host" if model.offloaded else "resident"
    sites = rows if sites is None else sites
    wanted = Pass(rows, length, branches, sites, model.branch_chunk, model.chunk_halvings)
    return DryRun(source, place, build.build(config, model.kind)).run(wanted).peak_bytes
