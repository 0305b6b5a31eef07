"""Quantizing once: the files are transformers' and bitsandbytes' own, whole or not there, and checked."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BitsAndBytesConfig,
    MixtralConfig,
)
from transformers.quantizers.quantizers_utils import should_convert_module
from typer.testing import CliRunner

from hizoo_lite.checkpoints import writer as files
from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.checkpoints.fingerprint import sha256_of
from hizoo_lite.checkpoints.writer import Form, ShardWriter, file_bytes
from hizoo_lite.cli import app
from hizoo_lite.engine.load import load
from hizoo_lite.errors import UserError
from hizoo_lite.export import shards
from hizoo_lite.export.quantize import PROGRESS_FILE, Quantization
from tests.architectures import TINY_CONFIGS, save_tiny, tiny_batch
from tests.tables import covering
from tests.test_load_process import ROOT, run_python, save_large_llama

AUTO = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "classifier": AutoModelForSequenceClassification,
}
INDEX = "model.safetensors.index.json"
FORMS = [("nf4", True), ("nf4", False), ("fp4", True), ("int8", False)]


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def quantize(source: Path, out: Path, **options: Any) -> Quantization:
    work = Quantization(source, out, **{"kind": "causal", "bits": "nf4", **options})
    work.run()
    return work


def test_layers_that_transformers_does_not_convert_are_named(tmp_path: Path) -> None:
    """It converts nn.Linear itself; Falcon's layers are a subclass."""
    save_tiny("falcon", tmp_path / "falcon")
    save_tiny("gpt2", tmp_path / "gpt2")
    said = call("quantize", "--model", tmp_path / "falcon", "--out", tmp_path / "nf4")
    assert said.exit_code == 0
    assert "transformers will not: that has no quantized form of FalconLinear" in said.stderr
    assert load(tmp_path / "nf4", device="cpu").bits == "nf4"
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    said = call("quantize", "--model", tmp_path / "gpt2", "--out", tmp_path / "fine")
    assert "transformers" not in said.stderr


def test_a_model_whose_classifier_has_another_form_is_quantized(tmp_path: Path) -> None:
    """BART's decoder alone: its classifier has an encoder too."""
    config = BartConfig(
        vocab_size=97, d_model=32, decoder_layers=1, encoder_layers=1, decoder_ffn_dim=64, encoder_ffn_dim=64,
        decoder_attention_heads=2, encoder_attention_heads=2, max_position_embeddings=64,
        is_decoder=True, is_encoder_decoder=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "nf4")
    ids, _ = tiny_batch()
    ours = load(tmp_path / "nf4", compute_dtype="float32", device="cpu").module(ids).logits
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.float32)
    torch.testing.assert_close(ours, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Everything the safetensors library reads from a folder."""
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bf16 Llama of two blocks, with a file beside it."""
    folder = tmp_path_factory.mktemp("source")
    save_tiny("llama", folder, dtype=torch.bfloat16)
    (folder / "special.txt").write_text("a\nb\n")
    return folder


@pytest.fixture(scope="module")
def finished(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quantized Llama; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    quantize(llama, folder)
    return folder


@pytest.fixture
def own(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "own"))


# -------------------------------------------------------------------------------- transformers' own


def theirs(folder: Path, kind: str, bits: str, double_quant: bool, skip: list[str]) -> torch.nn.Module:
    """The model as transformers quantizes it."""
    four = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": bits,
        "bnb_4bit_use_double_quant": double_quant,
    }
    options: dict[str, Any] = {"load_in_8bit": True} if bits == "int8" else four
    config = BitsAndBytesConfig(**options, llm_int8_skip_modules=skip)
    return AUTO[kind].from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})


def logits(module: torch.nn.Module) -> torch.Tensor:
    ids, mask = tiny_batch()
    for layer in module.modules():  # else bitsandbytes repacks the weights at their first use on CPU
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        return module(input_ids=ids, attention_mask=mask).logits


ARCHITECTURES = ["llama", "qwen2", "opt", "gpt2", "gemma2", "phi3", "gpt_neox", "bert", "roberta"]


