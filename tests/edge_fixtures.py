"""Small exported folders, made here with torch alone: what the exporters write, by their contract."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import hizoo_lite
from hizoo_lite.base import Batch
from hizoo_lite.model.load import load
from hizoo_lite.spaces import LoRA
from hizoo_lite.tasks import Encoder
from hizoo_lite.tensors import batch_tensors
from hizoo_lite.train import config_file, parts
from hizoo_lite.train.config import TrainConfig

DEMO = Path(hizoo_lite.__file__).parent / "demo"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
INTEGERS = tuple(name for name in Batch._fields if name not in ("token_type_ids", "loss"))
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

    def forward(self, batch: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        ids, mask, row, position, site, token, slot, example, gold = batch
        for layer, a, b in zip(self.layers, parameters[::2], parameters[1::2], strict=True):
            layer.a, layer.b = a, b
        branches = parameters[0].shape[0]
        logits = self.model(
            input_ids=ids.repeat(branches, 1), attention_mask=mask.repeat(branches, 1), use_cache=False
        ).logits
        logits = logits.reshape(branches, ids.shape[0], ids.shape[1], -1)[:, row, position].double()
        scored = logits.log_softmax(-1)[:, site, token]
        mine = (slot[:, None] == torch.arange(example.shape[0])[None]).double()
        scores = scored @ mine / mine.sum(0)
        if self.loss == "answer":
            return -scores[:, gold], scores.float()
        of = example[:, None] == torch.arange(gold.shape[0])[None]
        total = scores[:, :, None].masked_fill(~of, -1e30).logsumexp(1)
        return total - scores[:, gold], scores.float()


def export_training(config: TrainConfig, folder: Path) -> Path:
    """A folder as `export --to onnx-train` writes it, of the embedded model in float32 with its LoRA."""
    folder.mkdir(parents=True)
    model = load(DEMO, kind="causal", bits="none", compute_dtype="float32", device="cpu")
    space = LoRA(rank=config.rank)
    space.attach(model, config.seed)
    space.save(folder / "adapter")
    task = parts.find_task(config.task)
    examples = parts.make_splits(config, task).train[:2]
    encoder = Encoder(AutoTokenizer.from_pretrained(DEMO), "causal", task, config.max_length)
    batch = batch_tensors(encoder.collate([encoder.encode(example, training=True) for example in examples]))
    plain = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    graph = _TrainGraph(plain, space, batch.loss).eval()
    names = list(space.parameters)
    arguments = (
        tuple(getattr(batch, name).clone() for name in INTEGERS),
        tuple(value.repeat(3, *(1 for _ in value.shape)) for value in space.parameters.values()),
    )
    dynamic = (
        tuple(dict.fromkeys(range(RANKS[name]), torch.export.Dim.DYNAMIC) for name in INTEGERS),
        tuple({0: torch.export.Dim.DYNAMIC} for _ in names),
    )
    _export(graph, arguments, dynamic, [*INTEGERS, *names], ["losses", "scores"], folder / "train.onnx")
    record = {
        "format": 1,
        "kind": "causal",
        "bits": "none",
        "loss": batch.loss,
        "parameters": [{"name": name, "shape": list(v.shape)} for name, v in space.parameters.items()],
        "lora": json.loads((folder / "adapter" / "adapter_config.json").read_text()),
        "onnx_adapter": {"names": onnx_names(space)},
    }
    (folder / "train.json").write_text(json.dumps(record))
    (folder / "config.toml").write_text(config_file.write(config))
    for name in TOKENIZER_FILES:
        shutil.copy(DEMO / name, folder)
    return folder


def onnx_names(space: LoRA) -> dict[str, dict[str, Any]]:
    """A as it is turned, B turned and scaled: as model.onnx takes them."""
    return {
        name: {"input": name, "transpose": True, "scale": 1.0 if ".lora_A." in name else space.scaling}
        for name in space.parameters
    }


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
