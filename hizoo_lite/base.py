"""The interfaces of every axis: what a member must provide, and the values that travel between them.

Members import this module; it imports values from the ground (`branches`, `batch`) and torch not at all: what
runs beside onnxruntime, with numpy alone, shares the axes that are not about modules. A step is

    Estimator.points -> Branches (folded into the batch axis) -> per-branch, per-example losses
          -> Estimator.reduce, release, estimate -> coefficients, curvatures -> Curvature.observe -> update

Weights that live inside the blocks are updated later, when their block is next present.

Glossary, used everywhere: `z` standard normal direction, `mu` perturbation scale, `sigma` inverse
diagonal Hessian (the preconditioner), `direction` = sigma^(1/2) * z, `branch` one of the parameter
points evaluated in a step, `block` one transformer layer, `space` what is trainable and how a branch
enters a linear layer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np

from hizoo_lite.arrays import Array, Shape
from hizoo_lite.batch import Batch, Example, Losses
from hizoo_lite.branches import Branches, BranchState, Point

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hizoo_lite.arrays import Arrays


Bits = Literal["nf4", "fp4", "int8", "none"]
ModelKind = Literal["causal", "masked", "classifier"]
ComputeDtype = Literal["auto", "bf16", "fp16", "float32"]
NoiseLaw = Literal["normal", "signs"]


# ------------------------------------------------------------------------------------- estimators


class Estimate(NamedTuple):
    """What an estimator makes of the losses of one step.

    Attributes:
        coefficients: one a direction d; the gradient is estimated as the sum of coefficient * d. Along one
            direction HiZOO's and MeZO's is the slope of the loss, (l+ - l-) / (2 mu).
        curvatures: d' G d (Gauss-Newton) or d' H d (Hessian) along each direction, see `HiZOO`; None if no
            curvature was measured.
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
    """Which points a step evaluates, and how their losses become an `Estimate`.

    A step calls `points`, evaluates the model there, then calls `reduce` (for each part of the batch),
    `release` (once) and `estimate`.

    Attributes:
        name: as the configuration has it.
        measures_curvature: whether `estimate` gives curvatures, in some steps at least.
        for_weights: whether it can train weights inside the blocks: along one direction, with a pair of
            points.
        groups: into how many groups a batch's examples are divided, each of which is evaluated at `points`
            along directions of its own.
        law: what z is drawn from: "normal", N(0, 1), or "signs", -1 and +1 with equal probability.
        secret: whether batches and what is released of their losses are drawn from the operating system's
            source. A step that is taken again is then another one; of a step the coefficients alone are told:
            no losses, examples, tokens or time; and nothing else that is made of losses is allowed.
    """

    name: str
    groups: int = 1
    measures_curvature: ClassVar[bool] = False
    for_weights: ClassVar[bool] = True
    law: ClassVar[NoiseLaw] = "normal"
    secret: ClassVar[bool] = False

    @staticmethod
    def conflicts(options: Mapping[str, Any], where: Callable[[str], str]) -> list[str]:
        """What is wrong with options that are each allowed by themselves.

        Args:
            options: the constructor's arguments, by name.
            where: how the user named an argument (a flag, a key), for messages.

        Returns:
            A message for each problem; none if there is none.
        """
        return []

    def begin(self, examples: int, batch_size: int, steps: int, evaluated: Sequence[str]) -> list[str]:
        """Called before the first step of a run.

        Args:
            examples: how many there are to train on.
            batch_size: examples of a step, as the configuration has it.
            steps: of the whole run.
            evaluated: what evaluations are of, in words.

        Returns:
            What the user is to be told, in lines.

        Raises:
            UserError: if it cannot work with these numbers.
        """
        return []

    def sample(self) -> list[int] | None:
        """Indices of the next step's training examples, rising; None: batches follow the data's order."""
        return None

    def over(self, steps: int) -> str | None:
        """Why the run must end after `steps` >= 1 steps, in words; None: it need not."""
        return None

    def account(self, steps: int) -> tuple[dict[str, Any], str]:
        """What `steps` steps have cost: entries of summary.json, and a line to show; both may be empty."""
        return {}, ""

    @abstractmethod
    def points(self, step: int) -> tuple[Point, ...]:
        """The parameter points to evaluate, in the order that `Branches` asks for.

        Must be a pure function of `step`. Every step has as many directions as step 0, and at most as many
        points.

        Args:
            step: counted from 0.
        """

    @property
    def directions_of_step(self) -> int:
        """Along how many directions a step moves."""
        return self.groups * Branches(self.points(0)).directions

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
        """Sum over examples. The sums are then added over the parts of a batch and over processes.

        What is done to each example's own losses, such as clipping them, is done here.

        Args:
            step: counted from 0.
            losses: of each point and example, (points, examples) float64; of one group.

        Returns:
            (n,) float64, the same n in every step, at most the points of step 0; by default each point's sum.
        """
        return np.asarray(losses.sum(axis=1))

    def release(self, step: int, sums: np.ndarray, examples: int) -> np.ndarray:
        """What is recorded of a step and given to `estimate`; called once a step.

        Args:
            step: counted from 0.
            sums: of `reduce`, over all parts of the batch and all processes, (groups * n,) float64.
            examples: how many the batch has.

        Returns:
            Float64, by default the means over the examples.
        """
        return sums / examples

    @abstractmethod
    def estimate(self, step: int, losses: np.ndarray, divergences: np.ndarray, mu: float) -> Estimate:
        """The numbers that a step moves by.

        Args:
            step: counted from 0.
            losses: what `release` gave, by default the mean loss of each point, (points,) float64.
            divergences: of the predictions along each direction, (directions,) float64, see `Losses`.
            mu: perturbation scale, above 0.

        Returns:
            The estimate. Losses that are not finite make one that is not: the step is then skipped.
        """


