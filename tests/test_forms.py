"""A user's own data: every form and format is recognised, read, and left as it is."""

from __future__ import annotations

import csv
import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from hizoo_lite import tasks
from hizoo_lite.config import TrainConfig
from hizoo_lite.errors import UserError
from hizoo_lite.tasks import Encoder, Records, forms, make_splits, own, tables
from hizoo_lite.tasks.conversations import UNSCORED, Conversations, Message
from hizoo_lite.tasks.files import Row
from hizoo_lite.tasks.task import LeftOut, where
from hizoo_lite.train import components
from tests.tasks_fixtures import answer_text, byte_level, sequence

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
AUTO: dict[str, Any] = {"train_examples": "auto", "dev_examples": "auto", "test_examples": "auto"}
CALL = {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}

ALPACA = [{"instruction": f"Do {n}", "input": "x" if n % 2 else "", "output": f"done {n}"} for n in range(8)]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": f"Hi {n}"}, {"from": "gpt", "value": "Hello"}]}
    for n in range(8)
]
MESSAGES = [
    {"messages": [{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": "Hello"}]}
    for n in range(8)
]
PAIRS = [{"prompt": f"Say {n}:\n", "completion": " yes\n"} for n in range(8)]
TALKS = [
    {
        "prompt": [{"role": "user", "content": f"Hi {n}"}],
        "completion": [{"role": "assistant", "content": "Hello"}],
    }
    for n in range(8)
]
REVIEWS = [{"Review Text": f"It is what it is {n}", "verdict": "good" if n % 3 else "bad"} for n in range(12)]
TEXTS = [{"id": n, "text": f"A text {n}."} for n in range(8)]

FORMS = {
    "alpaca": (ALPACA, "chat", "chat template of the model, loss on outputs"),
    "sharegpt": (SHAREGPT, "chat", "chat template of the model, loss on the assistant's turns"),
    "messages": (MESSAGES, "chat", "chat template of the model, loss on the assistant's turns"),
    "completion": (PAIRS, "completion", "texts as they are, loss on completions"),
    "classification": (REVIEWS, "choice", "text in 'Review Text', 2 labels in 'verdict' (bad, good)"),
    "text": (TEXTS, "lm", "loss on every token"),
}


def as_jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def save(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a file of the suffix's format."""
    if path.suffix in (".parquet", ".arrow", ".feather"):
        pyarrow = pytest.importorskip("pyarrow")
        table = pyarrow.Table.from_pylist(rows)
        if path.suffix == ".parquet":
            from pyarrow import parquet

            parquet.write_table(table, path)
            return path
        new = pyarrow.ipc.new_stream if path.suffix == ".arrow" else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table)
        return path
    if path.suffix in (".csv", ".tsv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, rows[0], delimiter="," if path.suffix == ".csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
        path.write_bytes(text.getvalue().encode())
        return path
    path.write_text(json.dumps(rows, indent=1) if path.suffix == ".json" else as_jsonl(rows))
    return path


def load(data: Any, form: str = "auto", **fields: str) -> tuple[forms.Understood, list[Any]]:
    found = forms.recognise(data, form, **fields)
    return found, tasks.get(found.keys).load(data, "train")


# ------------------------------------------------------------------------------------------- forms


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".feather"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_recognised_in_every_format(tmp_path, form, suffix):
    rows, kind, says = FORMS[form]
    found, examples = load(save(tmp_path / f"data{suffix}", rows))
    assert (found.form, found.keys["kind"], found.says) == (form, kind, says)
    assert len(examples) == len(rows)
    assert found.lines(8)[0] == f"{form}: 8 examples, {says}"


@pytest.mark.parametrize("form", FORMS)
def test_rows_in_memory_are_recognised_as_those_of_a_file_are(tmp_path, form):
    rows = FORMS[form][0]
    of_file, of_rows = load(save(tmp_path / "data.jsonl", rows)), load(Records(rows))
    assert of_file[0] == of_rows[0]
    plain = [
        [e._replace(fields=dict(list(e.fields.items())[1:])) for e in es] for es in (of_file[1], of_rows[1])
    ]
    assert plain[0] == plain[1]


@pytest.mark.parametrize("form", ["alpaca", "completion", "classification", "text"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_forms_of_flat_columns_are_recognised_in_tables(tmp_path, form, suffix):
    found, examples = load(save(tmp_path / f"data{suffix}", FORMS[form][0]))
    assert (found.form, len(examples)) == (form, len(FORMS[form][0]))


@pytest.mark.parametrize("form", FORMS)
def test_what_was_understood_is_a_valid_task_file(tmp_path, form):
    import tomli_w

    data = save(tmp_path / "data.jsonl", FORMS[form][0])
    found, examples = load(data)
    path = tmp_path / "task.toml"
    path.write_text(tomli_w.dumps(found.keys))
    assert tasks.get(path).load(data, "train") == examples


@pytest.mark.parametrize(
    ("row", "form", "keys"),
    [
        (
            {"instruction": "a", "context": "b", "response": "c", "category": "d"},
            "alpaca",
            {"input_field": "context"},
        ),
        (
            {"Question": "a", "Answer": "b"},
            "alpaca",
            {"instruction_field": "Question", "output_field": "Answer"},
        ),
        ({"prompt": "a", "response": "b"}, "alpaca", {"output_field": "response"}),
        ({"system": "s", "instruction": "a", "output": "b"}, "alpaca", {"system_field": "system"}),
        ({"conversation": MESSAGES[0]["messages"]}, "messages", {"messages_field": "conversation"}),
        ({"conversations": MESSAGES[0]["messages"]}, "messages", {"messages_field": "conversations"}),
        (TALKS[0], "completion", {"kind": "chat", "completion_field": "completion"}),
        ({"content": "a b c"}, "text", {"text_field": "content"}),
        ({"anything": "a b c"}, "text", {"text_field": "anything"}),
    ],
)
def test_columns_of_other_names_are_recognised(row, form, keys):
    found = forms.recognise(Records([row, row]))
    assert found.form == form
    assert keys.items() <= found.keys.items()


def test_columns_that_nothing_reads_are_told():
    rows = [{**row, "id": n, "source": "s"} for n, row in enumerate(ALPACA)]
    found = forms.recognise(Records(rows))
    assert found.lines(8)[-1] == "columns that are not used: id, source"


def test_columns_beside_plain_text_may_hold_labels():
    row = {"note": "A cold room.", "desk": "front", "day": "Monday"}
    found = forms.recognise(Records([row] * 4), text_field="note")
    assert found.form == "text"
    assert found.lines(4)[-1].endswith("desk, day (--label-field names one that holds labels)")


@pytest.mark.parametrize(
    ("rows", "form", "fields", "message"),
    [
        (
            [{"a": 1, "b": 2}],
            "auto",
            {},
            "the columns a, b are not recognised; allowed: messages: messages, a",
        ),
        (
            [{"a": 1, "b": 2}],
            "alpaca",
            {},
            "allowed: alpaca: instruction, input .optional. and output .--text-field, --label-field.; or",
        ),
        (REVIEWS, "auto", {"label_field": "x"}, "no column 'x'; the columns are: Review Text, verdict"),
        ([{"text": "a", "label": "x"}] * 4, "classification", {}, "column 'label' has 1 different labels"),
        (
            [{"one": str(n % 2), "two": str(n % 3)} for n in range(12)],
            "auto",
            {},
            "'one' and 'two' may both be the labels; say which: --label-field",
        ),
        ([], "auto", {}, "the rows holds no examples"),
    ],
)
def test_data_that_is_not_recognised_is_an_error_that_says_what_would_be(rows, form, fields, message):
    with pytest.raises(UserError, match=message):
        forms.recognise(Records(rows), form, **fields)


def test_a_form_may_be_forced():
    found, examples = load(Records(PAIRS), "alpaca")
    assert found.keys["instruction_field"] == "prompt"
    assert examples[0].fields["messages"] == (Message("user", "Say 0:"), Message("assistant", "yes"))


# ----------------------------------------------------------------------------------- conversations


def talk(row: dict[str, Any], **keys: str) -> Any:
    return next(iter(Conversations(keys)(Row("a.jsonl:1", row))))


def test_alpacas_input_is_behind_its_instruction():
    _, examples = load(Records(ALPACA))
    assert examples[0].fields["messages"][0].content == "Do 0"
    assert examples[1].fields["messages"] == (Message("user", "Do 1\n\nx"), Message("assistant", "done 1"))


def test_openais_roles_parts_and_tool_calls_are_kept():
    row = {
        "messages": [
            {"role": "developer", "content": "Be kind"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "a", "content": "2"},
            {"role": "assistant", "content": "Two"},
        ],
        "tools": [{"type": "function", "function": {"name": "add"}}],
    }
    example = talk(row)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert example.fields["messages"] == (
        Message("system", "Be kind"),
        Message("user", "ab"),
        Message("assistant", "", {"tool_calls": (call,)}),
        Message("tool", "2", {"tool_call_id": "a"}),
        Message("assistant", "Two"),
    )
    tokenizer = byte_level(eos=True)
    tokenizer.chat_template = CHATML
    encoded = Encoder(tokenizer, "causal", tasks.get("chat"), 400).encode(example, training=True)
    text = tokenizer.decode(sequence(encoded, 0))
    assert '<|system|>Be kind\n\nTools:\n{"type": "function", "function": {"name": "add"}}</s>' in text
    assert "<|user|><tool_response>\n2\n</tool_response></s>" in text
    learnt = answer_text(tokenizer, encoded, 0)
    assert learnt == '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call></s>\nTwo</s>\n'


def test_a_template_that_knows_tools_gets_them_as_they_are():
    tokenizer = byte_level(eos=True)
    tokenizer.chat_template = (
        "{% for t in tools %}[{{ t.name }}]{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for c in m.tool_calls %}!{{ c.function.name }}{% endfor %};{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    example = talk({"messages": turns, "tools": '[{"name": "add"}]'})
    encoded = Encoder(tokenizer, "causal", tasks.get("chat"), 99).encode(example, training=True)
    assert tokenizer.decode(sequence(encoded, 0)) == "[add]<user>a;<assistant>!add;"
    assert answer_text(tokenizer, encoded, 0) == "!add;"


def test_turns_without_weight_and_prompts_of_messages_are_not_learnt():
    turns = [("user", "a", 1), ("assistant", "b", 0), ("user", "c", 1), ("assistant", "d", 1)]
    row = {"messages": [{"role": r, "content": c, "weight": w} for r, c, w in turns]}
    parts = {"prompt": row["messages"][:3], "completion": row["messages"][3:]}
    for example in (talk(row), talk(parts, prompt_field="prompt", completion_field="completion")):
        assert UNSCORED in example.fields["messages"][1].more
        tokenizer = byte_level(eos=True)
        encoded = Encoder(tokenizer, "causal", tasks.get("chat"), 99).encode(example, training=True)
        assert answer_text(tokenizer, encoded, 0) == " d</s>\n"


def test_sharegpts_tools_and_system_are_read():
    turns = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "Two"},
    ]
    messages = talk({"c": turns, "s": "Be kind"}, messages_field="c", system_field="s").fields["messages"]
    assert [message.role for message in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2].more["tool_calls"][0]["function"]["name"] == "add"


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"from": "human", "value": "a"}], "the last message must be a non-empty assistant's"),
        (
            [{"role": "x", "content": "a"}],
            "field 'role': got 'x'; allowed: system, user, assistant, developer",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            "a part is 'image_url'; only text can be read",
        ),
        ([{"role": "assistant", "content": "a", "tool_calls": [{}]}], "expected calls with a name, got {}"),
        ([{"from": "function_call", "value": "{"}], "field 'value': not valid JSON"),
        ([{"role": "assistant", "content": "a", "weight": 0}], "no assistant's message has a weight"),
    ],
)
def test_conversations_that_cannot_be_learnt_from_say_why(turns, message):
    with pytest.raises(UserError, match=message):
        talk({"messages": turns}, messages_field="messages")


