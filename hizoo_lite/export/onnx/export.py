"""`hizoo-lite export RUN --to onnx`: the base once, and one more adapter each time it is called.

A new export is made beside its place and renamed when its check has passed: under the final name there is a
whole export or none.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch
import transformers
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from hizoo_lite.errors import UserError
from hizoo_lite.export.onnx import folder
from hizoo_lite.export.onnx.adapter import add_adapter, check_name
from hizoo_lite.export.onnx.check import LIMIT, cases, compare
from hizoo_lite.export.onnx.files import fingerprint
from hizoo_lite.export.onnx.folder import Export
from hizoo_lite.export.onnx.genai import GENAI_CONFIG, genai_config
from hizoo_lite.export.onnx.interface import Interface, interface
from hizoo_lite.export.onnx.linear import AdapterDelta, ExportLinear, Int8Mode
from hizoo_lite.export.onnx.session import Session
from hizoo_lite.export.onnx.skeleton import make_skeleton
from hizoo_lite.export.onnx.trace import trace
from hizoo_lite.memory.allocator import map_large, trim
from hizoo_lite.model.load import load
from hizoo_lite.model.model import Model
from hizoo_lite.quant import Checkpoint
from hizoo_lite.quant.hub import SMALL_FILES
from hizoo_lite.quant.shards import write_json
from hizoo_lite.stream.residency import Streamed
from hizoo_lite.tasks.tokens import pad_id
from hizoo_lite.train import saved, setup
from hizoo_lite.train.adapter_files import PEFT_FILE, find_adapter
from hizoo_lite.train.events import Listener

_NOT_OF_A_TOKENIZER = ("model.safetensors.index.json", "quantize_config.json")


def export_onnx(
    run: Path | str,
    out: Path | str,
    *,
    name: str | None = None,
    int8: Int8Mode | None = None,
    listener: Listener | None = None,
) -> Export:
    """Export a run's (or PEFT adapter's) base and adapter; where `out` has the base, add the adapter alone.

    name: of the adapter; the run folder's own by default. int8: how 8-bit weights are multiplied, "exact"
    by default. Raises `UserError` before anything is written where something does not fit, and `ExportError`
    where onnxruntime computes something else than the model.
    """
    run, out, listener = Path(run), Path(out), listener or Listener()
    if not (find_adapter(run) / PEFT_FILE).is_file():
        raise UserError(f"{run}: space: only runs with --space lora can be exported to ONNX")
    name = name or run.resolve().name
    check_name(name)
    if folder.is_export(out):
        export = Export.open(out)
        if int8 not in (None, export.record["int8"]):
            raise UserError(f"--int8: got {int8!r}, but {out} was made with {export.record['int8']!r}")
        add_adapter(export, run, name)
        return export
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"--out: {out} is not empty and no export; allowed: a new or empty folder, or an export"
        )
    whole = out.absolute()
    aside = whole.with_name(f".{whole.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        model = load_base(run)
        export = export_base(model, aside, int8 or "exact", listener)
        add_adapter(export, run, name)
        _check(export, model, run, name, listener)
        aside.replace(out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return Export(out, export.record)


def load_base(run: Path) -> Model:
    """The model that a run tuned, in float32 products on the CPU, from its files where they have its form."""
    config = saved.saved_config(run)
    if config is None:
        source, kind = setup.model_path(saved.base_model(run)), None
        options: dict[str, Any] = {}
    else:
        source = setup.model_path(config.model)
        kind = None if config.kind == "auto" else config.kind
        labels = setup.find_task(config.task).num_labels
        options = {"bits": config.bits, "double_quant": config.double_quant, "num_labels": labels or 2}
        options |= {"seed": config.seed, "revision": config.revision}
    checkpoint = Checkpoint.open(source, revision=options.get("revision"))
    found = kind or setup.find_kind(source, options.get("revision"), None)
    stored = checkpoint.quantized_bits or "none"
    as_stored = (options.get("bits") or checkpoint.quantized_bits or "nf4") == stored
    model = _load(source, found, options, as_stored)
    map_large()  # what is freed is given back: every tensor is read once and dropped
    if model.kind == "classifier" and model.config.pad_token_id is None and model.tokenizer is not None:
        model.config.pad_token_id = pad_id(model.tokenizer)
    return model


def _load(source: str, kind: Any, options: dict[str, Any], as_stored: bool) -> Model:
    fixed: dict[str, Any] = {"kind": kind, "compute_dtype": "float32", "device": "cpu", **options}
    if as_stored:
        try:
            return load(source, residency="disk", **fixed)
        except UserError:  # a matrix that is stored transposed, or in 64 bits
            pass
    return load(source, residency="resident", **fixed)


def export_base(model: Model, out: Path, int8: Int8Mode, listener: Listener) -> Export:
    """Write graph, weights, tokenizer and settings to `out`, and export.json with no adapter."""
    listener.message(f"tracing {type(model.module).__name__}")
    skeleton = make_skeleton(model, int8)
    traced = interface(model, skeleton)
    graph = trace(skeleton, traced.wrapper, traced.inputs, traced.outputs, "hf")
    ClearMetadataAndDocStringPass()(graph)
    graph.producer_name = "hizoo_lite"
    mode = int8 if model.bits == "int8" else None
    graph.metadata_props.update({"bits": model.bits, **({} if mode is None else {"int8": mode})})
    _save(graph, out, listener)
    for path in _small_files(model.folder):
        shutil.copyfile(path, out / path.name)
    if traced.layers:
        write_json(out / GENAI_CONFIG, genai_config(model, traced.layers))
    return Export(out, _record(model, traced, skeleton.linears, mode, out))


def _save(graph: ir.Model, out: Path, listener: Listener) -> None:
    def written(tensor: object, info: Any) -> None:
        if info.index == 0:
            listener.phase("write, tensors", info.total)
        listener.advanced(1)

    try:
        ir.save(graph, out / folder.GRAPH, external_data=folder.WEIGHTS, callback=written)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error
    finally:
        listener.finish()


def _small_files(source: Path) -> list[Path]:
    """Tokenizer, config and generation settings of a model folder; never weights or code."""
    found = [path for pattern in SMALL_FILES for path in sorted(source.glob(pattern))]
    return [path for path in found if path.is_file() and path.name not in _NOT_OF_A_TOKENIZER]


def _record(
    model: Model, traced: Interface, linears: dict[str, ExportLinear], int8: Int8Mode | None, out: Path
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
        "bits": model.bits,
        "int8": int8,
        "base": {
            "model": str(model.source),
            "architecture": type(model.module).__name__,
            "fingerprint": fingerprint(model.folder),
        },
        "model": {
            "files": {
                folder.GRAPH: folder.describe(out / folder.GRAPH, checksum=True),
                folder.WEIGHTS: folder.describe(out / folder.WEIGHTS, checksum=False),
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


def _check(export: Export, model: Model, run: Path, name: str, listener: Listener) -> None:
    """Compare base and adapter with the model; the result goes into export.json.

    The model is done with before onnxruntime loads its own, and cannot be used any more.
    """
    listener.message("running the model, to check against it")
    base = cases(model)
    saved.attach_adapter(model, run)
    tuned = cases(model)
    if isinstance(model.residency, Streamed):
        model.residency.close()
    trim()
    listener.message("running the export in onnxruntime")
    fast = export.record["int8"] == "fast"
    session = Session(export, sparing=not fast)  # the fast products need their own form of the weights
    runs = [*compare(session, base, None, fast), *compare(session, tuned, name, fast)]
    export.record["check"] = {
        "limit": None if fast else LIMIT,
        "max_abs_difference": max(entry["max_abs_difference"] for entry in runs),
        "runs": runs,
        "versions": {
            "onnxruntime": onnxruntime.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    export.write()
