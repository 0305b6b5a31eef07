"""What reads files that others may have written: each target has a small valid folder and a reader of it."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hostile import Form
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hizoo_lite import spaces, tasks
from hizoo_lite.checkpoints import adapter, fingerprint, tensorfile
from hizoo_lite.checkpoints.adapter import peft_weights, read_record
from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.checkpoints.tensors import TensorFile
from hizoo_lite.edge.folder import Export
from hizoo_lite.edge.graph import Record as TrainRecord
from hizoo_lite.edge.tokenizer import EdgeTokenizer
from hizoo_lite.engine.load import load
from hizoo_lite.errors import UserError
from hizoo_lite.model.model import Model
from hizoo_lite.plan import hardware
from hizoo_lite.report.charts import make_charts
from hizoo_lite.report.record import read_run
from hizoo_lite.report.report import as_json, render
from hizoo_lite.tasks import custom, files
from hizoo_lite.train import checkpoint, config_file, identity, journal
from hizoo_lite.train.folder import RunFolder
from hizoo_lite.train.saved import attach_adapter


class Target(NamedTuple):
    """Something that reads a folder."""

    name: str
    files: Mapping[str, bytes]  # of a valid folder
    attacked: Mapping[str, Form]  # those of them that are made hostile, one at a time
    read: Callable[[Path], object]


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _tensors() -> bytes:
    """A safetensors file with a tensor w (3, 2) and an empty one."""
    header = {
        "__metadata__": {"format": "pt"},
        "w": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]},
        "empty": {"dtype": "F32", "shape": [0, 2], "data_offsets": [24, 24]},
    }
    text = _json(header)
    return struct.pack("<Q", len(text)) + text + np.arange(6, dtype="<f4").tobytes()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ------------------------------------------------------------------------------------------------ data, tasks

_TABLE = 'sentence,label\n"a, ""b""",0\ngood,1\n'
_TABBED = b"sentence\tlabel\na\t0\ngood\t1\n"
_ROWS = {
    "jsonl": b'{"sentence": "a", "label": 0}\n{"sentence": "b", "label": 1}\n',
    "json": _json({"data": [{"title": "t", "paragraphs": []}, {"title": "u"}]}),
    "csv": _TABLE.encode(),
    "tsv": _TABBED,
    "txt": _TABBED,
}
_FORMS: dict[str, Form] = {"jsonl": "jsonl", "json": "json", "csv": "table", "tsv": "table", "txt": "table"}


def _rows(suffix: str) -> Target:
    name = f"data.{suffix}"

    def read(folder: Path) -> None:
        for row in files.rows(folder / name):
            row.value(*row.values)

    return Target(f"rows-{suffix}", {name: _ROWS[suffix]}, {name: _FORMS[suffix]}, read)


_SPANS = {"number": "", "spans": ["a"], "date": {"day": "1", "month": "May", "year": ""}}
_QUESTIONS = {
    "qas": [{"id": "1", "question": "q", "answers": [{"text": "a", "answer_start": 0}]}],
    "context": "c a",
}
#: A row that every built-in task finds its fields in.
_ANY_ROW = {
    "sentence": "a",
    "label": 0,
    "text": "t",
    "coarse_label": 1,
    "idx": 0,
    "sentence1": "a",
    "sentence2": "b",
    "premise": "p",
    "hypothesis": "h",
    "question": "cause",
    "passage": "p",
    "word": "a",
    "choice1": "a",
    "choice2": "b",
    "gold_label": "neutral",
    "title": "t",
    "paragraphs": [_QUESTIONS],
    "qa_pairs": [{"query_id": "1", "question": "q", "answer": _SPANS, "validated_answers": [_SPANS]}],
    "target": {"span1_text": "a", "span1_index": 0, "span2_text": "p", "span2_index": 1},
    "start1": 0,
    "end1": 1,
    "start2": 0,
    "end2": 1,
    "query": "q @placeholder",
    "prompt": "p",
    "entities": ["a"],
    "answers": ["a"],
    "messages": [{"role": "user", "content": "c"}],
}


def _read_tasks(folder: Path) -> None:
    """Every built-in task on the same file; each may refuse it."""
    refused = []
    for name in tasks.names():
        try:
            tasks.get(name).load(folder / "train.jsonl", "train")
        except UserError as error:
            refused.append(error)
    if len(refused) == len(tasks.names()):
        raise refused[0]


