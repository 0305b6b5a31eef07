"""Several tasks in one run: whose turn it is, what their encoder gives, and what a run makes of them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from hizoo_lite import tasks
from hizoo_lite.batch import Example
from hizoo_lite.cli import app
from hizoo_lite.config import DEMO, TrainConfig
from hizoo_lite.errors import UserError
from hizoo_lite.export.quantize import Quantization
from hizoo_lite.run import Run, evaluate, fit
from hizoo_lite.tasks import Encoder, batch_indices
from hizoo_lite.tasks.batching import as_they_come
from hizoo_lite.tasks.mixture import CYCLE, MixedEncoder, Mixture, Turns, joined
from hizoo_lite.tasks.splits import Splits
from hizoo_lite.tasks.task import TASK, Task, part_of
from hizoo_lite.train import checkpoint, config_file
from hizoo_lite.train.replay import replay
from tests.members import MEMBERS
from tests.run_fixtures import flags, short_run, two_tasks, write_classes, write_texts
from tests.tasks_fixtures import llama
from tests.test_members import HEADER, same_files

SST2, RTE = tasks.get("sst2"), tasks.get("rte")
#: Rows of labels that are read from a file have zeros behind them, and round otherwise.
CLOSE = 1e-6


def mixture(*members: Task, weights: tuple[float, ...] | None = None) -> Mixture:
    found = tasks.of_tasks(members, weights)
    assert isinstance(found, Mixture)
    return found


def examples(*counts: int) -> list[Example]:
    """So many of each task, of two classes where there are several, as a run has them."""
    parts = [[Example({"number": n}, (" a", " b"), n % 2) for n in range(count)] for count in counts]
    return joined([Splits(part, [], []) for part in parts]).train


# -------------------------------------------------------------------------------------------- the turns


@pytest.mark.parametrize("weights", [(1, 1), (2, 1), (1, 2, 4), (0.3, 0.3, 0.4), (7, 1, 1, 1)])
@pytest.mark.parametrize("size", [1, 6, 16])
def test_every_batch_has_its_share_of_each_task(weights: tuple[float, ...], size: int) -> None:
    turns, shares = Turns(weights), np.array(weights) / sum(weights)
    for step in range(200):
        counts = Counter(turns.part(place) for place in range(step * size, (step + 1) * size))
        assert all(abs(counts[part] - size * share) < 2 for part, share in enumerate(shares))
    for part, share in enumerate(shares):
        assert abs(turns.before(part, 3 * CYCLE) - 3 * CYCLE * share) <= 3


def test_equal_tasks_come_by_turns() -> None:
    assert [Turns((1.0, 1.0)).part(place) for place in range(6)] == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("weights", [(1, 1), (2, 1, 5), (1, 1e-9, 1e-12)])
def test_places_before_are_those_that_were_counted(weights: tuple[float, ...]) -> None:
    """And no task is without one, whatever its weight."""
    turns, seen = Turns(weights), Counter[int]()
    for place in range(2 * CYCLE + 5):
        if place % 997 == 0 or place > 2 * CYCLE:
            assert [turns.before(part, place) for part in range(len(weights))] == [
                seen[part] for part in range(len(weights))
            ]
        seen[turns.part(place)] += 1
    assert all(seen[part] >= 2 for part in range(len(weights)))


def test_each_task_has_the_stream_that_it_has_alone() -> None:
    train, task = examples(30, 7), mixture(SST2, RTE, weights=(3, 1))
    classes = task.classes(train, balanced=False)
    stream = task.stream(train, 5, classes)
    found = [index for step in range(40) for index in batch_indices(37, 8, 5, step, classes, stream=stream)]
    for part, count in ((0, 30), (1, 7)):
        own = [int(train[index].fields["number"]) for index in found if part_of(train[index]) == part]
        assert own == as_they_come(count, 5, None, range(len(own)))


def test_classes_are_balanced_within_each_task() -> None:
    train, task = examples(40, 24), mixture(SST2, RTE)
    classes = task.classes(train, balanced=True)
    stream = task.stream(train, 0, classes)
    for step in range(20):
        batch = [train[index] for index in batch_indices(64, 8, 0, step, classes, stream=stream)]
        assert Counter((part_of(one), one.gold) for one in batch) == {
            (p, g): 2 for p in (0, 1) for g in (0, 1)
        }


def test_sorting_by_length_leaves_the_tasks_shares() -> None:
    train, task = examples(400, 400), mixture(SST2, RTE)
    lengths = np.random.default_rng(0).integers(3, 200, len(train)).tolist()
    classes = task.classes(train, balanced=False)
    stream = task.stream(train, 0, classes)
    arguments = classes, lengths.__getitem__, stream
    found = [batch_indices(800, 16, 0, step, *arguments) for step in range(16)]
    assert found == [batch_indices(800, 16, 0, step, *arguments) for step in range(16)]
    assert found != [batch_indices(800, 16, 0, step, classes, stream=stream) for step in range(16)]
    for batch in found:
        assert Counter(part_of(train[index]) for index in batch) == {0: 8, 1: 8}


def test_a_task_without_examples_is_named() -> None:
    train, task = examples(4, 0), mixture(SST2, RTE)
    with pytest.raises(UserError, match="no training examples of task rte"):
        task.stream(train, 0, task.classes(train, balanced=False))


def test_the_first_training_examples_are_of_all_tasks() -> None:
    assert [part_of(example) for example in examples(4, 2)] == [0, 1, 0, 1, 0, 0]
    alone = Splits([Example({}, (), 0)], [], [])
    assert joined([alone]) is alone
    assert tasks.of_tasks([SST2]) is SST2


# ------------------------------------------------------------------------------------------ the encoder


def test_examples_are_encoded_as_by_their_own_task() -> None:
    task = mixture(SST2, RTE)
    parts = [Encoder(llama(), "causal", part, 64) for part in task.parts]
    encoder = MixedEncoder(task, parts)
    one = Example({"text": "a fine day", TASK: 0}, SST2_ANSWERS, 1)
    other = Example({"premise": "It rains.", "hypothesis": "It is wet.", TASK: 1}, (" Yes", " No"), 0)
    for training in (False, True):
        for part, example in ((0, one), (1, other)):
            assert encoder.encode(example, training=training) == parts[part].encode(
                example, training=training
            )
    assert encoder.prompt_ids(other) == parts[1].prompt_ids(other)
    batch = encoder.collate([encoder.encode(example, training=True) for example in (one, other)])
    assert batch.examples == 2
    labels = [
        part.label_tokens([example], 64) or [] for part, example in zip(parts, (one, other), strict=True)
    ]
    assert encoder.label_tokens([one, other], 64) == sorted({*labels[0], *labels[1]})
    assert encoder.label_tokens([one], 64) == labels[0]
    first = encoder.label_tokens([one, other], 4)
    assert first is not None
    assert set(first) < {*labels[0], *labels[1]}


SST2_ANSWERS = (" terrible", " great")


def test_tasks_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    squad = tasks.get("squad")
    with pytest.raises(UserError, match=r"sst2 has the loss 'choice', squad 'answer'.*--loss answer"):
        MixedEncoder(mixture(SST2, squad), [Encoder(llama(), "causal", t, 64) for t in (SST2, squad)])
    found = [write_classes(tmp_path, classes) for classes in (2, 3)]
    of = [tasks.get(one["task"]) for one in found]
    with pytest.raises(UserError, match="one head, and the tasks' classes are of2 2, of3 3"):
        MixedEncoder(mixture(*of), [Encoder(llama(), "classifier", t, 64) for t in of])
    with pytest.raises(UserError, match="two tasks that are called 'sst2'"):
        mixture(SST2, SST2)


# -------------------------------------------------------------------------------------------- the flags

BASE = {"model": "m", "task": ("sst2", "rte")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "d"}, r"--data: got 'd', allowed: one for each of 2 tasks, or none"),
        ({"data": ("a", "b", "c")}, r"--data: got \('a', 'b', 'c'\), allowed: one for each of 2 tasks"),
        ({"task": "sst2", "data": ("a", "b"), "task_weight": 2.0}, r"--task-weight: got 2.0, .* of 2 tasks"),
        ({"task_weight": 2.0}, r"--task-weight: got 2.0, allowed: one for each of 2 tasks"),
        ({"task": "sst2", "task_weight": 2.0}, r"--task-weight: got 2.0, .* several --task or --data"),
        ({"task_weight": (1.0, 0.0)}, r"--task-weight: got \(1.0, 0.0\), allowed: a number above 0"),
        ({"task_weight": ("a", 1.0)}, r"--task-weight: got \('a', 1.0\), allowed: a number above 0"),
        ({"task": ("rte", "rte")}, r"--task: got 'rte' twice, allowed: each once"),
        (
            {"task_weight": (1.0, 2.0), "estimator": "dp", "lr": 1e-3},
            r"--task-weight: .* dp draws every example with the same probability; allowed: none",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_their_flag(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_file.resolve(None, _texts({**BASE, **changes}))
    found = CliRunner().invoke(app, ["train", *flags({**BASE, **changes})])
    assert found.exit_code == 2


def _texts(values: dict[str, Any]) -> dict[str, Any]:
    """As flags."""
    return {
        name: [str(one) for one in value] if isinstance(value, tuple) else str(value)
        for name, value in values.items()
    }


def test_lists_are_written_and_read_and_one_is_no_list(tmp_path: Path) -> None:
    config = TrainConfig(model="m", task=["sst2", "rte"], data=["a", "b"], task_weight=[2, 1])
    assert config.tasks == ("sst2", "rte")
    path = tmp_path / "config.toml"
    path.write_text(config_file.write(config))
    assert config_file.read(path) == config
    path.write_text('model = "m"\ntask = ["sst2"]\ndata = ["a"]\n')
    one = config_file.resolve(str(path))
    assert (one.task, one.data) == ("sst2", "a")
    assert 'task = "sst2"\ndata = "a"\n' in config_file.write(one)
    assert config_file.resolve(None, {"model": "m", "task": ["rte"]}).task == "rte"


def test_tasks_of_a_flag_leave_the_files_weights(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('model = "m"\ntask = ["sst2", "rte"]\ntask_weight = [2, 1]\n')
    assert config_file.resolve(str(path)).task_weight == (2.0, 1.0)
    assert config_file.resolve(str(path), {"task": ["rte"]}).task_weight is None
    assert config_file.resolve(str(path), {"task": ["a", "b"], "task_weight": ["3", "1"]}).task_weight == (
        3,
        1,
    )


def test_rows_in_memory_are_of_a_single_task() -> None:
    for given, message in (
        ({"task": ["sst2", {"name": "x"}]}, "task: got .* allowed with several tasks: names or paths"),
        ({"task": ["sst2", "rte"], "data": [{"a": 1}]}, "data: got .* allowed with several tasks"),
    ):
        with pytest.raises(UserError, match=message):
            fit("embedded", **given)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------- the runs


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded model in NF4 files."""
    folder = tmp_path_factory.mktemp("stored") / "nf4"
    Quantization(DEMO, folder, kind="causal", bits="nf4", double_quant=False).run()
    return str(folder)


