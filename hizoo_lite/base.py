"""The interfaces of every axis: what a member must provide, and the values that travel between them.

Every other module imports this one; it imports none of them but `errors`, and torch not at all: what runs
beside onnxruntime, with numpy alone, shares the records and the axes that are not about modules. A step is

    Estimator.points -> Branches (folded into the batch axis) -> per-branch, per-example losses
          -> Estimator.reduce, estimate -> coefficients, curvatures -> Curvature.observe -> update

Weights that live inside the blocks are updated later, when their block is next present.

Glossary, used everywhere: `z` standard normal direction, `mu` perturbation scale, `sigma` inverse
diagonal Hessian (the preconditioner), `direction` = sigma^(1/2) * z, `branch` one of the parameter
points evaluated in a step, `block` one transformer layer, `space` what is trainable and how a branch
enters a linear layer.
"""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np

from hizoo_lite.arrays import Array, Shape
from hizoo_lite.errors import TooManyBadSteps as TooManyBadSteps
from hizoo_lite.errors import UserError as UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from hizoo_lite.arrays import Arrays


Bits = Literal["nf4", "fp4", "int8", "none"]
ModelKind = Literal["causal", "masked", "classifier"]
ComputeDtype = Literal["auto", "bf16", "fp16", "float32"]


# --------------------------------------------------------------------------------------- branches


class Point(NamedTuple):
    """The parameters theta + offset * mu * d, with d the direction of that number."""

    direction: int
    offset: float


@dataclass(frozen=True)
class Branches:
    """The parameter points that one traversal evaluates, in the order of the folded batch axis.

    The order is: theta itself (offset 0), if at all; then pairs, two points with opposite offsets along one
    direction; then one-sided points, which are compared with theta. A step evaluates what its estimator's
    `points` say, an evaluation theta alone. Directions are numbered from 0.

    Attributes:
        base: whether the first point is theta itself.
        pairs, one_sided: how many there are of each.
        directions: how many directions the points lie along; none in an evaluation.
    """

    points: tuple[Point, ...]
    base: bool = field(init=False, repr=False, compare=False)
    pairs: int = field(init=False, repr=False, compare=False)
    one_sided: int = field(init=False, repr=False, compare=False)
    directions: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError("branches: at least one point is needed, got none")
        base = self.points[0].offset == 0.0
        moved = self.points[int(base) :]
        if not all(math.isfinite(point.offset) and point.offset for point in moved):
            raise ValueError(f"branches: behind the base offsets must be finite and not 0, got {self.points}")
        pairs = 0
        while _are_pair(*moved[2 * pairs : 2 * pairs + 2]):
            pairs += 1
        one_sided, used = len(moved) - 2 * pairs, {point.direction for point in moved}
        if one_sided and not base:
            raise ValueError(f"branches: one-sided points need a base to be compared with, got {self}")
        if used != set(range(len(used))):
            raise ValueError(f"branches: directions must be numbered from 0 without gaps, got {self}")
        found = {"base": base, "pairs": pairs, "one_sided": one_sided, "directions": len(used)}
        for name, value in found.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, base: bool = True, pairs: int = 1, one_sided: int = 0) -> Branches:
        """Points with the offsets 0, +-1 and 1, each pair and one-sided point along its own direction."""
        paired = (Point(k, offset) for k in range(pairs) for offset in (1.0, -1.0))
        single = (Point(k, 1.0) for k in range(pairs, pairs + one_sided))
        return cls((*(THETA,) * base, *paired, *single))

    @property
    def count(self) -> int:
        """How many branches share the traversal."""
        return len(self.points)

    @property
    def reach(self) -> float:
        """The largest offset by size."""
        return max(abs(point.offset) for point in self.points)

    @property
    def compared(self) -> tuple[tuple[int, int], ...]:
        """Of each direction, the two branches whose losses and predictions are compared.

        Its first pair; a direction without one compares its first one-sided point with the base.
        """
        first = int(self.base)
        paired = [(first + 2 * k, first + 2 * k + 1) for k in range(self.pairs)]
        found: dict[int, tuple[int, int]] = {}
        for one, other in [*paired, *((branch, 0) for branch in range(first + 2 * self.pairs, self.count))]:
            found.setdefault(self.points[one].direction, (one, other))
        return tuple(found[direction] for direction in range(self.directions))


