"""Small exported folders, made here with torch alone: what the exporters write, by their contract."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import hizoo_lite
from hizoo_lite.batch import Batch
from hizoo_lite.checkpoints.adapter import PEFT_WEIGHTS
from hizoo_lite.checkpoints.fingerprint import of_model
from hizoo_lite.config import TrainConfig
from hizoo_lite.edge.folder import _FIELDS, describe
from hizoo_lite.edge.graph import COMPARED, FORMAT
from hizoo_lite.edge.onnx_adapter import save_adapter
from hizoo_lite.engine.load import load
from hizoo_lite.noise import normal
from hizoo_lite.spaces import LoRA
from hizoo_lite.tasks import Encoder
from hizoo_lite.tensors import batch_tensors
from hizoo_lite.train import components, config_file

DEMO = Path(hizoo_lite.__file__).parent / "demo"
#: Of the embedded model, as the records say it.
BASE = {"model": "embedded", "fingerprint": of_model(DEMO)}
OUTPUTS = ["losses", "scores", "divergences"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
OTHERS = ("token_type_ids", "loss", "made_of", "hidden")
INTEGERS = tuple(name for name in Batch._fields if name not in OTHERS)
#: How many dimensions an input has.
RANKS = {name: 2 if name in ("input_ids", "attention_mask") else 1 for name in INTEGERS}


class _Branched(nn.Module):
    """A linear layer plus an adapter of every branch's own."""

    def __init__(self, base: nn.Linear, scaling: float) -> None:
        super().__init__()
        self.base, self.scaling = base, scaling
        self.a = self.b = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        branches = self.a.shape[0]
        folded = x.reshape(branches, -1, x.shape[-1])
        own = torch.bmm(torch.bmm(folded, self.a.transpose(1, 2)), self.b.transpose(1, 2))
        return self.base(x) + self.scaling * own.reshape(*x.shape[:-1], -1)


