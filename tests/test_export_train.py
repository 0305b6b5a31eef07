"""The training graph has the losses of our traversal, and a run on it takes the steps of one in torch."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file
from typer.testing import CliRunner

from hizoo_lite.base import Bits
from hizoo_lite.batch import Batch, Losses
from hizoo_lite.branches import EVALUATION, Branches
from hizoo_lite.checkpoints.adapter import PEFT_WEIGHTS
from hizoo_lite.checkpoints.fingerprint import of_model
from hizoo_lite.cli import app
from hizoo_lite.config import TrainConfig
from hizoo_lite.edge.__main__ import main
from hizoo_lite.edge.train import resolve, train
from hizoo_lite.engine.load import load
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import ExportError, UserError
from hizoo_lite.export.onnx.export import export_onnx
from hizoo_lite.export.onnx.skeleton import make_skeleton
from hizoo_lite.export.onnx.trace import trace
from hizoo_lite.export.onnx_train import check
from hizoo_lite.export.onnx_train import export as exporting
from hizoo_lite.export.onnx_train.export import export_train
from hizoo_lite.export.onnx_train.graph import OUTPUTS, train_interface
from hizoo_lite.noise import drawn, drawn_along
from hizoo_lite.run import Run, fit
from hizoo_lite.spaces import LoRA
from hizoo_lite.train.folder import RunFolder
from hizoo_lite.train.progress import Progress
from tests.architectures import save_tiny
from tests.batches import tiny_task_batch
from tests.run_fixtures import shallow, short_run, write_classes
from tests.tasks_fixtures import word_piece

#: Of a loss of tiny models, in float32 on both sides.
ROUNDING = 5e-6
#: A step's rounding moves the next steps' losses by less than this. `--lr auto` takes long steps: rounding of
#: 1e-7 of a loss is 1e-4 of a one-sided slope, which moves the next losses by as much of what a step does to
#: them. Fixed rates keep 1e-4 (tests/test_edge_train.py).
TRAJECTORY = 5e-3
STEPS = 25

KINDS = {
    "llama": "causal",
    "qwen2": "causal",
    "opt": "causal",
    "gpt2": "causal",
    "roberta": "masked",
    "bert": "classifier",
}
LAYERS = {"gpt2": "n_layer"}
LOSSES = {"causal": ("answer", "choice"), "masked": ("choice",), "classifier": ("class",)}
#: A classifier; the embedded Llama with its choices is exported in nf4 below.
FAST = {("bert", "nf4", "class")}
GRID = [
    pytest.param(name, bits, loss, marks=[] if (name, bits, loss) in FAST else [pytest.mark.grid])
    for name, kind in KINDS.items()
    for bits in get_args(Bits)
    for loss in LOSSES[kind]
]


def grouped(batch: Batch, loss: Any) -> Batch:
    """For a choice, the rows as answers of two examples: one of the first, the others of the second."""
    if loss != "choice":
        return batch
    one_each = torch.arange(len(batch.slot_example))
    return batch._replace(slot_example=one_each.clamp(max=1), gold=one_each[:2], loss=loss)


# ----------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize(("name", "bits", "loss"), GRID)
def test_losses_equal_the_traversals(name: str, bits: Bits, loss: Any, tmp_path: Path) -> None:
    kind: Any = KINDS[name]
    save_tiny(name, tmp_path / "model", kind=kind, **{LAYERS.get(name, "num_hidden_layers"): 1})
    model = load(tmp_path / "model", kind=kind, bits=bits, compute_dtype="float32", device="cpu")
    space = LoRA(rank=2, alpha=3.0, targets="all-linear", train_a=True, blocks="all")
    space.attach(model, 0)
    for path, value in space.parameters.items():
        value.add_(torch.from_numpy(drawn(1, 0, path, value.shape)), alpha=0.1)
    skeleton = make_skeleton(model, "exact")
    traced = train_interface(model, skeleton, space, loss, token_types=False)
    graph = trace(skeleton, traced.wrapper, traced.inputs, OUTPUTS, "hf", Progress())
    ir.save(graph, tmp_path / "train.onnx", external_data="train.onnx.data")
    session = onnxruntime.InferenceSession(tmp_path / "train.onnx", providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    assert names == [given.name for given in traced.inputs]
    operators = {"nf4": "MatMulBnb4", "fp4": "MatMulBnb4", "int8": "MatMulNBits", "none": "FusedMatMul"}
    assert operators[bits] in {node.op_type for node in graph.graph}

    mu, traversal = 0.1, Traversal(model)
    tensors = space.parameters.items()
    directions = {path: torch.from_numpy(drawn_along(2, 0, path, value.shape, 2)) for path, value in tensors}
    for rows, length in ((3, 12), (4, 20)):
        batch = grouped(tiny_task_batch(kind, rows, length), loss)
        for branches in (
            EVALUATION,
            Branches.of(),
            Branches.of(base=False),
            Branches.of(pairs=0, one_sided=2),
        ):
            want = traversal.losses(batch, branches, mu, directions)
            feeds = {key: value.numpy() for key, value in batch._asdict().items() if key in names}
            for path, value in tensors:
                points = [value + sign * mu * directions[path][k] for k, sign in branches.points]
                feeds[path] = torch.stack(points).numpy()
            feeds["compared"] = branches.compared
            losses, scores, between = session.run(OUTPUTS, feeds)
            assert losses.dtype == scores.dtype == between.dtype == np.float64
            np.testing.assert_allclose(losses, want.per_example, rtol=0, atol=ROUNDING)
            np.testing.assert_allclose(scores, want.scores, rtol=0, atol=ROUNDING)
            # of size mu^2 c: relative to their own size, and to float32 logits that differ by mu
            np.testing.assert_allclose(between, want.divergences, rtol=1e-3, atol=1e-7)
            if branches.pairs:
                assert want.divergences.max() > 1e-5
                assert np.abs(losses[-1] - losses[-2]).max() > 100 * ROUNDING


# ------------------------------------------------------------------------------------ trajectories


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run of the embedded model's first block in NF4, and its graph with the parameters it began with."""
    folder = tmp_path_factory.mktemp("demo")
    settings = {"bits": "nf4", "compute_dtype": "float32", "head": "estimated"}  # a graph has no gradients
    model = str(shallow(folder))
    run = fit(TrainConfig(**short_run(folder, model=model, steps=STEPS, **settings)))
    export_train(run.folder, folder / "graph", fresh=True)
    return run, folder / "graph"


