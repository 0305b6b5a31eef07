"""Callbacks with transformers' names: what they are told, what they may ask for, what costs nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback

from hizoo_lite.config import TrainConfig
from hizoo_lite.errors import UserError
from hizoo_lite.run import Run, fit
from hizoo_lite.train.callbacks import EVENTS
from hizoo_lite.train.folder import RunFolder
from tests.run_fixtures import short_run


class Recorder:
    """Keeps every event with the step it came at."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.seen: dict[str, dict[str, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        if name not in EVENTS:
            raise AttributeError(name)

        def told(args: Any, state: Any, control: Any, **more: Any) -> None:
            self.events.append((name, state.global_step))
            self.seen[name] = {"args": args, "state": state, "control": control, **more}

        return told

    def without(self, *names: str) -> list[tuple[str, int]]:
        return [event for event in self.events if event[0] not in names]


class Asks(TrainerCallback):
    """Asks for one thing after one step."""

    def __init__(self, wish: str, step: int) -> None:
        self.wish, self.step = wish, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == self.step:
            setattr(control, self.wish, True)
        return control


class Fails(TrainerCallback):
    """Raises at one event."""

    def __init__(self, event: str, step: int) -> None:
        self.step = step
        setattr(self, event, self._fail)

    def _fail(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise ZeroDivisionError("a bug of its own")


def run_of(folder: Path, *callbacks: object, **changes: Any) -> Run:
    return fit(TrainConfig(**short_run(folder, **changes)), callbacks=callbacks)


def lines_of(folder: Path) -> list[tuple[str, int]]:
    return [(line.get("when", "step"), line["step"]) for line in RunFolder(folder).read_metrics()]


def test_callbacks_are_told_in_the_order_of_transformers(tmp_path: Path) -> None:
    recorder = Recorder()
    run = run_of(tmp_path, recorder, steps=2, eval_every=1, save_every=1)
    step = ["on_step_begin", "on_step_end", "on_log"]
    wanted = [
        *(("on_train_begin", 0), ("on_evaluate_begin", 0), ("on_log", 0), ("on_predict", 0)),
        *((name, int(name != "on_step_begin")) for name in step),
        *((name, 1) for name in ("on_evaluate_begin", "on_log", "on_evaluate", "on_save")),
        *((name, 1 + (name != "on_step_begin")) for name in step),
        *((name, 2) for name in ("on_save", "on_evaluate_begin", "on_log", "on_predict")),
        *(("on_save", 2), ("on_train_end", 2)),
    ]
    assert recorder.without("on_message", "on_prediction_step") == wanted
    seen = recorder.seen["on_step_end"]
    assert seen["model"] is run.setup.model.module
    assert seen["processing_class"] is run.setup.model.tokenizer
    state, args = seen["state"], seen["args"]
    assert (state.global_step, state.max_steps, state.epoch) == (2, 2, 2 * 4 / 10)
    assert (args.metric_for_best_model, args.greater_is_better, args.eval_steps) == ("accuracy", True, 1)
    assert set(recorder.seen["on_evaluate"]["metrics"]) == {
        "eval_loss",
        "eval_accuracy",
        "eval_runtime",
        "epoch",
    }
    assert recorder.seen["on_predict"]["metrics"]["test_loss"] == run.summary["loss_after"]
    assert recorder.seen["on_log"]["logs"] == recorder.seen["on_predict"]["metrics"]


def test_callbacks_change_no_bit_of_a_run(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / "with", Recorder(), TrainerCallback()), run_of(tmp_path / "without")]
    for name in ("journal.bin", "adapter/adapter_model.safetensors", "checkpoints/step-000006/state.json"):
        assert (runs[0].folder / name).read_bytes() == (runs[1].folder / name).read_bytes()


def test_the_history_is_that_of_the_whole_run_after_a_resume(tmp_path: Path) -> None:
    class Reads(TrainerCallback):
        at: dict[int, list[dict[str, Any]]]

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.at = {}

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.at[state.global_step] = list(state.log_history)

    straight, resumed = Reads(), Reads()
    options = {"eval_every": 2, "save_every": 2}
    run_of(tmp_path / "straight", straight, **options)
    with pytest.raises(ZeroDivisionError):
        run_of(tmp_path / "parts", Fails("on_step_end", 3), **options)
    run_of(tmp_path / "parts", resumed, resume=True, **options)

    def plain(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in entry.items() if not k.endswith("_runtime")} for entry in entries]

    assert plain(resumed.at[6]) == plain(straight.at[6])
    assert [entry["step"] for entry in straight.at[6]] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert {"loss", "learning_rate", "projected_grad", "curvature", "epoch", "step"} == set(straight.at[1][1])


