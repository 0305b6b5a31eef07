"""Predict the memory of a run from headers alone, and choose the fastest configuration that fits.

    plan_run(config, Checkpoint.open(folder), kind)

What is held (weights, adapters, Sigma, noise) is added up from shapes; what a pass makes is found by
running it on the meta device (`dry_run.py`). The framework is this process's own anonymous memory
after the imports if a run is planned for this machine, a constant for another one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from hizoo_lite import philox
from hizoo_lite.base import ModelKind
from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.config import TrainConfig
from hizoo_lite.device import CONTEXT_BYTES
from hizoo_lite.engine.chunks import MOST_SLICES, Chunks, plan_chunks
from hizoo_lite.errors import UserError
from hizoo_lite.memory.limits import Place
from hizoo_lite.plan.dry_run import Activations, Held
from hizoo_lite.plan.hardware import Hardware
from hizoo_lite.plan.inventory import Inventory
from hizoo_lite.plan.ledger import Ledger
from hizoo_lite.plan.plan import Plan
from hizoo_lite.plan.subject import Option, Subject, Unknown
from hizoo_lite.plan.workload import ONE_ROW, Workload
from hizoo_lite.units import format_bytes

#: CUDA's libraries on the host. Not measured by this project yet; typical of CUDA 12.
CUDA_HOST_BYTES = 1200 << 20
#: The two buffers of `Checkpoint.verify`, on the host.
LOADING_BYTES = 16_000_000
#: Share of what a pass makes that glibc holds beside it if it keeps freed memory; measured: 0.2 to 0.6.
HEAP_SHARE = 0.5
#: Largest batch that is chosen if none is asked for.
LARGEST_BATCH = 16
#: What is tried if a batch is chosen.
_BATCHES = (16, 8, 4, 2, 1)


#: What a Hugging Face model may raise on tensors without memory, if its forward looks at values.
_DRY_RUN_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError)


class CannotPlan(UserError):
    """The model cannot be run on tensors without memory."""


def plan_run(
    config: TrainConfig,
    checkpoint: Checkpoint | Inventory,
    kind: ModelKind,
    workload: Workload = ONE_ROW,
    *,
    hardware: Hardware | None = None,
    choose_batch: bool = False,
    framework: int | None = None,
) -> Plan:
    """Plan a run. Without a budget everything fits and the blocks are resident.

    workload: what the examples make, and the longest of them, in place of the configuration's `max_length`.
    hardware: the machine, with its budgets and rates; None is this one, without rates. choose_batch: take the
    largest batch that fits, up to 16, in place of the configuration's. framework: bytes of the imported
    libraries, measured if it is None.

    Raises `UserError` for bits, targets and residencies that contradict the checkpoint, and its `CannotPlan`
    for a model whose forward fails on tensors without memory. An architecture that is not known gives a plan
    that does not fit, with what is not counted.
    """
    inventory = checkpoint if isinstance(checkpoint, Inventory) else Inventory.of(checkpoint)
    try:
        return _choose(Subject(config, inventory, kind, workload, hardware, framework), choose_batch)
    except Unknown as error:
        return _unknown(config, inventory, str(error))
    except UserError:
        raise
    except _DRY_RUN_ERRORS as error:
        raise CannotPlan(
            f"{inventory.folder}: cannot be planned: its forward fails on tensors without memory ({error}); "
            "allowed: a run without a budget, which goes without a plan"
        ) from error


# ---------------------------------------------------------------------------------------- one option


def _evaluate(subject: Subject, option: Option, gives_back: bool) -> Plan:
    """The ledger of one configuration, with as many blocks on the device as fit."""
    training, evaluation = subject.passes(option)
    passes = [training, evaluation, *subject.calibration(option)]
    device, host = _beside_blocks(subject, option, passes, gives_back)
    disk = {"hidden_states": subject.hidden_bytes(option)}
    held = subject.held(option.place)
    kept, moved = len(held.block_bytes), 0
    if option.place == "resident":
        device["resident_blocks"] = sum(held.block_bytes)
    else:
        kept = _add_streamed(subject, option.place, held, device, host, disk)
        moved = held.moved_bytes(kept, subject.first if subject.features(option) else 0)
    ledger = _ledger(subject, device, host, disk)
    host_budget = subject.budgets.host_bytes if subject.device == "cuda" else None
    on_device = _within(ledger.device_bytes, subject.budgets.device_bytes)
    return Plan(
        fits=on_device and _within(ledger.host_bytes, host_budget),
        ledger=ledger,
        residency=option.place,
        blocks=len(held.block_bytes),
        blocks_on_device=kept,
        batch_size=option.batch,
        eval_batch_size=subject.eval_batch(option.batch),
        max_length=option.length,
        branch_chunk=subject.config.branch_chunk,
        chunk_halvings=option.chunk_halvings,
        device_type=subject.device,
        device_budget_bytes=subject.budgets.device_bytes,
        host_budget_bytes=host_budget,
        gives_back=gives_back,
        peaks=training.peaks,
        moved_bytes=moved,
        bounds=_bounds(subject, option, moved),
        unaccounted=_unaccounted(subject),
        assumed=_assumed(subject, option),
    )


def _beside_blocks(
    subject: Subject, option: Option, passes: Sequence[Activations], gives_back: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by category, of the device and of the host, of all but the blocks.

    passes: the first is a step's.
    """
    activations, waiting, scratch = _made(subject, passes)
    noise = subject.trained_bytes() * subject.estimator.directions_of_step
    held = subject.held(option.place).categories
    device = {
        "framework": CONTEXT_BYTES if subject.device == "cuda" else subject.framework,
        **{category: size for category, size in held.items() if category != "resident_blocks"},
        "noise": noise + subject.weight_noise_bytes(),
        "moments": subject.moments_bytes(),
        "scratch": scratch,
        **activations,
    }
    copies = 2 if subject.device == "cpu" else 3  # a GPU: and page-locked, times Sigma
    host = {"curvature": subject.curvature_bytes(), "noise": copies * noise}
    kept_inputs, metered = subject.boundaries(option)
    if subject.device == "cpu":
        device["boundaries"] = max(0, kept_inputs - metered) + waiting
        if not gives_back:
            device["heap"] = int(HEAP_SHARE * (sum(activations.values()) + scratch))
    else:
        host["boundaries"] = max(kept_inputs, *(one.worst.get("boundaries", 0) for one in passes))
        host["batch_states"] = subject.batch_bytes(option)
    return device, host


