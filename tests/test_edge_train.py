"""A run beside onnxruntime takes the steps of a run in torch, and writes what that writes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file

from hizoo_lite import locks
from hizoo_lite.batch import Example
from hizoo_lite.branches import Branches
from hizoo_lite.checkpoints.fingerprint import of_model
from hizoo_lite.config import TrainConfig
from hizoo_lite.edge.__main__ import main
from hizoo_lite.edge.graph import GraphSpace, Record, TrainGraph
from hizoo_lite.edge.tokenizer import EdgeTokenizer
from hizoo_lite.edge.train import resolve, train
from hizoo_lite.errors import StorageError, UserError
from hizoo_lite.report.report import write_report
from hizoo_lite.run import fit
from hizoo_lite.tasks import Encoded, Encoder, Task
from hizoo_lite.tasks.collate import collate
from hizoo_lite.train.evaluate import evaluate
from hizoo_lite.train.replay import replay
from tests.edge_fixtures import export_classifier, export_training
from tests.run_fixtures import shallow, short_run
from tests.test_edge_imports import BLOCKED, without_torch

#: Both sides compute in float32; a step's rounding moves the next steps' losses by less than this.
TRAJECTORY = 1e-4
STEPS = 25


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("data")
    as_a_graph_has_it = {"bits": "none", "compute_dtype": "float32", "head": "estimated"}
    model = str(shallow(folder))
    return TrainConfig(**short_run(folder, model=model, steps=STEPS, blocks="all", **as_a_graph_has_it))


@pytest.fixture(scope="module")
def exported(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_training(config, tmp_path_factory.mktemp("export") / "graph")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


METHODS: dict[str, dict[str, Any]] = {
    "hizoo, grouped, auto": {},
    "hizoo from losses": {"curvature_from": "losses"},
    "hizoo from losses every 3, by row, cosine": {
        "curvature_from": "losses",
        "curvature_every": 3,
        "curvature_per": "row",
        "lr_schedule": "cosine",
        "warmup_steps": 5,
    },
    "hizoo, diagonal, decay": {"curvature": "diagonal", "lr": 1e-3, "weight_decay": 0.1},
    "hizoo, diagonal reference": {"curvature": "diagonal", "curvature_mode": "reference", "lr": 1e-3},
    "hizoo, factored": {"curvature": "factored", "lr": 1e-3, "smoothing": 1e-3},
    "mezo, clipped": {"estimator": "mezo", "lr": 1e-2, "clip": 0.05},
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_losses_equal_those_of_torch(
    method: dict[str, Any], config: TrainConfig, exported: Path, tmp_path: Path
) -> None:
    config = replace(config, **method)
    # `--lr auto` takes long steps: 1e-7 of a loss is 1e-4 of a one-sided slope, and moves what comes after
    longer = 50 if config.lr == "auto" else 1
    run = fit(replace(config, out=str(tmp_path / "torch")))
    folder, summary = train(exported, replace(config, out=str(tmp_path / "edge")))
    ours, theirs = lines(folder), lines(run.folder)
    assert len(ours) == len(theirs) == STEPS + 2
    for got, want in zip(ours, theirs, strict=True):
        assert set(got) == set(want)
        if got["kind"] == "step":
            np.testing.assert_allclose(got["losses"], want["losses"], rtol=0, atol=longer * TRAJECTORY)
            assert [got[key] for key in ("step", "forwards", "skipped", "tokens")] == [
                want[key] for key in ("step", "forwards", "skipped", "tokens")
            ]
        else:
            assert got["loss"] == pytest.approx(want["loss"], abs=longer * TRAJECTORY)
            assert got["accuracy"] == want["accuracy"]
    moved = load_file(folder / "adapter" / "adapter_model.safetensors")
    for name, value in run.setup.space.parameters.items():
        np.testing.assert_allclose(
            moved["base_model.model." + name], value.numpy(), rtol=0, atol=longer * 2e-3
        )
    assert summary["steps"] == STEPS
    assert summary["forward_passes"] == run.summary["forward_passes"]
    assert set(run.summary) - set(summary) == {"memory_retries", "trained_blocks"}


def test_a_run_is_replayed_with_numpy(config: TrainConfig, exported: Path, tmp_path: Path) -> None:
    config = replace(config, steps=7, save_every=3, out=str(tmp_path / "run"))
    folder, _ = train(exported, config)
    for step in (3, 7):
        found = replay(folder, step)
        assert found.differs == []
        assert len(found.same) == (3 if step == 3 else 4)


def test_the_run_folder_has_what_a_torch_run_has(config: TrainConfig, exported: Path, tmp_path: Path) -> None:
    folder, summary = train(exported, replace(config, out=str(tmp_path / "run"), steps=4))
    assert {path.name for path in folder.iterdir()} == {
        *(
            "config.toml",
            "run.json",
            "metrics.jsonl",
            "journal.bin",
            "checkpoints",
            "adapter",
            "adapter.onnx_adapter",
        ),
        *("summary.json", "memory.json", "predictions.jsonl", locks.NAME),
    }
    made_of = json.loads((folder / "run.json").read_text())
    assert [made_of["base"], made_of["base_fingerprint"]] == [config.model, of_model(Path(config.model))]
    memory = json.loads((folder / "memory.json").read_text())
    assert memory["session_bytes"] > 0
    assert memory["phases"]["train"]["peak_bytes"] <= summary["measured_peak_bytes"]
    # what earlier tests of this process have freed may be given back meanwhile
    assert memory["training_peak_bytes"] > 0.9 * memory["start_bytes"]["anon_bytes"]
    assert write_report([folder]).html.is_file()


def test_private_steps_are_taken_and_accounted_for_on_a_device(
    config: TrainConfig, exported: Path, tmp_path: Path
) -> None:
    changes = {"estimator": "dp", "lr": 1e-2, "directions": 2, "dp_epsilon": 8.0, "steps": STEPS}
    folder, summary = train(exported, replace(config, out=str(tmp_path / "run"), **changes))
    taken = summary["steps"]
    assert 0 < taken < STEPS  # its budget is not enough for all
    assert summary["dp"]["steps"] == taken
    assert 0 < summary["dp"]["epsilon"] <= 8.0
    assert not (folder / "memory.json").exists()
    assert {line["seconds"] for line in lines(folder) if line["kind"] == "step"} == {None}
    assert replay(folder, taken, tmp_path / "replayed").differs == []


def test_the_adapter_goes_back_to_torch_and_to_onnxruntime(
    config: TrainConfig, exported: Path, tmp_path: Path
) -> None:
    from hizoo_lite.engine.load import load
    from hizoo_lite.train.saved import attach_adapter

    folder, _ = train(exported, replace(config, out=str(tmp_path / "run"), steps=4))
    model = load(config.model, kind="causal", bits="none")
    space = attach_adapter(model, folder)
    kept = onnxruntime.AdapterFormat.read_adapter(str(folder / "adapter.onnx_adapter")).get_parameters()
    names = Record.read(exported).onnx_names
    assert set(kept) == {entry["input"] for entry in names.values()}
    for name, value in space.parameters.items():
        turned = value.numpy().T * np.float32(names[name]["scale"])
        assert np.array_equal(kept[names[name]["input"]].numpy(), turned)
    assert any(torch.any(value != 0) for name, value in space.parameters.items() if "lora_B" in name)


def test_a_resumed_run_is_bitwise_the_same(config: TrainConfig, exported: Path, tmp_path: Path) -> None:
    whole, _ = train(exported, replace(config, out=str(tmp_path / "whole"), steps=6))
    part, _ = train(exported, replace(config, out=str(tmp_path / "part"), steps=3))
    flags = {"resume": True, "out": str(part), "steps": "6"}
    train(exported, resolve(exported, flags))
    got, want = (
        [(line["step"], line["losses"]) for line in lines(folder) if line["kind"] == "step"]
        for folder in (part, whole)
    )
    assert got == want
    for name in ("adapter/adapter_model.safetensors", "checkpoints/step-000006/curvature.safetensors"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()
    with pytest.raises(UserError, match=r"mu: the run has 0\.001, got 0\.002"):
        train(exported, resolve(exported, {**flags, "mu": "0.002"}))


def test_the_command_runs_without_torch(exported: Path, tmp_path: Path) -> None:
    code = "from hizoo_lite.edge.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    done = without_torch(
        code, "train", str(exported), "--out", str(tmp_path / "run"), "--steps", "3", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 3
    assert "saved in" in done.stderr
    assert set(json.loads(done.stdout)["versions"]) == {
        *("python", "hizoo-lite", "numpy", "onnxruntime", "tokenizers")
    }


def test_ctrl_c_saves_and_the_run_goes_on(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code = BLOCKED + "from hizoo_lite.edge.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    arguments = ["train", str(exported), "--out", str(out), "--steps", "1000000"]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").is_file() or len(lines_so_far(out)) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in told
    taken = json.loads((out / "summary.json").read_text())
    assert taken["interrupted"]
    more = str(taken["steps"] + 2)
    assert main(["train", str(exported), "--out", str(out), "--resume", "--steps", more]) == 0
    assert json.loads((out / "summary.json").read_text())["steps"] == taken["steps"] + 2


def lines_so_far(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_a_classifiers_graph_gets_what_it_asks_for(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    table, weight, direction = (
        draw.standard_normal(shape).astype(np.float32) for shape in ((9, 5), (2, 5), (2, 5))
    )
    graph = TrainGraph(export_classifier(tmp_path / "x", torch.from_numpy(table), torch.from_numpy(weight)))
    assert graph.token_types
    encoded = [
        Encoded([[1, 2, 3]], [[0, 0, 1]], [], [], 0, 1, "class"),
        Encoded([[4, 8]], [[0, 1]], [], [], 0, 0, "class"),
    ]
    mu = 0.1
    found = graph.losses(collate(encoded, 0), Branches.of(), mu, {"score.weight": direction[None]})
    means = [(table[1] + table[2] + 2 * table[3]) / 3, (table[4] + 2 * table[8]) / 2]
    for branch, sign in enumerate((0, 1, -1)):
        scores = np.array(means) @ (weight + sign * mu * direction).T
        np.testing.assert_allclose(found.scores[branch], scores, rtol=0, atol=1e-6)
        losses = np.log(np.exp(scores).sum(1)) - scores[[0, 1], [1, 0]]
        np.testing.assert_allclose(found.per_example[branch], losses, rtol=0, atol=1e-6)
    assert np.array_equal(graph.parameters["score.weight"], weight)


# --------------------------------------------------------------------------------------- bad input


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "train.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train.json", r"train\.json: no such file"),
        ("train.onnx", r"train\.onnx: no such file"),
        ("train.onnx.data", r"train\.onnx: its external data .* is missing"),
        ("adapter/adapter_model.safetensors", r"adapter_model\.safetensors: no such file"),
        ("tokenizer.json", r"tokenizer\.json: no such file"),
    ],
)
def test_a_missing_file_is_named(name: str, message: str, copied: Path, config: TrainConfig) -> None:
    (copied / name).unlink()
    with pytest.raises(UserError, match=message):
        train(copied, replace(config, out=str(copied / "run")))
    assert not (copied / "run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train.onnx", r"train\.onnx: it is truncated, or no ONNX graph"),
        ("train.onnx.data", r"train\.onnx: its external data .* truncated"),
        ("adapter/adapter_model.safetensors", r"adapter_model\.safetensors: truncated"),
        ("train.json", r"train\.json: not valid JSON"),
    ],
)
def test_a_truncated_file_is_named(name: str, message: str, copied: Path) -> None:
    data = (copied / name).read_bytes()
    (copied / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=message):
        TrainGraph(copied)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "format: got 1, allowed: 3; export the run again"),
        ({"kind": "seq2seq"}, "kind: got 'seq2seq', allowed: causal, masked, classifier"),
        ({"loss": "other"}, "loss: got 'other', allowed: answer, choice, class"),
        ({"parameters": [{"name": "x"}]}, r"not as export writes it \(KeyError: 'shape'\)"),
        ({"parameters": [{"name": "x", "shape": [1]}]}, r"not as export writes it \(KeyError: 'trained'\)"),
        ({"parameters": [{"name": "x", "shape": [1], "trained": True}]}, "has no input 'x'"),
    ],
)
def test_a_wrong_record_is_named(changes: dict[str, Any], message: str, copied: Path) -> None:
    edited(copied, **changes)
    with pytest.raises(UserError, match=message):
        TrainGraph(copied)


def test_an_adapter_of_another_shape_is_named(copied: Path) -> None:
    record = json.loads((copied / "train.json").read_text())
    record["parameters"][0]["shape"][0] += 1
    edited(copied, parameters=record["parameters"])
    with pytest.raises(UserError, match=r"has shape .* the model wants"):
        TrainGraph(copied)


def test_a_task_with_another_loss_than_the_graphs_is_refused(
    exported: Path, config: TrainConfig, tmp_path: Path
) -> None:
    (tmp_path / "train.txt").write_text("The day was warm.\n" * 400)
    changed = replace(config, task="lm", data=str(tmp_path), out=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"lm has the loss 'answer', the graph in .* computes 'choice'"):
        train(exported, changed)


def test_an_adapter_that_cannot_be_written_is_named_and_not_left(exported: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    space, path = GraphSpace("lora", TrainGraph(exported)), tmp_path / "adapter.onnx_adapter"
    with pytest.raises(StorageError, match=r"nothing/x\.onnx_adapter: cannot be written: Failed to open"):
        space.save_onnx_adapter(tmp_path / "nothing" / "x.onnx_adapter")
    space.save_onnx_adapter(path)
    whole = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, hard))  # a disk that is full
    try:
        with pytest.raises(StorageError, match=r"adapter\.onnx_adapter: cannot be written: Failed to write"):
            space.save_onnx_adapter(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == whole
    assert [found.name for found in tmp_path.iterdir()] == ["adapter.onnx_adapter"]


def test_a_completion_is_evaluated_by_its_loss_alone(exported: Path) -> None:
    task = Task(
        name="stories",
        kind="completion",
        build=lambda row: [],
        scorers={"never": lambda examples, texts: 1.0},
        causal="{text}",
        stop=".",
        max_new_tokens=4,
    )
    graph = TrainGraph(exported)
    encoder = Encoder(EdgeTokenizer(exported), "causal", task, 40)
    found = evaluate(graph, encoder, [Example({"text": "The soup was"}, (" warm.",), 0)], 2)
    assert found.metrics == []
    assert found.loss < 1e-6  # the graph's loss is a choice, here among one


def test_an_operator_that_is_not_known_is_the_users_error(copied: Path) -> None:
    import onnx

    graph = onnx.load(copied / "train.onnx", load_external_data=False)
    graph.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(graph, copied / "train.onnx")
    with pytest.raises(UserError, match=r"train\.onnx: this onnxruntime lacks one of its operators"):
        TrainGraph(copied)


def test_bad_input_exits_with_2_and_writes_nothing(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert "config.toml: no such file" in capsys.readouterr().err
    assert main(["train", str(exported), "--out", str(tmp_path / "run"), "--mu", "-1"]) == 2
    assert "--mu: got -1.0, allowed: auto, a number above 0" in capsys.readouterr().err
    assert main(["train", str(exported), "--out", str(exported)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
