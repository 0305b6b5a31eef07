"""An export holds no more than a tensor at a time: a model that does not fit under a limit is exported.

Writing is held to a hard cap of private memory, mapped or touched. onnxruntime maps the weights' file as
private and writable, which such a cap would count, so the whole export with its check is watched instead:
the anonymous pages of both processes.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from make_random_model import make

from hizoo_lite.base import Bits
from hizoo_lite.engine.load import load
from tests.export_fixtures import write_adapter

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="reads /proc, and RLIMIT_DATA as Linux has it"
)

#: Beside the imports: tracing, and a few copies of the largest tensor (48 MiB). The model takes 550 MiB.
ALLOWED = 320 << 20

#: Tracing and writing. The check is left out: it runs the model, block by block, and onnxruntime.
CODE = """
import resource, sys
import onnxscript, torch.onnx
import hizoo_lite.export.onnx.export as exporting
from hizoo_lite.process import private_bytes
exporting._references = lambda *_: []
exporting._check = lambda *_: None
limit = private_bytes() + int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
exporting.export_onnx(sys.argv[1], sys.argv[2])
"""


def _adapter(folder: Path, bits: Bits, intermediate_size: int) -> tuple[Path, int]:
    """Of a model of three blocks; and its bytes."""
    overrides = {"vocab_size": 512, "intermediate_size": intermediate_size}
    make("llama-2-7b", folder / "model", bits=bits, double_quant=False, layers=3, overrides=overrides)
    model = load(folder / "model", compute_dtype="float32", device="cpu", residency="disk")
    # a larger change than training makes would let rounding grow from layer to layer
    adapter = write_adapter(model, folder / "adapter", rank=2, seed=0, scale=0.01)
    model.residency.close()
    return adapter, model.nbytes()


@pytest.mark.grid
def test_a_model_larger_than_the_limit_is_written(tmp_path: Path) -> None:
    adapter, nbytes = _adapter(tmp_path, "nf4", 22016)
    assert nbytes > ALLOWED + (200 << 20)
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(adapter), str(tmp_path / "onnx"), str(ALLOWED)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "onnx/model.onnx.data").stat().st_size > nbytes - (20 << 20)


#: The limit of an export: its largest tensor and 500 MB, beside what the imports take.
SPARE = 500_000_000

WHOLE = """
import sys
import onnxscript, torch.onnx
from hizoo_lite.export.onnx.export import export_onnx
from hizoo_lite.memory.peak import resident
print(resident().anon_bytes, flush=True)
export_onnx(sys.argv[1], sys.argv[2])
"""


@pytest.mark.grid
def test_an_export_with_its_check_holds_its_largest_tensor_and_500_mb(tmp_path: Path) -> None:
    adapter, nbytes = _adapter(tmp_path, "int8", 11008)
    allowed = 4096 * 11008 + SPARE
    assert nbytes > allowed
    with subprocess.Popen(
        [sys.executable, "-c", WHOLE, str(adapter), str(tmp_path / "onnx")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        imports = int(process.stdout.readline())
        peaks = _peaks(psutil.Process(process.pid))
    assert process.returncode == 0
    assert len(peaks) == 2  # the export, and the check's onnxruntime
    assert max(peaks) < imports + allowed


def _peaks(process: psutil.Process) -> list[int]:
    """Of the anonymous memory of a process and those that it starts, until it ends."""
    peaks: dict[int, int] = {}
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in (process, *process.children()):
                peaks[one.pid] = max(peaks.get(one.pid, 0), _anonymous(one.pid))
        time.sleep(0.005)
    return list(peaks.values())


def _anonymous(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0