def test_prompts_and_completions_are_as_they_are():
    _, examples = load(Records(PAIRS))
    tokenizer = byte_level(eos=True)
    task = tasks.get(forms.recognise(Records(PAIRS)).keys)
    encoded = Encoder(tokenizer, "causal", task, 64).encode(examples[0], training=True)
    assert tokenizer.decode(sequence(encoded, 0)) == "Say 0:\n yes\n</s>"
    assert answer_text(tokenizer, encoded, 0) == " yes\n</s>"


# ------------------------------------------------------------------------------------------ tables


@pytest.mark.parametrize("delimiter", tables.DELIMITERS)
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252", "latin-1"]
)
def test_delimiter_and_encoding_of_a_table_are_found(tmp_path, delimiter, encoding):
    path = tmp_path / "data.csv"
    lines = [["text", "label"], *([f'Café, "très"; bon | {n}', "good" if n % 2 else "bad"] for n in range(9))]
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows(lines)
    extra = "\x8d" if encoding == "latin-1" else ""  # which cp1252 has not
    path.write_bytes((text.getvalue() + f"end{extra}{delimiter}bad\r\n").encode(encoding))
    found, examples = load(path)
    assert [example.fields["text"] for example in examples[:9]] == [line[0] for line in lines[1:]]
    said = " ".join(found.how_read)
    assert ("read as" in said) == (not encoding.startswith("utf-8"))
    assert f"read as {encoding}" in said or encoding in ("utf-8", "utf-8-sig")
    assert ("cells end at a" in said) == (delimiter not in ",\t")


