"""Loading: the logits are transformers' own, the packed bytes bitsandbytes' own."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hizoo_lite import device
from hizoo_lite.engine.load import load
from hizoo_lite.errors import UserError
from hizoo_lite.export.quantize import Quantization
from hizoo_lite.model import build
from hizoo_lite.model.linear import BranchLinear
from hizoo_lite.model.model import Model
from hizoo_lite.quant import FourBitWeight, Int8Weight, PlainWeight
from tests.architectures import TINY_CONFIGS, make_tiny, save_tiny, tiny_batch

ROOT = Path(__file__).parents[1]
STORIES = ROOT / "../shared/models/stories260K"

#: float32 sums in another order (GPT-2 fuses bias and product): a few units of the last place of logits
#: near 4, after two layers. A wrong weight, mask or activation is off by 0.01 and more.
LOGITS_ATOL = 5e-6


def logits(module: torch.nn.Module) -> torch.Tensor:
    """Logits of a fixed padded batch, at its real tokens; (rows, labels) for a classifier."""
    ids, mask = tiny_batch()
    with torch.no_grad():
        out = module(input_ids=ids, attention_mask=mask).logits
    return out[mask.bool()] if out.ndim == 3 else out


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(edit(tensors), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A tiny Llama in float32; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("llama")
    save_tiny("llama", folder)
    return folder


@pytest.fixture
def own_llama(llama, tmp_path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "llama"))


# ------------------------------------------------------------------------------------ architectures


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_unquantized_logits_equal_transformers_float32_logits(name, dtype, tmp_path, caplog):
    reference = save_tiny(name, tmp_path, dtype=dtype)
    model = load(tmp_path, kind=TINY_CONFIGS[name].kind, bits="none", compute_dtype="float32", device="cpu")
    torch.testing.assert_close(logits(model.module), logits(reference), rtol=0, atol=LOGITS_ATOL)
    assert not any("not used" in record.message for record in caplog.records)


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_every_linear_of_the_blocks_is_packed_and_every_other_is_plain(name, tmp_path):
    reference = save_tiny(name, tmp_path, dtype=torch.bfloat16)
    model = load(tmp_path, kind=TINY_CONFIGS[name].kind, bits="nf4", device="cpu")
    wanted = {n for n, m in reference.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    assert set(model.linears) == wanted
    for path, linear in model.linears.items():
        inside = path.startswith(model.block_prefix + ".")
        assert isinstance(linear.weight, FourBitWeight if inside else PlainWeight), path
        assert model.module.get_submodule(path) is linear
        assert linear.name == path
    assert len(model.blocks) == 2
    assert all(
        block is model.module.get_submodule(f"{model.block_prefix}.{i}")
        for i, block in enumerate(model.blocks)
    )


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_quantized_weights_equal_the_dequantized_checkpoint(name, tmp_path):
    """The packed model computes what transformers computes with the same matrices, dequantized."""
    reference = save_tiny(name, tmp_path)
    model = load(tmp_path, kind=TINY_CONFIGS[name].kind, bits="nf4", compute_dtype="float32", device="cpu")
    with torch.no_grad():
        for path, linear in model.linears.items():
            weight = linear.weight.unpack(torch.empty(linear.weight.shape))
            original = reference.get_submodule(path)
            transposed = type(original).__name__ == "Conv1D"
            original.weight.copy_(weight.t() if transposed else weight)
    torch.testing.assert_close(logits(model.module), logits(reference), rtol=0, atol=LOGITS_ATOL)


def test_parts_are_kept_in_the_documented_dtypes_and_nothing_is_trainable(tmp_path):
    save_tiny("bert", tmp_path, dtype=torch.bfloat16)
    model = load(tmp_path, kind="masked", bits="int8", compute_dtype="bf16", device="cpu")
    embeddings = {n for n, m in model.module.named_modules() if isinstance(m, torch.nn.Embedding)}
    for name, parameter in model.module.named_parameters():
        stored = torch.bfloat16 if name.removesuffix(".weight") in embeddings else torch.float32
        assert parameter.dtype == stored, name
        assert not parameter.requires_grad
    assert all(linear.bias is None or linear.bias.dtype == torch.float32 for linear in model.linears.values())
    assert model.linears["cls.predictions.decoder"].weight.weight.dtype == torch.bfloat16
    assert not any(module.training for module in model.module.modules())
    assert (model.kind, model.bits, model.compute) == ("masked", "int8", torch.bfloat16)
    ids, _ = tiny_batch()
    assert model.module.get_input_embeddings()(ids).dtype == torch.float32


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt2", "opt", "bert"])
def test_a_tied_head_shares_the_embeddings_memory(name, tmp_path):
    save_tiny(name, tmp_path, tie_word_embeddings=True)
    model = load(tmp_path, kind=TINY_CONFIGS[name].kind, device="cpu")
    embedding = model.module.get_input_embeddings().weight
    heads = [linear for linear in model.linears.values() if linear.out_features == embedding.shape[0]]
    assert [head.weight.weight.data_ptr() for head in heads] == [embedding.data_ptr()]
    unshared = sum(
        t.numel() * t.element_size() for t in [*model.module.parameters(), *model.module.buffers()]
    )
    assert unshared - model.nbytes() >= embedding.numel() * 4


def test_a_tied_head_that_is_stored_as_well_is_shared_where_equal_and_kept_where_not(tmp_path, caplog):
    save_tiny("llama", tmp_path, tie_word_embeddings=True)
    edit_tensors(tmp_path, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    model = load(tmp_path, device="cpu")
    embedding = model.module.get_input_embeddings().weight
    assert model.linears["lm_head"].weight.weight.data_ptr() == embedding.data_ptr()
    edit_tensors(tmp_path, lambda t: {**t, "lm_head.weight": t["lm_head.weight"] + 1})
    model = load(tmp_path, device="cpu")
    assert torch.equal(model.linears["lm_head"].weight.weight, model.module.get_input_embeddings().weight + 1)
    assert "kept apart" in caplog.text


# --------------------------------------------------------------------------------- bitsandbytes' own


def quantized_by_transformers(folder: Path, **options: object) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**options), device_map={"": "cpu"}
    )
    for module in model.modules():  # else bitsandbytes repacks the weights at their first use on CPU
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


FOUR_BIT_OPTIONS = [("nf4", True), ("nf4", False), ("fp4", True)]


@pytest.mark.parametrize(("bits", "double_quant"), FOUR_BIT_OPTIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_bytes_equal_those_of_transformers(name, bits, double_quant, dtype, tmp_path):
    save_tiny(name, tmp_path, dtype=dtype)
    theirs = quantized_by_transformers(
        tmp_path, load_in_4bit=True, bnb_4bit_quant_type=bits, bnb_4bit_use_double_quant=double_quant
    )
    model = load(tmp_path, bits=bits, double_quant=double_quant, device="cpu")
    packed = {n: lin.weight for n, lin in model.linears.items() if isinstance(lin.weight, FourBitWeight)}
    assert len(packed) == sum(type(m).__name__ == "Linear4bit" for m in theirs.modules()) > 0
    for path, weight in packed.items():
        other = theirs.get_submodule(path).weight
        assert torch.equal(weight.codes, other.data.view(-1)), path
        assert torch.equal(weight.absmax, other.quant_state.absmax), path


def test_int8_codes_equal_those_of_transformers(llama):
    theirs = quantized_by_transformers(llama, load_in_8bit=True)
    model = load(llama, bits="int8", device="cpu")
    packed = {n: lin.weight for n, lin in model.linears.items() if isinstance(lin.weight, Int8Weight)}
    assert len(packed) == 14
    for path, weight in packed.items():
        other = theirs.get_submodule(path).weight
        assert torch.equal(weight.codes, other.data), path
        assert torch.equal(weight.scb, other.SCB.view(-1)), path


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"load_in_8bit": True},
    ],
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_checkpoint_saved_quantized_loads_like_one_quantized_here(name, options, tmp_path, caplog):
    full, saved = tmp_path / "full", tmp_path / "saved"
    save_tiny(name, full)
    quantized_by_transformers(full, **options).save_pretrained(saved)
    bits = options.get("bnb_4bit_quant_type", "int8")
    passed = load(saved, device="cpu")
    packed = load(full, bits=bits, double_quant=options.get("bnb_4bit_use_double_quant", False), device="cpu")
    assert passed.bits == bits
    assert set(passed.linears) == set(packed.linears)
    assert not any("not used" in record.message for record in caplog.records)
    for path, linear in passed.linears.items():
        expected = packed.linears[path].weight
        assert type(linear.weight) is type(expected), path
        for (key, got), wanted in zip(linear.weight.named_buffers(), expected.buffers(), strict=True):
            assert torch.equal(got, wanted), (path, key)
    other = "int8" if bits != "int8" else "nf4"
    with pytest.raises(
        UserError, match=f"bits: got '{other}', but the checkpoint is already quantized to '{bits}'"
    ):
        load(saved, bits=other, device="cpu")


def test_other_quantization_methods_are_refused(own_llama):
    edit_json(own_llama / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match="quant_method 'gptq' is not supported"):
        load(own_llama, device="cpu")


def test_a_forward_leaves_every_packed_byte_alone(llama):
    model = load(llama, bits="nf4", compute_dtype="bf16", device="cpu")
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    logits(model.module)
    assert len(before) > 0
    assert all(torch.equal(before[n], t) for n, t in model.module.state_dict().items())


# ------------------------------------------------------------------------------------------- names


def test_a_base_checkpoint_without_prefix_fills_the_prefixed_trunk(tmp_path):
    reference = save_tiny("bert", tmp_path)
    edit_tensors(tmp_path, lambda t: {n.removeprefix("bert."): v for n, v in t.items()})
    model = load(tmp_path, kind="masked", bits="none", compute_dtype="float32", device="cpu")
    torch.testing.assert_close(logits(model.module), logits(reference), rtol=0, atol=LOGITS_ATOL)


def test_legacy_layer_norm_names_are_understood(tmp_path):
    reference = save_tiny("bert", tmp_path)

    def rename(tensors):
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        return {
            ".".join(n.split(".")[:-2])
            + "."
            + old.get(".".join(n.split(".")[-2:]), ".".join(n.split(".")[-2:])): v
            for n, v in tensors.items()
        }

    edit_tensors(tmp_path, rename)
    assert any(n.endswith("LayerNorm.gamma") for n in load_file(tmp_path / "model.safetensors"))
    model = load(tmp_path, kind="masked", bits="none", compute_dtype="float32", device="cpu")
    torch.testing.assert_close(logits(model.module), logits(reference), rtol=0, atol=LOGITS_ATOL)


def test_computed_buffers_of_old_checkpoints_are_ignored_and_strangers_are_reported(own_llama, caplog):
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        "model.stranger.weight": torch.zeros(2),
    }
    edit_tensors(own_llama, lambda t: {**t, **extra})
    with caplog.at_level(logging.WARNING):
        load(own_llama, device="cpu")
    warnings = [r.getMessage() for r in caplog.records if "not used" in r.getMessage()]
    assert len(warnings) == 1
    assert "1 tensors are not used: model.stranger.weight" in warnings[0]


# -------------------------------------------------------------------------------------- classifiers


@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "gpt2"])
def test_a_stored_classifier_equals_transformers(name, tmp_path):
    reference = save_tiny(name, tmp_path, kind="classifier", num_labels=3)
    model = load(
        tmp_path, kind="classifier", bits="none", compute_dtype="float32", device="cpu", num_labels=3
    )
    assert model.new_parameters == []
    torch.testing.assert_close(logits(model.module), logits(reference), rtol=0, atol=LOGITS_ATOL)


def test_a_missing_head_is_drawn_from_the_seed_alone(tmp_path):
    save_tiny("roberta", tmp_path)

    def head(seed: int) -> Model:
        torch.randn(3)  # the global generator must not matter
        return load(tmp_path, kind="classifier", num_labels=5, seed=seed, device="cpu")

    first, again, other = head(1), head(1), head(2)
    names = ["classifier.dense", "classifier.out_proj"]
    assert sorted(first.new_parameters) == sorted(f"{n}.{leaf}" for n in names for leaf in ("weight", "bias"))
    for name in names:
        weight = first.linears[name].weight.weight
        assert weight.dtype == torch.float32
        assert torch.equal(weight, again.linears[name].weight.weight)
        assert not torch.equal(weight, other.linears[name].weight.weight)
        assert not first.linears[name].bias.any()
        # initializer_range is 0.02; 320 values or more scatter by 4 % at most
        assert abs(weight.std().item() / 0.02 - 1) < 0.2
    assert logits(first.module).shape == (3, 5)


def test_a_missing_pooler_is_new_as_well(tmp_path):
    save_tiny("bert", tmp_path)
    model = load(tmp_path, kind="classifier", device="cpu")
    assert sorted(model.new_parameters) == [
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "classifier.bias",
        "classifier.weight",
    ]


def test_another_number_of_labels_than_stored_is_refused(tmp_path):
    save_tiny("bert", tmp_path, kind="classifier", num_labels=3)
    with pytest.raises(
        UserError, match=r"classifier\.(weight|bias) .* \(num_labels: the checkpoint's head has 3"
    ):
        load(tmp_path, kind="classifier", num_labels=2, device="cpu")


# ------------------------------------------------------------------------------------ user mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": "int3"}, "bits: got 'int3', allowed are nf4, fp4, int8, none"),
        ({"kind": "seq2seq"}, "kind: got 'seq2seq', allowed are causal, masked, classifier"),
        ({"compute_dtype": "fp8"}, "compute_dtype: got 'fp8', allowed are auto, bf16, fp16, float32"),
        ({"device": "tpu"}, "device: got 'tpu', allowed are auto, cpu, cuda"),
        ({"device": "meta"}, "device: got 'meta', allowed are"),
        ({"device": "cuda:99"}, "device: got 'cuda:99', but there are"),
        ({"kind": "classifier", "num_labels": 0}, "num_labels: got 0, at least 1"),
    ],
)
def test_arguments_that_are_not_allowed_are_named(llama, arguments, message):
    with pytest.raises(UserError, match=message):
        load(llama, **{"device": "cpu", **arguments})


def test_an_unknown_architecture_is_refused(own_llama):
    edit_json(own_llama / "config.json", model_type="perceptron9000")
    with pytest.raises(UserError, match=r"config\.json: not a configuration this transformers knows"):
        load(own_llama, device="cpu")


def test_a_configuration_that_transformers_refuses_is_named(own_llama):
    edit_json(own_llama / "config.json", hidden_size="wide")
    with pytest.raises(UserError, match=r"config\.json: not a .* knows: Field 'hidden_size' expected int"):
        load(own_llama, device="cpu")


def test_a_kind_that_an_architecture_has_not_is_refused(llama):
    with pytest.raises(UserError, match="model type 'llama' cannot be loaded as masked"):
        load(llama, kind="masked", device="cpu")


def test_code_in_a_model_folder_is_never_run(own_llama):
    edit_json(
        own_llama / "config.json",
        model_type="mine",
        auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
    )
    (own_llama / "mine.py").write_text(f"open({str(own_llama / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="not a configuration"):
        load(own_llama, device="cpu")
    assert not (own_llama / "ran").exists()


def test_missing_tensors_are_listed(own_llama):
    gone = ("model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight")
    edit_tensors(own_llama, lambda t: {n: v for n, v in t.items() if n not in gone})
    with pytest.raises(
        UserError, match=r"3 tensors that LlamaForCausalLM needs are not in the checkpoint"
    ) as error:
        load(own_llama, device="cpu")
    assert all(name in str(error.value) for name in gone)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "model.layers.0.mlp.up_proj.weight",
            r"up_proj\.weight has shape \(3, 3\), but .* wants \(128, 64\)",
        ),
        ("model.embed_tokens.weight", r"embed_tokens\.weight has shape \(3, 3\)"),
        ("model.norm.weight", r"norm\.weight has shape \(3, 3\), but the configuration wants \(64,\)"),
    ],
)
def test_tensors_of_another_shape_are_named(own_llama, name, message):
    edit_tensors(own_llama, lambda t: {**t, name: torch.zeros(3, 3)})
    with pytest.raises(UserError, match=message):
        load(own_llama, device="cpu")


def test_integers_without_their_quantization_tensors_are_refused(own_llama):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(own_llama, lambda t: {**t, name: t[name].to(torch.int8)})
    with pytest.raises(
        UserError, match=r"up_proj\.weight is stored as torch\.int8 without quantization tensors"
    ):
        load(own_llama, device="cpu")


def test_fused_experts_are_refused_by_name(tmp_path):
    config = transformers.MixtralConfig(
        **{**TINY_CONFIGS["llama"].arguments, "num_local_experts": 2, "num_experts_per_tok": 1}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"MixtralForCausalLM: model\.layers\.0\.mlp\.experts\.\w+ .* not supported"
    ):
        load(tmp_path, device="cpu")


def test_convolutions_in_blocks_are_called_so(tmp_path):
    config = transformers.ConvBertConfig(
        vocab_size=97, hidden_size=32, embedding_size=32, num_hidden_layers=1, num_attention_heads=2,
        head_ratio=1, intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"ConvBertForMaskedLM: .*conv\w+\.depthwise\.weight .* is of a convolution;"
    ):
        load(tmp_path, kind="masked", device="cpu")
    with pytest.raises(UserError, match="is of a convolution; this architecture is not supported"):
        Quantization(tmp_path, tmp_path / "out", kind="masked", bits="nf4")


def test_buffers_that_are_computed_from_weights_are_refused(tmp_path):
    """I-BERT's layers keep their weights in whole numbers too."""
    config = transformers.IBertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=66, pad_token_id=1,
    )  # fmt: skip
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"IBertForMaskedLM: .*weight_integer is computed from a weight"):
        load(tmp_path, kind="masked", bits="none", device="cpu")
    with pytest.raises(UserError, match="IBertForMaskedLM: no linear layers in its blocks"):
        Quantization(tmp_path, tmp_path / "out", kind="masked", bits="nf4")


