"""`hizoo-lite export RUN --to onnx`: the base once, and one more adapter each time it is called.

A new export is made beside its place and renamed when its check has passed: under the final name there is a
whole export or none. It has one of three forms:

| form | what was tuned | adapters |
|---|---|---|
| base | an adapter, beside the graph | any, swapped at run time |
| tuned | the weights themselves (spaces dense and scales), in the graph | none: it is another base |
| merged | an adapter, folded into weights of 16 or 32 bits | none |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import onnxruntime
import torch
import transformers
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from hizoo_lite.base import Bits
from hizoo_lite.checkpoints.adapter import find_adapter
from hizoo_lite.checkpoints.fingerprint import of_model
from hizoo_lite.checkpoints.hub import SMALL_FILES
from hizoo_lite.checkpoints.writer import write_json
from hizoo_lite.edge import folder
from hizoo_lite.edge.adapter import add_adapter, check_name, remove_adapter, remove_file
from hizoo_lite.edge.folder import Export
from hizoo_lite.engine.residency import Streamed
from hizoo_lite.errors import UserError
from hizoo_lite.export import merged
from hizoo_lite.export.onnx.check import cases, run_check
from hizoo_lite.export.onnx.compare import LIMIT, Reference
from hizoo_lite.export.onnx.genai import GENAI_CONFIG, genai_config
from hizoo_lite.export.onnx.interface import Interface, interface
from hizoo_lite.export.onnx.linear import AdapterDelta, ExportLinear, Format
from hizoo_lite.export.onnx.skeleton import make_skeleton
from hizoo_lite.export.onnx.source import (
    Source,
    load_base,
    load_folder,
    read_source,
    stored_folder,
)
from hizoo_lite.export.onnx.trace import save, trace
from hizoo_lite.export.place import check_new, find_place, workplace
from hizoo_lite.export.tokenizer import write_template, write_tokenizer
from hizoo_lite.model.model import Model
from hizoo_lite.process import trim
from hizoo_lite.registry import SPACES
from hizoo_lite.spaces import of_folder
from hizoo_lite.train import provenance, saved
from hizoo_lite.train.progress import Progress

MergedDtype = Literal["fp16", "float32"]
Form = Literal["base", "tuned", "merged"]

_NOT_OF_A_TOKENIZER = ("model.safetensors.index.json", "quantize_config.json")
#: A merged model against the one with the adapter beside it: of the largest logit. Weights are rounded to 11
#: or 24 bits once; attention and many layers amplify that (2^-7 for a tiny random Llama).
#: That the graph is right the comparison with the merged model itself shows, held to `LIMIT`.
_ROUNDING: dict[MergedDtype, float] = {"fp16": 2**-5, "float32": 2**-16}
#: 8-bit codes stay what they are, and activations are rounded: more than this share would be a wrong graph.
_INT8_SHARE = 0.2


class _Plan(NamedTuple):
    """What is to be written."""

    run: Path
    name: str  # of the adapter
    source: Source
    form: Form
    format: Format
    dtype: MergedDtype


def export_onnx(
    run: Path | str,
    out: Path | str,
    *,
    name: str | None = None,
    format: Format | None = None,
    merge: bool = False,
    dtype: MergedDtype | None = None,
    base_bits: Bits | None = None,
    model: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Export:
    """Export a run's (or PEFT adapter's) base and adapter; if `out` has the base, add the adapter alone.

    name: of the adapter; the run folder's own by default. format: how quantized weights are multiplied,
    "exact" by default; "fast" is measured and recorded, not held to the model. merge: fold the adapter into
    the weights, in `dtype` (fp16 by default). base_bits, model: as of `read_source`. overwrite: an adapter of
    that name in `out` is replaced, once the new one has passed its check.

    Raises `UserError` before anything is written if something does not fit, and `ExportError` if
    onnxruntime computes something else, or cannot run the model.
    """
    run, out, progress = Path(run), Path(out), progress or Progress()
    name = name or run.resolve().name
    check_name(name)
    _check_options(format, merge, dtype)
    place, plan = find_place(out), None
    if not folder.is_export(place):
        check_new(place, "a new or empty folder, or an export")
        source = read_source(run, base_bits, model)
        form: Form = "merged" if merge else "base" if source.changes is None else "tuned"
        changes = source.changes if form == "tuned" else None
        if changes is not None and not SPACES.lines[changes.space].in_weights:
            raise UserError(
                f"--to: got onnx, but what --space {changes.space} trains lies beside the weights, "
                "where a graph has no place for it; allowed: --merge"
            )
        plan = _Plan(run, name, source, form, format or "exact", dtype or "fp16")
    with workplace(place) as work:
        if plan is None or folder.is_export(place):  # another process may have made it just now
            export = Export.open(out)
            _check_takes(export, format, merge)
            source_or_why = _find_source(run, base_bits, model)
            export.verify()
            return _add(export, run, name, source_or_why, work, progress, overwrite)
        temporary = work / "export"
        temporary.mkdir()
        export, references = _write(plan, temporary, work, progress)
        trim()
        _check(export, references, work, progress)
        temporary.replace(place)
    return Export(out, export.record)


def _check_options(format: Format | None, merge: bool, dtype: MergedDtype | None) -> None:
    for flag, value, allowed in (("format", format, Format), ("dtype", dtype, MergedDtype)):
        if value is not None and value not in get_args(allowed):
            raise UserError(f"--{flag}: got {value!r}, allowed: {', '.join(get_args(allowed))}")
    if dtype is not None and not merge:
        raise UserError(f"--dtype: got {dtype!r} without --merge; quantized weights stay what they are")
    if merge and format == "fast":
        raise UserError(
            "--format: got 'fast' with --merge, which leaves no quantized weights; allowed: exact"
        )


def _check_takes(export: Export, format: Format | None, merge: bool) -> None:
    """UserError if an adapter cannot be added to this export, or not in this way."""
    record, out = export.record, export.path
    if record["form"] != "base":
        raise UserError(
            f"--out: {out} holds a {record['form']} model, which takes no adapters; allowed: a new folder"
        )
    if merge:
        raise UserError(f"--merge: {out} has a base with adapters already; allowed: a new folder")
    if format not in (None, record["products"]):
        raise UserError(f"--format: got {format!r}, but {out} was made with {record['products']!r}")


def _write(plan: _Plan, out: Path, work: Path, progress: Progress) -> tuple[Export, list[Reference]]:
    """The export, unchecked, and the model's logits. The model itself is not in memory any more."""
    base = stored_folder(plan.source, work, progress)
    if plan.form != "merged":
        model = load_base(plan.source, base)
        export = export_base(model, out, plan, progress)
        return export, _references(model, plan, progress)
    progress.message(f"merging in {plan.dtype}")
    source = plan.source
    merged.prepare(
        plan.run,
        work / "merged",
        model=str(source.checkpoint.folder),
        base_bits=source.bits,
        base_double_quant=source.double_quant,
        dtype=plan.dtype,
    ).run()
    model = load_folder(plan.source, work / "merged", None)
    export = export_base(model, out, plan, progress)
    exact = [Reference(cases(model), model="merged")]
    _close(model)
    return export, exact + _references(load_base(plan.source, base), plan, progress)


