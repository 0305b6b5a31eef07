"""Runs that train the weights themselves: complete, resumable bit for bit, put back for evaluation."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import hizoo_lite as hz
from hizoo_lite.checkpoints.adapter import find_adapter
from hizoo_lite.cli import app
from hizoo_lite.config import TrainConfig
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import UserError
from hizoo_lite.export.quantize import Quantization
from hizoo_lite.run import Run, fit
from hizoo_lite.spaces.dense import DensePart
from hizoo_lite.spaces.scales import ScalesPart
from hizoo_lite.train import checkpoint
from hizoo_lite.train.folder import RunFolder
from hizoo_lite.train.provenance import base_model
from hizoo_lite.train.replay import replay
from hizoo_lite.train.saved import attach_adapter
from tests.batches import tiny_task_batch
from tests.run_fixtures import short_run
from tests.weights_reference import same, state

RUNS: dict[str, dict[str, Any]] = {
    "dense nf4": {"space": "dense", "bits": "nf4", "dense_update": "requantize"},
    "dense int8": {"space": "dense", "bits": "int8", "dense_update": "requantize", "curvature": "factored"},
    "dense none": {
        "space": "dense",
        "bits": "none",
        "dense_update": "requantize",
        "estimator": "mezo",
        "lr": 1e-5,
    },
    "residual fp4": {"space": "dense", "bits": "fp4", "dense_update": "residual"},
    "scales nf4": {"space": "scales", "bits": "nf4", "curvature_per": "row"},
    "scales int8": {"space": "scales", "bits": "int8", "targets": "attention"},
}
every_run = pytest.mark.parametrize("name", RUNS)


def run_of(folder: Path, name: str, **changes: Any) -> Run:
    return fit(TrainConfig(**short_run(folder, **{**RUNS[name], **changes})))


def saved(run: Run) -> dict[str, torch.Tensor]:
    """Every tensor of the adapter and of the newest checkpoint."""
    newest = checkpoint.newest(run.folder / "checkpoints")
    assert newest is not None
    files = [*run.folder.glob("adapter/*.safetensors"), *newest.rglob("*.safetensors")]
    return {f"{f.parent.name}/{f.name}/{k}": v for f in files for k, v in load_file(f).items()}


@pytest.mark.grid
@every_run
def test_six_steps_equal_three_and_three_resumed_bitwise(name: str, tmp_path: Path) -> None:
    straight = run_of(tmp_path / "a", name)
    run_of(tmp_path / "b", name, steps=3)
    resumed = run_of(tmp_path / "b", name, resume=True)
    assert same(saved(straight), saved(resumed))
    assert same(state(straight.setup.model), state(resumed.setup.model))
    assert resumed.summary["loss_after"] == straight.summary["loss_after"]
    assert torch.isfinite(torch.tensor(straight.summary["loss_after"]))
    lines = [line for line in RunFolder(straight.folder).read_metrics() if line["kind"] == "step"]
    assert len({tuple(line["losses"]) for line in lines}) == 6
    assert not any(line["skipped"] for line in lines)


@pytest.mark.parametrize(
    ("name", "residency"),
    [
        ("residual fp4", "disk"),
        pytest.param("dense int8", "resident", marks=pytest.mark.grid),
        pytest.param("scales nf4", "disk", marks=pytest.mark.grid),
        pytest.param("residual fp4", "resident", marks=pytest.mark.grid),
        pytest.param("dense int8", "disk", marks=pytest.mark.grid),
        pytest.param("scales nf4", "resident", marks=pytest.mark.grid),
    ],
)
def test_memory_refused_in_an_update_moves_no_tile_twice(
    name: str, residency: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass is repeated in smaller chunks, and what is saved is what the journal says."""
    stored = tmp_path / "stored"
    Quantization(_demo(), stored, kind="causal", bits=RUNS[name]["bits"], double_quant=False).run()
    part = ScalesPart if RUNS[name]["space"] == "scales" else DensePart
    plain, calls = part.move, itertools.count()

    def move(*args: Any, **kwargs: Any) -> None:
        if next(calls) in (17, 40, 41):  # two blocks; the second one again when it is repeated
            raise MemoryError
        plain(*args, **kwargs)

    monkeypatch.setattr(part, "move", move)
    run = run_of(tmp_path / "a", name, model=str(stored), residency=residency)
    assert run.summary["memory_retries"] == 3
    monkeypatch.setattr(part, "move", plain)
    assert replay(run.folder, 6, tmp_path / "replayed").differs == []