@pytest.mark.parametrize("bits", ["none", "nf4"])
def test_a_model_that_computes_with_weights_themselves_is_refused(bits, tmp_path):
    """MobileBERT's head multiplies by decoder.weight and dense.weight, one beside the other."""
    config = transformers.MobileBertConfig(
        vocab_size=97, hidden_size=64, embedding_size=32, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, intra_bottleneck_size=32, true_hidden_size=32, num_feedforward_networks=2,
    )  # fmt: skip
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    model = load(tmp_path, kind="masked", bits=bits, device="cpu")
    with pytest.raises(UserError, match=r"model: t of cls\.predictions\.decoder\.weight itself is asked for"):
        model.module(torch.arange(5, 15)[None])
    inside = next(iter(model.linears.values()))
    with pytest.raises(
        UserError, match=rf"model: linear of {inside.name}\.weight itself is asked for; this arch"
    ):
        torch.nn.functional.linear(torch.zeros(1, inside.in_features), inside.weight)
    assert not hasattr(inside.weight, "requires_grad")
    with pytest.raises(AttributeError, match="has no attribute 'wait'"):
        _ = inside.weight.wait


def test_float64_tensors_become_float32(own_llama):
    edit_tensors(own_llama, lambda t: {n: v.double() for n, v in t.items()})
    model = load(own_llama, bits="none", device="cpu")
    assert {t.dtype for t in model.module.state_dict().values()} == {torch.float32}