TASK = """name = "pairs"
kind = "choice"
prompt = "{first} {second}"
classifier_text = "{first}"
classifier_text_pair = "{second}"
label_field = "label"

[answers]
0 = " bad"
1 = " good"
"""


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """The same of a BERT classifier with token types, whose folder has a vocabulary but no tokenizer.json."""
    folder = tmp_path_factory.mktemp("classifier")
    words = sorted(word_piece().vocab.items(), key=lambda item: item[1])
    save_tiny("bert", folder / "model", kind="classifier", vocab_size=len(words), num_hidden_layers=1)
    (folder / "model" / "vocab.txt").write_text("".join(word + "\n" for word, _ in words))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    texts = ["the film was great", "it was bad", "a boy kicks the ball", "is that true", "the game was okay"]
    rows = [{"first": a, "second": b, "label": int(a < b)} for a in texts for b in texts]
    (folder / "data").mkdir()
    for split, part in (("train", rows[::2]), ("test", rows[1::4])):
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "pairs.toml").write_text(TASK)
    changes = {"model": str(folder / "model"), "task": str(folder / "pairs.toml"), "kind": "classifier"}
    changes |= {"data": str(folder / "data"), "out": str(folder / "run")}
    # At mu = 1e-3 rounding is a tenth of this flat loss's curvature, from which the learning rate is taken;
    # at 1e-2 sums in another order still grow to 1e-5 or 2e-4 over the run, at 1e-1 to 4e-7.
    changes |= {"bits": "int8", "compute_dtype": "float32", "steps": STEPS, "mu": 1e-1, "head": "estimated"}
    (folder / "unused").mkdir()
    run = fit(TrainConfig(**short_run(folder / "unused", **changes)))
    export_train(run.folder, folder / "graph", fresh=True)
    return run, folder / "graph"


