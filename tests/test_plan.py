"""The planner: what it predicts is what live objects hold and what a pass makes; what fits, fits."""

from __future__ import annotations

import json
import re
import types
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import make_random_model
import pytest
import torch
from typer.testing import CliRunner

from hizoo_lite import tasks
from hizoo_lite.batch import Batch
from hizoo_lite.branches import EVALUATION, Branches
from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.checkpoints.writer import Form
from hizoo_lite.cli import app
from hizoo_lite.config import TrainConfig
from hizoo_lite.curvature import CURVATURES
from hizoo_lite.device import meta_as
from hizoo_lite.engine.load import load
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import UserError
from hizoo_lite.export.shards import Linear, linear_forms
from hizoo_lite.model import build
from hizoo_lite.noise import generator
from hizoo_lite.plan import ledger, meter, planner
from hizoo_lite.plan.dry_run import DryRun, Pass, Source, pass_bytes
from hizoo_lite.plan.inventory import Inventory
from hizoo_lite.plan.meter import KernelMemory, MemoryMeter
from hizoo_lite.plan.plan import Plan
from hizoo_lite.plan.planner import CannotPlan
from hizoo_lite.plan.workload import ONE_ROW, Workload
from hizoo_lite.run import fit
from hizoo_lite.spaces import SPACES
from hizoo_lite.tensors import TorchArrays
from hizoo_lite.train import components, planning
from hizoo_lite.train.resolved import Resolved
from tests.architectures import MAX_POSITIONS, TINY_CONFIGS, save_tiny
from tests.tables import covering

FRAMEWORK = 300 << 20
EXACT = ("embeddings_and_head", "resident_blocks", "block_slots", "adapters", "curvature", "small_parameters")


def answer_batch(vocabulary: int, rows: int, length: int) -> Batch:
    """A label at the end of every row."""
    ids = torch.from_numpy(generator(0, "ids").integers(5, vocabulary, (rows, length)))
    one = torch.arange(rows)
    last = torch.full((rows,), length - 2)
    return Batch(ids, torch.ones_like(ids), None, one, last, one, ids[:, -1], one, one, one, "answer")


def config_of(folder: Path, **changes: Any) -> TrainConfig:
    chosen = {"device": "cpu", "compute_dtype": "float32", "batch_size": 4, "max_length": 16, "rank": 2}
    return TrainConfig(model=str(folder), task="sst2", **{**chosen, "eval_batch_size": 4, **changes})


def planned(folder: Path, kind: Any = "causal", **changes: Any) -> Plan:
    config = config_of(folder, **changes)
    return planner.plan_run(config, Checkpoint.open(folder), kind, framework=FRAMEWORK)


def live(config: TrainConfig, kind: Any) -> Any:
    """The parts of a run that hold memory, after two steps."""
    model = load(
        config.model, kind=kind, bits=config.bits, device="cpu", compute_dtype="float32",
        double_quant=config.double_quant and config.space == "lora", residency=config.residency,
    )  # fmt: skip
    space = SPACES.configured(config)
    space.attach(model, seed=0)
    stepper = components.make_stepper(config, Traversal(model), TorchArrays(model.device), space)
    batch = answer_batch(model.config.vocab_size, rows=4, length=16)
    for step in range(2):
        stepper.step(step, batch)
    stepper.close()
    return SimpleNamespace(model=model, space=space, stepper=stepper)