@pytest.mark.parametrize(
    ("lines", "columns"),
    [
        ("text,label\nfine,1\nbad,0\n", ("text", "label")),
        ("Kommentar,Urteil\nfine,good\nbad one,bad\nok,good\nno,bad\n", ("Kommentar", "Urteil")),
        ("A fine day.,good\nA bad day.,bad\nAnother.,good\nLast.,bad\n", ("column1", "column2")),
        ("1,fine\n0,bad\n1,good\n0,no\n", ("column1", "column2")),
        ("How is it?,question\nSo it is.,answer\nIs it?,question\nYes.,answer\n", ("column1", "column2")),
        ("stars,said\n1,fine\n2,bad\n", ("stars", "said")),
    ],
)
def test_a_line_of_headings_is_told_from_data(tmp_path, lines, columns):
    path = tmp_path / "data.csv"
    path.write_text(lines)
    rows = list(own.rows(path))
    assert tuple(rows[0].values) == columns
    assert len(rows) == len(lines.splitlines()) - (columns[0] != "column1")


def test_a_table_without_headings_is_classified_and_read_again_alike(tmp_path):
    path = tmp_path / "data.tsv"
    path.write_text("".join(f"It is what it is {n}\t{'good' if n % 2 else 'bad'}\n" for n in range(9)))
    found, examples = load(path)
    assert (found.keys["text_field"], found.keys["label_field"]) == ("column1", "column2")
    assert found.keys["prompt"] == "{text}\nLabel:"
    assert "no line of headings, columns are column1, column2" in found.how_read[0]
    assert len(examples) == 9


