"""`hizoo-lite plan`: whether a run fits, where every byte goes, and how fast it can be at most."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from hizoo_lite.cli.options import with_settings
from hizoo_lite.registry import SPACES
from hizoo_lite.units import format_bytes

if TYPE_CHECKING:
    from hizoo_lite.base import ModelKind
    from hizoo_lite.config import TrainConfig
    from hizoo_lite.plan.hardware import Hardware
    from hizoo_lite.plan.inventory import Inventory
    from hizoo_lite.plan.plan import Plan
    from hizoo_lite.plan.workload import Workload
    from hizoo_lite.tasks import Task


#: Settings of a run that its plan depends on.
SHARED = (
    *("model", "revision", "kind", "task", "data", "text_field", "label_field", "chat_template"),
    *("bits", "double_quant", "compute_dtype", "device", "space"),
    *("dense_update", "rank", "train_a", "targets", "blocks", "exact_blocks"),
    *("estimator", "objective", "curvature", "curvature_from"),
    *("directions", "batch_size", "eval_batch_size", "max_length", "branch_chunk", "residency"),
    *("steps", "epochs", "train_examples", "dev_examples", "test_examples", "hidden_states"),
    *("profile", "device_budget", "host_budget"),
)
#: What a few of them are to a plan, where that is something else.
_HELP = {
    "model": "folder or hub id of a Hugging Face model, of which only config.json and index are read",
    "task": "lm and chat read logits at every token, others at labels (default: sst2, with --data its form)",
    "data": "file or folder whose examples are counted and, with the tokenizer of a model's folder, encoded",
    "batch_size": "examples of a step; without it the largest that fits, up to 16",
    "profile": "machine, by the name of a hardware profile or its file; without it this one",
    "device_budget": "memory of the device that the run may take, e.g. 24GiB; without it what is free",
}


def plan(
    settings: dict[str, str | bool],
    rows_per_example: Annotated[int, typer.Option(min=1, help="token sequences of an example")] = 1,
    json: Annotated[bool, typer.Option("--json", help="print JSON, nothing else")] = False,
    out: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="a picture, one bar a residency")
    ] = None,
) -> None:
    """Predict memory and least time of a run, from a model's headers alone. Exit code 3 if nothing fits.

    Examples:

    hizoo-lite plan --model models/llama-2-7b --profile rtx4090-24gb

    hizoo-lite plan --model models/opt-13b --device-budget 8GiB --batch-size 4 --out plan.png

    hizoo-lite plan --model models/opt-1.3b --space dense --bits nf4 --profile laptop-16gb-cpu --json
    """
    from hizoo_lite.errors import BudgetError, UserError
    from hizoo_lite.train import preflight
    from hizoo_lite.train.config_file import resolve

    profile = settings.pop("profile", None)
    given = settings if "data" in settings else {"task": "sst2", **settings}
    try:
        config = resolve(None, {**given, "lr": "1e-6"})  # not every estimator has an automatic one
    except UserError:
        if "exact_blocks" not in settings:
            raise
        config = resolve(None, {**given, "lr": "auto"})  # exact gradients have no other; it does not matter
    preflight.check_model(config.model, config.revision)
    from hizoo_lite.cli import output

    output.say_loading()
    import hizoo_lite.run  # noqa: F401 - the libraries of a run are in memory when the planner counts them
    from hizoo_lite.plan.hardware import find
    from hizoo_lite.spaces.targets import names_blocks, settled

    hardware = None if profile is None else find(str(profile))
    has_budget = hardware is not None or bool(config.device_budget or config.host_budget)
    free = None if has_budget else _free(config.device)
    task = _task_of(config)
    inventory, kind = find_inventory(config, task)
    config, workload = _with_data(config, task, inventory.folder, kind, rows_per_example)
    subject = _Subject(inventory, kind, workload, hardware, free)
    found = subject.plan(config, choose_batch="batch_size" not in settings)
    exact: tuple[int, Plan] | None = None
    may = config.exact_blocks == 0 and config.is_of_loss and not names_blocks(config.targets)
    if found.fits and may and config.space in SPACES.having("exact_blocks"):
        count = settled(config.blocks, config.targets, found.blocks)  # as many as have adapters
        same = replace(config, exact_blocks=count, lr="auto", batch_size=found.batch_size)
        with suppress(UserError):  # a model whose blocks cannot have them
            exact = count, subject.plan(same)
    if json:
        output.print_json({"model": config.model, "profile": profile, **found.to_json(), **_suggested(exact)})
    else:
        budget_of = "the budget that was given" if hardware is None else hardware.name
        _print(found, config, budget_of if free is None else "this machine's free memory")
        if free is not None and found.fits and found.gives_back:
            typer.echo(f"only with a budget: --device-budget {_whole(found.device_budget_bytes)}")
        if exact is not None:
            count, other = exact
            typer.echo(
                f"with --exact-blocks {count}: {format_bytes(other.peak_bytes)}, "
                f"{'fits too' if other.fits else 'does not fit'}; exact gradients learn in a fraction of the "
                "steps, forwards alone are for runtimes without a backward pass"
            )
    if out is not None:
        _draw(Path(out), config, subject, found)
    if not found.fits:
        raise BudgetError(f"nothing fits: {found.why}")


command = with_settings(plan, SHARED, _HELP)


def _suggested(exact: tuple[int, Plan] | None) -> dict[str, Any]:
    """What a plan says of exact gradients in so many blocks."""
    if exact is None:
        return {}
    count, plan = exact
    return {"exact": {"blocks": count, "fits": plan.fits, "peak_bytes": plan.peak_bytes}}


def _task_of(config: TrainConfig) -> Task | None:
    """The task of the data, if there is any. UserError for data that is none."""
    from hizoo_lite.errors import UserError
    from hizoo_lite.train import components

    if config.data is not None:
        return components.task_of(config)
    if config.epochs is not None:
        raise UserError("--epochs: no examples to count; allowed: beside --data, or --steps")
    return None


def _with_data(
    config: TrainConfig, task: Task | None, folder: Path, kind: ModelKind, rows: int
) -> tuple[TrainConfig, Workload]:
    """The configuration with what its data says, steps and kind of task, and what its examples make.

    They are encoded as a run would, if the model's folder has a tokenizer; else, and without data, an example
    has so many `rows`, as long as the limit allows.
    """
    from hizoo_lite.plan.workload import Demand, Workload
    from hizoo_lite.tasks import forms
    from hizoo_lite.train import components, planning
    from hizoo_lite.train.tokenizing import encoder_of

    each = Demand(rows, rows)
    if task is None:
        return config, Workload(each, each)
    splits = components.run_splits(config, task)
    encoder = encoder_of(folder, kind, task, config)
    if encoder is not None:
        splits = components.usable_splits(encoder, splits, config)
    config = components.steps_of(config, splits)
    typer.echo(f"{task.name}, {splits}; {config.steps} steps", err=True)
    if few := components.few_held_out(config, splits, task.metric):
        typer.echo(few, err=True)
    config_of_task = replace(config, text_field=None, label_field=None)
    if encoder is not None:
        name = task.name if forms.is_form(config.tasks[0]) else config.task
        return replace(config_of_task, task=name), planning.workload(encoder, splits, config)
    name = config.task if task.kind != "lm" else "chat" if task.chat else "lm"
    return replace(config_of_task, task=name), Workload(each, each, examples=len(splits.train))


class _Free(NamedTuple):
    """Bytes of this machine that nothing has taken."""

    device: int
    host: int | None  # None on a CPU, whose memory is the device's


def _whole(size: int | None) -> str:
    """A budget as it is given, whole MiB of it."""
    return f"{(size or 0) >> 20}MiB"


def _free(device: str) -> _Free:
    import psutil

    from hizoo_lite.device import choose_device, is_gpu, kind_of

    host, chosen = psutil.virtual_memory().available, choose_device(device)
    return _Free(kind_of(chosen).free_bytes(chosen), host) if is_gpu(chosen) else _Free(host, None)


@dataclass(frozen=True)
class _Subject:
    """What is planned, for any configuration."""

    inventory: Inventory
    kind: ModelKind
    workload: Workload
    hardware: Hardware | None
    free: _Free | None  # if no budget was given

    def plan(self, config: TrainConfig, choose_batch: bool = False) -> Plan:
        """The plan of a run: without a budget if none was given, of what is free if that does not do.

        Without a budget a run keeps its heap and streams nothing: it may take more than it would within one.
        """
        free, found = self.free, self._plan(config, choose_batch)
        if free is None:
            return found
        host_fits = free.host is None or found.host_peak_bytes <= free.host
        if found.fits and found.peak_bytes <= free.device and host_fits:
            return replace(found, device_budget_bytes=free.device, host_budget_bytes=free.host)
        host = None if free.host is None else f"{free.host}B"
        return self._plan(replace(config, device_budget=f"{free.device}B", host_budget=host), choose_batch)

    def _plan(self, config: TrainConfig, choose_batch: bool) -> Plan:
        from hizoo_lite.plan.planner import plan_run

        return plan_run(
            *(config, self.inventory, self.kind, self.workload),
            hardware=self.hardware,
            choose_batch=choose_batch,
        )


def find_inventory(config: TrainConfig, task: Task | None) -> tuple[Inventory, ModelKind]:
    """What can be known without reading a weight: the headers of a folder, else config.json alone."""
    from hizoo_lite.checkpoints import hub
    from hizoo_lite.checkpoints.checkpoint import Checkpoint
    from hizoo_lite.errors import UserError
    from hizoo_lite.files import read_json
    from hizoo_lite.model import build, kinds
    from hizoo_lite.plan.inventory import Inventory

    source = kinds.model_path(config.model)
    folder = Path(source).expanduser()
    if not folder.exists():
        folder = hub.resolve_small(source, config.revision)
    has_weights = (folder / hub.INDEX_FILE).is_file() or (folder / hub.SINGLE_FILE).is_file()
    if has_weights and Path(source).expanduser().exists():
        checkpoint = Checkpoint.open(folder)
        return Inventory.of(checkpoint), _kind(config, checkpoint.config, task)
    content = read_json(folder / "config.json", "a JSON object, in the folder of a Hugging Face model")
    kind = _kind(config, content, task)
    try:
        module = build.build(build.read_config(folder, kind, 2), kind)
    except UserError:  # the planner says what it does not know
        return Inventory(folder, content, {}, None), kind
    return Inventory.of_shapes(folder, content, module), kind


def _kind(config: TrainConfig, content: Any, task: Task | None) -> ModelKind:
    from hizoo_lite.model.kinds import kind_of

    return kind_of(content, config.model, task) if config.kind == "auto" else config.kind


def _print(plan: Plan, config: TrainConfig, budget_of: str) -> None:
    from hizoo_lite.cli import output
    from hizoo_lite.units import format_bytes

    typer.echo(f"{config.model}: {config.space}, {plan.settings()}")
    verdict = "fits" if plan.fits else "does not fit"
    output.print_table(f"{verdict}: {budget_of}", ["category", "size", "what it is"], plan.table())
    typer.echo(f"why: {plan.why}")
    if plan.seconds_lower_bound is not None:
        parts = ", ".join(f"{name.replace('_', ' ')} {value:.3g} s" for name, value in plan.bounds.items())
        typer.echo(f"a step takes at least {plan.seconds_lower_bound:.3g} s: {parts}")
    else:
        typer.echo(
            "no times: this machine's rates are not known; hizoo-lite doctor --measure --out here.toml has "
            "them for --profile here.toml"
        )
    if plan.moved_bytes:
        typer.echo(f"moved to the device each step: {format_bytes(plan.moved_bytes)}")
    for text in plan.assumed:
        typer.echo(f"assumed: {text}")
    for text in plan.unaccounted:
        typer.echo(f"not counted: {text}")


def _draw(path: Path, config: TrainConfig, subject: _Subject, plan: Plan) -> None:
    """One bar for each residency that is possible with the batch of the plan."""
    if plan.blocks == 0:
        return
    sized = replace(config, batch_size=plan.batch_size, eval_batch_size=plan.eval_batch_size)
    places = ["resident", *(["host"] if plan.device_type == "cuda" else [])]
    bits = config.bits or subject.inventory.bits
    if (subject.inventory.bits or "none") == (bits or "nf4"):
        places.append("disk")
    bars = {}
    for place in places:
        one: Any = place
        bars[place] = subject.plan(replace(sized, residency=one))
    from hizoo_lite.plan import picture  # it imports matplotlib, which would count in the plans

    picture.draw(path, config.model, plan, bars)
    typer.echo(f"wrote {path}", err=True)
