"""One step: noise, one traversal for all branches, the scalars of the estimator, the update.

    z -> d = Sigma^(1/2) z -> losses and predictions at theta + offset mu d -> coefficient g, curvature c
      -> Sigma <- observe(c, z) -> the optimizer moves theta along g d

Where an estimator takes several directions a step, each has its own z, d, g and c, and theta moves along all.
Parameters are never perturbed in place: the branches exist only inside the linear layers. What a space
trains inside the blocks draws its own z there, and is updated when its block is next present. A step is a
pure function of (state, step number, batch), and of what a secret estimator has drawn; without its losses,
of (state, its record), which is what `replay` takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hizoo_lite.arrays import Array, Arrays
from hizoo_lite.base import (
    AttachedSpace,
    BranchLosses,
    Curvature,
    Estimate,
    Estimator,
    Optimizer,
    Piece,
    StepSize,
    mean_or_none,
    one_size,
    trainable,
)
from hizoo_lite.batch import Batch
from hizoo_lite.branches import Branches
from hizoo_lite.errors import UserError
from hizoo_lite.noise import StepNoise
from hizoo_lite.optimizers.exact import ExactAdam
from hizoo_lite.optimizers.step_size import Schedule
from hizoo_lite.registry import CURVATURES, OPTIMIZERS, Registry
from hizoo_lite.train.journal import Record
from hizoo_lite.train.ranks import ONE


def _which(axis: Registry[Any], trait: str) -> str:
    """The members that have a trait."""
    return ", ".join(name for name, member in axis.items() if getattr(member, trait))


class StepRecord(NamedTuple):
    """The scalars of one step; with the seed they determine the update."""

    step: int
    losses: tuple[float, ...]  # mean loss of each branch, as `Estimator.release` gives them; none of a secret
    coefficients: tuple[float, ...]  # of each direction, after clipping; none in a skipped step
    curvatures: tuple[float, ...] | None
    lr: float  # 0.0 in a skipped step
    forwards: int  # branches evaluated
    skipped: bool  # a loss was not finite: nothing was changed
    clipped: bool = False  # a coefficient was cut to the limit
    smoothing: float = 0.0  # weight of the curvature in Sigma; 0.0 if none was measured
    decay: float = 0.0  # of the weights, already times lr
    tokens: int | None = 0  # of the batch, on all ranks; None of a secret
    predicted: bool = False  # the curvature is from predictions, not from losses
    exact: bytes = b""  # see `Record`

    @property
    def projected_grad(self) -> float | None:
        """One number for a reader, see `Estimate.projected_grad`; NaN in a skipped step, None without any."""
        if self.coefficients:
            return one_size(self.coefficients)
        return math.nan if self.skipped else None

    @property
    def curvature(self) -> float | None:
        """The mean over the directions."""
        return mean_or_none(self.curvatures)

    def metrics(self) -> dict[str, Any]:
        """The line of metrics.jsonl; what each direction gave is there if there are several."""
        found = self._asdict()
        del found["exact"]
        one = {"projected_grad": self.projected_grad, "curvature": self.curvature}
        each = {"projected_grads": found.pop("coefficients"), "curvatures": found.pop("curvatures")}
        several = each if len(self.coefficients) > 1 else {}
        return {"step": self.step, "losses": self.losses, **one, **several, **found}


class Stepper:
    """Everything that a step reads and changes.

    Args:
        traversal: what losses come from; None for steps that are replayed alone.
        arrays: the library, and the device, of the space's parameters.
        space: attached.
        optimizer: None is SGD.
        mu: perturbation scale.
        smoothing: weight of a new curvature observation, per step.
        weight_decay: decoupled, times lr, not on biases and norms.
        clip: largest size of a coefficient.
        course: share of its rate that a head with exact gradients has at a step; None: all.

    Raises:
        UserError: if the parts do not go together.
    """

    def __init__(
        self,
        traversal: BranchLosses | None,
        arrays: Arrays,
        space: AttachedSpace,
        estimator: Estimator,
        curvature: Curvature,
        step_size: StepSize,
        optimizer: Optimizer | None = None,
        *,
        seed: int,
        mu: float,
        smoothing: Schedule,
        weight_decay: float = 0.0,
        clip: float | None = None,
        course: Schedule | None = None,
    ) -> None:
        self._arrays, self.traversal, self.space = arrays, traversal, space
        self.estimator, self.curvature, self.step_size = estimator, curvature, step_size
        self.optimizer = OPTIMIZERS.make(next(iter(OPTIMIZERS))) if optimizer is None else optimizer
        self.seed, self.mu, self.smoothing = seed, mu, smoothing
        self.weight_decay, self.clip = weight_decay, clip
        self.ranks = ONE  # the processes among which a batch is divided
        if space.weights is not None and not curvature.sees_tiles:
            raise UserError(
                f"--curvature: {curvature.name} keeps a value for every weight and cannot be used with "
                f"--space {space.name}; allowed: {_which(CURVATURES, 'sees_tiles')}"
            )
        if space.weights is not None and not self.optimizer.streams:
            raise UserError(
                f"--optimizer: {self.optimizer.name} keeps values for every parameter and cannot be used "
                f"with --space {space.name}; allowed: {_which(OPTIMIZERS, 'streams')}"
            )
        branches, directions = Branches(estimator.points(0)), estimator.directions_of_step
        if space.weights is not None and directions > 1:
            raise UserError(
                f"--directions: got {directions}, but --space {space.name} trains weights inside the blocks, "
                "along one direction; allowed: 1"
            )
        if space.weights is not None and branches.one_sided:
            raise UserError(
                f"--estimator: {estimator.name} has one-sided points, but --space {space.name} trains "
                "weights inside the blocks, which need pairs"
            )
        if estimator.secret and space.exact:
            raise UserError(
                f"--head: exact gradients are no noisy sums, which are all that --estimator {estimator.name} "
                "may release; allowed: estimated, none"
            )
        shapes = {name: p.shape for name, p in space.parameters.items()}
        self.noise = StepNoise(seed, shapes, self._arrays, directions, estimator.law)
        curvature.start(trainable(space), self._arrays)
        self.optimizer.start(shapes, self._arrays)
        self.head, self.course = ExactAdam(space.exact, arrays), course or Schedule()

    @property
    def library(self) -> str:
        """What state and updates are computed with, such as "torch-cpu": another one rounds differently."""
        return self._arrays.name

    def step(self, step: int, *batches: Batch) -> StepRecord:
        """Take step number `step` on a batch, in one part or several; on this rank's share of it."""
        with self._arrays.without_gradients():
            return self._step(step, batches)

    def _step(self, step: int, batches: Sequence[Batch]) -> StepRecord:
        z, branches = self.noise(step), Branches(self.estimator.points(step))
        directions = self._begin(step, z, measured=self.estimator.measures(step))
        losses, divergences, exact, tokens = self._mean_losses(step, batches, branches, directions)
        estimate = self.estimator.estimate(step, losses, divergences, self.mu)
        values = () if self.estimator.secret else tuple(map(float, losses))
        if not np.isfinite(losses).all() or not np.isfinite(exact).all():
            return StepRecord(step, values, (), None, 0.0, branches.count, True, tokens=tokens)
        coefficients = tuple(map(self._clipped, estimate.coefficients))
        clipped = coefficients != estimate.coefficients
        estimate = estimate._replace(coefficients=coefficients)
        smoothing = 0.0 if estimate.curvatures is None else self.smoothing(step)
        known = exact.astype("<f4").tobytes()
        lr, decay = self._learn(step, z, directions, estimate, smoothing, known)
        return StepRecord(
            step,
            values,
            *estimate,
            lr,
            branches.count,
            False,
            clipped,
            smoothing,
            decay,
            tokens,
            self.estimator.predicts,
            known,
        )

    def replay(self, record: Record) -> None:
        """Take the step that a record of the journal is of, without its losses: the same state, bit for bit.

        Raises UserError if the record does not follow from this state and these settings.
        """
        if record.seed != self.seed:
            raise UserError(f"journal.bin: step {record.step}: seed {record.seed}, the run has {self.seed}")
        if record.skipped:
            return
        if record.curvatures is not None and record.predicted != self.estimator.predicts:
            raise UserError(
                f"journal.bin: step {record.step}: its curvature is from "
                f"{'predictions' if record.predicted else 'losses'}, these settings take the other: it is of "
                "another run"
            )
        with self._arrays.without_gradients():
            z = self.noise(record.step)
            directions = self._begin(record.step, z, measured=record.curvatures is not None)
            if self.space.weights is not None:
                self.space.weights.see()
            estimate = Estimate(record.coefficients, record.curvatures)
            found = self._learn(record.step, z, directions, estimate, record.smoothing, record.exact)
        if found != (record.lr, record.decay):
            raise UserError(
                f"journal.bin: step {record.step}: learning rate and decay were {record.lr}, {record.decay}; "
                f"these settings and this state give {found[0]}, {found[1]}: it is of another run"
            )

    def _mean_losses(
        self, step: int, batches: Sequence[Batch], branches: Branches, directions: Mapping[str, Array]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int | None]:
        """What is released of the losses, divergences (directions,) and exact gradients, float64; tokens.

        Means, over all ranks: all that they tell each other in a step. Padding is no token.
        """
        assert self.traversal is not None
        groups, along = self.estimator.groups, branches.directions
        none = self.estimator.reduce(step, np.zeros((branches.count, 0)))
        losses, apart = np.zeros((groups, len(none))), np.zeros((groups, along))
        others = np.zeros(self.head.count + 2)  # with examples and tokens behind
        exact = {"exact": self.space.exact} if self.head.count else {}
        for number, batch in enumerate(batches):
            group = number * groups // len(batches)
            own = {name: d[group * along : (group + 1) * along] for name, d in directions.items()}
            found = self.traversal.losses(batch, branches, self.mu, own, **exact)
            losses[group] += self.estimator.reduce(step, np.asarray(found.per_example))
            apart[group] += np.asarray(found.divergences).sum(axis=1)
            if found.exact is not None:
                others[:-2] += np.asarray(found.exact)
            others[-2:] += batch.examples, int(batch.attention_mask.sum())
        if self.space.weights is not None:
            self.space.weights.see()  # where this rank had no examples
            self.space.weights.flush()  # now, while nothing has been learnt: it can fail
        sums = self.ranks.sum(np.concatenate([losses.ravel(), apart.ravel(), others]))
        parts = np.split(sums[:-2], np.cumsum([losses.size, apart.size]))
        examples, tokens = map(int, sums[-2:])
        released = self.estimator.release(step, parts[0], examples)
        if self.estimator.secret:  # every rank has drawn; there may be no examples
            return np.array(self.ranks.gather(released.tolist())[0]), np.zeros_like(parts[1]), parts[2], None
        return released, parts[1] / examples, parts[2] / examples, tokens

    def _begin(self, step: int, z: Mapping[str, Array], *, measured: bool) -> dict[str, Array]:
        """The directions of the parameters in memory; those of the weights are drawn when they are needed."""
        if self.space.weights is not None:
            self.space.weights.begin(self.seed, step, self.curvature, measured=measured)
        return self._directions(z, self.curvature.scale)

    def _learn(
        self,
        step: int,
        z: Mapping[str, Array],
        directions: Mapping[str, Array],
        estimate: Estimate,
        smoothing: float,
        exact: bytes,
    ) -> tuple[float, float]:
        """What a step changes, from its scalars; the learning rate, and the decay of the weights."""
        for direction, curvature in enumerate(estimate.curvatures or ()):
            for name, value in z.items():
                self.curvature.see(name, value[direction])
            self.curvature.observe(curvature, smoothing)
        lr = self.step_size.rate(step, estimate)
        if self.curvature.updates_with_new_scale:
            directions = self._directions(z, self.curvature.update_scale)
        decay = lr * self.weight_decay
        pieces = [
            Piece({name: along[number] for name, along in directions.items()}, coefficient)
            for number, coefficient in enumerate(estimate.coefficients)
        ]
        self.optimizer.update(self.space.parameters, pieces, lr, decay)
        if self.head.count:
            self.head.update(exact, self.course(step))
        if self.space.weights is not None:
            self.space.weights.update(lr, decay, estimate.coefficients[0])
        return lr, decay

    def _clipped(self, coefficient: float) -> float:
        if self.clip is None or abs(coefficient) <= self.clip:
            return coefficient
        return math.copysign(self.clip, coefficient)

    def _directions(self, z: Mapping[str, Array], scale: Callable[[str], Array]) -> dict[str, Array]:
        return self._arrays.directions(scale, z)

    def close(self) -> None:
        """End the noise thread."""
        self.noise.close()
