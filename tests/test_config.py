"""The configuration: one source for fields, flags, TOML and help; all problems together."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hizoo_lite import base
from hizoo_lite import config as config_module
from hizoo_lite.cli.recipes import purpose
from hizoo_lite.config import AXES, TrainConfig, choices, help_of, kinds, problems, settings
from hizoo_lite.errors import UserError
from hizoo_lite.plan import hardware
from hizoo_lite.plan.hardware import profiles_folder
from hizoo_lite.train.config_file import check_same_run, find, resolve, write
from hizoo_lite.units import format_bytes, parse_bytes

PROFILES = sorted((Path(__file__).parents[1] / "profiles").glob("*.toml"))
MINIMAL: dict[str, Any] = {"model": "m", "task": "sst2"}


def test_choices_of_the_configuration_equal_the_registries() -> None:
    for axis in AXES:
        assert choices(kinds()[axis.axis]) == tuple(axis)
    assert get_args(config_module.BitsName) == get_args(base.Bits)
    assert get_args(config_module.ComputeName) == get_args(base.ComputeDtype)
    assert set(get_args(config_module.KindName)) == {"auto", *get_args(base.ModelKind)}


def test_every_field_has_help_and_a_group() -> None:
    assert all(help_of(name) and field.metadata["group"] for name, field in settings().items())
    assert help_of("estimator").startswith("hizoo: slope and curvature; mezo: the slope alone; ")
    assert help_of("rank") == "of lora: rank of the adapters"
    assert help_of("targets").startswith("attention (query and value)")  # all spaces have it
    assert not problems({f.name: f.default for f in fields(TrainConfig)} | MINIMAL)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "out": st.text(st.characters(blacklist_categories=("Cs",)), min_size=1),
            "bits": st.sampled_from(["nf4", "fp4", "int8", "none"]),
            "lr": st.one_of(st.just("auto"), st.floats(min_value=1e-30, max_value=1e30)),
            "mu": st.floats(min_value=1e-12, max_value=1.0),
            "alpha": st.one_of(st.none(), st.floats(min_value=1e-3, max_value=1e3)),
            "k_shot": st.one_of(st.none(), st.integers(1, 64)),
            "steps": st.integers(1, 10**9),
            "double_quant": st.booleans(),
            "device_budget": st.sampled_from(["24GiB", "500 MB", None]),
        },
    )
)
def test_toml_that_was_written_is_read_back_to_an_equal_configuration(values: dict[str, Any]) -> None:
    config = TrainConfig(**MINIMAL, **values)
    read = tomllib.loads(write(config))
    assert TrainConfig(**read) == config
    assert write(TrainConfig(**read)) == write(config)


def test_a_written_file_is_resolved_to_an_equal_configuration(tmp_path: Path) -> None:
    config = TrainConfig(**MINIMAL, lr=1e-4, targets="q_proj,v_proj", k_shot=16)
    (tmp_path / "run.toml").write_text(write(config))
    assert resolve(str(tmp_path / "run.toml")) == config


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "a"\ntask = "rte"\nsteps = 7\nlr = 1\ntargets = ["q_proj", "v_proj"]\n')
    config = resolve(str(file), {"model": "b", "double_quant": False, "lr_schedule": "linear"})
    assert (config.model, config.task, config.steps, config.lr) == ("b", "rte", 7, 1.0)
    assert (config.double_quant, config.lr_schedule, config.targets) == (False, "linear", "q_proj,v_proj")
    assert config.rank == settings()["rank"].default


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_recipe_says_what_it_is_for_and_runs_with_a_model_and_a_task(path: Path) -> None:
    config = resolve(path.stem, {"model": "embedded", "task": "embedded"})
    assert config.model
    assert find(path.stem).resolve() == path.resolve()
    assert 20 < len(purpose(path)) < 160


def test_profiles_are_found_beside_the_package() -> None:
    assert {path.name for path in profiles_folder().glob("*.toml")} >= {"demo.toml", "sst2-lora.toml"}


def test_profiles_are_found_inside_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hizoo_lite/profiles").mkdir(parents=True)
    monkeypatch.setattr(hardware, "__file__", str(tmp_path / "hizoo_lite/plan/hardware.py"))
    assert profiles_folder() == tmp_path.resolve() / "hizoo_lite/profiles"


def test_all_problems_of_file_and_flags_are_reported_together(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "m"\nbits = "nf5"\nstepz = 3\nbatch-size = 0\nseed = "x"\n')
    with pytest.raises(UserError) as caught:
        resolve(str(file), {"lr": "fast", "residency": "ram", "device_budget": "24"})
    text = str(caught.value)
    assert text.startswith("8 problems")
    assert f"{file}: bits: got 'nf5', allowed: nf4, fp4, int8, none" in text
    assert f"{file}: stepz: unknown key; did you mean 'steps'?" in text
    assert f"{file}: batch-size: got 0, allowed: a whole number of 1 or more" in text
    assert f"{file}: seed: got 'x'" in text
    assert "--lr: got 'fast', allowed: auto, a number above 0" in text
    assert "--residency: got 'ram', allowed: auto, resident, host, disk" in text
    assert "--device-budget: got '24', allowed: a number and a unit" in text
    assert "--task: missing" in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps: got 0, allowed: a whole number of 1 or more"),
        ({"steps": 2.0}, "steps: got 2.0"),
        ({"steps": True}, "steps: got True"),
        ({"rslora": 1}, "rslora: got 1, allowed: true or false"),
        ({"mu": 0.0}, "mu: got 0.0, allowed: auto, a number above 0"),
        ({"mu": float("nan")}, "mu: got nan"),
        ({"smoothing": 0.0}, r"smoothing: got 0.0, allowed: a number above 0 and up to 1"),
        ({"smoothing": 1.5}, "smoothing: got 1.5"),
        ({"lr": -1.0}, "lr: got -1.0, allowed: auto, a number above 0"),
        ({"model": None}, "model: got None"),
        ({"task": ""}, "task: missing"),
        ({"device": "tpu"}, "device: got 'tpu'"),
        ({"host_budget": "0GiB"}, "host_budget: got '0GiB'"),
        ({"estimator": "mezo"}, "lr: got 'auto', but mezo measures no curvature"),
        ({"curvature_every": 2}, "curvature_every: got 2, but predictions give the curvature at every step"),
        ({"curvature_from": "gradients"}, "curvature_from: got 'gradients', allowed: predictions, losses"),
        ({"blocks": 0}, "blocks: got 0, allowed: all, auto, a whole number of 1 or more"),
        ({"estimator": "mezo", "lr": 1e-3, "curvature_every": 0}, "curvature_every: got 0"),
        ({"directions": 255}, "directions: got 255, allowed: auto, .* of 1 or more and up to 254"),
        ({"balanced": "on"}, "balanced: got 'on', allowed: auto, off"),
        ({"branch_chunk": 0}, "branch_chunk: got 0, allowed: auto, a whole number of 1 or more"),
        ({"resume": True}, "out: missing, it names the run folder"),
        ({"warmup_steps": 2, "steps": 1}, "warmup_steps: got 2, allowed: up to the 1 of steps"),
    ],
)
def test_a_wrong_setting_is_refused_naming_the_field(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**{**MINIMAL, **values})


def test_unknown_files_and_broken_toml_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"--config: got 'nosuch', which is no file; allowed: .* a recipe \(chat"
    ):
        resolve("nosuch")
    (tmp_path / "x.toml").write_text("steps = = 3\n")
    with pytest.raises(UserError, match=r"x.toml: not valid TOML"):
        resolve(str(tmp_path / "x.toml"))
    (tmp_path / "x.toml").write_text('zzzz = 3\nmodel = "m"\ntask = "t"\n')
    with pytest.raises(UserError, match="zzzz: unknown key; allowed: model"):
        resolve(str(tmp_path / "x.toml"))


def test_a_run_that_is_not_there_is_not_resumed(tmp_path: Path) -> None:
    for flags in ({}, {"model": "embedded", "task": "embedded"}):
        with pytest.raises(UserError, match=r"^--resume: .*nothing holds no run") as raised:
            resolve(None, {"resume": True, "out": str(tmp_path / "nothing"), **flags})
        assert "missing" not in str(raised.value)


def test_only_settings_that_do_not_change_a_step_may_change_on_resume() -> None:
    old = TrainConfig(**MINIMAL, lr_schedule="constant")
    check_same_run(old, replace(old, steps=5000, eval_every=3, out="other", tracker="tensorboard"))
    with pytest.raises(UserError, match="seed: the run has 0, got 1; it cannot change on --resume"):
        check_same_run(old, replace(old, seed=1))
    decaying = replace(old, lr_schedule="linear")
    with pytest.raises(
        UserError, match=r"steps: the run has 1000, .*lr_schedule 'linear' ends with them; .*--init-adapter"
    ):
        check_same_run(decaying, replace(decaying, steps=2000))
    weights = replace(decaying, space="dense")
    for of, options in ((weights, {}), (decaying, {"begins": False})):
        with pytest.raises(UserError) as said:
            check_same_run(of, replace(of, steps=2000), **options)
        assert "--init-adapter" not in str(said.value)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("24GiB", 24 * 2**30), ("24 gb", 24 * 10**9), ("1.5MiB", 3 * 2**19), ("7B", 7), ("2TB", 2 * 10**12)],
)
def test_sizes_are_read_with_their_units(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "24", "GiB", "-1GiB", "1 QiB", "0MB"])
def test_sizes_without_number_or_unit_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="allowed: "):
        parse_bytes(text)


def test_sizes_are_shown_in_binary_units() -> None:
    assert [format_bytes(n) for n in (None, 5, 2048, 3 * 2**29)] == ["-", "5 B", "2.00 KiB", "1.50 GiB"]


def test_a_configuration_is_resolved_without_importing_torch() -> None:
    code = "import sys\nfrom hizoo_lite.train.config_file import resolve\nresolve('demo')\n"
    code += "print(sorted(sys.modules))"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert "'hizoo_lite.config'" in done.stdout
    assert "'torch'" not in done.stdout


def test_curvature_settings_reach_the_curvature() -> None:
    from hizoo_lite.curvature import CURVATURES, Diagonal, Grouped

    common = {"model": "m", "task": "sst2", "data": "d"}
    diagonal = CURVATURES.configured(TrainConfig(**common, curvature="diagonal", curvature_mode="reference"))
    assert isinstance(diagonal, Diagonal)
    assert diagonal.mode == "reference"
    grouped = CURVATURES.configured(TrainConfig(**common, curvature_per="row"))
    assert isinstance(grouped, Grouped)
    assert grouped.per == "row"
    with pytest.raises(UserError, match=r"curvature_mode: got 'published'.*allowed: paper, reference"):
        TrainConfig(**common, curvature_mode="published")


def test_each_task_is_called_by_its_own_data(tmp_path: Path) -> None:
    run = tmp_path / "runs"
    run.mkdir()
    (run / "config.toml").touch()
    settings: dict[str, Any] = {"model": "embedded", "task": (str(run / "task.toml"), "sst2")}
    assert TrainConfig(**settings, data=("mine.csv", "sst2/")).task_name == "mine.csv, sst2"
    assert TrainConfig(**settings, data=(str(run / "data"), "sst2/")).task_name == "rows in memory, sst2"
    assert TrainConfig(model="embedded", data="mine.csv").task_name == "mine.csv"
