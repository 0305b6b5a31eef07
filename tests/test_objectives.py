"""Objectives other than the loss: their numbers, what a step makes of them, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import hizoo_lite as hz
from hizoo_lite.batch import Batch, Example, Losses
from hizoo_lite.branches import Branches
from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.cli import app
from hizoo_lite.config import TrainConfig
from hizoo_lite.edge import train as edge
from hizoo_lite.errors import UserError
from hizoo_lite.export.onnx_train.export import export_train
from hizoo_lite.model import kinds
from hizoo_lite.objectives import Accuracy
from hizoo_lite.plan import planner
from hizoo_lite.plan.workload import Demand, Workload, cache_bytes
from hizoo_lite.report.charts import make_charts
from hizoo_lite.report.headline import about
from hizoo_lite.report.record import read_run
from hizoo_lite.run import Run, fit
from hizoo_lite.tasks import Encoder
from hizoo_lite.train.compared import Compared
from hizoo_lite.train.progress import RunningMeans
from tests.run_fixtures import flags, short_run, write_texts

REWARDS = """
def margin(example, scores):
    assert type(scores) is list and len(scores) == len(example.answers)
    return scores[example.gold] - max(s for i, s in enumerate(scores) if i != example.gold)

def brevity(example, text):
    return -len(text)

def same(example, found):
    return 0.5

def fails(example, found):
    return example.answers[7]

def nothing(example, found):
    return None

def unknown(example, found):
    return float("nan")
