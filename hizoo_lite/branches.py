"""The parameter points that one traversal evaluates, and what the layers share about those now in flight."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hizoo_lite.arrays import Shape

if TYPE_CHECKING:
    from torch import Tensor


class Point(NamedTuple):
    """The parameters theta + offset * mu * d.

    Attributes:
        direction: number of the direction d, from 0.
        offset: in units of mu, positive or negative; 0 is theta itself.
    """

    direction: int
    offset: float


@dataclass(frozen=True)
class Branches:
    """The parameter points that one traversal evaluates, in the order of the folded batch axis.

    The order is: theta itself (offset 0), if at all; then pairs, two points with opposite offsets along one
    direction; then one-sided points, which are compared with theta. A step evaluates what its estimator's
    `points` say, an evaluation theta alone. Directions are numbered from 0.

    Attributes:
        points: in that order.
        base: whether the first point is theta itself.
        pairs: how many pairs there are.
        one_sided: how many one-sided points there are.
        directions: how many directions the points lie along; none in an evaluation.

    Example:
        >>> Branches.of(base=True, pairs=1).points
        (Point(direction=0, offset=0.0), Point(direction=0, offset=1.0), Point(direction=0, offset=-1.0))
        >>> Branches.of(base=True, pairs=0, one_sided=2).compared  # each point with the base
        array([[1, 0],
               [2, 0]])
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
        """Points with the offsets 0, +-1 and 1, each pair and one-sided point along its own direction.

        Args:
            base: whether theta itself is the first point.
            pairs: points at +mu d and -mu d.
            one_sided: points at +mu d alone, which need a base.
        """
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
    def compared(self) -> np.ndarray:
        """For each direction the numbers of the two branches that are compared, (directions, 2) int64.

        Its first pair; a direction without one compares its first one-sided point with the base.
        """
        first = int(self.base)
        paired = [(first + 2 * k, first + 2 * k + 1) for k in range(self.pairs)]
        found: dict[int, tuple[int, int]] = {}
        for one, other in [*paired, *((branch, 0) for branch in range(first + 2 * self.pairs, self.count))]:
            found.setdefault(self.points[one].direction, (one, other))
        pairs = [found[direction] for direction in range(self.directions)]
        return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _are_pair(*points: Point) -> bool:
    """Whether these are two points with opposite offsets along one direction."""
    return len(points) == 2 and points[0] == (points[1].direction, -points[1].offset)


#: The point of the parameters as they are.
THETA = Point(0, 0.0)


EVALUATION = Branches((THETA,))


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

    def set(
        self, branches: Branches, mu: float, directions: Mapping[str, Tensor], *, writes: bool = False
    ) -> None:
        """Begin a pass.

        Args:
            branches: the parameter points of the pass.
            mu: perturbation scale.
            directions: d = Sigma^(1/2) z by parameter name, (directions, *shape) float32.
            writes: every branch goes on with tokens of its own, so that their inputs are no neighbours.
        """
        self.branches, self.mu, self.directions, self._writes = branches, mu, directions, writes
        self._first_input: weakref.ref[Tensor] | None = None
        self.reaches: dict[str, tuple[Tensor, Tensor]] = {}
        self._rows: tuple[int, int | None] | None = None
        self._kept: Tensor | None = None
        self._mask: Tensor | None = None
        self._ids: tuple[Tensor, Tensor, int] | None = None
        self._found: dict[tuple[int, int], Tensor] = {}
        self._values: dict[str, Tensor] | None = None

    def spread(self, branches: Branches) -> float:
        """How far apart a layer's inputs of these `branches` are, for `basis.gains`; 0: no neighbours."""
        return 0.0 if self._writes else self.mu * branches.reach

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """While this is open, a block's chunks have in common what `once` gives."""
        self._values = {}
        try:
            yield
        finally:
            self._values = None

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, or gave under the same `name` before in this block; nobody may write to it."""
        if self._values is None:
            return make()
        if name not in self._values:
            self._values[name] = make()
        return self._values[name]

    @contextmanager
    def one_branch(self) -> Iterator[None]:
        """While this is open, layers are given one branch in place of all, which are alike."""
        before, self.branches = self.branches, EVALUATION
        try:
            yield
        finally:
            self.branches = before

    @contextmanager
    def laid_out(self, rows: int, length: int | None, kept: Tensor | None = None) -> Iterator[None]:
        """While this is open, layers are given folded sequences, branch after branch.

        Args:
            rows: sequences, of all branches together.
            length: tokens of each; None if they differ.
            kept: the tokens of one branch that exist, as `kept` gives them; None: all.
        """
        before = self._rows, self._kept
        self._rows, self._kept = (rows, length), kept
        try:
            yield
        finally:
            self._rows, self._kept = before

    def pad(self, mask: Tensor) -> None:
        """Say for the rest of this pass which tokens exist: `mask`, (rows, length), on the host."""
        self._mask, self._found = mask.bool(), {}

    def sent(self, ids: Tensor, folded: Tensor) -> None:
        """Say for the rest of this pass which tokens on the device are a copy of which on the host.

        Args:
            ids: (rows, length) int64 on the host.
            folded: the same on the device, repeated for each branch, (branches * rows, length) int64.
        """
        self._ids = ids, folded, folded._version

    def on_host(self, folded: Tensor) -> Tensor | None:
        """`ids` of `sent`, if `folded` is what was sent, or all of it by another name; else None."""
        if self._ids is None:
            return None
        ids, known, version = self._ids
        same = known.shape == folded.shape and known.data_ptr() == folded.data_ptr()
        return ids if same and known.dtype == folded.dtype and folded._version == version else None

    def kept(self, hidden: Tensor, rows: slice) -> Tensor | None:
        """Which tokens exist, so that padding need not be computed.

        Args:
            hidden: hidden states of the whole batch, (branches * rows, length, ...).
            rows: the rows of the batch that are asked about.

        Returns:
            Indices into those rows' tokens, (tokens,) int64 on the device of `hidden`. None if that is all,
            or so much that leaving out the rest costs more than it saves, or nothing (the rows of empty
            texts), which no layer need know how to treat, or if nobody has said.
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
        """Folded sequences that layers are given now; None if nobody has said."""
        return None if self._rows is None else self._rows[0]

    def is_folded(self, shape: Shape) -> bool:
        """Whether the first axis of an input of this `shape` is of the folded rows, or of their tokens."""
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

    def reached(self, name: str, x: Tensor, gradient: Tensor, *, step: float = 1.0) -> None:
        """Add to the `Losses.exact` reach of a parameter; called as a hook on the product with `x`.

        Args:
            name: of the parameter.
            x: what it is multiplied with, (..., in_features).
            gradient: of the loss by the product, (..., out_features); inputs without one do not count.
            step: how far the product may move in a step, in nats.
        """
        counts = (gradient != 0).any(-1)
        total, inputs = (x.abs().sum(-1) * counts).double().sum() / step, counts.double().sum()
        if name in self.reaches:  # of another chunk, or another point that stands for theta
            total, inputs = total + self.reaches[name][0], inputs + self.reaches[name][1]
        self.reaches[name] = total, inputs

    def same_in_all(self, x: Tensor) -> bool:
        """Whether `x` is known to be the same in all branches: no layer before it has made them differ."""
        return self._first_input is None or self._first_input() is x
