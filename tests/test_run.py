"""A run from its configuration to its folder: complete, resumable bit for bit, refusing what it must."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import hizoo_lite as hz
from hizoo_lite import process
from hizoo_lite.checkpoints.adapter import find_adapter
from hizoo_lite.config import TrainConfig
from hizoo_lite.errors import TooManyBadSteps, UserError
from hizoo_lite.memory.peak import PeakMeter
from hizoo_lite.model.kinds import find_kind
from hizoo_lite.run import Run, _start_tracker, fit
from hizoo_lite.train import checkpoint
from hizoo_lite.train.folder import RunFolder, next_free
from hizoo_lite.train.interrupt import Interrupt, Interrupted
from hizoo_lite.train.progress import Progress
from hizoo_lite.train.saved import attach_adapter
from hizoo_lite.train.step import Stepper, StepRecord
from tests.run_fixtures import nan_head, short_run, stories, write_task

SCORES = ("loss", "metric")
#: What summary.json has at least.
CONTRACT = [
    "steps",
    "forward_passes",
    "seconds_per_step",
    "tokens_per_second",
    "loss_before",
    "loss_after",
    "metric",
    "metric_before",
    "metric_after",
    "budget_bytes",
    "predicted_peak_bytes",
    "measured_peak_bytes",
    "inference_peak_bytes",
    "device",
    "bits",
    "space",
    "estimator",
    "curvature",
    "residency",
]


def run_of(folder: Path, progress: Progress | None = None, **changes: Any) -> Run:
    return fit(TrainConfig(**short_run(folder, **changes)), callbacks=[progress] if progress else [])


def state_of(run: Run) -> dict[str, torch.Tensor]:
    """Every tensor that the newest checkpoint and the adapter hold, and the step size's state."""
    newest = checkpoint.newest(run.folder / "checkpoints")
    assert newest is not None
    found = {f"curvature.{k}": v for k, v in load_file(newest / "curvature.safetensors").items()}
    found |= {f"saved.{k}": v for k, v in load_file(newest / "adapter/adapter_model.safetensors").items()}
    found |= {
        f"adapter.{k}": v for k, v in load_file(run.folder / "adapter/adapter_model.safetensors").items()
    }
    record = json.loads((newest / "state.json").read_text())
    numbers = {**record["step_size"], **{key: record[key] for key in ("step", "bad_steps", "halvings")}}
    return found | {k: torch.tensor(v, dtype=torch.float64) for k, v in numbers.items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def steps_of(run: Run) -> list[dict[str, Any]]:
    lines = [line for line in RunFolder(run.folder).read_metrics() if line["kind"] == "step"]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


class After(Progress):
    """Sends this process a signal once some steps are done."""

    def __init__(self, steps: int, number: int = signal.SIGINT) -> None:
        self.steps, self.number = steps, number

    def stepped(self, record: StepRecord) -> None:
        if record.step + 1 == self.steps:
            os.kill(os.getpid(), self.number)


def test_a_run_writes_its_whole_folder(tmp_path: Path) -> None:
    run = run_of(tmp_path, eval_every=4, save_every=4, device_budget="1GiB")
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary == run.summary
    assert set(CONTRACT) <= set(summary)
    assert (summary["steps"], summary["forward_passes"], summary["skipped_steps"]) == (6, 12, 0)
    assert (summary["bits"], summary["space"], summary["estimator"]) == ("nf4", "lora", "hizoo")
    assert summary["budget_bytes"] == 2**30
    assert 0 < summary["inference_peak_bytes"] <= summary["measured_peak_bytes"]
    assert not summary["interrupted"]
    lines = RunFolder(run.folder).read_metrics()
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(6))
    evaluations = [(line["when"], line["step"]) for line in lines if line["kind"] == "eval"]
    assert evaluations == [("before", 0), ("dev", 4), ("after", 6)]
    kept = {p.name for p in (run.folder / "checkpoints").iterdir()}
    assert kept == {"step-000000", "step-000004", "step-000006"}
    assert (run.folder / "adapter/adapter_config.json").is_file()
    compute = "bf16" if run.setup.model.compute == torch.bfloat16 else "float32"
    resolved = {"kind": "causal", "bits": "nf4", "compute_dtype": compute}
    given = short_run(tmp_path, eval_every=4, save_every=4, device_budget="1GiB")
    assert RunFolder(run.folder).config() == TrainConfig(**{**given, **resolved})


