"""Objectives of (prompt, text, row): what they are given with which data, resuming, and what is refused."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import hizoo_lite as hz
from hizoo_lite.batch import Example
from hizoo_lite.cli import app
from hizoo_lite.config import TrainConfig
from hizoo_lite.errors import UserError
from hizoo_lite.objectives import Function
from hizoo_lite.run import Run, fit
from hizoo_lite.tasks import Encoder, Records
from hizoo_lite.tasks.task import ROW
from hizoo_lite.train import config_file, planning
from tests.run_fixtures import short_run, write_classes, write_texts
from tests.tasks_fixtures import word_piece

COUNT = 24
LABELLED = [
    {
        "review": f"The {n} soups were warm.",
        "verdict": "very_good" if n % 2 else "bad",
        "id": n,
        "by": {"a": [n]},
    }
    for n in range(COUNT)
]
PAIRS = [{"prompt": f"Say {n}.", "completion": f" {n}", "id": n} for n in range(COUNT)]
ALPACA = [{"instruction": "Say it.", "input": str(n), "output": "yes", "id": n} for n in range(COUNT)]
CHAT: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"Say {n}."},
            {"role": "assistant", "content": "yes"},
        ],
        "id": n,
    }
    for n in range(COUNT)
]
#: What a run of two steps with one pair of points asks for: two examples, each at both points.
ASKED = 2 * 2 * 2


def prompt_of(row: dict[str, Any]) -> str:
    if "review" in row:
        return f"{row['review']}\nVerdict:"
    if "messages" in row:
        return f"System: Be brief.\nUser: Say {row['id']}.\nAssistant:"
    return f"User: Say it.\n\n{row['input']}\nAssistant:" if "input" in row else str(row["prompt"])


class Seen:
    """An objective that remembers what it was given."""

    def __init__(self) -> None:
        self.given: list[tuple[str, str, dict[str, Any]]] = []

    def __call__(self, prompt: str, text: str, row: dict[str, Any]) -> float:
        self.given.append((prompt, text, dict(row)))
        row.clear()  # which must change nothing
        return len(text) / 100


def run_of(folder: Path, **changes: Any) -> Run:
    chosen: dict[str, Any] = {
        "steps": 2,
        "batch_size": 2,
        "directions": 1,
        "max_length": 64,
        "dev_examples": 0,
        "test_examples": 2,
        "eval_batch_size": 2,
        "targets": "all-linear",
        "blocks": "all",
        "mu": 1.0,
        "lr_schedule": "constant",
        "device": "cpu",
        "out": str(folder / "run"),
    }
    return hz.fit("embedded", **{**chosen, **changes})


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def same_state(one: Path, other: Path) -> bool:
    names = ("journal.bin", "adapter/adapter_model.safetensors")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


# ------------------------------------------------------------------------------- what it is given


@pytest.mark.parametrize("in_file", [False, True], ids=["rows", "file"])
@pytest.mark.parametrize(
    "rows", [LABELLED, PAIRS, ALPACA, CHAT], ids=["labelled", "completion", "alpaca", "chat"]
)
def test_it_is_given_prompt_text_and_the_whole_row(
    rows: list[dict[str, Any]], in_file: bool, tmp_path: Path
) -> None:
    seen = Seen()
    run_of(tmp_path, data=write(tmp_path / "own.jsonl", rows) if in_file else rows, objective=seen)
    assert len(seen.given) == ASKED
    for prompt, text, row in seen.given:
        assert row == rows[row["id"]]
        assert prompt == prompt_of(row)
        assert type(text) is str
    if rows is LABELLED:
        assert {text for _, text, _ in seen.given} <= {"bad", "very good"}  # as the answer is spelled
    else:
        assert len({text for _, text, _ in seen.given}) > 1


def test_a_table_gives_every_column_as_text(tmp_path: Path) -> None:
    table = tmp_path / "own.csv"
    lines = [f'"{row["review"]}",{row["verdict"]},{row["id"]}, x\n' for row in LABELLED]
    table.write_text("review,verdict,id,note\n" + "".join(lines))
    (tmp_path / "rewards.py").write_text(
        "def right(prompt, text, row):\n"
        "    assert list(row) == ['review', 'verdict', 'id', 'note'], row\n"
        "    assert prompt == row['review'] + '\\nVerdict:' and row['id'].isdigit()\n"
        "    return text.replace(' ', '_') == row['verdict']\n"
    )
    call = ["train", "--model", "embedded", "--data", str(table), "--device", "cpu", "--steps", "2"]
    call += [
        "--batch-size",
        "2",
        "--objective",
        f"{tmp_path / 'rewards.py'}:right",
        "--out",
        str(tmp_path / "run"),
    ]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.stderr
    assert "columns that only the objective is given: id, note" in done.stdout + done.stderr


class Frame:
    """What a DataFrame is known by."""

    columns = tuple(LABELLED[0])

    def to_dict(self, orient: str) -> list[dict[str, Any]]:
        assert orient == "records"
        return LABELLED


def test_rows_of_a_frame_and_of_a_task_that_is_a_function_are_whole(tmp_path: Path) -> None:
    def task(row: dict[str, Any]) -> tuple[str, str]:
        return f"{row.pop('review')} It was", f" {row.pop('verdict')}"

    seen = Seen()
    run_of(tmp_path, data=Frame(), task=task, objective=seen)
    assert len(seen.given) == ASKED
    assert all(row == LABELLED[row["id"]] for _, _, row in seen.given)
    assert all(prompt == f"{row['review']} It was" for prompt, _, row in seen.given)


def test_the_chosen_label_is_the_one_that_scores_highest(tmp_path: Path) -> None:
    """The same run by accuracy has the same losses."""
    words = {"bad": "bad", "very_good": "very good"}

    def right(prompt: str, text: str, row: dict[str, Any]) -> float:
        return float(text == words[row["verdict"]])

    run_of(tmp_path / "a", data=LABELLED, objective=right)
    run_of(tmp_path / "b", data=LABELLED, objective="accuracy")
    assert (tmp_path / "a/run/journal.bin").read_bytes() == (tmp_path / "b/run/journal.bin").read_bytes()


def test_a_classifiers_text_is_its_prompt(tmp_path: Path) -> None:
    seen = Seen()
    settings = short_run(tmp_path, **write_classes(tmp_path, 3), kind="classifier", steps=1, batch_size=2)
    fit(TrainConfig(**{**settings, "model": "embedded", "mu": 1.0}), objective=seen)
    assert all(prompt == row["first"] and text in "012" for prompt, text, row in seen.given)
    assert all(set(row) == {"first", "label"} for *_, row in seen.given)


def test_a_masked_prompt_has_its_mask_and_what_is_cut_is_not_in_it() -> None:
    example = Example({"text": "the film was " * 30}, (" terrible", " great"), 1)
    encoder = Encoder(word_piece(), "masked", hz.tasks.get("sst2"), 20)
    prompt = encoder.prompt_text(example)
    assert prompt.count("[MASK]") == 1
    ids = word_piece()(prompt)["input_ids"]
    assert [ids] == encoder.encode(example, training=True).rows
    tokens = hz.tasks.get({"name": "own", "kind": "tokens", "answers": {"a": "a", "b": "b"}})
    known = Encoder(word_piece(), "classifier", tokens, 20)
    assert known.prompt_text(Example({"input_ids": ids}, ("a", "b"), 0)) == word_piece().decode(ids)


def test_several_tasks_have_their_own_rows(tmp_path: Path) -> None:
    task, data = write_texts(tmp_path / "one")
    other = tmp_path / "other.toml"
    other.write_text(task.read_text().replace('"verdicts"', '"more"').replace("It was", "It is"))
    seen = Seen()
    settings = {"task": (str(task), str(other)), "data": (str(data), str(data)), "steps": 1, "mu": 1.0}
    fit(TrainConfig(**short_run(tmp_path, **settings)), objective=seen)
    assert {prompt.removeprefix(row["text"]) for prompt, _, row in seen.given} == {" It was", " It is"}


def test_only_such_an_objective_keeps_rows(tmp_path: Path) -> None:
    def longest(example: Example, text: str) -> float:
        return len(text)

    kept = run_of(tmp_path / "a", data=PAIRS, objective=Seen())
    plain = run_of(tmp_path / "b", data=PAIRS, objective=longest)
    assert all(ROW in example.fields for example in kept.setup.splits.train)
    assert not any(ROW in example.fields for example in plain.setup.splits.train)
    entries = [json.loads((run.folder / "run.json").read_text()) for run in (kept, plain)]
    assert entries[0]["train"] == entries[1]["train"]
    assert ("rows" in entries[0], "rows" in entries[1]) == (True, False)


# ------------------------------------------------------------------------------- conversations


def test_f1_of_a_conversation_is_of_its_last_turn(tmp_path: Path) -> None:
    rows = [
        {
            **row,
            "messages": [
                *row["messages"],
                {"role": "user", "content": "Again."},
                {"role": "assistant", "content": "no"},
            ],
        }
        for row in CHAT
    ]
    run = run_of(tmp_path, data=rows, objective="f1")
    assert all(example.references == ("no",) for example in run.setup.splits.train)
    assert run.summary["skipped_steps"] == 0
    with pytest.raises(
        UserError, match=r"accuracy is of scores .* has a written answer; allowed: loss, f1, FILE"
    ):
        run_of(tmp_path / "other", data=rows, objective="accuracy")


def test_a_prompt_that_leaves_no_room_for_an_answer_is_left_out_before_training(tmp_path: Path) -> None:
    rows = [dict(row) for row in PAIRS]
    for row in rows[::4]:
        row["prompt"] = "Say it all. " * 7  # fits with its completion, and not with what may be written
    seen = Seen()
    run = run_of(tmp_path, data=rows, objective=seen, steps=1)
    assert not any(example.fields["prompt"].startswith("Say it") for example in run.setup.splits.train)
    listed = [json.loads(line)["why"] for line in (run.folder / "left_out.jsonl").read_text().splitlines()]
    assert listed
    assert all("of --max-length 64, 32 are for the answer" in why for why in listed)
    whole = run_of(tmp_path / "loss", data=rows, objective="loss", mu="auto", steps=1)
    assert not (whole.folder / "left_out.jsonl").exists()
    with pytest.raises(UserError, match=r"max_length: .*own.jsonl:\d+ needs"):
        run_of(
            tmp_path / "strict",
            data=write(tmp_path / "own.jsonl", rows),
            objective=seen,
            strict=True,
            test_examples=2,
        )


def test_answers_that_are_written_in_steps_are_counted_for_the_plan(tmp_path: Path) -> None:
    made = run_of(tmp_path, data=CHAT, objective="f1").setup
    workload = planning.workload(made.encoder, made.splits, made.config)
    assert workload.written == 0  # its evaluations have a loss alone
    assert workload.length is not None
    assert workload.answered == min(64, workload.length + 32)


def test_streamed_is_resident_to_the_bit(tmp_path: Path) -> None:
    from hizoo_lite.export.quantize import Quantization

    demo = Path(hz.__file__).parent / "demo"
    Quantization(demo, tmp_path / "stored", kind="causal", bits="nf4", double_quant=False).run()
    found = []
    for residency in ("resident", "disk"):
        seen = Seen()
        model = hz.load(str(tmp_path / "stored"), device="cpu", residency=residency)  # type: ignore[arg-type]
        changes = {"steps": 2, "batch_size": 2, "max_length": 64, "directions": 1, "test_examples": 2}
        changes |= {"targets": "all-linear", "blocks": "all", "mu": 1.0, "dev_examples": 0}
        run = hz.fit(model, data=CHAT, objective=seen, out=str(tmp_path / residency), **changes)
        assert run.summary["residency"] == residency
        found.append(seen.given)
    assert found[0] == found[1]
    assert same_state(tmp_path / "resident", tmp_path / "disk")


# ------------------------------------------------------------------------------------- resuming


def by_id(prompt: str, text: str, row: dict[str, Any]) -> float:
    return row["id"] * len(text) / 1000


@pytest.mark.parametrize("rows", [LABELLED, CHAT], ids=["labelled", "chat"])
def test_a_resumed_run_is_an_undisturbed_one_to_the_bit(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    run_of(tmp_path / "whole", data=rows, objective=by_id, steps=4)
    run_of(tmp_path / "parts", data=rows, objective=by_id)
    folder = tmp_path / "parts/run"
    found = config_file.resolve(None, {"resume": True, "out": str(folder), "steps": 4})
    assert found.data == str(folder / "data")  # where all columns are
    assert fit(found, objective=by_id).summary["steps"] == 4
    assert same_state(tmp_path / "whole/run", folder)


def test_other_rows_are_refused_on_resume_if_the_objective_is_given_them(tmp_path: Path) -> None:
    data = write(tmp_path / "own.jsonl", LABELLED)
    run_of(tmp_path, data=data, objective=by_id)
    write(data, [{**row, "id": row["id"] + 1} for row in LABELLED])
    with pytest.raises(UserError, match="columns of the training examples that only the objective is given"):
        run_of(tmp_path, data=data, objective=by_id, steps=3, resume=True)
    write(data, LABELLED)
    assert run_of(tmp_path, data=data, objective=by_id, steps=3, resume=True).summary["steps"] == 3


# ------------------------------------------------------------------------------------- refusals


def of_one(text: str) -> float: ...


def of_four(prompt: str, text: str, row: Any, more: Any) -> float: ...


def by_name(prompt: str, text: str, *, row: Any) -> float: ...


@pytest.mark.parametrize("function", [of_one, of_four, by_name])
def test_a_function_of_other_parameters_is_refused_before_anything_is_written(
    function: Callable[..., float], tmp_path: Path
) -> None:
    message = (
        rf"{function.__name__}: got a function of \(.*allowed: one of \(prompt, text, row\), or of \(example"
    )
    with pytest.raises(UserError, match=message):
        run_of(tmp_path, data=CHAT, objective=function)
    (tmp_path / "rewards.py").write_text("def of_one(text):\n    return 1\n")
    with pytest.raises(UserError, match=r"rewards.py:of_one: got a function of \(text\), allowed"):
        run_of(tmp_path, data=CHAT, objective=f"{tmp_path}/rewards.py:of_one")
    assert not (tmp_path / "run").exists()


class Method:
    def judge(self, prompt: str, text: str, row: Any) -> float: ...


@pytest.mark.parametrize(
    ("function", "of_row"),
    [
        (by_id, True),
        (Seen(), True),
        (Method().judge, True),
        (functools.partial(of_four, more=1), True),
        (lambda prompt, text, row=None: 0.0, True),
        (lambda example, text: 0.0, False),
        (lambda example, text, scale=1.0: 0.0, False),
        (lambda *given: 0.0, False),
        (max, False),
    ],
)
def test_the_form_is_told_by_the_parameters(function: Callable[..., float], of_row: bool) -> None:
    assert Function.of(function).of_row is of_row


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("row['absent']", "KeyError: 'absent'; wanted: a function of .prompt, text, row. to a number"),
        ("None", "it returned None, allowed: a finite number"),
        ("'much'", "it returned 'much', allowed"),
        ("float('nan')", "it returned nan, allowed"),
        ("-float('inf')", "it returned -inf, allowed"),
        ("[1.0]", r"it returned \[1.0\], allowed"),
    ],
)
def test_a_function_that_fails_is_named_with_its_row(body: str, message: str, tmp_path: Path) -> None:
    rewards = tmp_path / "rewards.py"
    rewards.write_text(f"def judge(prompt, text, row):\n    return {body}\n")
    data = write(tmp_path / "own.jsonl", LABELLED)
    call = ["train", "--model", "embedded", "--data", str(data), "--device", "cpu", "--steps", "2"]
    call += ["--objective", f"{rewards}:judge", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 2
    assert f"{rewards}:judge: {data}:" in done.stderr.replace("\n", "")
    with pytest.raises(UserError, match=rf"rewards.py:judge: data, train row \d+: {message}"):
        run_of(tmp_path / "rows", data=LABELLED, objective=f"{rewards}:judge")
    with pytest.raises(UserError, match=rf"rewards.py:judge: .*own.jsonl:\d+: {message}"):
        run_of(tmp_path / "file", data=data, objective=f"{rewards}:judge")


def test_plain_text_has_no_answer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="but task text has neither; allowed: loss"):
        run_of(tmp_path, data=[{"text": f"It is {n}."} for n in range(COUNT)], objective=by_id)


def test_a_row_is_what_json_holds(tmp_path: Path) -> None:
    rows = Records([{"prompt": "a", "completion": "b", "pair": (1, math.pi)}])
    [example] = (
        hz.tasks.get({"name": "own", "kind": "lm", "prompt": "{prompt}"}).with_rows().load(rows, "train")
    )
    assert example.fields[ROW] == {"prompt": "a", "completion": "b", "pair": [1, math.pi]}
