"""`fit` with data and tasks that are in memory; the run folder then has both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForSequenceClassification

import hizoo_lite as hz
from hizoo_lite import tasks
from hizoo_lite.config import DEMO
from hizoo_lite.errors import UserError
from hizoo_lite.run import Run
from hizoo_lite.tasks import Records, files
from hizoo_lite.train import config_file

ROWS = [{"text": f"row {i} is {'good' if i % 2 else 'bad'}", "label": i % 2} for i in range(24)]
KEYS = {
    "name": "own",
    "kind": "choice",
    "prompt": "{text} It was",
    "label_field": "label",
    "answers": {"0": " terrible", "1": " great"},
}


def fitted(out: Path, **options: Any) -> Run:
    limits = {"train_examples": 16, "dev_examples": 0, "test_examples": 8}
    return hz.fit("embedded", steps=2, batch_size=4, device="cpu", out=str(out), **{**limits, **options})


def test_a_run_of_rows_in_memory_is_that_of_the_file_it_leaves(tmp_path: Path) -> None:
    run = fitted(tmp_path / "memory", task=KEYS, data=ROWS)
    folder = tmp_path / "memory"
    assert (folder / "data/train.jsonl").is_file()
    fitted(tmp_path / "files", task=folder / "task.toml", data=folder / "data")
    weights = "adapter/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (tmp_path / "files" / weights).read_bytes()
    moved = folder.rename(tmp_path / "moved")
    resumed = hz.fit(run.setup.config, out=str(moved), resume=True, task=KEYS, data=ROWS)
    assert resumed.summary["steps"] == 2
    again = moved.rename(tmp_path / "again")
    found = config_file.resolve(None, {"resume": True, "out": str(again)})
    assert (found.data, found.task) == (str(again / "data"), str(again / "task.toml"))
    assert hz.fit(found).summary["steps"] == 2


def test_a_function_makes_prompt_and_completion(tmp_path: Path) -> None:
    def sentiment(row: dict[str, Any]) -> tuple[str, str]:
        return f"{row['text']} It was", " great" if row.pop("label") else " terrible"

    rows: list[dict[str, Any]] = [{**row, "half": "\ud83d"} for row in ROWS]
    run = fitted(tmp_path / "run", task=sentiment, data={"train": rows, "validation": rows[:4]})
    assert [row.values for row in files.rows(tmp_path / "run/data/train.jsonl")] == rows
    assert run.setup.task.name == "sentiment"
    config = run.setup.config
    again = hz.fit(config, resume=True, out=str(tmp_path / "run"), task=sentiment, data=tmp_path / "run/data")
    assert again.summary["steps"] == 2
    with pytest.raises(UserError, match="task: unknown name 'sentiment'"):
        hz.fit(config, resume=True, out=str(tmp_path / "run"))


class Frame:
    """What a DataFrame is known by."""

    columns = ("text", "label")

    def to_dict(self, orient: str) -> list[dict[str, Any]]:
        assert orient == "records"
        return [{"text": "a b", "label": np.int64(1)}]


@pytest.mark.parametrize("data", [Frame(), iter([{"text": "a b", "label": 1}])], ids=["frame", "iterator"])
def test_rows_are_read_from_what_holds_them(data: Any) -> None:
    found = list(Records(data).rows("train"))
    assert [row.values for row in found] == [{"text": "a b", "label": 1}]
    assert found[0].where == "data, train row 0"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("text", "data: got 'text', allowed: a file or folder, rows"),
        ([{"a": 1}, 3], "data, train row 1: got 3, allowed: rows"),
        ([{"a": object()}], "data, train row 0: a object cannot be put into a JSONL file"),
        ({"other": []}, "data: got a part called 'other'"),
        ({"dev": [], "validation": []}, "data: got a part called 'validation'"),
    ],
)
def test_what_is_no_row_is_named(data: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Records(data)


def test_a_function_that_fails_is_named_with_its_row() -> None:
    task = tasks.get(lambda row: row["none"])
    with pytest.raises(UserError, match=r"data, train row 0: task <lambda>: KeyError: 'none'; wanted"):
        task.load(Records([{"a": 1}]), "train")
    task = tasks.get(lambda row: ("prompt", " "))
    with pytest.raises(UserError, match=r"data, train row 0: got \('prompt', ' '\), wanted"):
        task.load(Records([{"a": 1}]), "train")


def test_half_of_a_surrogate_pair_that_a_function_makes_is_named() -> None:
    task = tasks.get(lambda row: (row["a"], " b"))
    with pytest.raises(UserError, match=r"data, train row 0: field 'prompt': .* surrogate pair"):
        task.load(Records([{"a": "\ud83d"}]), "train")


def test_labels_of_keys_are_texts() -> None:
    with pytest.raises(UserError, match=r"task: answers: expected labels that are texts, .*\[0, 1\]"):
        tasks.get({**KEYS, "answers": {0: " terrible", 1: " great"}})


def test_a_task_of_keys_reports_all_of_its_problems() -> None:
    with pytest.raises(UserError, match=r"task: prompt: missing; answers: missing; label_field: missing"):
        tasks.get({"name": "x", "kind": "choice"})


def test_a_task_object_is_taken_as_it_is() -> None:
    task = tasks.get("sst2")
    assert tasks.get(task) is task


def test_a_run_evaluates_and_writes(tmp_path: Path) -> None:
    run = fitted(tmp_path / "run", task=KEYS, data=ROWS)
    assert run.after is not None
    assert run.evaluate().loss == run.after.loss
    assert run.evaluate().predictions == run.after.predictions
    with pytest.raises(UserError, match="split: the dev part of the run is empty"):
        run.evaluate("dev")
    with pytest.raises(UserError, match="split: got 'other', allowed: train, dev, test"):
        run.evaluate("other")  # type: ignore[arg-type]
    assert run.generate("The soup was", 4) == hz.generate(run.setup.model, "The soup was", 4)


def test_a_run_is_evaluated_from_memory_and_from_its_folder(tmp_path: Path) -> None:
    run = fitted(tmp_path / "run", task=KEYS, data=ROWS)
    assert run.after is not None
    assert hz.evaluate(run)[:4] == run.after[:4]
    for folder in (tmp_path / "run", tmp_path / "run/checkpoints/step-000002"):
        assert hz.evaluate(folder, task=KEYS, data=ROWS, device="cpu").examples == len(ROWS)
    assert hz.evaluate(tmp_path / "run")[:4] == run.after[:4]
    few = hz.evaluate(str(tmp_path / "run"), split="train", examples=3)
    assert (few.examples, few.predictions) == (3, hz.evaluate(run, split="train").predictions[:3])


def test_rows_in_memory_are_evaluated_as_they_are(tmp_path: Path) -> None:
    run = fitted(tmp_path / "run", task=KEYS, data=ROWS)
    assert run.before is not None
    of_parts = {"train": ROWS, "test": ROWS[:6]}
    assert hz.evaluate(run, data=ROWS[:6])[:4] == hz.evaluate(run, data=of_parts)[:4]
    texts = [example.fields["text"] for example in run.setup.splits.test]
    tests = [row for text in texts for row in ROWS if row["text"] == text]
    assert hz.evaluate(hz.load(DEMO, device="cpu"), task=KEYS, data=tests)[:4] == run.before[:4]
    assert hz.evaluate("embedded", task=KEYS, data=ROWS, device="cpu").examples == len(ROWS)


def test_an_evaluation_refuses_what_it_cannot_take(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="split: got 'other', allowed: train, dev, test"):
        hz.evaluate("embedded", task=KEYS, data=ROWS, split="other")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="examples: got 0, allowed: a whole number of 1 or more"):
        hz.evaluate("embedded", task=KEYS, data=ROWS, examples=0)
    with pytest.raises(UserError, match="task: missing"):
        hz.evaluate("embedded", data=ROWS)
    with pytest.raises(UserError, match="data: has no dev part; the parts here are: train"):
        hz.evaluate("embedded", task=KEYS, data={"train": ROWS}, split="dev")


def test_a_model_that_transformers_has_loaded_is_tuned(tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    model = hz.load(theirs, tokenizer, folder=tmp_path / "model", bits="none", device="cpu")
    assert (model.kind, model.source) == ("causal", str(tmp_path / "model"))
    options: dict[str, Any] = {"task": KEYS, "data": ROWS, "train_examples": 16, "dev_examples": 0}
    run = hz.fit(model, steps=2, batch_size=4, out=str(tmp_path / "run"), **options)
    assert run.summary["steps"] == 2
    with pytest.raises(UserError, match=r"folder: .* is not empty"):
        hz.load(theirs, tokenizer, folder=tmp_path / "model")
    with pytest.raises(UserError, match="load: got a dict, allowed: a path"):
        hz.load({}, tokenizer)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="load: got a tokenizer or a folder beside the path"):
        hz.load(DEMO, tokenizer)


def test_a_loaded_model_says_its_kind_and_has_no_tokenizer_of_its_own() -> None:
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = hz.load(BertForSequenceClassification(config), bits="none", device="cpu")
    assert model.kind == "classifier"
    assert model.tokenizer is None
    with pytest.raises(UserError, match=r"generate: .* is a classifier model; allowed: a causal one"):
        hz.generate(model, "text")
    assert Path(model.source).is_dir()