def test_a_run_changes_the_adapter_and_measures_the_change(tmp_path: Path) -> None:
    run = run_of(tmp_path, lr=1e-2, mu=1e-2)
    assert run.before is not None
    assert run.after is not None
    assert run.after.loss != run.before.loss
    assert run.summary["loss_after"] == run.after.loss
    assert len(run.after.predictions) == len(run.setup.splits.test) == run.summary["test_examples"]


def test_what_fit_gives_is_shown_in_a_line(tmp_path: Path) -> None:
    run = run_of(tmp_path, dev_examples=0)
    moved = {
        key: f"{run.summary[key + '_before']:.4f} -> {run.summary[key + '_after']:.4f}" for key in SCORES
    }
    metric = run.summary["metric"]
    assert repr(run) == f"Run({run.folder}: 6 steps, loss {moved['loss']}, {metric} {moved['metric']})"
    assert repr(run.setup.model).startswith(f"Model({run.setup.model.source}: causal, nf4, ")
    assert repr(run.setup.splits) == f"Splits({run.setup.splits})"
    assert f"loss={run.summary['loss_after']:.4f}, {metric}=" in repr(run.after)
    shown = [run.setup.model, run.setup.splits, run.setup, run.after, run]
    assert max(len(repr(value).splitlines()) for value in shown) == 1
    assert max(len(repr(value)) for value in shown) < 300
    run.summary.update({"metric_after": None, "loss_before": None, "loss_after": None, "interrupted": True})
    assert repr(run).endswith(f" steps, {metric} {run.before.metric.value:.4f} -> not measured, interrupted)")


@pytest.mark.parametrize("curvature", ["grouped", "diagonal"])
def test_ten_steps_equal_five_and_five_resumed_bitwise(tmp_path: Path, curvature: str) -> None:
    straight = run_of(tmp_path / "a", steps=10, curvature=curvature)
    run_of(tmp_path / "b", steps=5, curvature=curvature)
    resumed = run_of(tmp_path / "b", steps=10, curvature=curvature, resume=True)
    assert same(state_of(straight), state_of(resumed))
    assert steps_of(straight) == steps_of(resumed)
    assert resumed.summary["loss_after"] == straight.summary["loss_after"]
    assert resumed.summary["loss_before"] == straight.summary["loss_before"]
    assert resumed.summary["forward_passes"] == 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_leaves_a_resumable_run(tmp_path: Path, number: int) -> None:
    straight = run_of(tmp_path / "a")
    handlers = (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    stopped = run_of(tmp_path / "b", After(2, number))
    assert stopped.interrupted
    assert stopped.summary["steps"] == 2
    assert stopped.summary["metric_after"] is None
    assert (stopped.folder / "adapter/adapter_model.safetensors").is_file()
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    resumed = run_of(tmp_path / "b", resume=True)
    assert not resumed.interrupted
    assert same(state_of(straight), state_of(resumed))


def test_a_signal_during_the_first_evaluation_leaves_a_resumable_run(tmp_path: Path) -> None:
    class AtOnce(Progress):
        def advanced(self, units: int) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = run_of(tmp_path, AtOnce(), eval_batch_size=1)
    assert stopped.interrupted
    assert (stopped.summary["steps"], stopped.summary["loss_before"]) == (0, None)
    resumed = run_of(tmp_path, resume=True, eval_batch_size=1)
    assert resumed.summary["steps"] == 6
    assert resumed.summary["loss_before"] is not None


def test_steps_after_the_newest_checkpoint_are_taken_again_on_resume(tmp_path: Path) -> None:
    straight = run_of(tmp_path / "a", save_every=4)
    killed = run_of(tmp_path / "b", save_every=4)
    folder = RunFolder(killed.folder)
    expected = state_of(killed)
    for path in (folder.checkpoints / "step-000006").rglob("*"):
        if path.is_file():
            path.unlink()
    (folder.checkpoints / "step-000006/adapter").rmdir()
    (folder.checkpoints / "step-000006").rmdir()
    with folder.metrics.open("a") as file:
        file.write('{"kind": "step", "st')
    resumed = run_of(tmp_path / "b", save_every=4, resume=True)
    assert same(state_of(resumed), expected)
    assert steps_of(resumed) == steps_of(straight)


def test_a_second_interrupt_is_immediate() -> None:
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted):
            interrupt.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_no_handler_is_set() -> None:
    seen = []

    def work() -> None:
        with Interrupt() as interrupt:
            interrupt.check()
            seen.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_losses_that_stay_nan_end_the_run_with_everything_saved(tmp_path: Path) -> None:
    model = nan_head(tmp_path)
    with pytest.raises(
        TooManyBadSteps, match="the losses of 20 steps in a row were not finite; what was trained is saved"
    ):
        run_of(tmp_path, model=str(model), steps=50)
    summary = RunFolder(tmp_path / "run").read_summary()
    assert summary["skipped_steps"] == summary["steps"] == 20
    assert summary["loss_before"] is None
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
    assert checkpoint.newest(tmp_path / "run/checkpoints") is not None


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    run_of(tmp_path, steps=1)
    before = (tmp_path / "run/summary.json").read_bytes()
    with pytest.raises(UserError, match="holds a run already; allowed: a new or empty folder, or --resume"):
        run_of(tmp_path, steps=1)
    assert (tmp_path / "run/summary.json").read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--out: .*other is not empty"):
        run_of(tmp_path, out=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"notes.txt is a file; allowed"):
        run_of(tmp_path, out=str(tmp_path / "other/notes.txt"))


