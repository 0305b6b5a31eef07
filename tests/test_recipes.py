"""Every shipped recipe trains: on the embedded model, with fewer examples and two steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from hizoo_lite.run import fit
from hizoo_lite.train.config_file import recipes, resolve

SMALL = {
    "model": "embedded",
    "task": "embedded",
    "data": "embedded",
    "steps": "2",
    "device": "cpu",
    "train_examples": "24",
    "dev_examples": "4",
    "test_examples": "4",
    "eval_every": "2",
    "batch_size": "4",
    "save_every": "1",
    "device_budget": "6GiB",
    "max_length": "64",
}


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIZOO_LITE_REPORT", "0")
    fewer = {"exact_blocks": "2"} if resolve(name, SMALL).exact_blocks else {}  # it has four blocks
    run = fit(resolve(name, {**SMALL, **fewer, "out": str(tmp_path / "run")}))
    assert run.summary["steps"] == 2
    assert run.summary["loss_after"] is not None