def test_quotes_in_a_tsv_are_text_unless_they_are_around_cells(tmp_path):
    path = tmp_path / "data.tsv"
    path.write_text('text\tlabel\n"Well said\t1\nno\t0\n')
    assert next(own.rows(path)).values["text"] == '"Well said'
    path.write_text('text\tlabel\n"Well\tsaid ""so"""\t1\nno\t0\n')
    assert next(own.rows(path)).values["text"] == 'Well\tsaid "so"'


def test_labels_are_ordered_and_spelled_as_most_rows_spell_them():
    rows = [{"text": f"t {n}", "label": label} for n, label in enumerate(["10", "9", "9", "10", "2", "2"])]
    assert list(forms.recognise(Records(rows)).keys["answers"]) == ["2", "9", "10"]
    rows = [
        {"text": f"t {n}", "label": label}
        for n, label in enumerate(["Good", "good", "Good", "BAD", "bad", "bad"])
    ]
    assert forms.recognise(Records(rows)).keys["answers"] == {"bad": " bad", "Good": " Good"}


def test_two_columns_are_told_apart_by_what_repeats():
    rows = [{"what": f"thing number {n}", "which": "ab"[n % 2]} for n in range(12)]
    found = forms.recognise(Records(rows))
    assert (found.keys["text_field"], found.keys["label_field"]) == ("what", "which")
    assert found.keys["prompt"] == "{text}\nWhich:"


# ------------------------------------------------------------------------------- files and folders


