"""Merged folders: transformers alone gives our logits with the adapter, from every form of the base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from hizoo_lite import spaces
from hizoo_lite.base import Space
from hizoo_lite.config import TrainConfig
from hizoo_lite.engine.load import load
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import UserError
from hizoo_lite.export import merged
from hizoo_lite.export.quantize import Quantization
from hizoo_lite.model import kinds
from hizoo_lite.model.model import Model
from hizoo_lite.noise import normal
from hizoo_lite.run import fit
from hizoo_lite.tasks.tokens import pad_id
from hizoo_lite.train import components, setup
from hizoo_lite.train.evaluate import evaluate
from hizoo_lite.train.resolved import Resolved
from tests.architectures import TINY_CONFIGS, save_tiny, tiny_batch
from tests.run_fixtures import short_run
from tests.tables import covering
from tests.test_load_process import run_python, save_large_llama

AUTO = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "classifier": AutoModelForSequenceClassification,
}

#: Float32 products in another order; logits are of order 10, and W + B A is rounded once to 24 bits.
FLOAT32 = {"rtol": 1e-5, "atol": 5e-5}


def tuned(model: Model, name: str, **options: Any) -> Space:
    """A space on the model whose every part has been moved far enough to matter."""
    space = spaces.get(name, targets="all-linear", blocks="all", **options)
    space.attach(model, seed=0)
    for key, value in space.parameters.items():
        value.add_(normal(3, 0, key, value.shape), alpha=0.05)
    for linear in model.linears.values():
        weight = linear.weight
        for buffer in ("residual", "absmax", "scb"):
            value = dict(weight.named_buffers(recurse=False)).get(buffer)
            if name != "lora" and value is not None:
                noise = normal(4, 0, f"{linear.name}.{buffer}", value.shape)
                value.copy_((value + 0.02 * noise).abs() if buffer != "residual" else 0.02 * noise)
    return space


def logits(module: torch.nn.Module) -> torch.Tensor:
    ids, _ = tiny_batch()
    for layer in module.modules():  # else bitsandbytes repacks the weights at their first use on CPU
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        return module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()


def theirs(folder: Path, kind: str, **options: Any) -> torch.nn.Module:
    """The folder in transformers, which must find every parameter and have use for every tensor."""
    module, info = AUTO[kind].from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return module.eval()


def merge(adapter: Path, out: Path, **options: Any) -> Quantization:
    work = merged.prepare(adapter, out, **options)
    work.run()
    return work


BASES = [
    ("llama", None, "nf4", True),
    ("llama", None, "none", True),
    ("gpt2", None, "nf4", False),
    ("gpt2", None, "int8", True),
    ("opt", None, "fp4", True),
    ("gemma2", None, "nf4", True),
    ("qwen2", None, "int8", True),
    ("roberta", None, "nf4", True),
    ("bert", None, "fp4", False),
    ("roberta", "classifier", "nf4", True),
    ("bert", "classifier", "int8", True),
    ("llama", "classifier", "nf4", True),
]


@pytest.mark.parametrize(
    ("name", "kind", "bits", "double_quant", "is_stored"),  # quantized on load, or before
    covering(BASES, (False, True)),
)
def test_transformers_gives_our_logits_with_the_adapter(name, kind, bits, double_quant, is_stored, tmp_path):
    kind = kind or TINY_CONFIGS[name].kind
    labels = {"num_labels": 3} if kind == "classifier" else {}
    base = tmp_path / "base"
    save_tiny(name, base, kind=kind, dtype=torch.bfloat16, **labels)
    if is_stored and bits != "none":
        base = tmp_path / "quantized"
        Quantization(tmp_path / "base", base, kind=kind, bits=bits, double_quant=double_quant).run()
    model = load(
        base, kind=kind, bits=bits, compute_dtype="float32", device="cpu", double_quant=double_quant, **labels
    )
    untuned = logits(model.module)
    tuned(model, "lora", rank=4, alpha=6).save(tmp_path / "adapter")
    ours = logits(model.module)
    assert (ours - untuned).abs().max() > 1e-2
    options = {"base_bits": bits, "base_double_quant": double_quant}
    merge(tmp_path / "adapter", tmp_path / "full", dtype="float32", **options)
    torch.testing.assert_close(logits(theirs(tmp_path / "full", kind)), ours, **FLOAT32)
    # the 16-bit folder is the float32 one rounded once, tensor by tensor
    merge(tmp_path / "adapter", tmp_path / "half", **options)
    exact, rounded = tensors_of(tmp_path / "full"), tensors_of(tmp_path / "half")
    assert set(exact) == set(rounded)
    assert all(torch.equal(rounded[key], value.to(torch.bfloat16)) for key, value in exact.items())
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


TRAINED = [
    ("dense", "none", {"update": "residual"}),
    ("dense", "nf4", {"update": "residual"}),
    ("dense", "int8", {"update": "requantize"}),
    ("dense", "nf4", {"update": "requantize"}),
    ("scales", "fp4", {}),
    ("scales", "int8", {}),
]


@pytest.mark.parametrize(
    ("name", "space", "bits", "options", "is_stored"), covering(("gpt2", "bert"), TRAINED, (False, True))
)
def test_trained_weights_are_the_merged_ones(name, space, bits, options, is_stored, tmp_path):
    kind = "classifier" if name == "bert" else "causal"
    base = tmp_path / "base"
    save_tiny(name, base, kind=kind, dtype=torch.bfloat16)
    is_stored = is_stored and bits != "none"
    if is_stored:
        base = tmp_path / "quantized"
        Quantization(tmp_path / "base", base, kind=kind, bits=bits).run()
    model = load(base, kind=kind, bits=bits, compute_dtype="float32", device="cpu", double_quant=is_stored)
    untuned = logits(model.module)
    tuned(model, space, **options).save(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "full", dtype="float32")
    ours = logits(model.module)
    assert (ours - untuned).abs().max() > 1e-2
    torch.testing.assert_close(logits(theirs(tmp_path / "full", kind)), ours, **FLOAT32)


@pytest.mark.parametrize(
    ("name", "bits", "double_quant"),
    covering(("llama", "gpt2", "bert"), (("nf4", True), ("fp4", False), ("int8", True))),
)
def test_requantized_is_what_quantize_makes_of_the_float32_folder(name, bits, double_quant, tmp_path):
    kind = "classifier" if name == "bert" else "causal"
    save_tiny(name, tmp_path / "base", kind=kind, dtype=torch.bfloat16)
    model = load(tmp_path / "base", kind=kind, bits="nf4", device="cpu")
    tuned(model, "lora", rank=4).save(tmp_path / "adapter")
    options = {"base_bits": "nf4", "dtype": "float32"}
    merge(tmp_path / "adapter", tmp_path / "full", **options)
    packed = {"bits": bits, "double_quant": double_quant}
    merge(tmp_path / "adapter", tmp_path / "packed", **options, **packed)
    Quantization(tmp_path / "full", tmp_path / "again", kind=kind, **packed).run()
    made, wanted = tensors_of(tmp_path / "packed"), tensors_of(tmp_path / "again")
    assert set(made) == set(wanted)
    assert all(torch.equal(made[key], value) for key, value in wanted.items())
    merge(tmp_path / "adapter", tmp_path / "half", base_bits="nf4", **packed)
    half = tensors_of(tmp_path / "half")
    codes = [key for key in wanted if wanted[key].dtype == torch.int8 or key.endswith(".absmax")]
    assert codes
    assert all(torch.equal(half[key], wanted[key]) for key in codes)  # quantized from float32 all the same
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert "quantization_config" in config
    module = theirs(tmp_path / "half", kind, device_map={"": "cpu"})
    assert torch.isfinite(logits(module)).all()
    assert load(tmp_path / "half", kind=kind, device="cpu").bits == bits


def test_a_tied_head_is_written_once_and_stays_tied(tmp_path):
    save_tiny("qwen2", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    tuned(load(tmp_path / "base", bits="nf4", device="cpu"), "lora").save(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "out", base_bits="nf4")
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    module = theirs(tmp_path / "out", "causal")
    assert module.lm_head.weight is module.model.embed_tokens.weight


@pytest.mark.filterwarnings("ignore:.*tie.*")
def test_a_head_that_the_checkpoint_keeps_apart_stays_apart(tmp_path):
    save_tiny("qwen2", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 0.5
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    model = load(tmp_path / "base", bits="nf4", compute_dtype="float32", device="cpu")
    tuned(model, "lora").save(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "out", base_bits="nf4", dtype="float32")
    torch.testing.assert_close(logits(theirs(tmp_path / "out", "causal")), logits(model.module), **FLOAT32)


def test_a_bare_trunk_gets_its_head(tmp_path):
    whole = save_tiny("bert", tmp_path / "whole", kind="classifier")
    whole.bert.save_pretrained(tmp_path / "base")
    model = load(
        tmp_path / "base",
        kind="classifier",
        bits="nf4",
        compute_dtype="float32",
        device="cpu",
        num_labels=4,
    )
    tuned(model, "lora").save(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "out", base_bits="nf4", dtype="float32")
    module = theirs(tmp_path / "out", "classifier")
    assert module.config.num_labels == 4
    torch.testing.assert_close(logits(module), logits(model.module), **FLOAT32)


def test_a_classifier_of_a_decoder_knows_what_it_is_padded_with(tmp_path):
    source = Path(kinds.model_path("embedded"))
    base = Path(shutil.copytree(source, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    del config["pad_token_id"]
    (base / "config.json").write_text(json.dumps(config))
    model = load(base, kind="classifier", bits="nf4", compute_dtype="float32", device="cpu")
    tuned(model, "lora").save(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "out", base_bits="nf4", dtype="float32")
    module = theirs(tmp_path / "out", "classifier")
    model.config.pad_token_id = module.config.pad_token_id
    assert module.config.pad_token_id == pad_id(model.tokenizer)
    torch.testing.assert_close(logits(module), logits(model.module), **FLOAT32)


def test_rows_of_a_classifier_are_padded_with_what_it_takes_for_padding():
    model = load(kinds.model_path("embedded"), kind="classifier", bits="none", device="cpu")
    padding = model.config.pad_token_id
    model.tokenizer.pad_token = None
    assert pad_id(model.tokenizer) != padding
    assert setup.make_encoder(model, components.find_task("embedded"), 32).pad_id == padding


def test_the_metric_of_a_run_is_that_of_its_merged_model(tmp_path):
    settings = short_run(tmp_path, task="embedded", data="embedded", steps=60, batch_size=8, rank=8)
    settings |= {"targets": "all-linear", "train_examples": 400, "dev_examples": 0, "test_examples": 100}
    run = fit(TrainConfig(**settings, bits="nf4", compute_dtype="float32"))
    before, after = run.before, run.after
    assert abs(after.loss - before.loss) > 1e-3
    merge(tmp_path / "run", tmp_path / "out", dtype="float32")
    again = {**settings, "model": str(tmp_path / "out"), "bits": "none", "compute_dtype": "float32"}
    config = TrainConfig(**{**again, "out": str(tmp_path / "unused")})
    task = components.find_task("embedded")
    model = Resolved(config, task).model()
    encoder = setup.make_encoder(model, task, config.max_length)
    found = evaluate(Traversal(model), encoder, components.make_splits(config, task).test, 50)
    assert found.predictions == after.predictions
    assert found.metric == after.metric
    assert found.loss == pytest.approx(after.loss, abs=1e-5)  # of float32 sums in another order
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (run.setup.model.folder / name).read_bytes()


# ------------------------------------------------------------------------------------ what is refused


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter without a run, and its base beside it; tests that change them copy both."""
    folder = tmp_path_factory.mktemp("llama")
    save_tiny("llama", folder / "base", dtype=torch.bfloat16)
    tuned(load(folder / "base", bits="nf4", device="cpu"), "lora", rank=2).save(folder / "adapter")
    return folder / "adapter"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_bits": None}, r"--base-bits: missing; .*adapter does not say .*; allowed: nf4"),
        ({"dtype": "bf17"}, "--dtype: got 'bf17', allowed: bf16, fp16, float32"),
        ({"bits": "int4"}, "--bits: got 'int4', allowed: nf4, fp4, int8, none"),
        ({"model": "/nowhere/at/all"}, "the folder /nowhere/at/all does not exist"),
    ],
)
def test_wrong_options_are_refused_and_nothing_is_written(adapter, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        merged.prepare(adapter, tmp_path / "out", **{"base_bits": "nf4", **options})
    assert not (tmp_path / "out").exists()


def test_other_folders_are_refused_and_the_same_call_is_not(adapter, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--out: .*out is not empty; allowed: a new or empty folder"):
        merged.prepare(adapter, out, base_bits="nf4")
    (out / "thesis.txt").unlink()
    merge(adapter, out, base_bits="nf4")
    assert merged.prepare(adapter, out, base_bits="nf4").complete
    for changed in ({"base_bits": "int8"}, {"base_bits": "nf4", "dtype": "fp16"}):
        with pytest.raises(UserError, match="holds a finished checkpoint of another model"):
            merged.prepare(adapter, out, **changed)
    with pytest.raises(UserError, match="with bits 'none', not 'nf4'"):
        merged.prepare(adapter, out, base_bits="nf4", bits="nf4")
    retuned = Path(shutil.copytree(adapter.parent, tmp_path / "retuned")) / "adapter"
    tensors = load_file(retuned / "adapter_model.safetensors")
    next(iter(tensors.values())).mul_(1.5)
    save_file(tensors, retuned / "adapter_model.safetensors")
    with pytest.raises(UserError, match="holds a finished checkpoint of another model"):
        merged.prepare(retuned, out, base_bits="nf4", model=str(adapter.parent / "base"))


def test_a_folder_written_half_is_no_checkpoint_and_the_same_call_completes_it(adapter, tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    merge(adapter, whole, base_bits="nf4")

    def stop(_: int) -> None:
        if (half / "model-00001-of-00003.safetensors").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merged.prepare(adapter, half, base_bits="nf4").run(stop)
    assert sorted(path.name for path in half.iterdir()) == [
        "model-00001-of-00003.safetensors",
        "quantize-progress.json",
    ]
    with pytest.raises(UserError, match=r"config\.json"):
        load(half)
    merge(adapter, half, base_bits="nf4")
    assert {p.name: p.read_bytes() for p in half.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }


def change_adapter(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY.format("B")), r"pairs of lora_A\.weight and lora_B\.weight wanted"),
        (
            lambda t: t.update({"base_model.model.lm_tail.weight": torch.ones(2)}),
            "lm_tail.weight was tuned as a whole",
        ),
        (
            lambda t: t.update({KEY.format(x).replace("q_proj", "x_proj"): torch.ones(2, 2) for x in "AB"}),
            r"does not fit .*: 'model\.layers\.0\.self_attn\.x_proj'",
        ),
        (
            lambda t: t.update({KEY.format("A"): torch.ones(2, 48)}),
            r"q_proj has A \(2, 48\) and B \(64, 2\), the model's weight is \(64, 64\)",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_refused(adapter, change, message, tmp_path):
    own = Path(shutil.copytree(adapter, tmp_path / "own"))
    change_adapter(own, change)
    with pytest.raises(UserError, match=message):
        merge(own, tmp_path / "out", base_bits="nf4")
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_values_too_large_for_fp16_are_refused(adapter, tmp_path):
    own = Path(shutil.copytree(adapter, tmp_path / "own"))
    change_adapter(own, lambda tensors: tensors[KEY.format("B")].mul_(1e7))
    with pytest.raises(UserError, match=r"--dtype: .*q_proj\.weight holds values that fp16 cannot"):
        merge(own, tmp_path / "out", base_bits="nf4", dtype="fp16")


def test_weights_trained_on_another_model_are_refused(tmp_path):
    for name, seed in (("base", 0), ("other", 1)):
        save_tiny("llama", tmp_path / name, dtype=torch.bfloat16, seed=seed)
    save_tiny("llama", tmp_path / "wide", hidden_size=128, dtype=torch.bfloat16)
    for space, other, message in (
        ("dense", "other", "its scales differ from the model's: it was made for another one"),
        ("scales", "wide", r"absmax is \(64,\) torch.float32, the model has \(256,\) torch.float32"),
    ):
        model = load(tmp_path / "base", bits="nf4", device="cpu", double_quant=False)
        tuned(model, space).save(tmp_path / space)
        with pytest.raises(UserError, match=message):
            merge(tmp_path / space, tmp_path / "out" / space, model=str(tmp_path / other))


def test_block_files_and_record_must_agree(tmp_path):
    save_tiny("bert", tmp_path / "base", kind="classifier")
    model = load(tmp_path / "base", kind="classifier", bits="int8", device="cpu")
    tuned(model, "scales").save(tmp_path / "adapter")
    (tmp_path / "adapter" / "head.safetensors").rename(tmp_path / "head")
    with pytest.raises(UserError, match=r"head\.safetensors: no such file"):
        merged.prepare(tmp_path / "adapter", tmp_path / "out")
    (tmp_path / "adapter" / "block-00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"hizoo_space\.json and the block files differ about 'bert\.enc"):
        merged.prepare(tmp_path / "adapter", tmp_path / "out")


def test_a_head_that_nothing_has_values_for_is_refused(tmp_path):
    whole = save_tiny("bert", tmp_path / "whole", kind="classifier")
    whole.bert.save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base", kind="classifier", bits="nf4", device="cpu")
    tuned(model, "lora", head="none").save(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"classifier\.\w+ is neither in the checkpoint nor in what was"):
        merged.prepare(tmp_path / "adapter", tmp_path / "out", base_bits="nf4")


# ------------------------------------------------------------------------------------------- memory


MEASURE = """
import gc, json, re, sys, threading
from hizoo_lite.export import merged

def memory():
    status = open("/proc/self/status").read()
    found = re.findall(r"(RssAnon|VmRSS|VmHWM):\\s+(\\d+)", status)
    return {key: int(kilobytes) * 1024 for key, kilobytes in found}

tiny, large, out = sys.argv[1:]
peaks = {}
for number, (bits, base_bits) in enumerate([("none", "nf4"), ("nf4", "int8")]):
    options = {"bits": bits, "base_bits": base_bits}
    merged.prepare(tiny, f"{out}-tiny-{number}", **options).run()  # imports are not the work's
    gc.collect()
    before = memory()
    open("/proc/self/clear_refs", "w").write("5")
    anonymous = []
    merged.prepare(large, f"{out}-{number}", **options).run(lambda _: anonymous.append(memory()["RssAnon"]))
    peaks[bits] = [memory()["VmHWM"] - before["VmRSS"], max(anonymous) - before["RssAnon"]]
print(json.dumps(peaks))
"""


@pytest.mark.grid  # what holds one matrix is what quantizes: tests/test_quantize.py measures it
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures with Linux's /proc")
def test_no_more_than_one_matrix_is_held(adapter, tmp_path):
    stored_bytes, largest_bytes = save_large_llama(tmp_path / "large")
    model = load(tmp_path / "large", bits="nf4", device="cpu")
    tuned(model, "lora", rank=2).save(tmp_path / "adapter")
    del model
    told = run_python(MEASURE, adapter, tmp_path / "adapter", tmp_path / "out").splitlines()[-1]
    measured = json.loads(told)
    assert stored_bytes > 130 << 20
    assert set(measured) == {"none", "nf4"}
    # measured 20 MiB (16 bits from nf4) and 15 (nf4 from int8): a packed matrix of 1.4 or 2.8 and chunks;
    # the largest tensor, the embedding, has 16
    for peak, anonymous in measured.values():
        assert max(peak, anonymous) < largest_bytes + (24 << 20)
