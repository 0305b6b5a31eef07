"""Training weights where they are, inside the blocks: directions drawn by tile, updates that wait.

A branch uses W + k*mu*D, with k its point's offset. D is as large as the weights and is never stored: it is
drawn again, a tile of rows at a time, whenever it is needed (MeZO 2305.17333, section 2.1, by tile instead of
by tensor). The base product is that of every linear layer. The perturbation is a product of its own, because
mu*D added to a bf16 weight would be rounded away, and it is taken in the even/odd basis: with
m = (x+ + x-)/2 and o = x+ - x-, here for k = +-1,

    y+ +=  mu D x+ =  mu (D m + D o/2)        y- += -mu D x- = mu (-D m + D o/2)

so the first-order part is exactly opposite in the two branches and the rounding of D m to bf16 cancels
out of the even part, which is what curvature is made of. Sigma enters by its row factor on the output and
its column factor on the input, in float32.

The update w <- (1 - decay) w - amount * D waits until its block is next present (ZO2 2503.12668): a step
needs the losses first, and then the blocks are gone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hizoo_lite import noise
from hizoo_lite.arrays import Array
from hizoo_lite.base import Curvature, LinearDelta
from hizoo_lite.branches import BranchState
from hizoo_lite.device import like
from hizoo_lite.engine.block import each_block
from hizoo_lite.model.basis import gains
from hizoo_lite.model.linear import BranchLinear
from hizoo_lite.model.model import Model
from hizoo_lite.noise import Uniform
from hizoo_lite.quant.packed import Stored
from hizoo_lite.tensors import brought

#: Elements of a tile, by device: on a CPU it stays in the cache, on a GPU launches must not count.
TILE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 22}

#: Whatever the stored form, tiles end where a block of so many weights does.
_BLOCK = 64


class Tile(NamedTuple):
    """Rows of a weight whose noise is drawn together."""

    first: int
    rows: int


def tiles(shape: tuple[int, int], tile_rows: int, device: str) -> list[Tile]:
    """The partition of a weight into tiles: a function of its shape and of the kind of device.

    tile_rows: the weight's own, which matters only for block sizes other than 64.
    """
    rows, columns = shape
    multiple = _BLOCK
    while multiple > 1 and (multiple // 2) * columns % _BLOCK == 0:
        multiple //= 2
    multiple = max(multiple, tile_rows)  # both are powers of two
    height = max(1, TILE_ELEMENTS[like(device)] // (columns * multiple)) * multiple
    return [Tile(first, min(height, rows - first)) for first in range(0, rows, height)]


class Factors(NamedTuple):
    """Sigma^(1/2) of a parameter as `Curvature.factors` gives it, on the model's device."""

    rows: Tensor
    columns: Tensor | None


class Part(ABC):
    """What is trained of one linear layer's weight: a parameter whose rows belong to tiles of the weight."""

    def __init__(self, linear: BranchLinear, leaf: str, shape: torch.Size, device: torch.device) -> None:
        self.linear, self.name, self.shape, self.device = linear, f"{linear.name}.{leaf}", shape, device
        self.tiles = tiles(linear.weight.shape, linear.weight.tile_rows, device.type)

    @abstractmethod
    def rows(self, tile: Tile) -> slice:
        """The rows of the parameter that belong to a tile."""

    @abstractmethod
    def operand(self, z: Tensor, factors: Factors, tile: Tile) -> tuple[Tensor, Tensor]:
        """The tile of D without its column factor: a matrix in the product's dtype, a row factor in float32.

        z: the parameter's rows. The matrix is (tile.rows, in_features); the factor is () or (tile.rows,).
        """

    @abstractmethod
    def move(
        self, z: Tensor, factors: Factors, tile: Tile, amount: float, decay: float, rounding: Uniform
    ) -> None:
        """The tile's update, in place; the block is present. `z` may be overwritten.

        As a whole or not at all: memory is taken before anything is changed, and may be refused.
        """

    @abstractmethod
    def changed(self) -> list[Stored]:
        """The stored buffers that training changes."""

    def reconcile(self, saved: dict[str, Tensor], into: dict[str, Tensor], where: str) -> None:  # noqa: B027
        """Take out of both what is said in one of them only and needs no copying. `UserError` at `where`."""


class Draw(NamedTuple):
    """Which noise: that of a part's tile at a step."""

    part: Part
    tile: Tile
    seed: int
    step: int