def _are_pair(*points: Point) -> bool:
    """Whether these are two points with opposite offsets along one direction."""
    return len(points) == 2 and points[0] == (points[1].direction, -points[1].offset)


#: The point of the parameters as they are.
THETA = Point(0, 0.0)
EVALUATION = Branches((THETA,))


class Estimate(NamedTuple):
    """What an estimator makes of the losses of one step.

    Attributes:
        coefficients: the gradient is estimated as the sum of coefficient * d over the directions. HiZOO and
            MeZO have the slope of the loss along each.
        curvatures: d' G d or d' H d along each, see `estimators/hizoo.py`; None if it was not measured.
    """

    coefficients: tuple[float, ...]
    curvatures: tuple[float, ...] | None

    @property
    def projected_grad(self) -> float:
        """The coefficient; of several the root of their mean square, since their signs say nothing."""
        return one_size(self.coefficients)

    @property
    def curvature(self) -> float | None:
        """The mean over the directions."""
        return mean_or_none(self.curvatures)


def one_size(coefficients: Sequence[float]) -> float:
    """A coefficient as it is; of several the root of their mean square."""
    if len(coefficients) == 1:
        return coefficients[0]
    return math.sqrt(sum(c * c for c in coefficients) / len(coefficients))


def mean_or_none(values: Sequence[float] | None) -> float | None:
    """Their mean; None of None."""
    return None if values is None else sum(values) / len(values)


class Estimator(ABC):
    """Which points a step evaluates, and from what they gave to an `Estimate`.

    Attributes:
        measures_curvature: whether `estimate` gives curvatures, in some steps at least.
    """

    name: str
    measures_curvature: ClassVar[bool] = False

    @staticmethod
    def left_open(config: Any) -> dict[str, Any]:
        """Options in place of settings that a `TrainConfig` leaves open as "auto"."""
        return {}

    @staticmethod
    def conflicts(options: Mapping[str, Any], where: Callable[[str], str]) -> list[str]:
        """What is wrong with options that are fine alone; `where` names an option as the user did."""
        return []

    @abstractmethod
    def points(self, step: int) -> tuple[Point, ...]:
        """The points of step `step` (counted from 0), in the order that `Branches` asks for.

        A pure function of `step`. Every step has as many directions as step 0, and no step more points.
        """

    @property
    def predicts(self) -> bool:
        """Whether its curvature is from predictions, in place of losses."""
        return False

    def measures(self, step: int) -> bool:
        """Whether `estimate` gives a curvature at step `step`."""
        return False

    def measures_within(self, steps: int) -> bool:
        """Whether any of the first `steps` steps gives a curvature."""
        return any(self.measures(step) for step in range(steps))

    def reduce(self, step: int, losses: np.ndarray) -> np.ndarray:
        """Sums over examples, which are added over the parts of a batch and over ranks.

        A step's record holds their means. What is done to each example's own losses, such as clipping them,
        is done here.

        Args:
            losses: of each point and example, (points, examples) float64.

        Returns:
            (n,) float64, the same n in every step, at most the points of step 0; by default each point's sum.
        """
        return np.asarray(losses.sum(axis=1))

    @abstractmethod
    def estimate(self, step: int, losses: np.ndarray, divergences: np.ndarray, mu: float) -> Estimate:
        """The scalars of a step, from means over its examples.

        Args:
            losses: what `reduce` summed, by default the loss of each point, (points,) float64.
            divergences: of the predictions along each direction, (directions,) float64, see `Losses`.
            mu: perturbation scale, above 0.
        """


# -------------------------------------------------------------------------------------- curvature