@pytest.fixture(scope="module")
def streamable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized checkpoint with matrices that stay away, and more blocks than slots."""
    out = tmp_path_factory.mktemp("random") / "model"
    small = {"vocab_size": 2000, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    make_random_model.make(
        "tinyllama-1.1b", out, double_quant=False, layers=3, overrides={**small, "intermediate_size": 256}
    )
    return out


# ------------------------------------------------------------------------------- what is held


@pytest.mark.parametrize(
    ("name", "bits"),
    covering(
        ("llama", "qwen2", "gemma2", "phi3", "opt", "gpt_neox", "gpt2"),
        ("nf4", "int8", "none"),
    ),
)
def test_predicted_owners_equal_the_bytes_of_live_objects(name: str, bits: Any, tmp_path: Path) -> None:
    save_tiny(name, tmp_path, dtype=torch.bfloat16)
    config = config_of(tmp_path, bits=bits, targets="all-linear")
    check_owners(planned(tmp_path, bits=bits, targets="all-linear"), live(config, "causal"))


@pytest.mark.parametrize(
    "changes",
    [
        {"space": "dense", "dense_update": "residual"},
        {"space": "dense"},
        {"space": "scales"},
        {"space": "dense", "curvature": "factored"},
        {"curvature": "diagonal"},
        {"curvature": "none"},
        {"curvature_per": "row"},
        {"estimator": "mezo", "lr": 1e-6},
        {"residency": "disk"},
        {"residency": "host"},
        {"residency": "disk", "space": "dense", "dense_update": "residual"},
    ],
    ids=str,
)
def test_every_space_curvature_and_residency_is_counted(changes: dict[str, Any], streamable: Path) -> None:
    check_owners(planned(streamable, **changes), live(config_of(streamable, **changes), "causal"))


def check_owners(plan: Plan, parts: Any) -> None:
    measured = ledger.measure(parts.model, parts.space, parts.stepper.curvature, parts.stepper.head)
    found = {category: measured.device.get(category, 0) for category in EXACT}
    assert {category: plan.ledger.device.get(category, 0) for category in EXACT} == found
    parts.model.residency.close()


# ------------------------------------------------------------------------------ what a pass makes


@pytest.mark.parametrize(
    ("name", "branches"),
    covering(
        ("llama", "opt", "gpt2", "gemma2"),
        (Branches.of(), Branches.of(base=False), Branches.of(pairs=0, one_sided=2), EVALUATION),
    ),
)
def test_a_dry_run_makes_the_tensors_of_a_real_pass(name: str, branches: Branches, tmp_path: Path) -> None:
    save_tiny(name, tmp_path, dtype=torch.bfloat16)
    config = config_of(tmp_path, targets="all-linear", blocks="all")
    trains = branches.count > 1
    rows, length = 4, 48
    model = load(tmp_path, bits="nf4", device="cpu", compute_dtype="bf16")
    directions = {}
    if trains:
        space = SPACES.configured(config)
        space.attach(model, seed=0)
        along = (branches.directions,)
        directions = {key: torch.zeros(along + value.shape) for key, value in space.parameters.items()}
    batch = answer_batch(model.config.vocab_size, rows=rows, length=length)
    batch.attention_mask[-1, length // 2 :] = 0
    traversal = Traversal(model)
    traversal.losses(batch, branches, 1e-3, directions)  # scratch is there from now on
    scratch = sum(buffer.numel() for buffer in model.scratch._buffers.values())
    with MemoryMeter() as real, KernelMemory():
        traversal.losses(batch, branches, 1e-3, directions)
    dry = dry_run(tmp_path, SPACES.configured(config) if trains else None)
    made = dry.run(Pass(rows, length, branches, rows))
    assert sum(made.scratch.values()) == scratch
    assert made.peak_bytes - scratch == pytest.approx(real.peak_bytes, rel=0.03)


def dry_run(folder: Path, space: Any, bits: Any = "nf4", below: int = 0) -> DryRun:
    config = build.read_config(folder, "causal", 2)
    inventory = Inventory.of(Checkpoint.open(folder))
    source = Source(
        inventory, config, "causal", bits, space is None or space.name == "lora", torch.bfloat16, "cpu"
    )
    module, curvature = build.build(config, "causal"), CURVATURES.make("none")
    return DryRun(source, "resident", module, space, curvature, below=below)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_operations_make_again_what_they_made(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every form torch is asked once: the plan is the one where it is asked every time."""
    save_tiny(name, tmp_path)
    space = SPACES.configured(config_of(tmp_path, targets="all-linear", blocks="all"))
    branches = Branches.of()
    found = [dry_run(tmp_path, space).run(Pass(4, 48, branches, 4)) for _ in range(2)]
    monkeypatch.setattr(meter, "_form", lambda value: None)
    assert found == [dry_run(tmp_path, space).run(Pass(4, 48, branches, 4))] * 2