_TASK_FILES = {
    "choice.toml": b'name = "t"\nkind = "choice"\nprompt = "{sentence!o} It was"\n'
    b'masked_prompt = "{sentence} {mask}"\nlabel_field = "label"\n'
    b'metric = "f1"\ncut = "sentence"\n[answers]\n0 = " bad"\n1 = " good"\n',
    "completion.toml": b'name = "t"\nkind = "completion"\nprompt = "{sentence}"\nanswer = " {label}\\n"\n',
    "data.jsonl": _ROWS["jsonl"],
}


def _read_task(folder: Path) -> None:
    for name in ("choice.toml", "completion.toml"):
        custom.load(folder / name)[0].load(folder / "data.jsonl", "train")


# ------------------------------------------------------------------------------------------------ settings

_CONFIG = b"""model = "embedded"
task = "embedded"
data = "embedded"
profile = "edge-4gb-cpu"
steps = 20
rank = 4
lr = "auto"
targets = ["q_proj", "v_proj"]
batch_size = 4
host_budget = "2GiB"
"""


def _read_config(folder: Path) -> None:
    config_file.read(folder / "config.toml")
    config = config_file.resolve(str(folder / "config.toml"), {"seed": "7"})
    assert config_file.write(config)


def _read_hardware(folder: Path) -> None:
    machine = hardware.find(str(folder / "machine.toml"))
    machine.settings({})
    assert machine.rate(machine.compute)


# ------------------------------------------------------------------------------------------------ runs


def _journal() -> bytes:
    data = journal._header(journal.Form(3, 1))
    checksum = zlib.crc32(data)
    for step in range(4):
        record = journal.Record(
            step, 7, 8 * step, (1.0, 1.5, 0.5), (0.25,), (1e-3,) if step else None, 0.1, 1e-4, 0.0
        )
        packed, checksum = journal._packed(record, journal.Form(3, 1), checksum)
        data += packed
    return data


def _read_journal(folder: Path) -> None:
    path = folder / "journal.bin"
    found = journal.read(path)
    with journal.Journal(path, 3) as opened:
        if found:
            opened.append(found[-1]._replace(step=found[-1].step + 1 & (1 << 64) - 1))
            opened.truncate(found[-1].step)
    journal.read(path)


def _state(step: int, **others: Any) -> dict[str, Any]:
    """The entries of a checkpoint's state.json."""
    return {
        **others,
        "step": step,
        "bad_steps": 0,
        "step_size": {"scale": 1.0},
        "halvings": 0,
        "library": "torch",
        "parameters": ["a", "b"],
        "files": {"adapter/x": _sha256(b"x"), "curvature.safetensors": _sha256(_tensors())},
    }


def _sealed(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "checksum": checkpoint._checksum(state)}


#: The older one has the form without a checksum, which would refuse most changes before they are looked at.
_STATES = {"step-000002": _sealed(_state(2, format=2)), "step-000001": _state(1)}


def _read_checkpoint(folder: Path) -> None:
    for name in _STATES:
        path = folder / name
        checkpoint.check(path)
        checkpoint.numbers(path)
        checkpoint.parameters(path)
        assert checkpoint.chunk_halvings(path) >= 0
        tensorfile.load(path / "curvature.safetensors")
    checkpoint.newest_valid(folder)


_METRICS = (
    b'{"kind": "step", "step": 0, "skipped": false, "forwards": 3, "seconds": 0.5, "tokens": 9}\n'
    b'{"kind": "eval", "step": 1, "when": "after", "metric": 0.5}\n'
)
_RUN = {
    "config.toml": _CONFIG,
    "metrics.jsonl": _METRICS,
    "run.json": _json({"train": "a", "model": "b", "settings": {"seed": 0, "mu": 0.001, "clip": None}}),
    "summary.json": _json({"steps": 1, "seconds": 1.5}),
    "plan.json": _json({"owners": {"weights": 100}}),
    "memory.json": _json({"samples": []}),
}


def _read_run(folder: Path) -> None:
    run = RunFolder(folder, writes=False)
    identity.read(folder / "run.json")
    config_file.check_same_run(run.config(), replace(run.config(), out=str(folder)))
    run.read_metrics()
    run.evaluations()
    run.read_summary()
    records = [read_run(folder)]
    make_charts(records)  # drawn they take a second and more
    as_json(records)
    render(records, [])
    run.keep_metrics(1, ended=True)


