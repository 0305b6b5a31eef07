"""Differentially private slopes: DP-ZO, and DP-AggZO along several directions.

A direction says nothing of the data, so the slopes along it are all that a step learns, and all that has to
be private (Tang et al., DP-ZO, arXiv 2401.04343, algorithm 1; Zhang et al., DPZero, arXiv 2310.09639). With
K directions d_k, example i of the batch has the differences

    v_i = (l_i(theta + mu d_1) - l_i(theta - mu d_1), ..., l_i(theta + mu d_K) - l_i(theta - mu d_K))

and a step releases, with xi from N(0, I_K), C = `clip` and sigma = `noise`,

    s = sum_i v_i min(1, C / |v_i|) + sigma C xi,        coefficient_k = s_k / (2 mu B K)

and nothing else. One example moves the sum by at most C: a Gaussian mechanism with noise multiplier sigma,
whatever K is. K = 1 is DP-ZO. K > 1 is DP-AggZO (Bao et al., USENIX Security 2025), whose clipping cuts off
less of the signal at the same noise in each coordinate. With the `mechanism` "laplace", of DP-ZO and for
K = 1, xi is from the Laplace distribution of scale 1. An example is in a batch with probability q = B / n, of
n examples to train on, independently of the others (Poisson sampling), with B the batch size of the
configuration; s is divided by this expected size, since the actual one is a secret too. A step without any
example releases its noise. Epsilon is that of dp-accounting for q, sigma and the number of steps.

Deviations: DP-AggZO divides by K before it clips, so that its threshold, of slopes, is C / (2 mu K). The
published code of DPZero and DP-AggZO draws its noise from the generator that was seeded for a direction; the
first shuffles where it accounts for Poisson sampling, the second skips empty batches. Here noise and batches
come from the operating system's source, never from the run's seed, and are stored nowhere. s is rounded to a
multiple of some 2^-24 of the noise: the last bits of a float that noise was added to tell what it was added
to (Mironov, CCS 2012). An example whose differences are not finite adds nothing, so no step is skipped.

DP-ZOSO and DP-ZOPO (Liu et al., arXiv 2402.07818) are this estimator with a course of the rate and a mask:
`lr_schedule` "stages" halves the rate in stages that double. Their code lowers mu as well, with a clip of the
slopes, (l+ - l-) / (2 mu); ours is of the differences, so that a smaller mu would drown them in the noise,
and mu stays. It also pulls towards the weights that a stage began with (5e-4); `weight_decay` pulls to 0.
Their mask scores every weight by SynFlow, estimated from forwards of the model with all weights replaced by
their sizes, and trains the 1 % with the *lowest* scores; weights that are stored in 4 bits have no such
model. Masks without data are here those of small weights (space "small") and of large ones ("sparse" by
"magnitude").

A step costs 2 K forwards of its batch, and 2 K branches in memory. A batch that turned out large goes through
in parts of the usual size, within the plan of memory.

Epsilon covers what the coefficients tell and all that is computed from them: journal.bin, the lines of steps
in metrics.jsonl, checkpoints/ and adapter/; for data sets that differ by one training example. It does not
cover

- evaluations, which are exact, nor a choice by them (`--keep best`). That dev and test examples are not
  trained on does not make them public;
- what is made of the data itself: run.json has hashes of the examples, plan.json their lengths, hidden.bin
  their hidden states, data/ rows that were given in memory. Publish the files above, not the folder;
- how many training examples there are, and which of a file they are, which depends on all of it;
- time and memory of a step, which its batch shows in. Neither is recorded by step and memory.json is not
  written, but summary.json has the peak of the run, and who watches the process sees both;
- rounding: a loss is computed beside those of other examples, and its last bits may depend on them (by up to
  4e-6 of SmolLM2-135M in float32, where the clip is 1e-3);
- other runs on the same data, such as a search for rate and clip, and steps that are taken again because a
  power failure took them from the journal: they add up.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import numpy as np

from hizoo_lite.base import Estimate, Estimator
from hizoo_lite.branches import Branches, Point
from hizoo_lite.errors import UserError
from hizoo_lite.estimators.accountant import Accountant, Mechanism
from hizoo_lite.estimators.mezo import as_losses, central_difference, too_many_pairs

#: Bits of the noise's scale that a released value keeps behind the point.
KEPT_BITS = 24
#: What is made of the examples themselves.
_FILES = "run.json, plan.json, hidden.bin and data/ of the run folder, which are made of the examples"


class DP(Estimator):
    """Slopes with differential privacy (DP-ZO, arXiv 2401.04343, algorithm 1; K > 1: DP-AggZO).

    Example i has the differences v_i = l_i(theta + mu d_k) - l_i(theta - mu d_k) along the K = `directions`.
    A step releases s and nothing else, with C = `clip`, sigma = `noise`, xi of scale 1 and B the batch size:

        s = sum_i v_i min(1, C / |v_i|) + sigma C xi,        coefficient_k = s_k / (2 mu B K)

    Batches are random (each example with the same probability) and xi is from the operating system's source,
    so that a run cannot be repeated. What epsilon does not cover is listed at the top of this file.

    Example:
        >>> import numpy as np
        >>> losses = np.array([[0.75, 0.5], [0.25, 0.5]])  # at theta + mu d and theta - mu d, of two examples
        >>> DP(clip=0.125).reduce(0, losses)  # the first example's difference of 0.5 is clipped
        array([0.125])
    """

    name = "dp"
    secret = True

    def __init__(
        self,
        directions: int = 1,
        clip: float = 1e-3,
        noise: float = 1.0,
        mechanism: Mechanism = "gaussian",
        delta: float = 1e-5,
        epsilon: float | None = None,
    ) -> None:
        """Check the arguments.

        Args:
            directions: K; a step costs 2 K forwards.
            clip: C, the most by which one example's differences count, in units of the loss.
            noise: sigma, the noise's standard deviation over C; of "laplace" its scale over C.
            mechanism: "gaussian", or "laplace" for one direction.
            delta: of (epsilon, delta): above 0, and below one over the number of training examples.
            epsilon: budget of the whole run, which ends before the step that would exceed it; None: no
                budget.

        Raises:
            UserError: if an argument is out of range, or two do not go together.
        """
        if not isinstance(directions, int) or isinstance(directions, bool) or directions < 1:
            raise UserError(f"estimator dp: directions must be a whole number >= 1, got {directions!r}")
        if mechanism not in get_args(Mechanism):
            allowed = " or ".join(get_args(Mechanism))
            raise UserError(f"estimator dp: mechanism must be {allowed}, got {mechanism!r}")
        limits = {
            "clip": clip,
            "noise": noise,
            "delta": delta,
            "epsilon": 1.0 if epsilon is None else epsilon,
        }
        for name, value in limits.items():
            if not 0.0 < value < (1.0 if name == "delta" else math.inf):
                raise UserError(f"estimator dp: {name} must be a positive number, got {value!r}")
        for problem in self.conflicts({"directions": directions, "mechanism": mechanism}, str):
            raise UserError(f"estimator dp: {problem}")
        self.directions, self.mechanism = directions, mechanism
        self.clip, self.noise, self.delta, self.epsilon = clip, noise, delta, epsilon

    @staticmethod
    def conflicts(options: Mapping[str, Any], where: Callable[[str], str]) -> list[str]:
        """Of the directions with the mechanism, and with a record of the journal."""
        directions = options["directions"]
        if not isinstance(directions, int) or directions == 1:
            return []
        if options["mechanism"] == "laplace":
            return [
                f"{where('directions')}: got {directions}, but {where('mechanism')} laplace bounds a single "
                "number; allowed: 1, or gaussian"
            ]
        return too_many_pairs(directions, where)

    def begin(self, examples: int, batch_size: int, steps: int, evaluated: Sequence[str]) -> list[str]:
        """See `Estimator.begin`. UserError if a batch has more than all examples, or the budget no step."""
        if batch_size > examples:
            raise UserError(
                f"--batch-size: got {batch_size}, but a batch has each of the {examples} examples at most "
                f"once; allowed: up to {examples}"
            )
        self._examples, self._batch_size, self._probability = examples, batch_size, batch_size / examples
        self._accountant = Accountant(self.mechanism, self._probability, self.noise, self.delta)
        self._open = [*evaluated, _FILES]
        most = steps
        if self.epsilon is not None:
            most = self._accountant.most_steps(self.epsilon, steps)
        if most == 0:
            raise UserError(
                f"--dp-epsilon: got {self.epsilon}, but a single step has {self._accountant.epsilon(1):.4g}; "
                "allowed: that or more, or more --dp-noise"
            )
        self._last = None if self.epsilon is None else most
        found = [
            "differential privacy: each training example is in a batch with probability "
            f"{self._probability:.4g}, and the run is to have {self._spent(most)}"
        ]
        if most < steps:
            found.append(f"--dp-epsilon: {self.epsilon} is reached after {most} of {steps} steps")
        if self.delta * examples > 1.0:
            found.append(f"--dp-delta: {self.delta} is above one over the {examples} training examples")
        return [*found, f"epsilon does not cover {'; '.join(self._open)}"]

    def sample(self) -> list[int]:
        """Each example with the same probability, drawn anew."""
        return [int(index) for index in np.flatnonzero(uniform(self._examples) < self._probability)]

    def over(self, steps: int) -> str | None:
        """See `Estimator.over`: the budget."""
        used_up = self._last is not None and steps >= self._last
        return f"the budget (--dp-epsilon {self.epsilon})" if used_up else None

    def account(self, steps: int) -> tuple[dict[str, Any], str]:
        """See `Estimator.account`: epsilon after `steps` steps, and what it is of."""
        entries = {
            "epsilon": self._accountant.epsilon(steps),
            "delta": self.delta,
            "neighbours": "one training example more or less",
            "mechanism": self.mechanism,
            "noise_multiplier": self.noise,
            "clip": self.clip,
            "directions": self.directions,
            "sampling": "poisson",
            "probability": self._probability,
            "steps": steps,
            "not_covered": self._open,
        }
        return {self.name: entries}, f"differential privacy: {self._spent(steps)}"

    def _spent(self, steps: int) -> str:
        return f"epsilon {self._accountant.epsilon(steps):.4g} at delta {self.delta:g} in {steps} steps"

    def points(self, step: int) -> tuple[Point, ...]:
        """The pairs, at every step."""
        return Branches.of(base=False, pairs=self.directions).points

    def reduce(self, step: int, losses: np.ndarray) -> np.ndarray:
        """The sum of the examples' differences, each of them of at most the clip: (directions,)."""
        with np.errstate(invalid="ignore"):  # of infinite losses
            changes = losses[0::2] - losses[1::2]
        changes = np.where(np.isfinite(changes).all(axis=0), changes, 0.0)
        shares = self.clip / np.maximum(np.linalg.norm(changes, axis=0), self.clip)
        return np.asarray((changes * shares).sum(axis=1))

    def release(self, step: int, sums: np.ndarray, examples: int) -> np.ndarray:
        """The noisy sums over the expected number of examples: (directions,)."""
        scale = self.noise * self.clip
        grid = 2.0 ** (math.floor(math.log2(scale)) - KEPT_BITS)
        noisy = np.round((sums + scale * NOISE[self.mechanism](len(sums))) / grid) * grid
        return np.asarray(noisy / self._batch_size)

    def estimate(self, step: int, losses: np.ndarray, divergences: np.ndarray, mu: float) -> Estimate:
        """See `Estimator.estimate`; losses are what was released. The divergences are not looked at."""
        released = as_losses(losses, (self.directions,), self.name)
        return Estimate(tuple(central_difference(s, 0.0, mu) / self.directions for s in released), None)


def uniform(count: int) -> np.ndarray:
    """Values in (0, 1) from the operating system's source, (count,) float64."""
    words = np.frombuffer(os.urandom(8 * count), np.uint64)
    return (words // 2**12 + 0.5) * 2.0**-52


def _gaussian(count: int) -> np.ndarray:
    """Standard normal, by Box and Muller."""
    radius, angle = uniform(2 * count).reshape(2, count)
    return np.asarray(np.sqrt(-2.0 * np.log(radius)) * np.cos(2.0 * np.pi * angle))


def _laplace(count: int) -> np.ndarray:
    """Of scale 1: the difference of two exponentials."""
    one, other = np.log(uniform(2 * count)).reshape(2, count)
    return np.asarray(one - other)


#: Of scale 1, (count,) float64, by mechanism.
NOISE: Mapping[Mechanism, Callable[[int], np.ndarray]] = {"gaussian": _gaussian, "laplace": _laplace}
