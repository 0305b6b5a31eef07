"""Trainers in the shapes of transformers and TRL, and the language model of lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from typer.testing import CliRunner

import hizoo_lite as hz
from hizoo_lite.cli import app
from hizoo_lite.config import DEMO
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import UserError
from hizoo_lite.integrations import HiZOOSFTTrainer, HiZOOTrainer, arguments
from tests.run_fixtures import shallow

WEIGHTS = "adapter/adapter_model.safetensors"
DATA = [json.loads(line) for line in (DEMO / "train.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with its first block alone."""
    return shallow(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


def tokens(tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """Rows of a causal model, with the loss on the answer alone."""
    found = []
    for row in DATA[:count]:
        prompt = tokenizer(row["sentence"] + " It was")["input_ids"]
        answer = tokenizer((" terrible", " great")[row["label"]], add_special_tokens=False)["input_ids"]
        ids = prompt + answer
        labels = [-100] * len(prompt) + answer
        found.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return found


def classes(tokenizer: Any, count: int) -> list[dict[str, Any]]:
    return [{**tokenizer(row["sentence"]), "label": row["label"]} for row in DATA[:count]]


def args_of(out: Path, **changes: Any) -> TrainingArguments:
    chosen = {"max_steps": 4, "per_device_train_batch_size": 4, "disable_tqdm": True, "use_cpu": True}
    return TrainingArguments(str(out), **{**chosen, **changes})


def test_the_loss_falls_and_the_figures_are_those_of_evaluate(tokenizer: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO)
    rows = tokens(tokenizer, 72)
    args = args_of(tmp_path / "run", max_steps=30, per_device_train_batch_size=16)
    given: dict[str, Any] = {"train_dataset": rows[:48], "eval_dataset": rows[48:]}
    trainer = HiZOOTrainer(model, args, processing_class=tokenizer, rank=8, **given)
    before = trainer.evaluate()
    done = trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 0.1
    assert trainer.run is not None
    assert done.global_step == trainer.state.global_step == 30
    # batches of another order round otherwise
    assert before["eval_loss"] == pytest.approx(trainer.run.summary["loss_before"], rel=1e-6)
    assert after["eval_loss"] == hz.evaluate(trainer.run, data=rows[48:]).loss
    from_the_folder_alone = hz.evaluate(trainer.run.folder)
    assert after["eval_loss"] == pytest.approx(from_the_folder_alone.loss, rel=1e-6)
    assert (trainer.save_model(str(tmp_path / "peft")) / "adapter_config.json").is_file()


class Order(TrainerCallback):
    """The events, with the steps they came at; fails if what it is given is not transformers'."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return object.__getattribute__(self, name)

        def told(args: Any, state: Any, control: Any, **more: Any) -> None:
            assert (type(args), type(state), type(control)) == (
                TrainingArguments,
                TrainerState,
                TrainerControl,
            )
            if name != "on_prediction_step":
                self.events.append((name.removeprefix("on_"), state.global_step))

        return told


def test_callbacks_are_called_in_the_order_of_transformers(
    folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    order, rows = Order(), tokens(tokenizer, 12)
    args = args_of(
        tmp_path / "run", max_steps=3, logging_steps=2, eval_strategy="steps", eval_steps=2, save_steps=2
    )
    trainer = HiZOOTrainer(
        str(folder), args, train_dataset=rows[:8], eval_dataset=rows[8:], callbacks=[order]
    )
    trainer.train()
    assert order.events == [
        *(("init_end", 0), ("train_begin", 0), ("epoch_begin", 0)),
        *(("step_begin", 0), ("step_end", 1), ("step_begin", 1), ("step_end", 2)),
        *(("log", 2), ("epoch_end", 2), ("log", 2), ("evaluate", 2), ("save", 2)),
        *(("epoch_begin", 2), ("step_begin", 2), ("step_end", 3)),
        *(("log", 3), ("evaluate", 3), ("save", 3), ("save", 3), ("train_end", 3)),
    ]
    logged = [(entry["step"], "loss" in entry, "eval_loss" in entry) for entry in trainer.state.log_history]
    assert logged == [(2, True, False), (2, False, True), (3, False, True)]
    assert trainer.run is not None
    steps = [line for line in trainer.run.history if line["kind"] == "step"]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(
        np.mean([np.mean(line["losses"]) for line in steps[:2]])
    )


@pytest.mark.parametrize(
    ("count", "batch", "steps", "ends"), [(6, 5, 11, [2, 3, 4, 5, 6, 8, 9, 10, 11]), (7, 1, 17, [7, 14])]
)
def test_every_epoch_ends_once(
    count: int, batch: int, steps: int, ends: list[int], folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    order, rows = Order(), tokens(tokenizer, 12)
    args = args_of(tmp_path / "run", max_steps=steps, per_device_train_batch_size=batch)
    HiZOOTrainer(
        str(folder), args, train_dataset=rows[:count], eval_dataset=rows[8:], callbacks=[order]
    ).train()
    assert [step for event, step in order.events if event == "epoch_end"] == ends
    assert [step for event, step in order.events if event == "epoch_begin"] == [
        0,
        *(end for end in ends if end < steps),
    ]


class Stops(TrainerCallback):
    def __init__(self, step: int, wish: str = "should_training_stop") -> None:
        self.step, self.wish = step, wish

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == self.step:
            setattr(control, self.wish, True)


def test_a_callback_stops_the_run_which_is_saved(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    rows = tokens(tokenizer, 12)
    given: dict[str, Any] = {"train_dataset": rows[:8], "eval_dataset": rows[8:]}
    stopped = HiZOOTrainer(str(folder), args_of(tmp_path / "a"), callbacks=[Stops(2)], **given)
    assert stopped.train().global_step == 2
    assert (tmp_path / "a" / WEIGHTS).is_file()
    assert stopped.run is not None
    assert not stopped.run.interrupted


def test_callbacks_may_ask_for_an_evaluation(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    rows = tokens(tokenizer, 12)
    trainer = HiZOOTrainer(
        str(folder),
        args_of(tmp_path / "run", max_steps=2),
        train_dataset=rows[:8],
        eval_dataset=rows[8:],
        callbacks=[Stops(1, "should_evaluate")],
    )
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [1]


class Ends(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 3:
            raise ZeroDivisionError("power cut")


def test_a_resumed_run_equals_an_undisturbed_one(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    rows = tokens(tokenizer, 12)

    def made(out: Path, *callbacks: Any) -> HiZOOTrainer:
        model = AutoModelForCausalLM.from_pretrained(folder)
        args = args_of(out, max_steps=-1, num_train_epochs=3, save_steps=2, logging_steps=2)
        given: dict[str, Any] = {"train_dataset": rows[:8], "eval_dataset": rows[8:]}
        return HiZOOTrainer(model, args, processing_class=tokenizer, callbacks=callbacks, **given)

    straight, resumed = made(tmp_path / "straight"), made(tmp_path / "parts")
    straight.train()
    with pytest.raises(ZeroDivisionError):
        made(tmp_path / "parts", Ends()).train()
    resumed.train(resume_from_checkpoint=True)
    assert (tmp_path / "straight" / WEIGHTS).read_bytes() == (tmp_path / "parts" / WEIGHTS).read_bytes()
    losses = [[entry.get("loss") for entry in each.state.log_history] for each in (straight, resumed)]
    assert losses[0] == losses[1]
    assert straight.state.global_step == resumed.state.global_step == 6


def test_a_run_is_resumed_after_an_evaluation(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    model, rows = AutoModelForCausalLM.from_pretrained(folder), tokens(tokenizer, 12)

    def made(steps: int) -> HiZOOTrainer:
        args = args_of(tmp_path / "run", max_steps=steps, lr_scheduler_type="constant")
        given: dict[str, Any] = {"train_dataset": rows[:8], "eval_dataset": rows[8:]}
        return HiZOOTrainer(model, args, processing_class=tokenizer, **given)

    made(1).train()
    again = made(2)
    again.evaluate()
    assert again.train(resume_from_checkpoint=True).global_step == 2


@pytest.mark.parametrize("prefix", ["eval_", ""])
def test_metrics_of_numpy_are_plain_numbers(
    prefix: str, folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    rows = classes(tokenizer, 16)
    trainer = HiZOOTrainer(
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2),
        args_of(tmp_path / "run", max_steps=1, eval_strategy="steps", eval_steps=1),
        train_dataset=rows[:8],
        eval_dataset=rows[8:],
        processing_class=tokenizer,
        compute_metrics=lambda prediction: {f"{prefix}evaluated": np.float32(1), "rows": np.int64(8)},
    )
    trainer.train()
    entry = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"][-1]
    assert (entry["eval_evaluated"], entry["eval_rows"]) == (1.0, 8)
    trainer._told.compute = trainer.compute_metrics = lambda prediction: None  # type: ignore[assignment, return-value]
    with pytest.raises(UserError, match="compute_metrics: got None, allowed: numbers by name"):
        trainer.evaluate()


def test_classes_are_in_the_order_of_their_numbers(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=12)
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    names = {str(number): f"class {number}" for number in range(12)}
    path.write_text(json.dumps({**config, "id2label": names}, sort_keys=True))  # "10" is before "2"
    rows = [{"input_ids": [5, 6], "label": 3}]
    trainer = HiZOOTrainer(str(tmp_path / "model"), args_of(tmp_path / "run"), train_dataset=rows)
    task = trainer._task
    assert isinstance(task, dict)
    assert list(task["answers"]) == list(names.values())


def test_a_classifier_has_the_users_metrics(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    rows = classes(tokenizer, 24)

    def compute(prediction: Any) -> dict[str, float]:
        assert prediction.predictions.shape == (8, 2)
        return {"right": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}

    args = args_of(
        tmp_path / "run",
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    )
    trainer = HiZOOTrainer(
        model,
        args,
        train_dataset=rows[:16],
        eval_dataset=rows[16:],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute,
        callbacks=[EarlyStoppingCallback(5)],
    )
    trainer.train()
    found = trainer.evaluate()
    assert trainer.run is not None
    assert (
        found["eval_right"]
        == found["eval_accuracy"]
        == hz.evaluate(trainer.run, data=rows_of(rows[16:])).metric.value
    )
    assert [entry["eval_right"] for entry in trainer.state.log_history if "eval_right" in entry][-1] >= 0
    predicted = trainer.predict(rows[16:])
    assert predicted.label_ids.tolist() == [row["label"] for row in rows[16:]]
    assert predicted.metrics["test_right"] == found["eval_right"]


def rows_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"input_ids": row["input_ids"], "labels": row["label"]} for row in rows]


def test_a_collator_makes_the_labels_and_padding_changes_nothing(
    folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    plain = [{"input_ids": tokenizer(row["sentence"])["input_ids"]} for row in DATA[:4]]
    padded = [
        {
            "input_ids": row["input_ids"] + [0] * 3,
            "attention_mask": [1] * len(row["input_ids"]) + [0] * 3,
            "labels": row["input_ids"] + [-100] * 3,
        }
        for row in plain
    ]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    args = args_of(tmp_path / "run")
    losses = [
        HiZOOTrainer(str(folder), args, eval_dataset=rows, data_collator=each).evaluate()["eval_loss"]
        for rows, each in ((plain, collator), (padded, None), (plain, None))
    ]
    assert losses[0] == losses[1] == losses[2]


def test_rows_that_are_no_tokens_are_recognised(folder: Path, tmp_path: Path) -> None:
    trainer = HiZOOTrainer(str(folder), args_of(tmp_path / "run", max_steps=1), train_dataset=DATA[:20])
    trainer.train()
    assert trainer.run is not None
    assert trainer.run.setup.task.labels == ("0", "1")
    assert len(trainer.run.setup.splits.test) == 2  # held out
    assert trainer.evaluate(DATA[20:24])["eval_loss"] == hz.evaluate(trainer.run, data=DATA[20:24]).loss


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"activation_checkpointing": True}, "gradient_checkpointing: got True, there is no backward pass"),
        ({"optim": "sgd"}, "optim: got 'sgd', steps are the estimator's"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: got 0.1, it has no counterpart here"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
            "eval_strategy",
        ),
        ({"eval_strategy": "epoch"}, "eval_strategy: got 'epoch', but there is no eval_dataset"),
        ({"save_steps": 0.1, "max_steps": -1}, "save_steps: got 0.1, allowed: a number of steps"),
        ({"warmup_steps": 0.1, "max_steps": -1}, "warmup_steps: got 0.1, allowed: a number of steps"),
        ({"metric_for_best_model": "accuracy"}, "metric_for_best_model: got 'accuracy', .* allowed: 'loss'"),
        ({"lr_scheduler_type": "polynomial"}, "lr_schedule: got 'polynomial', allowed: constant, linear"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    changes: dict[str, Any], match: str, folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    rows = tokens(tokenizer, 12)
    with pytest.raises(UserError, match=match):
        HiZOOTrainer(str(folder), args_of(tmp_path / "run", **changes), train_dataset=rows).train()


def test_arguments_are_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = args_of(
        tmp_path / "run",
        learning_rate=0.1,
        gradient_accumulation_steps=2,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=0.5,
        weight_decay=0.01,
        save_total_limit=2,
        max_grad_norm=3.0,
        report_to=["tensorboard"],
        run_name="mine",
        dataloader_num_workers=2,
    )
    found = arguments.of(args)
    assert found == {
        "out": str(tmp_path / "run"),
        "steps": 4,
        "batch_size": 8,
        "accumulate": 2,
        "seed": 42,
        "lr": 0.1,
        "lr_schedule": "constant",
        "warmup_steps": 2,
        "weight_decay": 0.01,
        "save_total_limit": 2,
        "clip": 3.0,
        "tracker": "tensorboard",
        "run_name": "mine",
        "eval_every": 0,
        "save_every": 500,
        "device": "cpu",
        "eval_batch_size": 8,
    }
    assert "lr" not in arguments.of(args_of(tmp_path / "run", max_steps=7))
    shares = {"eval_strategy": "steps", "eval_steps": 0.3, "save_steps": 0.5, "warmup_steps": 3.0}
    found = arguments.of(args_of(tmp_path / "run", max_steps=7, **shares))
    assert [found[name] for name in ("eval_every", "save_every", "warmup_steps")] == [3, 4, 3]
    assert "these have no meaning here: dataloader_num_workers" in caplog.text


def test_which_rate_is_taken_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    usual = args_of(tmp_path / "run", learning_rate=5e-5)
    HiZOOTrainer("embedded", usual)
    assert "5e-05 is TrainingArguments's default and counts as not given: lr is auto" in caplog.text
    assert "HiZOOTrainer(..., lr=5e-05) takes it" in caplog.text
    caplog.clear()
    assert HiZOOTrainer("embedded", usual, lr=5e-5).options["lr"] == 5e-5
    assert HiZOOTrainer("embedded", args_of(tmp_path / "run", learning_rate=1e-4)).options["lr"] == 1e-4
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"compute_metrics": lambda prediction: {}}, "compute_metrics: the model is causal"),
        ({"eval_dataset": None, "steps": True}, "there is no eval_dataset"),
        ({"train_dataset": [{"input_ids": [1, 2], "labels": [-100, -100]}] * 12}, "no token has a loss"),
        ({"train_dataset": [{"input_ids": [1, 2], "labels": [1]}] * 12}, "got 1 numbers for 2 tokens"),
        ({"train_dataset": [{"input_ids": [1, -2, 3]}] * 12}, "whole numbers of 0 or more, got"),
        ({"train_dataset": [{"input_ids": [1, 2], "labels": [1, -5]}] * 12}, "of 0 or more, or -100, got"),
        ({"train_dataset": [{"input_ids": [1], "position_ids": [7]}]}, "position_ids are not read here"),
        ({"eval_dataset": [{"input_ids": [1], "completion_mask": [0]}]}, "completion_mask are not read"),
        ({"callbacks": [object()]}, "callbacks: got <object object"),
        ({"callbacks": None, "train_dataset": None}, "train_dataset: missing"),
        ({"train_dataset": iter([])}, "train_dataset: got a list_iterator, allowed: one data set"),
        ({"eval_dataset": {"a": []}}, "eval_dataset: got a dict, allowed: one data set"),
    ],
)
def test_bad_input_is_refused(
    given: dict[str, Any], match: str, folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    rows = tokens(tokenizer, 12)
    changes = {"eval_strategy": "steps", "eval_steps": 1} if given.pop("steps", False) else {}
    with pytest.raises(UserError, match=match):
        HiZOOTrainer(
            str(folder),
            args_of(tmp_path / "run", **changes),
            **{"train_dataset": rows[:8], "eval_dataset": rows[8:], **given},
        ).train()


# -------------------------------------------------------------------------------------------- TRL's

CHATS = [
    {"messages": [{"role": "user", "content": row["sentence"]}, {"role": "assistant", "content": "Yes."}]}
    for row in DATA[:16]
]


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (CHATS, "chat"),
        ([{"prompt": row["sentence"], "completion": " Yes."} for row in DATA[:16]], "completion"),
        ([{"body": row["sentence"], "label": 0} for row in DATA[:16]], "lm"),
    ],
    ids=["messages", "completion", "text"],
)
def test_forms_of_sft_are_trained(
    rows: list[Any], kind: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = SimpleNamespace(
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=4,
        dataset_text_field="body",
        max_length=128,
        use_cpu=True,
        disable_tqdm=True,
    )
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    trainer = HiZOOSFTTrainer(
        str(folder),
        args,
        train_dataset=rows,
        peft_config=config,
        chat_template="chatml" if kind == "chat" else None,
    )
    trainer.train()
    assert trainer.run is not None
    settings, task = trainer.run.setup.config, trainer.run.setup.task
    assert ("chat" if task.chat else task.kind) == kind
    assert (settings.rank, settings.targets, settings.max_length) == (4, "q_proj", 128)
    assert ("on the assistant's turns alone" in caplog.text) == (kind == "chat")


def test_a_formatting_function_makes_texts(folder: Path, tmp_path: Path) -> None:
    trainer = HiZOOSFTTrainer(
        str(folder),
        args_of(tmp_path / "run", max_steps=1),
        train_dataset=DATA[:16],
        formatting_func=lambda row: f"Sentence: {row['sentence']}",
    )
    trainer.train()
    assert trainer.run is not None
    assert trainer.run.setup.splits.train[0].fields["text"].startswith("Sentence: ")


@pytest.mark.parametrize(
    ("own", "match"),
    [
        ({"packing": True}, "packing: got True, allowed: False"),
        ({"max_length": None}, "max_length: got None"),
        ({"completion_only_loss": False}, "completion_only_loss: got False"),
        ({"beta": 0.1}, "args: beta: nothing here reads that"),
    ],
)
def test_what_sft_cannot_honour_is_refused(
    own: dict[str, Any], match: str, folder: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": row["sentence"], "completion": " Yes."} for row in DATA[:16]]
    args = SimpleNamespace(output_dir=str(tmp_path / "run"), max_steps=1, use_cpu=True, **own)
    with pytest.raises(UserError, match=match):
        HiZOOSFTTrainer(str(folder), args, train_dataset=rows)


# --------------------------------------------------------------------------------------- the harness


def test_scored_tokens_say_whether_they_are_the_likeliest(folder: Path, tokenizer: Any) -> None:
    import torch

    from hizoo_lite.tasks.collate import Encoded, collate, score_candidates

    model = hz.load(str(folder), bits="none", compute_dtype="float32", device="cpu")
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        encoded, wanted = [], []
        for row in DATA[:3]:
            ids = tokenizer(row["sentence"])["input_ids"]
            rows, sites, scored = score_candidates([ids], 1)
            encoded.append(Encoded(rows, None, sites, scored, 1, 0, "answer"))
            log_p = plain(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
            wanted += [(float(p[i]), bool(p.argmax() == i)) for p, i in zip(log_p, ids[1:], strict=True)]
    log_p, likeliest = Traversal(model).scored(collate(encoded, 0))
    assert np.abs(log_p - [value for value, _ in wanted]).max() < 1e-4
    assert likeliest.tolist() == [top for _, top in wanted]
    assert 0 < likeliest.sum() < len(likeliest)


def test_without_the_harness_its_installation_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = CliRunner().invoke(app, ["eval", "--model", "embedded", "--lm-eval", "piqa"])
    assert done.exit_code == 2
    assert "pip install 'hizoo-lite[lm-eval]'" in done.output
    done = CliRunner().invoke(app, ["eval", "--model", "embedded", "--lm-eval", "piqa", "--task", "sst2"])
    assert "--task: got ['sst2'], not allowed with --lm-eval" in done.output


harness = pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm-eval is not installed")


def request(kind: str, *given: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=given, idx=0)


@harness
@pytest.mark.filterwarnings("default")
def test_the_harness_gets_what_its_own_model_gives() -> None:
    from lm_eval.models.huggingface import HFLM

    from hizoo_lite.integrations.lm_eval import HiZOOLM

    given: dict[str, Any] = {"batch_size": 4, "max_length": 64}
    plain = {"bits": "none", "device": "cpu", "compute_dtype": "float32"}
    ours = HiZOOLM(str(DEMO), **given, **plain)
    streamed = HiZOOLM(str(DEMO), **given, **plain, residency="disk")
    theirs = HFLM(pretrained=str(DEMO), device="cpu", dtype="float32", **given)
    texts = [row["sentence"] for row in DATA[:6]]
    pairs = [(text + " It was", word) for text in texts for word in (" great", " not so good")]
    scored = [request("loglikelihood", *pair) for pair in [*pairs, ("", " A sentence.")]]
    rolling = [request("loglikelihood_rolling", text) for text in [*texts, " ".join(texts)]]
    found, wanted = ours.loglikelihood(scored), theirs.loglikelihood(scored)
    assert [each[1] for each in found] == [each[1] for each in wanted]
    assert np.abs(np.subtract([e[0] for e in found], [e[0] for e in wanted])).max() < 1e-4
    assert streamed.loglikelihood(scored) == found
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(
        theirs.loglikelihood_rolling(rolling), rel=1e-6
    )
    options = {"until": ["."], "max_gen_toks": 8, "do_sample": False}
    written = [request("generate_until", text + " It was", options) for text in texts]
    assert ours.generate_until(written) == theirs.generate_until(written)


@harness
def test_an_unknown_task_of_the_harness_is_refused() -> None:
    done = CliRunner().invoke(app, ["eval", "--model", "embedded", "--lm-eval", "nosuchtask"])
    assert (done.exit_code, "got nosuchtask" in done.output) == (2, True)


def task_of_days(tmp_path: Path) -> Path:
    """A task of the harness's, in a file of one's own."""
    rows = [{"text": "A fine day.", "label": 0}, {"text": "A bad one.", "label": 1}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "days",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(tmp_path / "rows.jsonl")}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}} It was",
        "doc_to_target": "label",
        "doc_to_choice": [" good", " bad"],
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "days.yaml").write_text(yaml.safe_dump(task))
    return tmp_path / "days.yaml"


@harness
@pytest.mark.filterwarnings("default")
def test_a_task_of_the_harness_in_a_file_of_ones_own(tmp_path: Path) -> None:
    written = task_of_days(tmp_path)
    (tmp_path / "another.yaml").write_text(written.read_text())  # of the same name: nobody's business
    asked = ["eval", "--model", "embedded", "--json", "--lm-eval"]
    done = CliRunner().invoke(app, [*asked, str(written)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["days"]["acc,none"] in (0.0, 0.5, 1.0)
    done = CliRunner().invoke(app, [*asked, str(tmp_path / "none.yaml")])
    assert (done.exit_code, "none.yaml: no such file" in done.output) == (2, True)


@harness
def test_the_harness_has_the_model_on_its_own_command_line(tmp_path: Path) -> None:
    task_of_days(tmp_path)
    run = [sys.executable, "-m", "hizoo_lite.integrations.lm_eval", "run", "--model", "hizoo_lite"]
    run += ["--tasks", "days", "--include_path", str(tmp_path), "--model_args"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([*run, "pretrained=embedded"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\|days .*\|acc ", done.stdout), done.stdout
    done = subprocess.run([*run, "pretrained=nosuch"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: model: nosuch is not a local folder")