def _made(subject: Subject, passes: Sequence[Activations]) -> tuple[dict[str, int], int, int]:
    """Bytes that the largest pass makes by category; of the inputs of its blocks; and of reused buffers."""
    worst = max(passes, key=lambda one: one.peak_bytes)
    scratch = sum(max(one.scratch.get(name, 0) for one in passes) for name in passes[0].scratch)
    activations = _owned(worst.worst)
    waiting = activations.pop("boundaries", 0)
    if subject.device == "cpu" and sum(activations.values()) + scratch < LOADING_BYTES:
        activations = {"loading": LOADING_BYTES - scratch}
    return activations, waiting, scratch


def _add_streamed(
    subject: Subject,
    place: Place,
    held: Held,
    device: dict[str, int],
    host: dict[str, int],
    disk: dict[str, int],
) -> int:
    """Add the blocks to what is there, wherever they are kept; how many stay on the device."""
    sizes = held.block_bytes
    taken = sum(device.values()) + (sum(host.values()) if subject.device == "cpu" else 0)
    kept, slots = _kept(subject, sizes, taken)
    offloaded = sum(sorted(sizes, reverse=True)[: len(sizes) - kept])
    device["block_slots"] = slots
    device["resident_blocks"] = sum(sizes) - offloaded
    if place == "host":
        host["pinned_host"] = offloaded + held.offloaded_bytes
    elif subject.device == "cuda":
        host["prefetch_buffers"] = slots
    if place == "disk" and subject.in_weights:
        disk["changed_blocks"] = offloaded
    return kept


def _within(size: int, budget: int | None) -> bool:
    return budget is None or size <= budget


def _owned(worst: Mapping[str, int]) -> dict[str, int]:
    names = {"between": "between_blocks"}
    return {names.get(category, category): size for category, size in worst.items() if size}


def _ledger(subject: Subject, device: dict[str, int], host: dict[str, int], disk: dict[str, int]) -> Ledger:
    """On a CPU everything is in one memory."""
    if subject.device == "cuda":
        host["framework"] = CUDA_HOST_BYTES
        return Ledger(device, host, disk)
    for category, size in host.items():
        device[category] = device.get(category, 0) + size
    return Ledger(device, {}, disk)


