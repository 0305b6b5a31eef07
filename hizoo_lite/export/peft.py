"""A run's LoRA adapter as a folder of its own for PEFT, with tokenizer and model card.

The tensors are the run's: hizoo-lite keeps adapters in PEFT's format and names, classifier heads as
`modules_to_save`. What is added is what the folder needs away from its run: where the base is, how it was
quantized, the tokenizer, and what came of the run. adapter_config.json is written last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from hizoo_lite.base import ModelKind
from hizoo_lite.checkpoints import hub
from hizoo_lite.checkpoints.adapter import PEFT_FILE, PEFT_WEIGHTS, SPACE_FILE, find_adapter, read_peft_config
from hizoo_lite.checkpoints.writer import named_errors, temporary_path, write_json, write_text
from hizoo_lite.config import TrainConfig
from hizoo_lite.errors import UserError
from hizoo_lite.export import card
from hizoo_lite.export.place import check_empty, find_place
from hizoo_lite.export.shards import skip_patterns, split_linears
from hizoo_lite.export.tokenizer import tokenizer_files, write_template
from hizoo_lite.model import build, kinds
from hizoo_lite.spaces.changes import LoRAChanges
from hizoo_lite.train import provenance, saved

_TIED = """
The adapter has rows of the output matrix, which this model shares with its embeddings. PEFT's
`merge_and_unload` would change both; `hizoo-lite export --to merged` gives the head a matrix of its own.
"""


class Adapter(NamedTuple):
    """A LoRA adapter and the model that it was made for, seen to fit."""

    folder: Path
    config: dict[str, Any]  # adapter_config.json, with where the base is
    changes: LoRAChanges
    settings: TrainConfig | None  # of its run
    base: Path
    kind: ModelKind
    labels: int | None
    module: nn.Module  # empty


def open_adapter(run: Path | str, model: str | None, to: str, instead: str) -> Adapter:
    """The adapter of a run's folder, or an adapter's own.

    model: folder or Hub id of the base, instead of the one the run names; a local folder is written down with
    its full path. to, instead: of `--to`, for the message. Raises `UserError` for runs that trained weights,
    and if the base cannot be found or is another model.
    """
    folder = find_adapter(run)
    if (folder / SPACE_FILE).is_file():
        raise UserError(
            f"--to: got {to}, but {folder} holds changed weights, not an adapter; {to.upper()} has no "
            f"form for them; allowed: {instead}"
        )
    config = read_peft_config(folder)
    changes = LoRAChanges(folder)  # where a tensor is missing, it says so
    settings = provenance.saved_config(run)
    source = model or (settings.model if settings else str(config.get("base_model_name_or_path") or ""))
    if not source:
        raise UserError(f"--model: missing; {folder / PEFT_FILE} does not name the base")
    path = kinds.model_path(source)
    base = hub.resolve(path, settings.revision if settings else None)
    name = str(base.resolve()) if Path(path).expanduser().is_dir() else path
    config = {**config, "base_model_name_or_path": name, "inference_mode": True}
    if settings is not None and settings.revision is not None:
        config["revision"] = settings.revision
    kind = saved.kind_of(run, base)
    labels = _labels(kind, changes)
    module = build.build(build.read_config(base, kind, labels or 2), kind)
    changes.check_fits(module, base, kind)
    return Adapter(folder, config, changes, settings, base, kind, labels, module)


def export(run: Path | str, out: Path | str, *, model: str | None = None) -> Path:
    """Write `out`, for `peft.PeftModel.from_pretrained`, from a run's folder or an adapter's.

    model: as of `open_adapter`, which raises `UserError`. So it does for runs that trained weights, which
    PEFT has no form for, and if `out` is not a new or empty folder.
    """
    adapter, out = open_adapter(run, model, "peft", "merged"), Path(out)
    check_empty(find_place(out))
    with named_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    for file in (adapter.folder / PEFT_WEIGHTS, *tokenizer_files(adapter.base)):
        _copy(file, out / file.name)
    write_template(adapter.settings, out)
    config, kind = adapter.config, adapter.kind
    how = [
        *_arguments(config, adapter.labels),
        *_quantization(adapter.base, adapter.settings, adapter.module),
    ]
    written = card.write(
        run,
        title=f"LoRA adapter for {Path(config['base_model_name_or_path']).name}",
        about=f"Rank {config['r']}, alpha {config['lora_alpha']}, tuned by hizoo-lite.",
        base=config["base_model_name_or_path"],
        base_folder=adapter.base,
        kind=kind,
        library="peft",
        tags="lora, hizoo",
        how=f"```python\n{_snippet(config, kind, how)}```\n",
    )
    write_text(out / card.FILE, written + (_TIED if has_tied_head(adapter) else ""))
    write_json(out / PEFT_FILE, config)
    return out


def has_tied_head(adapter: Adapter) -> bool:
    """Whether an adapter is of an output matrix that is the embeddings as well."""
    tied: Mapping[str, str] = getattr(adapter.module, "all_tied_weights_keys", None) or {}
    return any(f"{name}.weight" in tied for name in adapter.changes.linears)


def _copy(file: Path, target: Path) -> None:
    with named_errors(target):
        shutil.copyfile(file, temporary_path(target))
        temporary_path(target).replace(target)


def _snippet(config: Mapping[str, Any], kind: ModelKind, arguments: list[str]) -> str:
    """Python that loads base and adapter."""
    auto = card.CLASSES[kind]
    given = ", ".join([json.dumps(config["base_model_name_or_path"]), *arguments])
    quantizes = ", BitsAndBytesConfig" if "BitsAndBytesConfig" in given else ""
    lines = [
        "from peft import PeftModel",
        f"from transformers import {auto}, AutoTokenizer{quantizes}",
        "",
        f"base = {auto}.from_pretrained({given})",
        "model = PeftModel.from_pretrained(base, ADAPTER)  # this folder",
        "tokenizer = AutoTokenizer.from_pretrained(ADAPTER)",
    ]
    return "\n".join(lines) + "\n"


def _labels(kind: ModelKind, changes: LoRAChanges) -> int | None:
    """How many classes the head that was tuned knows; None if none was."""
    matrices = [value for value in changes.heads.values() if value.ndim == 2]
    return min(value.shape[0] for value in matrices) if kind == "classifier" and matrices else None


def _arguments(config: Mapping[str, Any], labels: int | None) -> list[str]:
    """What transformers must be told to have the base as it was tuned, but how it was quantized."""
    found = []
    if config.get("revision"):
        found.append(f"revision={json.dumps(config['revision'])}")
    if labels is not None:
        found.append(f"num_labels={labels}")
    return found


def _quantization(base: Path, settings: TrainConfig | None, module: nn.Module) -> list[str]:
    """The argument that quantizes a base in 16 bits as the run did; none if nothing is to be told."""
    content = json.loads((base / "config.json").read_text(encoding="utf-8"))
    bits = "none" if settings is None else build.choose_bits(settings.bits, None)
    if settings is None or bits == "none" or "quantization_config" in content:
        return []
    options = ["load_in_8bit=True"]
    if bits != "int8":
        nested = f"bnb_4bit_use_double_quant={settings.double_quant}"
        options = ["load_in_4bit=True", f'bnb_4bit_quant_type="{bits}"', nested]
    skipped = _skipped(module)
    if skipped:
        options.append(f"llm_int8_skip_modules={json.dumps(skipped)}")
    return [f"quantization_config=BitsAndBytesConfig({', '.join(options)})"]


def _skipped(module: nn.Module) -> list[str]:
    """The linears outside of the blocks, which a run leaves as they are; none if transformers does too.

    By itself it leaves the output embeddings and what comes last.
    """
    outside, inside = split_linears(module)
    last, _ = list(module.named_parameters())[-1]
    head = module.get_output_embeddings()  # type: ignore[operator]
    left = {name for name in outside if f"{name}.weight" == last or module.get_submodule(name) is head}
    return [] if left == set(outside) else skip_patterns(outside, inside)
