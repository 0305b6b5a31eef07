"""GGUF files: every tensor is read back by gguf, and transformers' own reader gives our logits."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hizoo_lite.config import TrainConfig
from hizoo_lite.engine.load import load
from hizoo_lite.errors import UserError
from hizoo_lite.export.gguf import architectures, export, vocabulary
from hizoo_lite.export.gguf.export import ADAPTER, MODEL, MODELFILE, export_gguf
from hizoo_lite.model import build
from hizoo_lite.model.kinds import model_path
from hizoo_lite.run import fit
from hizoo_lite.train import saved
from tests.architectures import TINY_CONFIGS, save_tiny
from tests.export_fixtures import write_adapter
from tests.run_fixtures import short_run
from tests.tables import covering
from tests.test_cli import call
from tests.test_export_merged import FLOAT32, logits

gguf = pytest.importorskip("gguf", reason="gguf reads and writes the files (the extra gguf)")

EMBEDDED = Path(model_path("embedded"))
#: Beside the tiny configuration: enough embeddings for the tokenizer, what else llama.cpp asks for.
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {},
    "gemma2": {"layer_types": ["sliding_attention", "full_attention"], "num_key_value_heads": 2},
    "gpt2": {},
}

#: What transformers' reader leaves at defaults that are not the tiny model's.
UNREAD = {
    "qwen3": ("head_dim",),
    "gemma2": (
        "query_pre_attn_scalar",
        "layer_types",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    ),
    "gpt2": ("n_positions",),
}


def tuned(folder: Path, name: str, bits: Any = "nf4", **changes: Any) -> Path:
    """A tiny model with the embedded one's tokenizer, and an adapter of it."""
    save_tiny(name, folder / "model", kind="causal", vocab_size=2056, **{**CHANGES[name], **changes})
    for file in EMBEDDED.glob("tokenizer*"):
        shutil.copyfile(file, folder / "model" / file.name)
    model = load(folder / "model", kind="causal", compute_dtype="float32", device="cpu", bits=bits)
    return write_adapter(model, folder / "adapter", rank=2, seed=1)


def ours(folder: Path, bits: Any) -> torch.Tensor:
    model = load(folder / "model", kind="causal", compute_dtype="float32", device="cpu", bits=bits)
    untuned = logits(model.module)
    saved.attach_adapter(model, folder / "adapter")
    assert (logits(model.module) - untuned).abs().max() > 0.01
    return logits(model.module)


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Float32, in numpy's order of dimensions."""
    return {tensor.name: values(tensor) for tensor in gguf.GGUFReader(path).tensors}


def values(tensor: Any) -> np.ndarray:
    shape = [int(size) for size in reversed(tensor.shape)]
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32)


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize(("name", "bits"), covering(list(CHANGES), ["nf4", "int8", "none"]))
def test_transformers_gives_our_logits_from_the_merged_file(name: str, bits: Any, tmp_path: Path) -> None:
    adapter = tuned(tmp_path, name, bits)
    export_gguf(adapter, tmp_path / "out", merge=True, dtype="float32", base_bits=bits)
    options: dict[str, Any] = {"gguf_file": MODEL, "dtype": torch.float32}
    config = AutoConfig.from_pretrained(tmp_path / "out", **options)
    for field in UNREAD.get(name, ()):
        setattr(config, field, getattr(AutoConfig.from_pretrained(tmp_path / "model"), field))
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "out", config=config, **options)
    places = slice(fields(tmp_path / "out" / MODEL)[f"{module.config.model_type}.context_length"])
    torch.testing.assert_close(logits(module.eval())[:, places], ours(tmp_path, bits)[:, places], **FLOAT32)


