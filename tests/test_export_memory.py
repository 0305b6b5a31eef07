"""An export holds no more than a tensor at a time: a model that does not fit under a limit is exported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from make_random_model import make

from hizoo_lite.model.load import load
from tests.export_fixtures import write_adapter

#: Beside the imports: tracing, and a few copies of the largest tensor (48 MiB). The model takes 550 MiB.
ALLOWED = 320 << 20

#: Tracing and writing. The check is left out: it runs the model, block by block, and onnxruntime.
CODE = """
import resource, sys
import onnxscript, torch.onnx
import hizoo_lite.export.onnx.export as exporting
from hizoo_lite.memory.rss import private_bytes
exporting._references = lambda *_: []
exporting._check = lambda *_: None
limit = private_bytes() + int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
exporting.export_onnx(sys.argv[1], sys.argv[2])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mapped memory on Linux alone")
def test_a_model_larger_than_the_limit_is_exported(tmp_path: Path) -> None:
    overrides = {"vocab_size": 512, "intermediate_size": 22016}
    make("llama-2-7b", tmp_path / "model", double_quant=False, layers=3, overrides=overrides)
    model = load(tmp_path / "model", compute_dtype="float32", device="cpu", residency="disk")
    adapter = write_adapter(model, tmp_path / "adapter", rank=2, seed=0)
    model.residency.close()
    assert model.nbytes() > ALLOWED + (200 << 20)
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(adapter), str(tmp_path / "onnx"), str(ALLOWED)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "onnx/model.onnx.data").stat().st_size > model.nbytes() - (20 << 20)