class Curvature(ABC):
    """How Sigma, the inverse of a diagonal Hessian estimate, is kept. State is float32 or float64.

    `scale` gives Sigma^(1/2) for one parameter as a tensor that broadcasts to it. A step draws
    `direction = scale(name) * z(name)`, gives every tile of rows of every z to `see` as it is drawn, then
    calls `observe` with the directional curvature c, and updates along `update_scale(name) * z(name)`,
    which is the same as `direction` for everything but the published code's mode (perturbed with the
    old H, divided by the new one). A step along several directions, all drawn with the same Sigma, sees and
    observes one after the other. A step that measures no curvature needs neither call.
    """

    name: str
    #: False where `see` must be given all rows at once, in a tensor that stays as it is until `observe`.
    sees_tiles: ClassVar[bool] = True
    #: True where the update divides by the H that this step's observation made (the published code).
    updates_with_new_scale: bool = False

    @abstractmethod
    def start(self, shapes: Mapping[str, Shape], arrays: Arrays) -> None:
        """Lay out the state for the trainable tensors, by name, in arrays of that library."""

    def held_bytes(self, shapes: Mapping[str, Shape]) -> int | None:
        """Of its state for such tensors, where that is too large to be laid out to be counted; else None."""
        return None

    def step_bytes(self, shapes: Mapping[str, Shape]) -> int:
        """What it holds beside its state within a step, of weights inside the blocks."""
        return 0

    @abstractmethod
    def scale(self, name: str) -> Array:
        """Sigma^(1/2), broadcastable to parameter `name`, float32, on CPU."""

    def factors(self, name: str) -> tuple[Array, Array | None]:
        """Sigma^(1/2) of a matrix as (row factor, column factor), whose product is `scale(name)`.

        () or (rows, 1), and (1, columns) or None for 1; of a vector () or (rows,), and None. For weights
        so large that no tensor of their shape is wanted.
        """
        return self.scale(name), None

    @abstractmethod
    def see(self, name: str, z: Array, first_row: int = 0) -> None:
        """Take in rows `first_row` .. of this step's z of parameter `name`; row 0 begins it anew."""

    @abstractmethod
    def observe(self, curvature: float, smoothing: float) -> None:
        """Take in c = d' H d of the direction d = scale * z that was seen, with smoothing in (0, 1]."""

    def update_scale(self, name: str) -> Array:
        """The factor of z in the update."""
        return self.scale(name)

    @abstractmethod
    def state_dict(self) -> dict[str, Array]:
        """Every tensor that a resumed run needs."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """The inverse of `state_dict`."""


class StepSize(Protocol):
    """The learning rate of each step: a schedule, or derived from the measured curvature."""

    def rate(self, step: int, estimate: Estimate) -> float:
        """The learning rate of step `step`, called once a step, after the losses are known."""
        ...

    def state_dict(self) -> dict[str, float]: ...

    def load_state_dict(self, state: Mapping[str, float]) -> None: ...


class Piece(NamedTuple):
    """A part of the gradient: coefficient * values[name], of each parameter that is named."""

    values: Mapping[str, Array]
    coefficient: float


class Optimizer(Protocol):
    """How an estimated gradient moves the parameters in memory."""

    name: str

    @property
    def streams(self) -> bool:
        """Whether it moves each parameter by -lr times its gradient and nothing else.

        Then it may be used where weights inside the blocks are trained, for which nothing can be kept.
        """
        ...

    def start(self, shapes: Mapping[str, Shape], arrays: Arrays) -> None:
        """Lay out the state for the parameters in memory, by name, in arrays of that library."""
        ...

    def update(
        self, parameters: Mapping[str, Array], pieces: Sequence[Piece], lr: float, decay: float
    ) -> None:
        """Move all parameters in place, called once a step. All at once, so that a GPU takes few launches.

        Args:
            parameters: float32, by name.
            pieces: the gradient is their sum; a piece is along one direction.
            lr: learning rate.
            decay: decoupled weight decay, already times lr.
        """
        ...

    def state_dict(self) -> dict[str, Array]:
        """Every tensor that a resumed run needs."""
        ...

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """The inverse of `state_dict`."""
        ...


# ------------------------------------------------------------------------------ weights and spaces


class Stored(NamedTuple):
    """One buffer of a weight whose bytes travel when its block is streamed."""

    owner: nn.Module  # whose buffer it is
    name: str  # of the buffer
    key: str | None  # behind the layer's name in a checkpoint, such as "weight.absmax"; None: zeros at first

    @property
    def tensor(self) -> Tensor:
        """The buffer as it is now; on the meta device while its block is offloaded."""
        return self.owner.get_buffer(self.name)


class Uniform(Protocol):
    """Random numbers for rounding; every call gives new ones."""

    def fill(self, out: Tensor) -> Tensor:
        """Fill a contiguous float32 tensor with multiples of 2^-24 in [0, 1), and give it back."""


class PackedWeight(ABC):
    """A weight matrix in its stored form; a member is an `nn.Module` too. Use never changes its buffers.

    `shape` is (out_features, in_features). The product of a linear layer is
    `x @ unpacked.T * row_scale`, where `unpacked` is what `unpack` writes. Only `store` changes a buffer.
    """

    bits: Bits
    shape: tuple[int, int]
    layer: str  # name of the layer that it is of, for messages

    @abstractmethod
    def unpack(self, out: Tensor, first_row: int = 0) -> Tensor:
        """Fill `out` with the rows from `first_row` on.

        out: (rows, in_features), contiguous, bf16, fp16 or float32.
        """

    def ready(self, dtype: torch.dtype) -> Tensor | None:
        """The stored matrix itself where it needs no unpacking for a product in `dtype`, else None."""
        return None

    @property
    def row_scale(self) -> Tensor | None:
        """A factor of every output feature, (out_features,) float32, that `unpack` leaves out; or None."""
        return None

    @property
    def tile_rows(self) -> int:
        """`store` takes rows from a multiple of this on, and as many, or all that are left."""
        return 1

    def values(self, out: Tensor, first_row: int = 0) -> Tensor:
        """Fill `out`, (rows, in_features) contiguous float32, with the true values from `first_row` on."""
        self.unpack(out, first_row)
        if self.row_scale is not None:
            out *= self.row_scale[first_row : first_row + out.shape[0], None]
        return out

    @abstractmethod
    def store(self, values: Tensor, first_row: int, rounding: Uniform) -> None:
        """Replace rows `first_row` .. by `values`, (rows, in_features) contiguous float32, in place.

        What the stored form cannot hold is rounded at random so that the expectation of what is decoded
        is `values`; `rounding` is on their device. Values that were decoded are stored as they were.
        Where memory is refused, nothing has been changed.
        """

    @abstractmethod
    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """The module's."""

    @abstractmethod
    def get_buffer(self, target: str) -> Tensor:
        """The module's."""

    def nbytes(self) -> int:
        """Bytes of the stored form."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    @abstractmethod
    def stored(self) -> list[Stored]:
        """The buffers that hold the matrix; not what is small and constant (code tables, offsets)."""


#: Share of a batch's tokens above which padding is computed like everything else.
MOST_KEPT = 7 / 8


class BranchState:
    """What the branch-aware linears of one model share: the branches now in flight and their directions.

    One instance a model, set by the traversal for the length of one pass. `directions` are
    d = Sigma^(1/2) z by parameter name, (directions, *shape) float32, on the parameter's device. Empty for
    an evaluation.
    """

    def __init__(self) -> None:
        self.set(EVALUATION, 0.0, {})

    def set(self, branches: Branches, mu: float, directions: Mapping[str, Tensor]) -> None:
        """Begin a pass."""
        self.branches, self.mu, self.directions = branches, mu, directions
        self._first_input: weakref.ref[Tensor] | None = None
        self._rows: tuple[int, int | None] | None = None
        self._kept: Tensor | None = None
        self._mask: Tensor | None = None
        self._ids: tuple[Tensor, Tensor, int] | None = None
        self._found: dict[tuple[int, int], Tensor] = {}
        self._values: dict[str, Tensor] | None = None

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """While this is open, a block's chunks have in common what `once` gives."""
        self._values = {}
        try:
            yield
        finally:
            self._values = None

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """`make()`, or what it gave of the same name before, in this block; nobody may write to it."""
        if self._values is None:
            return make()
        if name not in self._values:
            self._values[name] = make()
        return self._values[name]

    @contextmanager
    def laid_out(self, rows: int, length: int | None, kept: Tensor | None = None) -> Iterator[None]:
        """While this is open, layers are given `rows` folded sequences, branch after branch, of `length`.

        kept: the tokens of one branch that exist, as `kept` gives them; None: all.
        """
        before = self._rows, self._kept
        self._rows, self._kept = (rows, length), kept
        try:
            yield
        finally:
            self._rows, self._kept = before

    def pad(self, mask: Tensor) -> None:
        """Say for the rest of this pass which tokens of its batch exist. mask: (rows, length) on the host."""
        self._mask, self._found = mask.bool(), {}

    def sent(self, ids: Tensor, folded: Tensor) -> None:
        """Say for the rest of this pass that `folded` is `ids` on the device, once a branch; both int64.

        ids: (rows, length) on the host.
        """
        self._ids = ids, folded, folded._version

    def on_host(self, folded: Tensor) -> Tensor | None:
        """`ids` of `sent`, where `folded` is what was sent, or all of it by another name; else None."""
        if self._ids is None:
            return None
        ids, known, version = self._ids
        same = known.shape == folded.shape and known.data_ptr() == folded.data_ptr()
        return ids if same and known.dtype == folded.dtype and folded._version == version else None

    def kept(self, hidden: Tensor, rows: slice) -> Tensor | None:
        """Of these rows of the batch, whose hidden states are (branches * rows, length, ...), what exists.

        Indices into the rows' tokens, (tokens,) int64 on their device. None where that is all, or so much
        that leaving out the rest costs more than it saves, or nothing (the rows of empty texts), which no
        layer need know how to treat, or where nobody has said.
        """
        mask, count = self._mask, self.branches.count
        if mask is None or tuple(hidden.shape[:2]) != (count * mask.shape[0], mask.shape[1]):
            return None
        key = rows.start, rows.stop
        if key not in self._found:
            self._found[key] = mask[rows].flatten().nonzero().flatten().to(hidden.device, non_blocking=True)
        found, tokens = self._found[key], (rows.stop - rows.start) * mask.shape[1]
        return found if 0 < len(found) < MOST_KEPT * tokens else None

    def existing(self, x: Tensor) -> Tensor | None:
        """`kept` of what a layer's input `x`, (..., features), has a place for every token of; None: all."""
        if self._kept is None or self._rows is None:
            return None
        rows, length = self._rows
        return self._kept if length is not None and x.shape[:-1].numel() == rows * length else None

    @property
    def rows(self) -> int | None:
        """Folded sequences that layers are given now; None where nobody has said."""
        return None if self._rows is None else self._rows[0]

    def is_folded(self, shape: Shape) -> bool:
        """Whether the first axis of a layer's input is that of the folded rows, or of all their tokens."""
        if self._rows is None or self.branches.count == 1:
            return True
        rows, length = self._rows
        if len(shape) == 2 and shape[0] != rows:
            return shape[0] % rows == 0 if length is None else shape[0] == rows * length
        return shape[0] == rows

    def diverges(self, x: Tensor) -> None:
        """Say that a layer with input `x` has a part that differs between the branches."""
        if self._first_input is None:
            self._first_input = weakref.ref(x)

    def mark(self) -> weakref.ref[Tensor] | None:
        """Where branches diverge, as far as is known: for `restore`, before another part of the batch."""
        return self._first_input

    def restore(self, mark: weakref.ref[Tensor] | None) -> None:
        """Forget what was learnt since `mark`."""
        self._first_input = mark

    def same_in_all(self, x: Tensor) -> bool:
        """Whether `x` is known to be the same in all branches: no layer before it has made them differ."""
        return self._first_input is None or self._first_input() is x


