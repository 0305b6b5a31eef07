"""Random checkpoints of published shapes: they load here and in transformers, like fresh models."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import make_random_model
import pytest
import torch
from transformers import AutoModelForCausalLM

from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.engine.load import load
from hizoo_lite.errors import UserError
from hizoo_lite.model import build
from tests.tables import covering
from tests.test_load_process import run_python

SMALL = {"vocab_size": 500, "hidden_size": 256, "num_attention_heads": 4}
LLAMA = {**SMALL, "intermediate_size": 512, "num_key_value_heads": 4, "max_position_embeddings": 64}
OPT = {**SMALL, "word_embed_proj_dim": 256, "ffn_dim": 512}


def make(out: Path, shape: str = "tinyllama-1.1b", **options: Any) -> Path:
    overrides = OPT if shape.startswith("opt") else LLAMA
    make_random_model.make(shape, out, **{"layers": 2, "overrides": overrides, **options})
    return out


def loss(module: torch.nn.Module) -> float:
    for layer in module.modules():  # else bitsandbytes repacks the weights at their first use on CPU
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    ids = torch.randint(5, 500, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float(module(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize(
    ("shape", "bits", "double_quant"),
    covering(
        ("opt-1.3b", "tinyllama-1.1b", "qwen2.5-7b"),
        (("nf4", True), ("nf4", False), ("fp4", True), ("int8", False), ("none", False)),
    ),
)
def test_a_random_model_loads_everywhere_and_guesses(shape, bits, double_quant, tmp_path):
    out = make(tmp_path / "out", shape, bits=bits, double_quant=double_quant)
    ours = load(out, bits=bits, device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(out, device_map={"": "cpu"})
    assert Checkpoint.open(out).verify() > 0
    assert abs(loss(ours.module) - math.log(500)) < 0.4
    # transformers multiplies in bf16 and, in int8, with quantized activations
    assert abs(loss(ours.module) - loss(theirs)) < 0.03


@pytest.mark.parametrize("bits", ["nf4", "fp4", "int8", "none"])
def test_decoded_matrices_look_normal(bits, tmp_path):
    model = load(make(tmp_path / "out", bits=bits), bits=bits, device="cpu")
    weight = model.linears["model.layers.1.mlp.up_proj"].weight
    values = torch.empty(weight.shape)
    weight.unpack(values)
    if weight.row_scale is not None:
        values *= weight.row_scale[:, None]
    assert abs(float(values.std()) / 0.02 - 1) < 0.05
    assert abs(float(values.mean())) < 3e-4  # six deviations of the mean of 131 072 values
    kurtosis = float((values / values.std()).pow(4).mean())
    assert 2.5 < kurtosis < 3.3


def test_the_same_arguments_give_the_same_bytes_and_another_seed_others(tmp_path):
    one, two, three = (
        make(tmp_path / name, seed=seed) for name, seed in [("one", 0), ("two", 0), ("three", 1)]
    )
    name = "block-00001.safetensors"
    assert (one / name).read_bytes() == (two / name).read_bytes() != (three / name).read_bytes()
    assert (one / name).read_bytes() != (one / "block-00000.safetensors").read_bytes()


#: Parameters in thousand millions, as published (OPT with its tied head counted once).
PUBLISHED = {
    "opt-125m": 0.125,
    "opt-1.3b": 1.316,
    "opt-2.7b": 2.652,
    "opt-6.7b": 6.658,
    "opt-13b": 12.853,
    "opt-30b": 29.975,
    "opt-66b": 65.718,
    "opt-175b": 174.6,
    "tinyllama-1.1b": 1.100,
    "llama-2-7b": 6.738,
    "llama-2-13b": 13.016,
    "llama-2-70b": 68.977,
    "mistral-7b": 7.242,
    "llama-3-8b": 8.030,
    "llama-3-70b": 70.554,
    "qwen2.5-7b": 7.616,
    "qwen2.5-72b": 72.706,
}


def test_every_shape_has_its_published_size():
    assert set(PUBLISHED) == set(make_random_model.SHAPES)
    for shape, size in PUBLISHED.items():
        one, two = (parameters(shape, layers) for layers in (1, 2))
        layers = make_random_model.SHAPES[shape].arguments["num_hidden_layers"]
        assert abs((one + (layers - 1) * (two - one)) / 1e9 / size - 1) < 0.005, shape


def parameters(shape: str, layers: int) -> int:
    module = build.build(make_random_model._config(shape, layers, {}), "causal")
    return sum(p.numel() for n, p in module.named_parameters() if n not in module.all_tied_weights_keys)


MEASURE = """
import re, sys
import make_random_model

def memory(field):
    return int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

from pathlib import Path
small = dict(vocab_size=64, hidden_size=64, intermediate_size=64)
small |= dict(num_attention_heads=1, num_key_value_heads=1)
make_random_model.make("tinyllama-1.1b", Path(sys.argv[1]) / "first", layers=1, overrides=small)
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
out, small = Path(sys.argv[1]) / "second", dict(vocab_size=9000)
written = make_random_model.make("tinyllama-1.1b", out, layers=4, overrides=small)
print(written, memory("VmHWM") - before)
"""


@pytest.mark.grid
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures with Linux's /proc")
def test_no_more_than_a_few_chunks_are_held(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(Path(make_random_model.__file__).parent)!r})\n" + MEASURE
    written, peak = map(int, run_python(code, tmp_path).splitlines()[-1].split())
    assert written > 150 << 20
    assert peak < 60 << 20  # measured 33 MiB: a chunk while it is quantized, 20 bytes an element


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "gpt-5"}, "--shape: got 'gpt-5', allowed: opt-125m, "),
        ({"bits": "nf5"}, "--bits: got 'nf5', allowed: nf4"),
        ({"layers": 23}, "--layers: got 23, allowed: 1 to 22"),
        ({"layers": 0}, "--layers: got 0, allowed: 1 to 22"),
    ],
)
def test_bad_arguments_are_refused(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        make(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_used_folders_and_full_disks_are_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not empty; allowed: a new or empty folder"):
        make(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5))
    arguments = ["make_random_model.py", "--shape", "opt-175b", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", arguments)
    assert make_random_model.main() == 2
    assert "GiB are needed at" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_index_says_how_it_was_made(tmp_path):
    index = json.loads((make(tmp_path / "out", seed=3) / "model.safetensors.index.json").read_text())
    assert index["metadata"]["random"] == {"shape": "tinyllama-1.1b", "seed": 3, "bits": "nf4"}
