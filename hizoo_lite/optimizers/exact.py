"""How parameters move whose gradient is exact: Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1), scaled.

Nothing has to be tuned, because a step is measured in what it does: Adam moves no value by more than about
its rate, so that an output of the layer moves by at most rate * sum |x| with x its input. The rate is

    share of the schedule * REACH / (mean of sum |x| over this batch)

hence at most `REACH` nats of a logit a step at the start. On SmolLM2's label rows 1 is the best of 0.5 to 4
over 100 to 1000 examples and 30 to 450 steps (tools/LOG.md). There is no weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from hizoo_lite.arrays import Array, Arrays
from hizoo_lite.errors import UserError

#: Nats that an output may move by in a step at the start of the schedule.
REACH = 1.0
_BETAS, _EPSILON = (0.9, 0.999), 1e-8


class ExactAdam:
    """Adam on float32 parameters, its state where they are: 8 bytes a value."""

    def __init__(self, parameters: Mapping[str, Array], arrays: Arrays) -> None:
        """parameters: float32, moved in place by `update`, in the order of their names."""
        self._parameters, self._arrays = {name: parameters[name] for name in sorted(parameters)}, arrays
        self._sizes = [math.prod(value.shape) for value in self._parameters.values()]
        zeros = [np.zeros(tuple(value.shape), np.float32) for value in self._parameters.values()]
        self._first = [self._there(value) for value in zeros]
        self._second = [self._there(value.copy()) for value in zeros]
        self._steps = 0

    @property
    def count(self) -> int:
        """Values that `update` takes: those of every gradient, and two of its reach."""
        return sum(self._sizes) + 2 * len(self._sizes)

    @property
    def moments(self) -> list[Array]:
        """Both of every parameter, where they are."""
        return [*self._first, *self._second]

    def update(self, exact: bytes, share: float) -> None:
        """Move all parameters.

        Args:
            exact: means over the batch of what `Losses.exact` sums, `count` values, float32, little-endian.
            share: of the schedule, above 0, at most 1.
        """
        values = np.frombuffer(exact, "<f4")
        self._steps += 1
        (b1, b2), begin = _BETAS, 0
        correction = [1 - beta**self._steps for beta in _BETAS]
        for number, parameter in enumerate(self._parameters.values()):
            end = begin + self._sizes[number]
            gradient = self._there(values[begin:end].reshape(tuple(parameter.shape)).copy())
            (total, inputs), begin = map(float, values[end : end + 2]), end + 2
            reach = total / inputs if inputs else 0.0
            first, second = self._first[number], self._second[number]
            first *= b1
            first += (1 - b1) * gradient
            second *= b2
            second += (1 - b2) * gradient * gradient
            if reach > 0:
                rate = share * REACH / reach / correction[0]
                parameter -= rate * first / ((second / correction[1]) ** 0.5 + _EPSILON * max(reach, 1.0))

    def state_dict(self) -> dict[str, Array]:
        """Both moments by parameter, and the steps taken; nothing if there are no parameters."""
        if not self._parameters:
            return {}
        found: dict[str, Array] = {"steps": np.array([self._steps], np.int64)}
        for number, name in enumerate(self._parameters):
            found[f"{name}.first"] = self._arrays.on_host(self._first[number])
            found[f"{name}.second"] = self._arrays.on_host(self._second[number])
        return found

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """The inverse of `state_dict`. `UserError` if it is another head's."""
        if set(state) != set(self.state_dict()):
            known = ", ".join(self._parameters) or "none"
            raise UserError(f"head: the saved state is of other parameters than this run's, {known}")
        for number, name in enumerate(self._parameters):
            self._first[number] = self._there(np.asarray(state[f"{name}.first"]).copy())
            self._second[number] = self._there(np.asarray(state[f"{name}.second"]).copy())
        self._steps = int(np.asarray(state["steps"])[0]) if state else 0

    def _there(self, value: np.ndarray) -> Array:
        return self._arrays.on_device(self._arrays.from_numpy(value))