def test_json_lines_may_be_called_json_and_lists_jsonl(tmp_path):
    lines, whole = tmp_path / "a.json", tmp_path / "b.jsonl"
    lines.write_text(as_jsonl(ALPACA))
    whole.write_text(json.dumps(ALPACA))
    assert len(load(lines)[1]) == len(load(whole)[1]) == 8


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_of_other_encodings_is_read(tmp_path, encoding):
    for name, text in (("a.json", json.dumps(ALPACA)), ("b.jsonl", as_jsonl(ALPACA))):
        (tmp_path / name).write_bytes(text.encode(encoding))
        assert len(load(tmp_path / name)[1]) == 8


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_that_is_not_valid_is_an_error_with_its_line(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match=rf"{name}:2: not valid JSON"):
        load(path)


def test_a_text_file_is_text_in_pieces_and_its_encoding_is_found(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(("Ça va bien. " * 20 + "\n").encode("cp1252") * 30)
    found, examples = load(path)
    assert found.form == "text"
    assert found.how_read == ("book.txt: read as cp1252",)
    assert len(examples) == 4
    assert examples[0].fields["text"].startswith("Ça va")


@pytest.mark.parametrize("names", [("train", "valid", "test"), ("training", "dev", "testing")])
def test_parts_are_files_numbered_files_or_folders(tmp_path, names):
    flat, shards, deep = (tmp_path / name for name in ("flat", "shards", "deep"))
    for part in names:
        for folder in (flat, shards / "data", deep / part):
            folder.mkdir(parents=True, exist_ok=True)
        save(flat / f"{part}.jsonl", ALPACA)
        save(deep / part / "rows.jsonl", ALPACA)
        for number in range(2):
            save(shards / "data" / f"{part}-0000{number}-of-00002.jsonl", ALPACA[4 * number : 4 * number + 4])
    for folder in (flat, shards, deep):
        task = tasks.get(forms.recognise(folder).keys)
        splits = make_splits(task, folder, exact=True, **AUTO)
        assert [len(part) for part in (splits.train, splits.dev, splits.test)] == [8, 8, 8]


def test_parquet_without_pyarrow_is_an_error_that_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"pip install 'hizoo-lite\[parquet\]'"):
        load(tmp_path / "a.parquet")


def test_damaged_parquet_is_an_error(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"a\.parquet: row 0: cannot be read"):
        load(tmp_path / "a.parquet")


def test_a_data_set_of_the_hub_is_read_by_its_name(monkeypatch):
    rows = {"train": ALPACA, "validation": ALPACA[:2], "test": ALPACA[:3]}
    library = types.SimpleNamespace(
        load_dataset=lambda path, name, split: rows[split], get_dataset_split_names=lambda path: list(rows)
    )
    monkeypatch.setitem(sys.modules, "datasets", library)
    task = tasks.get(forms.recognise("some/alpaca").keys)
    splits = make_splits(task, "some/alpaca", exact=True, **AUTO)
    assert [len(part) for part in (splits.train, splits.dev, splits.test)] == [8, 2, 3]
    assert where(splits.test[0]).startswith("some/alpaca[test]:")
    only = make_splits(task, "some/alpaca:validation", exact=True, needs_dev=False, **AUTO)
    assert (len(only.train), len(only.test)) == (1, 1)


def test_labels_of_the_hub_are_their_names(monkeypatch):
    class Table(list[dict[str, Any]]):
        features = {"text": object(), "label": types.SimpleNamespace(names=["sad", "glad"])}  # noqa: RUF012

    table = Table({"text": f"It is {n}", "label": n % 2 - (n == 8)} for n in range(9))
    library = types.SimpleNamespace(
        load_dataset=lambda path, name, split: table, get_dataset_split_names=lambda path: ["train"]
    )
    monkeypatch.setitem(sys.modules, "datasets", library)
    found = forms.recognise("some/moods", text_field="text", label_field="label")
    assert set(found.keys["answers"]) == {"sad", "glad", "-1"}
    examples = tasks.get(found.keys).load("some/moods", "train")
    assert [list(found.keys["answers"])[example.gold] for example in examples[:2]] == ["sad", "glad"]


def test_a_hub_name_without_library_or_network_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match=r"org/none is no file here, and the `datasets` library.*hizoo-lite\[hub\]"
    ):
        forms.recognise("org/none")
    with pytest.raises(UserError, match=r"data: org/none is no file here, and the `datasets` library"):
        forms.recognise("org/none:train")

    def offline(path: str, name: None = None, split: str = "") -> None:
        raise ConnectionError("offline")

    library = types.SimpleNamespace(get_dataset_split_names=offline, load_dataset=offline)
    monkeypatch.setitem(sys.modules, "datasets", library)
    for name in ("org/off", "org/off:train"):
        with pytest.raises(
            UserError,
            match=r"data: no file here is called org/off: could not read org/off from the hub \(Conn",
        ):
            forms.recognise(name)


