"""Logits of the model for `compare.py`, and its process: does onnxruntime compute what the model computes?

The reference is the loaded model itself, through its own linears, in float32: what a run was evaluated with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from hizoo_lite.edge.folder import Export
from hizoo_lite.errors import ExportError
from hizoo_lite.export.onnx.compare import PREFILL, Case, Reference, Tokens, write_request
from hizoo_lite.model.model import Model
from hizoo_lite.process import run_module

#: (rows, length) of the batches; rows after the first are padded.
_BATCHES = ((1, 1), (1, 9), (3, 17), (2, 40))
#: Tokens that are given one by one, behind those that are given at once.
_DECODED = 4
_NO_OPERATOR = re.compile(r"Could not find an implementation for (\w+)\(\d+\) node with name '([^']*)'")


def cases(model: Model) -> list[Case]:
    """Several lengths and batch sizes, and a decoding for models with a cache, as `model` is now."""
    most = model.positions or max(length for _, length in _BATCHES)
    batches = [(draw(model, rows, min(length, most)), False) for rows, length in _BATCHES]
    if model.kind == "causal":
        batches.append((draw(model, 2, min(PREFILL + _DECODED, most), padded=False), True))
    return [Case(tokens, reference(model, tokens), decoded) for tokens, decoded in batches]


def draw(model: Model, rows: int, length: int, padded: bool = True) -> Tokens:
    """Tokens from the whole vocabulary, the same at every call; each row 2 shorter than the one above."""
    random = np.random.default_rng(rows * 1000 + length)
    padding = model.config.pad_token_id or 0
    ids = random.integers(0, model.config.get_text_config().vocab_size - 1, (rows, length))
    ids += ids >= padding  # any token but the padding
    mask = np.ones_like(ids)
    if padded:
        for row in range(1, rows):
            mask[row, max(1, length - 2 * row) :] = 0
    return Tokens(np.where(mask == 1, ids, padding), mask)


@torch.no_grad()
def reference(model: Model, tokens: Tokens) -> np.ndarray:
    """The model's logits: (rows, length, vocabulary) or (rows, classes) float32."""
    no_cache = {"use_cache": False} if model.kind == "causal" else {}
    ids, mask = torch.from_numpy(tokens.ids), torch.from_numpy(tokens.mask)
    return model.module(input_ids=ids, attention_mask=mask, **no_cache).logits.float().numpy()


def run_check(
    export: Export, references: Sequence[Reference], work: Path, *, low_memory: bool
) -> list[dict[str, Any]]:
    """Compare in a process without torch; one entry each run. work: an empty folder for what it reads.

    low_memory: as of `Session`. Raises `ExportError` if onnxruntime computes something else, or cannot run
    the architecture.
    """
    write_request(work, export.path, references, low_memory)
    done = run_module("hizoo_lite.export.onnx.compare", str(work))
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ExportError(f"{export.graph}: the check ended with code {done.returncode}: {last}")
    said = json.loads(done.stdout)
    if "error" in said:
        raise ExportError(_refused(export, said["error"]) if said["at"] == "load" else said["error"])
    return said["runs"]


def _refused(export: Export, message: str) -> str:
    """In words, what onnxruntime lacks for this architecture."""
    architecture, version = export.record["base"]["architecture"], onnxruntime.__version__
    match = _NO_OPERATOR.search(message)
    if match is None:
        return f"{architecture} cannot be exported: {message}"
    nodes = {node.name: node for node in ir.load(export.graph).graph}
    node = nodes.get(match[2])
    dtypes = [str(value.dtype) for value in node.inputs if value is not None] if node is not None else []
    return (
        f"{architecture} cannot be exported: onnxruntime {version} has no operator {match[1]} on the CPU for "
        f"the types that this model's code gives it ({', '.join(dtypes) or 'unknown'})"
    )
