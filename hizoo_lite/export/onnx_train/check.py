"""Does the training graph compute the losses of the model? Both on batches of the run's own task.

The reference is our traversal in float32, the other side the graph as a device opens it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch
import transformers

from hizoo_lite.batch import Batch, Example, Losses
from hizoo_lite.branches import EVALUATION, Branches
from hizoo_lite.edge.graph import TrainGraph
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import ExportError, UserError
from hizoo_lite.model.model import Model
from hizoo_lite.noise import drawn_along
from hizoo_lite.spaces import LoRA
from hizoo_lite.tasks import Encoder

#: The largest difference of a loss or a score that float32 sums in another order may make, if none is
#: above 1; times the largest one otherwise, as rounding is relative.
LIMIT = 1e-4
#: The same for divergences, which are of the size of mu^2: relative to the largest one of the batch.
DIVERGENCE_LIMIT = 1e-2
#: Of the perturbation: large, so that a branch in the wrong place shows.
_MU = 0.05


class Case(NamedTuple):
    """A batch, the branches, their directions by parameter name, and the model's losses."""

    batch: Batch
    branches: Branches
    directions: dict[str, np.ndarray]
    losses: Losses


def cases(
    model: Model, space: LoRA, encoder: Encoder, examples: Sequence[Example], seed: int, branches: Branches
) -> list[Case]:
    """Of an evaluation and of a step, whose `branches` are given.

    On `examples` (at least one) as in training, on the first alone, and on two as they are evaluated.
    """
    traversal = Traversal(model)
    shapes = {name: value.shape for name, value in space.parameters.items()}
    directions = {
        name: drawn_along(seed, 0, name, shape, branches.directions) for name, shape in shapes.items()
    }
    tensors = {name: torch.from_numpy(value) for name, value in directions.items()}
    found = []
    for part, training in ((examples, True), (examples[:1], True), (examples[:2], False)):
        batch = encoder.collate([encoder.encode(example, training=training) for example in part])
        for points in (EVALUATION, branches):
            losses = traversal.losses(batch, points, _MU, tensors)
            found.append(Case(batch, points, directions, losses))
    return found


def compare(folder: Path, cases: Sequence[Case]) -> dict[str, Any]:
    """Run the cases on the graph in `folder`; what train.json says of it.

    Raises `ExportError` if onnxruntime cannot run one, or a difference is above `LIMIT`.
    """
    runs = []
    try:
        graph = TrainGraph(folder)
        for case in cases:
            runs.append(_compared(graph, case))
    except UserError as error:
        raise ExportError(f"onnxruntime cannot run the training graph: {error}") from error
    return {
        "limit": LIMIT,
        "max_abs_difference": max(entry["max_abs_difference"] for entry in runs),
        "runs": runs,
        "versions": {
            "onnxruntime": onnxruntime.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _compared(graph: TrainGraph, case: Case) -> dict[str, Any]:
    got = graph.losses(case.batch, case.branches, _MU, case.directions)
    rows, length = case.batch.input_ids.shape
    entry = {"branches": case.branches.count, "examples": case.batch.examples, "rows": rows, "length": length}
    worst = 0.0
    for name in ("per_example", "scores", "divergences"):  # a graph has no gradients
        ours, theirs = getattr(got, name), np.asarray(getattr(case.losses, name))
        if not theirs.size:  # divergences of an evaluation, which has no direction
            continue
        difference, largest = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
        limit = DIVERGENCE_LIMIT * largest if name == "divergences" else LIMIT * max(1.0, largest)
        if not (difference <= limit and np.isfinite(difference)):  # NaN is above it too
            raise ExportError(
                f"the training graph differs from the model by {difference:.1e}, allowed is {limit:.0e}: "
                f"{case.branches.count} branches of {rows} x {length} tokens"
            )
        worst = max(worst, difference)
    return {**entry, "max_abs_difference": worst}
