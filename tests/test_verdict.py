"""What a report says of a run: the verdict with its error bar, examples, confused classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hizoo_lite.batch import Example
from hizoo_lite.config import TrainConfig
from hizoo_lite.errors import UserError
from hizoo_lite.report import examples, verdict
from hizoo_lite.report.record import RunRecord, read_run
from hizoo_lite.report.report import write_report
from hizoo_lite.run import Run, fit
from hizoo_lite.tasks.splits import Splits
from hizoo_lite.tasks.task import TASK
from hizoo_lite.train import components
from tests.run_fixtures import short_run


def record(before: float, after: float, count: int, **more: Any) -> RunRecord:
    """A run with these accuracies on so many test examples."""
    losses = {"loss_before": more.pop("loss_before", 1.0), "loss_after": more.pop("loss_after", 0.5)}
    summary = {"metric": "accuracy", "metric_before": before, "metric_after": after, "test_examples": count}
    return RunRecord(Path("run"), more, {**summary, **losses}, [], [], {}, {}, [], [])


def sides(gained: int, lost: int, count: int) -> list[dict[str, Any]]:
    """Lines of predictions: so many became right, so many wrong."""
    found = []
    for index in range(count):
        changed = index < gained + lost
        first = index >= gained if changed else True
        found.append({"when": "before", "index": index, "right": first})
        found.append({"when": "after", "index": index, "right": not first if changed else True})
    return found


def test_a_change_within_chance_is_not_learnt_yet() -> None:
    said = verdict.of_run(record(0.28, 0.32, 25))
    assert said is not None
    assert said.learnt is False
    assert said.says.startswith(
        "Not learnt yet: accuracy 28.0 % to 32.0 % of 25 examples, loss 1.000 to 0.500; within ±"
    )
    assert "--exact-blocks 6" in said.next
    assert "more steps from here (--init-adapter " in said.next


def test_a_change_beyond_chance_is_learnt() -> None:
    said = verdict.of_run(record(0.51, 0.80, 872))
    assert said is not None
    assert (said.learnt, said.next) == (True, "")
    worse = verdict.of_run(record(0.80, 0.51, 872, loss_after=2.0))
    assert worse is not None
    assert worse.says.startswith("Worse than before")
    assert "more steps" not in worse.next


def test_few_examples_are_answered_with_how_many_it_takes() -> None:
    said = verdict.of_run(record(0.0, 1.0, 3))
    assert said is not None
    assert " of 3 examples, " in said.says
    assert " of 1 example, " in str(verdict.of_run(record(0.0, 1.0, 1)))
    assert said.says.startswith("Too few held-out examples to say")
    assert said.next == (
        f"Next: hold out {verdict.LEAST_EXAMPLES} or more with --test-examples, "
        "or give them a file of their own."
    )


@pytest.mark.parametrize("metric", ["accuracy", "f1"])
@pytest.mark.parametrize("loss", [0.5, 1.0, 2.0])
def test_the_advice_on_few_examples_is_one_whatever_they_came_to(metric: str, loss: float) -> None:
    run = record(0.25, 0.5, verdict.LEAST_EXAMPLES - 1, loss_after=loss)
    run.summary["metric"] = metric
    assert (said := verdict.of_run(run)) is not None
    assert said.says.startswith("Too few held-out examples to say")
    assert said.next.startswith("Next: hold out")
    assert "--exact-blocks" not in said.next


def test_what_a_wide_bar_may_hide_is_answered_with_more_examples() -> None:
    few, many = (verdict.of_run(record(0.5, 0.5, count)) for count in (verdict.LEAST_EXAMPLES, 400))
    assert few is not None
    assert many is not None
    assert "more held-out examples with --test-examples" in few.next
    assert "--test-examples" not in many.next


def test_before_a_run_too_few_examples_are_told_with_their_error_bar() -> None:
    assert verdict.too_few({"test": 4, "dev": 20}, "accuracy") == (
        "4 test examples: an accuracy of so few is uncertain by ± 50 points; "
        "hold out 20 or more with --test-examples, or give them a file of their own"
    )
    both = verdict.too_few({"test": 4, "dev": 1}, "accuracy")
    assert both.startswith("4 test examples and 1 dev example: ")
    assert "± 100 points; hold out 20 or more with --test-examples and --dev-examples" in both
    assert "points" not in verdict.too_few({"test": 4}, "f1")
    assert verdict.too_few({"test": verdict.LEAST_EXAMPLES, "dev": 0}, "accuracy") == ""
    assert "too few to tell chance; hold out 20" in verdict.too_few({"test": 4}, "loss")


def test_an_evaluation_has_the_error_bar_of_its_share() -> None:
    assert verdict.bar_of({"loss": 0.2, "accuracy": 0.9}, "accuracy", 100) == "± 6.0 points"
    assert verdict.bar_of({"loss": 0.2, "accuracy": 1.0}, "accuracy", 100) == "± 2.0 points"
    assert verdict.bar_of({"loss": 0.2, "f1": 0.9}, "f1", 100) == ""
    assert verdict.bar_of({"loss": 0.2, "accuracy": 0.9, "a/accuracy": 0.9}, "accuracy", 100) == ""


def test_the_commands_after_a_run_are_of_its_folder_and_model(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    given = record(0.0, 1.0, 3)
    assert verdict.commands(given.path, given.summary) == {}  # nothing is saved
    (folder / "adapter").mkdir(parents=True)
    summary = {**given.summary, "kind": "classifier", "space": "dense"}
    assert verdict.commands(folder, summary) == {
        "evaluate": f"hizoo-lite eval --adapter '{folder}'",
        "export": f"hizoo-lite export '{folder}' --to merged --out '{folder}-merged'",
    }


def test_the_command_to_look_at_the_data_has_the_runs_own() -> None:
    said = verdict.of_run(record(0.5, 0.5, 100, data="my data/rows.csv", model="models/m"))
    assert said is not None
    assert "hizoo-lite data inspect 'my data/rows.csv' --model models/m, " in said.next
    both = verdict.of_run(record(0.5, 0.5, 100, data=["my data/rows.csv", "b.csv"], model="models/m"))
    assert both is not None
    assert "hizoo-lite data inspect 'my data/rows.csv' b.csv --model models/m, " in both.next


def test_the_error_is_of_the_examples_that_changed_sides() -> None:
    paired = verdict.standard_error(sides(12, 4, 100), 0.5, 0.58, 100)
    assert paired == pytest.approx((16 - 64 / 100) ** 0.5 / 100)
    assert paired < verdict.standard_error([], 0.5, 0.58, 100)
    assert verdict.standard_error(sides(12, 4, 99), 0.5, 0.58, 100) > paired  # some are not known
    assert verdict.standard_error(sides(0, 0, 10), 1.0, 1.0, 10) > 0


@pytest.mark.parametrize(
    "more",
    [{"exact_blocks": 6}, {"objective": "accuracy"}, {"space": "dense"}, {"estimator": "dp"}],
)
def test_exact_blocks_are_proposed_where_they_can_be_had(more: dict[str, Any]) -> None:
    said = verdict.of_run(record(0.5, 0.5, 100, **more))
    assert said is not None
    assert "--exact-blocks" not in said.next


def test_a_run_without_answers_is_judged_by_its_loss() -> None:
    run = record(0.0, 0.0, 10)
    run.summary["metric"] = "loss"
    said = verdict.of_run(run)
    assert said is not None
    assert said.says == "loss 1.000 to 0.500, on held-out examples: it fell."
    run.summary["loss_after"] = None
    assert verdict.of_run(run) is None


@pytest.mark.parametrize(
    ("after", "begins", "learnt", "has_next"),
    [
        (0.80, "Learnt: loss 1.000 to 0.800 on 25 held-out examples; more than chance", True, False),
        (0.99, "Not learnt yet: loss 1.000 to 0.990 on 25 held-out examples; within ± 0.040", False, True),
        (1.01, "Not learnt: ", False, True),
        (1.20, "Worse than before: loss 1.000 to 1.200 on 25 held-out examples (± 0.040)", False, True),
    ],
)
def test_a_loss_has_the_error_bar_of_its_examples_changes(
    after: float, begins: str, learnt: bool, has_next: bool
) -> None:
    run = record(0.0, 0.0, 25, loss_after=after)
    run.summary["metric"] = "loss"
    for index in range(25):  # changes of after - 1 +- 0.1, but for one that has just that
        own = after + (0.0 if index == 24 else 0.1 * (-1) ** index)
        run.predictions.append({"when": "before", "index": index, "loss": 1.0})
        run.predictions.append({"when": "after", "index": index, "loss": own})
    assert verdict.loss_error(run.predictions, after - 1.0) == pytest.approx(0.1 / 5)
    said = verdict.of_run(run)
    assert said is not None
    assert said.says.startswith(begins)
    assert (said.learnt, bool(said.next)) == (learnt, has_next)


def test_a_loss_of_few_examples_says_nothing() -> None:
    run = record(0.0, 0.0, 4, loss_after=0.5)
    run.summary["metric"] = "loss"
    for index in range(4):
        run.predictions.append({"when": "before", "index": index, "loss": 1.0})
        run.predictions.append({"when": "after", "index": index, "loss": 0.5})
    assert (said := verdict.of_run(run)) is not None
    assert (said.learnt, said.next[:14]) == (None, "Next: hold out")
    assert said.says == "Too few held-out examples to say: loss 1.000 to 0.500 on 4 held-out examples."


def test_a_mean_of_tasks_has_no_error_bar_of_examples() -> None:
    ends = [("before", 1.0), ("after", 0.5)]
    lines = [{"when": when, "index": index, "loss": loss} for index in range(3) for when, loss in ends]
    assert verdict.loss_error(lines, -0.4) is None
    assert verdict.loss_error(lines, -0.5) == 0.0
    assert verdict.loss_error(lines[:2], -0.5) is None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fit(TrainConfig(**short_run(tmp_path_factory.mktemp("verdict"), lr=1e-2)))


def test_a_run_keeps_what_was_predicted(run: Run) -> None:
    lines = [json.loads(line) for line in (run.folder / "predictions.jsonl").read_text().splitlines()]
    count = len(run.setup.splits.test)
    assert [line["when"] for line in lines] == ["before"] * count + ["after"] * count
    assert run.after is not None
    after = lines[count:]
    assert sum(line["right"] for line in after) / count == pytest.approx(run.after.metric.value)
    assert sum(line["loss"] for line in after) / count == pytest.approx(run.after.loss)
    first = run.setup.splits.test[0]
    assert after[0]["gold"] == first.answers[first.gold].strip()
    assert after[0]["prompt"].endswith("It was")


def test_examples_and_confused_classes(run: Run) -> None:
    found = read_run(run.folder)
    shown = {group.title: group.examples for group in examples.groups(found)}
    assert len(shown["The first held-out examples"]) == min(examples.SHOWN, len(run.setup.splits.test))
    table = examples.confusion(found)
    assert table is not None
    assert sum(map(sum, table.rows)) == len(run.setup.splits.test)
    page = write_report([run.folder]).html.read_text()
    assert "Held-out examples" in page
    assert "Which answers were given" in page
    assert json.loads((run.folder / "report.json").read_text())["runs"][0]["verdict"]["says"] in page


def test_damaged_predictions_are_named(run: Run) -> None:
    path = run.folder / "predictions.jsonl"
    text = path.read_text()
    path.write_text(text + "[1]\n")
    with pytest.raises(UserError, match=r"predictions.jsonl: line .* it needs when and index"):
        read_run(run.folder)
    path.write_text(text)


def test_a_private_run_keeps_none(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    made = fit(
        TrainConfig(**short_run(tmp_path, lr=1e-2, estimator="dp", curvature="none", head="estimated"))
    )
    assert not (made.folder / "predictions.jsonl").exists()


def test_an_error_bar_is_of_shares_alone() -> None:
    run = record(0.495, 0.696, 200, loss_after=0.4)
    run.summary["metric"] = "f1"
    said = verdict.of_run(run)
    assert said is not None
    assert (said.learnt, said.next) == (None, "")
    assert "an error bar is known of accuracy alone" in said.says


def test_half_of_a_character_does_not_stop_a_page() -> None:
    lines = [
        {"when": "after", "index": 0, "gold": "\ud83d", "answer": "a", "prompt": "\ud83d", "right": False}
    ]
    lines.append({**lines[0], "index": 1, "answer": "\ud83d"})
    run = RunRecord(Path("run"), {}, {}, [], [], {}, {}, [], lines)
    shown = examples.groups(run)[0].examples[0]
    assert (shown.gold, shown.prompt) == ("?", "?")
    table = examples.confusion(run)
    assert table is not None
    assert table.classes == ["?", "a"]


def test_examples_of_several_tasks_are_few_if_those_of_one_are() -> None:
    rows = [Example({TASK: number % 2}, ("a", "b"), 0) for number in range(30)]
    config = TrainConfig(model="m", task=("rte", "sst2"))
    said = components.few_held_out(config, Splits(rows, [], rows), "mean")
    assert said.startswith("15 test examples: too few to tell chance")
    assert components.few_held_out(config, Splits(rows, [], rows * 2), "mean") == ""
