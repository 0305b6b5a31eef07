"""`hizoo-lite export`: what a run has made, in the format of another program.

One function for each target, in one table. The keyword arguments of a function are the options of its target.
"""

from __future__ import annotations

import inspect
import math
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from hizoo_lite.config import one_or_several, refuse
from hizoo_lite.train.config_file import flag
from hizoo_lite.units import format_bytes

if TYPE_CHECKING:
    from hizoo_lite.base import Bits, ModelKind
    from hizoo_lite.config import TrainConfig
    from hizoo_lite.export.merged import Dtype
    from hizoo_lite.export.onnx.export import MergedDtype
    from hizoo_lite.export.onnx.linear import Format


#: Below this share of places with the model's choice, an export is to be evaluated anew.
_LEAST_SAME_CHOICE = 0.9


class Exported(NamedTuple):
    """What the command prints: figures with --json, else the line."""

    figures: dict[str, Any]
    line: str


def _peft(run: str, out: str, quiet: bool, *, model: str | None = None) -> Exported:
    """An adapter's folder for PEFT."""
    from hizoo_lite.checkpoints.adapter import read_peft_config
    from hizoo_lite.export import peft

    folder = peft.export(run, out, model=model)
    config = read_peft_config(folder)
    base, rank = config["base_model_name_or_path"], config["r"]
    size = sum(path.stat().st_size for path in folder.iterdir())
    figures = {"model": base, "rank": rank, "bytes": size}
    return Exported(figures, f"{out}: PEFT adapter of rank {rank} for {base}; README.md says how to load it")