@pytest.mark.filterwarnings("ignore")  # of llama_cpp's own files, which Python closes late
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("is_merged", [True, False])
def test_llama_cpp_gives_our_logits(is_merged: bool, name: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python runs GGUF files")
    adapter = tuned(tmp_path, name, "none")
    options: dict[str, Any] = {"merge": True, "dtype": "float32", "base_bits": "none"}
    if is_merged:
        export_gguf(adapter, tmp_path / "out", **options)
    else:
        export_gguf(adapter, tmp_path / "lora")
        export_gguf(without_change(adapter, tmp_path / "zero"), tmp_path / "out", **options)
    running = llama_cpp.Llama(
        str(tmp_path / "out" / MODEL),
        lora_path=None if is_merged else str(tmp_path / "lora" / ADAPTER),
        n_ctx=32,
        n_threads=1,
        logits_all=True,
        type_k=0,  # float32
        type_v=0,
        verbose=False,
    )
    model = load(tmp_path / "model", kind="causal", compute_dtype="float32", device="cpu", bits="none")
    saved.attach_adapter(model, adapter)
    row = running.tokenize(b"The film was GREAT", add_bos=True)
    assert row == build.read_tokenizer(tmp_path / "model")("The film was GREAT").input_ids
    row = row[:8]  # tiny windows
    running.eval(row)
    with torch.no_grad():
        wanted = model.module(input_ids=torch.tensor([row])).logits[0].numpy()
    # its GELU is a table in 16 bits
    share = 2e-3 if name in ("gemma2", "gpt2") else 2e-5
    np.testing.assert_allclose(running.scores[: len(row)], wanted, atol=share * np.abs(wanted).max())


def without_change(adapter: Path, folder: Path) -> Path:
    """The same adapter with nothing to add."""
    shutil.copytree(adapter, folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 0.0}))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("llama", "gpt2", "gemma2") else [pytest.mark.grid])
        for name in CHANGES
    ],
)
def test_the_adapter_s_product_is_what_the_merged_file_has_more(name: str, tmp_path: Path) -> None:
    adapter = tuned(tmp_path, name, "none")
    export_gguf(adapter, tmp_path / "lora")
    export_gguf(adapter, tmp_path / "merged", merge=True, dtype="float32", base_bits="none")
    zero = without_change(adapter, tmp_path / "zero")
    export_gguf(zero, tmp_path / "base", merge=True, dtype="float32", base_bits="none")
    lora, after, before = (
        tensors(tmp_path / path) for path in (f"lora/{ADAPTER}", f"merged/{MODEL}", f"base/{MODEL}")
    )
    said = fields(tmp_path / "lora" / ADAPTER)
    assert (said["general.type"], said["adapter.type"]) == ("adapter", "lora")
    assert said["general.architecture"] == fields(tmp_path / "merged" / MODEL)["general.architecture"]
    changed = {name.removesuffix(".lora_a") for name in lora if name.endswith(".lora_a")}
    assert changed == {name for name in after if not np.array_equal(after[name], before[name])}
    for name in changed:
        a, b = lora[f"{name}.lora_a"], lora[f"{name}.lora_b"]
        factor = said["adapter.lora.alpha"] / a.shape[0]
        np.testing.assert_allclose(after[name] - before[name], factor * b @ a, atol=2e-6)


def test_rows_of_queries_and_keys_are_the_checkpoint_s_by_pairs(tmp_path: Path) -> None:
    """llama.cpp rotates rows 2 i and 2 i + 1 of a head, transformers i and i + half."""
    adapter = tuned(tmp_path, "llama", "none")
    export_gguf(adapter, tmp_path / "lora")
    written = tensors(tmp_path / "lora" / ADAPTER)
    model = load(tmp_path / "model", kind="causal", compute_dtype="float32", device="cpu", bits="none")
    space = saved.attach_adapter(model, adapter)
    for layer, short, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2), ("v_proj", "attn_v", None)):
        b = next(
            value.numpy() for key, value in space.parameters.items() if f"0.self_attn.{layer}.lora_B" in key
        )
        got = written[f"blk.0.{short}.weight.lora_b"]
        if heads is None:
            assert np.array_equal(got, b)
            continue
        got, b = got.reshape(heads, -1, 2), b.reshape(heads, -1, 2)
        half = b.shape[1] // 2
        for head in range(heads):
            for pair in range(half):
                mine = written[f"blk.0.{short}.weight.lora_b"].reshape(heads, 2 * half, -1)[head]
                theirs = b.reshape(heads, 2 * half, -1)[head]
                assert np.array_equal(mine[2 * pair], theirs[pair])
                assert np.array_equal(mine[2 * pair + 1], theirs[pair + half])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_matrices_are_rounded_once_and_nothing_else(dtype: Any, tmp_path: Path) -> None:
    adapter = tuned(tmp_path, "llama", "nf4")
    export_gguf(adapter, tmp_path / "whole", merge=True, dtype="float32", base_bits="nf4")
    export_gguf(adapter, tmp_path / "short", merge=True, dtype=dtype, base_bits="nf4")
    whole, short = tensors(tmp_path / "whole" / MODEL), tensors(tmp_path / "short" / MODEL)
    assert whole.keys() == short.keys()
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    for name, value in whole.items():
        wanted = torch.from_numpy(value)
        wanted = wanted.to(kind).float() if wanted.ndim > 1 else wanted
        assert torch.equal(torch.from_numpy(short[name]), wanted), name