# ------------------------------------------------------------------------------------- objectives


class Objective(ABC):
    """What the points of a step are compared by: the loss, or a value of each example, the higher the better.

    A step always minimizes: the losses of its record (journal.bin, metrics.jsonl, callbacks) are minus the
    values, so that they are -1 and 0 of an answer that is right and wrong. Reports and consoles show values.
    The curvature stays that of the predictions, and evaluations are the task's own.

    Attributes:
        reads: what `value` may be given: the scores of an example's candidates or classes, the text that is
            written for it. Nothing: the loss itself.
        source: a hash of what it is made of, if its name does not say that.
        of_row: whether it is of what was asked and answered, and of the whole row of the data.
    """

    name: str
    reads: ClassVar[tuple[Literal["scores", "text"], ...]] = ()
    source: str | None = None
    of_row: bool = False

    def value(self, example: Example, found: Any, metrics: Mapping[str, Callable[..., float]]) -> float:
        """The value of one example at one parameter point; the higher the better.

        Args:
            example: the one that was predicted.
            found: scores, by candidate or class in the order of `Example.gold`; or the greedy completion, up
                to the task's stop text. If it is `of_row`, an `Answered` in place of either.
            metrics: the task's metrics by name, functions of (examples, predictions).
        """
        raise NotImplementedError


# -------------------------------------------------------------------------------------- curvature


