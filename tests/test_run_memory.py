"""What bounds the memory of a run: a profile, flags, a TOML file, `load`; plans count what is really done."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner

import hizoo_lite as hz
from hizoo_lite.batch import Batch
from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.cli import app
from hizoo_lite.config import TrainConfig
from hizoo_lite.engine.budget import Budget
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import BudgetError, UserError
from hizoo_lite.export.quantize import Quantization
from hizoo_lite.memory.limits import Budgets
from hizoo_lite.memory.peak import PeakMeter
from hizoo_lite.model import kinds
from hizoo_lite.model.model import Model
from hizoo_lite.plan import hardware, planner
from hizoo_lite.plan.workload import Demand, Workload, cache_bytes
from hizoo_lite.run import Run, fit
from hizoo_lite.tasks import Encoder
from hizoo_lite.train import components, loop, planning, setup
from hizoo_lite.train.config_file import read, resolve
from hizoo_lite.train.resolved import Resolved
from tests.run_fixtures import flags, short_run

GIB = 2**30
MACHINE = """name = "A small box"
device = "cpu"
device_memory = "6GiB"
device_reserved = "4GiB"
device_bandwidth = "20GB"
disk = "1GB"
batch_size = 3

[operations]
float32 = 100e9
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A profile of 2 GiB that takes batches of three."""
    path = tmp_path / "box.toml"
    path.write_text(MACHINE)
    return path


def train(settings: dict[str, Any], *more: str) -> tuple[dict[str, Any], dict[str, Any], TrainConfig]:
    """(summary, plan, resolved configuration) of a run through the command line."""
    found = CliRunner().invoke(app, ["train", "--json", "--quiet", *flags(settings), *more])
    assert found.exit_code == 0, found.output
    folder = Path(settings["out"])
    plan = json.loads((folder / "plan.json").read_text())
    return json.loads(found.stdout), plan, read(folder / "config.toml")


def without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


# --------------------------------------------------------------------------------------------- profiles


def test_train_takes_budget_batch_and_rates_of_a_profile(machine: Path, tmp_path: Path) -> None:
    settings = without(short_run(tmp_path, steps=2), "batch_size", "device")
    summary, plan, config = train(settings, "--profile", str(machine))
    assert summary["budget_bytes"] == plan["budget_bytes"] == plan["device_budget_bytes"] == 2 * GIB
    assert (plan["profile"], summary["profile"]) == (str(machine), str(machine))
    assert (config.device_budget, config.batch_size, config.device) == (f"{2 * GIB}B", 3, "cpu")
    assert plan["batch_size"] == 3
    assert plan["gives_back"]
    assert plan["seconds_lower_bound"] > 0
    machine.unlink()  # a run is complete in itself
    assert CliRunner().invoke(app, ["eval", "--adapter", settings["out"], "--json"]).exit_code == 0


def test_a_shipped_profile_is_found_by_name(tmp_path: Path) -> None:
    settings = without(short_run(tmp_path, steps=1), "batch_size")
    summary, plan, config = train(settings, "--profile", "laptop-16gb-cpu")
    assert summary["budget_bytes"] == 12 * GIB
    assert plan["profile"] == config.profile == "laptop-16gb-cpu"
    assert config.batch_size == 8


def test_flags_count_before_the_file_and_this_before_the_profile(machine: Path, tmp_path: Path) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text(f'profile = "{machine}"\ndevice_budget = "3GiB"\nbatch_size = 16\nresidency = "auto"\n')
    values = {"model": "m", "task": "sst2"}
    config = resolve(str(toml), values)
    assert (config.device_budget, config.batch_size) == ("3GiB", 16)  # the default, but said
    config = resolve(str(toml), {**values, "device_budget": "4GiB", "batch_size": "5"})
    assert (config.device_budget, config.batch_size) == ("4GiB", 5)
    toml.write_text("batch_size = 7\n")
    config = resolve(str(toml), {**values, "profile": str(machine)})
    assert (config.device_budget, config.batch_size) == (f"{2 * GIB}B", 7)
    # on a CPU there is one memory: who limits the host has given its budget
    config = resolve(None, {**values, "profile": str(machine), "host_budget": "5GiB"})
    assert (config.device_budget, config.host_budget) == (None, "5GiB")


def test_a_gpu_profile_has_two_budgets() -> None:
    card = hardware.find("rtx4090-24gb")
    found = card.settings({"host_budget"})
    assert found["device_budget"] == f"{card.device_budget_bytes}B"
    assert "host_budget" not in found
    assert "device" not in found
    assert card.settings({})["host_budget"] == f"{card.host_budget_bytes}B"


def test_the_rates_of_another_kind_of_machine_do_not_count(tmp_path: Path) -> None:
    _, plan, _ = train(short_run(tmp_path, steps=1), "--profile", "rtx4090-24gb")  # with --device cpu
    card = hardware.find("rtx4090-24gb")
    assert card.host_budget_bytes is not None
    assert plan["budget_bytes"] == min(card.device_budget_bytes, card.host_budget_bytes)
    assert plan["seconds_lower_bound"] is None
    assert plan["device"] == "cpu"


def test_the_budget_of_a_profile_is_enforced(machine: Path, tmp_path: Path) -> None:
    machine.write_text(MACHINE.replace("6GiB", "4100MiB"))
    found = CliRunner().invoke(app, ["train", *flags(short_run(tmp_path)), "--profile", str(machine)])
    assert found.exit_code == 3
    assert "--device-budget: got 4.00 MiB" in found.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", "eval", "generate"])
def test_a_profile_that_is_not_there_is_refused_with_those_that_are(command: str, tmp_path: Path) -> None:
    more = {
        "train": flags(short_run(tmp_path)),
        "eval": ["--model", "embedded", "--task", "embedded", "--data", "embedded"],
        "generate": ["--model", "embedded", "--prompt", "The"],
    }[command]
    found = CliRunner().invoke(app, [command, *more, "--profile", "rtx9090"])
    assert found.exit_code == 2
    assert "--profile: got 'rtx9090', which is no file" in found.stderr
    assert "laptop-16gb-cpu" in found.stderr
    assert not (tmp_path / "run").exists()


def test_a_wrong_profile_is_told_with_the_other_problems(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)2 problems.*--profile: got 'none'.*--steps: got 0"):
        resolve(None, {"model": "m", "task": "sst2", "profile": "none", "steps": "0"})


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_eval_and_generate_take_a_profile(command: str, machine: Path, monkeypatch: Any) -> None:
    seen: list[dict[str, Any]] = []
    plain = hz.load

    def watched(source: str, **options: Any) -> Model:
        seen.append(options)
        return plain(source, **options)

    monkeypatch.setattr("hizoo_lite.train.saved.load", watched)
    monkeypatch.setattr("hizoo_lite.train.resolved.load", watched)
    more = {
        "eval": ["--task", "embedded", "--data", "embedded", "--examples", "2"],
        "generate": ["--prompt", "The soup", "--max-new-tokens", "2"],
    }[command]
    call = [command, "--model", "embedded", *more, "--json", "--profile", str(machine)]
    for given in ([], ["--device-budget", "3GiB"]):
        found = CliRunner().invoke(app, [*call, *given])
        assert found.exit_code == 0, found.output
    assert [options["device_budget"] for options in seen] == [f"{2 * GIB}B", "3GiB"]


def test_eval_keeps_to_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    call = ["eval", "--model", "embedded", "--task", "embedded", "--data", "embedded", "--examples", "8"]
    found = CliRunner().invoke(app, [*call, "--device-budget", "4MiB"])
    assert found.exit_code == 3
    assert "--device-budget: got 4.00 MiB" in found.stderr
    calls = 0
    plain = Traversal._losses

    def first_refused(self: Traversal, *args: object) -> object:
        nonlocal calls
        calls += 1
        if calls <= 3:  # the system's limit may be set anew first
            raise MemoryError
        return plain(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Traversal, "_losses", first_refused)
    found = CliRunner().invoke(app, [*call, "--device-budget", "2GiB", "--json", "--quiet"])
    assert found.exit_code == 0
    assert "memory ran out: going on with smaller chunks" in found.stderr
    assert json.loads(found.stdout)["examples"] == 8

    def never(*args: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr("hizoo_lite.train.resolved.load", never)
    found = CliRunner().invoke(app, [*call, "--device-budget", "2GiB"])
    assert found.exit_code == 3
    assert "memory ran out while the model was loaded" in found.stderr


def test_fit_takes_a_profile(machine: Path, tmp_path: Path) -> None:
    settings = without(short_run(tmp_path, steps=1), "model", "batch_size")
    config = fit("embedded", profile=str(machine), **settings).setup.config
    assert (config.device_budget, config.batch_size) == (f"{2 * GIB}B", 3)
    made = TrainConfig(**short_run(tmp_path, steps=1, out=str(tmp_path / "b"), profile=str(machine)))
    config = fit(made).setup.config
    assert (config.device_budget, config.batch_size) == (f"{2 * GIB}B", 4)


# ------------------------------------------------------------------------------------- budgets of load


def test_a_run_has_the_budgets_of_load_unless_it_gets_its_own(tmp_path: Path) -> None:
    model = hz.load(kinds.model_path("embedded"), device="cpu", device_budget="3GiB", host_budget=2 * GIB)
    settings = without(short_run(tmp_path, steps=1), "model", "device")
    run = fit(model, **settings)
    plan = json.loads((run.folder / "plan.json").read_text())
    assert (run.setup.config.device_budget, run.setup.config.host_budget) == ("3GiB", f"{2 * GIB}B")
    assert run.summary["budget_bytes"] == plan["budget_bytes"] == 2 * GIB  # the smaller, on a CPU
    run.setup.space.detach()
    own = fit(model, **{**settings, "out": str(tmp_path / "own")}, host_budget="1900MiB")
    assert own.summary["budget_bytes"] == 1900 << 20
    own.setup.space.detach()
    with pytest.raises(BudgetError, match=r"got 5\.00 MiB"):
        fit(model, **{**settings, "out": str(tmp_path / "small")}, device_budget="5MiB")


def test_a_loaded_model_keeps_its_residency(tmp_path: Path) -> None:
    Quantization(kinds.model_path("embedded"), tmp_path / "nf4", kind="causal", bits="nf4").run()
    model = hz.load(tmp_path / "nf4", device="cpu", residency="disk")
    settings = without(short_run(tmp_path, steps=1), "model", "device")
    with pytest.raises(UserError, match=r"residency: got 'resident', but the model was loaded.* disk"):
        fit(model, **settings, residency="resident")
    run = fit(model, **settings, residency="disk")
    plan = json.loads((run.folder / "plan.json").read_text())
    assert run.setup.config.residency == run.summary["residency"] == plan["residency"] == "disk"


def test_a_resident_model_is_planned_as_one(tmp_path: Path) -> None:
    model = hz.load(kinds.model_path("embedded"), device="cpu")
    run = fit(model, **without(short_run(tmp_path, steps=1), "model", "device"), device_budget="3GiB")
    plan = json.loads((run.folder / "plan.json").read_text())
    assert plan["residency"] == run.summary["residency"] == "resident"
    assert plan["gives_back"]
    assert run.summary["budget_bytes"] == 3 * GIB


# --------------------------------------------------------------------------------- what the examples make


def written_task(folder: Path, kind: str, **changes: Any) -> dict[str, Any]:
    """Settings of a run on a task whose evaluation makes more than its training: rows, or a cache."""
    settings = short_run(folder, **changes)
    rows = {
        "choice": [{"text": f"Day {n} was here.", "label": ("good", "bad")[n % 2]} for n in range(24)],
        "completion": [{"text": f"Number {n}:", "answer": f"{n} and " * (n % 3 + 1)} for n in range(24)],
    }[kind]
    for split, part in (("train", rows[:16]), ("test", rows[16:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / "data" / f"{split}.jsonl").write_text(text)
    task = {
        "choice": 'prompt = "{text} So"\nlabel_field = "label"\n[answers]\n'
        'bad = " it was not at all good"\ngood = " it was really quite lovely"\n',
        "completion": 'prompt = "{text}"\nanswer = "{answer}"\n',
    }[kind]
    Path(settings["task"]).write_text(f'name = "moods"\nkind = "{kind}"\n{task}')
    return settings


@pytest.mark.parametrize("kind", ["choice", "completion"])
def test_no_batch_of_a_run_is_larger_than_its_plan_counts(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = written_task(tmp_path, kind, loss="answer", max_length=64, eval_every=3)
    config = TrainConfig(**settings)
    task = components.find_task(config.task)
    resolved = Resolved(config, task)
    encoder = planning.find_encoder(resolved)
    _, workload = setup.planned(resolved, components.make_splits(config, task), encoder)
    made: list[Batch] = []
    plain, encode = Encoder.collate, Encoder.encode

    def watched(self: Encoder, encoded: Any) -> Batch:
        batch = plain(self, encoded)
        made.append(batch)
        return batch

    def noted(self: Encoder, example: Any, *, training: bool) -> Any:
        found = encode(self, example, training=training)
        each = workload.training if training else workload.evaluation
        assert len(found.rows) <= each.rows
        assert len(found.sites) <= each.sites
        return found

    monkeypatch.setattr(Encoder, "collate", watched)
    monkeypatch.setattr(Encoder, "encode", noted)
    run = fit(config)
    assert workload.training.rows == 1
    assert workload.evaluation.rows == (2 if kind == "choice" else 1)
    assert workload.length is not None
    widest = max(batch.input_ids.shape[1] for batch in made)
    assert widest <= workload.length <= widest + 1
    most = max(batch.input_ids.shape[0] for batch in made)
    assert most == workload.evaluation.rows * 4
    assert (workload.written > 0) == (kind == "completion")
    assert run.setup.plan is not None
    assert run.setup.plan.max_length == workload.length < 64


def test_rows_and_a_cache_of_evaluations_are_planned() -> None:
    config = TrainConfig(
        model="embedded",
        task="sst2",
        device="cpu",
        compute_dtype="float32",
        batch_size=4,
        eval_batch_size=512,
    )
    checkpoint = Checkpoint.open(kinds.model_path("embedded"))

    def planned(workload: Workload) -> Any:
        return planner.plan_run(config, checkpoint, "causal", workload, framework=1 << 20)

    one, four = Demand(1, 1), Demand(4, 12)
    plain, more = planned(Workload(one, one, 40)), planned(Workload(one, four, 40))
    written = planned(Workload(one, four, 40, written=48))
    assert plain.peak_bytes < more.peak_bytes
    categories = written.ledger.device
    assert categories["cache"] == cache_bytes(planner_config(), 512, 48)
    assert written.peak_bytes > more.peak_bytes
    assert planned(Workload(one, four, 20)).peak_bytes < more.peak_bytes


def planner_config() -> Any:
    return hz.load(kinds.model_path("embedded"), device="cpu").config


def test_a_cache_holds_what_transformers_holds() -> None:
    model = hz.load(kinds.model_path("embedded"), device="cpu")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.module(input_ids=torch.ones(2, 7, dtype=torch.int64), past_key_values=cache)
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    layers = model.config.num_hidden_layers
    assert cache_bytes(model.config, 2, 7) == held * (layers + 1) // layers


def test_of_many_examples_the_first_are_encoded_and_the_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(**written_task(tmp_path, "choice", loss="choice", max_length=64))
    task = components.find_task(config.task)
    splits = components.make_splits(config, task)
    encoder = planning.find_encoder(Resolved(config, task))
    assert encoder is not None
    whole = planning.workload(encoder, splits, config)
    assert whole.length is not None
    assert whole.length < 64
    monkeypatch.setattr(planning, "MOST_ENCODED", 1)
    part = planning.workload(encoder, splits, config)
    assert part.length == 64
    assert part.evaluation.rows >= whole.evaluation.rows
    assert part.training.rows == 2
    odd = splits.train[0]._replace(answers=(" a", " b c", " d", " e f", " g"))
    with_odd = replace(splits, train=[*splits.train, odd])
    assert planning.workload(encoder, with_odd, config).training.rows == 5
    shorter = replace(splits, train=splits.train[:1], test=splits.test[:1])
    assert planning.workload(encoder, shorter, config).length != 64


def test_what_an_evaluation_on_dev_leaves_in_the_heap_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    restart, evaluate = PeakMeter.restart, loop.evaluate
    monkeypatch.setattr(PeakMeter, "restart", lambda self: (events.append("given back"), restart(self))[1])
    monkeypatch.setattr(loop, "evaluate", lambda *a, **k: (events.append("evaluated"), evaluate(*a, **k))[1])
    fit(TrainConfig(**short_run(tmp_path, eval_every=3)))
    assert events[-3:] == ["evaluated", "given back", "evaluated"]  # on dev, and after the run


# --------------------------------------------------------------------------------- host memory of a GPU


def test_a_host_peak_over_its_budget_makes_chunks_smaller() -> None:
    model = hz.load(kinds.model_path("embedded"), device="cpu")
    told: list[str] = []
    budget = Budget(Budgets(1000, 100), model, told.append)
    budget.check(900)
    budget.check(900, 100)
    assert (model.chunk_halvings, told) == (0, [])
    budget.check(900, 101)
    assert (model.chunk_halvings, budget.retries) == (1, 1)
    assert "on the host was over its budget" in told[0]


def test_only_a_gpu_has_a_host_of_its_own() -> None:
    assert PeakMeter(torch.device("cpu")).host_lap_bytes() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_cuda_the_hosts_peak_is_held_against_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = PeakMeter(torch.device("cuda"))
    before = meter.host_lap_bytes()
    held = torch.ones(200 << 20, dtype=torch.uint8)
    after = meter.host_lap_bytes()
    assert before is not None
    assert after is not None
    assert after - before > 150 << 20
    del held
    monkeypatch.setattr(PeakMeter, "host_lap_bytes", lambda self: 33 * GIB)
    run: Run = fit(replace(TrainConfig(**short_run(tmp_path)), device="cuda", host_budget="32GiB"))
    assert run.summary["memory_retries"] > 0


def test_a_finished_run_that_is_resumed_keeps_the_peaks_of_its_steps(tmp_path: Path) -> None:
    settings = TrainConfig(**short_run(tmp_path, steps=2))
    first = fit(settings).summary
    names = ("inference_peak_bytes", "training_peak_bytes", "training_over_inference")
    assert all(first[name] for name in names)
    again = fit(replace(settings, resume=True)).summary
    assert [again[name] for name in names] == [first[name] for name in names]