# ---------------------------------------------------------------------------------------- left out


def test_bad_rows_are_left_out_and_listed_and_most_of_them_are_an_error(tmp_path):
    rows = [dict(row) for row in ALPACA]
    rows[2]["output"] = ""
    del rows[4]["instruction"]
    path = save(tmp_path / "data.jsonl", rows)
    task, left_out = tasks.get(forms.recognise(path).keys), []
    assert len(task.load(path, "train", left_out)) == 6
    assert left_out == [
        LeftOut(f"{path}:3", "field 'output': it is empty"),
        LeftOut(f"{path}:5", "field 'instruction': it is empty"),
    ]
    with pytest.raises(UserError, match=r"data\.jsonl:3: field 'output': it is empty"):
        task.load(path, "train")
    save(path, [{"instruction": "a", "output": "b"}, *({"instruction": "a", "output": ""} for _ in range(2))])
    with pytest.raises(UserError, match="2 of 3 examples cannot be used; the first:"):
        task.load(path, "train", [])


def test_rows_without_a_label_or_a_text_are_left_out():
    rows = [*REVIEWS, {"Review Text": "x", "verdict": ""}, {"Review Text": "y", "verdict": None}]
    rows += [{"Review Text": " ", "verdict": "good"}]
    left_out: list[LeftOut] = []
    data = Records(rows)
    assert len(tasks.get(forms.recognise(data).keys).load(data, "train", left_out)) == 12
    whys = [one.why for one in left_out]
    assert whys[0] == "field 'verdict': it is empty, no label"
    assert whys[1].startswith("field 'verdict' is missing")
    assert whys[2] == "the text is empty"


def test_what_is_too_long_is_left_out_cut_or_divided_and_told():
    tokenizer = byte_level(eos=True)

    def usable(rows: list[dict[str, Any]], length: int, **options: bool) -> Any:
        data = Records(rows)
        task = tasks.get(forms.recognise(data).keys)
        encoder = Encoder(tokenizer, "causal", task, length)
        examples = task.load(data, "train")
        return tasks.usable(encoder, examples, training=True, **{"strict": False, **options}), encoder

    long = [*PAIRS, {"prompt": "Say " + "x" * 80, "completion": "yes"}]
    found, encoder = usable(long, 40)
    assert len(found.examples) == 8
    assert found.left_out[0].where == "data, train row 8"
    assert "tokens, allowed are 40" in found.left_out[0].why
    assert found.lines(encoder)[0].startswith("1 left out, the first: data, train row 8: ")
    with pytest.raises(UserError, match="data, train row 8 needs"):
        usable(long, 40, strict=True)
    found, encoder = usable([*REVIEWS, {"Review Text": "w " * 60, "verdict": "bad"}], 60)
    assert len(found.examples) == 13
    assert found.lines(encoder) == [
        "1 of 13 examples are longer than --max-length 60: the end of 'text' is cut off"
    ]
    text = "".join(f"word{n} " for n in range(40)).strip()
    found, encoder = usable([{"text": text}, {"text": "short one"}], 64)
    pieces = [example.fields["text"] for example in found.examples[:-1]]
    assert "".join(pieces) == text
    assert all(len(encoder.encode(e, training=True).rows[0]) < 64 for e in found.examples)
    assert where(found.examples[1]) == "data, train row 0, piece 2"
    assert found.lines(encoder)[0].startswith("1 texts are longer than --max-length 64 and are divided: ")


def rows_of(**columns: list[Any]) -> Records:
    return Records([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])


def test_labels_that_are_no_text_or_number_are_none() -> None:
    data = rows_of(text=["a", "b", "c", "d"] * 3, label=["good", "bad", float("nan"), "\ud83d"] * 3)
    assert set(forms.recognise(data, "classification").keys["answers"]) == {"good", "bad"}


