"""Extreme sparsity (SensZOQ: Guo et al., 2406.02913): a fixed small share of sensitive weights is trained.

Sensitive are the weights with the largest squared gradient, the diagonal of the empirical Fisher matrix,
found once, before the first step. The rest, quantized or not, stays as it is. Beside the shared base product
a branch k has y_k += S_k x_k, in float32, with S_k the few differences from the stored weights at its point.
They begin at zero, and lie in memory like an adapter: values and their places, both saved, so that steps are
replayed without the model.

Deviations: the paper takes sensitive weights out of the quantized matrix and keeps them in 16 bits; ours are
float32 differences from what the stored codes stand for, which need no second copy of the weights. It takes
the largest of the whole model on pre-training text; ours are a share of each layer, so that a layer can be
finished before the next one is looked at, on the first training examples of the run.

Squared gradients need one reverse pass, a block at a time (engine/backward.py): beside what is made in a
block there are the inputs of all blocks, and of the rows of one block what its layers are given and their
gradients. See `Sensitivity`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hizoo_lite.base import LinearDelta, Space
from hizoo_lite.batch import Batch
from hizoo_lite.branches import EVALUATION, BranchState
from hizoo_lite.checkpoints.adapter import PEFT_METADATA, SPACE_FILE, check_fits, read_record
from hizoo_lite.checkpoints.tensors import load_tensors, save_tensors
from hizoo_lite.device import like
from hizoo_lite.engine.backward import NoReverse
from hizoo_lite.engine.block import each_block
from hizoo_lite.engine.overwritten import until_suited
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import UserError
from hizoo_lite.model.linear import BranchLinear
from hizoo_lite.model.model import Model
from hizoo_lite.quant.packed import PackedWeight
from hizoo_lite.spaces.heads import HeadMode, attach_head, branch_values, check_mode
from hizoo_lite.spaces.inplace import check_record, save_record
from hizoo_lite.spaces.targets import Blocks, release, resolve_targets
from hizoo_lite.tensors import batch_tensors

SparseBy = Literal["gradients", "magnitude"]

FILE = "sparse.safetensors"
#: Behind a layer's name.
VALUES, INDEX, PROBE = ".sparse.values", ".sparse.index", ".sparse.probe"
#: Tokens whose products are there at once: their inputs stay in cache on a CPU.
PIECE_TOKENS = {"cpu": 64, "cuda": 1024}
#: Of the rows whose gradients are summed before they are squared: one row if it is longer.
CHUNK_TOKENS = 128
#: Scores of a weight that are there at once.
SCORE_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
#: Places are 32 bits if a matrix allows that.
_NARROW = 1 << 31


class SparseDelta(LinearDelta):
    """y_k += S_k x_k; S has `values`, (n,) float32, at `index`, (n,), places in the flat weight, rising."""

    def __init__(self, values: Tensor, index: Tensor, shape: tuple[int, int], name: str) -> None:
        """shape: (out_features, in_features). name: of the parameter."""
        self.values, self.index, self.shape, self.name = values, index, shape, name

    def apply(self, x: Tensor, y: Tensor | None, state: BranchState) -> Tensor:
        """A row's entries are summed one after the other, as bags of an embedding are: the same every time.

        On a core of a CPU that takes 4 % of the time of a dense float32 product of 4096 x 4096, at a share
        of 0.001 and of 0.01; with inputs gathered and summed by segment it takes 10 % and over 100 %.
        """
        assert y is not None
        values = state.once(self.name, lambda: branch_values(self.values, self.name, state))
        columns = state.once(f"{self.name}, columns", lambda: (self.index % self.shape[1]).int())
        ends = state.once(f"{self.name}, ends", self._ends)
        size = PIECE_TOKENS[like(x.device)]
        for first in range(0, x.shape[1], size):
            part = slice(first, first + size)
            for given, out, own in zip(x[:, part], y[:, part], values, strict=True):
                arguments: Any = {"mode": "sum", "per_sample_weights": own, "include_last_offset": True}
                out += F.embedding_bag(columns, given.t().contiguous(), ends, **arguments).t()
        return y

    def _ends(self) -> Tensor:
        """Where each row begins among the entries, and the end of the last: (out_features + 1,) int32."""
        rows, columns = self.shape
        starts = torch.arange(rows + 1, device=self.index.device) * columns
        return torch.searchsorted(self.index.long(), starts).int()


class SparseChanges:
    """W + S, in float32."""

    space = "sparse"

    def __init__(self, folder: Path) -> None:
        """Raises `UserError`, naming the file, if something is missing or not valid."""
        record = read_record(folder)
        path = folder / FILE
        self._saved = load_tensors(path)
        self.files = [folder / SPACE_FILE, path]
        self.linears, self.residuals = set(record["targets"]), set[str]()
        self.heads = {n: v.float() for n, v in self._saved.items() if not n.endswith((VALUES, INDEX))}
        wanted = {target + part for target in self.linears for part in (VALUES, INDEX)}
        wrong = sorted(wanted ^ (set(self._saved) - set(self.heads)))
        if wrong:
            raise UserError(f"{folder}: {SPACE_FILE} and {FILE} differ about {wrong[0]!r}")

    def weight(self, linear: str, base: PackedWeight) -> PackedWeight:
        """The base itself. Raises `UserError` if the places are none of it."""
        if linear in self.linears:
            _check_places(self.files[-1], linear, self._saved, base.shape)
        return base

    def add(self, linear: str, rows: Tensor, first_row: int) -> None:
        """The differences of these rows."""
        if linear not in self.linears:
            return
        index, start = self._saved[linear + INDEX].long(), first_row * rows.shape[1]
        first, last = torch.searchsorted(index, torch.tensor([start, start + rows.numel()])).tolist()
        rows.view(-1)[index[first:last] - start] += self._saved[linear + VALUES][first:last].float()


class Sparse(Space):
    """A few sensitive weights of every target, at places that are chosen once (SensZOQ, arXiv 2406.02913).

    y = W x + S x with W as it is stored and S a sparse float32 matrix of differences, zero at the start.
    Sensitive weights have the largest squared gradients on the first training examples, of each layer; the
    paper takes those of the whole model on pre-training text, and keeps the weights themselves in 16 bits.
    """

    name = "sparse"
    changes = SparseChanges
    weights = None  # nothing inside the blocks is changed
    calibrates = True

    def __init__(
        self,
        share: float = 0.001,
        by: SparseBy = "gradients",
        targets: str | Sequence[str] = "all-linear",
        head: HeadMode | None = None,
        blocks: Blocks = "all",
    ) -> None:
        """Nothing is chosen before `calibrate`.

        Args:
            share: of a layer's weights, above 0 and up to 1; at least one weight.
            by: "gradients", squared, from one reverse pass; or "magnitude", the weights' own sizes, for
                models that allow no reverse pass.
            targets: as of `LoRA`; by default all linear layers.
            head: as of `LoRA`, without rows for label words.
            blocks: how many blocks are trained, from the top, or "all".

        Raises:
            UserError: if share, by or head is not one of these.
        """
        if not 0 < share <= 1:
            raise UserError(f"--sparse-share: got {share!r}, allowed: a number above 0 and up to 1")
        if by not in ("gradients", "magnitude"):
            raise UserError(f"--sparse-by: got {by!r}, allowed: gradients, magnitude")
        self.share, self.by = share, by
        self.without_losses = "--sparse-by magnitude" if by == "gradients" else ""
        self.targets, self.head = targets, check_mode(head)
        self.blocks: Blocks = "all" if blocks == "auto" else blocks
        self.parameters: dict[str, Tensor] = {}
        self.exact: dict[str, Tensor] = {}
        self.frozen: dict[str, Tensor] = {}

    def options(self) -> dict[str, Any]:
        """What a space must be made with to read what this one saved, beside the targets."""
        return {"share": self.share}

    def attach(self, model: Model, seed: int, labels: Sequence[int] | None = None) -> None:
        """Hang a delta on each target, in place of others; places are spread evenly until they are chosen.

        No seed is used.
        """
        release(model)
        self.model, self.parameters, self.exact, self.frozen = model, {}, {}, {}
        self.target_names = resolve_targets(model, self.targets, self.blocks)
        for target in self.target_names:
            linear = model.linears[target]
            size, count = linear.out_features * linear.in_features, self.count(linear)
            values = torch.zeros(count, device=model.device)
            spread = torch.arange(count, device=model.device) * size // count
            index = spread.to(torch.int32 if size <= _NARROW else torch.int64)
            self.parameters[target + VALUES], self.frozen[target + INDEX] = values, index
            linear.delta = SparseDelta(values, index, linear.weight.shape, target + VALUES)
        self.head_names = attach_head(model, self.head, self.parameters, self.exact, self.frozen)

    def count(self, linear: BranchLinear) -> int:
        """How many weights of the layer `linear` are trained."""
        return max(1, round(self.share * linear.out_features * linear.in_features))

    def detach(self) -> None:
        """Take every delta off the model again."""
        release(self.model)

    # -------------------------------------------------------------------------------------- places

    def calibrate(self, traversal: Traversal, batch: Batch) -> None:
        """Choose the places, of parameters that are still zero. See `Space.calibrate`.

        Raises:
            UserError: if the model allows no reverse pass, or gradients are not finite.
        """
        index = {target: self.frozen[target + INDEX] for target in self.target_names}
        if self.by == "gradients":
            rows = max(1, CHUNK_TOKENS // batch.input_ids.shape[1])
            self.reverse(traversal, batch, Sensitivity(self.model, index), rows)
        else:
            self._by_magnitude(index)

    def refusal(self, why: str, also: str = "") -> UserError:
        """The error to raise if there are no gradients to choose places by.

        Args:
            why: there are none.
            also: what else is allowed, for the message.
        """
        return UserError(f"--sparse-by: got 'gradients', but {why}; allowed: magnitude{also}")

    def reverse(self, traversal: Traversal, batch: Batch, sensitivity: Sensitivity, rows: int) -> None:
        """A reverse pass over the batch.

        In chunks that are the same whatever the device and its budget: squares are of their sums.

        Args:
            traversal: what takes the batch through the model.
            batch: the examples.
            sensitivity: looks at the gradients and chooses the places.
            rows: of the batch, that are taken together.
        """
        model, made = self.model, batch_tensors(batch)
        index = sensitivity.index
        deltas = {target: model.linears[target].delta for target in index}
        chunks = model.branch_chunk, model.chunk_halvings
        for target in index:
            model.linears[target].delta = _Probe(target, sensitivity)
        model.branch_chunk, model.chunk_halvings = rows, 0
        try:
            traversal.guard(lambda: until_suited(model, partial(sensitivity.run, traversal, made)))
        except NoReverse as error:
            raise self.refusal(error.why) from error
        except NotFinite as error:
            why = f"those of {error.target} are not finite numbers"
            raise self.refusal(why, ", or --compute-dtype float32") from error
        finally:
            model.branch_chunk, model.chunk_halvings = chunks
            for target, delta in deltas.items():
                model.linears[target].delta = delta

    def _by_magnitude(self, index: Mapping[str, Tensor]) -> None:
        model = self.model
        for block in each_block(model):
            for target, places in index.items():
                if model.block_of(target) == block:
                    linear = model.linears[target]
                    places.copy_(
                        _largest(linear, len(places), partial(sizes, linear.weight), model.device)[1]
                    )

    # ---------------------------------------------------------------------------------------- files

    def save(self, folder: Path | str) -> None:
        """Write `hizoo_space.json` and `sparse.safetensors` into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self._tensors(), folder / FILE, PEFT_METADATA)
        save_record(self, folder)

    def load(self, folder: Path | str) -> None:
        """Read the `folder` that `save` wrote.

        Raises:
            UserError: naming the file, before anything is changed, if it does not fit.
        """
        folder = Path(folder)
        check_record(self, folder)
        path, own = folder / FILE, self._tensors()
        saved = load_tensors(path)
        check_fits(path, {n: v.shape for n, v in saved.items()}, {n: v.shape for n, v in own.items()})
        for name, value in own.items():
            if saved[name].dtype != value.dtype:
                raise UserError(f"{path}: {name} is {saved[name].dtype}, the model wants {value.dtype}")
        for target in self.target_names:
            _check_places(path, target, saved, self.model.linears[target].weight.shape)
        for name, value in own.items():
            value.copy_(saved[name])

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.frozen, **self.exact, **self.parameters}