def _references(model: Model, plan: _Plan, progress: Progress) -> list[Reference]:
    """The model's logits, as far as the export has an answer. It cannot be used any more afterwards."""
    progress.message("running the model, to check against it")
    limit: dict[str, Any] = {}
    if plan.form == "merged":
        limit = {"limit": _ROUNDING[plan.dtype], "share": True}
    elif plan.format == "fast":
        limit = {"limit": _INT8_SHARE if plan.source.bits == "int8" else None, "share": True}
    found = [Reference(cases(model), **limit, model="base")] if plan.form == "base" else []
    saved.attach_adapter(model, plan.run)
    adapter = plan.name if plan.form == "base" else None
    found.append(Reference(cases(model), adapter, **limit))
    _close(model)
    return found


def _close(model: Model) -> None:
    if isinstance(model.residency, Streamed):
        model.residency.close()


def export_base(model: Model, out: Path, plan: _Plan, progress: Progress) -> Export:
    """Write graph, weights, tokenizer and settings to `out`, and with a base the adapter."""
    described = model.folder if plan.form == "merged" else plan.source.checkpoint.folder
    write_tokenizer(model.tokenizer, _small_files(described), out)
    write_template(provenance.saved_config(plan.run), out)
    skeleton = make_skeleton(model, plan.format, None if plan.form == "merged" else plan.source.changes)
    traced = interface(model, skeleton, takes_adapters=plan.form == "base")
    graph = trace(skeleton, traced.wrapper, traced.inputs, traced.outputs, "hf", progress)
    ClearMetadataAndDocStringPass()(graph)
    graph.producer_name = "hizoo_lite"
    graph.metadata_props.update({"bits": model.bits, "products": plan.format})
    save(graph, out / folder.GRAPH, progress)
    if traced.layers:
        write_json(out / GENAI_CONFIG, genai_config(model, traced.layers))
    export = Export(out, _record(model, traced, skeleton.linears, plan, out))
    if plan.form == "base":
        add_adapter(export, plan.run, plan.name)
    else:
        export.write()
    return export