def _kept(subject: Subject, sizes: Sequence[int], taken: int) -> tuple[int, int]:
    """(blocks that may stay on the device, bytes of the slots), as `engine/residency.py` decides it."""
    largest = max(sizes, default=0)
    budget = subject.budgets.device_bytes
    slots = min(2, len(sizes)) * largest
    if budget is None or subject.config.residency != "auto":
        return 0, slots
    free = budget - taken
    if sum(sizes) <= free:
        return len(sizes), 0
    return max(0, min(len(sizes) - 2, (free - slots) // max(largest, 1))), slots


def _unaccounted(subject: Subject) -> tuple[str, ...]:
    found = list(subject.held(subject.place).unaccounted)
    found.append("the task's data and the tokenizer")
    if subject.device == "cuda":
        found.append("fragmentation of the device allocator; the context is a typical value, not measured")
    if not set(subject.config.tasks) & {"lm", "chat"} and subject.workload.length is None:
        found.append("logits of answers with more than one token, and what an evaluation that writes keeps")
    return tuple(found)


def _assumed(subject: Subject, option: Option) -> tuple[str, ...]:
    """Of hidden states that are kept, if no example was seen."""
    if not subject.features(option) or subject.workload.tokens is not None:
        return ()
    longest = f"each as long as the longest, {option.length} tokens"
    return (f"hidden states are kept of {subject.examples} training examples, {longest}",)


# --------------------------------------------------------------------------------------------- speed


def _bounds(subject: Subject, option: Option, moved: int) -> dict[str, float]:
    """Least seconds of a step, by what takes them; empty if no rates are known.

    Blocks whose hidden states are kept are not run.
    """
    machine = subject.hardware
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(subject.compute, "float32")
    # a dtype that the machine has no products in takes at least the time of those that it has
    rate = (machine.rate(name) or machine.rate(machine.compute)) if machine else None
    if machine is None or rate is None:
        return {}
    branches, rows = subject.branches(), subject.rows(option.batch)
    sites = subject.sites(option.batch, subject.workload.training, option.length)
    tokens = rows * option.length
    elements, below, heads = subject.elements()
    shared = 0 if subject.features(option) else below
    operations = 2 * tokens * (branches.count * (elements - below) + shared)
    operations += 2 * branches.count * sites * heads
    if subject.in_weights:
        trained = sum(math.prod(shape) for shape in subject.shapes.values())
        operations += 2 * 2 * branches.pairs * tokens * trained
    together = _chunks(subject, option)
    chunks, chunks_below = (
        -(-rows // c.rows) for c in (together, together.of_one_branch(rows, branches.count))
    )
    packed = sum(subject.held(option.place).block_bytes)
    unpacked = elements * subject.compute.itemsize
    times = (chunks * (elements - below) + chunks_below * shared) / elements
    bounds = {
        "products": operations / rate,
        "unpacking": times * (packed + 2 * unpacked) / machine.device_bandwidth,
    }
    if subject.in_weights:  # drawn in every chunk and for the update: written and read once, in float32
        drawing = 8 if subject.device == "cpu" else 8 + philox.MOVED_BYTES
        bounds["noise"] = (chunks + 1) * drawing * elements / machine.device_bandwidth
    if moved:
        both = 2 if subject.in_weights else 1
        if subject.device == "cuda":
            bounds["host_to_device"] = both * moved / machine.host_to_device
        if option.place == "disk":
            bounds["disk"] = both * moved / machine.disk
    return bounds


def _chunks(subject: Subject, option: Option) -> Chunks:
    """How a batch is cut up inside a block that all branches go through."""
    rows = subject.rows(option.batch)
    count = subject.branches().count
    return plan_chunks(
        subject.config.branch_chunk,
        rows,
        option.length,
        count,
        subject.device,
        subject.in_weights,
        option.chunk_halvings,
    )


# -------------------------------------------------------------------------------------------- choice


def _choose(subject: Subject, choose_batch: bool) -> Plan:
    most = subject.hardware.batch_size if subject.hardware else None
    batches = [batch for batch in _BATCHES if batch <= (most or LARGEST_BATCH)]
    if not choose_batch:
        batches = [subject.config.batch_size]
    tried: list[Plan] = []
    for batch in batches:
        plans = [_best(subject, Option(place, batch, subject.length)) for place in _places(subject)]
        tried += plans
        fitting = [plan for plan in plans if plan.fits]
        if fitting:
            best = min(fitting, key=_slowness)
            return replace(best, why=_reasons(subject, best, plans, choose_batch))
    closest = min(tried, key=lambda plan: (_excess(plan), plan.peak_bytes))
    nearest = _nearest(subject, closest)
    return replace(closest, nearest=nearest, why=_refusal(subject, closest, nearest))


def _best(subject: Subject, option: Option) -> Plan:
    """The configuration with the largest chunks that fit; the smallest if none do."""
    has_budget = subject.budgets.device_bytes is not None

    def halved(times: int) -> Plan:
        return _evaluate(subject, option._replace(chunk_halvings=times), gives_back=has_budget)

    too_few, enough = 0, _chunks(subject, option).rows.bit_length() + MOST_SLICES.bit_length()
    if has_budget and not _may_fit(subject, option):
        return halved(enough)
    plan = halved(0)
    if plan.fits or not has_budget:
        return plan
    plan = halved(enough)
    if plan.fits:
        while enough - too_few > 1:
            between = (too_few + enough) // 2
            tried = halved(between)
            if tried.fits:
                plan, enough = tried, between
            else:
                too_few = between
    return plan


def _may_fit(subject: Subject, option: Option) -> bool:
    """Whether the weights leave room for a pass: else smaller chunks and batches need not be looked at."""
    budget = subject.budgets.device_bytes or 0
    sizes = subject.held(option.place).block_bytes
    if option.place == "host" and sum(sizes) > budget + (subject.budgets.host_bytes or math.inf):
        return False
    held = sum(sizes) if option.place == "resident" else 2 * max(sizes, default=0)
    outside = subject.held(option.place).categories["embeddings_and_head"]
    return held + outside + (subject.framework if subject.device == "cpu" else CONTEXT_BYTES) < budget


def _places(subject: Subject) -> Iterator[Place]:
    """Residencies that are possible, the fastest first."""
    wanted = subject.config.residency
    if wanted == "auto" and subject.hardware is not None:
        wanted = subject.hardware.residency
    if wanted == "disk" and not subject.can_stream:
        raise UserError(
            f"--residency: got disk, but its blocks cannot be streamed as they are stored; {_remedy(subject)}"
        )
    if wanted != "auto":
        yield wanted
        return
    yield "resident"
    if subject.budgets.device_bytes is None:
        return
    if subject.device == "cuda":
        yield "host"
    if subject.can_stream:
        yield "disk"


def _slowness(plan: Plan) -> tuple[float, int, int]:
    """What decides between plans that fit: time, then bytes moved, then small chunks."""
    order = ("resident", "host", "disk").index(plan.residency)
    return (plan.seconds_lower_bound or 0.0, plan.moved_bytes, order)


def _excess(plan: Plan) -> int:
    over = max(0, plan.peak_bytes - (plan.device_budget_bytes or plan.peak_bytes))
    host = plan.ledger.host_bytes
    return over + max(0, host - (plan.host_budget_bytes or host))


def _reasons(subject: Subject, best: Plan, plans: Sequence[Plan], choose_batch: bool) -> str:
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
    if best.chunk_halvings:
        parts.append("smaller chunks than usual, so that it fits: every weight is unpacked more often")
    most = (subject.hardware.batch_size if subject.hardware else None) or LARGEST_BATCH
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


def _nearest(subject: Subject, plan: Plan) -> Plan | None:
    """The first change that makes it fit: residency, batch, length; None if none does."""
    places = [plan.residency]
    if subject.config.residency != "auto":
        places += [
            place for place in ("host", "disk") if place != plan.residency and _is_possible(subject, place)
        ]
    batch, length = plan.batch_size, plan.max_length
    places = [place for place in places if _may_fit(subject, Option(place, 1, length))]
    while places:
        for place in places:
            found = _best(subject, Option(place, batch, length))
            if found.fits:
                return replace(found, why=f"fits with {found.settings()}")
        if batch > 1:
            batch //= 2
        elif length > 32:
            length //= 2
        else:
            break
    return None


def _is_possible(subject: Subject, place: str) -> bool:
    return subject.can_stream if place == "disk" else subject.device == "cuda"


def _refusal(subject: Subject, plan: Plan, nearest: Plan | None) -> str:
    """What is missing, and what would make it fit."""
    parts = [f"{plan.settings()} needs {_needs(plan)}"]
    if nearest is not None:
        parts.append(f"{nearest.settings()} fits, with {format_bytes(nearest.peak_bytes)}")
    else:
        parts.append("not even one short row fits")
    libraries = plan.ledger.device.get("framework", 0)
    if libraries > (plan.device_budget_bytes or libraries):
        parts.append(f"interpreter and libraries alone take {format_bytes(libraries)}")
    elif not subject.can_stream:
        parts.append(_remedy(subject))
    parts.append(f"as it is, a budget of {format_bytes(plan.peak_bytes)} is needed")
    return "; ".join(parts)


def _remedy(subject: Subject) -> str:
    """What makes a checkpoint streamable."""
    if subject.needs_own_scales and subject.inventory.bits is not None:
        return (
            "to train the weights of a streamed model they must be quantized with --no-double-quant, "
            "or use --dense-update residual"
        )
    bits = "nf4" if subject.bits == "none" else subject.bits
    more = " --no-double-quant" if subject.needs_own_scales else ""
    return (
        "quantize it once, its blocks can then be streamed from disk: hizoo-lite quantize --model "
        f"{subject.config.model} --bits {bits}{more} --out DIR"
    )


def _unknown(config: TrainConfig, inventory: Inventory, reason: str) -> Plan:
    """What can be said about an architecture that transformers does not know: the size of its files."""
    weights = sum(form.nbytes for form in inventory.forms.values())
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
        chunk_halvings=0,
        device_type=config.device,
        device_budget_bytes=None,
        host_budget_bytes=None,
        gives_back=False,
        why=f"it cannot be planned: {reason}",
        unaccounted=(f"{reason}: everything but the bytes of its tensors", *inventory.unaccounted),
    )
