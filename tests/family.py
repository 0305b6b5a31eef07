"""Plain float64 references of the family, a function each, from the papers, and what holds ours to them.

References share no code with the package. `loss` is of a whole parameter vector; `z` has a row for each
direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from hizoo_lite import noise as draws
from hizoo_lite.arrays import NumpyArrays
from hizoo_lite.batch import Losses
from hizoo_lite.branches import EVALUATION, Branches, BranchState
from hizoo_lite.curvature import NoCurvature
from hizoo_lite.estimators import KerZOO
from hizoo_lite.model.scratch import Scratch
from hizoo_lite.optimizers.step_size import FixedRate, Schedule
from hizoo_lite.spaces import mazo
from hizoo_lite.spaces.lowrank import LowRankNoise
from hizoo_lite.spaces.small import BINS, SmallNoise
from hizoo_lite.spaces.sparse import SparseDelta
from hizoo_lite.spaces.subspace import SubspaceNoise
from hizoo_lite.spaces.weights import Draw, Tile, TileNoise
from hizoo_lite.train.step import Stepper

Loss = Callable[[np.ndarray], float]


def hizoo(theta: np.ndarray, loss: Loss, z: np.ndarray, mu: float, lr: float, step: int) -> np.ndarray:
    """arXiv 2402.15173, algorithm 1, with Sigma = I; several directions share a base, as in 2506.09034."""
    if len(z) == 1:
        return mezo(theta, loss, z, mu, lr, step)
    total = np.zeros_like(theta)
    for row in z:
        total += (loss(theta + mu * row) - loss(theta)) / mu * row
    return theta - lr * total


def mezo(theta: np.ndarray, loss: Loss, z: np.ndarray, mu: float, lr: float, step: int) -> np.ndarray:
    """n-SPSA of arXiv 2305.17333, definition 1 and the remark behind it."""
    total = np.zeros_like(theta)
    for row in z:
        total += (loss(theta + mu * row) - loss(theta - mu * row)) / (2 * mu) * row
    return theta - lr * total / len(z)


def kerzoo(theta: np.ndarray, loss: Loss, z: np.ndarray, mu: float, lr: float, step: int) -> np.ndarray:
    """arXiv 2505.18886: r uniform in [-1, 1], K(r) = 15/4 r (5 - 7 r^2); the radii are ours of that step."""
    total = np.zeros_like(theta)
    for row, r in zip(z, KerZOO(len(z)).radii(step), strict=True):
        rise = (loss(theta + mu * r * row) - loss(theta - mu * r * row)) / (2 * mu)
        total += rise * (15 / 4) * (5 * r - 7 * r**3) * row
    return theta - lr * total / len(z)


def fzoo(theta: np.ndarray, loss: Loss, u: np.ndarray, mu: float, lr: float, step: int) -> np.ndarray:
    """arXiv 2506.09034: l_i - l_0 over the standard deviation of l_1 .. l_n, along Rademacher directions."""
    base, others = loss(theta), [loss(theta + mu * row) for row in u]
    mean = sum(others) / len(others)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in others) / (len(others) - 1))
    total = np.zeros_like(theta)
    for row, value in zip(u, others, strict=True):
        total += (value - base) * row
    return theta - lr * total / (len(others) * deviation)


def grzo(
    theta: np.ndarray, losses: Sequence[Loss], z: np.ndarray, mu: float, lr: float, step: int
) -> np.ndarray:
    """arXiv 2606.02857, its learning rate over 2 mu. losses: of each group's examples, over all examples."""
    rises = [loss(theta + mu * row) - loss(theta - mu * row) for loss, row in zip(losses, z, strict=True)]
    mean = sum(rises) / len(rises)
    deviation = math.sqrt(sum((rise - mean) ** 2 for rise in rises) / (len(rises) - 1))
    total = np.zeros_like(theta)
    for row, rise in zip(z, rises, strict=True):
        total += rise / deviation * row
    return theta - lr * total / len(rises)


