"""How parameters move whose gradient is exact: Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1), scaled.

Nothing has to be tuned, because a step is measured in what it does: Adam moves no value by more than about
its rate, so that an output of the layer moves by at most rate * sum |x| with x its input. The rate is

    share of the schedule * REACH / (mean of sum |x| over this batch)

hence at most `REACH` nats of a logit a step at the start. On SmolLM2's label rows 1 is the best of 0.5 to 4
over 100 to 1000 examples and 30 to 450 steps (tools/LOG.md). There is no weight decay.

The A of all adapters share one rate, and so do the B: the mean is over their layers. With a rate for each
layer the lowest block of SmolLM2, whose inputs are small, moves eight times as far as the last one.
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


def _kind(name: str) -> str:
    """Parameters of a kind have one rate: the A, or the B, of all adapters; others are each of their own."""
    return next((half for half in ("lora_A.weight", "lora_B.weight") if name.endswith(f".{half}")), name)


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
        reaches = self._reaches(values)
        self._steps += 1
        (b1, b2), begin = _BETAS, 0
        correction = [1 - beta**self._steps for beta in _BETAS]
        for number, (name, parameter) in enumerate(self._parameters.items()):
            end = begin + self._sizes[number]
            gradient = self._there(values[begin:end].reshape(tuple(parameter.shape)).copy())
            begin, reach = end + 2, reaches[_kind(name)]
            first, second = self._first[number], self._second[number]
            first *= b1
            first += (1 - b1) * gradient
            second *= b2
            second += (1 - b2) * gradient * gradient
            if reach > 0:
                rate = share * REACH / reach / correction[0]
                parameter -= rate * first / ((second / correction[1]) ** 0.5 + _EPSILON * max(reach, 1.0))

    def _reaches(self, values: np.ndarray) -> dict[str, float]:
        """The mean of sum |x| over the inputs of all parameters of a kind; 0 if there were none."""
        sums: dict[str, tuple[float, float]] = {}
        end = 0
        for name, size in zip(self._parameters, self._sizes, strict=True):
            end += size + 2
            total, inputs = sums.get(_kind(name), (0.0, 0.0))
            sums[_kind(name)] = total + float(values[end - 2]), inputs + float(values[end - 1])
        return {kind: total / inputs if inputs else 0.0 for kind, (total, inputs) in sums.items()}

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
