"""Tune quantized Hugging Face language models with forward passes only (HiZOO, arXiv 2402.15173).

    import hizoo_lite as hz
    model = hz.load("path-or-hub-id", bits="nf4")
    run = hz.fit(model, task="sst2", data="data/sst2", space=hz.spaces.LoRA(rank=8), steps=1000)

Names are imported when they are first used, so that the command line answers before torch is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hizoo_lite import curvature, estimators, objectives, spaces, tasks
    from hizoo_lite.config import TrainConfig
    from hizoo_lite.engine.generate import generate
    from hizoo_lite.engine.load import load
    from hizoo_lite.errors import TooManyBadSteps, UserError
    from hizoo_lite.model.model import Model
    from hizoo_lite.result import Run
    from hizoo_lite.run import evaluate, fit

__version__ = "0.1.0"

__all__ = [
    "Model",
    "Run",
    "TooManyBadSteps",
    "TrainConfig",
    "UserError",
    "curvature",
    "estimators",
    "evaluate",
    "fit",
    "generate",
    "load",
    "objectives",
    "spaces",
    "tasks",
]

_HOMES = {
    "Model": "model.model",
    "Run": "result",
    "TooManyBadSteps": "errors",
    "TrainConfig": "config",
    "UserError": "errors",
    "evaluate": "run",
    "fit": "run",
    "generate": "engine.generate",
    "load": "engine.load",
}
_SUBPACKAGES = ("curvature", "estimators", "objectives", "spaces", "tasks")


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"hizoo_lite.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"hizoo_lite.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hizoo_lite' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
