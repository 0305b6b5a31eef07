"""Array operations of a step that numpy and torch name differently.

Formulas are written once, over `Arrays.xp` (the library's namespace: what `numpy` and `torch` both have under
one name with one meaning) and the methods here. `NumpyArrays` is what runs beside onnxruntime; `TorchArrays`
is in `tensors.py`, so that nothing here needs torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

#: A tensor of torch or an array of numpy: of whichever library the run computes with.
Array = Any
Shape = Sequence[int]


class Arrays(ABC):
    """One array library, and the device that parameters are on."""

    xp: Any  # torch or numpy
    name: str  # of the library, and the kind of device: results of one name are bitwise the same

    @abstractmethod
    def from_numpy(self, value: np.ndarray) -> Array:
        """The same memory as an array of this library, on the host."""

    @abstractmethod
    def on_device(self, value: Array) -> Array:
        """`value` where the parameters are."""

    @abstractmethod
    def copied(self, value: Array) -> Array:
        """A contiguous copy on the host, from an array of this library or of numpy."""

    @abstractmethod
    def wide(self, value: Array, like: Array | None = None) -> Array:
        """A float64 copy, where `like` is; without it, on the host."""

    @abstractmethod
    def zeros(self, count: int, like: Array) -> Array:
        """(count,) float64 zeros, made where `like` is."""

    def together(self, values: Sequence[Array], like: Array) -> list[Array]:
        """The values, of one dtype, where `like` is; what is not there is brought in one copy."""
        return list(values)

    def home(self, values: Sequence[Array]) -> list[Array]:
        """The values, of one dtype, on the host; what is not there comes in one copy."""
        return [self.on_host(value) for value in values]

    @abstractmethod
    def narrow(self, value: Array) -> Array:
        """`value` in float32."""

    @abstractmethod
    def on_host(self, value: Array) -> Array:
        """`value` on the host."""

    @abstractmethod
    def rsqrt(self, value: Array) -> Array:
        """1 / sqrt(value)."""

    @abstractmethod
    def repeat(self, value: Array, times: int) -> Array:
        """Every entry of a vector, `times` times in a row."""

    @abstractmethod
    def row_squares(self, rows: Array) -> Array:
        """The squared length of every row of a (rows, columns) float32 matrix, (rows,) float64."""

    @abstractmethod
    def add_by_group(self, values: Array, first_row: int, bundle: int, sums: Array) -> None:
        """Add rows' values to the sums of their groups of `bundle` rows, in place, always in one order."""

    @abstractmethod
    def take(self, values: Array, index: Array) -> Array:
        """The columns of (rows, n) values: (rows, len(index))."""

    @abstractmethod
    def rows(self, values: Array, index: Array) -> Array:
        """The entries `index`, (n,) on the host, along the first axis; perhaps a view."""

    @abstractmethod
    def picked(self, values: Array, index: Array) -> Array:
        """Of (rows, n, last) values one entry of the last axis each; index: (n,). Gives (rows, n)."""

    @abstractmethod
    def log_softmax(self, values: Array) -> Array:
        """log softmax over the last axis."""

    def last_sums(self, values: Array) -> Array:
        """The sums over the last axis."""
        return values.sum(-1)

    @abstractmethod
    def group_sums(self, values: Array, group: Array, zeros: Array) -> Array:
        """Sums over columns of one group, in order. values: (rows, n); group: (n,); zeros: (rows, groups)."""

    @abstractmethod
    def group_peaks(self, values: Array, group: Array, least: Array) -> Array:
        """The largest of the columns of one group. values: (rows, n); group: (n,); least: (rows, groups)."""

    def excess(self, z: Array, rows: Array, columns: Array) -> tuple[Array, Array]:
        """Of |z^2 - 1|: the sums over each row, weighted by `columns`, and over each column, by `rows`.

        z: (rows, columns) float32; rows, columns: float64 vectors. Gives (rows,) and (columns,) float64.
        """
        sample = self.absolute_excess(z)
        return sample @ columns, sample.T @ rows

    def absolute_excess(self, z: Array) -> Array:
        """|z^2 - 1| in float64."""
        sample = self.wide(z, like=z)
        sample *= sample
        sample -= 1.0
        return abs(sample)

    def directions(self, scale: Callable[[str], Array], z: Mapping[str, Array]) -> dict[str, Array]:
        """scale(name) * z of every name, where the parameters are; float32, z on the host.

        They may be used until the next call.
        """
        return {name: self.on_device(scale(name) * value) for name, value in z.items()}

    def add_all(self, values: Sequence[Array], directions: Sequence[Array], factor: float) -> None:
        """value += factor * direction of each, in place."""
        for value, direction in zip(values, directions, strict=True):
            self.add_scaled(value, direction, factor)

    @abstractmethod
    def add_scaled(self, value: Array, direction: Array, factor: float) -> None:
        """value += factor * direction, in place."""

    @abstractmethod
    def without_gradients(self) -> AbstractContextManager[Any]:
        """A context in which nothing is recorded for a backward pass."""


class NumpyArrays(Arrays):
    """numpy, on the host."""

    xp, name = np, "numpy"

    def from_numpy(self, value: np.ndarray) -> Array:
        return value

    def on_device(self, value: Array) -> Array:
        return value

    def copied(self, value: Array) -> Array:
        return np.array(value, order="C")

    def wide(self, value: Array, like: Array | None = None) -> Array:
        return np.array(value, dtype=np.float64)

    def zeros(self, count: int, like: Array) -> Array:
        return np.zeros(count)

    def narrow(self, value: Array) -> Array:
        return np.asarray(value, dtype=np.float32)

    def on_host(self, value: Array) -> Array:
        return value

    def rsqrt(self, value: Array) -> Array:
        return 1 / np.sqrt(value)

    def repeat(self, value: Array, times: int) -> Array:
        return np.repeat(value, times)

    def row_squares(self, rows: Array) -> Array:
        return np.square(rows, dtype=np.float64).sum(axis=1)

    def add_by_group(self, values: Array, first_row: int, bundle: int, sums: Array) -> None:
        np.add.at(sums, np.arange(first_row, first_row + len(values)) // bundle, values)

    def take(self, values: Array, index: Array) -> Array:
        return values[:, index]

    def rows(self, values: Array, index: Array) -> Array:
        return values[index]

    def picked(self, values: Array, index: Array) -> Array:
        return values[:, np.arange(len(index)), index]

    def log_softmax(self, values: Array) -> Array:
        shifted = values - values.max(axis=-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

    def group_sums(self, values: Array, group: Array, zeros: Array) -> Array:
        """See `Arrays.group_sums`; into `zeros`."""
        np.add.at(zeros.T, group, values.T)
        return zeros

    def group_peaks(self, values: Array, group: Array, least: Array) -> Array:
        """See `Arrays.group_peaks`; into `least`."""
        np.maximum.at(least.T, group, values.T)
        return least

    def add_scaled(self, value: Array, direction: Array, factor: float) -> None:
        value += np.float32(factor) * direction

    def without_gradients(self) -> AbstractContextManager[Any]:
        """Nothing to switch off."""
        return nullcontext()