def _small_files(source: Path) -> list[Path]:
    """Tokenizer, config and generation settings of a model folder; never weights or code."""
    found = [path for pattern in SMALL_FILES for path in sorted(source.glob(pattern))]
    return [path for path in found if path.is_file() and path.name not in _NOT_OF_A_TOKENIZER]


def _record(
    model: Model, traced: Interface, linears: dict[str, ExportLinear], plan: _Plan, out: Path
) -> dict[str, Any]:
    operators: dict[str, int] = {}
    for linear in linears.values():
        operators[linear.product.operator] = operators.get(linear.product.operator, 0) + 1
    inputs = [given for given in traced.inputs if given.default is None]
    lora = [name for name, linear in linears.items() if isinstance(linear.delta, AdapterDelta)]
    tuned = {f"{name}.lora_{side}" for name in lora for side in "AB"}
    heads = [given for given in traced.inputs if given.default is not None and given.name not in tuned]
    return {
        "format": folder.FORMAT,
        "kind": model.kind,
        "form": plan.form,
        "bits": model.bits,
        "products": plan.format,
        "base": {
            "model": plan.source.name,
            "architecture": type(model.module).__name__,
            "fingerprint": of_model(plan.source.checkpoint.folder),
        },
        "tuned": _tuned(plan),
        "model": {
            "files": {
                folder.GRAPH: folder.describe(out / folder.GRAPH),
                folder.WEIGHTS: folder.describe(out / folder.WEIGHTS),
            },
            "inputs": [
                {
                    "name": given.name,
                    "dtype": str(given.example.dtype).removeprefix("torch."),
                    "shape": [given.dynamic.get(i, size) for i, size in enumerate(given.example.shape)],
                }
                for given in inputs
            ],
            "outputs": list(traced.outputs),
            "cache": [list(layer) for layer in traced.layers],
            "adapter_inputs": {
                "lora": {name: list(reversed(model.linears[name].weight.shape)) for name in lora},
                "head": {given.name: list(given.example.shape) for given in heads},
            },
            "operators": operators,
        },
        "adapters": {},
        "check": None,
    }


