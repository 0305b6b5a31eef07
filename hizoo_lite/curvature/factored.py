"""HiZOO-L: row and column factors of Sigma^-1 in place of the full diagonal (arXiv 2402.15173, HiZOO-L).

No code was published for it; the factors follow Adafactor (arXiv 1804.04235, algorithm 4). A matrix keeps
the means of its rows r (rows,) and of its columns k (columns,) of Sigma^-1, and

    Sigma^-1[i, j] = r[i] k[j] / mean(r)

which is exact for a rank-one matrix and keeps the row and column means of any other. Both means are
smoothed over |H'| = |c|/2 * Sigma^-1 |z^2 - 1|, the formula of HiZOO's algorithm 1; the sums are taken while
z is drawn. Tensors that are not matrices keep the full diagonal. Memory: 4 (rows + columns) bytes instead
of 4 rows * columns.

r / mean(r) and k each stay in [floor, ceiling]. The bounds are on the factors and not on Sigma^-1, so that
Sigma is exactly a product and a weight needs no tensor of its own size to be perturbed. As in `diagonal` the
update uses the Sigma that perturbed.
"""

from __future__ import annotations

from collections.abc import Mapping

from hizoo_lite.arrays import Array, Arrays, Shape
from hizoo_lite.base import Curvature
from hizoo_lite.curvature.state import check_smoothing, check_state, is_usable
from hizoo_lite.errors import UserError

#: (row means, column means) of a matrix, or (all values,) of any other tensor; float32.
Factors = tuple[Array, ...]