"""
#: At which the embedded model's answers change.
FAR = {"targets": "all-linear", "blocks": "all", "mu": 1.0}


@pytest.fixture
def rewards(tmp_path: Path) -> str:
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS)
    return str(path)


def steps(run: Run | Path) -> list[dict[str, Any]]:
    folder = run if isinstance(run, Path) else run.folder
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def run_of(folder: Path, **changes: Any) -> Run:
    return fit(TrainConfig(**short_run(folder, **changes)))


def texts_run(folder: Path, **changes: Any) -> Run:
    write_texts(folder)
    return run_of(folder, **{"objective": "f1", **FAR, **changes})


def same_parameters(one: Run, other: Run) -> bool:
    pairs = zip(one.setup.space.parameters.items(), other.setup.space.parameters.items(), strict=True)
    return all(name == its and bool((a == b).all()) for (name, a), (its, b) in pairs)


class Given:
    """A traversal that has computed already."""

    def __init__(self, losses: Losses) -> None:
        self.given = losses

    def losses(self, *args: Any) -> Losses:
        return self.given


def slots(*counts: int) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


def batch_of(golds: list[int], slot_example: np.ndarray, loss: Any) -> Batch:
    nothing = np.zeros(0, dtype=np.int64)
    examples = tuple(Example({}, ("",) * 3, gold) for gold in golds)
    gold = np.array(golds)
    return Batch(*[nothing] * 2, None, *[nothing] * 5, slot_example, gold, loss, examples)


def encoder_of(order: tuple[int, ...] | None = None) -> Encoder:
    made = object.__new__(Encoder)
    made.order, made.task = order, hz.tasks.get("sst5")
    return made


def test_accuracy_is_minus_one_where_the_gold_candidate_scores_highest() -> None:
    """Two points, three examples of 2, 3 and 2 candidates; of equal scores the first is chosen."""
    scores = np.array([[0.0, 1.0, 3.0, 2.0, 1.0, 5.0, 5.0], [1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
    given = Losses(np.zeros((2, 3)), scores, np.ones((1, 3)))
    batch = batch_of([1, 0, 1], slots(2, 3, 2), "choice")
    found = Compared(Accuracy(), Given(given), encoder_of(), "scores").losses(batch)  # type: ignore[arg-type]
    assert found.per_example.tolist() == [[-1.0, -1.0, 0.0], [0.0, 0.0, -1.0]]
    assert not np.signbit(found.per_example[0, 2])
    assert found.divergences is given.divergences


def test_scores_of_a_classifier_are_in_the_order_of_the_tasks_classes() -> None:
    logits = np.array([[[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]]])
    losses = np.array([[0.0, math.nan]])
    batch = batch_of([1, 1], slots(), "class")
    given: Any = Given(Losses(losses, logits, np.zeros((1, 2))))
    found = Compared(Accuracy(), given, encoder_of(order=(1, 2, 0)), "scores").losses(batch).per_example
    assert found[0, 0] == -1.0  # output 2 is class 1
    assert math.isnan(found[0, 1])  # whose loss is none


def test_the_loss_is_the_traversals_own(tmp_path: Path) -> None:
    setup = run_of(tmp_path, objective="loss", steps=1).setup
    assert setup.stepper.traversal is setup.traversal
    assert (setup.config.head, setup.config.mu) == ("exact", 1e-3)


def test_accuracy_improves_and_is_what_is_recorded_and_shown(tmp_path: Path) -> None:
    run = hz.fit(
        "embedded",
        task="embedded",
        data="embedded",
        objective="accuracy",
        targets="all-linear",
        device="cpu",
        steps=60,
        max_length=64,
        dev_examples=0,
        test_examples=100,
        out=str(tmp_path / "run"),
    )
    assert (run.setup.config.head, run.setup.config.mu) == ("estimated", 0.3)
    assert run.summary["objective"] == "accuracy"
    assert run.summary["metric_after"] > run.summary["metric_before"] + 0.1
    assert run.summary["forward_passes"] == 3 * 60
    lines = steps(run)
    assert all(-1 <= loss <= 0 and (16 * loss).is_integer() for line in lines for loss in line["losses"])
    assert all(math.isfinite(line["lr"]) and line["curvature"] > 0 for line in lines)
    charts = {chart.key: chart for chart in make_charts([read_run(run.folder)])}
    assert "loss" not in charts
    assert charts["objective"].title == "Objective accuracy"
    first = next(one for one in charts["objective"].series if one.label == "each step").points[0]
    assert first == (0.0, pytest.approx(-np.mean(lines[0]["losses"])))
    assert ", objective accuracy, on cpu" in about(read_run(run.folder))


def test_a_console_names_the_objective_and_shows_its_value() -> None:
    class Record:
        forwards, skipped, losses = 2, False, (-0.75, -0.25)

    watch = RunningMeans()
    watch.on_train_begin(type("Arguments", (), {"objective": "accuracy"}), None, None)
    watch.stepped(Record())  # type: ignore[arg-type]
    assert watch.state().startswith("mean objective accuracy 0.5000, ")


def test_a_classifier_and_its_head_are_trained_by_accuracy(tmp_path: Path) -> None:
    settings = {"kind": "classifier", "batch_size": 5, "balanced": "off"}
    run = run_of(tmp_path, objective="accuracy", mu=1.0, **settings)
    assert all(round(-5 * loss) in range(6) for line in steps(run) for loss in line["losses"])
    assert any(line["projected_grad"] for line in steps(run))
    assert run.setup.space.exact == {}
    assert any("score" in name for name in run.setup.space.parameters)


# --------------------------------------------------------------------------------------- functions


def test_a_function_in_a_file_is_given_the_scores(tmp_path: Path, rewards: str) -> None:
    """At a base branch the mean margin of the batch is what the scores of an evaluation give."""
    run = run_of(tmp_path, objective=f"{rewards}:margin", directions=2, compute_dtype="float32", steps=2)
    assert any(line["projected_grad"] for line in steps(run))
    call = ["train", *flags(short_run(tmp_path, out=str(tmp_path / "cli"), objective=f"{rewards}:margin"))]
    done = CliRunner().invoke(app, [*call, "--directions", "2", "--compute-dtype", "float32", "--steps", "2"])
    assert done.exit_code == 0, done.stderr
    assert "objective" in done.stdout
    assert [line["losses"] for line in steps(tmp_path / "cli")] == [line["losses"] for line in steps(run)]


def test_another_function_is_refused_on_resume(tmp_path: Path, rewards: str) -> None:
    settings = short_run(tmp_path, objective=f"{rewards}:margin", steps=2)
    fit(TrainConfig(**settings))
    more = TrainConfig(**{**settings, "steps": 3}, resume=True)
    Path(rewards).write_text(REWARDS + "\n\ndef more(): ...\n")
    with pytest.raises(UserError, match="--objective: the function, or the file it is in"):
        fit(more)
    Path(rewards).write_text(REWARDS)
    assert fit(more).summary["steps"] == 3
    with pytest.raises(UserError, match=r"objective: the run has .*margin', got 'accuracy'"):
        fit(TrainConfig(**{**settings, "objective": "accuracy"}, resume=True))


def test_a_function_in_memory_is_given_again(tmp_path: Path) -> None:
    def second(example: Example, scores: list[float]) -> float:
        return scores[1]

    config = TrainConfig(**short_run(tmp_path, steps=2))
    run = fit(config, objective=second)
    assert (run.setup.config.objective, run.setup.config.head) == ("in memory:second", "estimated")
    again = TrainConfig(**{**short_run(tmp_path, steps=3), "objective": "in memory:second"}, resume=True)
    assert fit(again, objective=second).summary["steps"] == 3
    with pytest.raises(UserError, match="'in memory:second' was given to `fit` as a function; give it again"):
        fit(again)
    with pytest.raises(UserError, match="objective: got 3, allowed: a name, or a function"):
        fit(config, objective=3)  # type: ignore[arg-type]


def test_steps_whose_points_are_alike_change_nothing(tmp_path: Path, rewards: str) -> None:
    run = run_of(tmp_path, objective=f"{rewards}:same", directions=2)
    assert all(line["losses"] == [-0.5] * 3 and line["projected_grad"] == 0.0 for line in steps(run))
    assert all(math.isfinite(line["lr"]) and line["lr"] > 0 for line in steps(run))
    assert all(not value.any() for name, value in run.setup.space.parameters.items() if "lora_B" in name)
    state = run.setup.stepper.curvature.state_dict()
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in state.values())
    assert run.before is not None
    assert run.after is not None
    assert run.before.loss == run.after.loss


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rewards.py:fails", r"fails: .*train.jsonl:\d+: IndexError: .*wanted: a function of"),
        ("rewards.py:nothing", r"nothing: .*train.jsonl:\d+: it returned None, allowed: a finite number"),
        ("rewards.py:unknown", r"unknown: .*train.jsonl:\d+: it returned nan, allowed: a finite number"),
        ("rewards.py:none", "has no function 'none'"),
        ("broken.py:f", "broken.py: SyntaxError"),
        ("absent.py:f", "no such file: .*absent.py"),
        ("best", "objective: got '.*best', allowed: loss, accuracy, f1, FILE.py:NAME"),
    ],
)
def test_functions_that_cannot_be_called_are_named(
    name: str, message: str, tmp_path: Path, rewards: str
) -> None:
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(UserError, match=message):
        run_of(tmp_path, objective=str(tmp_path / name))


# ------------------------------------------------------------------------------------------- texts


def test_f1_streamed_is_f1_resident_to_the_bit(tmp_path: Path) -> None:
    from hizoo_lite.export.quantize import Quantization

    stored = tmp_path / "stored"
    Quantization(
        Path(hz.__file__).parent / "demo", stored, kind="causal", bits="nf4", double_quant=False
    ).run()
    changes = {"model": str(stored), "steps": 3, "directions": 2}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    resident = texts_run(tmp_path / "a", **changes)
    streamed = texts_run(tmp_path / "b", **changes, residency="disk")
    assert (resident.summary["residency"], streamed.summary["residency"]) == ("resident", "disk")
    assert [line["losses"] for line in steps(resident)] == [line["losses"] for line in steps(streamed)]
    assert any(line["projected_grad"] for line in steps(resident))
    assert same_parameters(resident, streamed)


@pytest.mark.parametrize(
    "points", [Branches.of(), Branches.of(pairs=0, one_sided=2)], ids=["pair", "one-sided"]
)
def test_every_branch_writes_what_its_parameters_write(points: Branches, tmp_path: Path) -> None:
    """Against the same traversal with the parameters moved there; nothing else moves them."""
    setup = texts_run(tmp_path, steps=1, bits="none", compute_dtype="float32").setup
    parameters, draw, mu = setup.space.parameters, torch.Generator().manual_seed(0), 0.5
    directions = {n: torch.randn(points.directions, *p.shape, generator=draw) for n, p in parameters.items()}
    before = {name: value.clone() for name, value in parameters.items()}
    encoder = setup.encoder
    prompts = [encoder.prompt_ids(example) for example in setup.splits.train[:3]]
    together = setup.traversal.writing(points, mu, directions)(prompts, encoder.pad_id, 12)
    assert all(bool((parameters[name] == value).all()) for name, value in before.items())
    alone = []
    for along, offset in points.points:
        for name, value in parameters.items():
            value.copy_(before[name]).add_(directions[name][along], alpha=offset * mu)
        alone.append(setup.traversal.write(prompts, encoder.pad_id, 12))
    by_branch = [together[first : first + 3] for first in range(0, len(together), 3)]
    assert len(by_branch) == points.count
    decoded = [
        [encoder.tokenizer.batch_decode(r, skip_special_tokens=True) for r in each]
        for each in (by_branch, alone)
    ]
    assert decoded[0] == decoded[1]
    assert len({str(texts) for texts in decoded[0]}) == points.count


def test_a_function_is_given_the_text(tmp_path: Path, rewards: str) -> None:
    run = texts_run(tmp_path, objective=f"{rewards}:brevity", steps=2)
    assert all(float(loss * 4).is_integer() and loss > 0 for line in steps(run) for loss in line["losses"])


def test_keys_and_values_of_every_branch_are_planned() -> None:
    asked = {
        "model": "embedded",
        "task": "squad",
        "device": "cpu",
        "compute_dtype": "float32",
        "batch_size": 64,
    }
    config = TrainConfig(**asked, eval_batch_size=1, head="none")
    checkpoint = Checkpoint.open(kinds.model_path("embedded"))

    def planned(objective: str, **writes: int) -> Any:
        workload = Workload(Demand(), Demand(), 64, **(writes or {"written": 96}))
        changed = TrainConfig(**asked, eval_batch_size=1, head="none", objective=objective)
        return planner.plan_run(changed, checkpoint, "causal", workload, framework=1 << 20)

    found = planned("f1").categories["cache"]
    from transformers import AutoConfig

    model = AutoConfig.from_pretrained(kinds.model_path("embedded"))
    assert found == cache_bytes(model, 3 * config.batch_size, 96)
    assert planned("f1").peak_bytes > planned("loss").peak_bytes
    assert planned("f1", answered=96).categories["cache"] == found  # of a task whose evaluations do not write
    assert "cache" not in planned("loss", answered=96).categories


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "exact"}, "head: got 'exact', which is of the loss, .* allowed: auto, estimated, none"),
        ({"exact_blocks": 1}, "exact_blocks: got 1, which is of the loss, .* allowed: 0"),
        ({"curvature_from": "losses"}, "curvature_from: got 'losses', .* allowed: predictions"),
    ],
)
def test_what_is_of_the_loss_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**short_run(tmp_path, objective="accuracy", **changes))
    call = ["train", *flags(short_run(tmp_path, objective="accuracy", **changes))]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("objective", "text", "changes", "message"),
    [
        (
            "f1",
            False,
            {},
            "f1 is of a written answer, but task moods has scores of candidates; allowed: loss, acc",
        ),
        ("accuracy", True, {}, "but task verdicts has a written answer; allowed: loss, f1, FILE.py:NAME"),
        ("accuracy", False, {"loss": "answer"}, r"--loss answer scores the gold one alone \(--loss choice"),
        ("rewards.py:same", False, {"task": "lm"}, "but task lm has neither; allowed: loss$"),
    ],
)
def test_a_task_without_what_the_objective_reads_is_refused(
    objective: str, text: bool, changes: dict[str, Any], message: str, tmp_path: Path, rewards: str
) -> None:
    if text:
        write_texts(tmp_path)
    if ":" in objective:
        objective = str(tmp_path / objective)
    with pytest.raises(UserError, match=message):
        run_of(tmp_path, objective=objective, **changes)
    assert not (tmp_path / "run").exists()


def test_a_graph_for_a_device_is_of_the_loss(tmp_path: Path) -> None:
    run = run_of(tmp_path, objective="accuracy", steps=1)
    with pytest.raises(UserError, match="objective: accuracy; the graph has losses alone"):
        export_train(run.folder, tmp_path / "graph")
    assert not (tmp_path / "graph").exists()
    with pytest.raises(UserError, match="objective: got 'accuracy', allowed here: loss"):
        edge.train(
            tmp_path, TrainConfig(**short_run(tmp_path, objective="accuracy", out=str(tmp_path / "e")))
        )