def test_the_file_has_the_tokenizer_and_the_modelfile_its_end(tmp_path: Path) -> None:
    adapter = tuned(tmp_path, "llama", "none")
    export_gguf(adapter, tmp_path / "out", merge=True, base_bits="none")
    said = fields(tmp_path / "out" / MODEL)
    assert (said["tokenizer.ggml.model"], said["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert said["tokenizer.ggml.add_bos_token"] is True
    assert said["tokenizer.ggml.add_eos_token"] is False
    assert (said["tokenizer.ggml.bos_token_id"], said["tokenizer.ggml.eos_token_id"]) == (1, 2)
    mine = AutoTokenizer.from_pretrained(EMBEDDED)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=MODEL)
    text = "The film was GREAT,  it's 12 of 10.\n\nNaïve?"
    assert theirs(text, add_special_tokens=False).input_ids == mine(text, add_special_tokens=False).input_ids
    assert (tmp_path / "out" / MODELFILE).read_text() == 'FROM ./model.gguf\nPARAMETER stop "</s>"\n'
    export_gguf(adapter, tmp_path / "lora")
    text = (tmp_path / "lora" / MODELFILE).read_text()
    assert "\nFROM ./base.gguf\nADAPTER ./adapter.gguf\nPARAMETER stop" in text
    assert fields(tmp_path / "lora" / ADAPTER)["general.base_model.0.name"] == "model"


def test_an_end_that_the_tokenizer_has_no_token_for_stops_nothing(tmp_path: Path) -> None:
    adapter = tuned(tmp_path, "llama", "none")
    ends = {"eos_token_id": [2, 2050]}  # the model has 2056 embeddings
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(ends))
    export_gguf(adapter, tmp_path / "out")
    stops = (tmp_path / "out" / MODELFILE).read_text().split("PARAMETER ")[1:]
    assert stops == ['stop "</s>"\n']


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("<|im_end|>", 'PARAMETER stop "<|im_end|>"'),
        ("a\\n", 'PARAMETER stop "a\\n"'),  # a backslash is one
        ('"', 'PARAMETER stop """""""'),
        ('say "a"\nb', 'PARAMETER stop """say "a"\nb"""'),
        ("\n\n", 'PARAMETER stop "\n\n"'),
        ('"""', '# not said here, a Modelfile cannot hold it: stop \'"""\''),
        ("\x00\u200b", "# not said here, a Modelfile cannot hold it: stop '\\x00\\u200b'"),
    ],
)
def test_stops_are_quoted_as_ollama_s_parser_reads_them(text: str, line: str) -> None:
    assert export._stop(text) == f"{line}\n"


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0}