def _onnx(
    run: str,
    out: str,
    quiet: bool,
    *,
    name: str | None = None,
    format: Format | None = None,
    merge: bool = False,
    dtype: MergedDtype | None = None,
    base_bits: Bits | None = None,
    model: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """A base for onnxruntime with one more adapter, or a model with what was tuned in its weights."""
    from hizoo_lite.cli import progress
    from hizoo_lite.export.onnx.export import export_onnx

    shown = progress.display(quiet)
    export = export_onnx(
        run,
        out,
        name=name,
        format=format,
        merge=merge,
        dtype=dtype,
        base_bits=base_bits,
        model=model,
        overwrite=overwrite,
        progress=shown,
    )
    record, check = export.record, export.record["check"]
    size = sum(about["bytes"] for about in record["model"]["files"].values())
    far = check["same_choice"] < _LEAST_SAME_CHOICE
    warning = "; WARNING: this is not the model that was tuned any more, evaluate it" if far else ""
    named = f"adapters {', '.join(export.adapters)}" if record["form"] == "base" else record["form"]
    return Exported(
        record,
        f"{out}: {export.kind}, {record['bits']}, {format_bytes(size)}, {named}; logits within "
        f"{check['max_abs_difference']:.1e} of the model's, {check['mean_abs_difference']:.1e} in the mean, "
        f"the same choice at {100 * check['same_choice']:.1f} % of the places{warning}",
    )


def _merged(
    run: str,
    out: str,
    quiet: bool,
    *,
    model: str | None = None,
    base_bits: Bits | None = None,
    base_double_quant: bool | None = None,
    dtype: Dtype = "bf16",
    bits: Bits = "none",
    double_quant: bool = True,
) -> Exported:
    """A plain Hugging Face folder."""
    from hizoo_lite.cli import progress
    from hizoo_lite.export import merged

    began = time.perf_counter()
    work = merged.prepare(
        run,
        out,
        model=model,
        base_bits=base_bits,
        base_double_quant=base_double_quant,
        dtype=dtype,
        bits=bits,
        double_quant=double_quant,
    )
    form = dtype if bits == "none" else f"{bits} ({dtype} beside it)"
    figures, line = progress.write_checkpoint(work, out, form, "merge", began, quiet)
    about = {"kind": work.kind, "dtype": dtype, "bits": bits, "double_quant": work.double_quant}
    return Exported({**about, **figures}, line)


def _onnx_train(
    run: str, out: str, quiet: bool, *, fresh: bool = False, model: str | None = None
) -> Exported:
    """A graph of the run's losses, for training beside onnxruntime."""
    from hizoo_lite.cli import progress
    from hizoo_lite.export.onnx_train.export import export_train

    record = export_train(run, out, fresh=fresh, model=model, progress=progress.display(quiet))
    count = sum(math.prod(parameter["shape"]) for parameter in record["parameters"] if parameter["trained"])
    worst = record["check"]["max_abs_difference"]
    return Exported(
        record,
        f"{out}: {record['kind']}, {record['bits']}, {count:,} trainable parameters; losses within "
        f"{worst:.1e} of the model's",
    )


def _gguf(
    run: str,
    out: str,
    quiet: bool,
    *,
    merge: bool = False,
    dtype: Dtype | None = None,
    base_bits: Bits | None = None,
    model: str | None = None,
) -> Exported:
    """An adapter, or the merged model, for llama.cpp and Ollama."""
    from hizoo_lite.cli import progress
    from hizoo_lite.export.gguf.export import export_gguf

    written = export_gguf(
        run,
        out,
        merge=merge,
        dtype=dtype,
        base_bits=base_bits,
        model=model,
        progress=progress.display(quiet),
    )
    figures = {
        "file": written.path.name,
        "architecture": written.architecture,
        "tensors": written.tensors,
        "bytes": written.nbytes,
    }
    how = f"ollama create NAME -f {written.path.parent / 'Modelfile'}"
    size = format_bytes(written.nbytes)
    return Exported(
        figures, f"{written.path}: {written.architecture}, {written.tensors} tensors, {size}; {how}"
    )


TARGETS: dict[str, Callable[..., Exported]] = {
    "peft": _peft,
    "onnx": _onnx,
    "onnx-train": _onnx_train,
    "merged": _merged,
    "gguf": _gguf,
}

#: The flag by which `generate` and `eval` are given what was written.
_GIVEN_BY = {"peft": "--adapter", "merged": "--model", "onnx": "--onnx"}
#: Targets that the Hub takes as they are.
_PUSHED = ("peft", "merged", "gguf")


def command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="run folder, or a PEFT adapter's")],
    to: Annotated[str, typer.Option("--to", metavar="|".join(TARGETS), help="format")],
    out: Annotated[str, typer.Option(metavar="DIR", help="new folder; of onnx, also one with the same base")],
    name: Annotated[str | None, typer.Option(help="onnx: of the adapter (default: the run folder's)")] = None,
    format: Annotated[
        Literal["exact", "fast"] | None,
        typer.Option(
            help="onnx: products of quantized weights; exact (default) is what was tuned; fast codes "
            "4-bit weights anew and rounds activations to 8 bits, and its error is measured"
        ),
    ] = None,
    merge: Annotated[
        bool | None,
        typer.Option("--merge", help="onnx, gguf: fold the adapter into weights of 16 or 32 bits"),
    ] = None,
    fresh: Annotated[
        bool | None, typer.Option("--fresh", help="onnx-train: begin with new parameters, not the run's")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="folder or hub id of the base (default: the run's)")
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp16", "float32"] | None,
        typer.Option(help="merged, onnx or gguf --merge: of what is written"),
    ] = None,
    bits: Annotated[
        Literal["nf4", "fp4", "int8"] | None, typer.Option(help="merged: quantize the result again")
    ] = None,
    double_quant: Annotated[
        bool | None,
        typer.Option("--double-quant/--no-double-quant", help="merged: of --bits nf4 and fp4"),
    ] = None,
    base_bits: Annotated[
        Literal["nf4", "fp4", "int8", "none"] | None,
        typer.Option(
            help="merged, onnx, gguf: how a base in 16 bits was quantized on loading (default: the run's)"
        ),
    ] = None,
    base_double_quant: Annotated[
        bool | None,
        typer.Option("--base-double-quant/--no-base-double-quant", help="merged: of --base-bits"),
    ] = None,
    overwrite: Annotated[
        bool | None,
        typer.Option("--overwrite", help="onnx: replace the adapter of that --name, if DIR has one"),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="ORG/NAME", help="peft, merged, gguf: upload it to the Hub, for oneself"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON, nothing else")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="plain lines in place of a progress bar")] = False,
) -> None:
    """Export a run: for PEFT, onnxruntime (to answer or to train on), llama.cpp, or as one merged model.

    onnx: the base keeps its quantized weights and is compared with the model before it is left behind; if
    DIR has the same base already, the adapter alone is added. onnx-train: a graph of the run's losses, from
    which `python -m hizoo_lite.edge train DIR` tunes further on a device. merged: a Hugging Face folder with
    the adapter in the weights that it was tuned on, those of the quantized base (not the 16-bit ones that
    this was made from); an interrupted call goes on where it stopped when it is repeated. gguf: the adapter,
    or with --merge the model, for llama.cpp, and a Modelfile for Ollama.

    Examples:

    hizoo-lite export runs/sst2 --to peft --out adapters/sst2

    hizoo-lite export runs/sst2 --to peft --out adapters/sst2 --push me/opt-125m-sst2

    hizoo-lite export runs/sst2 --to onnx --out onnx/opt-125m

    hizoo-lite export runs/rte --to onnx --out onnx/opt-125m --name rte

    hizoo-lite export runs/sst2 --to onnx --out onnx/merged --merge --dtype float32

    hizoo-lite export runs/sst2 --to onnx-train --out onnx/opt-125m-train

    hizoo-lite export runs/sst2 --to merged --out models/opt-125m-sst2 --dtype bf16

    hizoo-lite export runs/sst2 --to merged --out models/opt-125m-sst2-nf4 --bits nf4

    hizoo-lite export runs/sst2 --to gguf --out gguf/sst2

    hizoo-lite export runs/sst2 --to gguf --out gguf/sst2-model --merge
    """
    options = {
        "name": name,
        "format": format,
        "merge": merge,
        "fresh": fresh,
        "model": model,
        "dtype": dtype,
        "bits": bits,
        "double_quant": double_quant,
        "base_bits": base_bits,
        "base_double_quant": base_double_quant,
        "overwrite": overwrite,
    }
    given = {option: value for option, value in options.items() if value is not None}
    _check(to, given, push)
    from hizoo_lite.train import preflight

    preflight.check_adapter(run, "RUN")
    preflight.check_model(model)
    from hizoo_lite.cli import output

    output.say_loading()
    exported = TARGETS[to](run, out, quiet, **given)
    if push is not None:
        _upload(out, push)
    if json:
        output.print_json({"out": out, "to": to, **exported.figures})
    else:
        typer.echo(exported.line)
        _say_what_next(run, to, out, exported.figures)


