"""Quantizing once: the files are transformers' and bitsandbytes' own, whole or not there, and checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)
from typer.testing import CliRunner

from hizoo_lite.cli import app
from hizoo_lite.quant.quantize import Quantization
from tests.architectures import TINY_CONFIGS, save_tiny, tiny_batch

AUTO = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "classifier": AutoModelForSequenceClassification,
}
INDEX = "model.safetensors.index.json"
FORMS = [("nf4", True), ("nf4", False), ("fp4", True), ("int8", False)]


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def quantize(source: Path, out: Path, **options: Any) -> Quantization:
    work = Quantization(source, out, **{"kind": "causal", "bits": "nf4", **options})
    work.run()
    return work


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Everything the safetensors library reads from a folder."""
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bf16 Llama of two blocks, with a tokenizer's file."""
    folder = tmp_path_factory.mktemp("source")
    save_tiny("llama", folder, dtype=torch.bfloat16)
    (folder / "vocab.txt").write_text("a\nb\n")
    return folder


@pytest.fixture(scope="module")
def finished(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quantized Llama; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    quantize(llama, folder)
    return folder


@pytest.fixture
def own(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "own"))


# -------------------------------------------------------------------------------- transformers' own


def theirs(folder: Path, kind: str, bits: str, double_quant: bool, skip: list[str]) -> torch.nn.Module:
    """The model as transformers quantizes it."""
    four = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": bits,
        "bnb_4bit_use_double_quant": double_quant,
    }
    options: dict[str, Any] = {"load_in_8bit": True} if bits == "int8" else four
    config = BitsAndBytesConfig(**options, llm_int8_skip_modules=skip)
    return AUTO[kind].from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})


def logits(module: torch.nn.Module) -> torch.Tensor:
    ids, mask = tiny_batch()
    for layer in module.modules():  # else bitsandbytes repacks the weights at their first use on CPU
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        return module(input_ids=ids, attention_mask=mask).logits


ARCHITECTURES = ["llama", "qwen2", "opt", "gpt2", "gemma2", "phi3", "gpt_neox", "bert", "roberta"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("bits", "double_quant"), FORMS)
def test_the_files_are_what_transformers_saves_and_loads(name, bits, double_quant, dtype, tmp_path):
    full, out, saved = tmp_path / "full", tmp_path / "out", tmp_path / "saved"
    kind = TINY_CONFIGS[name].kind
    save_tiny(name, full, dtype=dtype)
    quantize(full, out, kind=kind, bits=bits, double_quant=double_quant)
    written = json.loads((out / "config.json").read_text())["quantization_config"]
    theirs(full, kind, bits, double_quant, written["llm_int8_skip_modules"]).save_pretrained(saved)
    mine, wanted = tensors_of(out), tensors_of(saved)
    assert set(mine) == set(wanted)
    for key, tensor in wanted.items():
        assert mine[key].dtype == tensor.dtype, key
        assert mine[key].shape == tensor.shape, key
        assert torch.equal(mine[key], tensor), key
    assert any(".weight." in key or key.endswith("SCB") for key in mine)
