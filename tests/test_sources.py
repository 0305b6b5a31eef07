"""Several sources of data in one run: each is recognised, has its share of a batch, and its own metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import hizoo_lite as hz
from hizoo_lite import tasks
from hizoo_lite.cli import app
from hizoo_lite.config import TrainConfig
from hizoo_lite.errors import UserError
from hizoo_lite.train import components

SETTINGS: dict[str, Any] = {"steps": 3, "batch_size": 4, "seed": 3, "device": "cpu", "progress": False}


class Ends:
    """Ends a run after its second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        control.should_training_stop = state.global_step == 2


@pytest.fixture
def sources(tmp_path: Path) -> tuple[str, str]:
    """A table with labels and a file of conversations."""
    table, chats = tmp_path / "reviews.csv", tmp_path / "chat.jsonl"
    words = [("good", "warm"), ("bad", "cold")]
    rows = [f"The soup {n} was {word},{label}\n" for n in range(12) for label, word in words]
    table.write_text("review,verdict\n" + "".join(rows))
    turns = [
        {"messages": [{"role": "user", "content": f"Soup {n}?"}, {"role": "assistant", "content": "Yes."}]}
        for n in range(24)
    ]
    chats.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    return str(table), str(chats)


def test_each_source_is_what_it_is(sources: tuple[str, str]) -> None:
    config = TrainConfig(model="embedded", data=sources, task_weight=(3, 1), batch_size=4)
    forms = components.understood(config)
    assert [one.form for one in forms] == ["classification", "messages"]
    task = components.task_of(config)
    assert [part.name for part in task.parts] == ["reviews", "chat"]
    assert config.task_name == ", ".join(sources)
    splits = components.run_splits(config, task)
    assert splits.sizes == (24, 24)
    lines = components.form_lines(forms, splits)
    assert lines[0].startswith("reviews, classification: 24 examples, text in 'review'")
    assert lines[1].startswith("chat, messages: 24 examples")
    told = " ".join(components.division_lines(config, splits, task))
    assert "--loss answer: choices that stand beside texts" in told
    alone = components.division_lines(config, splits, task.parts[0])
    assert "--loss" not in " ".join(alone)
    stream = task.stream(splits.train, 0, task.classes(splits.train, True))
    of_chat = [splits.train[index].fields[tasks.task.TASK] for index in stream(range(100))]
    assert of_chat.count(1) == 25


def test_a_run_on_two_sources_is_resumed_and_evaluated(sources: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    whole = hz.fit("embedded", data=sources, task_weight=(2, 1), out=str(out), **SETTINGS)
    keys = tasks.get(str(out / "task.toml"))
    assert [part.kind for part in keys.parts] == ["choice", "lm"]
    told = whole.summary["tasks"]
    assert {name: one["metric"] for name, one in told.items()} == {"reviews": "accuracy", "chat": "loss"}
    half = tmp_path / "half"
    hz.fit("embedded", data=sources, task_weight=(2, 1), out=str(half), callbacks=[Ends()], **SETTINGS)
    again = CliRunner().invoke(app, ["train", "--resume", "--out", str(half)])
    assert again.exit_code == 0, again.output
    one, other = (sorted((run / "adapter").rglob("*.safetensors")) for run in (out, half))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]
    alone = CliRunner().invoke(app, ["eval", "--adapter", str(out), "--task", "reviews", "--json"])
    assert alone.exit_code == 0, alone.output
    scores = json.loads(alone.stdout)["scores"]
    assert scores["accuracy"] == told["reviews"]["metric_after"]
    assert scores["loss"] == pytest.approx(told["reviews"]["loss_after"])  # of the same kind as in the run
    same = CliRunner().invoke(
        app, ["eval", "--adapter", str(out), "--task", f"{out}/task.toml:reviews", "--json"]
    )
    assert same.exit_code == 0, same.output
    assert json.loads(same.stdout)["scores"] == scores
    with pytest.raises(UserError, match=r"got rows in memory, allowed with one task; .*: reviews, chat"):
        hz.evaluate(whole, data=[{"review": "It was warm.", "verdict": "good"}])