def _upload(out: str, name: str) -> None:
    """Put what was written on the Hub."""
    from hizoo_lite.checkpoints import hub

    typer.echo(f"uploaded: {hub.push(Path(out), name, private=True)}", err=True)


def _say_what_next(run: str, to: str, out: str, figures: dict[str, Any]) -> None:
    """The prompt of the run's task, if it is known, and a command that tries what was written."""
    from hizoo_lite.export import card
    from hizoo_lite.model import kinds
    from hizoo_lite.train import provenance

    settings = provenance.saved_config(run)
    kind = provenance.saved_kind(run)
    if settings is not None:
        kind = kind or kinds.find_kind(settings.model, settings.revision, None)
        if line := card.prompt_line(run, kind):
            typer.echo(line, err=True)
    found = provenance.saved_task(run)
    writes = found is None or all(part.kind != "choice" for part in found[1].parts)
    how = {"takes_adapter": figures.get("form") == "base", "writes": writes}
    if tried := try_line(run, to, out, kind, settings, **how):
        typer.echo(f"try it: {tried}", err=True)


def try_line(
    run: str,
    to: str,
    out: str,
    kind: ModelKind | None,
    settings: TrainConfig | None,
    *,
    takes_adapter: bool = False,
    writes: bool = True,
) -> str:
    """The command that asks a causal model what was written, or evaluates another; "" if none is known.

    Args:
        run: what was exported.
        to: the target.
        out: its folder.
        kind: of the model, if it is known.
        settings: of the run that made the adapter, if there is one.
        takes_adapter: of ONNX, a base beside which the adapter is named: it is asked as its run's task asks.
        writes: whether the model was tuned to write; else it tells answers apart, and is evaluated.
    """
    folder = shlex.quote(out)
    if to == "onnx-train":
        return f"python -m hizoo_lite.edge train {folder}"
    if to not in _GIVEN_BY:
        return ""
    given = f"{_GIVEN_BY[to]} {folder}" + (f" --adapter {shlex.quote(run)}" if takes_adapter else "")
    if kind == "causal" and (writes or takes_adapter):
        return f'hizoo-lite generate {given} --prompt "..."'
    if settings is None:
        return ""
    data = {"--task": settings.tasks, "--data": one_or_several(settings.data)}
    asked = [f"{name} {shlex.quote(value)}" for name, values in data.items() for value in values]
    return " ".join([f"hizoo-lite eval {given}", *([] if takes_adapter else asked)])


def _check(to: str, given: dict[str, Any], push: str | None) -> None:
    """UserError for an unknown target, for options of others, and for what the Hub does not take."""
    if to not in TARGETS:
        refuse([f"--to: got {to!r}, allowed: {', '.join(TARGETS)}"])
    problems = []
    for option, value in given.items():
        takers = [target for target in TARGETS if option in _options(target)]
        if to not in takers:
            problems.append(f"{flag(option)}: got {value!r}, allowed only with --to {' or '.join(takers)}")
    refuse(problems)
    if push is not None and to not in _PUSHED:
        refuse([f"--push: got {push!r}, allowed only with --to {' or '.join(_PUSHED)}"])


def _options(target: str) -> list[str]:
    """The keyword arguments of its function."""
    parameters = inspect.signature(TARGETS[target]).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