FLOAT16 = ("opt", "nf4", True, torch.float16)
CASES = [
    pytest.param(
        name,
        *form,
        torch.float32 if (i + j // 2) % 2 else torch.bfloat16,
        marks=[] if j in (i % len(FORMS), -i % len(FORMS)) else [pytest.mark.grid],
    )
    for i, name in enumerate(ARCHITECTURES)
    for j, form in enumerate(FORMS)
]


@pytest.mark.parametrize(("name", "bits", "double_quant", "dtype"), [*CASES, FLOAT16])
def test_the_files_are_what_transformers_saves_and_loads(name, bits, double_quant, dtype, tmp_path):
    full, out, saved = tmp_path / "full", tmp_path / "out", tmp_path / "saved"
    kind = TINY_CONFIGS[name].kind
    save_tiny(name, full, dtype=dtype)
    quantize(full, out, kind=kind, bits=bits, double_quant=double_quant)
    written = json.loads((out / "config.json").read_text())["quantization_config"]
    theirs(full, kind, bits, double_quant, written["llm_int8_skip_modules"]).save_pretrained(saved)
    mine, wanted = tensors_of(out), tensors_of(saved)
    assert set(mine) == set(wanted)
    for key, tensor in wanted.items():
        assert mine[key].dtype == tensor.dtype, key
        assert mine[key].shape == tensor.shape, key
        assert torch.equal(mine[key], tensor), key
    assert any(".weight." in key or key.endswith("SCB") for key in mine)


@pytest.mark.parametrize(
    ("name", "bits", "double_quant"),
    covering(("llama", "qwen2", "gpt2", "roberta"), (("nf4", True), ("int8", False))),
)
def test_logits_in_transformers_equal_those_of_its_own_checkpoint(name, bits, double_quant, tmp_path):
    full, out, saved = tmp_path / "full", tmp_path / "out", tmp_path / "saved"
    kind = TINY_CONFIGS[name].kind
    save_tiny(name, full, dtype=torch.bfloat16)
    quantize(full, out, kind=kind, bits=bits, double_quant=double_quant)
    written = json.loads((out / "config.json").read_text())["quantization_config"]
    theirs(full, kind, bits, double_quant, written["llm_int8_skip_modules"]).save_pretrained(saved)
    config = json.loads((saved / "config.json").read_text())
    if bits != "int8":
        config["quantization_config"]["bnb_4bit_compute_dtype"] = "bfloat16"  # as ours says
    (saved / "config.json").write_text(json.dumps(config))
    mine = AUTO[kind].from_pretrained(out, device_map={"": "cpu"})
    other = AUTO[kind].from_pretrained(saved, device_map={"": "cpu"})
    assert mine.dtype == other.dtype == torch.bfloat16
    assert torch.equal(logits(mine), logits(other))


@pytest.mark.parametrize(("name", "bits"), covering(ARCHITECTURES, ("nf4", "int8")))
def test_our_loader_finds_the_same_weights_as_in_the_source(name, bits, tmp_path, caplog):
    full, out = tmp_path / "full", tmp_path / "out"
    kind = TINY_CONFIGS[name].kind
    save_tiny(name, full, dtype=torch.bfloat16)
    quantize(full, out, kind=kind, bits=bits)
    passed, packed = load(out, kind=kind, device="cpu"), load(full, kind=kind, bits=bits, device="cpu")
    assert passed.bits == bits
    mine, wanted = passed.module.state_dict(), packed.module.state_dict()
    assert set(mine) == set(wanted)
    for key, tensor in wanted.items():
        assert torch.equal(mine[key], tensor), key
    assert torch.equal(logits(passed.module), logits(packed.module))
    assert not caplog.records


def test_projections_outside_of_the_blocks_stay_in_16_bits(tmp_path):
    full, out = tmp_path / "full", tmp_path / "out"
    save_tiny("opt", full, dtype=torch.float16, word_embed_proj_dim=32)
    quantize(full, out)
    skipped = json.loads((out / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert {"decoder.project_in", "decoder.project_out", "lm_head"} <= set(skipped)
    assert tensors_of(out)["model.decoder.project_in.weight"].dtype == torch.float16
    model = AutoModelForCausalLM.from_pretrained(out, device_map={"": "cpu"})
    assert type(model.model.decoder.project_in) is torch.nn.Linear
    assert torch.isfinite(logits(model)).all()


def test_a_quantized_causal_model_loads_as_a_classifier(own):
    model = AutoModelForSequenceClassification.from_pretrained(own, num_labels=3, device_map={"": "cpu"})
    assert type(model.score) is torch.nn.Linear


@pytest.mark.parametrize("name", ["bert", "gpt2", "opt"])
def test_bare_trunks_are_quantized_and_quantized_models_load_as_bare_trunks(name, tmp_path):
    full, trunk, out, again = (tmp_path / part for part in ("full", "trunk", "out", "again"))
    kind = TINY_CONFIGS[name].kind
    save_tiny(name, full, dtype=torch.bfloat16, **({"word_embed_proj_dim": 32} if name == "opt" else {}))
    AutoModel.from_pretrained(full).save_pretrained(trunk)
    quantize(trunk, out, kind="classifier")
    quantize(full, again, kind=kind)
    mine, other = (AutoModel.from_pretrained(path, device_map={"": "cpu"}) for path in (out, again))
    wanted = other.state_dict()
    for key, tensor in mine.state_dict().items():
        assert torch.equal(tensor, wanted[key]) or "pooler" in key, key
    assert (out / "block-00001.safetensors").exists()
    assert load(out, kind="classifier", device="cpu").bits == "nf4"


def test_a_configuration_with_another_dtype_than_the_tensors_is_set_right(llama, tmp_path):
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    quantize(source, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map={"": "cpu"})
    assert model.dtype == torch.bfloat16
    assert torch.isfinite(logits(model)).all()


def test_float64_is_quantized_from_float32(llama, tmp_path):
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    save_file({name: value.double() for name, value in tensors.items()}, source / "model.safetensors")
    quantize(source, tmp_path / "out")
    passed, packed = load(tmp_path / "out", device="cpu"), load(llama, device="cpu")
    for mine, wanted in zip(passed.module.buffers(), packed.module.buffers(), strict=True):
        assert torch.equal(mine, wanted)


def test_a_head_named_like_a_linear_of_a_block_is_anchored():
    patterns = shards.skip_patterns(["dense", "lm_head"], ["layers.0.dense", "layers.0.up"])
    assert patterns == [r"^(\w+\.)?dense$", "lm_head"]
    assert not should_convert_module("dense", patterns)
    assert not should_convert_module("model.dense", patterns)
    assert should_convert_module("layers.0.dense", patterns)


def test_blocks_lie_in_files_of_their_own(finished):
    files = sorted(path.name for path in finished.glob("*.safetensors"))
    assert files == ["block-00000.safetensors", "block-00001.safetensors", "rest.safetensors"]
    for number in range(2):
        names = load_file(finished / f"block-{number:05d}.safetensors")
        assert all(name.startswith(f"model.layers.{number}.") for name in names)
    rest = load_file(finished / "rest.safetensors")
    assert set(rest) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert (finished / "special.txt").read_text() == "a\nb\n"
    assert (finished / "generation_config.json").exists()
    assert sorted(path.name for path in finished.iterdir() if path.name.startswith(".")) == []
    assert not (finished / PROGRESS_FILE).exists()


def test_buffers_that_a_module_computes_are_left_out_and_other_tensors_kept(llama, tmp_path):
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["model.layers.1.attn.masked_bias"] = torch.ones(())
    tensors["model.layers.2.extra.weight"] = torch.ones(2, 2)
    tensors["model.layers.2.c_attn.bias"] = torch.ones(2)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    quantize(source, tmp_path / "out")
    kept = Checkpoint.open(tmp_path / "out")
    assert not any("inv_freq" in name or "masked" in name for name in kept)
    assert torch.equal(kept.read("model.layers.2.c_attn.bias"), torch.ones(2))
    assert kept.place("model.layers.2.extra.weight").path.name == "rest.safetensors"


# ------------------------------------------------------------------------------------ the command


def test_the_command_writes_a_folder_and_then_says_that_it_is_complete(llama, tmp_path):
    out = tmp_path / "out"
    arguments = ("quantize", "--model", llama, "--bits", "fp4", "--out", out)
    done = call(*arguments)
    assert done.exit_code == 0, done.stderr
    assert f"{out}: fp4, 3 files" in done.stdout
    assert "quantize, MiB" in done.stderr
    before = contents(out)
    again = call(*arguments)
    assert again.exit_code == 0
    assert "is complete already: fp4, 3 files" in again.stdout
    assert contents(out) == before
    told = json.loads(call(*arguments, "--json").stdout)
    assert told["was_complete"] is True
    assert told["files"] == 3
    assert abs(told["bytes"] - sum(path.stat().st_size for path in out.glob("*.safetensors"))) < 14 * 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "nf5"], "--bits: got 'nf5', allowed: nf4, fp4, int8"),
        (["--bits", "none"], "--bits: got 'none', allowed"),
        (["--bits", "int8"], "with bits 'nf4', not 'int8', with double_quant True, not False"),
        (["--no-double-quant"], "with double_quant True, not False; allowed: a new or empty folder"),
        (["--model", "nowhere/at/all"], "the folder nowhere/at/all does not exist"),
    ],
)
def test_other_arguments_for_the_same_folder_are_refused_and_nothing_is_touched(llama, own, options, message):
    before = contents(own)
    done = call("quantize", "--model", llama, "--out", own, *options)
    assert done.exit_code == 2
    assert message in done.stderr
    assert contents(own) == before


