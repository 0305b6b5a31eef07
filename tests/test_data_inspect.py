"""`hizoo-lite data inspect`, and runs on a user's own data: what is said is what is done."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import hizoo_lite as hz
from hizoo_lite.cli import app
from hizoo_lite.config import DEMO
from hizoo_lite.errors import UserError
from hizoo_lite.train.resolved import Resolved

REVIEWS = [("The day was fine.", "good"), ("The soup was cold.", "bad")]
RUN: dict[str, Any] = {"model": "embedded", "batch_size": 4, "max_length": 32, "device": "cpu", "rank": 2}


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def reviews(folder: Path, count: int = 40) -> Path:
    path = folder / "reviews.csv"
    lines = [f"{REVIEWS[n % 2][0]} {n};{REVIEWS[n % 2][1]}" for n in range(count)]
    path.write_text("\n".join(["review;verdict", *lines, "No label;"]) + "\n")
    return path


def alpaca(folder: Path) -> Path:
    path = folder / "alpaca.json"
    rows: list[dict[str, str]] = [{"instruction": f"Say {n}", "output": f"I say {n}."} for n in range(20)]
    rows.append({"instruction": "Say much", "output": "word " * 99})
    path.write_text(json.dumps([*rows, rows[0]]))
    return path


def test_inspect_says_what_a_run_would_do(tmp_path):
    found = json.loads(call("data", "inspect", str(reviews(tmp_path)), "--json").stdout)
    assert found["form"] == "classification"
    assert found["parts"] == {"train": 36, "dev": 0, "test": 4}
    assert found["labels"] == {"bad": 20, "good": 20}
    assert found["columns"] == ["review", "verdict"]
    assert found["left_out"]["count"] == 1
    assert found["left_out"]["first"][0]["where"].endswith("reviews.csv:42")
    assert found["advice"][-1].startswith(
        "4 test examples: an accuracy of so few is uncertain by ± 50 points"
    )
    assert len(found["examples"]) == 5
    assert found["lengths"]["unit"] == "characters"
    word = "good" if "fine" in found["examples"][0]["text"] else "bad"
    assert found["examples"][0]["text"].endswith(f"\nVerdict:» {word}«")


@pytest.mark.parametrize(("count", "said"), [(40, True), (200, False)])
def test_a_run_and_a_plan_begin_with_how_little_few_examples_say(
    tmp_path: Path, count: int, said: bool
) -> None:
    told: list[str] = []

    class Told:
        def on_message(self, args: Any, state: Any, control: Any, *, text: str, **more: Any) -> None:
            told.append(text)

    data, short = str(reviews(tmp_path, count)), "4 test examples: an accuracy of so few is uncertain by"
    hz.fit(**RUN, data=data, steps=1, out=str(tmp_path / "run"), callbacks=[Told()])
    assert any(line.startswith(short) for line in told) is said
    assert (short in call("plan", "--model", "embedded", "--data", data).stderr) is said


def test_inspect_with_a_model_shows_tokens_what_is_learnt_and_a_length_that_fits(tmp_path):
    done = call(
        "data", "inspect", str(alpaca(tmp_path)), "--model", "embedded", "--max-length", "48", "--json"
    )
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["lengths"]["unit"] == "tokens"
    assert found["lengths"]["min"] <= found["lengths"]["median"] <= found["lengths"]["p95"] < 48
    assert found["lengths"]["max"] > 99
    assert found["duplicates"] == 1
    [left_out] = found["left_out"]["first"]
    assert left_out["where"].endswith("alpaca.json: entry 20")
    assert "needs" in left_out["why"]
    assert "tokens for its last exchange, allowed are 48" in left_out["why"]
    assert found["examples"][0]["text"].count("»") == 1
    assert "--max-length 48; --max-length " in found["advice"][0]
    assert "fits 99 %" in found["advice"][0]


def test_inspect_shows_the_template_that_a_run_would_be_given(tmp_path: Path) -> None:
    flags = ("data", "inspect", str(alpaca(tmp_path)), "--model", "embedded", "--json")
    plain = json.loads(call(*flags).stdout)
    assert any(line.startswith("the model has no chat template: ") for line in plain["advice"])
    assert "User: Say" in plain["examples"][0]["text"]
    given = json.loads(call(*flags, "--chat-template", "chatml").stdout)
    assert not any("no chat template" in line for line in given["advice"])
    assert "<|im_start|>user\nSay" in given["examples"][0]["text"]


def test_a_model_of_few_positions_is_known_for_it_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 12}))
    data = str(alpaca(tmp_path))
    done = call("data", "inspect", data, "--model", str(model), "--json")
    assert "longer than 12 tokens, which are the positions" in json.loads(done.stdout)["advice"][0]
    monkeypatch.setattr(Resolved, "model", lambda *_: pytest.fail("it is loaded"))
    refused = call("train", "--model", str(model), "--data", data, "--out", str(tmp_path / "run"))
    assert refused.exit_code == 2
    assert "examples cannot be used" in refused.stderr
    assert "allowed are 12" in refused.stderr


def test_inspect_prints_for_people_and_needs_no_torch(tmp_path):
    code = (
        "import sys; from hizoo_lite.cli import app\n"
        "try: app(['data', 'inspect', sys.argv[1]])\n"
        "finally: assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(reviews(tmp_path))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "classification: 41 examples, text in 'review', 2 labels in 'verdict' (bad, good)"
    )
    assert "reviews.csv: cells end at a semicolon" in done.stdout
    assert "division: 40 examples: 36 train, 0 dev, 4 test; test held out of train; 1 left out" in done.stdout


def test_texts_with_different_labels_are_listed_with_what_to_do(tmp_path):
    path = reviews(tmp_path)
    assert json.loads(call("data", "inspect", str(path), "--json").stdout)["contradictions"] == []
    path.write_text(path.read_text() + f"{REVIEWS[0][0]} 0;bad\n")
    shown = call("data", "inspect", str(path)).stdout
    assert "there twice or more: 1, with different labels: 1\n" in shown
    listed = next(line for line in shown.splitlines() if line.startswith(f"  {path}:"))
    assert set(listed.strip().split(", ")) == {f"{path}:2 good", f"{path}:43 bad"}
    assert "advice: 1 text with different labels, listed above: give the rows of each the label" in shown
    path.write_text(path.read_text() + "".join(f"{REVIEWS[0][0]} {n};bad\n" for n in range(2, 24, 2)))
    shown = call("data", "inspect", str(path)).stdout
    assert "with different labels: 12\n" in shown
    assert "\n  and 2 texts more; --json lists all\n" in shown


def test_inspect_writes_the_task_file_and_does_not_write_over_one(tmp_path):
    data, path = reviews(tmp_path), tmp_path / "task.toml"
    assert call("data", "inspect", str(data), "--write-task", str(path)).exit_code == 0
    again = json.loads(call("data", "inspect", str(data), "--task", str(path), "--json").stdout)
    assert again["parts"] == {"train": 36, "dev": 0, "test": 4}
    refused = call("data", "inspect", str(data), "--write-task", str(path))
    assert refused.exit_code == 2
    assert "is there already" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label-field", "x"], "no column 'x'; the columns are: review, verdict"),
        (["--strict"], "reviews.csv:42: field 'verdict': it is empty, no label"),
        (
            ["--task", "sst2", "--label-field", "verdict"],
            "--label-field: got 'verdict', but --task sst2 says",
        ),
        (["--task", "nothing"], "task: unknown name 'nothing'"),
    ],
)
def test_inspect_refuses_what_a_run_refuses(tmp_path, arguments, message):
    done = call("data", "inspect", str(reviews(tmp_path)), *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_run_of_recognised_data_has_its_task_and_what_was_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HIZOO_LITE_REPORT", "0")
    out = tmp_path / "run"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in RUN.items()]
    done = call("train", "--data", str(reviews(tmp_path)), "--epochs", "0.5", "--out", str(out), *flags)
    assert done.exit_code == 0, done.stderr
    assert "classification: 41 examples, text in 'review'" in done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'reviews.csv'}, 4 test examples\n")
    assert done.stderr.endswith(
        f"  evaluate: hizoo-lite eval --adapter {out}\n"
        f'  ask: hizoo-lite generate --adapter {out} --prompt "..."\n'
        f"  export: hizoo-lite export {out} --to peft --out {out}-peft\n"
    )
    assert "40 examples: 36 train, 0 dev, 4 test; test held out of train; 1 left out" in done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["steps"], summary["test_examples"]) == (5, 4)  # ceil(0.5 * 36 / 4)
    left_out = [json.loads(line) for line in (out / "left_out.jsonl").read_text().splitlines()]
    assert left_out == [
        {"where": f"{tmp_path / 'reviews.csv'}:42", "why": "field 'verdict': it is empty, no label"}
    ]
    assert hz.tasks.get(out / "task.toml").labels == ("bad", "good")
    again = json.loads(call("eval", "--adapter", str(out), "--json").stdout)
    assert again["examples"] == 4
    assert again["scores"]["loss"] == pytest.approx(summary["loss_after"], rel=1e-5)
    assert again["task"] == summary["task"] == str(tmp_path / "reviews.csv")
    moved = shutil.copytree(out, tmp_path / "moved")
    shown = call("eval", "--adapter", str(moved), "--examples", "1").stdout
    assert shown.startswith(f"embedded on {tmp_path / 'reviews.csv'}, 1 test example\n")
    resumed = call("train", "--resume", "--out", str(out))
    assert resumed.exit_code == 0, resumed.stderr


def test_rows_in_memory_are_called_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HIZOO_LITE_REPORT", "0")
    rows = [{"review": f"{text} {n}", "verdict": label} for n in range(5) for text, label in REVIEWS]
    run = hz.fit(**RUN, data=rows, steps=1, out=str(tmp_path / "run"))
    assert run.summary["task"] == "rows in memory"


def test_dev_examples_stay_those_the_run_was_begun_with(tmp_path, monkeypatch):
    monkeypatch.setenv("HIZOO_LITE_REPORT", "0")
    settings = {**RUN, "lr_schedule": "constant", "data": str(alpaca(tmp_path)), "out": str(tmp_path / "run")}
    run = hz.fit(**settings, steps=2, eval_every=1)
    assert [len(part) for part in (run.setup.splits.train, run.setup.splits.dev)] == [17, 2]
    resumed = hz.fit(**settings, steps=3, resume=True)  # without --eval-every none would be held out
    assert [len(part) for part in (resumed.setup.splits.train, resumed.setup.splits.dev)] == [17, 2]
    with pytest.raises(UserError, match="epochs: the run has 3 steps, got 2; allowed: --steps"):
        hz.fit(**settings, epochs=2.0, resume=True)


def test_strict_runs_refuse_what_others_leave_out(tmp_path):
    settings = {**RUN, "out": str(tmp_path / "run"), "strict": True}
    with pytest.raises(UserError, match=r"reviews\.csv:42: field 'verdict': it is empty"):
        hz.fit(**settings, data=str(reviews(tmp_path)))
    with pytest.raises(UserError, match=r"alpaca\.json: entry 20 needs \d+ tokens"):
        hz.fit(**settings, data=str(alpaca(tmp_path)))
    assert not (tmp_path / "run").exists()


def test_a_run_without_task_and_data_says_that_it_lacks_one(tmp_path):
    done = call("train", "--model", "embedded", "--out", str(tmp_path / "run"))
    assert done.exit_code == 2
    assert "--task: missing" in done.stderr
    both = call("train", "--model", "embedded", "--data", "x.csv", "--steps", "5", "--epochs", "1")
    assert both.exit_code == 2
    assert "--epochs: got 1.0 beside --steps; allowed: one of them" in both.stderr


def test_plan_counts_the_examples_of_data_for_epochs(tmp_path):
    done = call("plan", "--model", "embedded", "--data", str(reviews(tmp_path)), "--epochs", "2", "--json")
    assert done.exit_code == 0, done.stderr
    assert "36 train, 0 dev, 4 test" in done.stderr
    assert "5 steps" in done.stderr  # 2 * 36 / 16
    alone = call("plan", "--model", "embedded", "--epochs", "2")
    assert alone.exit_code == 2
    assert "--epochs: no examples to count" in alone.stderr


def test_a_plan_for_data_is_the_one_that_its_run_makes(tmp_path: Path) -> None:
    data = str(reviews(tmp_path))
    same = ["--model", "embedded", "--data", data, "--batch-size", "4", "--device", "cpu", "--steps", "1"]
    planned = call("plan", *same, "--json")
    assert planned.exit_code == 0, planned.stderr
    assert call("train", *same, "--out", str(tmp_path / "run"), "--json").exit_code == 0
    alone, of_run = json.loads(planned.stdout), json.loads((tmp_path / "run" / "plan.json").read_text())
    owners = [dict(found["ledger"]["device"]) for found in (alone, of_run)]
    for found in owners:  # libraries by what is loaded; a plan has a budget, so its heap gives back
        found.pop("framework"), found.pop("heap", None)
    assert owners[0] == owners[1]


def test_a_bare_trunk_is_planned_as_the_classifier_that_a_run_makes_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "trunk"
    folder.mkdir()
    config = {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2}
    sizes = {"num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 100, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config | sizes))
    done = call("plan", "--model", str(folder), "--data", str(reviews(tmp_path)), "--json")
    assert done.exit_code == 0, done.stderr


def test_a_file_of_ones_own_is_evaluated_as_a_whole(tmp_path: Path) -> None:
    rows = "".join(f"the number {n} came,{'odd' if n % 2 else 'even'}\n" for n in range(20))
    (tmp_path / "mine.csv").write_text("text,label\n" + rows)
    (tmp_path / "other.csv").write_text("text,label\nthe number 1 came,odd\nthe number 2 came,even\n")
    hz.fit(
        "embedded", data=str(tmp_path / "mine.csv"), steps=1, batch_size=2, device="cpu", out=tmp_path / "run"
    )

    def count(*flags: str) -> int:
        done = CliRunner().invoke(app, ["eval", "--adapter", str(tmp_path / "run"), *flags, "--json"])
        assert done.exit_code == 0, done.stderr
        return int(json.loads(done.stdout)["examples"])

    assert count() == 2  # what the run held out
    assert count("--data", str(tmp_path / "other.csv")) == 2
    assert count("--data", str(tmp_path / "mine.csv")) == 20
    assert count("--data", str(tmp_path / "mine.csv"), "--split", "test") == 2


def test_the_division_that_is_proposed_can_be_looked_at(tmp_path: Path) -> None:
    data = str(reviews(tmp_path, 40))
    found = json.loads(call("data", "inspect", data, "--test-examples", "24", "--json").stdout)
    assert not any("so few" in line for line in found["advice"])
    done = call("plan", "--model", "embedded", "--data", data, "--test-examples", "24", "--steps", "2")
    assert (done.exit_code, "so few" in done.stderr) == (0, False)
    assert "24 test" in done.stderr