class LinearDelta(ABC):
    """The trainable part of one linear layer; how each branch's own parameters enter its product."""

    #: True where the delta computes the whole product itself (no shared base product is wanted).
    replaces_base: bool = False

    @abstractmethod
    def apply(self, x: Tensor, y: Tensor | None, state: BranchState) -> Tensor:
        """Add this layer's part for every branch to `y` in place and return it.

        x: (branches, tokens, in_features) float32. y: (branches, tokens, out_features) float32, the
        shared base product; None where `replaces_base`, then the whole product is returned.
        """


class AttachedSpace(Protocol):
    """What is trainable: `parameters` in memory, and `weights` inside the blocks, which never are as a whole.

    `parameters` are float32 leaves by PEFT name; the loop updates them in place. `frozen` are tensors in
    memory that are saved and loaded with them and never move. A space without `weights` saves all of them in
    one safetensors file, under these names (with PEFT's prefix or without): a replay has no more than that.
    """

    name: str
    #: The largest projected gradient of a step, where a run says none; None is no limit.
    clip: ClassVar[float | None] = None
    parameters: dict[str, Array]
    frozen: dict[str, Array]

    @property
    def weights(self) -> TrainedWeights | None:
        """What is trained inside the blocks; None where nothing is."""
        ...

    def save(self, folder: Any) -> None:
        """Write what was trained in its exchange format (PEFT where one exists), with every update."""
        ...

    def load(self, folder: Any) -> None:
        """Read what `save` wrote, into `parameters` and the blocks."""
        ...


