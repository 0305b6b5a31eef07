"""Files, the hub and templates: what is tolerated, and what is an error that says where."""

from __future__ import annotations

import csv
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from hizoo_lite import tasks
from hizoo_lite.errors import UserError
from hizoo_lite.tasks import files
from hizoo_lite.tasks.task import where
from hizoo_lite.tasks.templates import fields_of, render


def write(path: Path, content: str | list[dict[str, Any]]) -> Path:
    """Write a text, or JSON Lines."""
    if not isinstance(content, str):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(content, encoding="utf-8")
    return path


def first(task: str, path: Path) -> Any:
    return tasks.get(task).load(path, "train")[0]


def test_byte_order_mark_crlf_and_blank_lines_are_tolerated(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_bytes(b"\xef\xbb\xbfsentence\tlabel\r\n\r\ngood\t1\r\n")
    assert first("sst2", path).fields["text"] == "good"


def test_only_file_of_a_folder_is_its_train_split(tmp_path):
    write(tmp_path / "reviews.tsv", "sentence\tlabel\ngood\t1\n")
    write(tmp_path / "README.txt", "about")
    assert len(tasks.get("sst2").load(tmp_path, "train")) == 1


def test_plain_split_names_come_before_others(tmp_path):
    write(tmp_path / "train.tsv", "sentence\tlabel\nplain\t1\n")
    write(tmp_path / "orig_train.tsv", "sentence\tlabel\norig\t1\n")
    assert first("sst2", tmp_path).fields["text"] == "plain"


SST2 = "sentence\tlabel\n"
BAD_FILES = [
    ("sst2", "a.tsv", SST2 + "good\t2\n", r"a\.tsv:2: field 'label': unknown label '2'; allowed: negative"),
    (
        "sst2",
        "a.tsv",
        "text_\tlabel\ngood\t1\n",
        r"a\.tsv:2: field 'sentence' or 'text' is missing.*text_, label",
    ),
    ("sst2", "a.tsv", SST2 + "good\n", r"a\.tsv:2: 1 columns, expected 2 \(sentence, label\)"),
    ("sst2", "a.tsv", SST2, r"a\.tsv holds no examples"),
    ("sst2", "a.tsv", "", r"a\.tsv holds no examples"),
    ("sst2", "a.tsv", "sen\0tence", r"a\.tsv:1: not a text file \(it has a zero byte\)"),
    ("sst2", "a.csv", 'sentence,label\n"good,1\n', r"a\.csv:\d: not valid CSV"),
    ("sst2", "a.csv", "text,label,text\na,1,b\n", r"a\.csv:1: two columns are called 'text'"),
    ("sst2", "a.tsv", "text\tlabel\tlabel\na\t1\t0\n", r"a\.tsv:1: two columns are called 'label'"),
    ("rte", "a.jsonl", '{"label": 1, "label": 0}\n', r"a\.jsonl:1: .* the key 'label' is there twice"),
    ("squad", "a.json", '{"a": {}, "a": {}}', r"a\.json: not valid JSON: the key 'a' is there twice"),
    ("sst2", "a.xml", "<a/>", r"unknown extension '\.xml'; allowed: \.tsv"),
    ("rte", "a.jsonl", '{"premise": "a",\n', r"a\.jsonl:1: not valid JSON"),
    ("rte", "a.jsonl", "[1]\n", r"a\.jsonl:1: expected a JSON object, got '\[1\]'"),
    ("rte", "a.jsonl", '{"premise": 3}\n', r"a\.jsonl:1: field 'premise': expected a text, got 3"),
    (
        "wsc",
        "a.jsonl",
        '{"text": "a", "target": 1}\n',
        r"a\.jsonl:1: field 'target': expected an object, got 1",
    ),
    (
        "multirc",
        "a.jsonl",
        '{"passage": {"questions": 1}}\n',
        r"field 'questions': expected a list of objects",
    ),
    ("squad", "a.json", "{", r"a\.json:1: not valid JSON"),
    ("squad", "a.json", "3", r"a\.json: expected a list or an object of records, got 3"),
    ("squad", "a.json", "[3]", r"a\.json: entry 0: expected a JSON object, got 3"),
    ("squad", "a.json", "[]", r"a\.json holds no examples"),
    ("trec", "a.label", "How ?\n", r"a\.label:1: expected 'CLASS:sub-class question', got 'How \?'"),
    (
        "trec",
        "a.csv",
        "label,text\n2,How ?\n",
        r"a\.csv:2: field 'label': unknown label '2'; allowed: abbr, enty",
    ),
    ("sst5", "a.txt", "not a tree\n", r"a\.txt:1: expected a tree such as"),
    ("copa", "a.jsonl", '{"question": "why"}\n', r"field 'question': got 'why'; allowed: cause, effect"),
    (
        "record",
        "a.jsonl",
        '{"passage": "a", "query": "b", "entities": ["x"], "answers": ["x"]}\n',
        r"field 'query': no @placeholder in 'b'",
    ),
    (
        "record",
        "a.jsonl",
        '{"passage": "a", "query": "@placeholder", "entities": ["x"], "answers": ["y"]}\n',
        r"field 'answers': none of \['y'\] is among the entities",
    ),
    (
        "squad",
        "a.jsonl",
        '{"title": "t", "context": "c", "question": "Why?", "answers": {"text": []}}\n',
        r"field 'answers': question 'Why\?' has no answer",
    ),
    (
        "record",
        "a.jsonl",
        '{"passage": {"text": "a", "entities": [{"start": "0", "end": 1}]}, "qas": []}\n',
        r"field 'start': expected a whole number, got '0'",
    ),
    (
        "record",
        "a.jsonl",
        '{"passage": "a", "query": "@placeholder", "entities": "x", "answers": ["y"]}\n',
        r"field 'entities': expected a list of texts, got 'x'",
    ),
    *(
        ("rte", "a.jsonl", row, rf"a\.jsonl:1: field '{field}': .* has half of a surrogate pair")
        for field, row in (
            ("premise", r'{"premise": "cut \ud83d", "hypothesis": "b", "label": 0}'),
            ("hypothesis", r'{"premise": "\ud83d\ude00", "hypothesis": "\udfff b", "label": 0}'),
        )
    ),
    (
        "chat",
        "a.jsonl",
        r'{"messages": [{"role": "user", "content": "\ud83d"}]}',
        r"a\.jsonl:1: field 'content': .* half of a surrogate pair",
    ),
    (
        "record",
        "a.jsonl",
        r'{"passage": "a", "query": "@placeholder", "entities": ["x", "\ud83d"], "answers": ["x"]}',
        r"a\.jsonl:1: field 'entities': .* half of a surrogate pair",
    ),
    ("chat", "a.jsonl", '{"messages": []}\n', r"a\.jsonl:1: field 'messages': the last message must be"),
    (
        "chat",
        "a.jsonl",
        '{"messages": [{"role": "bot", "content": "x"}]}\n',
        r"a\.jsonl:1: field 'role': got 'bot'; allowed: system, user, assistant",
    ),
]


@pytest.mark.parametrize(("task", "name", "content", "message"), BAD_FILES)
def test_bad_file_is_an_error_that_names_file_line_and_field(tmp_path, task, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        tasks.get(task).load(path, "train")


def test_columns_without_a_name_may_be_several(tmp_path):
    path = write(tmp_path / "train.csv", "sentence,label,,\ngood,1,x,y\n")
    assert first("sst2", path).fields["text"] == "good"


def test_line_ends_inside_of_a_quoted_cell_stay_as_they_are(tmp_path):
    path = tmp_path / "train.csv"
    path.write_bytes(b'sentence,label\r\n"a\r\nb\nc\r\n\r\nd",1\r\n"e",0')
    assert [row.values["sentence"] for row in files.rows(path)] == ["a\r\nb\nc\r\n\r\nd", "e"]
    assert [row.where.rsplit(":")[-1] for row in files.rows(path)] == ["6", "7"]


def test_a_cell_may_be_as_long_as_a_line(tmp_path):
    before = csv.field_size_limit()
    long = "word " * 40_000
    path = write(tmp_path / "train.csv", f'sentence,label\n"{long}",1\n')
    assert first("sst2", path).fields["text"] == long.strip()
    assert csv.field_size_limit() == before


def test_text_that_is_not_utf8_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_bytes(b"sentence\tlabel\ncaf\xe9\t1\n")
    with pytest.raises(UserError, match=r"train\.tsv:2: not utf-8 text"):
        tasks.get("sst2").load(path, "train")
    document = tmp_path / "train.json"
    document.write_bytes(b'["\xe9"]')
    with pytest.raises(UserError, match=r"train\.json: not utf-8 text"):
        tasks.get("squad").load(document, "train")


def test_line_above_the_limit_is_an_error_with_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 100)
    path = write(tmp_path / "train.tsv", SST2 + "x" * 101 + "\t1\n")
    with pytest.raises(UserError, match=r"train\.tsv:2: the line is longer than 100 bytes"):
        tasks.get("sst2").load(path, "train")


def test_missing_folder_and_missing_split_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"data: no such file or folder: .*nowhere"):
        tasks.get("sst2").load(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match=r"task sst2: .* has no dev file; expected a name with 'dev' in it"):
        tasks.get("sst2").load(tmp_path, "dev")