# ------------------------------------------------------------------------------------------------ models

_INDEX = {
    "metadata": {"sha256": {"a.safetensors": _sha256(_tensors())}},
    "weight_map": {"w": "a.safetensors"},
}
_MODEL = {
    "config.json": _json(
        {"model_type": "llama", "quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
    ),
    "model.safetensors.index.json": _json(_INDEX),
    "a.safetensors": _tensors(),
}


def _read_model(folder: Path) -> None:
    opened = Checkpoint.open(folder)
    opened.quantized_bits  # noqa: B018 - it checks
    for name in opened:
        opened.read(name)
    opened.verify()
    fingerprint.of_model(folder)


def _read_tensors(folder: Path) -> None:
    path = folder / "x.safetensors"
    file = TensorFile(path)
    for name, entry in file.entries.items():
        file.read(name)
        if entry.shape:
            file.read_rows(name, 0, entry.shape[0])
    tensorfile.equal(path, path)
    tensorfile.load(path)


_ADAPTER = {
    "adapter_config.json": _json(
        {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q"],
            "use_rslora": True,
            "bias": "none",
        }
    ),
    "adapter_model.safetensors": _tensors(),
}


def _read_adapter(folder: Path) -> None:
    found = adapter.find_adapter(folder)
    adapter.scaling(adapter.read_peft_config(found))
    path = peft_weights(found)
    tensorfile.load(path)
    tensorfile.load_floats(path)


_SPACE = {
    "format": 1,
    "space": "dense",
    "targets": ["q"],
    "base_model": "b",
    "kind": "causal",
    "bits": "nf4",
    "head": False,
}
_EXPORT = {
    "format": 1,
    "kind": "causal",
    "form": "base",
    "bits": "nf4",
    "products": "exact",
    "base": {"model": "m", "fingerprint": "f"},
    "tuned": None,
    "check": None,
    "model": {
        "files": {"model.onnx": {"bytes": 1, "sha256": _sha256(b"x")}},
        "inputs": [{"name": "input_ids"}],
        "outputs": ["logits"],
        "cache": [[2, 8]],
        "adapter_inputs": {"lora": {"q": [8, 8]}, "head": {"score": [2, 8]}},
    },
    "adapters": {"a": {"file": "adapters/a.onnx_adapter", "bytes": 1, "sha256": _sha256(b"x")}},
}


def _tiny_llama() -> Model:
    """A Llama of random weights in memory, made once; 4-bit linears 64 wide."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=32, num_attention_heads=2, num_key_value_heads=2, **sizes)
    with tempfile.TemporaryDirectory() as name:
        LlamaForCausalLM(config).save_pretrained(name)
        return load(name, kind="causal", bits="nf4", device="cpu", double_quant=False, residency="resident")


@functools.cache
def _attached(name: str) -> Any:
    """A space on a model of its own."""
    options = {"rank": 2} if name == "lora" else {}
    space: Any = spaces.get(name, targets="attention", **options)
    space.attach(_tiny_llama(), 0)
    return space


def _saved(name: str) -> dict[str, bytes]:
    """The files that a space saves."""
    with tempfile.TemporaryDirectory() as place:
        _attached(name).save(place)
        return {path.name: path.read_bytes() for path in Path(place).iterdir()}


def _bits(value: Tensor) -> bytes:
    return value.flatten().view(torch.uint8).numpy().tobytes()


def _loading(name: str, space: str, attacked: Mapping[str, Form]) -> Target:
    """An adapter that is put on a model, as `eval` and `generate` do, and then read into its parameters."""

    model = _attached(space).model

    def read(folder: Path) -> None:
        again = folder / "again"
        attach_adapter(model, folder).save(again)
        for path in again.glob("*.safetensors"):
            given, kept = load_file(folder / path.name), load_file(path)
            assert all(_bits(given[name].to(value.dtype)) == _bits(value) for name, value in kept.items())

    return Target(name, _saved(space), attacked, read)


def _read_export(folder: Path) -> None:
    export = Export.open(folder)
    parts = (export.inputs, export.outputs, export.cache, export.adapter_inputs, export.graph, export.kind)
    assert all(part is not None for part in parts)
    for name in export.adapters:
        export.find_adapter(name)


_TRAIN = {
    "format": 3,
    "kind": "classifier",
    "bits": "nf4",
    "loss": "class",
    "positions": 64,
    "parameters": [{"name": "a", "shape": [3, 2], "trained": True}],
    "lora": {"r": 2},
    "onnx_adapter": {"names": {"a": {"input": "i", "transpose": True, "scale": 1.0}}},
}
_WORDS = {"[UNK]": 0, "a": 1, "b": 2, "</s>": 3}
_TOKENIZER = {
    "tokenizer.json": _json(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "normalizer": {"type": "Lowercase"},
            "added_tokens": [],
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": _WORDS, "unk_token": "[UNK]"},
        }
    ),
    "tokenizer_config.json": _json(
        {
            "eos_token": "</s>",
            "unk_token": {"content": "[UNK]"},
            "model_max_length": 64,
            "added_tokens_decoder": {"4": {"content": "<x>", "special": True}},
            "extra_special_tokens": ["<y>"],
            "chat_template": [{"name": "default", "template": "{{ 1 }}"}],
        }
    ),
    "special_tokens_map.json": _json({"pad_token": "<pad>"}),
}


def _read_tokenizer(folder: Path) -> None:
    tokenizer = EdgeTokenizer(folder)
    ids = tokenizer("a b c <x>")["input_ids"]
    tokenizer.decode(ids, skip_special_tokens=True)
    if tokenizer.chat_template is not None:
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "c"}], tokenize=False, add_generation_prompt=True
        )


def _every(made: Mapping[str, Any], form: Form) -> dict[str, Form]:
    return dict.fromkeys(made, form)


def targets() -> Iterable[Target]:
    """All of them."""
    hardware_file = (hardware.folder() / "rtx3090-24gb.toml").read_bytes()
    inside = {
        f"{step}/{name}": data
        for step in _STATES
        for name, data in {"adapter/x": b"x", "curvature.safetensors": _tensors()}.items()
    }
    task_forms: dict[str, Form] = {"choice.toml": "toml", "completion.toml": "toml"}
    return (
        *map(_rows, _ROWS),
        Target("tasks", {"train.jsonl": _json(_ANY_ROW)}, {"train.jsonl": "jsonl"}, _read_tasks),
        Target("task-toml", _TASK_FILES, task_forms, _read_task),
        Target("config", {"config.toml": _CONFIG}, {"config.toml": "toml"}, _read_config),
        Target("hardware", {"machine.toml": hardware_file}, {"machine.toml": "toml"}, _read_hardware),
        Target("journal", {"journal.bin": _journal()}, {"journal.bin": "journal"}, _read_journal),
        Target(
            "checkpoint",
            {**inside, **{f"{step}/state.json": _json(state) for step, state in _STATES.items()}},
            {f"{step}/state.json": "json" for step in _STATES},
            _read_checkpoint,
        ),
        Target(
            "run",
            _RUN,
            {
                name: "toml" if name.endswith("toml") else "jsonl" if name.endswith("l") else "json"
                for name in _RUN
            },
            _read_run,
        ),
        Target(
            "model",
            _MODEL,
            {"config.json": "json", "model.safetensors.index.json": "json", "a.safetensors": "safetensors"},
            _read_model,
        ),
        Target("safetensors", {"x.safetensors": _tensors()}, {"x.safetensors": "safetensors"}, _read_tensors),
        Target(
            "adapter",
            _ADAPTER,
            {"adapter_config.json": "json", "adapter_model.safetensors": "safetensors"},
            _read_adapter,
        ),
        Target("space", {"hizoo_space.json": _json(_SPACE)}, {"hizoo_space.json": "json"}, read_record),
        Target(
            "export",
            {"export.json": _json(_EXPORT), "model.onnx": b"x", "adapters/a.onnx_adapter": b"x"},
            {"export.json": "json"},
            _read_export,
        ),
        _loading(
            "lora-load",
            "lora",
            {"adapter_config.json": "json", "adapter_model.safetensors": "safetensors"},
        ),
        _loading(
            "inplace-load", "scales", {"hizoo_space.json": "json", "block-00000.safetensors": "safetensors"}
        ),
        _loading("sparse-load", "sparse", {"hizoo_space.json": "json", "sparse.safetensors": "safetensors"}),
        Target("train", {"train.json": _json(_TRAIN)}, {"train.json": "json"}, TrainRecord.read),
        Target("tokenizer", _TOKENIZER, _every(_TOKENIZER, "json"), _read_tokenizer),
    )
