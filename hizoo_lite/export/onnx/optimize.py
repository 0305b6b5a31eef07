"""onnxscript's optimizer of a traced graph, but for its one rule that takes the square of the nodes.

`SlicesSplit` (two slices of one value become a split) has two outputs, so that its matcher lists all nodes of
the graph anew at every node: 566 of the 1 212 s of an export of SmolLM2-135M under a profiler.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes import common
from onnxscript import rewriter

_ROUNDS = 2  # as onnxscript's own
_LEFT_OUT = "SlicesSplit"


def optimize(model: ir.Model) -> None:
    """Fold constants, rewrite and tidy, in place: `onnxscript.optimizer.optimize_ir` but for one rule."""
    rules: Any = getattr(rewriter, "_DEFAULT_REWRITE_RULES", None)  # it has no public name
    if rules is None:
        onnxscript.optimizer.optimize_ir(model)
        return
    rewrite = rewriter.RewritePass([rule for rule in rules if rule.name != _LEFT_OUT])
    common.InlinePass()(model)
    for _ in range(_ROUNDS):
        folded = onnxscript.optimizer.fold_constants_ir(model, onnx_shape_inference=True)
        changed = [folded.modified, rewrite(model).modified]
        for tidy in (
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),
            common.RemoveUnusedOpsetsPass(),
        ):
            changed.append(tidy(model).modified)
        if not any(changed):
            break
    for last in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        last(model)
