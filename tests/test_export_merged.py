"""Merged folders: transformers alone gives our logits with the adapter, from every form of the base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from hizoo_lite import spaces
from hizoo_lite.base import Space, UserError
from hizoo_lite.export import merged
from hizoo_lite.model.load import load
from hizoo_lite.model.model import Model
from hizoo_lite.noise import normal
from hizoo_lite.quant.quantize import Quantization
from tests.architectures import TINY_CONFIGS, save_tiny, tiny_batch
from tests.test_load_process import run_python, save_large_llama

AUTO = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "classifier": AutoModelForSequenceClassification,
}

#: Float32 products in another order; logits are of order 10, and W + B A is rounded once to 24 bits.
FLOAT32 = {"rtol": 1e-5, "atol": 5e-5}


def tuned(model: Model, name: str, **options: Any) -> Space:
    """A space on the model whose every part has been moved far enough to matter."""
    space = spaces.get(name, targets="all-linear", **options)
    space.attach(model, seed=0)
    for key, value in space.parameters.items():
        value.add_(normal(3, 0, key, value.shape), alpha=0.05)
    for linear in model.linears.values():
        weight = linear.weight
        for buffer in ("residual", "absmax", "scb"):
            value = dict(weight.named_buffers(recurse=False)).get(buffer)
            if name != "lora" and value is not None:
                noise = normal(4, 0, f"{linear.name}.{buffer}", value.shape)
                value.copy_((value + 0.02 * noise).abs() if buffer != "residual" else 0.02 * noise)
    return space


def logits(module: torch.nn.Module) -> torch.Tensor:
    ids, _ = tiny_batch()
    for layer in module.modules():  # else bitsandbytes repacks the weights at their first use on CPU
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        return module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()


def theirs(folder: Path, kind: str, **options: Any) -> torch.nn.Module:
    """The folder in transformers, which must find every parameter and have use for every tensor."""
    module, info = AUTO[kind].from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return module.eval()


def merge(adapter: Path, out: Path, **options: Any) -> Quantization:
    work = merged.prepare(adapter, out, **options)
    work.run()
    return work


BASES = [
    ("llama", None, "nf4", True),
    ("llama", None, "none", True),
    ("gpt2", None, "nf4", False),
    ("gpt2", None, "int8", True),
    ("opt", None, "fp4", True),
    ("gemma2", None, "nf4", True),
    ("qwen2", None, "int8", True),
    ("roberta", None, "nf4", True),
    ("bert", None, "fp4", False),
    ("roberta", "classifier", "nf4", True),
    ("bert", "classifier", "int8", True),
    ("llama", "classifier", "nf4", True),
]


@pytest.mark.parametrize("is_stored", [False, True], ids=["quantized-on-load", "quantized-before"])
@pytest.mark.parametrize(("name", "kind", "bits", "double_quant"), BASES)
def test_transformers_gives_our_logits_with_the_adapter(name, kind, bits, double_quant, is_stored, tmp_path):
    kind = kind or TINY_CONFIGS[name].kind
    labels = {"num_labels": 3} if kind == "classifier" else {}
    base = tmp_path / "base"
    save_tiny(name, base, kind=kind, dtype=torch.bfloat16, **labels)
    if is_stored and bits != "none":
        base = tmp_path / "quantized"
        Quantization(tmp_path / "base", base, kind=kind, bits=bits, double_quant=double_quant).run()
    model = load(
        base, kind=kind, bits=bits, compute_dtype="float32", device="cpu", double_quant=double_quant, **labels
    )
    untuned = logits(model.module)
    tuned(model, "lora", rank=4, alpha=6).save(tmp_path / "adapter")
    ours = logits(model.module)
    assert (ours - untuned).abs().max() > 1e-2
    options = {"base_bits": bits, "base_double_quant": double_quant}
    merge(tmp_path / "adapter", tmp_path / "full", dtype="float32", **options)
    torch.testing.assert_close(logits(theirs(tmp_path / "full", kind)), ours, **FLOAT32)
    # the 16-bit folder is the float32 one rounded once, tensor by tensor
    merge(tmp_path / "adapter", tmp_path / "half", **options)
    exact, rounded = tensors_of(tmp_path / "full"), tensors_of(tmp_path / "half")
    assert set(exact) == set(rounded)
    assert all(torch.equal(rounded[key], value.to(torch.bfloat16)) for key, value in exact.items())
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("is_stored", [False, True])
@pytest.mark.parametrize(
    ("space", "bits", "options"),
    [
        ("dense", "nf4", {"update": "residual"}),
        ("dense", "none", {"update": "residual"}),
        ("dense", "int8", {"update": "requantize"}),
        ("dense", "nf4", {"update": "requantize"}),
        ("scales", "fp4", {}),
        ("scales", "int8", {}),
    ],
)
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_trained_weights_are_the_merged_ones(name, space, bits, options, is_stored, tmp_path):
    kind = "classifier" if name == "bert" else "causal"
    base = tmp_path / "base"
    save_tiny(name, base, kind=kind, dtype=torch.bfloat16)
    is_stored = is_stored and bits != "none"
    if is_stored:
        base = tmp_path / "quantized"
        Quantization(tmp_path / "base", base, kind=kind, bits=bits).run()
    model = load(base, kind=kind, bits=bits, compute_dtype="float32", device="cpu", double_quant=is_stored)
    untuned = logits(model.module)
    tuned(model, space, **options).save(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "full", dtype="float32")
    ours = logits(model.module)
    assert (ours - untuned).abs().max() > 1e-2
    torch.testing.assert_close(logits(theirs(tmp_path / "full", kind)), ours, **FLOAT32)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(("bits", "double_quant"), [("nf4", True), ("fp4", False), ("int8", True)])
def test_requantized_is_what_quantize_makes_of_the_float32_folder(name, bits, double_quant, tmp_path):
    kind = "classifier" if name == "bert" else "causal"
    save_tiny(name, tmp_path / "base", kind=kind, dtype=torch.bfloat16)
    model = load(tmp_path / "base", kind=kind, bits="nf4", device="cpu")
    tuned(model, "lora", rank=4).save(tmp_path / "adapter")
    options = {"base_bits": "nf4", "dtype": "float32"}
    merge(tmp_path / "adapter", tmp_path / "full", **options)
    packed = {"bits": bits, "double_quant": double_quant}
    merge(tmp_path / "adapter", tmp_path / "packed", **options, **packed)
    Quantization(tmp_path / "full", tmp_path / "again", kind=kind, **packed).run()
    made, wanted = tensors_of(tmp_path / "packed"), tensors_of(tmp_path / "again")
    assert set(made) == set(wanted)
    assert all(torch.equal(made[key], value) for key, value in wanted.items())
    merge(tmp_path / "adapter", tmp_path / "half", base_bits="nf4", **packed)
    half = tensors_of(tmp_path / "half")
    codes = [key for key in wanted if wanted[key].dtype == torch.int8 or key.endswith(".absmax")]
    assert codes
    assert all(torch.equal(half[key], wanted[key]) for key in codes)  # quantized from float32 all the same
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert "quantization_config" in config
    module = theirs(tmp_path / "half", kind, device_map={"": "cpu"})
    assert torch.isfinite(logits(module)).all()
    assert load(tmp_path / "half", kind=kind, device="cpu").bits == bits


def test_a_tied_head_is_written_once_and_stays_tied(tmp_path):
    save_tiny("qwen2", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    tuned(load(tmp_path / "base", bits="nf4", device="cpu"), "lora").save(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "out", base_bits="nf4")
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    module = theirs(tmp_path / "out", "causal")
    assert module.lm_head.weight is module.model.embed_tokens.weight


@pytest.mark.filterwarnings("ignore:.*tie.*")
def test_a_head_that_the_checkpoint_keeps_apart_stays_apart(tmp_path):
    save_tiny("qwen2", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 0.5
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    model = load(tmp_path / "base", bits="nf4", compute_dtype="float32", device="cpu")
    tuned(model, "lora").save(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "out", base_bits="nf4", dtype="float32")
    torch.testing.assert_close(logits(theirs(tmp_path / "out", "causal")), logits(model.module), **FLOAT32)


def test_a_bare_trunk_gets_its_head(tmp_path):
    whole = save_tiny("bert", tmp_path / "whole", kind="classifier")
    whole.bert.save_pretrained(tmp_path / "base")
    model = load(
        tmp_path / "base",
        kind="classifier",
        bits="nf4",
        compute_dtype="float32",
        device="cpu",
        num_labels=4,
    )
    tuned(model, "lora").save(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "out", base_bits="nf4", dtype="float32")
    module = theirs(tmp_path / "out", "classifier")
    assert module.config.num_labels == 4
    torch.testing.assert_close(logits(module), logits(model.module), **FLOAT32)