class NotFinite(ValueError):
    """Gradients of a layer, `target`, are not."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self.target = target


class Sensitivity:
    """The places of the largest squared gradients of every target's weight, from one reverse pass.

    dW of a row of the batch is dy' x, with x what goes into a layer and dy the gradient of what comes out.
    Both are kept for the rows of one block; as the pass enters the next one, (dy' x)^2 is summed over the
    rows, a tile of the matrix at a time, of which the largest are kept: no matrix of a weight's size is made.
    """

    def __init__(self, model: Model, index: Mapping[str, Tensor]) -> None:
        """index: of each target, where its places go."""
        self.model, self.index = model, index
        self.probes = {target + PROBE: torch.zeros((), device=model.device) for target in index}
        self.begin()

    def begin(self) -> None:
        """Forget what was looked at."""
        self._block: int | None = None  # whose rows are kept
        self._rows: dict[str, list[Row]] = {}
        self.chunk, self._is_back = 0, False  # which rows of the batch are in the block

    @torch.no_grad()
    def run(self, traversal: Traversal, batch: Batch) -> None:
        """The pass; begun anew if it is repeated."""
        self.begin()
        traversal.outcome(batch, EVALUATION, 0.0, {}, self.probes)
        self.finish()

    def enter(self, target: str) -> None:
        """A layer is about to be run with a graph."""
        block = self.model.block_of(target)
        if block != self._block:
            self.finish()
            self._block, self.chunk = block, 0
        elif self._is_back:
            self.chunk += 1
        self._is_back = False
        rows = self._rows.setdefault(target, [])
        if not rows or rows[-1].chunk != self.chunk:
            rows.append(Row(self.chunk))

    def take(self, target: str, x: Tensor, gradient: Tensor) -> None:
        """A layer's input and the gradient of its output, (1, tokens, features)."""
        row, self._is_back = self._rows[target][-1], True
        row.x.append(x[0])
        row.gradient.append(gradient[0])

    @torch.no_grad()
    def finish(self) -> None:
        """With the block whose rows are kept, which then are dropped."""
        for target in list(self._rows):
            scores, found = self.choose(target, [row for row in self._rows.pop(target) if row.x])
            if (~scores.isfinite()).any():
                raise NotFinite(target)
            self.index[target].copy_(found)

    def choose(self, target: str, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """The places of a layer's weights, flat and rising, by what it was given, and their scores."""
        given = [(joined(row.x), joined(row.gradient)) for row in rows]
        linear, count = self.model.linears[target], len(self.index[target])
        return _largest(linear, count, partial(_squares, given), self.model.device)


class Row:
    """What a layer was given in a chunk of the batch's rows: once, or as often as a block calls it."""

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self.x: list[Tensor] = []  # (tokens, in_features)
        self.gradient: list[Tensor] = []  # (tokens, out_features)


class _Probe(LinearDelta):
    """Adds a zero, and shows what the weight's gradient is made of."""

    def __init__(self, target: str, sensitivity: Sensitivity) -> None:
        self.target, self.sensitivity = target, sensitivity

    def apply(self, x: Tensor, y: Tensor | None, state: BranchState) -> Tensor:
        assert y is not None
        if not torch.is_grad_enabled():
            return y
        name, given = self.target + PROBE, x.detach()
        self.sensitivity.enter(self.target)
        out = y.add_(self.sensitivity.probes[name])
        out.register_hook(partial(self.sensitivity.take, self.target, given))
        out.register_hook(partial(state.reached, name, given))
        return out


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Of the same number of columns, as one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def score_tiles(linear: BranchLinear, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Room for the scores of some rows of a matrix, (rows, in_features) float32, and the first of them."""
    rows, columns = linear.weight.shape
    height = max(64, SCORE_BYTES[like(device)] // (4 * columns) // 64 * 64)
    for first in range(0, rows, height):
        yield first, torch.empty(min(height, rows - first), columns, device=device)


def _largest(
    linear: BranchLinear, count: int, score: Callable[[Tensor, int], object], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The `count` largest scores of a matrix, and their places in it, flat, int64 and rising.

    score: fills a tile, (rows, in_features) float32, that begins at a row.
    """
    columns = linear.weight.shape[1]
    best, index = torch.empty(0, device=device), torch.empty(0, dtype=torch.int64, device=device)
    for first, tile in score_tiles(linear, device):
        score(tile, first)
        own, places = tile.view(-1).topk(min(count, tile.numel()), sorted=False)
        best, index = torch.cat([best, own]), torch.cat([index, places + first * columns])
        best, chosen = best.topk(min(count, len(best)), sorted=False)
        index = index[chosen]
        if device.type == "meta":  # the other tiles take no more memory than this one
            return torch.empty(count, device=device), torch.empty(count, dtype=torch.int64, device=device)
    index, order = index.sort()
    return best[order], index


def _squares(rows: Sequence[tuple[Tensor, Tensor]], tile: Tensor, first: int) -> None:
    """The sum of (dy' x)^2 over rows of (x, dy), (tokens, features) each."""
    tile.zero_()
    product = torch.empty_like(tile)
    for x, gradient in rows:
        torch.mm(gradient[:, first : first + len(tile)].t(), x, out=product)
        tile.addcmul_(product, product)


def sizes(weight: PackedWeight, tile: Tensor, first: int) -> None:
    """|w| of some rows, into `tile`."""
    weight.values(tile, first).abs_()


def _check_places(path: Path, linear: str, saved: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
    """UserError unless a layer's places rise, are inside its weight and have a value each."""
    index, size = saved[linear + INDEX], shape[0] * shape[1]
    wide = index.long()
    if index.ndim != 1 or index.is_floating_point() or not bool((wide.diff() > 0).all()):
        raise UserError(f"{path}: {linear}{INDEX}: allowed are places that rise, as whole numbers")
    if len(wide) and (int(wide[0]) < 0 or int(wide[-1]) >= size):
        raise UserError(f"{path}: {linear}{INDEX}: has places beyond the {size} of the model's weight")
    if saved[linear + VALUES].shape != index.shape:
        got = tuple(saved[linear + VALUES].shape)
        raise UserError(f"{path}: {linear}{VALUES} has shape {got}, there are {len(index)} places")
