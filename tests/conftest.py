"""What every test has: one thread for each of the processes that share the tests; torch keeps its traces."""

from __future__ import annotations

import copy
import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch counts the cores, here and in the processes of tests
    os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ.setdefault("HIZOO_LITE_REPORT", "0")  # a process of seconds after every run; test_report.py draws

import pytest
import torch  # makes the logger
import torch._dynamo.config

# pytest hangs its handlers on every logger that does not propagate, and torch formats a stack for every step
# of a trace as soon as this one has a handler: more than half of the time of an export.
logging.getLogger("torch.__trace").propagate = True

# A fifth of the time of an export: what is found in this cache of traces has its strides computed again.
torch._dynamo.config.fake_tensor_cache_enabled = False


def pytest_collection_finish() -> None:
    """What was imported by now stays: a thirtieth of the time goes into looking at it again and again."""
    gc.collect()
    gc.freeze()


#: About plans, or about memory that is measured beside what was planned.
_PLANNED = {"test_plan", "test_profiles", "test_run_memory", "test_budget", "test_device"}


#: Settings that no pass depends on; a task only where every position is scored, which `_key` adds.
_UNPLANNED = {
    *("model", "task", "data", "out", "resume", "steps", "seed", "tracker", "run_name"),
    *("keep", "save_every", "save_total_limit", "eval_every", "lr_schedule", "warmup_steps"),
    *("clip", "weight_decay", "mu", "smoothing", "smoothing_schedule"),
}

#: By what they are of, in this process.
_PLANS: dict[str, Any] = {}


def _key(config: Any, folder: Path, *more: object) -> str:
    """The same for runs with the same passes: of a model its configuration and its files' sizes count."""
    files = [(file.name, file.stat().st_size) for file in sorted(folder.iterdir())]
    described = (folder / "config.json").read_text("utf-8") if (folder / "config.json").is_file() else ""
    alike = [(name, value) for name, value in vars(config).items() if name not in _UNPLANNED]
    return repr((alike, set(config.tasks) & {"lm", "chat"}, files, described, more))


@pytest.fixture(scope="module", autouse=True)
def plans_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs that make the same passes of a model are planned once: half the time of a short run.

    With a budget a plan asks what is there, and is made every time.
    """
    if request.module.__name__.rpartition(".")[2] in _PLANNED:
        yield
        return
    from hizoo_lite.model.kinds import model_path
    from hizoo_lite.train import planning

    plain = planning.plan_run

    def plan_run(config: Any, source: Any, *given: Any, **named: Any) -> Any:
        folder = Path(model_path(config.model))
        if config.device_budget is not None or config.host_budget is not None or not folder.is_dir():
            return plain(config, source, *given, **named)
        key = _key(config, folder, given, sorted(named.items()))
        if key not in _PLANS:
            _PLANS[key] = plain(config, source, *given, **named)
        return copy.deepcopy(_PLANS[key])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(planning, "plan_run", plan_run)
        yield
