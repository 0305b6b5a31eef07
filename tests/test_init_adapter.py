"""Runs that begin with an adapter of a run or of PEFT; PEFT's and transformers' names in Python."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import hizoo_lite as hz
from hizoo_lite.config import TrainConfig
from hizoo_lite.errors import UserError
from hizoo_lite.run import fit
from hizoo_lite.spaces import of_peft
from hizoo_lite.train.checkpoint import newest

SMALL = {
    "model": "embedded",
    "task": "embedded",
    "data": "embedded",
    "device": "cpu",
    "steps": 3,
    "batch_size": 4,
    "train_examples": 24,
    "dev_examples": 0,
    "test_examples": 6,
    "max_length": 64,
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def run(out: Path, **more: object) -> hz.Run:
    return fit(TrainConfig(**{**SMALL, "out": str(out), **more}))


def test_a_run_begins_where_another_one_ended(tmp_path: Path) -> None:
    first = run(tmp_path / "a", rank=4, alpha=12.0, targets="all-linear")
    second = run(tmp_path / "b", init_adapter=str(first.folder), lr=0.02)
    start, ended = (
        weights(tmp_path / "b" / "checkpoints" / "step-000000" / "adapter"),
        weights(first.folder / "adapter"),
    )
    assert start.keys() == ended.keys()
    assert all(torch.equal(start[name], ended[name]) for name in ended)
    settings = second.setup.config
    assert (settings.rank, settings.alpha) == (4, 12.0)
    assert second.before is not None
    assert first.after is not None
    assert second.before.loss == pytest.approx(first.after.loss, abs=1e-5)
    moved = weights(second.folder / "adapter")
    assert any(not torch.equal(moved[name], ended[name]) for name in ended)


def test_it_is_resumed_without_the_adapter(tmp_path: Path) -> None:
    first = run(tmp_path / "a")
    whole = run(
        tmp_path / "whole", init_adapter=str(first.folder), steps=4, save_every=2, lr_schedule="constant"
    )
    run(tmp_path / "part", init_adapter=str(first.folder), steps=2, save_every=2, lr_schedule="constant")
    first.folder.rename(tmp_path / "gone")
    config = hz.TrainConfig(
        **{**vars(whole.setup.config), "out": str(tmp_path / "part"), "resume": True, "steps": 4}
    )
    resumed = fit(config)
    a, b = weights(whole.folder / "adapter"), weights(resumed.folder / "adapter")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert newest(resumed.folder / "checkpoints") is not None


def test_an_adapter_of_peft_begins_a_run(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(hz.config.DEMO)
    made = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"]))
    for name, value in made.named_parameters():
        if "lora_B" in name:
            value.data.normal_(generator=torch.Generator().manual_seed(0))
    made.save_pretrained(tmp_path / "theirs")
    own = run(tmp_path / "own", init_adapter=str(tmp_path / "theirs"), head="none")
    begun = tmp_path / "own" / "checkpoints" / "step-000000" / "adapter"
    start, theirs = weights(begun), weights(tmp_path / "theirs")
    assert start.keys() == theirs.keys()
    assert all(torch.equal(start[name], theirs[name]) for name in theirs)
    assert own.summary["loss_before"] != own.summary["loss_after"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"rank": 3}, "--rank: got 3, but --init-adapter has 8"),
        ({"space": "dense"}, "init_adapter: got '.*', allowed with --space lora"),
        ({"blocks": 1}, "is not in the top 1 of"),
    ],
)
def test_what_does_not_fit_an_adapter_is_refused(tmp_path: Path, more: dict[str, object], told: str) -> None:
    first = run(tmp_path / "a", steps=1, blocks="all")
    with pytest.raises(UserError, match=told):
        run(tmp_path / "b", init_adapter=str(first.folder), **more)
    assert not (tmp_path / "b").exists()


def test_no_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--init-adapter: got 'nowhere'"):
        run(tmp_path / "b", init_adapter="nowhere")
    first = run(tmp_path / "a", steps=1)
    with pytest.raises(UserError, match="rows"):
        run(tmp_path / "c", init_adapter=str(first.folder), head="none")


def test_a_configuration_of_peft_is_a_space(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    made = run(tmp_path / "a", steps=1)
    found = fit(TrainConfig(**{**SMALL, "out": str(tmp_path / "b"), "steps": 1}), space=config)
    assert "lora_dropout: got 0.1, not used" in caplog.text
    settings = found.setup.config
    assert (settings.rank, settings.alpha, settings.targets, settings.head) == (
        4,
        8.0,
        "q_proj,v_proj",
        "exact",
    )
    assert found.setup.space.exact.keys() == made.setup.space.exact.keys()  # rows for labels, as by default
    for name, wrong in (("use_dora", True), ("modules_to_save", ["lm_head"]), ("target_modules", ".*q_.*")):
        with pytest.raises(UserError, match=f"LoraConfig: {name}: got"):
            of_peft(peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], name: wrong}))


def test_names_of_peft_and_of_transformers(tmp_path: Path) -> None:
    model = hz.load("embedded", device="cpu")
    given = {name: value for name, value in SMALL.items() if name not in ("model", "device")}
    found = fit(
        model,
        **{**given, "steps": 1},
        out=str(tmp_path / "a"),
        r=2,
        lora_alpha=4.0,
        target_modules=["q_proj"],
    )
    assert (found.setup.config.rank, found.setup.config.alpha, found.setup.config.targets) == (
        2,
        4.0,
        "q_proj",
    )
    with pytest.raises(UserError, match="learning_rate: unknown setting; did you mean 'lr'") as error:
        fit(model, **given, learning_rate=1e-3, max_steps=3)
    assert "max_steps: unknown setting; did you mean 'steps'" in str(error.value)


def test_the_same_call_goes_on(tmp_path: Path) -> None:
    first = run(tmp_path / "a", rank=4, steps=1)
    given = {**SMALL, "out": str(tmp_path / "b"), "init_adapter": str(first.folder), "steps": 2}
    fit(TrainConfig(**given))
    again = fit(TrainConfig(**given, resume=True))
    assert again.setup.config.rank == 4


def test_a_space_that_leaves_its_head_open_is_left_as_it_is(tmp_path: Path) -> None:
    space = hz.spaces.LoRA(rank=2)
    by_accuracy = fit(
        TrainConfig(**{**SMALL, "out": str(tmp_path / "a"), "steps": 1}), space=space, objective="accuracy"
    )
    by_loss = fit(TrainConfig(**{**SMALL, "out": str(tmp_path / "b"), "steps": 1}), space=space)
    assert space.head is None
    assert [found.setup.space.head for found in (by_accuracy, by_loss)] == ["estimated", "exact"]
    assert hz.spaces.MaZO().head is None


def test_two_names_of_one_setting() -> None:
    with pytest.raises(UserError, match="r: is rank, which is given too"):
        fit("embedded", task="embedded", data="embedded", r=4, rank=16)
    model = hz.load("embedded", device="cpu")
    with pytest.raises(UserError, match="chat_template: got 'chatml', but the model was loaded with None"):
        fit(model, task="embedded", data="embedded", chat_template="chatml")
