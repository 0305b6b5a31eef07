"""`hizoo-lite export RUN --to onnx-train`: a folder that `python -m hizoo_lite.edge train` goes on with.

train.onnx, train.onnx.data   losses of all branches on a batch; quantized weights as they are
train.json                    kind, bits, loss, parameters, what the adapter's files need, and the check
adapter/                      the parameters to start from, as PEFT keeps them
config.toml                   the run's settings
tokenizer.json, ...           as the model has them

It is made beside its place and renamed when its check has passed: under the final name there is a whole
export or none.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from hizoo_lite.branches import Branches
from hizoo_lite.checkpoints.adapter import PEFT_FILE, find_adapter, read_peft_config
from hizoo_lite.checkpoints.fingerprint import of_model
from hizoo_lite.checkpoints.writer import write_json
from hizoo_lite.config import TrainConfig, default
from hizoo_lite.edge.graph import ADAPTER, FORMAT, GRAPH, RECORD
from hizoo_lite.engine.residency import Streamed
from hizoo_lite.errors import UserError
from hizoo_lite.export.onnx.linear import lora_inputs
from hizoo_lite.export.onnx.skeleton import make_skeleton
from hizoo_lite.export.onnx.source import Source, load_base, read_source, stored_folder
from hizoo_lite.export.onnx.trace import save, trace
from hizoo_lite.export.onnx_train.check import cases, compare
from hizoo_lite.export.onnx_train.graph import OUTPUTS, train_interface
from hizoo_lite.export.place import check_new, find_place, workplace
from hizoo_lite.export.tokenizer import tokenizer_files, write_template, write_tokenizer
from hizoo_lite.model.model import Model
from hizoo_lite.process import trim
from hizoo_lite.registry import ESTIMATORS
from hizoo_lite.spaces import LoRA
from hizoo_lite.tasks import Encoder
from hizoo_lite.train import components, config_file, provenance, saved, setup
from hizoo_lite.train.progress import Progress

CONFIG = "config.toml"


def export_train(
    run: Path | str,
    out: Path | str,
    *,
    fresh: bool = False,
    model: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `out`, to tune further from a run's adapter, and return the content of its train.json.

    fresh: start from new parameters, those of the run's seed, as the run itself did. model: as of
    `read_source`. The run's data is read: a batch of it is the check. Raises `UserError` before anything is
    written if something does not fit, and `ExportError` if onnxruntime computes other losses than the
    model.
    """
    run, progress, place = Path(run), progress or Progress(), find_place(out)
    check_new(place)
    adapter = find_adapter(run)
    if not (adapter / PEFT_FILE).is_file():
        raise UserError(f"{run}: space: only runs with --space lora can be exported to train on a device")
    config = provenance.saved_config(run)
    if config is None:
        raise UserError(f"{run / CONFIG}: no such file; allowed: the folder of a run, whose task is trained")
    if not config.is_of_loss:
        raise UserError(
            f"{run}: objective: {config.objective}; the graph has losses alone: only runs with --objective "
            f"{default('objective')} can be exported to train on a device"
        )
    task = components.find_task(config.task)
    examples = components.make_splits(config, task).train
    source = read_source(run, model=model)
    with workplace(place) as work:
        check_new(place)  # another process may have made it just now
        temporary = work / "export"
        temporary.mkdir()
        loaded = load_base(source, stored_folder(source, work, progress))
        encoder = setup.make_encoder(loaded, task, config.max_length, config.loss)
        examples = components.fitting(encoder, examples, config)[: config.batch_size]
        space = saved.attach_adapter(loaded, run, train_a=config.train_a)
        assert isinstance(space, LoRA)
        if fresh:
            space.attach(loaded, config.seed)
        branches = Branches(ESTIMATORS.configured(config).points(0))
        batches = cases(loaded, space, encoder, examples, config.seed, branches)
        token_types = batches[0].batch.token_type_ids is not None
        _write_settings(loaded, config, temporary)
        _write_graph(loaded, space, encoder, token_types, temporary, progress)
        space.save(temporary / ADAPTER)
        shutil.copyfile(
            adapter / PEFT_FILE, temporary / ADAPTER / PEFT_FILE
        )  # names the base as the run does
        record = _record(loaded, space, encoder, source, temporary)
        write_json(temporary / RECORD, record)
        if isinstance(loaded.residency, Streamed):
            loaded.residency.close()
        trim()
        progress.message("running the export in onnxruntime")
        record["check"] = compare(temporary, batches)
        write_json(temporary / RECORD, record)
        temporary.replace(place)
    return record


def _write_graph(
    model: Model, space: LoRA, encoder: Encoder, token_types: bool, out: Path, progress: Progress
) -> None:
    """Trace, and write the weights one by one."""
    skeleton = make_skeleton(model, "exact")
    traced = train_interface(model, skeleton, space, encoder.loss, token_types=token_types)
    graph = trace(skeleton, traced.wrapper, traced.inputs, OUTPUTS, "hf", progress)
    ClearMetadataAndDocStringPass()(graph)
    graph.producer_name = "hizoo_lite"
    graph.metadata_props["bits"] = model.bits

    save(graph, out / GRAPH, progress)


def _write_settings(model: Model, config: TrainConfig, out: Path) -> None:
    """The tokenizer, and the run's settings without its folder."""
    write_tokenizer(model.tokenizer, tokenizer_files(model.folder), out)
    write_template(config, out)
    estimated: dict[str, Any] = {"head": "estimated", "exact_blocks": 0}  # there are no gradients
    settings = replace(config, out=None, resume=False, **estimated)
    (out / CONFIG).write_text(config_file.write(settings), encoding="utf-8")


def _record(model: Model, space: LoRA, encoder: Encoder, source: Source, out: Path) -> dict[str, Any]:
    """train.json without its check."""
    settings = read_peft_config(out / ADAPTER)
    return {
        "format": FORMAT,
        "kind": model.kind,
        "bits": model.bits,
        "loss": encoder.loss,
        "id2label": model.config.id2label if model.kind == "classifier" else None,
        "vocabulary": model.vocabulary,
        "positions": model.positions,
        "parameters": [
            {"name": name, "shape": list(value.shape), "trained": name in space.parameters}
            for name, value in {**space.frozen, **space.exact, **space.parameters}.items()
        ],
        "lora": settings,
        "onnx_adapter": {"names": _adapter_inputs(space)},
        "base": {
            "model": settings.get("base_model_name_or_path"),
            "architecture": type(model.module).__name__,
            "fingerprint": of_model(source.checkpoint.folder),
        },
    }


def _adapter_inputs(space: LoRA) -> dict[str, dict[str, Any]]:
    """What becomes of each parameter as an input of model.onnx (see `edge/onnx_adapter.py`)."""
    found: dict[str, dict[str, Any]] = {}
    for name in space.adapted:
        for side, given in zip("AB", lora_inputs(name), strict=True):
            scale = 1.0 if side == "A" else space.scaling
            found[f"{name}.lora_{side}.weight"] = {"input": given, "transpose": True, "scale": scale}
    whole = [name for name in space.parameters if name not in found]
    return found | {name: {"input": name, "transpose": False, "scale": 1.0} for name in whole}