def test_frequencies_of_llama_3_are_divided_as_transformers_does() -> None:
    rope = {**LLAMA3, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = TINY_CONFIGS["llama"].config(rope_parameters=rope)
    factors = architectures.rope_factors(config)
    assert factors is not None
    assert (factors[0], factors[-1]) == (1.0, 8.0)  # waves shorter than 64 / 4 positions, longer than 64
    assert architectures.rope_factors(TINY_CONFIGS["llama"].config()) is None


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("opt", {}, "gguf for a opt model; allowed: llama, mistral, qwen2, qwen3, gemma2, gpt2"),
        ("llama", {"hidden_act": "gelu"}, "llama model with hidden_act 'gelu'"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 64"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping None"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "'dynamic'",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(name: str, changes: Any, message: str) -> None:
    config = TINY_CONFIGS[name].config(**{**CHANGES.get(name, {}), **changes})
    with pytest.raises(UserError) as refused:
        architectures.find(config)
    assert message in str(refused.value)


def test_a_context_ends_where_a_window_would_begin_to_matter() -> None:
    assert architectures.context_length(TINY_CONFIGS["mistral"].config()) == 8
    assert architectures.context_length(TINY_CONFIGS["llama"].config()) == 64
    assert architectures.context_length(TINY_CONFIGS["gemma2"].config()) == 64


def written_tokenizer(folder: Path, change: Any) -> Any:
    """The embedded model's, with other rules."""
    folder.mkdir()
    for file in EMBEDDED.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    rules = json.loads((folder / "tokenizer.json").read_text())
    change(rules)
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    return build.read_tokenizer(folder)


WORDS = vocabulary._CUTS


@pytest.mark.parametrize("pre", WORDS)
def test_the_way_of_cutting_is_known_by_its_rules(pre: str, tmp_path: Path) -> None:
    normalizer, steps, whole_words = WORDS[pre]

    def change(rules: dict[str, Any]) -> None:
        rules["normalizer"] = normalizer
        parts = [{**step, "trim_offsets": False} if step["type"] == "ByteLevel" else step for step in steps]
        rules["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
        rules["model"]["ignore_merges"] = whole_words

    tokenizer = written_tokenizer(tmp_path / "model", change)
    assert vocabulary.read(tokenizer, tmp_path / "model", 2048, None).pre == pre


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rules: rules.update(normalizer={"type": "Lowercase"}),
            "cuts a text in a way that is not known",
        ),
        (lambda rules: rules["model"].update(ignore_merges=True), "known: gpt-2, smollm, llama-bpe, qwen2"),
        (lambda rules: rules["pre_tokenizer"].update(add_prefix_space=True), "cuts a text"),
    ],
)
def test_another_way_of_cutting_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    tokenizer = written_tokenizer(tmp_path / "model", change)
    with pytest.raises(UserError, match=message):
        vocabulary.read(tokenizer, tmp_path / "model", 2048, None)


