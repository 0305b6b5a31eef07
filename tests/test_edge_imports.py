"""What runs beside onnxruntime imports neither torch nor transformers, nor anything else that is heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

MODULES = [
    "hizoo_lite.arrays",
    "hizoo_lite.base",
    "hizoo_lite.curvature",
    "hizoo_lite.edge.__main__",
    "hizoo_lite.edge.tokenizer",
    "hizoo_lite.edge.train",
    "hizoo_lite.estimators",
    "hizoo_lite.edge.session",
    "hizoo_lite.noise",
    "hizoo_lite.tasks",
    "hizoo_lite.checkpoints.tensorfile",
    "hizoo_lite.train.checkpoint",
    "hizoo_lite.train.config_file",
    "hizoo_lite.train.evaluate",
    "hizoo_lite.train.folder",
    "hizoo_lite.train.interrupt",
    "hizoo_lite.train.loop",
    "hizoo_lite.train.components",
    "hizoo_lite.optimizers.step_size",
    "hizoo_lite.train.step",
    "hizoo_lite.train.summary",
    "hizoo_lite.train.progress",
]

#: Blocks what the device has not; also what only the command line and the report need.
BLOCKED = """
import sys

class Blocked:
    names = {"torch", "transformers", "bitsandbytes", "accelerate", "peft", "safetensors", "psutil", "rich",
             "typer", "matplotlib"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
"""


def without_torch(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process in which torch and its companions cannot be imported."""
    command = [sys.executable, "-c", BLOCKED + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_the_block_blocks() -> None:
    done = without_torch("import torch")
    assert done.returncode == 1
    assert "torch is blocked" in done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_a_module_of_the_edge_imports_without_torch(module: str) -> None:
    done = without_torch(f"import {module}")
    assert done.returncode == 0, done.stderr