class Space(AttachedSpace, Protocol):
    """A space that makes its own parameters on a model. A step needs no more than an `AttachedSpace`.

    Its constructor takes `targets` and `blocks` at least. What it saves is a folder with `hizoo_space.json`,
    whose entries are the options that it is to be read with, or with an adapter of PEFT.
    """

    #: Reads a folder that it has saved, for exports that have the change in the weights; None: there is none.
    changes: ClassVar[Callable[[Any], Any] | None] = None
    #: Whether scales or codes are changed, for which scales that are stored in 8 bits must become float32.
    needs_own_scales: bool = False
    #: Full names of the linear layers that it is attached to.
    target_names: list[str]

    def attach(self, model: Any, seed: int) -> None:
        """Create the parameters and hang a `LinearDelta` on each chosen linear layer of the model."""
        ...


def trainable(space: AttachedSpace) -> dict[str, Shape]:
    """The shapes of everything that an attached space trains, by name."""
    shapes = {name: value.shape for name, value in space.parameters.items()}
    return shapes if space.weights is None else {**shapes, **space.weights.shapes}


class Observer(Protocol):
    """Is told how far a traversal has come; must be quick."""

    def reached(self, place: int | str) -> None:
        """Block `place` has run and is still present, or the "head" has its logits."""
        ...