class Curvature(ABC):
    """How Sigma, the inverse of a diagonal Hessian estimate, is learnt and kept, in float32 or float64.

    `scale` gives Sigma^(1/2) for one parameter as a tensor that broadcasts to it. A step draws
    `direction = scale(name) * z(name)`, gives every tile of rows of every z to `see` as it is drawn, then
    calls `observe` with the directional curvature c, and updates along `update_scale(name) * z(name)`,
    which is the same as `direction` for everything but the published code's mode (perturbed with the
    old H, divided by the new one). A step along several directions, all drawn with the same Sigma, sees and
    observes one after the other. A step that measures no curvature needs neither call.
    """

    name: str
    #: False if it makes nothing of z.
    sees: ClassVar[bool] = True
    #: False if `see` must be given all rows at once, in a tensor that stays as it is until `observe`.
    sees_tiles: ClassVar[bool] = True
    #: True if the update divides by the H that this step's observation made (the published code).
    updates_with_new_scale: bool = False

    @abstractmethod
    def start(self, shapes: Mapping[str, Shape], arrays: Arrays) -> None:
        """Begin with Sigma = I.

        Args:
            shapes: of the trainable tensors, by name.
            arrays: the library (numpy or torch) and the device that the state is made with.
        """

    def held_bytes(self, shapes: Mapping[str, Shape]) -> int | None:
        """Bytes of its state for tensors of these `shapes`; None: small enough to be made and counted."""
        return None

    def step_bytes(self, shapes: Mapping[str, Shape]) -> int:
        """Bytes that it holds within a step beside its state, for weights of these `shapes` in the blocks."""
        return 0

    @abstractmethod
    def scale(self, name: str) -> Array:
        """Sigma^(1/2), broadcastable to parameter `name`, float32, on CPU."""

    def factors(self, name: str) -> tuple[Array, Array | None]:
        """Sigma^(1/2) of parameter `name` as two factors, for weights too large for a tensor of their shape.

        Returns:
            Row factor and column factor, whose product is `scale(name)`. Of a matrix () or (rows, 1), and
            (1, columns) or None for 1; of a vector () or (rows,), and None.
        """
        return self.scale(name), None

    @abstractmethod
    def see(self, name: str, z: Array, first_row: int = 0) -> None:
        """Take in some rows of this step's z.

        Args:
            name: of the parameter.
            z: the rows, of the parameter's shape but for the first axis, float32.
            first_row: where they begin in the parameter; 0 begins a new z.
        """

    @abstractmethod
    def observe(self, curvature: float, smoothing: float) -> None:
        """Learn from the curvature of the direction that was seen.

        Args:
            curvature: c = d' H d (or d' G d) with d = Sigma^(1/2) z; ignored if it is not finite.
            smoothing: weight of this measurement, above 0 and up to 1.

        Raises:
            UserError: if the smoothing is outside that range.
        """

    def update_scale(self, name: str) -> Array:
        """The factor of z in the update of parameter `name`."""
        return self.scale(name)

    @abstractmethod
    def state_dict(self) -> dict[str, Array]:
        """Every tensor that a resumed run needs."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Take back `state`, of `state_dict`, after `start` with the same shapes.

        Raises:
            UserError: if names, shapes or dtypes differ.
        """


class StepSize(Protocol):
    """The learning rate of each step: a schedule, or derived from the measured curvature."""

    def rate(self, step: int, estimate: Estimate) -> float:
        """The learning rate of a step; called once a step, after the losses are known.

        Args:
            step: counted from 0.
            estimate: of that step.
        """
        ...

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        ...

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take back `state`, of `state_dict`."""
        ...


class Piece(NamedTuple):
    """A part of the gradient, along one direction: coefficient * values[name] for each parameter.

    Attributes:
        values: the direction, float32 of each parameter's shape, by name.
        coefficient: its factor.
    """

    values: Mapping[str, Array]
    coefficient: float


class Optimizer(Protocol):
    """How an estimated gradient moves the parameters in memory."""

    name: str

    @property
    def streams(self) -> bool:
        """Whether it moves each parameter by -lr times its gradient and nothing else.

        Only then can it train weights inside the blocks, for which it can keep no state.
        """
        ...

    def start(self, shapes: Mapping[str, Shape], arrays: Arrays) -> None:
        """Make the state.

        Args:
            shapes: of the parameters in memory, by name.
            arrays: the library (numpy or torch) and the device that the state is made with.
        """
        ...

    def update(
        self, parameters: Mapping[str, Array], pieces: Sequence[Piece], lr: float, decay: float
    ) -> None:
        """Move all parameters in place, called once a step. All at once, so that a GPU takes few launches.

        Args:
            parameters: float32, by name.
            pieces: the gradient is their sum.
            lr: learning rate.
            decay: decoupled weight decay, already times lr.
        """
        ...

    def state_dict(self) -> dict[str, Array]:
        """Every tensor that a resumed run needs."""
        ...

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Take back `state`, of `state_dict`."""
        ...


# ----------------------------------------------------------------------------------------- spaces


class LinearDelta(ABC):
    """The trainable part of one linear layer: what each branch's own parameters add to its product."""

    #: True if the delta computes the whole product itself (no shared base product is wanted).
    replaces_base: bool = False

    @abstractmethod
    def apply(self, x: Tensor, y: Tensor | None, state: BranchState) -> Tensor:
        """Add this layer's part for every branch to `y`, in place.

        Args:
            x: the layer's input, (branches, tokens, in_features) float32.
            y: the shared base product, (branches, tokens, out_features) float32; None if `replaces_base`.
            state: the branches that are in flight, and their directions.

        Returns:
            `y`; if `replaces_base`, the whole product.
        """


