"""How parameters move whose gradient is exact: Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1), scaled.

Nothing has to be tuned, because a step is measured in what it does: Adam moves no value by more than about
its rate, so that an output of the layer moves by at most rate * sum |x| with x its input. The rate is

    share of the schedule * REACH / (mean of sum |x| over this batch)

hence at most `REACH` nats of a logit a step at the start. On SmolLM2's label rows 1 is the best of 0.5 to 4
over 100 to 1000 examples and 30 to 450 steps (tools/LOG.md). There is no weight decay.

All adapters share one rate, their A and B alike, as in Hu et al. (2106.09685): x is what B reads, the mean is
over their layers and that of the first step. With a rate for each layer the lowest block of SmolLM2, whose
inputs are small, moves eight times as far as the last one. With one that followed the inputs of B, which are
products of A, B would lose what A has learnt; with an A faster than B, too (tools/LOG.md).

A gradient of adapters that is much longer than usual is shortened (Pascanu et al., 1211.5063, section 3.2;
ours deviates: lengths are measured against those of the steps before, as each model and task has its own).
A single one that is 50 times as long as others, as SmolLM2 has now and then where the loss is as small as
ever, would make Adam's second moments so large that nothing moves any more.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np

from hizoo_lite.arrays import Array, Arrays
from hizoo_lite.errors import UserError

#: Nats that an output may move by in a step at the start of the schedule.
REACH = 1.0
_BETAS, _EPSILON = (0.9, 0.999), 1e-8
#: How long a gradient of adapters may be, over the usual length.
LONGEST = 2.0


#: The kind of all adapters' parameters, and the entries of the saved state with their inputs in the first
#: step, and with the logarithm of their gradients' usual length.
_ADAPTERS, _FIRST, _LENGTH = "adapters", "inputs of adapters", "length of gradients"


def _kinds(names: Collection[str]) -> dict[str, str]:
    """Parameters of a kind have one rate: those of adapters, both halves of each; others have their own."""
    halves = {name.rpartition(".lora_B.weight")[0] for name in names} - {""}
    return {name: _ADAPTERS if name.rpartition(".lora_")[0] in halves else name for name in names}


class ExactAdam:
    """Adam on float32 parameters, its state where they are: 8 bytes a value."""

    def __init__(self, parameters: Mapping[str, Array], arrays: Arrays) -> None:
        """parameters: float32, moved in place by `update`, in the order of their names."""
        self._parameters, self._arrays = {name: parameters[name] for name in sorted(parameters)}, arrays
        self._sizes = [math.prod(value.shape) for value in self._parameters.values()]
        zeros = [np.zeros(tuple(value.shape), np.float32) for value in self._parameters.values()]
        self._first = [self._there(value) for value in zeros]
        self._second = [self._there(value.copy()) for value in zeros]
        self._kinds = _kinds(self._parameters)
        self._steps, self._adapters, self._length = 0, 0.0, math.nan

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
        factors = {_ADAPTERS: self._shortened(values)}
        (b1, b2), begin = _BETAS, 0
        correction = [1 - beta**self._steps for beta in _BETAS]
        for number, (name, parameter) in enumerate(self._parameters.items()):
            end = begin + self._sizes[number]
            gradient = self._there(values[begin:end].reshape(tuple(parameter.shape)).copy())
            gradient *= factors.get(self._kinds[name], 1.0)
            begin, reach = end + 2, reaches[self._kinds[name]]
            first, second = self._first[number], self._second[number]
            first *= b1
            first += (1 - b1) * gradient
            second *= b2
            second += (1 - b2) * gradient * gradient
            if reach > 0:
                rate = share * REACH / reach / correction[0]
                parameter -= rate * first / ((second / correction[1]) ** 0.5 + _EPSILON * max(reach, 1.0))

    def _reaches(self, values: np.ndarray) -> dict[str, float]:
        """The mean of sum |x| over the inputs of parameters of a kind, of adapters those of the first step.

        0 if there were none.
        """
        sums: dict[str, tuple[float, float]] = {}
        end = 0
        for name, size in zip(self._parameters, self._sizes, strict=True):
            end += size + 2
            total, inputs = sums.get(self._kinds[name], (0.0, 0.0))
            sums[self._kinds[name]] = total + float(values[end - 2]), inputs + float(values[end - 1])
        found = {kind: total / inputs if inputs else 0.0 for kind, (total, inputs) in sums.items()}
        self._adapters = self._adapters or found.get(_ADAPTERS, 0.0)
        return {**found, _ADAPTERS: self._adapters}

    def _shortened(self, values: np.ndarray) -> float:
        """What the gradient of all adapters is multiplied by; the usual length follows its length."""
        squares, end = 0.0, 0
        for name, size in zip(self._parameters, self._sizes, strict=True):
            if self._kinds[name] == _ADAPTERS:
                squares += float(np.square(values[end : end + size], dtype=np.float64).sum())
            end += size + 2
        if squares == 0:
            return 1.0
        length = math.log(squares) / 2
        usual = length if math.isnan(self._length) else self._length
        kept = min(length, usual + math.log(LONGEST))
        self._length = usual + max(1 - _BETAS[0], 1 / self._steps) * (kept - usual)
        return math.exp(kept - length)

    def state_dict(self) -> dict[str, Array]:
        """Both moments by parameter, the steps taken, the inputs of adapters; nothing without parameters."""
        if not self._parameters:
            return {}
        found: dict[str, Array] = {"steps": np.array([self._steps], np.int64)}
        if _ADAPTERS in self._kinds.values():
            found[_FIRST] = np.array([self._adapters], np.float64)
            found[_LENGTH] = np.array([self._length], np.float64)
        for number, name in enumerate(self._parameters):
            found[f"{name}.first"] = self._arrays.on_host(self._first[number])
            found[f"{name}.second"] = self._arrays.on_host(self._second[number])
        return found

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """The inverse of `state_dict`. `UserError` if it is another head's.

        A state of before, without inputs or length, takes those of the next step.
        """
        if set(state) != set(self.state_dict()) - ({_FIRST, _LENGTH} - set(state)):
            known = ", ".join(self._parameters) or "none"
            raise UserError(f"head: the saved state is of other parameters than this run's, {known}")
        for number, name in enumerate(self._parameters):
            self._first[number] = self._there(np.asarray(state[f"{name}.first"]).copy())
            self._second[number] = self._there(np.asarray(state[f"{name}.second"]).copy())
        self._steps = int(np.asarray(state["steps"])[0]) if state else 0
        self._adapters = float(np.asarray(state[_FIRST])[0]) if _FIRST in state else 0.0
        self._length = float(np.asarray(state[_LENGTH])[0]) if _LENGTH in state else math.nan

    def _there(self, value: np.ndarray) -> Array:
        return self._arrays.on_device(self._arrays.from_numpy(value))
