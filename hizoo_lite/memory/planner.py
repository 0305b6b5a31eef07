"""Predict the memory of a run from headers alone, and choose the fastest configuration that fits.

    plan_run(config, Checkpoint.open(folder), kind)

What is held (weights, adapters, Sigma, noise) is added up from shapes; what a pass makes is found by
rehearsing it on the meta device (`rehearsal.py`). The framework is this process's own anonymous memory
after the imports where a run is planned for this machine, a constant for another one.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch

from hizoo_lite import curvature as curvatures
from hizoo_lite import estimators
from hizoo_lite.base import EVALUATION, Bits, Branches, ModelKind, UserError
from hizoo_lite.memory.hardware import Hardware
from hizoo_lite.memory.ledger import Ledger
from hizoo_lite.memory.outline import Outline, dissect
from hizoo_lite.memory.plan import Plan
from hizoo_lite.memory.rehearsal import Activations, Pass, Rehearsal, Trained, few_blocks
from hizoo_lite.memory.rss import resident
from hizoo_lite.memory.sizes import format_bytes
from hizoo_lite.model import skeleton
from hizoo_lite.quant.checkpoint import Checkpoint
from hizoo_lite.spaces.targets import resolve_targets
from hizoo_lite.stream.choose import Budgets
from hizoo_lite.stream.chunks import plan_chunks
from hizoo_lite.train.config import TrainConfig

#: Anonymous memory of a process that has imported a run's libraries: torch 2.13 (CPU), transformers 5.23,
#: bitsandbytes 0.50, Python 3.13; 305 MiB, measured. For machines other than this one.
FRAMEWORK_BYTES = 320_000_000
#: What the first steps add to it: kernels of oneDNN, modules that are imported late; 3 to 5 MiB, measured.
FIRST_USE_BYTES = 5 << 20
#: CUDA's context, cuBLAS workspaces and kernels on the device, and its libraries on the host. Not measured
#: by this project yet; typical of CUDA 12.
CONTEXT_BYTES = 600 << 20
CUDA_HOST_BYTES = 1200 << 20
#: The two buffers of `Checkpoint.verify`.
LOADING_BYTES = 16_000_000
#: Share of what a pass makes that glibc holds beside it where it keeps freed memory; measured: 0.2 to 0.6.
HEAP_SHARE = 0.5
#: Largest batch that is chosen where none is asked for.
LARGEST_BATCH = 16
#: What is tried where a batch is chosen.
_BATCHES = (16, 8, 4, 2, 1)

Place = Literal["resident", "host", "disk"]


@functools.cache
def framework_bytes() -> int:
    """Anonymous memory of this process with a run's libraries imported, at the first call."""
    import hizoo_lite.train.fit  # noqa: F401 - what a run imports

    return resident().anon_bytes or FRAMEWORK_BYTES


def plan_run(
    config: TrainConfig,
    checkpoint: Checkpoint | Outline,
    kind: ModelKind,
    rows_per_example: int = 1,
    *,
    hardware: Hardware | None = None,
    choose_batch: bool = False,
    framework: int | None = None,
) -> Plan:
    """Plan a run. Without a budget everything fits and the blocks are resident.

    rows_per_example: token sequences that an example makes. hardware: the machine, with its budgets and
    rates; None is this one, without rates. choose_batch: take the largest batch that fits, up to 16, in
    place of the configuration's. framework: bytes of the imported libraries, measured where it is None.

    Raises `UserError` for bits, targets and residencies that contradict the checkpoint. An architecture that
    is not known gives a plan that does not fit, with what is not accounted for.
    """
    outline = checkpoint if isinstance(checkpoint, Outline) else Outline.of(checkpoint)
    try:
        task = _Task(config, outline, kind, rows_per_example, hardware, framework)
    except _Unknown as error:
        return _unknown(config, outline, str(error))
    return _choose(task, choose_batch)


class _Unknown(Exception):
    """The architecture is not one that can be rehearsed."""


class _Option(NamedTuple):
    """One configuration to look at."""

    place: Place
    batch: int
    length: int
    chunk: int | Literal["auto"]


