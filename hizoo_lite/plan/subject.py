"""What a plan is about: a model on the meta device, a run's settings, and the bytes that follow from both.

Nothing here chooses; `planner.py` asks for one configuration after the other.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from hizoo_lite import estimators
from hizoo_lite.base import Bits, Curvature, ModelKind, Space, trainable
from hizoo_lite.branches import EVALUATION, Branches
from hizoo_lite.config import TrainConfig
from hizoo_lite.curvature import for_estimator
from hizoo_lite.device import choose_device, like
from hizoo_lite.engine.backward import lowest_exact
from hizoo_lite.engine.exact import theta
from hizoo_lite.engine.hidden import first_trained, stored_bytes, worth_keeping
from hizoo_lite.errors import UserError
from hizoo_lite.memory.limits import Budgets, Place
from hizoo_lite.model import build
from hizoo_lite.plan.dry_run import Activations, DryRun, Held, Pass, Source, fewest_blocks
from hizoo_lite.plan.hardware import Hardware
from hizoo_lite.plan.inventory import Inventory
from hizoo_lite.plan.ledger import tensor_bytes
from hizoo_lite.plan.workload import Demand, Workload, cache_bytes
from hizoo_lite.process import resident
from hizoo_lite.registry import SPACES
from hizoo_lite.tasks.splits import PUBLISHED
from hizoo_lite.tensors import TorchArrays

#: Anonymous memory of a process that has imported a run's libraries: torch 2.13 (CPU), transformers 5.23,
#: bitsandbytes 0.50, Python 3.13; 305 MiB, measured. For machines other than this one.
FRAMEWORK_BYTES = 320_000_000
#: What the first steps add to it: kernels of oneDNN, modules that are imported late, gaps in the heap between
#: small buffers; 8 to 12 MiB, measured.
FIRST_USE_BYTES = 11 << 20
#: What drawing noise and rounding updates, tile by tile, leave in the heap; 2 to 18 MiB, measured.
DRAWING_BYTES = 8 << 20


@functools.cache
def framework_bytes() -> int:
    """Anonymous memory of this process at the first call. Whoever asks has imported `hizoo_lite.run`."""
    return resident().anon_bytes or FRAMEWORK_BYTES


class Unknown(Exception):
    """The architecture is not one that can be run."""


class Option(NamedTuple):
    """One configuration to look at."""

    place: Place
    batch: int
    length: int
    chunk_halvings: int = 0  # of chunks and logits


class Subject:
    """What is to be planned: the model, and everything about the run that does not change."""

    def __init__(
        self,
        config: TrainConfig,
        inventory: Inventory,
        kind: ModelKind,
        workload: Workload,
        hardware: Hardware | None,
        framework: int | None,
    ) -> None:
        self.config, self.inventory, self.kind, self.hardware = config, inventory, kind, hardware
        self.workload = workload
        self.labels = range(workload.labels) if workload.labels else None  # which ones does not matter
        self.length = workload.length or config.max_length  # tokens of the longest row
        self.bits: Bits = build.choose_bits(config.bits, inventory.bits)
        self.device = hardware.device if hardware else like(choose_device(config.device))
        self.compute = self._compute()
        self.budgets = self._budgets()
        self.framework = self._framework(framework)
        if self.device == "cpu":
            self.framework += FIRST_USE_BYTES
        self.estimator = estimators.configured(config)
        self.in_weights = SPACES.lines[config.space].in_weights
        double_quant = config.double_quant and not self.in_weights
        try:
            model_config = build.read_config(inventory.folder, kind, num_labels=2)
            self.module = build.build(model_config, kind)
        except UserError as error:
            raise Unknown(str(error)) from error
        known = inventory, model_config, kind, self.bits, double_quant, self.compute, self.device
        self.source = Source(*known)
        self._held: dict[Place, Held] = {}
        self._runs: dict[tuple[Place, int | None], DryRun] = {}
        self._passes: dict[tuple[Any, ...], Activations] = {}
        self.place: Place = "resident" if config.residency == "auto" else config.residency
        self.length = min(self.length, self.held(self.place).model.positions or self.length)
        self.space = self.held(self.place).space
        self.shapes = trainable(self.space)
        twice = any(name.endswith(".nested_absmax") for name in inventory.forms)
        self.needs_own_scales = self.space.needs_own_scales and twice
        self.can_stream = self.bits == (inventory.bits or "none") and not self.needs_own_scales

    # ------------------------------------------------------------------------------------- settings

    def _compute(self) -> torch.dtype:
        """What was said, else the profile's, else what this machine multiplies fast."""
        said = self.config.compute_dtype
        if said == "auto" and self.hardware is not None:
            said = self.hardware.compute
        device = choose_device(self.config.device) if self.hardware is None else torch.device(self.device)
        return build.choose_compute(said, device)

    def _budgets(self) -> Budgets:
        given = Budgets.parse(self.config.device_budget, self.config.host_budget, torch.device(self.device))
        if self.hardware is None:
            return given
        device, host = self.hardware.device_budget_bytes, self.hardware.host_budget_bytes
        return Budgets(given.device_bytes or device, given.host_bytes or host or device)

    def _framework(self, given: int | None) -> int:
        if given is not None:
            return given
        if self.hardware is not None:
            return FRAMEWORK_BYTES
        return framework_bytes()

    # ----------------------------------------------------------------------------------------- model

    def held(self, place: Place) -> Held:
        """The whole model as a run holds it."""
        if place not in self._held:
            space = SPACES.configured(self.config)
            self._held[place] = Held(self.source, place, copy.deepcopy(self.module), space, self.labels)
        return self._held[place]

    def _run(self, place: Place, below: int | None) -> DryRun:
        """The first blocks of it, all of which are trained but `below`; None: none are, for evaluations."""
        place = "resident" if place == "resident" else "host"  # of which the blocks come and go alike
        key = place, below
        if key not in self._runs:
            space = None if below is None else self._space(below)
            given = copy.deepcopy(self.module), space, self._curvature(), self.labels, below or 0
            self._runs[key] = DryRun(self.source, place, *given)
        return self._runs[key]

    def _space(self, below: int) -> Space:
        """The space of a dry run."""
        leaves = ",".join(sorted({name.rsplit(".", 1)[-1] for name in self.space.target_names}))
        most = len(self.held(self.place).model.blocks) - below
        few = min(fewest_blocks(self.source.config, below), most)
        options: dict[str, Any] = {"targets": leaves, "blocks": few if below else "all"}
        if self.config.exact_blocks not in (0, "all"):
            options["exact_blocks"] = min(int(self.config.exact_blocks), few)
        return SPACES.configured(self.config, **options)

    def _curvature(self) -> Curvature:
        return for_estimator(self.config, self.estimator)

    # --------------------------------------------------------------------------------- hidden states

    @property
    def first(self) -> int:
        """The first block that has something trained."""
        return first_trained(self.held(self.place).model)

    @property
    def examples(self) -> int:
        """To train on; the most that there may be if they are not known."""
        known = self.workload.examples
        most = self.config.train_examples
        return known if known is not None else PUBLISHED.train if most == "auto" else int(most)

    def _below(self, option: Option) -> int:
        """Blocks that a dry run of steps leaves out: one if a run may keep hidden states."""
        held, drawn = self.held(self.place), self.config.steps * option.batch
        may = self.config.hidden_states == "auto"
        return int(may and worth_keeping(held.model, held.space, drawn, self.examples))

    def features(self, option: Option) -> int:
        """Of the hidden states that a run keeps; 0: it keeps none."""
        below = self._below(option)
        return self._run(option.place, below).features if below else 0

    def hidden_bytes(self, option: Option) -> int:
        """Of the file of hidden states; of examples whose lengths are not known, if all are the longest."""
        longest = self.examples * self.workload.training.rows * option.length
        known = self.workload.tokens
        return stored_bytes(longest if known is None else min(known, longest), self.features(option))

    def batch_bytes(self, option: Option) -> int:
        """Of the hidden states that a batch comes with."""
        return stored_bytes(self.rows(option.batch) * option.length, self.features(option))

    # ------------------------------------------------------------------------------------ quantities

    def trained_bytes(self) -> int:
        """Of adapters and heads in memory that are trained, and have noise."""
        return sum(value.nbytes for value in self.space.parameters.values())

    def moments_bytes(self) -> int:
        """Of parameters with exact gradients, two of each value."""
        return 2 * sum(value.nbytes for value in self.space.exact.values())

    def boundaries(self, option: Option) -> tuple[int, int]:
        """Bytes of blocks' inputs that wait for a gradient; and of them what a dry run has seen on a CPU."""
        return self._waiting(self.space.exact, option, len(theta(self.branches())), self._below(option))

    def _waiting(self, names: Iterable[str], option: Option, standing: int, below: int) -> tuple[int, int]:
        """`boundaries` of a pass with gradients of these, at so many points, in the dry run of `below`.

        A dry run has few blocks, of which all that are not left out are trained.
        """
        model = self.held(self.place).model
        lowest = lowest_exact(model, names)
        if lowest is None:
            return 0, 0
        rows = self.rows(-(-option.batch // self.config.accumulate))
        hidden: int = self.source.config.get_text_config().hidden_size
        each = 4 * rows * option.length * hidden * standing
        few = self._run(option.place, below)
        assert few.space is not None
        seen = len(few.blocks) - (lowest_exact(few.model, few.space.exact) or 0)
        return each * (len(model.blocks) - lowest), each * seen

    def curvature_bytes(self) -> int:
        """Of Sigma's state, as it is laid out, unless the class itself knows."""
        state = self._curvature()
        held = state.held_bytes(self.shapes)
        if held is None:
            state.start(self.shapes, TorchArrays())
            held = tensor_bytes(vars(state))
        return held

    def weight_noise_bytes(self) -> int:
        """What drawing leaves, and what the curvature holds until the step ends."""
        if self.space.weights is None:
            return 0
        drawing = DRAWING_BYTES if self.device == "cpu" else 0
        return drawing + self._curvature().step_bytes(self.space.weights.shapes)

    def branches(self) -> Branches:
        """The most branches of a step."""
        return Branches(self.estimator.points(0))

    def elements(self) -> tuple[int, int, int]:
        """Of the blocks' weights; of those below the first trained block; of the others.

        Products with the second are the same in all branches.
        """
        model = self.held(self.place).model
        inside = shared = outside = 0
        first = self.first
        for name, linear in model.linears.items():
            block, count = model.block_of(name), math.prod(linear.weight.shape)
            if block is None:
                outside += count
            else:
                inside += count
                shared += count if block < first else 0
        return inside, shared, outside

    def rows(self, batch: int) -> int:
        """Token sequences of a step."""
        return batch * self.workload.training.rows

    def sites(self, batch: int, demand: Demand, length: int) -> int:
        """Positions whose logits are read: every one of lm and chat tasks, else what the examples make."""
        every = batch * demand.rows * length
        return every if set(self.config.tasks) & {"lm", "chat"} else min(every, batch * demand.sites)

    def eval_batch(self, batch: int) -> int:
        """Examples of an evaluation: what was asked for, less if the batch had to become smaller."""
        asked = self.config.eval_batch_size
        return asked if batch >= self.config.batch_size else min(asked, 2 * batch)

    def passes(self, option: Option) -> tuple[Activations, Activations]:
        """A step's traversal and an evaluation's."""
        at_once = -(-option.batch // self.config.accumulate)
        training = self._pass(at_once, self.workload.training, option, self.branches())
        batch = self.eval_batch(option.batch)
        evaluation = self._pass(batch, self.workload.evaluation, option, EVALUATION)
        written = self.workload.written
        found = self._with_cache(self._made(option.place, evaluation, None), batch, written, option)
        step = self._made(option.place, training, self._below(option))
        if not self.config.is_of_loss:  # of a task that writes, every branch does
            rows = at_once * self.branches().count
            step = self._with_cache(step, rows, max(written, self.workload.answered), option)
        if self.device == "cpu":
            step = step.beside("batch_states", self.batch_bytes(option))
        return step, found

    def calibration(self, option: Option) -> list[Activations]:
        """What comes before the first step, if the space wants it; the same whatever `chunk_halvings` are."""
        if not self.space.calibrates:
            return []
        at_once = -(-option.batch // self.config.accumulate)
        wanted = self._pass(at_once, self.workload.training, option._replace(chunk_halvings=0), EVALUATION)
        key = option.place, wanted, "calibrate"
        if key not in self._passes:
            found = self._run(option.place, 0).calibrate(wanted)
            if "attention" in found.peaks:  # else no block has run
                kept, metered = self._waiting(self.space.target_names, option, 1, 0)
                worst = {**found.worst, "boundaries": max(0, kept - metered)}
                peak = found.peak_bytes + (worst["boundaries"] if self.device == "cpu" else 0)
                found = found._replace(worst=worst, peak_bytes=peak)
            self._passes[key] = found
        return [self._passes[key]]

    def _pass(self, batch: int, demand: Demand, option: Option, branches: Branches) -> Pass:
        sites = self.sites(batch, demand, option.length)
        rows, chunk = batch * demand.rows, self.config.branch_chunk
        return Pass(rows, option.length, branches, sites, chunk, option.chunk_halvings)

    def _with_cache(self, passes: Activations, batch: int, length: int, option: Option) -> Activations:
        """What passes make, and beside it, if `batch` rows of a length are written, their keys and values."""
        if not length:
            return passes
        if option.length < self.length:
            length = min(length, option.length)
        return passes.beside("cache", cache_bytes(self.source.config, batch, length))

    def _made(self, place: Place, wanted: Pass, below: int | None) -> Activations:
        run = self._run(place, below)
        key = run, wanted
        if key not in self._passes:
            self._passes[key] = run.run(wanted)
        return self._passes[key]
