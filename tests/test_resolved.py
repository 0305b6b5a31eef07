"""What settings mean for a model is answered once, and the model that is loaded agrees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hizoo_lite.config import TrainConfig
from hizoo_lite.export.quantize import Quantization
from hizoo_lite.run import fit
from hizoo_lite.tasks import get
from hizoo_lite.train import resolved
from hizoo_lite.train.folder import RunFolder
from hizoo_lite.train.resolved import Resolved
from tests.architectures import save_tiny
from tests.run_fixtures import short_run


@pytest.mark.parametrize(
    "changes",
    [{}, {"bits": "int8", "compute_dtype": "float32"}, {"space": "scales", "bits": "fp4"}],
    ids=["open", "given", "scales"],
)
def test_the_answers_are_those_of_the_model_that_is_loaded(changes: dict[str, Any], tmp_path: Path) -> None:
    config = TrainConfig(**short_run(tmp_path, **changes))
    found = Resolved(config, get(config.task))
    model = found.model()
    assert (found.kind, found.bits, found.compute) == (model.kind, model.bits, model.compute)
    assert (found.device, found.source) == (model.device, model.source)
    again = Resolved(config, found.task, model)
    assert again.settings == found.settings
    assert again.model() is model
    assert (found.residency, again.residency) == ("auto", "resident")
    assert found.double_quant == (config.space == "lora")


def test_a_run_asks_each_question_once_and_records_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def counted(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: (asked.append(name), plain(*given))[1]

    names = ["choose_bits", "choose_compute", "choose_device", "find_kind"]
    for name in names:
        monkeypatch.setattr(resolved, name, counted(name, getattr(resolved, name)))
    run = fit(TrainConfig(**short_run(tmp_path, steps=1)))
    assert sorted(asked) == names
    assert RunFolder(run.folder).config() == run.setup.resolved.settings


def test_why_the_blocks_have_their_stored_form_is_said(tmp_path: Path) -> None:
    config = TrainConfig(**short_run(tmp_path))
    task = get(config.task)
    assert Resolved(config, task).why_bits.startswith("nf4: the default of --bits; with --bits none ")
    said = Resolved(replace(config, bits="none"), task).why_bits
    assert said == "not quantized (--bits, or the run's setting)"
    save_tiny("llama", tmp_path / "source")
    Quantization(tmp_path / "source", tmp_path / "model", kind="causal", bits="int8").run()
    stored = Resolved(replace(config, model=str(tmp_path / "model")), task)
    assert stored.why_bits == "int8: the checkpoint is stored so"
