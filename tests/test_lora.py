"""The adapter has PEFT's semantics and PEFT's files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hizoo_lite.engine.load import load
from hizoo_lite.errors import UserError
from hizoo_lite.noise import normal
from hizoo_lite.spaces.lora import LoRA, resolve_targets
from hizoo_lite.train.saved import attach_adapter
from tests.architectures import TINY_CONFIGS, save_tiny, tiny_batch

AUTO = {
    "causal": transformers.AutoModelForCausalLM,
    "masked": transformers.AutoModelForMaskedLM,
    "classifier": transformers.AutoModelForSequenceClassification,
}


def randomized(space: LoRA) -> None:
    """Give every parameter, B included, values that matter."""
    for name, value in space.parameters.items():
        value.add_(normal(3, 0, name, value.shape), alpha=0.05)


@pytest.mark.parametrize(
    ("name", "kind", "targets"),
    [
        ("llama", "causal", "attention"),
        ("llama", "causal", "all-linear"),
        ("gpt2", "causal", "attention"),
        ("phi3", "causal", "attention"),
        ("opt", "causal", "q_proj,fc1"),
        ("bert", "masked", "attention"),
        ("bert", "classifier", "attention"),
        ("roberta", "classifier", "all-linear"),
        ("llama", "classifier", "attention"),
    ],
)
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_the_adapter_and_gives_the_same_logits(
    name: str, kind: str, targets: str, rslora: bool, tmp_path: Path
) -> None:
    plain = save_tiny(name, tmp_path / "base", kind=kind)
    model = load(tmp_path / "base", kind=kind, bits="none", compute_dtype="float32", device="cpu")
    space = LoRA(rank=4, alpha=6, targets=targets, rslora=rslora, train_a=True, blocks="all")
    space.attach(model, seed=0)
    randomized(space)
    space.save(tmp_path / "adapter")
    ids, _ = tiny_batch()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        untuned = plain(**inputs).logits
        ours = model.module(**inputs).logits
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()(**inputs).logits
    # float32 sums in another order; logits are of order 10
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    assert (ours - untuned).abs().max() > 1e-2


def test_peft_loads_the_adapter_over_bitsandbytes_weights(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "base")
    model = load(tmp_path / "base", bits="nf4", compute_dtype="float32", device="cpu")
    space = LoRA(rank=4)
    space.attach(model, seed=0)
    randomized(space)
    space.save(tmp_path / "adapter")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    theirs = AUTO["causal"].from_pretrained(
        tmp_path / "base", quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    for module in theirs.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # or eval() repacks the weight and computes in bf16
    tuned = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    ids, _ = tiny_batch()
    with torch.no_grad():
        ours, peft_logits = model.module(input_ids=ids).logits, tuned(input_ids=ids).logits
    torch.testing.assert_close(ours, peft_logits, rtol=1e-5, atol=2e-5)


def test_a_head_with_more_than_linear_layers_goes_to_peft_and_comes_from_it(tmp_path: Path) -> None:
    """PEFT saves such a head as a whole, with its norm, which PEFT may have trained."""
    plain = save_tiny("modernbert", tmp_path / "base", kind="classifier")
    model = load(tmp_path / "base", kind="classifier", bits="none", compute_dtype="float32", device="cpu")
    space = LoRA(rank=2, targets="all-linear")
    space.attach(model, seed=0)
    randomized(space)
    space.save(tmp_path / "ours")
    assert space.peft_config().modules_to_save == ["classifier", "head.dense"]
    ids, _ = tiny_batch()
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval()
    torch.testing.assert_close(model.module(ids).logits, theirs(ids).logits, rtol=1e-5, atol=2e-5)
    space.detach()
    untuned = model.module(ids).logits

    config = peft.LoraConfig(
        r=2, target_modules=["Wqkv"], task_type="SEQ_CLS", modules_to_save=["head", "classifier"]
    )
    theirs = peft.get_peft_model(plain, config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path / "theirs")
    tuned: Any = attach_adapter(model, tmp_path / "theirs")
    wanted = theirs(ids).logits
    torch.testing.assert_close(model.module(ids).logits, wanted, rtol=1e-5, atol=2e-5)
    tuned.save(tmp_path / "again")
    assert tuned.peft_config().modules_to_save == ["classifier", "head"]
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == (
        load_file(tmp_path / "theirs" / "adapter_model.safetensors").keys()
    )
    attach_adapter(model, tmp_path / "again")
    torch.testing.assert_close(model.module(ids).logits, wanted, rtol=1e-5, atol=2e-5)
    tuned.detach()
    assert torch.equal(model.module(ids).logits, untuned)


def test_an_adapters_settings_are_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    space = LoRA(targets="all-linear", blocks="all")
    space.attach(load(tmp_path / "model", device="cpu"), seed=0)
    space.save(tmp_path / "adapter")
    names = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert len(names) > 8  # a set of them, as PEFT has it, is hardly ever in this order
    assert names == sorted(names)


def test_saved_adapters_load_back_bit_equal(tmp_path: Path) -> None:
    save_tiny("bert", tmp_path / "base", kind="classifier")
    model = load(tmp_path / "base", kind="classifier", bits="none", compute_dtype="float32", device="cpu")
    space = LoRA(rank=2)
    space.attach(model, seed=0)
    randomized(space)
    kept = {name: p.clone() for name, p in space.parameters.items()}
    space.save(tmp_path / "adapter")
    randomized(space)
    space.load(tmp_path / "adapter")
    assert all(torch.equal(space.parameters[name], value) for name, value in kept.items())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["modules_to_save"] == ["classifier"]
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: cannot be read"):
        space.load(tmp_path / "adapter")
    last = max(tensors)
    save_file({**tensors, last: tensors[last].int()}, path)
    with pytest.raises(UserError, match=rf"{last.removeprefix('base_model.model.')} is torch\.int32"):
        space.load(tmp_path / "adapter")
    assert all(torch.equal(space.parameters[name], value) for name, value in kept.items())


def test_a_is_drawn_from_the_seed_alone_and_b_is_zero(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    draws = []
    for seed in (0, 0, 1):
        model = load(tmp_path, bits="nf4", device="cpu")
        space = LoRA(rank=4)
        space.attach(model, seed=seed)
        draws.append(space.parameters)
    names = [name for name in draws[0] if "lora_A" in name]
    assert all(torch.equal(draws[0][n], draws[1][n]) for n in names)
    assert not any(torch.equal(draws[0][n], draws[2][n]) for n in names)
    assert all(not draws[0][n].any() for n in draws[0] if "lora_B" in n)


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_default_targets_exist_on_every_architecture(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    model = load(tmp_path, kind=TINY_CONFIGS[name].kind, bits="none", device="cpu")
    chosen = resolve_targets(model, "attention")
    assert len(chosen) in (2, 4)  # fused or separate query and value, two blocks
    assert set(chosen) < set(resolve_targets(model, "all-linear"))


def test_detach_restores_the_base_model(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model = load(tmp_path, bits="nf4", device="cpu")
    ids, _ = tiny_batch()
    before = model.module(input_ids=ids).logits
    space = LoRA(rank=4)
    space.attach(model, seed=0)
    randomized(space)
    assert not torch.equal(model.module(input_ids=ids).logits, before)
    space.detach()
    assert torch.equal(model.module(input_ids=ids).logits, before)


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--rank: got 0"):
        LoRA(rank=0)
    save_tiny("llama", tmp_path / "base")
    model = load(tmp_path / "base", bits="nf4", device="cpu")
    with pytest.raises(UserError, match="no linear layer named 'qproj'; allowed are attention, all-linear"):
        LoRA(targets="qproj").attach(model, seed=0)
    with pytest.raises(UserError, match="--head: got 'guess', allowed: exact, estimated, none"):
        LoRA(head="guess")
    space = LoRA(rank=4)
    space.attach(model, seed=0)
    with pytest.raises(UserError, match=r"adapter_model.safetensors: no such file"):
        space.load(tmp_path)
    space.save(tmp_path / "adapter")
    other = LoRA(rank=2)
    other.attach(model, seed=0)
    with pytest.raises(UserError, match=r"has shape \(4, 64\), the model wants \(2, 64\)"):
        other.load(tmp_path / "adapter")
    everywhere = LoRA(rank=4, targets="all-linear")
    everywhere.attach(model, seed=0)
    with pytest.raises(UserError, match="does not fit this model and space"):
        everywhere.load(tmp_path / "adapter")


def test_a_pooler_that_the_checkpoint_lacks_is_trained_and_saved_with_the_head(tmp_path: Path) -> None:
    save_tiny("bert", tmp_path / "base", kind="masked")  # has no pooler
    model = load(
        tmp_path / "base", kind="classifier", bits="none", compute_dtype="float32", device="cpu", seed=1
    )
    space = LoRA(rank=4)
    space.attach(model, seed=0)
    randomized(space)
    assert "bert.pooler.dense.weight" in space.parameters
    space.save(tmp_path / "adapter")
    ids, _ = tiny_batch()
    other = load(
        tmp_path / "base", kind="classifier", bits="none", compute_dtype="float32", device="cpu", seed=2
    )
    again = LoRA(rank=4)
    again.attach(other, seed=5)
    again.load(tmp_path / "adapter")
    ours = model.module(input_ids=ids).logits
    assert torch.equal(other.module(input_ids=ids).logits, ours)
    plain = AUTO["classifier"].from_pretrained(tmp_path / "base", num_labels=2)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


def test_attaching_again_starts_from_a_clean_model(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model = load(tmp_path, bits="nf4", device="cpu")
    everywhere, narrow = LoRA(rank=4, targets="all-linear"), LoRA(rank=4)
    everywhere.attach(model, seed=0)
    narrow.attach(model, seed=0)
    with_delta = [name for name, linear in model.linears.items() if linear.delta is not None]
    assert with_delta == narrow.target_names
    count = len(narrow.parameters)
    narrow.attach(load(tmp_path, bits="nf4", device="cpu"), seed=0)
    assert len(narrow.parameters) == count


def test_adapters_are_in_the_top_third_unless_said_otherwise(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, num_hidden_layers=5)
    model = load(tmp_path, bits="none", compute_dtype="float32", device="cpu")

    def blocks(**options: Any) -> set[int | None]:
        space = LoRA(rank=2, **options)
        space.attach(model, seed=0)
        return {model.block_of(name) for name in space.target_names}

    assert blocks() == {3, 4}
    assert blocks(blocks=1, targets="all-linear") == {4}
    assert blocks(blocks="all") == blocks(blocks=5) == {0, 1, 2, 3, 4}
    named = "model.layers.1.self_attn.v_proj"
    assert blocks(targets=named) == {1}
    assert blocks(targets=["0.self_attn.q_proj", "v_proj"]) == {0, 1, 2, 3, 4}
    for wrong in (6, 0, -1, True, 2.5, None, "third"):
        with pytest.raises(UserError, match=r"--blocks: got .*, allowed: auto, all, 1 to 5, those of the"):
            blocks(blocks=wrong)
    for targets in (named, [named, "q_proj"]):
        with pytest.raises(UserError, match=f"--targets: '{named}' is not in the top 2 of 5 blocks"):
            blocks(blocks=2, targets=targets)


def test_a_frozen_a_is_saved_and_loaded_and_has_no_noise(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "base")
    model = load(tmp_path / "base", bits="none", compute_dtype="float32", device="cpu")
    space = LoRA(rank=2)
    space.attach(model, seed=0)
    assert all(name.endswith(".lora_B.weight") for name in space.parameters)
    assert {name.replace("_A.", "_B.") for name in space.frozen} == set(space.parameters)
    kept = {name: value.clone() for name, value in space.frozen.items()}
    randomized(space)
    space.save(tmp_path / "adapter")
    other = LoRA(rank=2, train_a=True)  # an adapter does not say what of it was trained
    other.attach(model, seed=1)
    other.load(tmp_path / "adapter")
    assert all(torch.equal(other.parameters[name], value) for name, value in kept.items())
    assert all(torch.equal(other.parameters[name], value) for name, value in space.parameters.items())


def test_a_rank_that_the_tensors_do_not_have_is_refused_before_one_is_made(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    model = load(tmp_path / "model", device="cpu")
    space = LoRA(rank=2)
    space.attach(model, seed=0)
    space.save(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 2**31}))
    with pytest.raises(
        UserError, match=r"lora_A\.weight has shape \(2, \d+\), but r of the config is 2147483648"
    ):
        attach_adapter(model, tmp_path / "adapter")