def test_two_files_of_one_split_are_an_error_that_lists_them(tmp_path):
    write(tmp_path / "train.tsv", SST2)
    write(tmp_path / "train.csv", "")
    with pytest.raises(UserError, match=r"several train files \(train\.csv, train\.tsv\)"):
        tasks.get("sst2").load(tmp_path, "train")


# --------------------------------------------------------------------------------------------- hub


def fake_hub(monkeypatch: pytest.MonkeyPatch, rows: Any) -> list[tuple[Any, ...]]:
    """A stand-in for the `datasets` library; returns the calls made to it."""
    calls = []

    def load_dataset(*args: Any, split: str) -> Any:
        calls.append((*args, split))
        if isinstance(rows, Exception):
            raise rows
        return rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


HUB_ROWS = {
    "sst2": {"sentence": "good", "label": 1, "idx": 0},
    "rte": {"premise": "a", "hypothesis": "b", "label": 0, "idx": 0},
    "snli": {"premise": "a", "hypothesis": "b", "label": 2},
    "boolq": {"question": "is it", "passage": "p", "label": 1, "idx": 0},
    "wsc": {"text": "t", "span1_text": "a", "span2_text": "b", "label": 0},
    "multirc": {
        "paragraph": "p",
        "question": "q",
        "answer": "a",
        "idx": {"paragraph": 0, "question": 1, "answer": 2},
        "label": 1,
    },
    "record": {"passage": "p", "query": "@placeholder", "entities": ["x"], "answers": ["x"]},
    "squad": {"title": "t", "context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [0]}},
    "drop": {"passage": "p", "question": "q", "answers_spans": {"spans": ["a"], "types": ["span"]}},
    "trec": {"text": "q ?", "coarse_label": 5, "fine_label": 40},
}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_hub_rows_are_read_in_their_flat_form(monkeypatch, name):
    calls = fake_hub(monkeypatch, [HUB_ROWS[name]])
    examples = tasks.get(name).load(None, "train")
    assert len(examples) == 1
    assert calls[0][-1] == "train"
    assert where(examples[0]).endswith("[train]:0")


def test_hub_without_the_library_is_an_error_with_the_install_hint(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="not installed; give --data, or run: pip install datasets"):
        tasks.get("sst2").load(None, "train")


def test_hub_out_of_reach_is_an_error_that_says_so(monkeypatch):
    fake_hub(monkeypatch, ConnectionError("offline"))
    with pytest.raises(
        UserError, match=r"could not read nyu-mll/glue from the hub \(ConnectionError: offline\)"
    ):
        tasks.get("sst2").load(None, "train")


def test_hub_split_without_labels_is_an_error(monkeypatch):
    fake_hub(monkeypatch, [])
    with pytest.raises(UserError, match="nyu-mll/glue has no labelled test split"):
        tasks.get("sst2").load(None, "test")


def test_task_without_a_hub_source_needs_data():
    with pytest.raises(UserError, match=r"task lm: a data file or folder is needed \(--data\)"):
        tasks.get("lm").load(None, "train")


# --------------------------------------------------------------------------------------- templates


def test_braces_in_a_field_are_kept():
    assert render("{text} It was", {"text": "a {b} c"}) == "a {b} c It was"


def test_conversions_open_lower_and_upper_a_field():
    assert (
        render("{a!o}|{a!l}|{b!u}|{c!o}", {"a": "Is it?", "b": "why", "c": "no end"})
        == "Is it|is it?|Why|no end"
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{a.b}", "a field is a plain name"),
        ("{}", "a field is a plain name"),
        ("{a:>10}", "format specifications are not allowed"),
        ("{a!r}", "conversion is none of"),
        ("{a", "expected '}'"),
    ],
)
def test_malformed_template_is_an_error(template, message):
    with pytest.raises(ValueError, match=message):
        fields_of(template)


@pytest.mark.parametrize("name", tasks.names())
def test_cut_field_is_part_of_every_prompt_of_the_task(name):
    task = tasks.get(name)
    templates = [template for template in (task.causal, task.masked) if template]
    assert all(task.cut in fields_of(template) for template in templates)
    assert task.chat or templates