class AttachedSpace(Protocol):
    """What is trainable: `parameters` in memory, and `weights` inside the blocks, which never are as a whole.

    A space without `weights` saves its tensors in one safetensors file, under these names (with PEFT's prefix
    or without): a replay has no more than that.

    Attributes:
        name: as the configuration has it.
        clip: the largest projected gradient of a step, if the run gives none; None is no limit.
        parameters: float32 tensors by PEFT's names, which a step perturbs and updates in place.
        exact: tensors whose gradient is computed, not estimated: no branch perturbs them.
        frozen: tensors that are saved and loaded with the others and never move.
    """

    name: str
    clip: ClassVar[float | None] = None
    parameters: dict[str, Array]
    exact: dict[str, Array]
    frozen: dict[str, Array]

    @property
    def weights(self) -> TrainedWeights | None:
        """What is trained inside the blocks; None if nothing is."""
        ...

    def save(self, folder: Any) -> None:
        """Write what was trained into `folder`, with every update; adapters in PEFT's format."""
        ...

    def load(self, folder: Any) -> None:
        """Read the `folder` that `save` wrote, into `parameters` and the blocks.

        Raises:
            UserError: naming the file, if it is damaged or does not fit the model.
        """
        ...


class Space(AttachedSpace, Protocol):
    """A space that makes its own parameters on a model. A step needs no more than an `AttachedSpace`.

    Its constructor takes `targets` and `blocks` at least. What it saves is a folder with `hizoo_space.json`,
    whose entries are the options that it is to be read with, or with an adapter of PEFT.

    Attributes:
        changes: reads a folder that it has saved, for exports that have the change in the weights; None if
            there is none.
        needs_own_scales: whether scales or codes are changed, for which scales that are stored in 8 bits must
            become float32.
        calibrates: whether `calibrate` is to be called, once it is attached and nothing that was saved is
            loaded.
        without_losses: if what `calibrate` finds is made of losses: what to set in a run that must not use
            losses so.
        target_names: full names of the linear layers that it is attached to.
    """

    changes: ClassVar[type[Any] | None] = None
    needs_own_scales: bool = False
    calibrates: bool = False
    without_losses: str = ""
    target_names: list[str]

    def attach(self, model: Any, seed: int, labels: Sequence[int] | None = None) -> None:
        """Create the parameters and hang a `LinearDelta` on each chosen linear layer of the model.

        Args:
            model: a `Model`; what another space has hung on it is taken off.
            seed: of values that are drawn at random.
            labels: tokens of the vocabulary that the answers of the run's examples are made of, if they are
                few and the same in all examples; see `LoRA`.

        Raises:
            UserError: if the model lacks the layers that were chosen.
        """
        ...

    def calibrate(self, traversal: Any, batch: Batch) -> None:
        """Look at the first examples of a run, before its first step; what comes of that is saved.

        Must not depend on the memory that there is: blocks that are streamed give the same bits.

        Args:
            traversal: what takes a batch through the model.
            batch: the first training examples.

        Raises:
            UserError: if the model cannot do what this needs.
        """

    def begin_from(self, folder: Any) -> None:
        """Take over the values of an adapter saved in `folder`, before the first step; LoRA alone has this.

        Raises:
            UserError: if it does not fit.
        """


def trained_count(space: AttachedSpace) -> int:
    """How many values an attached space trains, those of a head with exact gradients too."""
    shapes = [*trainable(space).values(), *(value.shape for value in space.exact.values())]
    return sum(math.prod(shape) for shape in shapes)


def trainable(space: AttachedSpace) -> dict[str, Shape]:
    """The shapes of what an attached space trains by estimated gradients, by name."""
    shapes = {name: value.shape for name, value in space.parameters.items()}
    return shapes if space.weights is None else {**shapes, **space.weights.shapes}


class Observer(Protocol):
    """Is told how far a pass through the model has come; must be quick."""

    def reached(self, place: int | str) -> None:
        """Block `place` has run and is still present, or the "head" has its logits."""
        ...


# --------------------------------------------------------------------------------------- residency