def sentencepiece(folder: Path, **rules: Any) -> Any:
    """A small tokenizer as transformers makes one of SentencePiece's."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "ab", "▁ab", "abab"]
    content = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": i,
                "content": text,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for i, text in enumerate(pieces[:3])
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "vocab": {text: i for i, text in enumerate(pieces)},
            "merges": [["a", "b"], ["▁", "ab"], ["ab", "ab"]],
        },
        **rules,
    }
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": "<s>"}))
    return build.read_tokenizer(folder)


def test_sentencepiece_s_scores_are_the_order_of_merges(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path / "model")
    found = vocabulary.read(tokenizer, tmp_path / "model", 270, None)
    assert (found.model, found.pre, found.space_prefix) == ("llama", "default", True)
    assert found.tokens[-6:] == ["abab", *(f"[PAD{i}]" for i in range(265, 270))]
    kinds = gguf.TokenType
    assert found.types[:3] == [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
    assert (found.types[3], found.types[-6], found.types[-1]) == (kinds.BYTE, kinds.NORMAL, kinds.UNUSED)
    assert found.scores is not None
    score = dict(zip(found.tokens, found.scores, strict=True))
    assert score["ab"] > score["▁ab"] > score["abab"] > score["</s>"]


def test_sentencepiece_without_a_space_in_front(tmp_path: Path) -> None:
    rules = {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}}
    tokenizer = sentencepiece(tmp_path / "model", **rules)
    assert vocabulary.read(tokenizer, tmp_path / "model", 270, None).space_prefix is False
    tokenizer = sentencepiece(tmp_path / "other", normalizer={"type": "NFKC"})
    with pytest.raises(UserError, match=r"prepares a text in a way that llama\.cpp does not know"):
        vocabulary.read(tokenizer, tmp_path / "other", 270, None)
    with pytest.raises(UserError, match="has ids up to 264, the model 200 embeddings"):
        vocabulary.read(tokenizer, tmp_path / "other", 200, None)


def test_the_command_writes_both_forms_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    adapter = tuned(tmp_path, "llama", "none")
    arguments = ("export", str(adapter), "--to", "gguf", "--out")
    done = call(*arguments, str(tmp_path / "lora"), "--json")
    assert done.exit_code == 0, done.stderr
    figures = json.loads(done.stdout)
    assert (figures["file"], figures["architecture"]) == (ADAPTER, "llama")
    done = call(*arguments, str(tmp_path / "merged"), "--merge", "--base-bits", "none")
    assert f"{tmp_path / 'merged' / MODEL}: llama, " in done.stdout, done.stderr
    refused = call(*arguments, str(tmp_path / "other"), "--dtype", "bf16")
    assert refused.exit_code == 2
    assert "--dtype: got 'bf16', which an adapter has not; allowed with --merge" in refused.stderr
    refused = call(*arguments, str(tmp_path / "lora"))
    assert "is not empty" in refused.stderr
    assert not (tmp_path / "other").exists()


def test_a_run_that_tuned_rows_of_a_tied_head_has_a_head_of_its_own_in_the_merged_file(
    tmp_path: Path,
) -> None:
    run = fit(TrainConfig(**short_run(tmp_path, lr=0.1, bits="nf4")))
    refused = call("export", str(run.folder), "--to", "gguf", "--out", str(tmp_path / "lora"))
    assert refused.exit_code == 2
    assert "the output matrix, which this model shares with its embeddings" in refused.stderr
    program, *proposed = shlex.split(refused.stderr.rpartition("; allowed: --merge, as in: ")[2])
    assert (program, proposed[-2:]) == ("hizoo-lite", ["--out", str(tmp_path / "lora")])
    done = call(*proposed[:-1], str(tmp_path / "model"), "--dtype", "float32")
    assert "prompt it as it was tuned: 'A short text of your own. It was'" in done.stderr
    assert "output.weight" in tensors(tmp_path / "model" / MODEL)
    assert "```text\n{text} It was\n```" in (tmp_path / "model" / "README.md").read_text()
    model = load(EMBEDDED, bits="nf4", compute_dtype="float32", device="cpu")
    saved.attach_adapter(model, run.folder)
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "model", gguf_file=MODEL, dtype=torch.float32)
    torch.testing.assert_close(logits(module.eval()), logits(model.module), **FLOAT32)


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    save_tiny("bert", tmp_path / "model", kind="classifier")
    model = load(tmp_path / "model", kind="classifier", compute_dtype="float32", device="cpu")
    adapter = write_adapter(model, tmp_path / "adapter", rank=2, seed=1)
    forms: list[dict[str, Any]] = [{}, {"merge": True, "base_bits": "nf4"}]
    for options in forms:
        with pytest.raises(UserError, match="for a classifier model; allowed: causal ones, or --to onnx"):
            export_gguf(adapter, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = tuned(tmp_path, "llama", "none")

    def interrupted(*_: Any) -> None:
        assert (tmp_path / ".out.work" / "export" / MODEL).is_file()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(export._Model, "array", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_gguf(adapter, tmp_path / "out", merge=True, base_bits="none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]
    half = tmp_path / ".out.work" / "export"  # of one that was killed
    half.mkdir(parents=True)
    (half / MODEL).write_bytes(b"GGUF")
    export_gguf(adapter, tmp_path / "out", merge=True, base_bits="none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model", "out"]


def test_without_the_library_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/adapter_config.json").write_text("{}")
    refused = call("export", str(tmp_path / "run"), "--to", "gguf", "--out", str(tmp_path / "out"))
    assert refused.exit_code == 2
    assert refused.stderr.splitlines() == [
        "error: --to gguf: gguf is not installed; run: pip install 'hizoo-lite[gguf]'"
    ]
