"""Every shipped recipe trains: on the embedded model, with fewer examples and two steps."""

from __future__ import annotations

import json
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


#: Data of one's own, for recipes that recognise it.
OWN = {
    "chat": {"messages": [{"role": "user", "content": "Say {n}."}, {"role": "assistant", "content": "{n}"}]},
    "classify": {"text": "The number {n} came.", "team": "{side}"},
}


def own_data(name: str, folder: Path) -> dict[str, str]:
    """Forty rows of a recipe's form, in a file."""
    line = json.dumps(OWN[name])
    rows = [line.replace("{n}", str(n)).replace("{side}", "odd" if n % 2 else "even") for n in range(40)]
    (folder / "mine.jsonl").write_text("\n".join(rows) + "\n")
    return {"task": "auto", "data": str(folder / "mine.jsonl")}


#: Recipes that differ from others in what they are for, not in what is run.
LIKE_OTHERS = ("demo", "sst2-lora", "laptop", "gpu-24gb")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.grid] if n in LIKE_OTHERS else []) for n in recipes()]
)
def test_a_recipe_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIZOO_LITE_REPORT", "0")
    data = own_data(name, tmp_path) if name in OWN else {}
    fewer = {"exact_blocks": "2"} if resolve(name, SMALL).exact_blocks else {}  # it has four blocks
    run = fit(resolve(name, {**SMALL, **fewer, **data, "out": str(tmp_path / "run")}))
    assert run.summary["steps"] == 2
    assert run.summary["loss_after"] is not None
