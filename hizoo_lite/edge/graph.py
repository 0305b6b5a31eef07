"""The training graph of an exported folder: losses of all branches in one run of onnxruntime.

`train.onnx` takes the arrays of a batch by their names, and every trained parameter once a branch, (branches,
*shape) float32; the rows of the batch are folded over the branches inside. Its outputs are `losses`,
(branches, examples) float64, `scores`, and `divergences`, (directions, examples), between the predictions of
the branches that `compared` names, (directions, 2). A perturbed parameter exists only in the feed: what is
trained is never changed by a forward.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from hizoo_lite.arrays import NumpyArrays
from hizoo_lite.base import AttachedSpace, ModelKind
from hizoo_lite.batch import Batch, Losses
from hizoo_lite.branches import EVALUATION, Branches
from hizoo_lite.checkpoints import tensorfile
from hizoo_lite.checkpoints.adapter import (
    PEFT_FILE,
    PEFT_METADATA,
    PEFT_PREFIX,
    PEFT_WEIGHTS,
    check_fits,
    peft_weights,
)
from hizoo_lite.edge.folder import Base
from hizoo_lite.edge.onnx_adapter import save_adapter
from hizoo_lite.edge.session import Graph
from hizoo_lite.errors import UserError
from hizoo_lite.files import read_json
from hizoo_lite.tasks.collate import Loss

FORMAT = 3
RECORD, GRAPH, ADAPTER = "train.json", "train.onnx", "adapter"
LOSSES, SCORES, DIVERGENCES = "losses", "scores", "divergences"
COMPARED = "compared"
_EXPORTED = "a folder of: hizoo-lite export --to onnx-train"


@dataclass(frozen=True)
class Record:
    """train.json, checked."""

    kind: ModelKind
    bits: str
    loss: Loss  # that the graph computes
    positions: int | None  # tokens that the position codes reach; None if the model does not say
    shapes: dict[str, tuple[int, ...]]  # of all tensors of the adapter, by PEFT name
    trained: frozenset[str]  # those of them that a run moves
    peft_config: dict[str, Any]  # adapter_config.json as PEFT wants it
    onnx_names: dict[str, dict[str, Any]]  # by PEFT name: input of model.onnx, transpose, scale
    base: Base | None  # None if an earlier version has written it
    id2label: Any = None  # names of a classifier's outputs
    vocabulary: int | None = None  # tokens that the model knows; None if it does not say

    @classmethod
    def read(cls, folder: Path) -> Record:
        """UserError naming file and key if something is missing or of another form."""
        path = folder / RECORD
        found = read_json(path, _EXPORTED)
        if found.get("format") != FORMAT:
            raise UserError(
                f"{path}: format: got {found.get('format')!r}, allowed: {FORMAT}; export the run again"
            )
        if found.get("kind") not in get_args(ModelKind):
            raise UserError(
                f"{path}: kind: got {found.get('kind')!r}, allowed: {', '.join(get_args(ModelKind))}"
            )
        if found.get("loss") not in get_args(Loss):
            raise UserError(f"{path}: loss: got {found.get('loss')!r}, allowed: {', '.join(get_args(Loss))}")
        try:
            shapes = {str(p["name"]): tuple(int(n) for n in p["shape"]) for p in found["parameters"]}
            trained = frozenset(str(p["name"]) for p in found["parameters"] if p["trained"] is True)
            names = {str(name): dict(entry) for name, entry in found["onnx_adapter"]["names"].items()}
            positions = None if found["positions"] is None else int(found["positions"])
            return cls(
                found["kind"],
                str(found["bits"]),
                found["loss"],
                positions,
                shapes,
                trained,
                dict(found["lora"]),
                names,
                _base(found),
                found.get("id2label"),
                None if found.get("vocabulary") is None else int(found["vocabulary"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"{path}: not as export writes it ({type(error).__name__}: {error})") from error


def _base(found: Mapping[str, Any]) -> Base | None:
    base = found.get("base") or {}
    return Base(str(base["model"]), str(base["fingerprint"])) if "fingerprint" in base else None


class TrainGraph:
    """A training graph and the values of its parameters: the model of a run, for steps and evaluations."""

    write = None  # there are no logits to write with

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        """Open the graph and read the initial parameters. UserError if something does not fit."""
        self.record = Record.read(folder)
        self.session = Graph(folder / GRAPH, threads)
        missing = [name for name in self.record.shapes if name not in self.session.inputs]
        if missing:
            raise UserError(f"{folder / GRAPH}: has no input {missing[0]!r}, which {RECORD} names")
        tensors = read_parameters(folder / ADAPTER, self.record.shapes)
        self.parameters = {name: value for name, value in tensors.items() if name in self.record.trained}
        self.frozen = {name: value for name, value in tensors.items() if name not in self.record.trained}
        self.arrays = NumpyArrays()

    @property
    def token_types(self) -> bool:
        """Whether the model takes token type ids."""
        return "token_type_ids" in self.session.inputs

    def losses(
        self,
        batch: Batch,
        branches: Branches = EVALUATION,
        mu: float = 0.0,
        directions: Mapping[str, np.ndarray] | None = None,
        exact: Mapping[str, np.ndarray] | None = None,
    ) -> Losses:
        """Losses of every branch on `batch`; `directions` d by parameter name, (directions, *shape).

        exact: nothing, as `GraphSpace` has it.
        """
        feeds = {name: value for name, value in batch._asdict().items() if name in self.session.inputs}
        for name, value in {**self.frozen, **self.parameters}.items():
            feeds[name] = np.repeat(value[None], branches.count, axis=0)
        for name in self.parameters:
            for branch, (direction, offset) in enumerate(branches.points):
                if offset:
                    assert directions is not None
                    along = directions[name][direction]
                    self.arrays.add_scaled(feeds[name][branch, ...], along, offset * mu)
        feeds[COMPARED] = branches.compared
        losses, scores, divergences = self.session.run((LOSSES, SCORES, DIVERGENCES), feeds)
        return Losses(losses, scores, divergences)


class GraphSpace(AttachedSpace):
    """The parameters of a graph as a space: saved as PEFT saves them, and as an adapter of onnxruntime."""

    weights = None

    def __init__(self, name: str, graph: TrainGraph) -> None:
        self.name, self.graph = name, graph
        self.exact: dict[str, np.ndarray] = {}  # the graph has no gradients
        self.parameters, self.frozen = graph.parameters, graph.frozen

    def save(self, folder: Path | str) -> None:
        """Write adapter_config.json and adapter_model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = json.dumps(self.graph.record.peft_config, indent=2, sort_keys=True)
        (folder / PEFT_FILE).write_text(config + "\n", encoding="utf-8")
        tensors = {PEFT_PREFIX + name: value for name, value in self._tensors().items()}
        tensorfile.save(folder / PEFT_WEIGHTS, tensors, PEFT_METADATA)

    def load(self, folder: Path | str) -> None:
        """Read what `save` (or PEFT) wrote into the parameters."""
        own = self._tensors()
        for name, value in read_parameters(Path(folder), self.graph.record.shapes).items():
            own[name][...] = value

    def save_onnx_adapter(self, path: Path) -> None:
        """Write the adapter as onnxruntime loads it beside model.onnx: see `onnx_adapter.save_adapter`."""
        made, own = {}, self._tensors()
        for name, entry in self.graph.record.onnx_names.items():
            value = own[name].T if entry.get("transpose") else own[name]
            made[entry["input"]] = value * np.float32(entry.get("scale", 1.0))
        save_adapter(path, made)

    def _tensors(self) -> dict[str, np.ndarray]:
        """All that PEFT's file holds, in its order."""
        tensors = {**self.frozen, **self.parameters}
        return {name: tensors[name] for name in self.graph.record.shapes}


def read_parameters(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The parameters of a PEFT folder, float32, in the order of `shapes`."""
    path = peft_weights(folder)
    found = {name.removeprefix(PEFT_PREFIX): value for name, value in tensorfile.load(path).items()}
    check_fits(path, {name: value.shape for name, value in found.items()}, shapes)
    return {name: np.array(found[name], dtype=np.float32) for name in shapes}