@every_run
def test_what_a_run_saved_is_put_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, name, save_every=0)
    bits = RUNS[name]["bits"]
    for double_quant in (False, True):  # undone where the tuned weights are put back
        fresh = hz.load(_demo(), bits=bits, device="cpu", double_quant=double_quant)
        attach_adapter(fresh, run.folder)
        assert same(state(fresh), state(run.setup.model))
        batch = tiny_task_batch("causal")
        ours = Traversal(run.setup.model).losses(batch).scores
        assert torch.equal(Traversal(fresh).losses(batch).scores, ours)
    record = json.loads((find_adapter(run.folder) / "hizoo_space.json").read_text())
    assert record["space"] == run.summary["space"] == RUNS[name]["space"]
    assert base_model(run.folder) == record["base_model"] == _demo()


def _demo() -> str:
    from hizoo_lite.model.kinds import model_path

    return model_path("embedded")


def test_a_run_says_how_much_it_trains(tmp_path: Path) -> None:
    dense = run_of(tmp_path / "a", "dense nf4", steps=1)
    scales = run_of(tmp_path / "b", "scales nf4", steps=1)
    assert dense.summary["trainable_parameters"] == 64 * scales.summary["trainable_parameters"]
    assert dense.summary["noise"] == "torch-cpu"


def test_spaces_given_as_objects_are_recorded(tmp_path: Path) -> None:
    settings = short_run(tmp_path)
    model = hz.load(_demo(), bits="nf4", device="cpu")
    for key in ("model", "device", "rank"):
        settings.pop(key)
    run = fit(model, space=hz.spaces.Dense(targets=["q_proj"], update="residual"), **settings)
    config = RunFolder(run.folder).config()
    assert (config.space, config.dense_update, config.targets) == ("dense", "residual", "q_proj")


def test_scales_are_clipped_by_default_and_others_where_it_is_asked_for(tmp_path: Path) -> None:
    assert run_of(tmp_path / "a", "scales nf4", steps=1).setup.stepper.clip == 100.0
    assert run_of(tmp_path / "b", "scales nf4", steps=1, clip=0.5).setup.stepper.clip == 0.5
    assert run_of(tmp_path / "c", "dense nf4", steps=1).setup.stepper.clip is None
    clipped = run_of(tmp_path / "d", "dense nf4", steps=2, clip=1e-6)
    lines = [line for line in RunFolder(clipped.folder).read_metrics() if line["kind"] == "step"]
    assert [(abs(line["projected_grad"]), line["clipped"]) for line in lines] == [(1e-6, True)] * 2


def test_a_run_is_evaluated_and_generated_from_on_the_command_line(tmp_path: Path) -> None:
    run = run_of(tmp_path, "dense nf4", lr=1e-4)
    result = CliRunner().invoke(app, ["eval", "--adapter", str(run.folder), "--split", "test", "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["scores"]["loss"] == pytest.approx(run.summary["loss_after"], rel=1e-12)
    result = CliRunner().invoke(
        app, ["generate", "--adapter", str(run.folder), "--prompt", "The day", "--max-new-tokens", "3"]
    )
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": "scales", "bits": "none"}, "bits: got 'none', but space scales"),
        ({"space": "dense", "curvature": "diagonal"}, "curvature: got 'diagonal', a value for every weight"),
    ],
)
def test_what_cannot_be_is_refused_before_a_folder_is_made(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        fit(TrainConfig(**short_run(tmp_path, **changes)))
    assert not (tmp_path / "run").exists()


def test_unknown_spaces_and_versions_are_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, "scales nf4", steps=1)
    model = run.setup.model
    for change, message in (
        ({"format": 2}, "format: got 2, this version reads 1"),
        (
            {"space": "full"},
            "space: got 'full', supported: dense, lowrank, subspace, small, sparse, mazo, scales",
        ),
        ({"bits": "int8"}, "bits: it has 'int8', this run 'nf4'"),
    ):
        folder = tmp_path / "changed"
        shutil.copytree(run.folder / "adapter", folder)
        record = json.loads((folder / "hizoo_space.json").read_text())
        (folder / "hizoo_space.json").write_text(json.dumps({**record, **change}))
        with pytest.raises(UserError, match=message):
            attach_adapter(model, folder)
        shutil.rmtree(folder)
    (tmp_path / "hizoo_space.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="lacks base_model, bits, kind, space, targets"):
        attach_adapter(model, tmp_path)