def test_rows_for_labels_are_in_the_graph_and_stay(tmp_path: Path) -> None:
    """The export itself compares losses with the model's, to 1e-4."""
    settings = {"bits": "nf4", "compute_dtype": "float32", "lr": "auto", "model": str(shallow(tmp_path))}
    run = fit(TrainConfig(**short_run(tmp_path, **settings)))
    record = export_train(run.folder, tmp_path / "graph")
    trained = {entry["name"]: entry["trained"] for entry in record["parameters"]}
    assert {name for name in trained if "lm_head" in name} == {
        "lm_head.lora_A.weight", "lm_head.lora_B.weight"
    }  # fmt: skip
    assert not any(moves for name, moves in trained.items() if "lm_head" in name)
    folder, _ = train(
        tmp_path / "graph", resolve(tmp_path / "graph", {"out": str(tmp_path / "edge"), "steps": "2"})
    )
    before, after = (load_file(path / "adapter/adapter_model.safetensors") for path in (run.folder, folder))
    for name, value in before.items():
        same = bool((value == after[name]).all())
        assert same == ("lm_head" in name or "lora_A" in name), name


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("which", ["demo", pytest.param("classifier", marks=pytest.mark.grid)])
def test_a_run_on_the_export_takes_the_steps_of_torch(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run, graph = request.getfixturevalue(which)
    folder, summary = train(graph, resolve(graph, {"out": str(tmp_path / "edge")}))
    ours, theirs = lines(folder), lines(run.folder)
    assert len(ours) == len(theirs) == STEPS + 2
    for got, want in zip(ours, theirs, strict=True):
        if got["kind"] == "step":
            np.testing.assert_allclose(got["losses"], want["losses"], rtol=0, atol=TRAJECTORY)
        else:
            assert got["loss"] == pytest.approx(want["loss"], abs=TRAJECTORY)
            assert got["accuracy"] == want["accuracy"]
    assert summary["bits"] == run.setup.model.bits
    moved = load_file(folder / "adapter" / PEFT_WEIGHTS)
    start = load_file(graph / "adapter" / PEFT_WEIGHTS)
    for name, value in run.setup.space.parameters.items():
        np.testing.assert_allclose(moved["base_model.model." + name], value.numpy(), rtol=0, atol=2e-2)
    space = run.setup.space
    assert (
        set(moved)
        == set(start)
        == {"base_model.model." + name for name in (*space.frozen, *space.parameters)}
    )
    for name in space.frozen:
        np.testing.assert_array_equal(moved["base_model.model." + name], start["base_model.model." + name])
    assert any(np.abs(moved[name] - start[name]).max() > 1e-3 for name in moved)


def test_a_resumed_run_is_bitwise_the_same(demo: tuple[Run, Path], tmp_path: Path) -> None:
    _, graph = demo
    whole, _ = train(graph, resolve(graph, {"out": str(tmp_path / "whole"), "steps": "6"}))
    part, _ = train(graph, resolve(graph, {"out": str(tmp_path / "part"), "steps": "3"}))
    train(graph, resolve(graph, {"resume": True, "out": str(part), "steps": "6"}))
    got, want = ([line.get("losses") for line in lines(folder)] for folder in (part, whole))
    assert [item for item in got if item] == [item for item in want if item]
    assert (part / "adapter" / PEFT_WEIGHTS).read_bytes() == (whole / "adapter" / PEFT_WEIGHTS).read_bytes()


def cheap(monkeypatch: pytest.MonkeyPatch, graph: Path) -> None:
    """Has the graph that is there already taken in place of a trace."""

    def copied(*arguments: Any) -> None:
        out = next(value for value in arguments if isinstance(value, Path))
        for name in ("train.onnx", "train.onnx.data"):
            shutil.copyfile(graph / name, out / name)

    monkeypatch.setattr(exporting, "_write_graph", copied)


@pytest.mark.parametrize("which", ["classifier", pytest.param("demo", marks=pytest.mark.grid)])
def test_tuning_goes_on_from_the_run_and_the_adapter_fits_the_exported_base(
    which: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, graph = request.getfixturevalue(which)
    cheap(monkeypatch, graph)
    arguments = ["export", str(run.folder), "--to", "onnx-train", "--out", str(tmp_path / "graph"), "--json"]
    done = CliRunner().invoke(app, [*arguments, "--quiet"])
    assert done.exit_code == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["check"]["max_abs_difference"] < check.LIMIT
    kept, tuned = (load_file(path / "adapter" / PEFT_WEIGHTS) for path in (tmp_path / "graph", run.folder))
    assert all(np.array_equal(kept[name], value) for name, value in tuned.items())
    folder, summary = train(tmp_path / "graph", resolve(tmp_path / "graph", {"out": str(tmp_path / "edge")}))
    assert summary["loss_before"] == pytest.approx(run.summary["loss_after"], abs=ROUNDING)
    assert summary["loss_after"] != pytest.approx(summary["loss_before"], abs=100 * ROUNDING)

    export_onnx(run.folder, tmp_path / "onnx")
    assert main(["eval", str(tmp_path / "onnx"), "--adapter", str(folder)]) == 0
    shown = json.loads(capsys.readouterr().out)["scores"]
    assert shown["loss"] == pytest.approx(summary["loss_after"], abs=ROUNDING)
    assert shown["accuracy"] == summary["metric_after"]


def test_the_folder_says_what_the_graph_is(demo: tuple[Run, Path], classifier: tuple[Run, Path]) -> None:
    run, graph = demo
    record = json.loads((graph / "train.json").read_text())
    assert (record["kind"], record["bits"], record["loss"]) == ("causal", "nf4", "choice")
    assert {entry["branches"] for entry in record["check"]["runs"]} == {1, 2}
    assert record["check"]["max_abs_difference"] < record["check"]["limit"] == 1e-4
    assert set(record["lora"]["target_modules"]) == set(run.setup.space.target_names)  # type: ignore[attr-defined]
    assert record["base"]["fingerprint"] == of_model(Path(run.setup.config.model))
    config = RunFolder(graph).config()
    assert config == replace(RunFolder(run.folder).config(), out=None)
    assert (graph / "tokenizer.json").is_file()
    assert str(Path(torch.__file__).parents[1]).encode() not in (graph / "train.onnx").read_bytes()
    heads = json.loads((classifier[1] / "train.json").read_text())["onnx_adapter"]["names"]
    assert heads["classifier.weight"] == {"input": "classifier.weight", "transpose": False, "scale": 1.0}


def test_every_size_of_the_graph_is_free(demo: tuple[Run, Path], classifier: tuple[Run, Path]) -> None:
    for _, graph in (demo, classifier):
        inputs = onnx.load(graph / "train.onnx", load_external_data=False).graph.input
        sizes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in inputs}
        shapes = json.loads((graph / "train.json").read_text())["parameters"]
        for entry in shapes:
            assert sizes.pop(entry["name"]) == ["branches", *entry["shape"]]
        assert sizes.pop("compared") == ["directions", 2]
        assert all(isinstance(size, str) for found in sizes.values() for size in found)


# ----------------------------------------------------------------------------------- bad input


def test_what_cannot_be_trained_is_refused(demo: tuple[Run, Path], tmp_path: Path) -> None:
    run, graph = demo
    with pytest.raises(UserError, match=r"--out: .* is not empty; allowed: a new or empty folder"):
        export_train(run.folder, graph)
    with pytest.raises(UserError, match=r"config\.toml: no such file; allowed: the folder of a run"):
        export_train(run.folder / "adapter", tmp_path / "graph")
    with pytest.raises(UserError, match="--adapter: got"):
        export_train(tmp_path, tmp_path / "graph")
    dense = Path(shutil.copytree(run.folder, tmp_path / "dense"))
    shutil.move(dense / "adapter" / "adapter_config.json", dense / "adapter" / "hizoo_space.json")
    with pytest.raises(UserError, match="space: only runs with --space lora can be exported to train"):
        export_train(dense, tmp_path / "graph")
    assert not (tmp_path / "graph").exists()


def test_a_task_with_other_classes_than_the_graphs_is_refused(
    classifier: tuple[Run, Path], tmp_path: Path
) -> None:
    config = replace(RunFolder(classifier[1]).config(), out=str(tmp_path / "run"))
    changed = replace(config, **{**write_classes(tmp_path, 3), "model": config.model})
    with pytest.raises(UserError, match=r"--task: of3 has 3 classes .*train\.onnx has 2 outputs; allowed"):
        train(classifier[1], changed)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("loss", "off", "sound"), [(50.0, 4e-3, True), (50.0, 6e-3, False), (0.5, 2e-4, False)]
)
def test_a_loss_may_differ_by_its_rounding(loss: float, off: float, sound: bool) -> None:
    batch = tiny_task_batch("causal", 2, 8)

    class Graph:
        def losses(self, *_: object) -> Losses:
            return Losses(np.full((1, 2), loss + off), np.zeros((1, 2)), np.zeros((0, 2)))

    wanted = Losses(np.full((1, 2), loss), np.zeros((1, 2)), np.zeros((0, 2)))
    case = check.Case(batch, EVALUATION, {}, wanted)
    if sound:
        assert check._compared(Graph(), case)["max_abs_difference"] == pytest.approx(off)  # type: ignore[arg-type]
        return
    with pytest.raises(ExportError, match="differs from the model by"):
        check._compared(Graph(), case)  # type: ignore[arg-type]