def test_another_model_of_the_same_sizes_is_refused(own, tmp_path):
    save_tiny("llama", tmp_path / "other", dtype=torch.bfloat16, seed=7)
    with pytest.raises(UserError, match="holds a finished checkpoint of another model"):
        quantize(tmp_path / "other", own)


def test_foreign_folders_and_files_are_refused(llama, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--out: .*foreign is not empty; allowed: a new or empty folder"):
        quantize(llama, foreign)
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match=r"thesis\.txt is a file"):
        quantize(llama, foreign / "thesis.txt")
    (foreign / INDEX).write_text('{"metadata": {}}')
    with pytest.raises(UserError, match="holds another checkpoint"):
        quantize(llama, foreign)
    (foreign / INDEX).write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        quantize(llama, foreign)


def test_a_call_killed_after_the_index_was_written_is_complete(llama, own):
    (own / PROGRESS_FILE).write_text("{}")
    assert Quantization(llama, own, kind="causal", bits="nf4").complete
    assert not (own / PROGRESS_FILE).exists()


def test_a_finished_folder_that_lacks_a_file_is_not_called_complete(llama, own):
    (own / "block-00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"names block-00001\.safetensors, which is missing"):
        quantize(llama, own)


def test_fused_experts_are_refused(tmp_path):
    arguments = {**TINY_CONFIGS["llama"].arguments, "num_local_experts": 2, "num_experts_per_tok": 1}
    AutoModelForCausalLM.from_config(MixtralConfig(**arguments)).save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.experts\.\w+ .* not supported"):
        quantize(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unsound_progress_file_is_refused(llama, tmp_path):
    (tmp_path / PROGRESS_FILE).write_text("[]")
    with pytest.raises(UserError, match="got a list, allowed: what hizoo-lite quantize writes"):
        quantize(llama, tmp_path)


def test_a_quantized_source_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match="is quantized already, to nf4; allowed: a checkpoint in 16 or 32"):
        quantize(finished, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_that_does_not_fit_its_configuration_is_refused(llama, tmp_path):
    source = Path(shutil.copytree(llama, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight"
    for replaced, message in [(None, "1 tensors that .*up_proj"), (torch.ones(3, 3), r"has shape \(3, 3\)")]:
        kept = {name: value for name, value in tensors.items() if name != key}
        save_file(kept if replaced is None else {**kept, key: replaced}, source / "model.safetensors")
        with pytest.raises(UserError, match=message):
            quantize(source, tmp_path / "out")
    save_file({**tensors, key: tensors[key].to(torch.int32)}, source / "model.safetensors")
    with pytest.raises(UserError, match=r"is stored as torch\.int32; allowed are 16/32-bit floats"):
        quantize(source, tmp_path / "out")


# ----------------------------------------------------------------------------------- disk and memory


def test_a_disk_with_too_little_room_is_refused_before_anything_is_written(llama, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    done = call("quantize", "--model", llama, "--out", tmp_path / "deep" / "out")
    assert done.exit_code == 2
    assert "KiB are needed at" in done.stderr
    assert "1000 B are free" in done.stderr
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(("bits", "double_quant"), FORMS)
def test_the_planned_size_is_the_size(llama, tmp_path, bits, double_quant):
    work = quantize(llama, tmp_path, bits=bits, double_quant=double_quant)
    actual = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert actual == work.total_bytes if not double_quant else 0 <= work.total_bytes - actual < 14 * 40


def test_progress_ends_at_the_planned_size(llama, tmp_path):
    told: list[int] = []
    work = Quantization(llama, tmp_path, kind="causal", bits="nf4")
    work.run(told.append)
    assert sum(told) == work.total_bytes
    assert min(told) >= 0


def test_a_full_disk_is_one_message_and_the_call_goes_on_later(llama, finished, tmp_path, monkeypatch):
    write, calls = files._write_at, []

    def full(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) > 60:
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(files, "_write_at", full)
    done = call("quantize", "--model", llama, "--out", tmp_path)
    assert done.exit_code == 2
    assert "block-00001.safetensors: cannot be written: No space left on device" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block-00000.safetensors", PROGRESS_FILE]
    monkeypatch.setattr(files, "_write_at", write)
    again = call("quantize", "--model", llama, "--out", tmp_path)
    assert again.exit_code == 0
    assert "1 of 3 files are there already" in again.stderr
    assert contents(tmp_path) == contents(finished)


def test_a_finished_file_that_was_changed_is_written_again(llama, finished, tmp_path, monkeypatch):
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Quantization, "_copy_small_files", stop)
    stopped = call("quantize", "--model", llama, "--out", tmp_path)
    assert stopped.exit_code == 130
    assert "the same call goes on" in stopped.stderr
    monkeypatch.undo()
    flip(tmp_path / "block-00000.safetensors", 1000)
    work = Quantization(llama, tmp_path, kind="causal", bits="nf4")
    assert work.files_done == 2
    with pytest.raises(UserError, match="holds an unfinished call with bits 'nf4', not 'fp4'"):
        Quantization(llama, tmp_path, kind="causal", bits="fp4")
    work.run()
    assert contents(tmp_path) == contents(finished)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills with SIGKILL")
def test_a_killed_call_goes_on_and_ends_with_the_same_bytes(tmp_path):
    source, whole, out = tmp_path / "source", tmp_path / "whole", tmp_path / "out"
    save_tiny("llama", source, dtype=torch.bfloat16, num_hidden_layers=20)
    arguments = ["quantize", "--model", str(source), "--out", str(out), "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "hizoo_lite.cli", *arguments], env=environment, stderr=subprocess.DEVNULL
    )
    limit = time.monotonic() + 120
    while not (out / "block-00002.safetensors").exists() and time.monotonic() < limit:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = {path.name for path in out.iterdir()}
    assert PROGRESS_FILE in left
    assert "block-00002.safetensors" in left
    assert not {INDEX, "rest.safetensors"} & left
    with pytest.raises(UserError, match="config"):
        Checkpoint.open(out)
    assert Quantization(source, out, kind="causal", bits="nf4").files_done >= 2
    done = call(*arguments)
    assert done.exit_code == 0, done.stderr
    assert "of 21 files are there already" in done.stderr
    quantize(source, whole)
    assert contents(out) == contents(whole)


MEASURE = """
import gc, json, re, sys
from hizoo_lite.export.quantize import Quantization

def memory():
    status = open("/proc/self/status").read()
    found = re.findall(r"(RssAnon|RssFile|VmRSS|VmHWM):\\s+(\\d+)", status)
    return {key: int(kilobytes) * 1024 for key, kilobytes in found}

tiny, large, out = sys.argv[1:]
peaks = {}
for bits in ("nf4", "int8"):
    Quantization(tiny, out + "-tiny" + bits, kind="causal", bits=bits).run()  # imports are not the work's
    gc.collect()
    before = memory()
    open("/proc/self/clear_refs", "w").write("5")
    Quantization(large, out + bits, kind="causal", bits=bits).run()
    peaks[bits] = memory()["VmHWM"] - before["VmRSS"]
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures with Linux's /proc")
def test_no_more_than_one_matrix_is_held(llama, tmp_path):
    stored_bytes, largest_bytes = save_large_llama(tmp_path / "large")
    measured = json.loads(run_python(MEASURE, llama, tmp_path / "large", tmp_path / "out").splitlines()[-1])
    assert stored_bytes > 130 << 20
    # measured 24 MiB (nf4) and 22 (int8), of which the largest packed matrix 1.4 and 2.8; mapping adds 130
    assert set(measured) == {"nf4", "int8"}
    assert max(measured.values()) < largest_bytes + (32 << 20)


# ----------------------------------------------------------------------------------------- checksums


def flip(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("shard", ["block-00000.safetensors", "block-00001.safetensors", "rest.safetensors"])
@pytest.mark.parametrize("place", [0.3, 0.77, 0.99999])
def test_one_flipped_bit_is_found(own, shard, place):
    size = (own / shard).stat().st_size
    flip(own / shard, int(place * size))
    with pytest.raises(
        UserError,
        match=rf"^{shard}: its sha256 is not the one recorded in {INDEX}: the file was changed or damaged; "
        "quantize again or restore it",
    ):
        Checkpoint.open(own).verify()


def test_sound_files_are_verified_with_progress(finished):
    told: list[int] = []
    checkpoint = Checkpoint.open(finished)
    total = sum(path.stat().st_size for path in checkpoint.files())
    assert len(checkpoint.checksums()) == 3
    assert checkpoint.verify(told.append) == sum(told) == total


def test_files_without_a_recorded_checksum_are_not_read(llama):
    assert Checkpoint.open(llama).verify(lambda _: pytest.fail("something was read")) == 0


def test_a_blob_of_the_hubs_cache_must_have_the_checksum_that_names_it(llama, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    digest = sha256_of(llama / "model.safetensors", bytearray(4096))
    shutil.copyfile(llama / "model.safetensors", blobs / digest)
    shutil.copyfile(llama / "config.json", snapshot / "config.json")
    (snapshot / "model.safetensors").symlink_to(Path("../..") / "blobs" / digest)
    checkpoint = Checkpoint.open(snapshot)
    assert checkpoint.verify() == (blobs / digest).stat().st_size
    flip(blobs / digest, 5000)
    with pytest.raises(UserError, match=r"^model\.safetensors: its sha256 is not the one that names it in"):
        checkpoint.verify()


def test_a_place_says_where_the_bytes_lie(finished):
    checkpoint = Checkpoint.open(finished)
    for name in checkpoint:
        place = checkpoint.place(name)
        with open(place.path, "rb") as file:
            file.seek(place.offset)
            content = file.read(place.nbytes)
        assert content == bytes(checkpoint.read(name).reshape(-1).view(torch.uint8).numpy())


def test_a_file_that_cannot_be_read_is_named(own, monkeypatch):
    checkpoint = Checkpoint.open(own)
    (own / "rest.safetensors").unlink()
    with pytest.raises(UserError, match=r"rest\.safetensors: cannot be read: No such file"):
        checkpoint.read("lm_head.weight")
    with pytest.raises(UserError, match=r"rest\.safetensors: cannot be read: No such file"):
        checkpoint.verify()


# ---------------------------------------------------------------------------------------- the writer


TENSORS = {
    "bytes": torch.arange(7, dtype=torch.uint8),
    "half": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "wide": torch.arange(6, dtype=torch.float64).view(2, 3),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "flags": torch.tensor([True, False, True]),
}
DECLARED = {name: Form(value.dtype, tuple(value.shape)) for name, value in TENSORS.items()}


@pytest.mark.parametrize("order", [list(TENSORS), list(reversed(TENSORS)), sorted(TENSORS)])
def test_whatever_the_order_of_writing_the_library_reads_the_same_file(tmp_path, order):
    path = tmp_path / "a.safetensors"
    with ShardWriter(path, DECLARED, {"format": "pt"}) as writer:
        for name in order:
            if name == "half":
                writer.write_rows(name, TENSORS[name][:1])
                writer.write_rows(name, TENSORS[name][1:])
            else:
                writer.write(name, TENSORS[name])
    read = load_file(path)
    assert all(torch.equal(read[name], value) for name, value in TENSORS.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert writer.nbytes == path.stat().st_size == file_bytes(DECLARED, {"format": "pt"})
    assert writer.sha256 == sha256_of(path, bytearray(100))
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda w: w.write("bytes", TENSORS["bytes"][:3]), r"bytes: shape \(7,\) was declared, got \(3,\)"),
        (lambda w: w.write("bytes", TENSORS["bytes"].float()), "torch.uint8 was declared, got torch.float32"),
        (lambda w: w.write_rows("half", TENSORS["half"][:, :2]), r"rows of \(5,\) were declared"),
        (lambda w: [w.write_rows("half", TENSORS["half"]) for _ in "12"], "30 bytes were declared, got 60"),
        (lambda w: w.write("bytes", TENSORS["bytes"]), "4 tensors are not complete"),
    ],
)
def test_what_was_not_declared_is_refused_and_nothing_stays(tmp_path, write, message):
    with (
        pytest.raises(ValueError, match=message),
        ShardWriter(tmp_path / "a.safetensors", DECLARED) as writer,
    ):
        write(writer)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_a_named_error(tmp_path):
    with pytest.raises(UserError, match=r"a\.safetensors: cannot be written: No such file"):
        ShardWriter(tmp_path / "none" / "a.safetensors", DECLARED)
    with pytest.raises(UserError, match=r"b\.json: cannot be written: No such file"):
        files.write_json(tmp_path / "none" / "b.json", {})
