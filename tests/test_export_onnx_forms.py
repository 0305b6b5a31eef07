"""Exports to ONNX whose weights were tuned, merged or coded anew, and what is checked of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hizoo_lite import spaces
from hizoo_lite.base import Bits
from hizoo_lite.edge.folder import Export
from hizoo_lite.engine.load import load
from hizoo_lite.errors import ExportError, UserError
from hizoo_lite.export.onnx import compare
from hizoo_lite.export.onnx.export import export_onnx
from hizoo_lite.export.onnx.linear import RecodedProduct
from hizoo_lite.export.onnx.trace import following
from hizoo_lite.export.quantize import Quantization
from hizoo_lite.noise import normal
from hizoo_lite.quant import ResidualWeight, pack
from tests.architectures import make_tiny, save_tiny
from tests.export_fixtures import KINDS, tuned, write_adapter
from tests.test_export_onnx import multiply


def tuned_weights(folder: Path, name: str, bits: Bits, space: str, **options: Any) -> Path:
    """A tiny model quantized without 8-bit scales, and a space whose every weight was moved on it."""
    kind: Any = KINDS[name]
    save_tiny(name, folder / "source", kind=kind, num_hidden_layers=1)
    source = folder / "model"
    Quantization(str(folder / "source"), source, kind=kind, bits=bits, double_quant=False).run()
    model = load(source, kind=kind, compute_dtype="float32", device="cpu")
    changed = spaces.get(space, targets="all-linear", **options)
    changed.attach(model, seed=0)
    for linear in model.linears.values():
        for key, value in linear.weight.named_buffers():
            noise = normal(4, 0, f"{linear.name}.{key}", value.shape)
            if key == "residual":
                value.copy_(0.02 * noise)
            elif key in ("absmax", "scb"):
                value.mul_(1 + 0.1 * noise)
    for key, value in changed.parameters.items():
        value.add_(normal(3, 0, key, value.shape), alpha=0.05)
    changed.save(folder / "tuned")
    return folder / "tuned"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in nf4, two adapters of it and the export of the first, in tiles smaller than its matrices."""
    folder = tmp_path_factory.mktemp("llama")
    first, _ = tuned(folder, "llama", "nf4", dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("hizoo_lite.export.onnx.linear.TILE_BYTES", 64 * 4 * 40)
        export_onnx(first, folder / "onnx")
    return folder


@pytest.mark.parametrize(
    ("name", "bits", "space", "options", "operator"),
    [
        ("llama", "nf4", "dense", {"update": "residual"}, "MatMulBnb4 + FusedMatMul"),
        pytest.param("bert", "nf4", "scales", {}, "MatMulBnb4", marks=pytest.mark.grid),
        pytest.param(
            *("bert", "int8", "dense", {"update": "residual"}, "MatMulNBits + FusedMatMul"),
            marks=pytest.mark.grid,
        ),
        pytest.param(
            *("llama", "int8", "dense", {"update": "requantize"}, "MatMulNBits"), marks=pytest.mark.grid
        ),
    ],
)
def test_tuned_weights_are_exported_as_they_are(name, bits, space, options, operator, tmp_path) -> None:
    run = tuned_weights(tmp_path, name, bits, space, **options)
    record = export_onnx(run, tmp_path / "onnx").record
    assert record["form"] == "tuned"
    assert record["check"]["max_abs_difference"] < compare.LIMIT
    assert operator in record["model"]["operators"]
    assert record["tuned"]["space"] == space
    assert record["adapters"] == {}
    assert record["model"]["adapter_inputs"] == {"lora": {}, "head": {}}
    with pytest.raises(UserError, match="holds a tuned model, which takes no adapters"):
        export_onnx(run, tmp_path / "onnx")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bert", "fp16"),
        *(pytest.param(*one, marks=pytest.mark.grid) for one in (("llama", "fp16"), ("gpt2", "float32"))),
    ],
)
def test_a_merged_export_computes_what_the_adapter_does(name: str, dtype: Any, tmp_path: Path) -> None:
    first, second = tuned(tmp_path, name, "nf4")
    record = export_onnx(first, tmp_path / "onnx", merge=True, dtype=dtype).record
    exact = [run for run in record["check"]["runs"] if run["model"] == "merged"]
    rounded = [run for run in record["check"]["runs"] if run["model"] == "tuned"]
    assert max(run["max_abs_difference"] for run in exact) < compare.LIMIT
    assert len(rounded) == len(exact)
    assert record["tuned"] | {"source": ""} == {"source": "", "space": "lora", "dtype": dtype}
    assert (record["form"], record["bits"]) == ("merged", "none")
    assert set(record["model"]["operators"]) == {"FusedMatMul"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(UserError, match="holds a merged model, which takes no adapters"):
        export_onnx(second, tmp_path / "onnx")


@pytest.mark.grid
def test_the_fast_format_is_measured_and_recorded(tmp_path: Path) -> None:
    first, _ = tuned(tmp_path, "opt", "nf4")
    record = export_onnx(first, tmp_path / "onnx", format="fast").record
    check = record["check"]
    assert set(record["model"]["operators"]) == {"MatMulNBits", "FusedMatMul"}
    assert check["limit"] is None
    assert compare.LIMIT < check["mean_abs_difference"] < check["max_abs_difference"]
    assert 0.25 < check["same_choice"] <= 1.0


@pytest.mark.parametrize("columns", [64, 80, 33])
def test_recoded_weights_are_within_half_a_step_of_their_block(columns: int) -> None:
    values = torch.randn(70, columns, generator=torch.Generator().manual_seed(0))
    weight = ResidualWeight(pack(values, "nf4"))
    weight.residual.copy_(0.1 * values)
    product = RecodedProduct(weight.shape, lambda: weight)
    product.attributes["accuracy_level"] = 0
    got = torch.from_numpy(multiply(product, "MatMulNBits", columns).T.copy())
    wanted = weight.values(torch.empty(70, columns))
    assert torch.all((got - wanted).abs() <= 0.51 * _steps(wanted))


def _steps(values: torch.Tensor) -> torch.Tensor:
    """The distance of neighbouring codes at every value: a 15th of its block's range, zero included."""
    steps = torch.empty_like(values)
    for first in range(0, values.shape[1], 32):
        block = values[:, first : first + 32]
        span = block.amax(1).clamp(min=0) - block.amin(1).clamp(max=0)
        steps[:, first : first + 32] = span[:, None] / 15
    return steps


def test_a_large_matrix_is_cut_one_tile_after_the_other(llama: Path) -> None:
    assert Export.open(llama / "onnx").record["check"]["max_abs_difference"] < compare.LIMIT


@pytest.mark.grid
def test_an_architecture_that_onnxruntime_cannot_run_is_named(tmp_path: Path) -> None:
    save_tiny("falcon", tmp_path / "source", kind="causal", num_hidden_layers=1)
    model = load(tmp_path / "source", device="cpu")
    adapter = write_adapter(model, tmp_path / "adapter", rank=1, seed=0)
    with pytest.raises(
        ExportError,
        match=r"FalconForCausalLM cannot be exported: onnxruntime .* has no operator Mul .*BFLOAT16",
    ):
        export_onnx(adapter, tmp_path / "onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "source"]


def test_an_architecture_that_torch_cannot_trace_is_named(tmp_path: Path) -> None:
    """Dynamic RoPE chooses its frequencies by the values of the positions."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    first, _ = tuned(tmp_path, "llama", "none", rope_parameters=rope)
    with pytest.raises(
        UserError, match=r"LlamaForCausalLM \(model type 'llama'\) cannot be exported to ONNX: "
    ):
        export_onnx(first, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_code_that_fails_while_it_is_traced_is_named_by_its_reason(tmp_path: Path) -> None:
    model = make_tiny("llama")
    with pytest.raises(UserError, match=r"cannot trace it \(ValueError: sizes differ\)"), following(model):
        raise ValueError("sizes differ\n")
    with pytest.raises(UserError, match=r"^no such head$"), following(model):
        raise UserError("no such head")


@pytest.mark.grid
def test_positions_begin_where_the_models_own_do(tmp_path: Path) -> None:
    """RoBERTa counts them from behind the padding's row; the export checks itself against the model."""
    save_tiny("roberta", tmp_path / "source", kind="causal", is_decoder=True, num_hidden_layers=1)
    model = load(tmp_path / "source", bits="none", compute_dtype="float32", device="cpu")
    adapter = write_adapter(model, tmp_path / "adapter", rank=1, seed=0)
    export = export_onnx(adapter, tmp_path / "onnx", base_bits="none")
    assert export.record["check"]["max_abs_difference"] < compare.LIMIT


def test_an_adapter_whose_base_is_gone_is_added_unchecked_and_says_so(llama: Path, tmp_path: Path) -> None:
    model = llama / "model"
    shutil.copytree(llama / "onnx", tmp_path / "onnx")
    model.rename(tmp_path / "elsewhere")
    try:
        about = export_onnx(llama / "second", tmp_path / "onnx").record["adapters"]["second"]
    finally:
        (tmp_path / "elsewhere").rename(model)
    assert str(model) in about["check"]["skipped"]
    assert Export.open(tmp_path / "onnx").adapters == ["first", "second"]


def test_a_second_adapter_that_computes_something_else_is_taken_back(
    llama: Path, tmp_path: Path, monkeypatch
) -> None:
    shutil.copytree(llama / "onnx", tmp_path / "onnx")
    before = sorted(path.name for path in (tmp_path / "onnx").rglob("*"))
    monkeypatch.setattr("hizoo_lite.export.onnx.export.LIMIT", 0.0)
    monkeypatch.setattr(compare.Reference, "__new__", _strict(compare.Reference.__new__))
    with pytest.raises(ExportError, match="with adapter 'second'"):
        export_onnx(llama / "second", tmp_path / "onnx")
    assert sorted(path.name for path in (tmp_path / "onnx").rglob("*")) == before
    assert Export.open(tmp_path / "onnx").adapters == ["first"]


def _strict(made: Any) -> Any:
    return lambda cls, cases, adapter=None, **more: made(cls, cases, adapter, limit=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "quick"}, "--format: got 'quick', allowed: exact, fast"),
        ({"merge": True, "dtype": "fp8"}, "--dtype: got 'fp8', allowed: fp16, float32"),
        ({"dtype": "fp16"}, "--dtype: got 'fp16' without --merge"),
        ({"merge": True, "format": "fast"}, "--format: got 'fast' with --merge"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        export_onnx(tmp_path, tmp_path / "onnx", **options)
    assert list(tmp_path.iterdir()) == []
