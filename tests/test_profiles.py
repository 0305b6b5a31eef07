"""Hardware profiles: every shipped one plans models; a wrong one is refused with all its faults."""

from __future__ import annotations

import itertools
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.cli import app
from hizoo_lite.errors import UserError
from hizoo_lite.plan import hardware, planner, speed
from hizoo_lite.plan.inventory import Inventory
from tests.architectures import save_tiny
from tests.test_plan import config_of, large

SHIPPED = {
    *("rtx4090-24gb", "rtx3090-24gb", "rtx4060ti-16gb", "rtx3060-12gb", "t4-16gb", "l4-24gb"),
    *("jetson-orin-8gb", "laptop-16gb-cpu", "edge-4gb-cpu", "h200-141gb"),
}

#: A CPU, a small and a large GPU, and one that shares its memory with the host; a model where it is tight.
FAST = {
    *(("edge-4gb-cpu", "tiny"), ("rtx3060-12gb", "llama-2-7b"), ("jetson-orin-8gb", "llama-2-7b")),
    *(("jetson-orin-8gb", "tiny"), ("h200-141gb", "llama-2-70b")),
}
TABLE = [
    pytest.param(*one, marks=[] if one in FAST else [pytest.mark.grid])
    for one in itertools.product(sorted(SHIPPED), ("tiny", "llama-2-7b", "llama-2-70b"))
]


@pytest.fixture(scope="module")
def inventories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Inventory]:
    """A tiny checkpoint that is there, and two large ones that are not."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "tiny").mkdir()
    save_tiny("llama", folder / "tiny", dtype=torch.bfloat16)
    found = {"tiny": Inventory.of(Checkpoint.open(folder / "tiny"))}
    for shape in ("llama-2-7b", "llama-2-70b"):
        (folder / shape).mkdir()
        found[shape] = large(shape, folder / shape)
    return found


def test_the_shipped_profiles_are_found_by_name() -> None:
    assert set(hardware.names()) == SHIPPED


@pytest.mark.parametrize(("name", "model"), TABLE)
def test_every_profile_plans_a_tiny_and_two_large_models(
    name: str, model: str, inventories: dict[str, Inventory]
) -> None:
    machine, inventory = hardware.find(name), inventories[model]
    config = config_of(
        inventory.folder,
        compute_dtype="auto",
        device="auto",
        batch_size=1,
        eval_batch_size=1,
        max_length=64,
    )
    plan = planner.plan_run(config, inventory, "causal", hardware=machine)
    assert plan.device_type == machine.device
    assert plan.seconds_lower_bound is not None
    assert plan.seconds_lower_bound > 0
    if plan.fits:
        assert plan.peak_bytes <= machine.device_budget_bytes
    if model == "tiny" or (model == "llama-2-7b" and machine.device == "cuda"):
        assert plan.fits, plan.why
    if plan.residency == "host":
        assert plan.ledger.host["pinned_host"] > 0
        assert plan.bounds["host_to_device"] > 0


def test_a_24_gb_card_streams_70b_from_host_memory(inventories: dict[str, Inventory]) -> None:
    config = config_of(inventories["llama-2-70b"].folder, compute_dtype="auto", device="auto")
    plan = planner.plan_run(
        config, inventories["llama-2-70b"], "causal", hardware=hardware.find("rtx4090-24gb")
    )
    assert plan.fits
    assert plan.residency == "host"
    assert "resident needs" in plan.why


def test_every_key_is_documented() -> None:
    for path in hardware.folder().glob("*.toml"):
        keys = set(tomllib.loads(path.read_text()))
        assert all(f"`{key}`" in (hardware.__doc__ or "") for key in keys), path


def test_all_problems_of_a_profile_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\ndevice = "tpu"\ndevice_memory = "24"\nwatts = 3\nefficiency = 2\nbatch_size = 0\n'
        "[operations]\nbf16 = 0\n"
    )
    with pytest.raises(UserError) as caught:
        hardware.find(str(path))
    text = str(caught.value)
    for part in ("watts: unknown key", "disk: missing", "device: got 'tpu'", "device_memory: got '24'"):
        assert part in text
    for part in (
        "efficiency: got 2",
        "batch_size: got 0",
        "operations.bf16: got 0",
        "problems in the profile",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "name: got 3, allowed: a text"),
        ({"operations": {}}, "operations: got {}, allowed: a table of bf16"),
        ({"device_reserved": "30GiB"}, "device_reserved: leaves nothing"),
        ({"host_memory": "8GiB"}, "host_memory: got '8GiB'; allowed: nothing, the device is the host"),
    ],
)
def test_a_wrong_value_is_named(change: dict[str, Any], message: str) -> None:
    good = tomllib.loads((hardware.folder() / "laptop-16gb-cpu.toml").read_text())
    assert any(message in problem for problem in hardware._problems({**good, **change}))
    assert hardware._problems(good) == []


def test_unknown_names_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"--profile: got 'abacus', which is no file; allowed: .*rtx4090-24gb"
    ):
        hardware.find("abacus")
    (tmp_path / "x.toml").write_text("device = = 3\n")
    with pytest.raises(UserError, match="not valid TOML"):
        hardware.find(str(tmp_path / "x.toml"))


def test_the_command_lists_them() -> None:
    found = json.loads(CliRunner().invoke(app, ["profiles", "--json"]).stdout)["profiles"]
    assert set(found) == SHIPPED
    assert found["rtx4090-24gb"]["device_memory_bytes"] == 24 << 30
    assert "rtx4090" in CliRunner().invoke(app, ["profiles"]).stdout


def test_what_the_doctor_measures_is_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_PATIENCE", 0.05)
    monkeypatch.setattr(speed, "_FILE_BYTES", 4 << 20)
    monkeypatch.setitem(speed._COPIED_BYTES, "cpu", 4 << 20)
    out = tmp_path / "here.toml"
    done = CliRunner().invoke(app, ["doctor", "--json", "--out", str(out)])
    assert done.exit_code == 0, done.stderr
    measured = json.loads(done.stdout)["measured"]
    machine = hardware.find(str(out))
    assert machine.device_bandwidth == int(measured["device_bandwidth"]) > 0
    assert machine.operations.keys() == measured["operations"].keys()
    again = CliRunner().invoke(app, ["doctor", "--out", str(out)])
    assert again.exit_code == 2
    assert "is there already" in again.stderr
