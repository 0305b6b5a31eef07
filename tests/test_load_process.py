"""Loading seen from outside of the process: what it holds in memory, and what it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hizoo_lite.model import build
from tests.architectures import TINY_CONFIGS, save_tiny

ROOT = Path(__file__).parents[1]


def run_python(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_importing_prints_nothing():
    assert run_python("import hizoo_lite.quant, hizoo_lite.engine.load") == ""


MEASURE = """
import ctypes, gc, json, re, sys
from hizoo_lite.engine.load import load

def memory():
    ctypes.CDLL(None).malloc_trim(0)
    status = open("/proc/self/status").read()
    found = re.findall(r"(RssAnon|RssFile|VmRSS|VmHWM):\\s+(\\d+)", status)
    return {key: int(kilobytes) * 1024 for key, kilobytes in found}

tiny, large = sys.argv[1:]
load(tiny, bits="nf4", device="cpu")  # imports and first-use initialization are not the model's
gc.collect()
before = memory()
open("/proc/self/clear_refs", "w").write("5")
model = load(large, bits="nf4", device="cpu")
peak = memory()["VmHWM"]
gc.collect()
after = memory()
print(json.dumps({
    "anonymous": after["RssAnon"] - before["RssAnon"],
    "file": after["RssFile"] - before["RssFile"],
    "peak": peak - before["VmRSS"],
    "packed": model.nbytes(),
}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures with Linux's /proc")
def test_loading_holds_no_full_precision_copy(tmp_path):
    tiny, large = tmp_path / "tiny", tmp_path / "large"
    save_tiny("llama", tiny)
    stored_bytes, largest_bytes = save_large_llama(large)
    measured = json.loads(run_python(MEASURE, tiny, large).splitlines()[-1])
    mib = 1 << 20
    assert stored_bytes > 130 * mib
    # beside what is kept (packed linears, 16-bit embedding and head): one chunk with its temporaries,
    # 10 MB, and what the heap does not give back. Measured: kept + 0.5 MB, peak 12 MB above it.
    assert measured["packed"] < 0.5 * stored_bytes
    assert measured["anonymous"] < measured["packed"] + 40 * mib
    assert measured["peak"] < measured["packed"] + largest_bytes + 40 * mib
    # a mapped checkpoint would add all of `stored_bytes`
    assert measured["file"] < 16 * mib


def save_large_llama(folder: Path) -> tuple[int, int]:
    """A random bf16 Llama, one shard a tensor, without ever holding it; bytes of all and of the largest."""
    config = TINY_CONFIGS["llama"].config(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=8192,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    module = build.build(config, "causal")
    generator = torch.Generator().manual_seed(0)
    sizes, weight_map = [], {}
    for number, (name, parameter) in enumerate(module.named_parameters()):
        tensor = torch.randn(parameter.shape, generator=generator).to(torch.bfloat16)
        save_file({name: tensor}, folder / f"part-{number}.safetensors")
        weight_map[name] = f"part-{number}.safetensors"
        sizes.append(tensor.numel() * 2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(sizes), max(sizes)
