"""`hizoo-lite eval`: loss and metric of a model, with or without an adapter, on a task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hizoo_lite.cli.options import DeviceBudget, Onnx, Profile, Residency, of_profile, refuse_with_onnx
from hizoo_lite.config import refuse
from hizoo_lite.errors import UserError
from hizoo_lite.extras import need
from hizoo_lite.units import counted

if TYPE_CHECKING:
    from hizoo_lite.train.progress import Progress

#: Flags of our own tasks, and of other kinds of models.
_NOT_OF_THE_HARNESS = ("onnx", "split", "task", "data", "kind", "seed")


def command(
    model: Annotated[
        str | None, typer.Option(help="folder or hub id; without it the one the adapter was made for")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="RUN", help="run folder, or a PEFT adapter's")
    ] = None,
    onnx: Onnx = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="built-in task, a task's .toml, or a form; default: the run's, else auto"),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="file, folder or hub data set, one for each task; default: the run's"),
    ] = None,
    split: Annotated[
        Literal["train", "dev", "test", "all"] | None,
        typer.Option(
            help="which part of it (default: test; all rows of a single file that --data names)",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[str | None, typer.Option(metavar="nf4|fp4|int8|none", help="stored form")] = None,
    kind: Annotated[str | None, typer.Option(metavar="auto|causal|masked|classifier")] = None,
    compute_dtype: Annotated[str | None, typer.Option(metavar="auto|bf16|fp16|float32")] = None,
    device: Annotated[str | None, typer.Option(metavar="auto|cpu|cuda|cuda:N")] = None,
    residency: Residency = None,
    device_budget: DeviceBudget = None,
    profile: Profile = None,
    max_length: Annotated[int | None, typer.Option(help="tokens of a prompt and its answer")] = None,
    batch_size: Annotated[int | None, typer.Option(help="examples of a batch")] = None,
    examples: Annotated[
        int | None, typer.Option(min=1, help="evaluate this many of the part at most")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="of the splits")] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            metavar="TASKS",
            help="tasks of lm-evaluation-harness, with commas, or its YAML files, in place of --task",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON, nothing else")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="plain lines in place of a progress bar")] = False,
) -> None:
    """Evaluate a model on a task. With the adapter of a run, its settings are the defaults.

    The splits are those of a training run with the same seed, so that a run's test examples stay unseen.
    Exit code 1 if the loss is not a finite number.

    Examples:

    hizoo-lite eval --model models/opt-125m --task sst2 --data data/sst2

    hizoo-lite eval --adapter runs/sst2 --json

    hizoo-lite eval --onnx exports/sst2 --adapter sst2 --task sst2 --data data/sst2

    hizoo-lite eval --model models/smollm2 --lm-eval arc_easy,hellaswag --examples 100
    """
    flags = {
        "model": model,
        "task": task,
        "data": data,
        "bits": bits,
        "kind": kind,
        "compute_dtype": compute_dtype,
        "device": device,
        "residency": residency,
        "device_budget": device_budget,
        "max_length": max_length,
        "eval_batch_size": batch_size,
        "seed": seed,
    }
    from hizoo_lite.cli import progress
    from hizoo_lite.train.evaluate import check_result

    given = {name: value for name, value in flags.items() if value not in (None, [])}
    if lm_eval is not None:
        _refuse_with_harness({"onnx": onnx, "split": split, **given})
        _harness(lm_eval.split(","), adapter, of_profile(profile, given) | given, examples, json)
        return
    shown = progress.display(quiet)
    if onnx is not None:
        refuse_with_onnx(given if profile is None else {**given, "profile": profile})
        part, result = _of_export(Path(onnx), adapter, given, split, examples, shown)
    else:
        part, result = _of_model(adapter, of_profile(profile, given) | given, split, examples, shown)
    _print(result, part, json)
    check_result(result)


def _of_export(
    folder: Path,
    adapter: str | None,
    given: dict[str, Any],
    split: str | None,
    examples: int | None,
    shown: Progress,
) -> tuple[str, dict[str, Any]]:
    """Which part of the data it is, and what an exported model comes to there."""
    from hizoo_lite.edge.answer import eval_config, evaluate_export
    from hizoo_lite.train import components, provenance

    config = eval_config(folder, adapter, given)
    part = components.which_part(split, config, components.task_of(config), names_data="data" in given)
    if line := provenance.trained_on_line(adapter, config, part, split):
        shown.message(line)
    return part, evaluate_export(folder, adapter, config, part, examples, shown)


def _of_model(
    adapter: str | None, given: dict[str, Any], split: str | None, examples: int | None, shown: Progress
) -> tuple[str, dict[str, Any]]:
    """Which part of the data it is, and what a model comes to there; what is cheap is checked first."""
    from hizoo_lite.train import components, preflight, provenance

    config = provenance.eval_config(adapter, given)
    preflight.check_adapter(adapter)
    names_data = "data" in given
    with _paths_of_a_run(None if names_data else adapter):
        task = preflight.check_inputs(config)
    part = components.which_part(split, config, task, names_data=names_data)
    if adapter and (line := provenance.trained_on_line(adapter, config, part, split)):
        shown.message(line)
    from hizoo_lite.cli import output

    output.say_loading()
    from hizoo_lite.train import saved

    return part, saved.evaluated(config, adapter, part, examples, shown)


def _print(result: dict[str, Any], part: str, json: bool) -> None:
    """The scores; a share of right answers with its error bar."""
    from hizoo_lite.cli import output
    from hizoo_lite.report import verdict

    if json:
        output.print_json(result)
        return
    bar = verdict.bar_of(result["scores"], result["metric"], result["examples"])
    bars = {result["metric"]: f" {bar}"} if bar else {}
    rows = [
        [name, output.score(name, float(value)) + bars.get(name, "")]
        for name, value in result["scores"].items()
    ]
    examples = counted(result["examples"], "example" if part == "all" else f"{part} example")
    output.print_table(f"{result['model']} on {result['task']}, {examples}", ["score", "value"], rows)


def _refuse_with_harness(given: dict[str, Any]) -> None:
    """UserError for flags of our own tasks, and of other kinds of models, beside --lm-eval."""
    odd = {name: given.get(name) for name in _NOT_OF_THE_HARNESS}
    refuse([f"--{n}: got {v!r}, not allowed with --lm-eval" for n, v in odd.items() if v is not None])


def _harness(
    tasks: list[str], adapter: str | None, given: dict[str, Any], limit: int | None, json: bool
) -> None:
    """The results of lm-evaluation-harness."""
    need("lm_eval", "lm-eval", "--lm-eval")
    from hizoo_lite.cli import output
    from hizoo_lite.integrations.lm_eval import HiZOOLM, evaluated

    model = HiZOOLM(given.pop("model", None), adapter, given.pop("eval_batch_size", None), **given)
    found = evaluated(model, [task.strip() for task in tasks], limit)
    if json:
        output.print_json(found)
        return
    rows = [
        [task, name.replace(",none", ""), output.number(value)]
        for task, scores in found.items()
        for name, value in scores.items()
        if isinstance(value, float)
    ]
    output.print_table(f"{model.model.source}, lm-evaluation-harness", ["task", "score", "value"], rows)


@contextmanager
def _paths_of_a_run(run: str | None) -> Iterator[None]:
    """If a run's data are not found, the reason is told too: paths are those of where it was begun."""
    try:
        yield
    except UserError as error:
        if run is None or "no such file or folder" not in str(error):
            raise
        raise UserError(
            f"{error}: {run} names it as seen from where the run was begun; allowed: the same command there, "
            "or --data"
        ) from error