class TileNoise:
    """z of each tile: standard normal, each value by itself. Others draw it from fewer values.

    Attributes:
        remembers: whether a move depends on those before, so that it is made of a coefficient of 0 as well.
    """

    remembers = False

    def start(self, parts: Sequence[Part]) -> list[Tensor]:
        """Lay out what is held between steps for parts that are trained, and say what that is."""
        return []

    def fill(self, draw: Draw, out: Tensor) -> Tensor:
        """Fill `out`, (rows, columns) float32 on the model's device, with the tile's z."""
        return noise.tile_normal(draw.seed, draw.step, draw.part.name, draw.tile.first, out)

    def move(
        self, draw: Draw, before: int | None, coefficient: float, lr: float, out: Tensor
    ) -> tuple[Tensor, float]:
        """What the tile moves along, in `out`, and how far, in the step that is drawn.

        before: the step of the last move. Nothing is kept of it before `moved`.
        """
        return self.fill(draw, out), lr * coefficient

    def moved(self, draw: Draw) -> None:
        """Called when the tile has moved."""

    def keep(self) -> None:
        """Called when what was moved is to last."""

    def discard(self) -> None:
        """Called when what was moved since the last `keep` is as it was before."""

    def state_dict(self) -> dict[str, Tensor]:
        """What moves depend on, on the host."""
        return {}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """The inverse of `state_dict`."""


class _Step(NamedTuple):
    """The directions of one step."""

    seed: int
    step: int
    factors: dict[str, Factors]


class _Pending(NamedTuple):
    directions: _Step
    lr: float
    decay: float
    coefficient: float
    before: int | None  # the step of the move before this one


#: In a state: the step of the last move.
_LAST = "last_step"