# --------------------------------------------------------------------------------------- residency


class Residency(Protocol):
    """Where a block's weights are while it is not being computed."""

    name: str

    def acquire(self, block: int) -> None:
        """Called before block `block` runs: on return its weights are on the compute device."""
        ...

    def mark_dirty(self, block: int) -> None:
        """Called while block `block` is present and its stored buffers were changed: the change must last."""
        ...

    def discard(self, block: int) -> bool:
        """Called while block `block` is present and in part changed, which is not to last.

        Whether it will be as it was before when it is next present; False where it stays as it is.
        """
        ...

    def release(self, block: int) -> None:
        """Called when every branch has gone through block `block`."""
        ...

    def close(self) -> None:
        """End threads and close files. The blocks that are offloaded stay offloaded."""
        ...


class PendingUpdates(Protocol):
    """Updates of weights that live inside the blocks, waiting until their block is present."""

    def apply(self, block: int) -> bool:
        """Apply what waits for block `block`, which is present; whether its stored buffers changed."""
        ...


class TrainedWeights(PendingUpdates, Protocol):
    """Weights trained where they are, inside the blocks. Their z is drawn by tile, again and again."""

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Of every trained tensor, by name."""
        ...

    def begin(self, seed: int, step: int, curvature: Curvature, *, measured: bool) -> None:
        """The directions of a step; `curvature` sees z during the next traversal where c is `measured`."""
        ...

    def see(self) -> None:
        """Show `curvature` the z of this step, as a traversal does; for a step that makes none."""
        ...

    def update(self, amount: float, decay: float) -> None:
        """w <- (1 - decay) w - amount * d along the directions of this step, once a block is next present."""
        ...

    def flush(self) -> None:
        """Bring in every block that an update waits for."""
        ...


# ------------------------------------------------------------------------------------ tasks, batches


class Batch(NamedTuple):
    """Tokens of one batch and the places where a loss is read. All arrays int64, on the host.

    A task makes it of numpy arrays; `tensors.batch_tensors` makes torch's of it for a traversal.

    A *row* is one token sequence. A *site* is one (row, position) whose logits are needed. A *scored
    token* is a vocabulary entry looked up at a site. A *slot* is one candidate answer of one example:
    its score is the mean log-probability of its scored tokens. Candidates that continue the same prompt
    with one token share a row and a site; others have rows of their own.

    For a classifier the logits are one row of class scores each, sites and scored tokens are empty,
    and `gold` is the class index.
    """

    input_ids: Array  # (rows, length), right-padded
    attention_mask: Array  # (rows, length), 1 where a token is
    token_type_ids: Array | None  # (rows, length) or None
    site_row: Array  # (sites,)
    site_position: Array  # (sites,) the position whose logits predict the token
    token_site: Array  # (scored,) index into the sites
    token_id: Array  # (scored,) vocabulary index
    token_slot: Array  # (scored,) index into the slots
    slot_example: Array  # (slots,) index of the example; slots of one example are adjacent
    gold: Array  # (examples,) causal / masked: index into slots; classifier: class index
    loss: Literal["answer", "choice", "class"]
    # "answer": mean negative log-likelihood of the gold slot's tokens; "choice": cross-entropy over the
    # example's slots, each scored by its mean token log-probability (MeZO 2305.17333, which trains its
    # classification tasks so); "class": cross-entropy over the classifier's logits.

    @property
    def examples(self) -> int:
        """How many examples the batch holds."""
        return len(self.gold)


class Losses(NamedTuple):
    """What one pass returns, on the host."""

    per_example: Array  # (branches, examples) float64
    scores: Array  # causal, masked: (branches, slots) mean log-probability; classifier: class logits
    divergences: Array
    # (directions, examples) float64: KL(p || q) + KL(q || p) of the two branches that are compared along each
    # direction, of the distribution that the loss is of: "choice" over the example's slots, "class" over the
    # classes, "answer" over the vocabulary, there the mean over the gold slot's tokens.

    def mean(self) -> Array:
        """The loss of each branch, (branches,)."""
        return self.per_example.mean(1)


class BranchLosses(Protocol):
    """What takes a batch through the model for all branches: the traversal, or a graph of onnxruntime."""

    def losses(
        self,
        batch: Batch,
        branches: Branches = ...,
        mu: float = ...,
        directions: Mapping[str, Array] | None = ...,
    ) -> Losses:
        """Losses of every branch on `batch`; `directions` d by parameter name, on the device."""
        ...


class Example(NamedTuple):
    """One example as text, independent of tokenizer and kind of model."""

    fields: Mapping[str, Any]  # named texts for the prompt template, e.g. {"premise": ..., "hypothesis": ...}
    answers: Sequence[str]  # candidate answers (verbalizers); one for generation and lm tasks
    gold: int  # index into `answers`
    references: Sequence[str] = ()  # accepted free-text answers (SQuAD, DROP), else empty
    group: str = ""  # examples scored together (MultiRC question, ReCoRD query), else empty


class Metric(NamedTuple):
    """A task's score of its predictions."""

    name: str  # "accuracy", "f1", "exact_match"
    value: float  # in [0, 1]