def test_a_text_field_is_read_or_refused() -> None:
    data = rows_of(prompt=["a"] * 8, completion=["b"] * 8, body=["some text"] * 8)
    assert forms.recognise(data, "auto", text_field="body").form == "text"
    assert forms.recognise(data, "completion", text_field="body").keys["prompt_field"] == "body"
    with pytest.raises(UserError, match=r"--text-field: got 'body', allowed with --task auto, completion"):
        forms.recognise(data, "messages", text_field="body")
    with pytest.raises(UserError, match=r"--label-field: got 'body', allowed with --task auto, completion"):
        forms.recognise(data, "text", label_field="body")


def test_questions_and_answers_under_any_headings_are_named_by_two_flags() -> None:
    data = rows_of(
        frage=[f"Frage {n}?" for n in range(8)], antwort=[f"Antwort {n}, so ist es" for n in range(8)]
    )
    with pytest.raises(UserError, match=r"Perhaps: --task alpaca --text-field frage --label-field antwort$"):
        forms.recognise(data)
    found, examples = load(data, "alpaca", text_field="frage", label_field="antwort")
    assert found.unused == ()
    assert examples[0].fields["messages"] == (
        Message("user", "Frage 0?"),
        Message("assistant", "Antwort 0, so ist es"),
    )
    found, _ = load(data, "completion", text_field="frage", label_field="antwort")
    assert (found.keys["prompt_field"], found.keys["completion_field"]) == ("frage", "antwort")


def test_whole_sentences_that_all_differ_are_no_labels() -> None:
    answers = [f"it is a sentence of more than thirty characters, {n}" for n in range(5)]
    data = rows_of(frage=["a", "b", "c", "d", "e"], antwort=answers)
    with pytest.raises(UserError, match=r"are no classes; answers .*: --task alpaca --label-field antwort"):
        forms.recognise(data, text_field="frage", label_field="antwort")


def test_a_table_of_unknown_headings_is_told_with_its_labels() -> None:
    data = rows_of(
        Vorgang=[str(n) for n in range(8)],
        Nachricht=[f"Nachricht {n}" for n in range(8)],
        **{"Zuständige Abteilung": ["Lieferung, Versand", "Rechnung"] * 4},
    )
    with pytest.raises(UserError, match=r"Perhaps: --label-field 'Zuständige Abteilung'$"):
        forms.recognise(data)
    found = forms.recognise(data, label_field="Zuständige Abteilung")
    assert found.says.endswith("(Lieferung, Versand; Rechnung)")
    assert found.keys["prompt"] == "{text}\nZuständige Abteilung:"


def test_answers_of_unknown_headings_that_repeat_are_told_as_answers() -> None:
    data = rows_of(
        id=list(range(8)),
        customer_asks=[f"What about {n}?" for n in range(8)],
        we_reply=["We send it again at our own cost.", "Please write to the accounts team."] * 4,
    )
    told = r"Perhaps: --task alpaca --text-field customer_asks --label-field we_reply$"
    with pytest.raises(UserError, match=told):
        forms.recognise(data)
    turned = rows_of(
        id=list(range(8)),
        we_reply=["We send it again at our own cost."] * 4 + ["Write to the accounts team, please."] * 4,
        customer_asks=[f"What about {n}?" for n in range(8)],
    )
    with pytest.raises(UserError, match=told):
        forms.recognise(turned)
    both = rows_of(id=list(range(8)), mood=["calm", "angry"] * 4, side=["north", "south"] * 4)
    with pytest.raises(UserError) as said:
        forms.recognise(both)
    assert "Perhaps" not in str(said.value)


def test_targets_that_repeat_are_labels() -> None:
    data = rows_of(question=[f"q{n}" for n in range(20)], target=["pos", "neg"] * 10)
    assert forms.recognise(data, "auto").form == "classification"


def test_a_document_of_one_long_line_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "big.json"
    path.write_text(json.dumps([{"instruction": f"say {n}", "output": str(n)} for n in range(40)]))
    monkeypatch.setattr("hizoo_lite.tasks.files.MAX_LINE_BYTES", 100)
    assert forms.recognise(path, "auto").form == "alpaca"


def test_private_runs_find_no_labels_in_their_examples(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("text,label\n" + "".join(f"text {n},{'a' if n % 2 else 'b'}\n" for n in range(20)))
    config = TrainConfig(model="embedded", data=str(path), estimator="dp", curvature="none", lr=0.1)
    with pytest.raises(UserError, match="labels that are found in the examples are not private"):
        components.understood(config)