class _TrainGraph(nn.Module):
    """Losses of all branches of a causal model on a batch, as the contract of train.onnx says."""

    def __init__(self, model: nn.Module, space: LoRA, loss: str) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self.layers = []
        for name in space.target_names:
            parent, _, last = name.rpartition(".")
            layer = _Branched(model.get_submodule(name), space.scaling)
            setattr(model.get_submodule(parent), last, layer)
            self.layers.append(layer)

    def forward(
        self, batch: Sequence[Tensor], compared: Tensor, parameters: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        ids, mask, row, position, site, token, slot, example, gold = batch
        for layer, a, b in zip(self.layers, parameters[::2], parameters[1::2], strict=True):
            layer.a, layer.b = a, b
        branches = parameters[0].shape[0]
        logits = self.model(
            input_ids=ids.repeat(branches, 1), attention_mask=mask.repeat(branches, 1), use_cache=False
        ).logits
        logits = logits.reshape(branches, ids.shape[0], ids.shape[1], -1)[:, row, position].double()
        log_p = logits.log_softmax(-1)
        mine = (slot[:, None] == torch.arange(example.shape[0])[None]).double()
        scores = log_p[:, site, token] @ mine / mine.sum(0)
        if self.loss == "answer":
            return (
                -scores[:, gold],
                scores.float(),
                (_apart(log_p, compared)[:, site] @ mine / mine.sum(0))[:, gold],
            )
        of = example[:, None] == torch.arange(gold.shape[0])[None]
        total = scores[:, :, None].masked_fill(~of, -1e30).logsumexp(1)
        one, other = ((scores - total[:, example]).index_select(0, side) for side in compared.unbind(1))
        terms = (one.exp() - other.exp()) * (one - other)
        return total - scores[:, gold], scores.float(), terms @ of.double()


def _apart(log_p: Tensor, compared: Tensor) -> Tensor:
    """The symmetric divergence between the branches that are compared, over the last axis."""
    one, other = (log_p.index_select(0, side) for side in compared.unbind(1))
    terms = (one.exp() - other.exp()) * (one - other)
    ones = torch.ones_like(terms)[..., None]
    return (terms[..., None, :] @ ones).flatten(1)  # onnxruntime's sum keeps the axis if there is no term


def export_training(config: TrainConfig, folder: Path) -> Path:
    """A folder as `export --to onnx-train` writes it, of a causal model in float32 with its LoRA."""
    folder.mkdir(parents=True)
    source = Path(config.model)
    model = load(source, kind="causal", bits="none", compute_dtype="float32", device="cpu")
    space = LoRA(rank=config.rank, train_a=config.train_a, blocks=config.blocks)
    space.attach(model, config.seed)
    space.save(folder / "adapter")
    tensors = tensors_of(space)
    task = components.find_task(config.task)
    examples = components.make_splits(config, task).train[:2]
    encoder = Encoder(AutoTokenizer.from_pretrained(source), "causal", task, config.max_length)
    batch = batch_tensors(encoder.collate([encoder.encode(example, training=True) for example in examples]))
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    graph = _TrainGraph(plain, space, batch.loss).eval()
    arguments = (
        tuple(getattr(batch, name).clone() for name in INTEGERS),
        torch.zeros(4, 2, dtype=torch.int64),
        tuple(value.repeat(3, *(1 for _ in value.shape)) for value in tensors.values()),
    )
    dynamic = (
        tuple(dict.fromkeys(range(RANKS[name]), torch.export.Dim.DYNAMIC) for name in INTEGERS),
        {0: torch.export.Dim.DYNAMIC},
        tuple({0: torch.export.Dim.DYNAMIC} for _ in tensors),
    )
    _export(graph, arguments, dynamic, [*INTEGERS, COMPARED, *tensors], OUTPUTS, folder / "train.onnx")
    record = {
        "format": FORMAT,
        "kind": "causal",
        "bits": "none",
        "loss": batch.loss,
        "positions": model.positions,
        "parameters": [
            {"name": name, "shape": list(v.shape), "trained": name in space.parameters}
            for name, v in tensors.items()
        ],
        "lora": json.loads((folder / "adapter" / "adapter_config.json").read_text()),
        "onnx_adapter": {"names": onnx_names(space)},
        "base": {"model": config.model, "fingerprint": of_model(source)},
    }
    (folder / "train.json").write_text(json.dumps(record))
    (folder / "config.toml").write_text(config_file.write(config))
    for name in TOKENIZER_FILES:
        shutil.copy(source / name, folder)
    return folder


def export_classifier(folder: Path, table: Tensor, weight: Tensor) -> Path:
    """A training graph of a classifier: means of embeddings by type, and a head of every branch's own."""
    (folder / "adapter").mkdir(parents=True)

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(table)

        def forward(
            self, ids: Tensor, mask: Tensor, types: Tensor, gold: Tensor, compared: Tensor, head: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            weights = (mask * (1 + types)).float()
            features = (self.table[ids] * weights[:, :, None]).sum(1) / mask.sum(1)[:, None]
            scores = features @ head.transpose(1, 2)
            log_p = scores.double().log_softmax(-1)
            return -log_p[:, torch.arange(gold.shape[0]), gold], scores, _apart(log_p, compared)

    ids = torch.arange(6).reshape(2, 3)
    compared = torch.zeros(4, 2, dtype=torch.int64)
    arguments = (ids, torch.ones_like(ids), ids % 2, torch.tensor([0, 1]), compared, weight.repeat(3, 1, 1))
    any_size = torch.export.Dim.DYNAMIC
    dynamic = (*({0: any_size, 1: any_size} for _ in range(3)), *({0: any_size} for _ in range(3)))
    names = ["input_ids", "attention_mask", "token_type_ids", "gold", COMPARED, "score.weight"]
    _export(Graph().eval(), arguments, dynamic, names, OUTPUTS, folder / "train.onnx")
    path = folder / "adapter" / PEFT_WEIGHTS
    save_file({"base_model.model.score.weight": weight}, path)
    record = {
        "format": FORMAT,
        "kind": "classifier",
        "bits": "none",
        "loss": "class",
        "positions": None,
        "parameters": [{"name": "score.weight", "shape": list(weight.shape), "trained": True}],
        "lora": {},
        "onnx_adapter": {"names": {}},
    }
    (folder / "train.json").write_text(json.dumps(record))
    return folder


def tensors_of(space: LoRA) -> dict[str, Tensor]:
    """A and B of one layer after the other, whether trained or not, by PEFT name."""
    names = [f"{target}.lora_{side}.weight" for target in space.target_names for side in "AB"]
    return {name: {**space.frozen, **space.parameters}[name] for name in names}


def onnx_names(space: LoRA) -> dict[str, dict[str, Any]]:
    """A as it is turned, B turned and scaled: as model.onnx takes them."""
    return {
        name: {
            "input": _input(name),
            "transpose": True,
            "scale": 1.0 if ".lora_A." in name else space.scaling,
        }
        for name in tensors_of(space)
    }


def _input(name: str) -> str:
    """Of model.onnx, for a parameter by its PEFT name."""
    return name.removesuffix(".weight")


def _export(
    module: nn.Module, arguments: Any, dynamic: Any, inputs: list[str], outputs: list[str], path: Path
) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            arguments,
            str(path),
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=dynamic,
            dynamo=True,
            external_data=True,
            verbose=False,
        )


class _CausalGraph(nn.Module):
    """Logits and a grown cache of a causal model with adapter inputs, as the contract of model.onnx says."""

    def __init__(self, model: nn.Module, targets: Sequence[str]) -> None:
        super().__init__()
        self.model, self.layers = model, []
        for name in targets:
            parent, _, last = name.rpartition(".")
            layer = _Adapted(model.get_submodule(name))
            setattr(model.get_submodule(parent), last, layer)
            self.layers.append(layer)

    def forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, past: Sequence[Tensor], adapters: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        for layer, a, b in zip(self.layers, adapters[::2], adapters[1::2], strict=True):
            layer.a, layer.b = a, b
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        grown = [part for layer in out.past_key_values.layers for part in (layer.keys, layer.values)]
        return (out.logits, *grown)


class _Adapted(nn.Module):
    """A linear layer plus x A B; A (in, rank), B (rank, out), the scale in B."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = self.b = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a @ self.b


def tuned_space(rank: int = 2) -> LoRA:
    """The embedded model's LoRA with values that change what it says."""
    model = load(DEMO, kind="causal", bits="none", compute_dtype="float32", device="cpu")
    space = LoRA(rank=rank, train_a=True, blocks="all")
    space.attach(model, 0)
    for name, value in space.parameters.items():
        value.add_(normal(4, 0, name, value.shape), alpha=0.1)
    return space


def export_causal(space: LoRA, folder: Path) -> Path:
    """A folder as `export --to onnx` writes it, of the embedded model, with the adapter "tuned"."""
    (folder / "adapters").mkdir(parents=True)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    config = model.config
    graph = _CausalGraph(model, space.target_names).eval()
    cache = [
        torch.zeros(2, config.num_key_value_heads, 5, config.head_dim)
        for _ in range(2 * config.num_hidden_layers)
    ]
    adapters = [value.T.clone() for value in space.parameters.values()]
    ids = torch.arange(6).reshape(2, 3)
    arguments = (ids, torch.ones(2, 8, dtype=torch.int64), ids + 5, tuple(cache), tuple(adapters))
    any_size = torch.export.Dim.DYNAMIC
    ranks = [{1: any_size} if ".lora_A." in name else {0: any_size} for name in space.parameters]
    dynamic = (
        *({0: any_size, 1: any_size} for _ in range(3)),
        tuple({0: any_size, 2: any_size} for _ in cache),
        tuple(ranks),
    )
    layers = [(n, part) for n in range(config.num_hidden_layers) for part in ("key", "value")]
    tokens = ["input_ids", "attention_mask", "position_ids"]
    inputs = [*tokens, *(f"past_key_values.{n}.{part}" for n, part in layers), *map(_input, space.parameters)]
    outputs = ["logits", *(f"present.{n}.{part}" for n, part in layers)]
    path = folder / "model.onnx"
    _export(graph, arguments, dynamic, inputs, outputs, path)
    empty = {
        _input(name): np.zeros((v.shape[1], 0) if ".lora_A." in name else (0, v.shape[0]), dtype=np.float32)
        for name, v in space.parameters.items()
    }
    made = onnx.load(path, load_external_data=False)
    made.graph.initializer.extend(onnx.numpy_helper.from_array(v, name) for name, v in empty.items())
    onnx.save(made, path)
    _write_adapter(space, folder / "adapters" / "tuned.onnx_adapter")
    settings = {"model": {"context_length": config.max_position_embeddings, "eos_token_id": 2}}
    (folder / "genai_config.json").write_text(json.dumps(settings))
    sizes = {n: space.model.linears[n].weight.shape for n in space.target_names}
    lora = {name: (columns, rows) for name, (rows, columns) in sizes.items()}
    return _described(folder, "causal", DEMO, {"tuned": "adapters/tuned.onnx_adapter"}, lora)


def export_encoder(model: nn.Module, kind: str, tokenizer: Path, folder: Path) -> Path:
    """The same of a masked model or classifier that takes token types; it has no adapters."""
    folder.mkdir(parents=True)
    names = ["input_ids", "attention_mask", "token_type_ids"]

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *given: Tensor) -> Tensor:
            return self.model(**dict(zip(names, given, strict=True))).logits

    ids = torch.arange(6).reshape(2, 3)
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    arguments = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    _export(Graph().eval(), arguments, ((any_size,) * 3,), names, ["logits"], folder / "model.onnx")
    return _described(folder, kind, tokenizer, {}, {})


def _described(
    folder: Path,
    kind: str,
    tokenizer: Path,
    adapters: dict[str, str],
    lora: Mapping[str, tuple[int, int]],
) -> Path:
    files = {path.name: describe(path) for path in folder.glob("model.onnx*")}
    listed = {name: {"file": file, **describe(folder / file)} for name, file in adapters.items()}
    nothing: dict[str, object] = {"inputs": [], "outputs": [], "cache": []}
    model = {"files": files, **nothing, "adapter_inputs": {"lora": lora, "head": {}}}
    record = dict.fromkeys(_FIELDS) | {
        "format": 1,
        "kind": kind,
        "bits": "none",
        "model": model,
        "base": BASE,
    }
    record["adapters"] = listed
    (folder / "export.json").write_text(json.dumps(record))
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, folder)
    return folder


def _write_adapter(space: LoRA, path: Path) -> None:
    values = {
        _input(name): value.numpy().T * np.float32(1 if ".lora_A." in name else space.scaling)
        for name, value in space.parameters.items()
    }
    save_adapter(path, values)