def test_one_task_takes_several_sources(sources: tuple[str, str], tmp_path: Path) -> None:
    other = tmp_path / "more" / "reviews.csv"
    other.parent.mkdir()
    other.write_text(Path(sources[0]).read_text().replace("soup", "cake"))
    written = tmp_path / "both.toml"
    asked = ["data", "inspect", sources[0], "--write-task", str(written)]
    assert CliRunner().invoke(app, asked).exit_code == 0
    config = TrainConfig(model="embedded", task=str(written), data=(sources[0], str(other)))
    task = components.task_of(config)  # files that are called alike, so by their paths
    assert [part.name for part in task.parts] == [sources[0], str(other)]
    assert components.with_tasks(config, {"task": str(other)}).data == str(other)


def test_several_are_inspected_and_written_as_one_file(sources: tuple[str, str], tmp_path: Path) -> None:
    written = tmp_path / "both.toml"
    found = CliRunner().invoke(app, ["data", "inspect", *sources, "--json", "--write-task", str(written)])
    assert found.exit_code == 0, found.output
    assert [one["form"] for one in json.loads(found.stdout)["sources"]] == ["classification", "messages"]
    assert [part.name for part in tasks.get(str(written)).parts] == ["reviews", "chat"]
    assert tasks.get(f"{written}:chat").chat
    with pytest.raises(UserError, match=r"both.toml has no task 'soup'; allowed: reviews, chat"):
        tasks.get(f"{written}:soup")
    asked = ["data", "inspect", *sources, "--task", str(written), "--json"]
    again = CliRunner().invoke(app, asked)  # each by its own task
    assert again.exit_code == 0, again.output
    assert [one["form"] for one in json.loads(again.stdout)["sources"]] == ["reviews", "chat"]
    fewer = CliRunner().invoke(app, ["data", "inspect", *sources, sources[0], "--task", str(written)])
    assert fewer.exit_code == 2
    assert "--data: got 3, allowed: one for each of 2 tasks" in fewer.stderr


def test_a_file_of_tasks_that_a_run_refuses_is_not_written(sources: tuple[str, str], tmp_path: Path) -> None:
    written = tmp_path / "twice.toml"
    asked = ["data", "inspect", sources[0], sources[0], "--write-task", str(written)]
    found = CliRunner().invoke(app, asked)
    assert found.exit_code == 2
    assert "two tasks that are called" in found.stderr
    assert not written.exists()


def test_sources_have_names_that_can_be_asked_for(
    sources: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, colon = tmp_path / "here", tmp_path / "all:train.jsonl"
    folder.mkdir()
    Path(sources[0]).rename(folder / "reviews.csv")
    Path(sources[1]).rename(colon)
    monkeypatch.chdir(folder)
    config = TrainConfig(model="embedded", data=(".", str(colon)))  # a folder that has no name here
    assert [part.name for part in components.task_of(config).parts] == [".", "all:train"]
    asked = ["data", "inspect", ".", str(colon), "--write-task", "both.toml"]
    assert CliRunner().invoke(app, asked).exit_code == 0
    assert tasks.get("both.toml:all:train").chat


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ("{0}", "nowhere.csv")}, r"--data nowhere.csv: .*no such file"),
        ({"label_field": "verdict"}, r"--data .*chat.jsonl: .*no column 'verdict'; .* messages"),
        ({"task_weight": (1.0, 2.0, 3.0)}, r"task_weight: .*allowed: one for each of 2 tasks"),
        ({"task": "{both}", "data": "{0}"}, r"--data: got 1, allowed: one for each of 2 tasks"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, sources: tuple[str, str], tmp_path: Path
) -> None:
    both = tmp_path / "both.toml"
    asked = ["data", "inspect", *sources, "--write-task", str(both)]
    assert CliRunner().invoke(app, asked).exit_code == 0

    def filled(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(filled, value))
        return value.format(*sources, both=both) if isinstance(value, str) else value

    given = {"data": sources, **{name: filled(value) for name, value in changes.items()}}
    with pytest.raises(UserError, match=message):
        components.task_of(TrainConfig(model="embedded", **given))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks = []", "tasks: allowed alone"),
        ('name = "a"\n[[tasks]]\nname = "b"\n', "tasks: allowed alone"),
        ("tasks = [1]", "tasks: allowed: the keys of a task each"),
        ('[[tasks]]\nname = "a"\nkind = "lm"\n', "task 1: prompt: missing"),
    ],
)
def test_a_file_of_several_tasks_says_what_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tasks.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        tasks.get(str(path))