def test_what_an_operation_makes_depends_on_the_default_dtype() -> None:
    numbers = torch.empty(3, dtype=torch.int64, device="meta")
    with MemoryMeter():
        assert {(numbers / 2).dtype, torch.ones(2, device="meta").dtype} == {torch.float32}
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert {(numbers / 2).dtype, torch.ones(2, device="meta").dtype} == {torch.bfloat16}
        finally:
            torch.set_default_dtype(torch.float32)


class Marked(torch.Tensor):
    """A tensor whose operations make tensors of its kind."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, of: torch.Tensor) -> Marked:
        found = torch.Tensor._make_wrapper_subclass(cls, of.shape, dtype=of.dtype, device=of.device)
        found.of = of
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Marked(func(*(each.of if isinstance(each, cls) else each for each in args), **(kwargs or {})))


def test_a_subclass_makes_its_own_tensors() -> None:
    plain = torch.empty(3, 5, device="meta")
    marked = Marked(torch.empty(3, 5, device="meta"))
    with MemoryMeter():
        assert type(torch.mul(plain, plain)) is torch.Tensor
        assert type(torch.mul(marked, plain)) is Marked


def test_forms_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "_MOST", 8)
    monkeypatch.setattr(meter, "_MADE", {})
    with MemoryMeter():
        for length in range(1, 30):
            assert torch.ones(length, device="meta").mul(2).shape == (length,)
    assert 0 < len(meter._MADE) <= 8


@pytest.mark.parametrize(
    ("name", "count"),
    covering(("llama", "opt", "gpt2", "gemma2"), (EVALUATION, Branches.of(one_sided=2, pairs=0))),
)
def test_a_dry_run_with_hidden_states_makes_the_tensors_of_a_real_pass(
    name: str, count: Branches, tmp_path: Path
) -> None:
    save_tiny(name, tmp_path, dtype=torch.bfloat16, num_hidden_layers=4)
    rows, length, config = 4, 48, config_of(tmp_path, blocks=2)
    model = load(tmp_path, bits="nf4", device="cpu", compute_dtype="bf16")
    space = SPACES.configured(config)
    space.attach(model, seed=0)
    directions = {k: torch.zeros(count.directions, *v.shape) for k, v in space.parameters.items()}
    batch, traversal = answer_batch(model.config.vocab_size, rows=rows, length=length), Traversal(model)
    batch.attention_mask[-1, -1:] = 0
    traversal.losses(batch)
    held = batch._replace(hidden=torch.from_numpy(traversal.hidden_states(batch, 2)))
    traversal.losses(held, count, 1e-3, directions)
    scratch = sum(buffer.numel() for buffer in model.scratch._buffers.values())
    with MemoryMeter() as real, KernelMemory():
        traversal.losses(held, count, 1e-3, directions)
    dry = dry_run(tmp_path, space, below=1)
    made = dry.run(Pass(rows, length, count, rows))
    assert dry.features == held.hidden.shape[-1]
    assert sum(made.scratch.values()) == scratch
    assert made.peak_bytes - scratch == pytest.approx(real.peak_bytes, rel=0.03)


def test_hidden_states_are_planned_where_a_run_keeps_them(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "llama", num_hidden_layers=4)
    each: dict[str, Any] = {"train_examples": 10, "steps": 5, "blocks": 2}
    workload = Workload(examples=10, tokens=70)

    def found(folder: str, workload: Workload = ONE_ROW, **changes: Any) -> Plan:
        config = config_of(tmp_path / folder, **{**each, **changes})
        return planner.plan_run(
            config, Checkpoint.open(config.model), "causal", workload, framework=FRAMEWORK
        )

    kept, known = found("llama"), found("llama", workload)
    features = known.ledger.disk["hidden_states"] // (70 * 4)
    assert kept.ledger.disk["hidden_states"] == 10 * 16 * features * 4
    assert "10 training examples, each as long as the longest, 16 tokens" in kept.assumed[0]
    assert known.assumed == ()
    many = found("llama", batch_size=2000)
    assert many.ledger.device["batch_states"] == 2000 * 16 * features * 4
    for without in (
        found("llama", steps=4),
        found("llama", train_examples=11),
        found("llama", hidden_states="off"),
        found("llama", blocks="all"),
        found("llama", space="dense", blocks="auto"),
    ):
        assert without.ledger.disk.get("hidden_states", 0) == 0
        assert without.assumed == ()
    save_tiny("gemma4", tmp_path / "gemma4", num_hidden_layers=4)
    assert not found("gemma4").ledger.to_json()["disk"]  # it reads what lower blocks give


@pytest.mark.parametrize("name", [n for n, tiny in TINY_CONFIGS.items() if tiny.kind == "masked"])
@pytest.mark.parametrize("kind", ["masked", "classifier"])
def test_encoders_and_classifiers_can_be_planned(name: str, kind: Any, tmp_path: Path) -> None:
    save_tiny(name, tmp_path, dtype=torch.bfloat16)
    plan = planned(tmp_path, kind)
    assert plan.fits
    assert plan.ledger.device["adapters"] > 0
    assert plan.peaks["attention"] > 0


def test_more_branches_rows_and_tokens_make_more(streamable: Path) -> None:
    model = load(streamable, device="cpu")
    sizes = [
        pass_bytes(model, rows, length, branches)
        for rows, length, branches in (
            (2, 16, EVALUATION),
            (2, 16, Branches.of(base=False)),
            (2, 16, Branches.of()),
            (4, 16, Branches.of()),
            (4, 64, Branches.of()),
        )
    ]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize(
    ("bits", "update"), covering(("nf4", "fp4", "int8", "none"), ("residual", "requantize"))
)
def test_an_update_is_planned_with_the_bytes_that_it_makes(bits: Any, update: Any, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, dtype=torch.bfloat16)
    config = config_of(tmp_path, space="dense", dense_update=update)
    model = load(tmp_path, bits=bits, device="cpu", compute_dtype="bf16", double_quant=False)
    space: Any = SPACES.configured(config)
    space.attach(model, seed=0)
    update_bytes(space)  # scratch is there from now on
    made = update_bytes(space)
    dry = dry_run(tmp_path, SPACES.configured(config), bits)
    planned = dry.run(Pass(1, 4, Branches.of(), 1))
    scratch = {name: buffer.nbytes for (name, _), buffer in model.scratch._buffers.items()}
    assert {name: planned.scratch[name] for name in scratch} == scratch
    assert planned.peaks["update"] > made  # it is made while a pass runs
    with meta_as("cpu"):
        assert update_bytes(dry.space) == made


def update_bytes(space: Any) -> int:
    """What the update of the first block makes, beside reused buffers."""
    curvature = CURVATURES.make("none")
    curvature.start(space.weights.shapes, TorchArrays())
    space.weights.drop()
    space.weights.begin(0, 0, curvature, measured=False)
    space.weights.update(1e-4, 0.1)
    with torch.no_grad(), MemoryMeter() as meter:
        assert space.weights.apply(0)
    return meter.peak_bytes


# ---------------------------------------------------------------------------------- what fits


@pytest.mark.parametrize("residency", [pytest.param("resident", marks=pytest.mark.grid), "disk"])
def test_a_budget_of_the_peak_fits_and_one_byte_less_does_not(residency: Any, streamable: Path) -> None:
    large: Any = {"residency": residency, "batch_size": 16, "max_length": 256}
    usual = planned(streamable, device_budget="100GiB", **large)
    least = planned(streamable, device_budget="1MiB", **large)  # refused, in the chunks that take the least
    same = planned(streamable, device_budget=f"{least.peak_bytes}B", **large)
    less = planned(streamable, device_budget=f"{least.peak_bytes - 1}B", **large)
    assert usual.fits
    assert not usual.chunk_halvings
    assert least.peak_bytes < usual.peak_bytes
    assert same.fits
    assert same.peak_bytes == least.peak_bytes
    assert not less.fits
    assert less.nearest is not None
    assert less.nearest.fits
    assert less.nearest.peak_bytes < least.peak_bytes


def test_chunks_are_halved_no_more_than_the_budget_asks_for(streamable: Path) -> None:
    large: Any = {"residency": "resident", "batch_size": 16, "max_length": 256}
    usual = planned(streamable, device_budget="100GiB", **large)
    once = planned(streamable, device_budget=f"{usual.peak_bytes - 1}B", **large)
    assert once.fits
    assert once.chunk_halvings == 1
    assert "chunks 1/2 of the usual" in once.settings()


def test_blocks_stream_from_disk_where_they_do_not_fit_and_stay_where_they_do(streamable: Path) -> None:
    resident = planned(streamable, device_budget="100GiB")
    assert (resident.residency, resident.blocks_on_device) == ("resident", 3)
    few = planned(streamable, device_budget=f"{resident.peak_bytes - 1}B")
    assert few.residency == "disk"
    assert few.fits
    assert few.peak_bytes < resident.peak_bytes
    assert "resident needs" in few.why


def test_nothing_fits_into_nothing_and_quantizing_is_proposed(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, dtype=torch.bfloat16)
    libraries = planned(tmp_path).ledger.device["framework"]
    plan = planned(tmp_path, device_budget=f"{libraries + 1024}B")
    assert not plan.fits
    assert plan.nearest is None
    assert "hizoo-lite quantize --model" in plan.why
    assert "a budget of" in plan.why
    less = planned(tmp_path, device_budget="1MiB")  # where streaming does not help
    assert "interpreter and libraries alone take" in less.why
    assert "hizoo-lite quantize" not in less.why


def test_a_batch_that_is_left_open_is_the_largest_that_fits(streamable: Path) -> None:
    config = config_of(streamable, max_length=256, residency="resident", branch_chunk=1)
    inventory = Inventory.of(Checkpoint.open(streamable))

    def choose(budget: int) -> Plan:
        sized = replace(config, device_budget=f"{budget}B")
        return planner.plan_run(sized, inventory, "causal", choose_batch=True, framework=FRAMEWORK)

    assert choose(100 << 30).batch_size == 16
    four = replace(config, batch_size=16, device_budget="100GiB")
    whole = planner.plan_run(four, inventory, "causal", framework=FRAMEWORK).peak_bytes
    assert choose(whole - (1 << 20)).batch_size < 16


# -------------------------------------------------------------------------- what is not known


def test_unknown_dtypes_are_reported_and_never_taken_for_known_ones(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, dtype=torch.bfloat16)
    inventory = Inventory.of(Checkpoint.open(tmp_path))
    name = "model.layers.1.mlp.up_proj.weight"
    forms = {**inventory.forms, name: Form(torch.float8_e4m3fn, inventory.forms[name].shape)}
    plan = planner.plan_run(
        config_of(tmp_path), inventory._replace(forms=forms), "causal", framework=FRAMEWORK
    )
    assert any(name in text and "float8_e4m3fn" in text for text in plan.unaccounted)


def test_unknown_quantization_and_architecture_are_reported(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, dtype=torch.bfloat16)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**content, "quantization_config": {"quant_method": "gptq"}})
    )
    assert any("gptq" in text for text in planned(tmp_path).unaccounted)
    (tmp_path / "config.json").write_text(json.dumps({**content, "model_type": "no-such-model"}))
    plan = planned(tmp_path)
    assert not plan.fits
    assert "not a configuration this transformers knows" in plan.unaccounted[0]


def test_bits_that_contradict_the_checkpoint_are_refused(streamable: Path) -> None:
    with pytest.raises(UserError, match="already quantized to 'nf4'"):
        planned(streamable, bits="int8")


def test_what_cannot_be_streamed_is_refused_with_what_to_do(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "plain", dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"quantize it once, .* --bits nf4"):
        planned(tmp_path / "plain", residency="disk")
    small = {"vocab_size": 500, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    make_random_model.make("tinyllama-1.1b", tmp_path / "twice", layers=2, overrides=small)
    assert planned(tmp_path / "twice", residency="disk").fits
    with pytest.raises(UserError, match="--no-double-quant"):
        planned(tmp_path / "twice", residency="disk", space="scales")
    assert planned(tmp_path / "twice", residency="disk", space="dense").fits  # codes and scales stay


# --------------------------------------------------------------------------------- large models


def large(shape: str, folder: Path) -> Inventory:
    """Headers as `hizoo-lite quantize` would write them, of a model that is not there."""
    config = make_random_model._config(shape, None, {})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    module = build.build(config, "causal")
    plain = Inventory.of_shapes(folder, {"dtype": "bfloat16"}, module)
    forms: dict[str, Form] = {}
    for name, form in plain.forms.items():
        inside = ".layers." in name and len(form.shape) == 2
        linear = Linear(name, form.shape, False) if inside else None  # type: ignore[arg-type]
        forms |= linear_forms(linear, "nf4", True, b"{}") if linear else {name: form}
    return Inventory(folder, plain.config, forms, "nf4")


def test_a_70b_model_is_planned_from_its_shapes_alone(tmp_path: Path) -> None:
    inventory = large("llama-2-70b", tmp_path)
    config = config_of(tmp_path, compute_dtype="bf16", batch_size=16, max_length=256, device_budget="24GiB")
    with_states = planner.plan_run(config, inventory, "causal", framework=FRAMEWORK)
    assert with_states.moved_bytes == 0  # the upper third stays
    assert with_states.ledger.disk["hidden_states"] == 1000 * 256 * 8192 * 4
    config = replace(config, hidden_states="off")
    plan = planner.plan_run(config, inventory, "causal", framework=FRAMEWORK)
    assert not plan.ledger.to_json()["disk"]
    assert plan.fits
    assert plan.residency == "disk"
    assert 0 < plan.blocks_on_device < 80
    blocks = plan.ledger.device["resident_blocks"] + plan.moved_bytes
    assert blocks / 2**30 == pytest.approx(68.45e9 * 4.127 / 8 / 2**30, rel=0.01)


# ---------------------------------------------------------------------------------- command line


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_command_prints_owners_choice_and_what_is_missing(streamable: Path, tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    done = call(
        "--model", str(streamable), "--device-budget", "2GiB", "--max-length", "256", "--out", str(picture)
    )
    assert done.exit_code == 0, done.stderr
    for text in (
        "framework",
        "between blocks",
        "resident blocks",
        "peak",
        "why: ",
        "not counted",
        "what it is",
    ):
        assert text in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    drawn = picture.with_suffix(".svg")
    for budget, said in (("2GiB", "fits"), ("64MiB", "does not fit")):
        call("--model", str(streamable), "--device-budget", budget, "--out", str(drawn))
        texts = re.findall(r"<!-- (.*?) -->", drawn.read_text())  # matplotlib draws letters as paths
        assert any(text.startswith(f"model {said}: ") for text in texts), texts
        assert any(text.endswith(f"MiB, {said}") for text in texts), texts


def test_json_has_stable_keys_and_a_profile_gives_times(streamable: Path) -> None:
    given = ("--model", str(streamable), "--profile", "edge-4gb-cpu", "--json", "--estimator", "mezo")
    done = call(*given, "--steps", "2000")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    keys = {"fits", "residency", "blocks", "blocks_on_device", "batch_size", "branch_chunk", "peak_bytes"}
    keys |= {"host_peak_bytes", "ledger", "why", "nearest", "unaccounted", "seconds_lower_bound", "bounds"}
    assert keys <= set(found)
    assert found["peak_bytes"] == sum(found["ledger"]["device"].values())
    assert found["seconds_lower_bound"] > 0
    whole = json.loads(call(*given, "--steps", "2000", "--hidden-states", "off").stdout)
    assert whole["assumed"] == []
    assert len(found["assumed"]) == 1
    assert found["ledger"]["disk"]["hidden_states"] == 1000 * found["max_length"] * 128 * 4
    assert found["bounds"]["products"] < 0.8 * whole["bounds"]["products"]
    assert found["bounds"]["unpacking"] < 0.5 * whole["bounds"]["unpacking"]


@pytest.mark.parametrize("blocks", ["auto", "3", "all"])
def test_a_plan_proposes_as_many_exact_blocks_as_the_run(tmp_path: Path, blocks: str) -> None:
    told: list[str] = []

    class Told:
        def on_message(self, args: Any, state: Any, control: Any, *, text: str, **more: Any) -> None:
            told.append(text)

    given = {"task": "embedded", "data": "embedded", "train_examples": 4, "test_examples": 1, "batch_size": 2}
    amount: Any = int(blocks) if blocks.isdecimal() else blocks
    fit("embedded", **given, blocks=amount, steps=1, out=str(tmp_path / "run"), callbacks=[Told()])
    planned = json.loads(call("--model", "embedded", "--blocks", blocks, "--json").stdout)["exact"]["blocks"]
    assert [line for line in told if f"; --exact-blocks {planned} has them exact" in line]


def test_a_plan_of_layers_that_are_named_one_by_one_proposes_no_number_of_blocks() -> None:
    done = call("--model", "embedded", "--targets", "layers.3.self_attn.q_proj", "--json")
    assert "exact" not in json.loads(done.stdout)


def test_what_cannot_fit_ends_with_code_three_and_the_nearest_configuration(streamable: Path) -> None:
    folder = str(streamable)
    arguments = ("--model", folder, "--batch-size", "19", "--residency", "resident", "--branch-chunk", "1")
    whole = json.loads(call(*arguments, "--device-budget", "9GiB", "--json").stdout)["peak_bytes"]
    done = call(*arguments, "--device-budget", f"{whole - (8 << 20)}B")
    assert done.exit_code == 3
    assert "nothing fits: " in done.stderr
    assert "fits, with" in done.stderr


def test_without_a_budget_the_plan_is_of_a_run_that_has_none(
    streamable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run keeps its heap; where that does not fit, the plan has what is free as a budget, and says so."""
    shapes = ("--model", str(streamable), "--batch-size", "16", "--max-length", "256", "--device", "cpu")
    found = json.loads(call(*shapes, "--json").stdout)
    assert (found["residency"], found["gives_back"]) == ("resident", False)
    assert found["ledger"]["device"]["heap"] > 0
    assert found["device_budget_bytes"] > found["peak_bytes"]  # what is free
    done = call(*shapes)
    assert "fits: this machine's free memory" in done.stdout
    assert "only with a budget" not in done.stdout
    assert "no times: this machine's rates are not known" in done.stdout
    free = found["peak_bytes"] - (1 << 20)
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=free))
    tight = json.loads(call(*shapes, "--json").stdout)
    assert (tight["fits"], tight["gives_back"], tight["device_budget_bytes"]) == (True, True, free)
    assert f"only with a budget: --device-budget {free >> 20}MiB" in call(*shapes).stdout