# --------------------------------------------------------------------------- choices and surroundings


def test_automatic_choices_follow_the_device(monkeypatch):
    monkeypatch.setattr(device.Cpu, "multiplies_bf16", lambda self: True)
    assert build.choose_compute("auto", torch.device("cpu")) == torch.bfloat16
    monkeypatch.setattr(device.Cpu, "multiplies_bf16", lambda self: False)
    assert build.choose_compute("auto", torch.device("cpu")) == torch.float32
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, supported=supported, **__: supported)
        assert build.choose_compute("auto", torch.device("cuda")) == dtype
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    for available, chosen in ((True, "cuda:2"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert device.choose_device("auto") == torch.device(chosen)
    assert build.choose_bits(None, None) == "nf4"
    assert build.choose_bits(None, "int8") == build.choose_bits("int8", "int8") == "int8"


def test_attention_is_sdpa_except_where_logits_are_capped():
    names = ("llama", "gemma2", "bert")
    chosen = {n: build.build(TINY_CONFIGS[n].config(), TINY_CONFIGS[n].kind) for n in names}
    used = {name: module.config._attn_implementation for name, module in chosen.items()}
    assert used == {"llama": "sdpa", "gemma2": "eager", "bert": "sdpa"}
    assert all(parameter.is_meta for module in chosen.values() for parameter in module.parameters())


def test_the_cpus_bf16_support_is_read_from_its_flags(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpu = device.Cpu()
    monkeypatch.setattr(device, "CPUINFO", cpuinfo)
    monkeypatch.setattr(device.platform, "machine", lambda: "x86_64")
    assert not cpu.multiplies_bf16()
    cpuinfo.write_text("processor : 0\nflags : fpu avx512f avx512_bf16 sse\n")
    assert cpu.multiplies_bf16()
    cpuinfo.write_text("processor : 0\nflags : fpu avx512f\n")
    assert not cpu.multiplies_bf16()
    monkeypatch.setattr(device.platform, "machine", lambda: "aarch64")
    cpuinfo.write_text("flags : avx512_bf16\n")
    assert not cpu.multiplies_bf16()


def test_a_folder_without_tokenizer_gives_none_and_an_unsound_one_is_refused(own_llama):
    assert load(own_llama, device="cpu").tokenizer is None
    later = {"version": "1.0", "pre_tokenizer": {"type": "FromALaterVersion"}, "model": {"type": "BPE"}}
    for content in ("{", json.dumps(later)):
        (own_llama / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=r"the tokenizer cannot be read: .*than tokenizers \d+\."):
            load(own_llama, device="cpu")


@pytest.mark.parametrize(
    ("name", "value"),
    [("eos_token_id", "</s>"), ("eos_token_id", [2, "x"]), ("bos_token_id", 1.5)],
)
def test_tokens_of_generation_settings_that_are_no_numbers_are_refused(own_llama, name, value):
    edit_json(own_llama / "generation_config.json", **{name: value})
    with pytest.raises(
        UserError, match=rf"generation_config\.json: {name}: got .*, allowed: the number of a token"
    ):
        load(own_llama, device="cpu")


def test_generation_settings_are_those_of_the_folder(own_llama):
    edit_json(own_llama / "generation_config.json", eos_token_id=[2, 7])
    assert load(own_llama, device="cpu").module.generation_config.eos_token_id == [2, 7]


@pytest.mark.skipif(not STORIES.exists(), reason="the shared stories260K model is not here")
def test_a_trained_model_generates_the_same_as_transformers():
    reference = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    model = load(STORIES, bits="none", compute_dtype="float32", device="cpu")
    prompt = model.tokenizer("Once upon a time", return_tensors="pt")
    expected = reference.generate(**prompt, do_sample=False, max_new_tokens=20)
    assert torch.equal(model.module.generate(**prompt, do_sample=False, max_new_tokens=20), expected)


def test_tiny_models_depend_on_their_seed_alone():
    first, again, other = (make_tiny("llama", seed=seed) for seed in (3, 3, 4))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        assert not torch.equal(parameter, other.get_parameter(name))


def test_loaded_linears_are_branch_linears(llama):
    model = load(llama, device="cpu")
    assert len(model.linears) == 15
    assert all(isinstance(linear, BranchLinear) for linear in model.linears.values())
    assert all(
        linear.state is model.state and linear.scratch is model.scratch for linear in model.linears.values()
    )


@pytest.mark.parametrize("shown", [False, True])
def test_loading_that_takes_long_has_a_bar_at_a_terminal(
    shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hizoo_lite.model.weights.SHOWN_AFTER", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: shown, raising=False)
    load("embedded", device="cpu")
    assert ("loading the model" in capsys.readouterr().err) is shown
