"""Reading official files: real ones of the shared data, and small ones in the official formats."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from hizoo_lite import tasks
from hizoo_lite.errors import UserError
from hizoo_lite.tasks.task import where
from hizoo_lite.tasks.templates import render
from tests.tasks_fixtures import data

NAMES = [
    *(
        "sst2",
        "sst5",
        "trec",
        "rte",
        "cb",
        "snli",
        "mnli",
        "boolq",
        "wsc",
        "wic",
        "multirc",
        "copa",
        "record",
    ),
    *("squad", "drop", "lm", "chat"),
]

ROWS = {
    # task, split -> examples in the shared data (../shared/data/README.md)
    ("sst2", "train"): 67349,
    ("sst2", "dev"): 872,
    ("rte", "train"): 2490,
    ("rte", "dev"): 277,
    ("cb", "train"): 250,
    ("cb", "dev"): 56,
    ("wsc", "train"): 554,
    ("wsc", "dev"): 104,
    ("boolq", "train"): 1491,
    ("snli", "train"): 1666,
    ("snli", "dev"): 200,
    ("snli", "test"): 400,
}


def write(path: Path, content: str | list[dict[str, Any]]) -> Path:
    """Write a text, or JSON Lines."""
    if not isinstance(content, str):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(content, encoding="utf-8")
    return path


def first(task: str, path: Path) -> Any:
    return tasks.get(task).load(path, "train")[0]


def prompt(task: str, example: Any) -> str:
    return render(tasks.get(task).causal, example.fields)


def masked(task: str, example: Any) -> str:
    return render(str(tasks.get(task).masked), {**example.fields, "mask": "<mask>"})


def test_built_in_names_are_those_of_the_papers_and_lm_and_chat():
    assert sorted(tasks.names()) == sorted(NAMES)


def test_unknown_task_lists_the_known_ones():
    with pytest.raises(
        UserError, match=r"unknown name 'sst3'; allowed: sst2.*chat, or a path to a \.toml file"
    ):
        tasks.get("sst3")


@pytest.mark.parametrize(("task", "split"), ROWS)
def test_shared_files_hold_as_many_examples_as_documented(task, split):
    examples = tasks.get(task).load(data(task), split)
    assert len(examples) == ROWS[task, split]
    assert {example.gold for example in examples} == set(range(len(examples[0].answers)))


def test_xquad_file_holds_1190_questions_with_answers():
    examples = tasks.get("squad").load(data("xquad"), "train")
    assert len(examples) == 1190
    assert all(example.references and example.answers[0].endswith("\n") for example in examples)


def test_sst2_prompts_equal_the_papers(tmp_path):
    example = first("sst2", write(tmp_path / "train.tsv", "sentence\tlabel\na fine film . \t1\n"))
    assert prompt("sst2", example) + example.answers[example.gold] == "a fine film . It was great"
    assert masked("sst2", example) == "a fine film . It was <mask>."
    assert where(example) == f"{tmp_path}/train.tsv:2"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.csv", '0,"so bad , it hurts"\n'),
        ("train.csv", 'text,label\n"so bad , it hurts",0\n'),
        ("train.tsv", "sentence\tlabel\nso bad , it hurts\t0\n"),
        ("train.jsonl", '{"text": "so bad , it hurts", "label": 0, "label_text": "very negative"}\n'),
        ("train.txt", "(0 (1 (2 so) (1 bad)) (2 (2 ,) (1 (2 it) (1 hurts))))\n"),
    ],
)
def test_sst5_is_read_in_all_its_formats(tmp_path, name, content):
    example = first("sst5", write(tmp_path / name, content))
    assert prompt("sst5", example) == "so bad , it hurts It was"
    assert example.answers == (" terrible", " bad", " okay", " good", " great")
    assert example.gold == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train_5500.label", "DESC:manner How did serfdom develop ?\n"),
        ("train.csv", "label,text\nDESC,How did serfdom develop ?\n"),
        ("train.jsonl", '{"text": "How did serfdom develop ?", "coarse_label": 2, "fine_label": 26}\n'),
    ],
)
def test_trec_is_read_in_all_its_formats(tmp_path, name, content):
    example = first("trec", write(tmp_path / name, content))
    assert masked("trec", example) == "<mask>: How did serfdom develop ?"
    assert example.answers[example.gold] == " Description"


def test_trec_test_file_is_found_by_its_own_name(tmp_path):
    write(tmp_path / "train_5500.label", "DESC:manner How did serfdom develop ?\n")
    (tmp_path / "TREC_10.label").write_bytes("HUM:ind Who was caf\xe9 ?\n".encode("latin-1"))
    assert tasks.get("trec").load(tmp_path, "test")[0].fields["text"] == "Who was caf\xe9 ?"


def test_rte_prompts_equal_the_papers(tmp_path):
    row = {"premise": "A man sleeps.", "hypothesis": "He rests.", "label": "not_entailment", "idx": 0}
    example = first("rte", write(tmp_path / "train.jsonl", [row]))
    assert prompt("rte", example) == 'A man sleeps.\nDoes this mean that "He rests." is true? Yes or No?\n'
    assert example.answers[example.gold] == "No"
    assert masked("rte", example) == "A man sleeps? <mask>, he rests."


def test_cb_prompt_equals_the_papers(tmp_path):
    row = {"premise": "It rains.", "hypothesis": "it is wet", "label": "neutral", "idx": 0}
    example = first("cb", write(tmp_path / "train.jsonl", [row]))
    expected = 'Suppose It rains. Can we infer that "it is wet"? Yes, No, or Maybe?\n'
    assert prompt("cb", example) == expected
    assert example.answers[example.gold] == "Maybe"


@pytest.mark.parametrize("task", ["snli", "mnli"])
def test_nli_rows_without_a_gold_label_are_dropped_and_counted(tmp_path, caplog, task):
    header = "index\tgenre\tsentence1\tsentence2\tgold_label\n"
    body = "0\tx\tA dog runs.\tAn animal moves.\tentailment\n1\tx\tA.\tB.\t-\n"
    path = write(tmp_path / "train.tsv", header + body)
    with caplog.at_level(logging.INFO):
        examples = tasks.get(task).load(path, "train")
    assert len(examples) == 1
    assert "1 of 2 rows dropped" in caplog.text
    assert masked(task, examples[0]) == "A dog runs? <mask>, an animal moves."
    assert examples[0].answers[examples[0].gold] == "Yes"


def test_mnli_dev_is_the_matched_file(tmp_path):
    header = "sentence1\tsentence2\tgold_label\n"
    for name in ("dev_matched", "dev_mismatched"):
        write(tmp_path / f"{name}.tsv", header + f"{name}\tb\tneutral\n")
    assert tasks.get("mnli").load(tmp_path, "dev")[0].fields["premise"] == "dev_matched"


def test_boolq_prompt_equals_the_papers(tmp_path):
    row = {"question": "is it so", "passage": "It is so.", "idx": 0, "label": True}
    example = first("boolq", write(tmp_path / "train.jsonl", [row]))
    assert prompt("boolq", example) + example.answers[example.gold] == "It is so. Is it so?\nYes"


def test_boolq_reads_the_original_release(tmp_path):
    row = {"question": "is it so", "title": "So", "answer": False, "passage": "It is so."}
    example = first("boolq", write(tmp_path / "train.jsonl", [row]))
    assert example.answers[example.gold] == "No"


@pytest.mark.parametrize("flat", [False, True])
def test_wsc_prompt_equals_the_papers(tmp_path, flat):
    spans = {"span1_index": 0, "span1_text": "Mark", "span2_index": 3, "span2_text": "He"}
    row = {"text": "Mark left. He ran.", "label": True} | (spans if flat else {"target": spans})
    example = first("wsc", write(tmp_path / "train.jsonl", [row]))
    asked = 'In the previous sentence, does the pronoun "he" refer to Mark? Yes or No?\n'
    assert prompt("wsc", example) + example.answers[example.gold] == f"Mark left. He ran.\n{asked}Yes"


def test_wic_prompt_equals_the_papers(tmp_path):
    row = {"word": "bank", "sentence1": "A bank.", "sentence2": "The bank.", "label": False, "start1": 2}
    example = first("wic", write(tmp_path / "train.jsonl", [row]))
    asked = (
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA bank.\nThe bank.\n'
    )
    assert prompt("wic", example) + example.answers[example.gold] == asked + "No"


def test_multirc_makes_one_example_of_each_answer_and_groups_them(tmp_path):
    answers = [{"text": "red", "idx": 0, "label": 1}, {"text": "blue", "idx": 1, "label": 0}]
    questions = [{"question": "Which?", "answers": answers}, {"question": "Why?", "answers": answers[:1]}]
    row = {"idx": 0, "passage": {"text": "A red car.", "questions": questions}}
    examples = tasks.get("multirc").load(write(tmp_path / "train.jsonl", [row]), "train")
    asked = 'A red car.\nQuestion: Which?\nI found this answer "red". Is that correct? Yes or No?\n'
    assert prompt("multirc", examples[0]) == asked
    assert [example.gold for example in examples] == [1, 0, 1]
    assert examples[0].group == examples[1].group != examples[2].group


def test_copa_prompt_and_choices_equal_the_papers(tmp_path):
    row = {"premise": "I ran.", "choice1": "I was late.", "choice2": "The bus came.", "question": "cause"}
    example = first("copa", write(tmp_path / "train.jsonl", [row | {"label": 1, "idx": 0}]))
    assert prompt("copa", example) == "I ran because"
    assert example.answers == (" I was late.", " the bus came.")
    assert example.gold == 1


def test_record_continues_the_highlights_with_the_query(tmp_path):
    text = "Ann met Bob.\n@highlight\nThey met"
    passage = {"text": text, "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}]}
    qas = [{"query": "Then @placeholder left", "answers": [{"start": 8, "end": 10, "text": "Bob"}], "idx": 0}]
    path = write(tmp_path / "train.jsonl", [{"source": "x", "passage": passage, "qas": qas, "idx": 0}])
    example = first("record", path)
    assert prompt("record", example) == "Ann met Bob.\n- They met\n-"
    assert example.answers == (" Then Ann left", " Then Bob left")
    assert (example.gold, example.references) == (1, ("Bob",))


def test_squad_prompt_equals_the_papers(tmp_path):
    answers = [{"text": "in Denver", "answer_start": 0}, {"text": "Denver", "answer_start": 3}]
    paragraph = {
        "context": "It was in Denver.",
        "qas": [{"id": "q1", "question": "Where?", "answers": answers}],
    }
    document = {"version": "1.1", "data": [{"title": "Bowl", "paragraphs": [paragraph]}]}
    example = first("squad", write(tmp_path / "train-v1.1.json", json.dumps(document)))
    assert prompt("squad", example) == "Title: Bowl\nContext: It was in Denver.\nQuestion: Where?\nAnswer:"
    assert example.answers == (" in Denver\n",)
    assert example.references == ("in Denver", "Denver")
    assert where(example).endswith("question 'q1'")


def test_drop_answers_are_numbers_spans_and_dates(tmp_path):
    empty = {"number": "", "spans": [], "date": {"day": "", "month": "", "year": ""}}
    found = [
        empty | {"number": "7"},
        empty | {"spans": ["Ann", "Bob"]},
        empty | {"date": {"day": "", "month": "May", "year": "1900"}},
    ]
    pairs = [
        {"question": "Q?", "query_id": str(i), "answer": answer, "validated_answers": [found[0]]}
        for i, answer in enumerate(found)
    ]
    document = {"history_1": {"passage": "Long ago.", "qa_pairs": pairs}}
    examples = tasks.get("drop").load(write(tmp_path / "drop_dataset_dev.json", json.dumps(document)), "dev")
    assert prompt("drop", examples[0]) == "Passage: Long ago.\nQuestion: Q?\nAnswer:"
    assert [example.references for example in examples] == [("7",), ("Ann; Bob", "7"), ("May 1900", "7")]


def test_lm_text_files_are_cut_at_line_ends_without_losing_text(tmp_path):
    lines = [f"line {number} " + "word " * 30 for number in range(60)]
    path = write(tmp_path / "train.txt", "\n".join(lines) + "\n")
    examples = tasks.get("lm").load(path, "train")
    assert len(examples) > 3
    assert all(len(example.fields["text"]) <= 2000 for example in examples)
    assert "\n".join(example.fields["text"] for example in examples).split() == "\n".join(lines).split()


def test_lm_reads_the_text_field_of_json_lines(tmp_path):
    assert first("lm", write(tmp_path / "train.jsonl", [{"text": "Once upon"}])).fields["text"] == "Once upon"


def test_chat_reads_messages_and_prompt_completion_pairs(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [{"messages": turns}, {"prompt": "Hi", "completion": "Hello"}]
    examples = tasks.get("chat").load(write(tmp_path / "train.jsonl", rows), "train")
    assert examples[0].fields["messages"] == examples[1].fields["messages"]
    assert examples[0].references == ("Hello",)