class Factored(Curvature):
    """HiZOO-L: Sigma^-1 of a matrix from the means r of its rows and k of its columns (arXiv 2402.15173).

    Sigma^-1[i, j] = r[i] k[j] / mean(r), as in Adafactor (arXiv 1804.04235, algorithm 4); r and k are running
    means of |c|/2 Sigma^-1 |z^2 - 1| over rows and columns. Tensors that are no matrices keep a full
    diagonal. No code was published; the bounds, and the update with the Sigma that perturbed, are ours.
    State: 4 (rows + columns) bytes a matrix.
    """

    name = "factored"

    def __init__(self, floor: float = 1e-3, ceiling: float = 1e8) -> None:
        """Check the arguments: 0 < floor <= 1 <= ceiling.

        Args:
            floor: the least that a factor of Sigma^-1 becomes; they start at 1.
            ceiling: the most.

        Raises:
            UserError: if an argument is out of range.
        """
        if not 0.0 < floor <= 1.0 <= ceiling < float("inf"):
            raise UserError(
                "curvature factored: 0 < floor <= 1 <= ceiling wanted, "
                f"got floor={floor!r}, ceiling={ceiling!r}"
            )
        self.floor = floor
        self.ceiling = ceiling
        self._factors: dict[str, Factors] = {}
        self._drawn: dict[str, Factors] = {}
        self._seen: dict[str, tuple[Factors, Factors]] = {}  # factors, and sums of |H'| / c; float64
        self._sent: dict[str, dict[str, Factors]] = {}  # this step's factors of Sigma^-1, by place and name

    def start(self, shapes: Mapping[str, Shape], arrays: Arrays) -> None:
        """Sigma = I."""
        self._arrays = arrays
        self._factors = {name: self._ones(tuple(shape)) for name, shape in shapes.items()}
        self._drawn, self._seen, self._sent = {}, {}, {}

    def step_bytes(self, shapes: Mapping[str, Shape]) -> int:
        """Factors, and sums over rows and columns, in float64."""
        return 24 * sum(sum(shape) for shape in shapes.values())

    def scale(self, name: str) -> Array:
        """Sigma^(1/2), float32 of the shape of parameter `name`."""
        rows, columns = self.factors(name)
        return rows if columns is None else rows * columns

    def factors(self, name: str) -> tuple[Array, Array | None]:
        """The roots of (rows, 1) and (1, columns) of a matrix; of any other tensor the whole of it."""
        if self._drawn.get(name) is not self._factors[name]:
            self._drawn[name], self._sent = self._factors[name], {}
        return self._roots(self._drawn[name])

    def update_scale(self, name: str) -> Array:
        """What `scale` last returned for `name`."""
        rows, columns = self._roots(self._drawn.get(name, self._factors[name]))
        return rows if columns is None else rows * columns

    def see(self, name: str, z: Array, first_row: int = 0) -> None:
        """Add the rows to the sums over rows and columns."""
        if first_row == 0:
            wide = tuple(self._arrays.wide(factor, like=z) for factor in self._inverses(z)[name])
            self._seen[name] = wide, tuple(self._arrays.xp.zeros_like(factor) for factor in wide)
        factors, sums = self._seen[name]
        own = slice(first_row, first_row + z.shape[0]) if z.ndim > 0 else ...
        if len(factors) == 1:
            sums[0][own] = self._arrays.absolute_excess(z) * factors[0][own]
            return
        rows, columns = factors
        over_columns, over_rows = self._arrays.excess(z, rows[own], columns)
        sums[0][own] = over_columns * rows[own]
        sums[1][...] += over_rows * columns

    def observe(self, curvature: float, smoothing: float) -> None:
        """Take in c = d' H d; an unusable c is ignored, a smoothing outside (0, 1] is a `UserError`."""
        weight = check_smoothing(smoothing)
        seen, self._seen, self._sent = self._seen, {}, {}
        if not is_usable(curvature):
            return
        home = iter(self._arrays.home([total for _, sums in seen.values() for total in sums]))
        for name in seen:
            old = self._factors[name]
            others = (len(old[1]), len(old[0])) if len(old) == 2 else (1,)
            self._factors[name] = tuple(
                self._bounded(
                    (1.0 - weight) * self._arrays.wide(before)
                    + (weight * abs(curvature) / 2.0 / count) * next(home)
                )
                for before, count in zip(old, others, strict=True)
            )

    def state_dict(self) -> dict[str, Array]:
        """Factors as `name/0` (row means, or all values) and `name/1` (column means)."""
        return {f"{name}/{i}": f for name, factors in self._factors.items() for i, f in enumerate(factors)}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """The inverse of `state_dict`, after `start` with the same shapes."""
        loaded = check_state(state, self.state_dict(), self.name, self._arrays)
        self._factors = {
            name: tuple(loaded[f"{name}/{i}"] for i in range(len(factors)))
            for name, factors in self._factors.items()
        }
        self._drawn, self._sent = {}, {}

    def _inverses(self, z: Array) -> dict[str, Factors]:
        """By name the factors of Sigma^-1 that this step draws z with, where `z` is: sent there at once.

        Of tensors in memory and of weights inside the blocks z is in two places.
        """
        place = str(getattr(z, "device", ""))
        if place not in self._sent:
            inverse = {n: self._inverse(self._drawn.get(n, own)) for n, own in self._factors.items()}
            flat = iter(self._arrays.together([part for parts in inverse.values() for part in parts], like=z))
            self._sent[place] = {n: tuple(next(flat) for _ in parts) for n, parts in inverse.items()}
        return self._sent[place]

    def _inverse(self, factors: Factors) -> Factors:
        """The factors whose product is Sigma^-1."""
        if len(factors) == 1:
            return factors
        rows, columns = factors
        return self._bounded(rows / rows.mean()), columns

    def _roots(self, factors: Factors) -> tuple[Array, Array | None]:
        inverse = self._inverse(factors)
        roots = [self._arrays.rsqrt(factor) for factor in inverse]
        return (roots[0], None) if len(roots) == 1 else (roots[0][:, None], roots[1][None, :])

    def _bounded(self, values: Array) -> Array:
        return self._arrays.narrow(self._arrays.xp.clip(values, self.floor, self.ceiling))

    def _ones(self, shape: tuple[int, ...]) -> Factors:
        xp = self._arrays.xp
        parts = [(n,) for n in shape] if len(shape) == 2 else [shape]
        return tuple(xp.ones(part, dtype=xp.float32) for part in parts)