def _tuned(plan: _Plan) -> dict[str, Any]:
    """What is in the graph of a run's work; an adapter beside it says so itself."""
    if plan.form == "base":
        return {}
    found: dict[str, Any] = {"source": str(plan.run)}
    changes = plan.source.changes
    found["space"] = of_folder(find_adapter(plan.run)).name
    if changes is None or plan.form == "merged":
        return found | {"dtype": plan.dtype}
    residuals = len(changes.residuals)
    recoded = plan.format == "fast" and plan.source.bits in ("nf4", "fp4")
    stored = "codes and scales"
    if residuals:
        stored = (
            "summed, then coded anew" if recoded else "codes, and a bf16 difference in a product of its own"
        )
    return found | {
        "layers": len(changes.linears),
        "as": stored,
    }


def _check(export: Export, references: list[Reference], work: Path, progress: Progress) -> None:
    """Compare with the model; the result goes into export.json."""
    progress.message("running the export in onnxruntime")
    runs = _run_check(export, references, work)
    export.record["check"] = {
        "limit": _limit(export),
        "max_abs_difference": max(entry["max_abs_difference"] for entry in runs),
        "mean_abs_difference": _mean(runs, "mean_abs_difference"),
        "same_choice": _mean(runs, "same_choice"),
        "runs": runs,
        "versions": {
            "onnxruntime": onnxruntime.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    for name, about in export.record["adapters"].items():
        about["check"] = _summary(runs, name)
    export.write()


def _mean(runs: list[dict[str, Any]], key: str) -> float:
    """Over all tokens of the runs."""
    tokens = [entry["rows"] * entry["length"] for entry in runs]
    return sum(n * entry[key] for n, entry in zip(tokens, runs, strict=True)) / sum(tokens)


def _limit(export: Export) -> float | None:
    """The largest difference that is allowed; None if it is measured alone."""
    return None if export.record["products"] == "fast" else LIMIT


def _run_check(export: Export, references: list[Reference], work: Path) -> list[dict[str, Any]]:
    place = work / "check"
    place.mkdir()
    # fast products need the weights in a form of their own, which is held
    return run_check(export, references, place, low_memory=export.record["products"] == "exact")


def _summary(runs: list[dict[str, Any]], name: str) -> dict[str, Any]:
    worst = max(entry["max_abs_difference"] for entry in runs if entry["adapter"] == name)
    return {"max_abs_difference": worst}


def _find_source(run: Path, base_bits: Bits | None, model: str | None) -> Source | UserError:
    """The model of one more adapter, or why it is not compared with it. UserError for what was given."""
    try:
        return read_source(run, base_bits, model)
    except UserError as error:
        if base_bits is not None or model is not None:
            raise
        return error


def _add(
    export: Export,
    run: Path,
    name: str,
    source: Source | UserError,
    work: Path,
    progress: Progress,
    overwrite: bool,
) -> Export:
    """One more adapter; compared with the model if that is at hand, which export.json says."""
    before = add_adapter(export, run, name, overwrite=overwrite)
    about = export.record["adapters"][name]
    runs: list[dict[str, Any]] = []
    if isinstance(source, UserError):
        about["check"] = {"skipped": str(source)}
        progress.message(f"{name} is not compared with its model: {source}")
    else:
        try:
            reference = _adapter_reference(export, source, run, name, work, progress)
            trim()
            progress.message("running the export in onnxruntime")
            runs = _run_check(export, [reference], work)
        except BaseException:
            remove_adapter(export, name, before)
            raise
        about["check"] = _summary(runs, name)
    others = [entry for entry in export.record["check"]["runs"] if entry["adapter"] != name]
    export.record["check"]["runs"] = others + runs
    export.write()
    if before is not None:
        remove_file(export, before)
    return export


def _adapter_reference(
    export: Export, source: Source, run: Path, name: str, work: Path, progress: Progress
) -> Reference:
    form: Format = export.record["products"]
    plan = _Plan(run, name, source, "base", form, "fp16")
    return _references(load_base(source, stored_folder(source, work, progress)), plan, progress)[-1]