class Residency(Protocol):
    """Where a block's weights are while it is not being computed.

    Blocks are asked for in rising order, again and again; they are counted from 0.

    Attributes:
        name: "resident", "host" or "disk".
        starts_at: the block that passes begin at.
        falls: set while a pass comes back from the last block, for exact gradients.
        turns_at: the block down to which it comes back; None if no pass does.
    """

    name: str
    turns_at: int | None
    falls: bool
    starts_at: int

    def acquire(self, block: int) -> None:
        """Called before block `block` runs: on return its weights are on the compute device."""
        ...

    def mark_dirty(self, block: int) -> None:
        """Called while block `block` is present and its stored buffers were changed: the change must last."""
        ...

    def discard(self, block: int) -> bool:
        """Called while block `block` is present and in part changed, and the change is to be undone.

        Returns:
            Whether it will be as it was before when it is next present; False if it stays as it is.
        """
        ...

    def release(self, block: int) -> None:
        """Called when every branch has gone through block `block`."""
        ...

    def close(self) -> None:
        """End threads and close files. The blocks that are offloaded stay offloaded."""
        ...


class Boundaries(Protocol):
    """What goes into the blocks and comes out of the last one, for exact gradients of what is inside."""

    def enter(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Called with the `args` and `kwargs` that block `index` is given."""
        ...

    def leave(self, index: int, out: Any) -> Any:
        """Called with `out`, what block `index` gives; returns what the next one is to be given."""
        ...


class Part(Protocol):
    """The blocks that a pass runs, if not all."""

    def runs(self, index: int) -> bool:
        """Whether block `index` is run."""
        ...

    def left_out(self, hidden: Any) -> Any:
        """What is handed on in place of the output of a block that was given `hidden`."""
        ...

    def given(
        self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that block `index`, which is run, is given in place of `args` and `kwargs`."""
        ...


class PendingUpdates(Protocol):
    """Updates of weights that live inside the blocks, waiting until their block is present."""

    def apply(self, block: int) -> bool:
        """Apply what waits for block `block`, which is present; returns whether its buffers changed."""
        ...


class TrainedWeights(PendingUpdates, Protocol):
    """Weights trained where they are, inside the blocks. Their z is drawn by tile, again and again.

    Attributes:
        held: in memory beside them: what their noise is made of, and momentum.
    """

    held: list[Tensor]

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Of every trained tensor, by name."""
        ...

    def begin(self, seed: int, step: int, curvature: Curvature, *, measured: bool) -> None:
        """Set the directions of a step.

        Args:
            seed: of the run.
            step: counted from 0.
            curvature: gives Sigma^(1/2), and sees z during the next traversal.
            measured: whether that traversal measures a curvature; else z is not shown.
        """
        ...

    def see(self) -> None:
        """Show `curvature` the z of this step, as a traversal does; for a step without a traversal."""
        ...

    def update(self, lr: float, decay: float, coefficient: float = 1.0) -> None:
        """w <- (1 - decay) w - lr * coefficient * d, along this step's d, once a block is next present.

        Args:
            lr: learning rate.
            decay: decoupled weight decay, already times `lr`.
            coefficient: of the direction, see `Estimate`.
        """
        ...

    def flush(self) -> None:
        """Bring in every block that an update waits for."""
        ...

    def state_dict(self) -> dict[str, Array]:
        """What a resumed run needs beside the weights themselves; nothing waits."""
        ...

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Take back `state`, of `state_dict`."""
        ...


# ------------------------------------------------------------------------------------------ losses


class BranchLosses(Protocol):
    """What takes a batch through the model for all branches: the traversal, or a graph of onnxruntime."""

    def losses(
        self,
        batch: Batch,
        branches: Branches = ...,
        mu: float = ...,
        directions: Mapping[str, Array] | None = ...,
        exact: Mapping[str, Array] | None = ...,
    ) -> Losses:
        """The losses of every branch.

        Args:
            batch: the examples.
            branches: the parameter points; by default theta alone.
            mu: perturbation scale, above 0 if any branch is perturbed.
            directions: d = Sigma^(1/2) z by parameter name, (directions, *shape) float32 on the device.
            exact: the parameters whose gradient is wanted, of an `AttachedSpace`, by name.
        """
        ...