def test_a_graph_of_other_losses_is_removed(
    demo: tuple[Run, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, graph = demo
    cheap(monkeypatch, graph)
    data = bytearray((graph / "train.onnx.data").read_bytes())
    data[:4096] = bytes(4096)
    broken = Path(shutil.copytree(graph, tmp_path / "broken"))
    (broken / "train.onnx.data").write_bytes(data)
    cheap(monkeypatch, broken)
    with pytest.raises(ExportError, match=r"differs from the model by .*, allowed is \d+e-04: 1 branches of"):
        export_train(run.folder, tmp_path / "graph")
    (broken / "train.onnx").write_bytes(b"no graph")
    arguments = ["export", str(run.folder), "--to", "onnx-train", "--out", str(tmp_path / "graph")]
    done = CliRunner().invoke(app, [*arguments, "--quiet"])
    assert done.exit_code == 1
    assert "onnxruntime cannot run the training graph" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_a_place_that_cannot_be_taken_is_refused_before_any_work(
    demo: tuple[Run, Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out: .*file is a file; no folder can be made in it"):
        export_train(demo[0].folder, tmp_path / "file" / "graph")
    with pytest.raises(UserError, match=r"--out: .*file is a file; allowed: a new or empty folder"):
        export_train(demo[0].folder, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