def lozo_direction(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """U V' of arXiv 2410.07698, algorithm 1, in units where its values have a variance of one. u: (m, r)."""
    out = np.zeros((len(u), len(v)))
    for row in range(len(u)):
        for column in range(len(v)):
            out[row, column] = sum(u[row] * v[column]) / math.sqrt(u.shape[1])
    return out


def lozo_m(
    n: np.ndarray, u: np.ndarray, v: np.ndarray, v_old: np.ndarray, slope: float, momentum: float
) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 2: N, which is projected on another V first, and N V' as the direction of the move."""
    if v is not v_old:
        n = n @ v_old.T @ v / len(v)
    n = momentum * n + (1 - momentum) * slope * u
    return n, lozo_direction(n, v)


def subzero_direction(u: np.ndarray, z: np.ndarray, v: np.ndarray) -> np.ndarray:
    """U Z V' of arXiv 2410.08989, algorithm 1, times sqrt(m n) / r."""
    return u @ z @ v.T * math.sqrt(len(u) * len(v)) / len(z)


def sensitive(gradients: Sequence[np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The diagonal of the empirical Fisher matrix of 2406.02913, flat, and the `count` largest's places.

    gradients: of a weight, from one part of the examples after the other.
    """
    scores = np.zeros(gradients[0].size)
    for gradient in gradients:
        scores += np.asarray(gradient, np.float64).ravel() ** 2
    return scores, np.argsort(-scores, kind="stable")[:count]


def mazo_scores(
    given: Sequence[tuple[np.ndarray, np.ndarray]], weight: np.ndarray, greedy: float, size: float
) -> np.ndarray:
    """Sum of S_t of arXiv 2502.11513, with a diagonal Hessian. given: (x, dy) of each task, (tokens, ...)."""
    rows, columns = weight.shape
    total = np.zeros((rows, columns))
    for x, gradient in given:
        g = gradient.T @ x
        h = (x**2).sum(0)
        h = h + 0.01 * h.mean()
        for row in range(rows):
            terms = (1.0, g[row] ** 2 / (2 * h)), (greedy, g[row] ** 2), (size, np.abs(weight[row]))
            for factor, values in terms:
                total[row] += factor * values / values.sum()
    return total


def largest_of_rows(scores: np.ndarray, each: int) -> np.ndarray:
    """Flat places of the `each` largest of every row, rising."""
    columns = scores.shape[1]
    chosen = [sorted(np.argsort(-row, kind="stable")[:each]) for row in scores]
    return np.concatenate([number * columns + np.array(own) for number, own in enumerate(chosen)])


def sparse_product(x: np.ndarray, values: np.ndarray, places: np.ndarray, shape: tuple[int, int]) -> Any:
    """x S', of a dense S that has `values` at flat `places`."""
    dense = np.zeros(shape[0] * shape[1])
    dense[places] = values
    return np.asarray(x, np.float64) @ dense.reshape(shape).T


# ----------------------------------------------------------------------------------- ours beside them


SEED, MU, EXAMPLES, STEPS = 3, 1e-2, 6, 5
SHAPES = {"a": (2, 3), "b": (4,)}
COUNT = 10


class Analytic:
    """What a step asks of a model, of a smooth function: losses of every example at every point."""

    def __init__(self, parameters: dict[str, np.ndarray]) -> None:
        self.parameters = parameters
        self.weights = np.random.default_rng(0).normal(size=(EXAMPLES, COUNT))

    def per_example(self, theta: np.ndarray) -> np.ndarray:
        """(examples,)."""
        return np.log1p(np.exp(self.weights @ theta)) + 0.1 * (self.weights @ theta) ** 2

    def mean(self, theta: np.ndarray, of: slice) -> float:
        """Of some examples, over all."""
        return float(self.per_example(theta)[of].sum() / EXAMPLES)

    def losses(
        self, batch: Any, branches: Branches, mu: float, directions: Mapping[str, np.ndarray]
    ) -> Losses:
        """See `BranchLosses.losses`."""
        theta = flat(self.parameters)
        points = [
            theta + offset * mu * flat({name: d[k] for name, d in directions.items()})
            for k, offset in branches.points
        ]
        per_example = np.stack([self.per_example(point)[batch.of] for point in points])
        return Losses(per_example, None, np.zeros((branches.directions, batch.examples)))


def flat(values: Mapping[str, np.ndarray]) -> np.ndarray:
    """All values in one float64 vector."""
    return np.concatenate([np.asarray(values[name], np.float64).ravel() for name in SHAPES])


def stepper(estimator: Any, lr: float) -> Stepper:
    """A step over `Analytic`; the parameters are float64."""
    draw = np.random.default_rng(1)
    parameters = {name: draw.normal(size=shape) for name, shape in SHAPES.items()}
    space: Any = SimpleNamespace(name="analytic", parameters=parameters, exact={}, frozen={}, weights=None)
    rate = FixedRate(Schedule("constant", lr))
    options: Any = {"seed": SEED, "mu": MU, "smoothing": Schedule()}
    return Stepper(Analytic(parameters), NumpyArrays(), space, estimator, NoCurvature(), rate, **options)


def noise(step: int, directions: int) -> np.ndarray:
    """z of a step as the package draws it, (directions, COUNT)."""
    drawn = {name: draws.drawn_along(SEED, step, name, shape, directions) for name, shape in SHAPES.items()}
    return np.stack([flat({name: z[k] for name, z in drawn.items()}) for k in range(directions)])


#: Of every estimator of the registry.
REFERENCES: dict[str, Callable[..., np.ndarray]] = {
    "hizoo": hizoo,
    "mezo": mezo,
    "kerzoo": kerzoo,
    "fzoo": fzoo,
    "grzo": grzo,
}


def difference(estimator: Any, lr: float = 1e-2) -> float:
    """The largest of our moves from the reference's over a few steps, relative to the step's largest move."""
    ours = stepper(estimator, lr)
    model: Any = ours.traversal
    theta, directions, groups = flat(ours.space.parameters), estimator.directions_of_step, estimator.groups
    each = EXAMPLES // groups
    parts = [slice(each * group, each * (group + 1)) for group in range(groups)]
    batches: Any = [SimpleNamespace(examples=each, attention_mask=np.ones(1), of=part) for part in parts]
    losses = [partial(model.mean, of=part) for part in parts]
    found = 0.0
    for step in range(STEPS):
        z = noise(step, directions)
        z = np.where(z < 0, -1.0, 1.0) if estimator.law == "signs" else z
        expected = (
            REFERENCES[estimator.name](theta, losses if groups > 1 else losses[0], z, MU, lr, step) - theta
        )
        ours.step(step, *batches)
        moved = flat(ours.space.parameters) - theta
        found = max(found, float(np.abs(moved - expected).max() / np.abs(expected).max()))
        theta = theta + moved
    ours.close()
    return found


# ------------------------------------------------------------------------- noise of weights in blocks

ROWS, COLUMNS, RANK, EVERY = 24, 40, 3, 4
TILES = [Tile(0, 16), Tile(16, 8)]
PART: Any = SimpleNamespace(
    name="layer.weight",
    shape=torch.Size((ROWS, COLUMNS)),
    device=torch.device("cpu"),
    rows=lambda tile: slice(tile.first, tile.first + tile.rows),
)


def filled(made: TileNoise, step: int, part: Any = PART) -> np.ndarray:
    """z of the whole weight, tile by tile."""
    parts = [
        made.fill(Draw(part, tile, SEED, step), torch.empty(tile.rows, COLUMNS)).clone() for tile in TILES
    ]
    return torch.cat(parts).double().numpy()


def rows_of(step: int) -> np.ndarray:
    """U of a step, as tiles draw it."""
    drawn = [draws.tile_normal(SEED, step, PART.name, t.first, torch.empty(t.rows, RANK)) for t in TILES]
    return torch.cat(drawn).double().numpy()


def columns_of(step: int) -> np.ndarray:
    """V of a step, (columns, r)."""
    drawn = draws.generator(SEED, "columns", step // EVERY, PART.name).standard_normal((RANK, COLUMNS), "f4")
    return drawn.T.astype(np.float64)


def low_rank_difference() -> float:
    """Of z from the reference, over two windows."""
    made, steps = LowRankNoise(RANK, EVERY, 0.0, Scratch()), range(2 * EVERY)
    return max(far(filled(made, step), lozo_direction(rows_of(step), columns_of(step))) for step in steps)


def momentum_difference() -> float:
    """Of what is moved along from the reference, over three windows."""
    made = LowRankNoise(RANK, EVERY, 0.9, Scratch())
    made.start([PART])
    kept, v_old, before, found = np.zeros((ROWS, RANK)), columns_of(0), None, 0.0
    for step, slope in enumerate([0.5, -1.0, 2.0, 0.0, 1.5, -0.5, 0.25, 1.0, -2.0, 0.125]):
        v = v_old if step % EVERY else columns_of(step)
        kept, expected = lozo_m(kept, rows_of(step), v, v_old if step else v, slope, 0.9)
        parts = []
        for tile in TILES:
            draw = Draw(PART, tile, SEED, step)
            along, amount = made.move(draw, before, slope, 1e-2, torch.empty(tile.rows, COLUMNS))
            assert amount == 1e-2
            parts.append(along.clone())
            made.moved(draw)
        found = max(found, far(torch.cat(parts).double().numpy(), expected))
        before, v_old = step, v
    return found


def subspace_difference() -> float:
    """Of z from the reference, and of U'U and V'V from the identity, over two windows."""
    made, found = SubspaceNoise(RANK, EVERY), 0.0
    u, v = (value for value in made.start([PART]))
    for step in range(2 * EVERY):
        ours = filled(made, step)
        left, right = u.double().numpy(), v.double().numpy().T
        z = draws.drawn(SEED, step, PART.name, (RANK, RANK)).astype(np.float64)
        found = max(found, far(ours, subzero_direction(left, z, right)))
        for basis in (left, right):
            found = max(found, float(np.abs(basis.T @ basis - np.eye(RANK)).max()))
    return found


class Stored:
    """What a part has of a weight: its values."""

    def __init__(self) -> None:
        self.matrix = torch.from_numpy(np.random.default_rng(2).normal(size=(ROWS, COLUMNS))).float()

    def values(self, out: torch.Tensor, first: int) -> torch.Tensor:
        """Rows from `first` on, into `out`."""
        return out.copy_(self.matrix[first : first + len(out)])


def small_difference(share: float = 0.3) -> float:
    """Of z from the reference; which weights are small differs where sizes are within a bin of each other."""
    made, part = SmallNoise(share, Scratch()), SimpleNamespace(**vars(PART), tiles=TILES)
    part.linear = SimpleNamespace(weight=Stored())
    made.start([part])
    sizes, found = np.abs(part.linear.weight.matrix.double().numpy()), 0.0
    limit = sorted(sizes.ravel())[math.ceil(share * sizes.size) - 1]
    unclear = np.abs(sizes - limit) <= sizes.max() / BINS
    assert unclear.sum() < 4
    for step in range(2):
        whole = [torch.empty(tile.rows, COLUMNS) for tile in TILES]
        drawn = [
            TileNoise().fill(Draw(part, t, SEED, step), out) for t, out in zip(TILES, whole, strict=True)
        ]
        z = torch.cat(drawn).double().numpy()
        expected = np.where(sizes <= limit, z, 0.0)
        ours = filled(made, step, part)
        found = max(found, far(np.where(unclear, expected, ours), expected))
    return found


def mazo_difference(greedy: float = 0.5, size: float = 2.0, each: int = 3) -> float:
    """Of scores of two tasks, and infinite if other places are chosen."""
    draw = np.random.default_rng(3)
    given = [(draw.normal(size=(n, COLUMNS)), draw.normal(size=(n, ROWS))) for n in (20, 11)]
    linear: Any = SimpleNamespace(weight=Stored())
    linear.weight.shape = (ROWS, COLUMNS)
    tensors = [(_float(x), _float(gradient)) for x, gradient in given]
    expected = mazo_scores(given, linear.weight.matrix.double().numpy(), greedy, size)
    ours = torch.empty(ROWS, COLUMNS)
    mazo.scores(linear, tensors, greedy, size, ours, 0)
    fill = partial(mazo.scores, linear, tensors, greedy, size)
    places = mazo.largest_of_rows(linear, each * ROWS, fill, torch.device("cpu"))[1]
    same = np.array_equal(places.numpy(), largest_of_rows(expected, each))
    return far(ours.double().numpy(), expected) if same else math.inf


def product_difference(
    rows: int = ROWS, columns: int = COLUMNS, count: int = 100, branches: Branches = EVALUATION
) -> float:
    """Of the space of sparse differences: of products at every branch."""
    draw, state = np.random.default_rng(0), BranchState()
    places = np.sort(draw.permutation(rows * columns)[:count])
    values, along = (draw.normal(size=size) for size in (count, (branches.directions, count)))
    x, y = (draw.normal(size=(branches.count, 9, features)) for features in (columns, rows))
    delta = SparseDelta(_float(values), torch.tensor(places, dtype=torch.int32), (rows, columns), "layer")
    state.set(branches, MU, {"layer": _float(along)})
    ours = delta.apply(_float(x), _float(y), state).double().numpy()
    for branch, (direction, offset) in enumerate(branches.points):
        moved = values + (offset * MU * along[direction] if offset else 0.0)
        y[branch] += sparse_product(x[branch], moved, places, (rows, columns))
    return far(ours, y)


def _float(value: np.ndarray) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def far(ours: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


#: Of every space whose noise is `structured`, and their variants; and of products beside the shared one.
NOISES: dict[str, Callable[[], float]] = {
    "lowrank": low_rank_difference,
    "lowrank, momentum": momentum_difference,
    "subspace": subspace_difference,
    "small": small_difference,
    "sparse": lambda: product_difference(branches=Branches.of(True, 2)),
    "mazo": mazo_difference,
}
