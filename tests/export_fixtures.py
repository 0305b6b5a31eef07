"""Tiny models with two adapters each, to be exported to ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hizoo_lite.base import Bits
from hizoo_lite.engine.load import load
from hizoo_lite.export.quantize import Quantization
from hizoo_lite.model.model import Model
from hizoo_lite.spaces import LoRA
from tests.architectures import save_tiny

#: name -> kind; of every one the embeddings, positions, norms, masks and heads are different.
KINDS = {
    "llama": "causal",
    "qwen2": "causal",
    "qwen3": "causal",
    "gemma2": "causal",
    "opt": "causal",
    "gpt2": "causal",
    "roberta": "masked",
    "bert": "classifier",
}
LAYERS = {"gpt2": "n_layer"}


def write_adapter(
    model: Model, folder: Path, rank: int, seed: int, targets: str = "all-linear", scale: float = 0.3
) -> Path:
    """A PEFT adapter that changes the logits by much more than rounding."""
    space = LoRA(rank=rank, alpha=3.0, targets=targets, train_a=True, blocks="all")
    space.attach(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for value in space.parameters.values():
        value.copy_(scale * torch.randn(value.shape, generator=generator))
    space.save(folder)
    space.detach()
    return folder


def tuned(folder: Path, name: str, bits: Bits, **changes: Any) -> tuple[Path, Path]:
    """A tiny model in its own folder, and two adapters of it: other ranks, other layers."""
    kind: Any = KINDS[name]
    save_tiny(name, folder / "source", kind=kind, **{LAYERS.get(name, "num_hidden_layers"): 1}, **changes)
    source = folder / "source"
    if bits != "none":
        Quantization(str(source), folder / "model", kind=kind, bits=bits).run(lambda count: None)
        source = folder / "model"
    model = load(source, kind=kind, compute_dtype="float32", device="cpu", residency="resident", bits=bits)
    first = write_adapter(model, folder / "first", rank=2, seed=1)
    second = write_adapter(model, folder / "second", rank=3, seed=2, targets="attention")
    return first, second