@pytest.fixture(scope="module")
def trained(stored: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Run]:
    changes = {"model": stored, "steps": 4, "save_every": 2, "eval_every": 2, "task_weight": (1.0, 2.0)}
    config = TrainConfig(**two_tasks(tmp_path_factory.mktemp("two"), **changes))
    return config, fit(config)


def killed(run: Path, folder: Path, steps: int) -> Path:
    """The run as it was after a step less."""
    shutil.copytree(run, folder)
    shutil.rmtree(checkpoint.path_of(folder / "checkpoints", steps))
    shutil.rmtree(folder / "adapter")
    data = (folder / "journal.bin").read_bytes()
    (folder / "journal.bin").write_bytes(data[: len(data) - (len(data) - HEADER) // steps])
    return folder


def test_a_run_tells_the_scores_of_each_task_and_their_mean(trained: tuple[TrainConfig, Run]) -> None:
    config, run = trained
    summary = run.summary
    each = summary["tasks"]
    assert list(each) == ["moods", "sides"]
    assert summary["metric"] == "mean"
    assert summary["task"] == ", ".join(config.task)
    for when in ("before", "after"):
        for key in ("loss", "metric"):
            values = [found[f"{key}_{when}"] for found in each.values()]
            assert summary[f"{key}_{when}"] == pytest.approx(sum(values) / 2, abs=1e-15)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    dev = next(line for line in lines if line.get("when") == "dev")
    assert dev["mean"] == (dev["moods/accuracy"] + dev["sides/accuracy"]) / 2
    assert dev["loss"] == pytest.approx((dev["moods/loss"] + dev["sides/loss"]) / 2)
    assert "moods.metric_after" in run.report().read_text().replace("<wbr>", "")


def test_what_is_evaluated_again_is_what_the_run_had(trained: tuple[TrainConfig, Run]) -> None:
    config, run = trained
    after = run.after
    assert after is not None
    again = evaluate(run.folder)
    assert [metric.name for metric in again.metrics] == [metric.name for metric in after.metrics]
    assert again.loss == pytest.approx(after.loss, rel=CLOSE)
    for task, found in zip(config.task, run.summary["tasks"].values(), strict=True):
        alone = evaluate(run.folder, task=task)
        assert alone.loss == pytest.approx(found["loss_after"], rel=CLOSE)
        assert alone.metric.value == found["metric_after"]
    other = evaluate(run.folder, task=list(config.task), data=list(config.data or ()))
    assert other.predictions == after.predictions


def test_label_rows_are_of_all_tasks(trained: tuple[TrainConfig, Run]) -> None:
    setup = trained[1].setup
    words = {" bad", " good", " left", " right", " up", " down"}
    found = setup.encoder.label_tokens(setup.splits.train, 64)
    assert found is not None
    assert len(found) >= len(words)
    few = setup.encoder.label_tokens(setup.splits.train, trained[0].rank)
    assert setup.space.label_layer is not None or len(few or ()) > trained[0].rank  # type: ignore[attr-defined]


def test_a_killed_run_goes_on_to_the_same_bits(trained: tuple[TrainConfig, Run], tmp_path: Path) -> None:
    config, run = trained
    again = killed(run.folder, tmp_path / "run", 4)
    fit(replace(config, out=str(again), resume=True))
    assert same_files(again / "adapter", run.folder / "adapter")
    assert replay(run.folder, 4, tmp_path / "replayed").differs == []
    for changes, message in (
        ({"task_weight": (2.0, 1.0)}, "task_weight: the run has"),
        ({"task": config.task[::-1], "data": (config.data or ())[::-1]}, "task: the run has"),
    ):
        with pytest.raises(UserError, match=message):
            fit(replace(config, out=str(again), resume=True, **changes))


def test_a_streamed_run_is_the_resident_run_bitwise(trained: tuple[TrainConfig, Run], tmp_path: Path) -> None:
    config, run = trained
    streamed = fit(replace(config, out=str(tmp_path / "run"), residency="disk"))
    assert same_files(streamed.folder / "adapter", run.folder / "adapter")
    assert streamed.summary["tasks"] == run.summary["tasks"]


def test_a_list_in_python_is_the_same_run(trained: tuple[TrainConfig, Run], tmp_path: Path) -> None:
    config, run = trained
    given = {name: value for name, value in vars(config).items() if name not in ("model", "out")}
    given |= {name: list(given[name]) for name in ("task", "data", "task_weight")}
    again = fit(config.model, out=str(tmp_path / "run"), **given)
    assert same_files(again.folder / "adapter", run.folder / "adapter")


def test_hidden_states_are_kept_and_change_nothing(stored: str, tmp_path: Path) -> None:
    """The upper block is trained alone, and every example comes more than twice."""
    found = []
    for mode in ("auto", "off"):
        changes = {"model": stored, "blocks": 1, "steps": 12, "batch_size": 8, "hidden_states": mode}
        run = fit(TrainConfig(**two_tasks(tmp_path / mode, train_examples=8, **changes)))
        found.append(run)
    assert json.loads((found[0].folder / "run.json").read_text())["hidden_states"] == "kept"
    assert found[0].summary["loss_after"] == pytest.approx(found[1].summary["loss_after"], rel=1e-4)


def test_other_settings_than_those_of_a_single_task_are_as_they_were(tmp_path: Path) -> None:
    run = fit(TrainConfig(**short_run(tmp_path, steps=1)))
    assert "tasks" not in run.summary
    assert run.summary["metric"] == "accuracy"
    assert not any(TASK in example.fields for example in run.setup.splits.train)


def test_texts_of_several_tasks_are_written_each_to_its_own_end(tmp_path: Path) -> None:
    task, data = write_texts(tmp_path / "one")
    other = tmp_path / "other.toml"
    other.write_text(
        task.read_text().replace('"verdicts"', '"shorter"').replace(".\\n", ";").replace("thing", "one")
    )
    settings = {"task": (str(task), str(other)), "data": (str(data), str(data))}
    settings |= {"objective": "f1", "targets": "all-linear", "blocks": "all", "mu": 1.0, "steps": 2}
    run = fit(TrainConfig(**short_run(tmp_path, **settings)))
    assert run.summary["skipped_steps"] == 0
    assert run.after is not None
    for task_of, found in zip((task, other), run.summary["tasks"].values(), strict=True):
        assert evaluate(run.folder, task=str(task_of)).loss == found["loss_after"]


def test_a_classifiers_tasks_share_its_head_if_they_have_as_many_classes(tmp_path: Path) -> None:
    first, second = write_classes(tmp_path, 2), write_classes(tmp_path, 3)
    other = tmp_path / "other.toml"
    other.write_text(Path(first["task"]).read_text().replace('"of2"', '"other"'))
    settings = {"kind": "classifier", "steps": 2}
    together = {"task": (first["task"], str(other)), "data": (first["data"], first["data"])}
    run = fit(TrainConfig(**short_run(tmp_path, **settings, **together)))
    assert list(run.summary["tasks"]) == ["of2", "other"]
    assert run.summary["skipped_steps"] == 0
    together = {"task": (first["task"], second["task"]), "data": (first["data"], second["data"])}
    changes = {**settings, **together, "out": str(tmp_path / "refused")}
    found = CliRunner().invoke(app, ["train", *flags(short_run(tmp_path, **changes))])
    assert found.exit_code == 2
    assert "one head, and the tasks' classes are of2 2, of3 3" in found.stderr
    assert not (tmp_path / "refused").exists()


@pytest.mark.grid
def test_a_device_goes_on_with_several_tasks(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from hizoo_lite.edge.__main__ import main
    from tests.edge_fixtures import export_training

    config = TrainConfig(
        **two_tasks(
            tmp_path,
            model=str(DEMO),
            kind="causal",
            bits="none",
            targets="all-linear",
            compute_dtype="float32",
        )
    )
    export_training(config, tmp_path / "graph")
    assert main(["train", str(tmp_path / "graph"), "--out", str(tmp_path / "edge"), "--steps", "2"]) == 0
    summary = json.loads((tmp_path / "edge" / "summary.json").read_text())
    assert list(summary["tasks"]) == ["moods", "sides"]
    more = ["--task", config.tasks[0], "--data", str(config.data[0] if config.data else "")]
    assert (
        main(["train", str(tmp_path / "graph"), "--out", str(tmp_path / "one"), "--steps", "1", *more]) == 0
    )


def test_a_loss_alone_has_its_mean(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps({"text": f"the {name} story {n} was good"}) + "\n" for n in range(30))
        (tmp_path / name / "train.jsonl").write_text(lines)
        (tmp_path / f"{name}.toml").write_text(f'name = "{name}"\nkind = "lm"\nprompt = "{{text}}"\n')
    changes = {"task": tuple(str(tmp_path / f"{name}.toml") for name in ("one", "two"))}
    changes |= {"data": tuple(str(tmp_path / name) for name in ("one", "two")), "eval_every": 1}
    run = fit(TrainConfig(**short_run(tmp_path, steps=2, keep="best", test_examples=4, **changes)))
    assert run.summary["metric"] == "loss"
    assert run.summary["metric_after"] == run.summary["loss_after"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[] if name in ("lora, exact blocks", "sparse", "accuracy", "dp") else pytest.mark.grid
        )
        for name, case in MEMBERS.items()
        if not case.writes and name != "gains"
    ],
)
def test_every_member_trains_on_several_tasks_goes_on_and_is_replayed(
    name: str, stored: str, tmp_path: Path
) -> None:
    case = MEMBERS[name]
    model = "embedded" if "bits" in case.settings else stored
    settings = {"model": model, "steps": 4, "save_every": 2, "test_examples": 4, **case.settings}
    config = TrainConfig(**two_tasks(tmp_path, **settings))
    run = fit(config)
    assert run.summary["skipped_steps"] == 0
    again = killed(run.folder, tmp_path / "again", 4)
    resumed = fit(replace(config, out=str(again), resume=True))
    if not resumed.setup.stepper.estimator.secret:
        assert same_files(again / "adapter", run.folder / "adapter")
    assert replay(again, 4, tmp_path / "replayed").differs == []
