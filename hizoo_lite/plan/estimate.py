"""What a pass needs besides the weights, for a model that is loaded: see `rehearsal.py`."""

from __future__ import annotations

import copy

from hizoo_lite.base import Branches
from hizoo_lite.device import is_gpu, like
from hizoo_lite.model import build
from hizoo_lite.model.model import Model
from hizoo_lite.plan.outline import Outline, dissect
from hizoo_lite.plan.rehearsal import Pass, Rehearsal, Trained
from hizoo_lite.quant import ResidualWeight
from hizoo_lite.spaces.lora import LoRADelta
from hizoo_lite.spaces.scales import ScalesPart
from hizoo_lite.spaces.weights import WeightDelta

_FLOAT32 = 4


def pass_bytes(
    model: Model,
    rows: int,
    length: int,
    branches: Branches,
    trainable: int = 0,
    sites: int | None = None,
) -> int:
    """Bytes of a traversal of `rows` sequences of `length` tokens, folded over the branches.

    trainable: parameters held in memory; along each direction their noise is there for two steps, on the
    host, and what is made of it for one, on the device.
    sites: positions whose logits are read; without it one a row.
    """
    config = copy.deepcopy(model.config)
    module = build.build(config, model.kind)
    outline = Outline.of(model.checkpoint)
    anatomy = dissect(outline, module, model.kind, model.bits, False, like(model.device))
    away = bool(model.away)
    rehearsal = Rehearsal(
        module, config, model.kind, anatomy, model.bits, model.compute, like(model.device), away
    )
    sites = 0 if model.kind == "classifier" else rows if sites is None else sites
    wanted = Pass(rows, length, branches, sites, model.branch_chunk, model.halvings)
    peak = rehearsal.run(wanted, _trained(model) if branches.directions else None).peak_bytes
    held = 1 if is_gpu(model.device) else 3
    return peak + held * _FLOAT32 * branches.directions * trainable


def _trained(model: Model) -> Trained | None:
    """What hangs on the model's linears."""
    names = [n for n, x in model.linears.items() if x.delta is not None and model.block_of(n) is not None]
    if not names:
        return None
    leaves = ",".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
    delta = model.linears[names[0]].delta
    if isinstance(delta, LoRADelta):
        return Trained("lora", leaves, delta.a.shape[0], train_a=delta.names[0] is not None)
    is_scales = isinstance(delta, WeightDelta) and isinstance(delta.part, ScalesPart)
    has_residual = isinstance(model.linears[names[0]].weight, ResidualWeight)
    return Trained("scales" if is_scales else "dense", leaves, residual=has_residual)