def test_resuming_nothing_or_another_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--resume: .*run holds no run"):
        run_of(tmp_path, resume=True)
    run_of(tmp_path, steps=1)
    with pytest.raises(UserError, match="--resume: rank: the run has 2, got 4"):
        run_of(tmp_path, steps=1, resume=True, rank=4)
    for path in checkpoint.every(tmp_path / "run/checkpoints"):
        (path / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"no checkpoint can be used:\n.*step-000001: not a complete"):
        run_of(tmp_path, steps=1, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "nosuch"}, "unknown name 'nosuch'"),
        ({"data": "missing"}, "no such file or folder: missing"),
        ({"model": "missing/model/folder"}, "missing/model/folder"),
        ({"targets": "nosuch"}, "--targets: no linear layer named 'nosuch'"),
        ({"dev_examples": 0, "eval_every": 1}, "--eval-every: there are no dev examples"),
        ({"loss": "choice", "task": "lm", "data": None}, "task lm: a data file or folder is needed"),
        ({"tracker": "clearml"}, "--tracker: clearml is not installed here"),
    ],
)
def test_bad_input_leaves_no_folder_behind(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_of(tmp_path, **changes)
    assert not (tmp_path / "run").exists()


def test_data_without_test_examples_and_a_model_without_tokenizer_are_refused(tmp_path: Path) -> None:
    settings = short_run(tmp_path)
    data = tmp_path / "one.jsonl"
    data.write_text('{"text": "The day was fine.", "label": "good"}\n')
    with pytest.raises(UserError, match="data: 1 examples in train, of which 2 are to be held out"):
        fit(TrainConfig(**{**settings, "data": str(data)}))
    bare = tmp_path / "bare"
    shutil.copytree(Path(hz.__file__).parent / "demo", bare, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(UserError, match=r"--model: .*bare has no tokenizer files"):
        fit(TrainConfig(**{**settings, "model": str(bare)}))
    assert not (tmp_path / "run").exists()


def test_an_interrupted_continuation_has_no_result_of_an_earlier_end(tmp_path: Path) -> None:
    assert run_of(tmp_path, steps=2).summary["loss_after"] is not None
    stopped = run_of(tmp_path, After(4), steps=6, resume=True)
    assert (stopped.summary["steps"], stopped.summary["loss_after"]) == (4, None)
    again = run_of(tmp_path, steps=6, resume=True)
    assert again.summary["loss_after"] == again.after.loss if again.after else False


def test_the_package_offers_its_public_names_and_no_others() -> None:
    assert all(getattr(hz, name) is not None for name in hz.__all__)
    assert set(dir(hz)) == {*hz.__all__, "__version__"}
    with pytest.raises(AttributeError, match="module 'hizoo_lite' has no attribute 'nosuch'"):
        _ = hz.nosuch


def test_a_run_without_out_says_where_its_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = short_run(tmp_path / "given", steps=1)
    monkeypatch.chdir(tmp_path)
    said = f"no out was given: the run folder is {tmp_path / 'hizoo-run'}"
    fit(TrainConfig(**settings))
    assert said not in caplog.messages
    fit(TrainConfig(**{**settings, "out": None}))
    assert said in caplog.messages


def test_a_real_llama_is_tuned_from_python_and_its_adapter_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = stories()
    task, data = write_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    model = hz.load(source, bits="int8", device="cpu")
    run = hz.fit(
        model,
        task=str(task),
        data=str(data),
        space=hz.spaces.LoRA(rank=4, targets=["q_proj", "o_proj"]),
        estimator=hz.estimators.HiZOO(every=2, curvature_from="losses"),
        curvature=hz.curvature.NoCurvature(),
        steps=6,
        batch_size=4,
        max_length=64,
        dev_examples=0,
        lr=1e-2,
    )
    assert run.folder == Path("hizoo-run")
    assert run.summary["forward_passes"] == 3 * 3 + 3 * 2
    config = RunFolder(run.folder).config()
    assert (config.rank, config.targets, config.curvature_every) == (4, "q_proj,o_proj", 2)
    assert (config.bits, config.kind, config.curvature) == ("int8", "causal", "none")
    fresh = hz.load(source, bits="int8", device="cpu")
    space = attach_adapter(fresh, run.folder)
    assert same(space.parameters, dict(run.setup.space.parameters))
    assert next_free("hizoo-run") == Path("hizoo-run-2")


def test_a_completion_task_is_scored_on_what_the_model_writes(tmp_path: Path) -> None:
    data = tmp_path / "facts.jsonl"
    rows = [{"q": f"what is {i}", "a": f"number {i}"} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tmp_path / "facts.toml"
    task.write_text('name = "facts"\nkind = "completion"\nprompt = "{q}"\nanswer = " {a}"\nmetric = "f1"\n')
    run = run_of(tmp_path, task=str(task), data=str(data), steps=1)
    assert run.after is not None
    assert all(isinstance(text, str) for text in run.after.predictions)
    assert len(run.after.predictions) == run.summary["test_examples"]
    assert run.summary["metric"] == "f1"
    assert 0.0 <= run.summary["metric_after"] <= 1.0


def test_a_language_modelling_task_has_its_loss_as_metric(tmp_path: Path) -> None:
    data = tmp_path / "lines.jsonl"
    data.write_text("".join(json.dumps({"text": f"The day was {w}."}) + "\n" for w in "abcdefghijkl"))
    run = run_of(tmp_path, task="lm", data=str(data), steps=1)
    assert run.summary["metric"] == "loss"
    assert run.summary["metric_after"] == run.summary["loss_after"]


@pytest.mark.parametrize(
    ("field", "name"), [("space", "scales"), ("estimator", "mezo"), ("curvature", "diagonal")]
)
def test_fit_takes_names_where_it_takes_objects(field: str, name: str, tmp_path: Path) -> None:
    settings = short_run(tmp_path, steps=1, test_examples=2, lr=1e-3)
    run = fit(settings.pop("model"), **{**settings, field: name})
    assert run.summary[field] == name
    for wrong in (hz.spaces.LoRA, 3):
        with pytest.raises(UserError, match=rf"{field}: got .*, allowed: a name, or an object such as \w+\("):
            fit("embedded", **{field: wrong})
    with pytest.raises(UserError, match=rf"{field}.*'newton'.*allowed"):
        fit("embedded", task="embedded", **{field: "newton"})


def test_what_an_object_says_is_not_said_otherwise_by_an_option() -> None:
    two = {"task": "nosuch", "estimator": hz.estimators.HiZOO(directions=2)}
    for model in ("embedded", TrainConfig(model="embedded", task="nosuch")):
        with pytest.raises(UserError, match=r"directions: got 3, the object that was given has 2; say it"):
            fit(model, **two, directions=3)
        with pytest.raises(UserError, match="nosuch"):  # the same twice goes on to the next fault
            fit(model, **two, directions=2)


def test_mezo_takes_two_forwards_and_keeps_no_curvature(tmp_path: Path) -> None:
    run = run_of(tmp_path, estimator="mezo", lr=1e-3)
    assert run.summary["forward_passes"] == 12
    assert run.summary["curvature"] == "none"


def test_the_kind_of_a_model_is_read_from_its_architecture(tmp_path: Path) -> None:
    assert find_kind(stories(), None, None) == "causal"
    (tmp_path / "decoder").mkdir()
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    decoder = transformers.BertGenerationConfig(vocab_size=97, is_decoder=True, **tiny)
    transformers.BertGenerationDecoder(decoder).save_pretrained(tmp_path / "decoder")
    assert find_kind(str(tmp_path / "decoder"), None, None) == "causal"
    (tmp_path / "config.json").write_text('{"architectures": ["OddThing"]}')
    (tmp_path / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    with pytest.raises(UserError, match=r"--kind: the architecture 'OddThing' .* allowed: causal, masked"):
        find_kind(str(tmp_path), None, None)


def test_a_folder_without_an_adapter_and_an_unsupported_adapter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--adapter: got .* allowed: a run folder"):
        find_adapter(tmp_path)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "use_dora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = hz.load(stories(), bits="none", device="cpu")
    with pytest.raises(UserError, match=r"adapter_config.json: use_dora: got True, supported: False"):
        attach_adapter(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"r": 2}')
    with pytest.raises(UserError, match="no 'lora_alpha'; a LoRA adapter of PEFT has it"):
        attach_adapter(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config.json: not valid JSON"):
        attach_adapter(model, tmp_path)


def test_a_run_without_a_finite_result_fails_with_everything_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[Path] = []
    monkeypatch.setattr("hizoo_lite.run._report", lambda folder, _: reported.append(folder.path))
    with pytest.raises(TooManyBadSteps, match=r"after 2 steps the loss is nan, .*trained is saved in .*--lr"):
        run_of(tmp_path, model=str(nan_head(tmp_path)), steps=2)
    summary = RunFolder(tmp_path / "run").read_summary()
    assert (summary["steps"], summary["skipped_steps"], summary["loss_after"]) == (2, 2, None)
    assert reported == [tmp_path / "run"]


def test_a_run_that_skipped_every_step_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def skipping(self: Stepper, number: int, *batches: object) -> StepRecord:
        return step(self, number, *batches)._replace(skipped=True)

    step = Stepper.step
    monkeypatch.setattr(Stepper, "step", skipping)
    with pytest.raises(TooManyBadSteps, match="the losses of all 3 steps were not finite"):
        run_of(tmp_path, steps=3)


def test_the_peak_of_a_phase_is_its_own() -> None:
    if not process.reset_peak():
        pytest.skip("/proc/self/clear_refs cannot be written here")
    meter = PeakMeter()
    block = torch.ones(50_000_000)  # 200 MB, touched
    slack = 8_000_000  # the kernel counts pages in batches, a reading is off by up to a few MB
    high = meter.phase_bytes()
    del block
    meter.restart()
    assert high - meter.phase_bytes() > 100_000_000
    assert meter.overall_bytes() >= high - slack


def test_without_proc_the_resident_size_is_psutils(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = process.resident()
    monkeypatch.setattr(process, "_STATUS", tmp_path / "missing")
    monkeypatch.setattr(process, "_CLEAR_REFS", tmp_path / "missing/too")
    fallback = process.resident()
    assert fallback.peak_bytes is None
    assert fallback.total_bytes == pytest.approx(known.total_bytes, rel=0.05)  # other threads may allocate
    assert not process.reset_peak()
    assert PeakMeter().overall_bytes() > 0


def test_a_classifiers_head_is_trained_and_put_back(tmp_path: Path) -> None:
    run = run_of(tmp_path, model=stories(), kind="classifier", lr=1e-2)
    assert run.summary["kind"] == "classifier"
    space = run.setup.space
    parameters = {**space.exact, **space.parameters}
    assert any("lora" not in name for name in parameters)
    fresh = hz.load(stories(), kind="classifier", device="cpu")
    again = attach_adapter(fresh, run.folder)
    assert same({**again.exact, **again.parameters}, parameters)


def test_the_tracker_gets_losses_and_evaluations(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_of(tmp_path, tracker="tensorboard")
    events = EventAccumulator(str(run.folder / "hizoo_lite"))
    events.Reload()
    assert len(events.Scalars("train/loss")) == 6
    after = events.Scalars("after/loss")[0].value
    assert after == pytest.approx(run.summary["loss_after"], rel=1e-6)  # stored as float32
    documented = set(re.findall(r"`(\w+/\w+)`", (hz.config.DEMO.parent / "docs" / "runs.md").read_text()))
    assert set(events.Tags()["scalars"]) <= documented


@pytest.mark.parametrize(
    ("tracker", "named", "wanted"),
    [
        ("wandb", None, {"wandb": {"name": "mine"}}),
        ("mlflow", "again", {"mlflow": {"run_name": "again"}}),
        ("tensorboard", "again", {}),
    ],
)
def test_a_tracker_calls_a_run_as_its_folder_or_as_it_is_told(
    tracker: Any, named: str | None, wanted: dict[str, Any]
) -> None:
    told = []

    class Accelerator:
        def init_trackers(self, project: str, config: dict[str, Any], init_kwargs: dict[str, Any]) -> None:
            told.append((project, init_kwargs))

    config = TrainConfig(
        model="embedded", task="embedded", data="embedded", tracker=tracker, run_name=named, out="runs/mine"
    )
    _start_tracker(Accelerator(), config)  # type: ignore[arg-type]
    assert told == [("hizoo_lite", wanted)]


def test_one_step_is_one_in_a_runs_line() -> None:
    scores = {"metric": "loss", "metric_before": 2.0, "metric_after": 1.0}
    run = SimpleNamespace(folder="runs/a", summary={"steps": 1, **scores}, interrupted=False)
    assert Run.__repr__(run) == "Run(runs/a: 1 step, loss 2.0000 -> 1.0000)"  # type: ignore[arg-type]