def test_a_wrong_flag_and_a_missing_model_end_with_code_two(tmp_path: Path) -> None:
    assert call("--model", str(tmp_path), "--batch-size", "0").exit_code == 2
    missing = call("--model", str(tmp_path))
    assert missing.exit_code == 2
    assert "config.json: no such file" in missing.stderr


def test_a_folder_with_only_a_configuration_is_planned_from_its_shapes(tmp_path: Path) -> None:
    large("llama-2-7b", tmp_path)
    done = call("--model", str(tmp_path), "--profile", "rtx4090-24gb", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["residency"] == "resident"
    assert any("no header was read" in text for text in found["unaccounted"])


def test_a_text_is_planned_as_long_as_the_model_has_positions_for(tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path, dtype=torch.bfloat16)
    done = call("--model", str(tmp_path), "--max-length", "100000", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["max_length"] == MAX_POSITIONS


def test_a_model_that_cannot_be_run_dry_ends_with_code_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looks_at_values(self: Any, wanted: Pass) -> None:
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    save_tiny("llama", tmp_path, dtype=torch.bfloat16)
    monkeypatch.setattr(DryRun, "run", looks_at_values)
    done = call("--model", str(tmp_path))
    assert done.exit_code == 2
    assert "cannot be planned: its forward fails on tensors without memory (Tensor.item()" in done.stderr
    config, task = config_of(tmp_path), tasks.get("sst2")
    assert planning.plan(Resolved(config, task), ONE_ROW) is None
    with pytest.raises(CannotPlan):
        planning.plan(Resolved(replace(config, device_budget="1GiB"), task), ONE_ROW)