def test_a_run_that_is_asked_to_stop_ends_as_one_of_fewer_steps(tmp_path: Path) -> None:
    recorder = Recorder()
    stopped = run_of(tmp_path / "a", Asks("should_training_stop", 3), recorder)
    assert not stopped.interrupted
    assert (stopped.summary["steps"], recorder.events[-1]) == (3, ("on_train_end", 3))
    assert lines_of(stopped.folder)[-1] == ("after", 3)
    shorter = run_of(tmp_path / "b", steps=3)
    weights = "adapter/adapter_model.safetensors"
    assert (stopped.folder / weights).read_bytes() == (shorter.folder / weights).read_bytes()
    assert stopped.summary["loss_after"] == shorter.summary["loss_after"]


def test_a_callback_may_ask_for_a_checkpoint_and_an_evaluation(tmp_path: Path) -> None:
    run = run_of(tmp_path, Asks("should_save", 2), Asks("should_evaluate", 4))
    assert [where for where in lines_of(run.folder) if where[0] == "dev"] == [("dev", 4)]
    saved = {path.name for path in (run.folder / "checkpoints").iterdir()}
    assert saved == {"step-000000", "step-000002", "step-000006"}


def test_an_evaluation_without_dev_examples_ends_the_run_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="should_evaluate: there are no dev examples"):
        run_of(tmp_path, Asks("should_evaluate", 2), dev_examples=0)
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 2


def test_early_stopping_of_transformers_stops_and_the_best_is_kept(tmp_path: Path) -> None:
    recorder = Recorder()
    options = {"keep": "best", "eval_every": 1, "steps": 12, "lr": 3e-1, "mu": 1e-2}
    run = run_of(tmp_path, EarlyStoppingCallback(early_stopping_patience=2), recorder, **options)
    scores = [line["accuracy"] for line in RunFolder(run.folder).evaluations() if line["when"] == "dev"]
    state = recorder.seen["on_train_end"]["state"]
    assert state.best_metric == max(scores)
    assert state.best_global_step == 1 + scores.index(max(scores))
    assert run.summary["adapter_step"] == state.best_global_step
    assert run.summary["steps"] == len(scores) == state.best_global_step + 2 < 12
    assert Path(state.best_model_checkpoint).name == f"step-{state.best_global_step:06d}"


def test_a_printer_of_transformers_prints_what_is_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_of(tmp_path, PrinterCallback(), steps=1)
    assert "'learning_rate': " in capsys.readouterr().out


WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a run without callbacks ends in."""
    return (run_of(tmp_path_factory.mktemp("straight")).folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("event", "step", "steps"),
    [
        *(("on_train_begin", 0, 0), ("on_step_begin", 2, 3), ("on_predict", 6, 6)),
        pytest.param("on_step_end", 2, 2, marks=pytest.mark.grid),
    ],
)
def test_a_callback_that_raises_ends_the_run_saved(
    event: str, step: int, steps: int, straight: bytes, tmp_path: Path
) -> None:
    recorder = Recorder()
    with pytest.raises(ZeroDivisionError, match="a bug of its own"):
        run_of(tmp_path / "a", Fails(event, step), recorder)
    summary = json.loads((tmp_path / "a/run/summary.json").read_text())
    assert (summary["steps"], summary["interrupted"]) == (steps, steps < 6)
    assert recorder.events[-1] == ("on_train_end", steps)
    resumed = run_of(tmp_path / "a", resume=True)
    assert (resumed.folder / WEIGHTS).read_bytes() == straight


@pytest.mark.parametrize("callback", [TrainerCallback, object(), None], ids=["class", "object", "none"])
def test_what_is_no_callback_is_refused(callback: Any, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"callbacks: got .*, allowed: objects with a method of on_train_begin"
    ):
        run_of(tmp_path, callback)
    assert not (tmp_path / "run").exists()
