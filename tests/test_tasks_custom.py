"""Custom tasks: TOML files of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hizoo_lite import tasks
from hizoo_lite.errors import UserError
from hizoo_lite.tasks.files import Row
from hizoo_lite.tasks.templates import render
from tests.tasks_fixtures import byte_level, word_piece

CHOICE = """
name = "demo-sentiment"
kind = "choice"
prompt = "{sentence} It was"
label_field = "label"
metric = "accuracy"
[answers]
negative = " terrible"
positive = " great"
"""


def toml(folder: Path, text: str) -> Path:
    path = folder / "task.toml"
    path.write_text(text, encoding="utf-8")
    return path


def with_line(line: str, without: str = "") -> str:
    """The choice task with one more line at its top, and the line that starts with `without` left out."""
    kept = [old for old in CHOICE.strip().splitlines() if not without or not old.startswith(without)]
    return "\n".join([line, *kept])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.jsonl", '{"sentence": "fine", "label": "positive", "id": 1}\n'),
        ("train.csv", "sentence,label\nfine,positive\n"),
        ("train.tsv", "sentence\tlabel\nfine\tPositive\n"),
    ],
)
def test_choice_task_reads_json_lines_csv_and_tsv(tmp_path, name, content):
    task = tasks.get(toml(tmp_path, CHOICE))
    (tmp_path / name).write_text(content)
    (example,) = task.load(tmp_path, "train")
    assert (task.name, task.kind, task.metric, task.num_labels) == ("demo-sentiment", "choice", "accuracy", 2)
    assert render(task.causal, example.fields) + example.answers[example.gold] == "fine It was great"
    assert task.cut == "sentence"


def test_choice_task_encodes_for_all_three_kinds_of_model(tmp_path):
    task = tasks.get(toml(tmp_path, with_line('masked_prompt = "{sentence} It was {mask}."')))
    path = tmp_path / "train.csv"
    path.write_text("sentence,label\nthe film,negative\n")
    (example,) = task.load(path, "train")
    causal = tasks.Encoder(byte_level(), "causal", task, 64).encode(example, training=True)
    masked = tasks.Encoder(word_piece(), "masked", task, 64).encode(example, training=True)
    classified = tasks.Encoder(word_piece(), "classifier", task, 64).encode(example, training=True)
    assert (causal.slots, masked.slots, classified.gold) == (2, 2, 0)
    assert classified.rows == [word_piece()("the film")["input_ids"]]


@pytest.mark.parametrize(("value", "gold"), [("true", 1), ("false", 0)])
def test_boolean_labels_are_looked_up_in_lower_case(tmp_path, value, gold):
    text = CHOICE.replace("negative =", "false =").replace("positive =", "true =")
    path = tmp_path / "train.jsonl"
    path.write_text(f'{{"sentence": "fine", "label": {value}}}\n')
    (example,) = tasks.get(toml(tmp_path, text)).load(path, "train")
    assert example.gold == gold


def test_unknown_label_lists_the_tasks_own(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("sentence,label\nfine,neutral\n")
    with pytest.raises(
        UserError, match=r"train\.csv:2: field 'label': unknown label 'neutral'; allowed: negative"
    ):
        tasks.get(toml(tmp_path, CHOICE)).load(path, "train")


def test_metric_f1_of_a_choice_task_is_the_macro_f1(tmp_path):
    task = tasks.get(toml(tmp_path, CHOICE.replace('"accuracy"', '"f1"')))
    path = tmp_path / "train.csv"
    path.write_text("sentence,label\na,negative\nb,positive\nc,positive\n")
    found = task.score(task.load(path, "train"), [0, 1, 0])
    assert found.name == "f1"
    assert found.value == pytest.approx(2 / 3)  # both labels: 2 TP / (2 TP + 1)


def test_completion_task_renders_its_answer(tmp_path):
    text = 'name = "qa"\nkind = "completion"\nmetric = "exact_match"\n'
    text += 'prompt = "Q: {q}\\nA:"\nanswer = " {a}\\n"\n'
    task = tasks.get(toml(tmp_path, text))
    path = tmp_path / "train.jsonl"
    path.write_text('{"q": "2 + 2", "a": 4}\n')
    (example,) = task.load(path, "train")
    assert (example.answers, example.references) == ((" 4\n",), ("4",))
    assert (task.metric, task.stop, task.cut) == ("exact_match", "\n", "q")
    assert task.score([example], [" 4\nQ: next"]).value == 1.0


def test_lm_task_renders_its_prompt_and_has_a_loss_only(tmp_path):
    task = tasks.get(
        toml(tmp_path, 'name = "poems"\nkind = "lm"\nprompt = "{title}\\n{body}"\ncut = "body"\n')
    )
    path = tmp_path / "train.jsonl"
    path.write_text('{"title": "T", "body": "B b"}\n')
    (example,) = task.load(path, "train")
    encoded = tasks.Encoder(byte_level(), "causal", task, 64).encode(example, training=True)
    assert (task.kind, task.metric) == ("lm", "loss")
    assert byte_level().decode([*encoded.rows[0], encoded.tokens[-1][1]]) == "T\nB b"


def test_chat_task_reads_conversations(tmp_path):
    task = tasks.get(toml(tmp_path, 'name = "support"\nkind = "chat"\n'))
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "Hi", "response": "Hello"}\n')
    assert task.chat
    assert task.load(path, "train")[0].references == ("Hello",)


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", '["a"]', '{"a": 1}'])
def test_a_value_that_is_no_text_and_no_number_is_an_error_with_its_field(tmp_path, value):
    task = tasks.get(toml(tmp_path, CHOICE))
    path = tmp_path / "train.jsonl"
    path.write_text(f'{{"sentence": {value}, "label": "positive"}}\n')
    with pytest.raises(UserError, match=r"train\.jsonl:1: field 'sentence': expected a text, a finite"):
        task.load(path, "train")
    path.write_text('{"sentence": 3.5, "label": "positive"}\n{"sentence": true, "label": "positive"}\n')
    assert [example.fields["sentence"] for example in task.load(path, "train")] == ["3.5", "True"]


def test_empty_answer_is_an_error_with_its_line(tmp_path):
    task = tasks.get(toml(tmp_path, 'name = "qa"\nkind = "completion"\nprompt = "{q}"\nanswer = " {a}"\n'))
    path = tmp_path / "train.csv"
    path.write_text("q,a\nwho,\n")
    with pytest.raises(UserError, match=r"train\.csv:2: the answer is empty"):
        task.load(path, "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "a"\nkind = ["choice"]\n', r"kind: got \['choice'\]; allowed: choice"),
        ('name = "a"\nkind = "pick"\n', "kind: got 'pick'; allowed: choice, completion, lm, chat"),
        (with_line("promt = 'x'"), r"promt: unknown key for kind 'choice'; allowed: name, kind, prompt"),
        (with_line("", without="prompt"), "prompt: missing"),
        (with_line("cut = 3"), "cut: expected a non-empty text, got 3"),
        (with_line('cut = "title"'), r"cut: got 'title'; allowed: the fields of the prompt \(sentence\)"),
        (with_line('prompt = "{a.b}"', without="prompt"), "prompt: field {a.b}: a field is a plain name"),
        (with_line('prompt = "no field"', without="prompt"), "prompt: no {field} in 'no field'"),
        (with_line('prompt = "{a} "', without="prompt"), "prompt: ends in a space"),
        (with_line('masked_prompt = "{sentence}"'), "masked_prompt: expected {mask} once"),
        (with_line('metric = "bleu"', without="metric"), "metric: got 'bleu'; allowed: accuracy, f1"),
        (CHOICE.replace(" great", " "), "answers.positive: expected a non-empty text, got ' '"),
        (CHOICE.replace(" great", " terrible"), "answers: two labels have the same text"),
        (CHOICE.replace("positive", "NEGATIVE"), "answers: two labels differ in upper and lower case only"),
        (with_line("", without="positive"), "answers: expected a table of at least two labels"),
        ("name = ", "not valid TOML"),
    ],
)
def test_bad_task_file_is_an_error_that_names_the_key(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        tasks.get(toml(tmp_path, text))


def test_every_problem_of_a_task_file_is_reported_at_once(tmp_path):
    with pytest.raises(UserError, match=r"answr: unknown key.*; prompt: missing; answer: missing"):
        tasks.get(toml(tmp_path, 'name = "a"\nkind = "completion"\nanswr = "x"\n'))


def test_missing_task_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"task: cannot read .*none\.toml \(No such file or directory\)"):
        tasks.get(tmp_path / "none.toml")


TOKENS = {"name": "tokens", "kind": "tokens", "answers": {"no": "no", "yes": "yes"}}


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (
            {"input_ids": "it", "labels": 0},
            "'input_ids': expected a list of whole numbers of 0 or more",
        ),
        ({"input_ids": [1, 2], "labels": 2}, "'labels': expected a whole number from 0 to 1"),
        ({"input_ids": [1, 2], "labels": 0.5}, "'labels': expected a whole number from 0 to 1"),
        ({"input_ids": [1, 2], "attention_mask": [1], "labels": 1}, "got 2 numbers for 1 tokens"),
    ],
)
def test_a_bad_row_of_tokens_is_named(row: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=f"row 0: .*{match}"):
        list(tasks.get(TOKENS).build(Row("row 0", row)))


def test_padding_is_left_out_and_labels_say_which_kind_of_model() -> None:
    row = Row("row 0", {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0], "labels": 1})
    [example] = tasks.get(TOKENS).build(row)
    assert (example.fields["input_ids"], example.gold) == ([5, 6], 1)
    for kind, keys in (("causal", TOKENS), ("classifier", {"name": "tokens", "kind": "tokens"})):
        with pytest.raises(UserError, match=f"but the model is {kind}"):
            tasks.Encoder(byte_level(), kind, tasks.get(keys), 8)