class Weights:
    """The parts of a model that are trained, and the update that waits for them. See `TrainedWeights`."""

    def __init__(self, model: Model, parts: Sequence[Part], noise: TileNoise | None = None) -> None:
        self.model, self.parts, self.noise = model, list(parts), noise or TileNoise()
        self.held = self.noise.start(self.parts)
        self._last: int | None = None  # the step of the last move
        self._by_block: dict[int, list[Part]] = {}
        for part in parts:
            block = model.block_of(part.linear.name)
            assert block is not None, part.name
            self._by_block.setdefault(block, []).append(part)
        self._now: _Step | None = None
        self._unseen: set[str] = set()  # parts whose z the curvature has yet to see
        self._curvature: Curvature | None = None
        self._pending: _Pending | None = None
        self._waiting: set[int] = set()  # blocks that lack the pending update
        self._moved: dict[int, int] = {}  # tiles that have it, of blocks where memory was refused

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Of every trained tensor, by name."""
        return {part.name: part.shape for part in self.parts}

    def begin(self, seed: int, step: int, curvature: Curvature, *, measured: bool) -> None:
        """See `TrainedWeights.begin`."""
        self._now = _Step(seed, step, self._factors(curvature))
        self._curvature = curvature
        self._unseen = {part.name for part in self.parts} if measured and curvature.sees else set()

    def update(self, lr: float, decay: float, coefficient: float = 1.0) -> None:
        """See `TrainedWeights.update`."""
        assert self._now is not None
        assert self._curvature is not None
        self.flush()
        if lr * coefficient == 0.0 and decay == 0.0 and not (lr and self.noise.remembers):
            return
        directions = self._now
        if self._curvature.updates_with_new_scale:
            directions = directions._replace(factors=self._factors(self._curvature))
        self._pending = _Pending(directions, lr, decay, coefficient, self._last)
        self._last, self._waiting, self._moved = directions.step, set(self._by_block), {}

    def see(self) -> None:
        """See `TrainedWeights.see`."""
        for part in self.parts:
            if part.name in self._unseen:
                for tile in part.tiles:
                    self.direction(part, tile)

    def apply(self, block: int) -> bool:
        """Apply what waits for block `block`, which is present; whether its stored buffers changed."""
        if block not in self._waiting:
            return False
        try:
            self._move(block)
        except BaseException:  # the pass may be repeated: no tile may be moved twice
            if self.model.residency.discard(block):
                del self._moved[block]
                self.noise.discard()
            else:
                self.noise.keep()
            raise
        self.noise.keep()
        self._waiting.remove(block)
        return True

    def _move(self, block: int) -> None:
        assert self._pending is not None
        (seed, step, factors), lr, decay, coefficient, before = self._pending
        moved = self._moved.setdefault(block, 0)
        every = [(part, tile) for part in self._by_block[block] for tile in part.tiles]
        for part, tile in every[moved:]:
            rounding = noise.tile_rounding(seed, step, part.name, tile.first, self.model.device)
            draw, out = Draw(part, tile, seed, step), self._room(part, tile)
            along, amount = self.noise.move(draw, before, coefficient, lr, out)
            part.move(along, factors[part.name], tile, amount, decay, rounding)
            self.noise.moved(draw)
            self._moved[block] += 1

    def flush(self) -> None:
        """Bring in every block that an update waits for."""
        if self._waiting:
            for _ in each_block(self.model):
                pass

    def drop(self) -> None:
        """Forget what waits."""
        self._waiting.clear()
        self._moved.clear()

    def direction(self, part: Part, tile: Tile) -> tuple[Tensor, Factors]:
        """z of a tile in this step, float32, until the next one is drawn, and Sigma^(1/2)."""
        assert self._now is not None
        draw = Draw(part, tile, self._now.seed, self._now.step)
        z = self.noise.fill(draw, self._room(part, tile))
        if part.name in self._unseen:
            assert self._curvature is not None
            self._curvature.see(part.name, z, part.rows(tile).start)
            if tile == part.tiles[-1]:  # a block may take a batch in chunks, each of which draws z again
                self._unseen.remove(part.name)
        return z, self._now.factors[part.name]

    def _room(self, part: Part, tile: Tile) -> Tensor:
        rows = part.rows(tile)
        shape = (rows.stop - rows.start, *part.shape[1:])
        return self.model.scratch.take("weights.z", shape, torch.float32, self.model.device)

    def state_dict(self) -> dict[str, Array]:
        """See `TrainedWeights.state_dict`."""
        state = self.noise.state_dict()
        return {**state, _LAST: torch.tensor([self._last])} if state and self._last is not None else {}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """See `TrainedWeights.load_state_dict`."""
        self._last = int(state[_LAST][0]) if state else None
        self.noise.load_state_dict({name: value for name, value in state.items() if name != _LAST})

    def _factors(self, curvature: Curvature) -> dict[str, Factors]:
        here = [curvature.factors(part.name) for part in self.parts]
        flat = [factor for pair in here for factor in pair if factor is not None]
        there = iter(brought(flat, self.model.device))
        return {
            part.name: Factors(next(there), None if columns is None else next(there))
            for part, (_, columns) in zip(self.parts, here, strict=True)
        }


class WeightDelta(LinearDelta):
    """Adds every branch's own k*mu*D x to a linear layer, tile by tile."""

    def __init__(self, part: Part, weights: Weights) -> None:
        self.part, self.weights = part, weights

    def apply(self, x: Tensor, y: Tensor | None, state: BranchState) -> Tensor:
        assert y is not None
        linear, scratch, branches = self.part.linear, self.weights.model.scratch, state.branches
        pairs = branches.pairs
        if pairs == 0:
            return y
        assert branches.one_sided == 0  # the step refuses them
        compute, first, tokens = linear.compute, int(branches.base), x.shape[1]
        steps = [state.mu * point.offset for point in branches.points[first::2]]
        gain = gains(compute, state.spread(branches)).odd
        operands = None
        for tile in self.part.tiles:
            z, factors = self.weights.direction(self.part, tile)
            if operands is None:
                shape = (pairs, 2, tokens, linear.in_features)
                operands = scratch.take("weights.operands", shape, compute, x.device)
                _split(x[first:], operands, factors.columns, gain)
            matrix, scale = self.part.operand(z, factors, tile)
            rows = operands.view(-1, linear.in_features)
            product = scratch.take("weights.product", (len(rows), tile.rows), compute, x.device)
            torch.mm(rows, matrix.t(), out=product)
            columns = y[first:, :, tile.first : tile.first + tile.rows]
            _add(product.view(pairs, 2, tokens, tile.rows), columns, [scale * step for step in steps], gain)
        return y


def _split(x: Tensor, out: Tensor, columns: Tensor | None, gain: float) -> None:
    """Write m and gain * o of every pair. x: (2 * pairs, tokens, in) float32; out: (pairs, 2, tokens, in)."""
    for pair, (middle, odd) in enumerate(out):
        plus, minus = x[2 * pair], x[2 * pair + 1]
        mean, difference = torch.add(plus, minus).mul_(0.5), torch.sub(plus, minus)
        if columns is not None:
            mean, difference = mean.mul_(columns), difference.mul_(columns)
        middle.copy_(mean)
        odd.copy_(difference if gain == 1.0 else difference.mul_(gain))


def _add(product: Tensor, y: Tensor, scales: Sequence[Tensor], gain: float) -> None:
    """Add to both branches of every pair, which has its scale.

    product: (pairs, 2, tokens, rows); y: (2 * pairs, tokens, rows).
    """
    for pair, ((middle, odd), scale) in enumerate(zip(product, scales, strict=True)):
        half = odd.float().mul_(0.5 / gain)
        y[2 * pair].addcmul_(half + middle, scale)
        y[2 * pair + 1].addcmul_(half.sub_(middle), scale)