class _Task:
    """What is to be planned: the model, dissected, and everything about the run that does not change."""

    def __init__(
        self,
        config: TrainConfig,
        outline: Outline,
        kind: ModelKind,
        rows_per_example: int,
        hardware: Hardware | None,
        framework: int | None,
    ) -> None:
        self.config, self.outline, self.kind, self.hardware = config, outline, kind, hardware
        self.rows_per_example = rows_per_example
        self.bits: Bits = skeleton.choose_bits(config.bits, outline.bits)
        self.device = hardware.device if hardware else skeleton.choose_device(config.device).type
        self.compute = self._compute()
        self.budgets = self._budgets()
        self.framework = self._framework(framework)
        if self.device == "cpu":
            self.framework += FIRST_USE_BYTES
        self.in_weights = config.space != "lora"
        self.residual = config.space == "dense" and config.dense_update == "residual"
        double_quant = config.double_quant and not self.in_weights
        try:
            self.model_config = skeleton.read_config(outline.folder, kind, num_labels=2)
            self.module = skeleton.build(self.model_config, kind)
        except UserError as error:
            raise _Unknown(str(error)) from error
        self.anatomy = dissect(outline, self.module, kind, self.bits, double_quant, self.device)
        self.trained = Trained(
            config.space,
            self._targets(),
            config.rank,
            self.residual,
        )
        self.shapes = self._trainable()
        few_blocks(self.module, self.anatomy.prefix, self.model_config)
        twice = any(len(linear.stored) == 3 for linear in self.anatomy.inside())
        self.needs_own_scales = self.in_weights and not self.residual and twice
        self.can_stream = self.bits == (outline.bits or "none") and not self.needs_own_scales
        self._rehearsals: dict[bool, Rehearsal] = {}
        self._passes: dict[tuple[Any, ...], Activations] = {}

    # ------------------------------------------------------------------------------------- settings

    def _compute(self) -> torch.dtype:
        names = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}
        if self.config.compute_dtype != "auto":
            return names[self.config.compute_dtype]
        if self.hardware is not None:
            return names[self.hardware.compute]
        return skeleton.choose_compute("auto", skeleton.choose_device(self.config.device))

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

    def _targets(self) -> str:
        if self.config.targets != "auto":
            return self.config.targets
        return "all-linear" if self.in_weights else "attention"

    def _trainable(self) -> dict[str, torch.Size]:
        """Shapes of what is trained, by name: in memory or in the blocks."""
        linears = {linear.name: linear for linear in self.anatomy.linears}
        stand_in: Any = _Named(linears, self.anatomy.prefix, self.model_config)
        chosen = resolve_targets(stand_in, self.trained.targets)
        shapes: dict[str, torch.Size] = {}
        for name in chosen:
            rows, columns = linears[name].shape
            if self.config.space == "lora":
                shapes[f"{name}.lora_A.weight"] = torch.Size((self.config.rank, columns))
                shapes[f"{name}.lora_B.weight"] = torch.Size((rows, self.config.rank))
            elif self.config.space == "dense":
                shapes[f"{name}.weight"] = torch.Size((rows, columns))
            else:
                count = rows if self.bits == "int8" else -(-rows * columns // 64)
                shapes[f"{name}.absmax"] = torch.Size((count,))
        self.heads = self._heads(linears)
        return {**shapes, **self.heads}

    def _heads(self, linears: Mapping[str, Any]) -> dict[str, torch.Size]:
        if self.kind != "classifier":
            return {}
        trunk = str(self.module.base_model_prefix) + "."
        found = {}
        for name, linear in linears.items():
            if not name.startswith(trunk) or f"{name}.weight" in self.anatomy.outside:
                found[f"{name}.weight"] = torch.Size(linear.shape)
                if self.module.get_submodule(name).bias is not None:
                    found[f"{name}.bias"] = torch.Size(linear.shape[:1])
        return found

    # ------------------------------------------------------------------------------------ quantities

    def adapter_bytes(self) -> int:
        """Of trainable tensors in memory."""
        shapes = self.shapes if not self.in_weights else self.heads
        return 4 * sum(shape.numel() for shape in shapes.values())

    def curvature_bytes(self) -> int:
        """Of Sigma's state, from the class itself; the diagonal one is as large as the adapters."""
        if self.config.estimator == "mezo" or self.config.curvature == "none":
            return 0
        if self.config.curvature == "diagonal":
            return 4 * sum(shape.numel() for shape in self.shapes.values())
        options = {"per": self.config.curvature_per} if self.config.curvature == "grouped" else {}
        state = curvatures.get(self.config.curvature, **options)
        state.start(self.shapes)
        from hizoo_lite.memory.ledger import _Count, _tensors_of

        return _Count().tensors(_tensors_of(vars(state)))

    def weight_noise_bytes(self) -> int:
        """Factors of the directions of weights, and HiZOO-L's sums over rows and columns, in float64."""
        if not self.in_weights or self.config.curvature != "factored" or self.config.estimator == "mezo":
            return 0
        return 20 * sum(sum(shape) for name, shape in self.shapes.items() if name not in self.heads)

    def block_bytes(self, streamed: bool) -> list[int]:
        """Of every block as the run holds it."""
        extra = 2 if self.residual else 0
        if streamed:
            return self.anatomy.travel_bytes(extra)
        sizes = self.anatomy.block_bytes(extra)
        if self.in_weights and not self.residual:
            for linear in self.anatomy.inside():  # double quantization is undone
                if len(linear.stored) == 3:
                    sizes[linear.block or 0] += 3 * linear.stored[1] - linear.stored[2]
        return sizes

    def branches(self) -> Branches:
        """The most branches of a step."""
        return estimators.get(self.config.estimator).branches(0)

    def sites(self, rows: int, length: int) -> int:
        """Positions whose logits are read: every one of lm and chat tasks, else one a row."""
        return rows * length if self.config.task in ("lm", "chat") else rows

    def eval_batch(self, batch: int) -> int:
        """Examples of an evaluation: what was asked for, less where the batch had to become smaller."""
        asked = self.config.eval_batch_size
        return asked if batch >= self.config.batch_size else min(asked, 2 * batch)

    def passes(self, option: _Option) -> tuple[Activations, Activations]:
        """A step's traversal and an evaluation's."""
        away = option.place != "resident"
        rows = option.batch * self.rows_per_example
        sites = self.sites(rows, option.length)
        training = Pass(rows, option.length, self.branches(), sites, option.chunk)
        rows = self.eval_batch(option.batch) * self.rows_per_example
        evaluation = Pass(rows, option.length, EVALUATION, self.sites(rows, option.length), option.chunk)
        return self._rehearsed(away, training, self.trained), self._rehearsed(away, evaluation, None)

    def _rehearsed(self, away: bool, wanted: Pass, trained: Trained | None) -> Activations:
        key = (away, wanted, trained)
        if key not in self._passes:
            if away not in self._rehearsals:
                self._rehearsals[away] = Rehearsal(
                    copy.deepcopy(self.module),
                    self.model_config,
                    self.kind,
                    self.anatomy,
                    self.bits,
                    self.compute,
                    self.device,
                    away,
                )
            self._passes[key] = self._rehearsals[away].run(wanted, trained)
        return self._passes[key]


class _Named(NamedTuple):
    """What `resolve_targets` asks of a model."""

    linears: Mapping[str, Any]
    block_prefix: str
    config: Any


# ---------------------------------------------------------------------------------------- one option


def _evaluate(task: _Task, option: _Option, gives_back: bool) -> Plan:
    """The ledger of one configuration, with as many blocks on the device as fit."""
    training, evaluation = task.passes(option)
    worst = max(training, evaluation, key=lambda one: one.peak_bytes)
    scratch = {k: max(training.scratch.get(k, 0), evaluation.scratch.get(k, 0)) for k in training.scratch}
    activations = _owned(worst.worst)
    if sum(activations.values()) + sum(scratch.values()) < LOADING_BYTES:
        activations = {"loading": LOADING_BYTES - sum(scratch.values())}
    streamed = option.place != "resident"
    sizes = task.block_bytes(streamed)
    outside = sum(task.anatomy.outside.values())
    away = sum(task.anatomy.away.values()) if streamed else 0
    adapters = task.adapter_bytes()
    device = {
        "framework": CONTEXT_BYTES if task.device == "cuda" else task.framework,
        "embeddings_and_head": outside - away,
        "small_parameters": task.anatomy.small_bytes,
        "adapters": adapters,
        "noise": adapters + task.weight_noise_bytes(),
        "scratch": sum(scratch.values()),
        **activations,
    }
    host = {"curvature": task.curvature_bytes(), "noise": 2 * adapters}
    if task.device == "cpu" and not gives_back:
        device["heap"] = int(HEAP_SHARE * (sum(activations.values()) + sum(scratch.values())))
    kept = len(sizes)
    slots = 0
    if streamed:
        kept, slots = _kept(
            task, sizes, sum(device.values()) + (sum(host.values()) if task.device == "cpu" else 0)
        )
        away_blocks = sorted(sizes, reverse=True)[: len(sizes) - kept]
        device["block_slots"] = slots
        device["resident_blocks"] = sum(sizes) - sum(away_blocks)
        if option.place == "host":
            host["pinned_host"] = sum(away_blocks) + away
        elif task.device == "cuda":
            host["prefetch_buffers"] = slots
    else:
        device["resident_blocks"] = sum(sizes)
    moved = sum(sorted(sizes, reverse=True)[: len(sizes) - kept]) if streamed else 0
    disk = {"changed_blocks": moved} if option.place == "disk" and task.in_weights else {}
    ledger = _ledger(task, device, host, disk)
    host_budget = task.budgets.host_bytes if task.device == "cuda" else None
    fits = _within(ledger.device_bytes, task.budgets.device_bytes) and _within(ledger.host_bytes, host_budget)
    return Plan(
        fits=fits,
        ledger=ledger,
        residency=option.place,
        blocks=len(sizes),
        blocks_on_device=kept,
        batch_size=option.batch,
        eval_batch_size=task.eval_batch(option.batch),
        max_length=option.length,
        branch_chunk=option.chunk,
        device_type=task.device,
        device_budget_bytes=task.budgets.device_bytes,
        host_budget_bytes=host_budget,
        gives_back=gives_back,
        moments=training.moments,
        moved_bytes=moved,
        bounds=_bounds(task, option, moved),
        unaccounted=_unaccounted(task),
    )


def _within(size: int, budget: int | None) -> bool:
    return budget is None or size <= budget


def _owned(worst: Mapping[str, int]) -> dict[str, int]:
    names = {"between": "between_blocks"}
    return {names.get(owner, owner): size for owner, size in worst.items() if size}


def _ledger(task: _Task, device: dict[str, int], host: dict[str, int], disk: dict[str, int]) -> Ledger:
    """On a CPU everything is in one memory."""
    if task.device == "cuda":
        host["framework"] = CUDA_HOST_BYTES
        return Ledger(device, host, disk)
    for owner, size in host.items():
        device[owner] = device.get(owner, 0) + size
    return Ledger(device, {}, disk)


def _kept(task: _Task, sizes: Sequence[int], taken: int) -> tuple[int, int]:
    """(blocks that may stay on the device, bytes of the slots), as `stream/residency.py` decides it."""
    largest = max(sizes, default=0)
    budget = task.budgets.device_bytes
    slots = min(2, len(sizes)) * largest
    if budget is None or task.config.residency != "auto":
        return 0, slots
    free = budget - taken
    if sum(sizes) <= free:
        return len(sizes), 0
    return max(0, min(len(sizes) - 2, (free - slots) // max(largest, 1))), slots


def _unaccounted(task: _Task) -> tuple[str, ...]:
    found = list(task.anatomy.unaccounted)
    found.append("the task's data and the tokenizer")
    if task.device == "cuda":
        found.append("fragmentation of the device allocator; the context is a typical value, not measured")
    if task.config.task not in ("lm", "chat") and task.config.max_length:
        found.append("logits of answers with more than one token")
    return tuple(found)


# --------------------------------------------------------------------------------------------- speed


def _bounds(task: _Task, option: _Option, moved: int) -> dict[str, float]:
    """Least seconds of a step, by what takes them; empty where no rates are known."""
    machine = task.hardware
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(task.compute, "float32")
    rate = machine.rate(name) if machine else None
    if machine is None or rate is None:
        return {}
    branches, rows = task.branches(), option.batch * task.rows_per_example
    tokens = branches.count * rows * option.length
    elements = task.anatomy.parameters
    heads = sum(math.prod(x.shape) for x in task.anatomy.linears if x.block is None)
    operations = 2 * tokens * elements + 2 * branches.count * task.sites(rows, option.length) * heads
    if task.in_weights:
        trained = sum(shape.numel() for shape in task.shapes.values())
        operations += 2 * 2 * branches.pairs * rows * option.length * trained
    chunks = -(-rows // _together(task, option))
    packed = sum(task.block_bytes(False))
    unpacked = elements * task.compute.itemsize
    bounds = {
        "products": operations / rate,
        "unpacking": chunks * (packed + 2 * unpacked) / machine.device_bandwidth,
    }
    if task.in_weights:  # drawn in every chunk and for the update: written and read once, in float32
        bounds["noise"] = (chunks + 1) * 8 * elements / machine.device_bandwidth
    if moved:
        both = 2 if task.in_weights else 1
        if task.device == "cuda":
            bounds["host_to_device"] = both * moved / machine.host_to_device
        if option.place == "disk":
            bounds["disk"] = both * moved / machine.disk
    return bounds


def _together(task: _Task, option: _Option) -> int:
    """Rows that go through a block together."""
    rows = option.batch * task.rows_per_example
    count = task.branches().count
    return plan_chunks(option.chunk, rows, option.length, count, task.device, task.in_weights).rows


# -------------------------------------------------------------------------------------------- choice


def _choose(task: _Task, choose_batch: bool) -> Plan:
    most = task.hardware.batch_size if task.hardware else None
    batches = [batch for batch in _BATCHES if batch <= (most or LARGEST_BATCH)]
    if not choose_batch:
        batches = [task.config.batch_size]
    tried: list[Plan] = []
    for batch in batches:
        plans = [
            _best(task, _Option(place, batch, task.config.max_length, "auto")) for place in _places(task)
        ]
        tried += plans
        fitting = [plan for plan in plans if plan.fits]
        if fitting:
            best = min(fitting, key=_slowness)
            return replace(best, why=_reasons(task, best, plans, choose_batch))
    closest = min(tried, key=lambda plan: (_excess(plan), plan.peak_bytes))
    nearest = _nearest(task, closest)
    return replace(closest, nearest=nearest, why=_refusal(task, closest, nearest))


def _best(task: _Task, option: _Option) -> Plan:
    """The configuration with the largest chunk that fits; the smallest where none does."""
    chunks: list[int | Literal["auto"]] = [task.config.branch_chunk]
    has_budget = task.budgets.device_bytes is not None
    if task.config.branch_chunk == "auto" and has_budget and _may_fit(task, option):
        rows = _together(task, option)  # the same for a step, and less for an evaluation
        while rows >= 1:
            chunks.append(rows)
            rows //= 2
    plan = None
    for chunk in chunks:
        plan = _evaluate(task, option._replace(chunk=chunk), gives_back=has_budget)
        if plan.fits:
            break
    assert plan is not None
    return plan


def _may_fit(task: _Task, option: _Option) -> bool:
    """Whether the weights leave room for a pass: else smaller chunks and batches need not be looked at."""
    budget = task.budgets.device_bytes or 0
    sizes = task.block_bytes(option.place != "resident")
    if option.place == "host" and sum(sizes) > budget + (task.budgets.host_bytes or math.inf):
        return False
    held = sum(sizes) if option.place == "resident" else 2 * max(sizes, default=0)
    outside = sum(task.anatomy.outside.values()) if option.place == "resident" else 0
    return held + outside + (task.framework if task.device == "cpu" else CONTEXT_BYTES) < budget


def _places(task: _Task) -> Iterator[Place]:
    """Residencies that are possible, the fastest first."""
    wanted = task.config.residency
    if wanted == "auto" and task.hardware is not None:
        wanted = task.hardware.residency
    if wanted == "disk" and not task.can_stream:
        raise UserError(
            f"--residency: got disk, but its blocks cannot be streamed as they are stored; {_remedy(task)}"
        )
    if wanted != "auto":
        yield wanted
        return
    yield "resident"
    if task.budgets.device_bytes is None:
        return
    if task.device == "cuda":
        yield "host"
    if task.can_stream:
        yield "disk"


def _slowness(plan: Plan) -> tuple[float, int, int]:
    """What decides between plans that fit: time, then bytes moved, then small chunks."""
    order = ("resident", "host", "disk").index(plan.residency)
    return (plan.seconds_lower_bound or 0.0, plan.moved_bytes, order)


def _excess(plan: Plan) -> int:
    over = max(0, plan.peak_bytes - (plan.device_budget_bytes or plan.peak_bytes))
    host = plan.ledger.host_bytes
    return over + max(0, host - (plan.host_budget_bytes or host))


def _reasons(task: _Task, best: Plan, plans: Sequence[Plan], choose_batch: bool) -> str:
    """Why this one."""
    if best.device_budget_bytes is None:
        return "no budget was given: all blocks stay on the device"
    parts = []
    for plan in plans:
        if plan.residency == best.residency:
            break
        if not plan.fits:
            parts.append(f"{plan.residency} needs {_needs(plan)}")
    parts.append(
        f"{best.settings()}: {format_bytes(best.peak_bytes)} of {format_bytes(best.device_budget_bytes)}"
    )
    if best.branch_chunk != task.config.branch_chunk:
        parts.append("smaller chunks than usual, so that it fits: every weight is unpacked more often")
    most = (task.hardware.batch_size if task.hardware else None) or LARGEST_BATCH
    if choose_batch and best.batch_size < most:
        parts.append(f"batch {2 * best.batch_size} does not fit")
    return "; ".join(parts)


def _needs(plan: Plan) -> str:
    """The budget that is exceeded."""
    if _within(plan.peak_bytes, plan.device_budget_bytes):
        return (
            f"{format_bytes(plan.ledger.host_bytes)} of the host, of {format_bytes(plan.host_budget_bytes)}"
        )
    return f"{format_bytes(plan.peak_bytes)} of {format_bytes(plan.device_budget_bytes)}"


def _nearest(task: _Task, plan: Plan) -> Plan | None:
    """The first change that makes it fit: residency, batch, length; None where none does."""
    places = [plan.residency]
    if task.config.residency != "auto":
        places += [
            place for place in ("host", "disk") if place != plan.residency and _is_possible(task, place)
        ]
    batch, length = plan.batch_size, plan.max_length
    places = [place for place in places if _may_fit(task, _Option(place, 1, length, 1))]
    while places:
        for place in places:
            found = _best(task, _Option(place, batch, length, "auto"))
            if found.fits:
                return replace(found, why=f"fits with {found.settings()}")
        if batch > 1:
            batch //= 2
        elif length > 32:
            length //= 2
        else:
            break
    return None


def _is_possible(task: _Task, place: str) -> bool:
    return task.can_stream if place == "disk" else task.device == "cuda"


def _refusal(task: _Task, plan: Plan, nearest: Plan | None) -> str:
    """What is missing, and what would make it fit."""
    parts = [f"{plan.settings()} needs {_needs(plan)}"]
    if nearest is not None:
        parts.append(f"{nearest.settings()} fits, with {format_bytes(nearest.peak_bytes)}")
    else:
        parts.append("not even one short row fits")
    if not task.can_stream:
        parts.append(_remedy(task))
    parts.append(f"as it is, a budget of {format_bytes(plan.peak_bytes)} is needed")
    return "; ".join(parts)


def _remedy(task: _Task) -> str:
    """What makes a checkpoint streamable."""
    if task.needs_own_scales and task.outline.bits is not None:
        return (
            "to train the weights of a streamed model they must be quantized with --no-double-quant, "
            "or use --dense-update residual"
        )
    bits = "nf4" if task.bits == "none" else task.bits
    more = " --no-double-quant" if task.needs_own_scales else ""
    return (
        "quantize it once, its blocks can then be streamed from disk: hizoo-lite quantize --model "
        f"{task.config.model} --bits {bits}{more} --out DIR"
    )


def _unknown(config: TrainConfig, outline: Outline, reason: str) -> Plan:
    """What can be said about an architecture that transformers does not know: the size of its files."""
    weights = sum(form.nbytes for form in outline.forms.values())
    return Plan(
        fits=False,
        ledger=Ledger({"resident_blocks": weights}),
        residency="resident",
        blocks=0,
        blocks_on_device=0,
        batch_size=config.batch_size,
        eval_batch_size=config.eval_batch_size,
        max_length=config.max_length,
        branch_chunk=config.branch_chunk,
        device_type=config.device,
        device_budget_bytes=None,
        host_budget_bytes=None,
        gives_back=False,
        why=f"it cannot be planned: {reason}",
        unaccounted=(f"{reason}: everything but the bytes of its tensors", *outline.unaccounted),
    )
