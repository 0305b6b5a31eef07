"""What the quality bench runs: models with tasks, and methods with their settings and rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cell:
    """A model and a task."""

    model: str  # folder inside --models; "" for the demo
    task: str = ""
    max_length: int = 0
    mezo: tuple[float, ...] = ()  # learning rates
    backprop: tuple[float, ...] = (1e-3, 3e-3)
    kind: str = "causal"
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    batch: int = 16


#: The task whose data is made here.
TICKETS = "tickets"
_RATES = (3e-3, 1e-2, 3e-2)
_ENCODER = (1e-3, 3e-3, 1e-2), (3e-4, 1e-3), "classifier", ("query", "value")
CELLS = {
    "smollm2-sst2": Cell("smollm2", "sst2", 40, _RATES),
    "smollm2-rte": Cell("smollm2", "rte", 160, _RATES),
    "smollm2-cb": Cell("smollm2", "cb", 160, _RATES),
    "smollm2-boolq": Cell("smollm2", "boolq", 160, _RATES),
    "smollm2-snli": Cell("smollm2", "snli", 64, _RATES),
    "smollm2-tickets": Cell("smollm2", TICKETS, 64, _RATES, batch=8),
    "minilm-sst2": Cell("minilm", "sst2", 32, *_ENCODER),
    "minilm-snli": Cell("minilm", "snli", 48, *_ENCODER),
    "demo": Cell("", mezo=(1e-3, 3e-3, 1e-2, 3e-2)),
}


@dataclass(frozen=True)
class Method:
    """Settings on top of a cell's."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    grid: str = ""  # of learning rates: the name of a field of `Cell`
    scale: float = 1.0  # of the grid's rates

    def rates(self, cell: Cell) -> tuple[float | None, ...]:
        """The learning rates that are tried; None is what `--lr auto` or the settings say."""
        grid: tuple[float, ...] = getattr(cell, self.grid) if self.grid else ()
        return tuple(float(f"{rate * self.scale:.6g}") for rate in grid) or (None,)


_BEFORE = {
    "blocks": "all",
    "curvature_from": "losses",
    "train_a": True,
    "balanced": "off",
    "by_length": "off",
    "lr_schedule": "constant",
    "head": "estimated",
}
_MEZO = {
    "blocks": "all",
    "head": "estimated",
    "estimator": "mezo",
    "lr_schedule": "constant",
    "balanced": "off",
    "by_length": "off",
}
_PUBLISHED = {**_MEZO, "estimator": "hizoo", "directions": 1}
METHODS = {
    "hizoo": Method(),
    "hizoo, as published": Method(_PUBLISHED),
    "hizoo, as published, tuned": Method(_PUBLISHED, "mezo"),
    "exact, 6 blocks": Method({"exact_blocks": 6}),
    "exact, all blocks": Method({"exact_blocks": "all"}),
    "hizoo, all blocks": Method({"blocks": "all"}),
    "hizoo, head estimated": Method({"head": "estimated"}),
    "hizoo, A trained": Method({"train_a": True}),
    "hizoo, Sigma = I": Method({"curvature": "none"}),
    "hizoo, unbalanced": Method({"balanced": "off"}),
    "hizoo, any lengths": Method({"by_length": "off"}),
    "hizoo, constant kappa": Method({"lr_schedule": "constant"}),
    "hizoo, one direction": Method({"directions": 1}),
    "hizoo, from losses": Method({"curvature_from": "losses"}),
    "hizoo, before": Method(_BEFORE),
    "mezo": Method(_MEZO, "mezo"),
    "mezo, A trained": Method({**_MEZO, "train_a": True}, "mezo"),
    "mezo, top third": Method({**_MEZO, "blocks": "auto"}, "mezo"),
    "backpropagation": Method({}, "backprop"),
    "backpropagation, 6 blocks": Method({"exact_blocks": 6}, "backprop"),
    "backpropagation, checkpointed": Method({"checkpointed": True}, "backprop"),
}
#: Methods of other papers: settings, the scale of their rates beside mezo's, and a rate that was published:
#: of KerZOO and FZOO that of the example with their code; of the others HiZOO's (1e-4 for adapters, 1e-6 for
#: weights), which is not their papers' own.
_FAMILY: dict[str, tuple[dict[str, Any], float, float]] = {
    "kerzoo": ({"estimator": "kerzoo"}, 1.0, 1e-6),
    "fzoo": ({"estimator": "fzoo"}, 10.0, 5e-5),
    "grzo": ({"estimator": "grzo"}, 3.0, 1e-4),
    "dp": ({"estimator": "dp", "dp_noise": 0.5}, 1.0, 1e-4),
    "dense": ({"space": "dense"}, 0.3, 1e-6),
    "lowrank": ({"space": "lowrank"}, 0.3, 1e-6),
    "lowrank, momentum": ({"space": "lowrank", "momentum": 0.9}, 0.3, 1e-6),
    "subspace": ({"space": "subspace"}, 0.3, 1e-6),
    "small": ({"space": "small"}, 1.0, 1e-6),
    "sparse": ({"space": "sparse"}, 3.0, 1e-6),
    "mazo": ({"space": "mazo"}, 3.0, 1e-6),
    "scales": ({"space": "scales"}, 1.0, 1e-6),
}
for _name, (_settings, _scale, _rate) in _FAMILY.items():
    METHODS[_name] = Method({**_MEZO, **_settings}, "mezo", _scale)
    METHODS[f"{_name}, published rate"] = Method({**_MEZO, **_settings, "lr": _rate})
METHODS["mezo, published rate"] = Method({**_MEZO, "lr": 1e-4})
USUAL = ("hizoo", "mezo", "backpropagation")
#: `--methods all`: every method as published and tuned, beside ours. The rest are variants of hizoo.
ALL = (
    *("hizoo", "exact, all blocks", "hizoo, as published", "hizoo, as published, tuned"),
    *(f"{name}{rate}" for name in ("mezo", *_FAMILY) for rate in ("", ", published rate")),
    "backpropagation",
)
