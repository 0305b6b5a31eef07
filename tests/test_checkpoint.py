"""Reading model folders: exact bytes, nothing trusted, and a named error for everything that is wrong."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

from hizoo_lite.checkpoints import hub
from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.checkpoints.fingerprint import weight_files
from hizoo_lite.errors import UserError

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(4, 3),
    "b": torch.arange(10).to(torch.bfloat16),
    "c": torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8),
    "scalar": torch.tensor(2.5, dtype=torch.float16),
    "empty": torch.zeros(0, 4),
    "flags": torch.tensor([True, False]),
}


def folder_with(path: Path, tensors: dict | None = None, config: dict | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    save_file(TENSORS if tensors is None else tensors, path / "model.safetensors")
    return path


def sharded(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    save_file({"a": TENSORS["a"]}, path / "one.safetensors")
    save_file({"b": TENSORS["b"]}, path / "two.safetensors")
    write_index(path, {"a": "one.safetensors", "b": "two.safetensors"})
    return path


def write_index(path: Path, weight_map: object) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_tensors_read_equal_tensors_saved(tmp_path):
    checkpoint = Checkpoint.open(folder_with(tmp_path))
    assert set(checkpoint.names()) == set(checkpoint) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert name in checkpoint
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype
        assert checkpoint.nbytes(name) == tensor.numel() * tensor.element_size()
        assert torch.equal(checkpoint.read(name), tensor)
    assert "z" not in checkpoint


def test_rows_read_equal_rows_saved(tmp_path):
    checkpoint = Checkpoint.open(folder_with(tmp_path))
    for start, stop in [(0, 4), (1, 3), (2, 2), (3, 4)]:
        assert torch.equal(checkpoint.read_rows("a", start, stop), TENSORS["a"][start:stop])


@pytest.mark.parametrize(
    ("name", "start", "stop"), [("a", 0, 5), ("a", -1, 2), ("a", 3, 2), ("scalar", 0, 1)]
)
def test_rows_outside_of_a_tensor_are_refused(tmp_path, name, start, stop):
    with pytest.raises(ValueError, match=rf"{name}: rows {start} .. {stop} are outside"):
        Checkpoint.open(folder_with(tmp_path)).read_rows(name, start, stop)


def test_shards_are_found_through_the_index(tmp_path):
    checkpoint = Checkpoint.open(sharded(tmp_path))
    assert checkpoint.names() == ["a", "b"]
    assert torch.equal(checkpoint.read("b"), TENSORS["b"])


def test_a_single_file_is_read_before_an_index_beside_it_and_that_is_said(tmp_path, caplog):
    save_file({"a": TENSORS["a"] + 1}, sharded(tmp_path) / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(checkpoint.read("a"), TENSORS["a"] + 1)
    assert checkpoint.names() == ["a"]
    assert "has model.safetensors and model.safetensors.index.json; the first is read" in caplog.text
    assert weight_files(tmp_path) == checkpoint.files()


@pytest.mark.parametrize(
    "shard",
    [
        "../one.safetensors",
        "/one.safetensors",
        "x/../../one.safetensors",
        "a\\b.safetensors",
        "C:one.safetensors",
        "one.bin",
        3,
    ],
)
def test_an_index_cannot_name_files_outside_of_its_folder(tmp_path, shard):
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    write_index(sharded(tmp_path / "model"), {"a": shard})
    with pytest.raises(UserError, match=r"index\.json: weight_map names .* inside the folder is wanted"):
        Checkpoint.open(tmp_path / "model")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "three.safetensors"}, r"names three\.safetensors, which is missing"),
        ({"b": "one.safetensors"}, r"tensor b is not in one\.safetensors"),
        ({}, r"weight_map: an object"),
        (["a"], r"weight_map: an object"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path, weight_map, message):
    write_index(sharded(tmp_path), weight_map)
    with pytest.raises(UserError, match=message):
        Checkpoint.open(tmp_path)


def test_a_truncated_file_is_refused_when_opened(tmp_path):
    path = folder_with(tmp_path) / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UserError, match=r"model\.safetensors: truncated: \d+ bytes, its header claims"):
        Checkpoint.open(tmp_path)


def test_a_file_cut_while_it_is_read_is_refused(tmp_path):
    checkpoint = Checkpoint.open(folder_with(tmp_path, {"a": TENSORS["a"]}))
    path = tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size - 5)
    with pytest.raises(UserError, match=r"truncated: ends at byte \d+ inside a tensor"):
        checkpoint.read("a")


@pytest.mark.parametrize("content", [b"", b"1234", struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", 0)])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    (folder_with(tmp_path) / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not a safetensors file, or truncated"):
        Checkpoint.open(tmp_path)


def header(**tensor: object) -> str:
    return json.dumps({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **tensor}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{nonsense", "not valid JSON"),
        ("[1, 2]", "not a JSON object"),
        ('{"t": 1, "t": 2}', "a name occurs twice"),
        ('{"t": 1}', "tensor t: dtype, shape and data_offsets wanted"),
        ('{"t": {"dtype": "F32"}}', "tensor t: dtype, shape and data_offsets wanted"),
        (header(data_offsets=[0]), "dtype, shape and data_offsets wanted"),
        (header(dtype="F3"), "dtype 'F3'; allowed are F64"),
        (header(dtype=["F32"]), "allowed are F64"),
        (header(shape=[-2]), "must be integers >= 0"),
        (header(shape=[2.0]), "must be integers >= 0"),
        (header(shape=[True, 2]), "must be integers >= 0"),
        (header(data_offsets=[8, 0]), "its offsets give -8"),
        (header(shape=[3]), "takes 12 bytes, its offsets give 8"),
        (header(shape=[1 << 40, 1 << 40]), "no tensor has shape"),
        (header(data_offsets=[4, 12]), "truncated"),
        (
            '{"t": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},'
            ' "u": {"dtype": "U8", "shape": [4], "data_offsets": [3, 7]}}',
            "tensor u overlaps",
        ),
    ],
)
def test_an_unsound_header_is_refused(tmp_path, text, message):
    content = struct.pack("<Q", len(text)) + text.encode() + bytes(8)
    (folder_with(tmp_path) / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message):
        Checkpoint.open(tmp_path)


def test_only_pickled_weights_are_refused_and_never_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(UserError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        Checkpoint.open(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("[]", "got a list, allowed: a JSON object")]
)
def test_an_unsound_config_is_refused(tmp_path, text, message):
    (folder_with(tmp_path) / "config.json").write_text(text)
    with pytest.raises(UserError, match=rf"config\.json: {message}"):
        Checkpoint.open(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path):
    (folder_with(tmp_path) / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        Checkpoint.open(tmp_path)


INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BESIDE = {"int8": "a.SCB", "nf4": "a.weight.quant_state.bitsandbytes__nf4"}
BESIDE |= {"fp4": "a.weight.quant_state.bitsandbytes__fp4"}


@pytest.mark.parametrize(
    ("quantization", "bits"), [(None, None), (INT8, "int8"), (NF4, "nf4"), ({"load_in_4bit": True}, "fp4")]
)
def test_stored_bits_are_those_of_the_config_where_the_tensors_agree(tmp_path, caplog, quantization, bits):
    tensors = {"a.weight": TENSORS["c"], **({BESIDE[bits]: TENSORS["b"]} if bits else {})}
    checkpoint = Checkpoint.open(folder_with(tmp_path, tensors, {"quantization_config": quantization}))
    assert checkpoint.quantized_bits == bits
    assert not caplog.text


@pytest.mark.parametrize(
    ("quantization", "bits", "said"),
    [
        (NF4, None, "says nf4, but the tensors are in 16 or 32 bits"),
        (INT8, "nf4", "says int8, but the tensors are nf4"),
        (None, "int8", "says nothing, but the tensors are int8"),
    ],
)
def test_tensors_count_where_the_config_says_otherwise(tmp_path, caplog, quantization, bits, said):
    tensors = {"a.weight": TENSORS["c"], **({BESIDE[bits]: TENSORS["b"]} if bits else {})}
    checkpoint = Checkpoint.open(folder_with(tmp_path, tensors, {"quantization_config": quantization}))
    assert (checkpoint.quantized_bits, checkpoint.quantized_bits) == (bits, bits)
    assert [said in message for message in caplog.messages] == [True]


def test_tensors_that_are_quantized_in_several_ways_are_refused(tmp_path):
    tensors = {BESIDE["int8"]: TENSORS["b"], BESIDE["fp4"]: TENSORS["c"]}
    checkpoint = Checkpoint.open(folder_with(tmp_path, tensors, {"quantization_config": INT8}))
    with pytest.raises(UserError, match="quantized in several ways: int8, fp4; one is wanted"):
        _ = checkpoint.quantized_bits


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            "quant_method 'gptq' is not supported; allowed are bitsandbytes",
        ),
        ({"quant_method": "awq"}, "quant_method 'awq' is not supported"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit .* or load_in_8bit wanted"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, "load_in_4bit .* wanted"),
    ],
)
def test_other_quantization_methods_are_refused(tmp_path, quantization, message):
    checkpoint = Checkpoint.open(folder_with(tmp_path, config={"quantization_config": quantization}))
    with pytest.raises(UserError, match=message):
        _ = checkpoint.quantized_bits


def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: pytest.fail("the Hub was asked"))
    for source in (tmp_path / "nothing", "./nothing", "a/b/c"):
        with pytest.raises(UserError, match=r"the folder .* does not exist"):
            Checkpoint.open(source)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        Checkpoint.open(tmp_path / "file")


def test_offline_without_a_cached_model_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"owner/model-that-is-nowhere .* not in the Hub's cache"):
        Checkpoint.open("owner/model-that-is-nowhere")


@pytest.mark.parametrize("with_index", [True, False])
def test_only_safetensors_and_small_files_are_asked_of_the_hub(tmp_path, monkeypatch, with_index):
    folder = sharded(tmp_path) if with_index else folder_with(tmp_path)
    asked = []

    def download(repo, *, revision, allow_patterns, ignore_patterns):
        asked.append((repo, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert "a" in Checkpoint.open("owner/model", revision="v1")
    weights = "*.safetensors" if with_index else "model.safetensors"
    assert [(repo, revision) for repo, revision, _ in asked] == [("owner/model", "v1")] * 2
    assert asked[1][2] == [*asked[0][2], weights]
    assert not any(pattern.endswith((".bin", ".py", "*")) for _, _, patterns in asked for pattern in patterns)


def response(status: int) -> SimpleNamespace:
    """What the Hub's errors read of an HTTP response, whichever HTTP library it uses."""
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError("x", response=response(403)), "must be granted"),
        (errors.RevisionNotFoundError("x", response=response(404)), "no revision 'v9'"),
        (
            errors.RepositoryNotFoundError("x", response=response(404)),
            "neither a local folder nor a repository",
        ),
        (errors.HFValidationError("x"), "nor a valid Hub id"),
        (errors.OfflineModeIsEnabled("x"), "cannot be reached"),
        (errors.LocalEntryNotFoundError("x"), "cannot be reached"),
        (OSError("no route"), "cannot be reached .*: no route"),
    ],
)
def test_the_hubs_refusals_are_told_apart(monkeypatch, error, message):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=message):
        Checkpoint.open("owner/model", revision="v9")
