"""Exports to ONNX: onnxruntime computes what the model computes, with every adapter."""

from __future__ import annotations

import functools
import json
import logging
import re
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxscript import rewriter
from safetensors.torch import load_file, save_file

from hizoo_lite.base import Bits
from hizoo_lite.edge import folder as folders
from hizoo_lite.edge.adapter import add_adapter
from hizoo_lite.edge.folder import Export
from hizoo_lite.edge.session import Session
from hizoo_lite.errors import ExportError, StorageError, UserError
from hizoo_lite.export.onnx import check, compare, optimize, trace
from hizoo_lite.export.onnx import export as exporting
from hizoo_lite.export.onnx import source as loading
from hizoo_lite.export.onnx.export import export_onnx
from hizoo_lite.export.onnx.linear import FourBitProduct, Int8Product
from hizoo_lite.export.onnx.source import read_source
from hizoo_lite.model.model import Model
from hizoo_lite.quant import FourBitWeight, native, pack
from hizoo_lite.train.progress import Progress
from hizoo_lite.train.saved import attach_adapter
from tests.export_fixtures import tuned

#: Every form and every kind of model and linear once: plain, transposed (gpt2), tied (qwen2), a head (bert).
FAST = {("llama", "nf4")}
#: Every architecture once and every form three times; tools/bench_export.py has the whole table.
TABLE: list[tuple[str, Bits]] = [
    *[(name, "nf4") for name in ("llama", "gpt2", "bert")],
    *[(name, "fp4") for name in ("opt", "qwen2", "roberta")],
    *[(name, "int8") for name in ("gpt2", "bert", "gemma2")],
    *[(name, "none") for name in ("qwen2", "qwen3", "llama")],
]
GRID = [pytest.param(*one, marks=[] if one in FAST else [pytest.mark.grid]) for one in TABLE]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Bits], Path]:
    """A folder with a model, two adapters of it and the export of the first; every one is made once."""

    @functools.cache
    def make(name: str, bits: Bits) -> Path:
        folder = tmp_path_factory.mktemp(f"{name}-{bits}")
        first, _ = tuned(folder, name, bits)
        export_onnx(first, folder / "onnx", base_bits=bits)
        return folder

    return make


@pytest.fixture(scope="module")
def llama(exported: Callable[[str, Bits], Path]) -> Path:
    """That of a Llama."""
    return exported("llama", "nf4")


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    shutil.copytree(llama / "onnx", tmp_path / "onnx")
    return tmp_path / "onnx"


# ----------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize(("name", "bits"), GRID)
def test_one_session_with_two_adapters_equals_the_model(
    name: str, bits: Bits, exported: Callable[[str, Bits], Path], tmp_path: Path
) -> None:
    made = exported(name, bits)
    first, second = made / "first", made / "second"
    shutil.copytree(made / "onnx", tmp_path / "onnx")
    export = export_onnx(second, tmp_path / "onnx", base_bits=bits)
    assert export.record["check"]["max_abs_difference"] < compare.LIMIT
    assert export.record["adapters"]["second"]["check"]["max_abs_difference"] < compare.LIMIT
    assert export.adapters == ["first", "second"]
    session = Session(export)
    model = load_base(first, bits)
    cases = {None: check.cases(model)}
    for folder in (first, second):
        attach_adapter(model, folder)
        cases[folder.name] = check.cases(model)
    for adapter in ("first", None, "second", "first"):
        compare.compare(session, compare.Reference(cases[adapter], adapter))
    apart = [
        np.abs(cases[a][1].logits - cases[b][1].logits).max()
        for a, b in ((None, "first"), ("first", "second"))
    ]
    assert min(apart) > 100 * compare.LIMIT
    if name == "bert":  # a classifier says how many classes it has
        assert session.graph.shape("logits")[-1] == 2
    operators = {"nf4": "MatMulBnb4", "fp4": "MatMulBnb4", "int8": "MatMulNBits", "none": "FusedMatMul"}
    assert operators[bits] in export.record["model"]["operators"]
    if (name, bits) == ("qwen2", "none"):  # a tied head and its embedding are one tensor
        names = [t.name for t in onnx.load(export.graph, load_external_data=False).graph.initializer]
        assert "model.embed_tokens.weight" in names
        assert not any(name.startswith("lm_head") and "lora" not in name for name in names)


def test_rows_padded_on_the_left_write_what_they_would_alone(llama: Path) -> None:
    session = Session(Export.open(llama / "onnx"))
    ids = np.array([[0, 0, 0, 9, 8, 7], [3, 4, 5, 6, 7, 8]])
    both = compare.Tokens(ids, np.array([[0, 0, 0, 1, 1, 1], [1] * 6]))
    alone = compare.Tokens(ids[:1, 3:], np.ones((1, 3), np.int64))
    got, expected = (compare.decode(session, tokens, 2, "first") for tokens in (both, alone))
    np.testing.assert_allclose(got[:1, 3:], expected, atol=compare.LIMIT)


def test_fast_products_of_8_bit_weights_are_recorded_with_their_error(tmp_path: Path) -> None:
    first, _ = tuned(tmp_path, "opt", "int8")
    record = export_onnx(first, tmp_path / "onnx", format="fast").record
    assert record["products"] == "fast"
    assert record["check"]["limit"] is None
    assert compare.LIMIT < record["check"]["max_abs_difference"] < 1.0
    metadata = {
        p.key: p.value
        for p in onnx.load(tmp_path / "onnx/model.onnx", load_external_data=False).metadata_props
    }
    assert metadata == {"bits": "int8", "products": "fast"}
    with pytest.raises(UserError, match=r"--format: got 'exact', but .* was made with 'fast'"):
        export_onnx(tmp_path / "second", tmp_path / "onnx", format="exact")


@pytest.mark.parametrize("columns", [64, 80, 96, 33])
@pytest.mark.parametrize("bits", ["nf4", "fp4"])
def test_4_bit_weights_of_any_width_are_decoded_bit_exactly(bits: native.FourBits, columns: int) -> None:
    weight = pack(torch.randn(7, columns, generator=torch.Generator().manual_seed(0)), bits)
    product = FourBitProduct(weight, lambda: weight)  # type: ignore[arg-type]
    expected = weight.unpack(torch.empty(7, columns))
    assert np.array_equal(multiply(product, "MatMulBnb4", columns), expected.numpy().T)


@pytest.mark.parametrize("blocksize", [32, 256, 512, 4096])
def test_4_bit_blocks_of_any_size_are_decoded_bit_exactly(blocksize: int) -> None:
    values = torch.randn(31, 96, generator=torch.Generator().manual_seed(0))
    codes, absmax = native.quantize_blocks(values, "nf4", blocksize)
    weight = FourBitWeight("nf4", (31, 96), codes, absmax, blocksize=blocksize)
    product = FourBitProduct(weight, lambda: weight)
    expected = weight.unpack(torch.empty(31, 96))
    assert np.array_equal(multiply(product, "MatMulBnb4", 96), expected.numpy().T)


@pytest.mark.parametrize("columns", [64, 128, 200])
def test_8_bit_weights_are_decoded_to_the_last_bit_of_float32(columns: int) -> None:
    weight = pack(torch.randn(7, columns, generator=torch.Generator().manual_seed(0)), "int8")
    product = Int8Product(weight, lambda: weight, "exact")  # type: ignore[arg-type]
    expected = weight.values(torch.empty(7, columns)).numpy().T
    np.testing.assert_allclose(multiply(product, "MatMulNBits", columns), expected, rtol=2e-7)


def load_base(run: Path, bits: Bits | None = None) -> Model:
    """The model that an adapter was made for."""
    source = read_source(run, bits)
    return loading.load_base(source, source.checkpoint.folder)


def multiply(product: FourBitProduct | Int8Product, operator: str, columns: int) -> np.ndarray:
    """The identity times the weight, by the operator alone."""
    make, floats = onnx.helper, onnx.TensorProto.FLOAT
    names = ["x", *product.parts]
    node = make.make_node(operator, names, ["y"], domain="com.microsoft", **product.attributes)
    graph = make.make_graph(
        [node],
        "product",
        [make.make_tensor_value_info("x", floats, [None, columns])],
        [make.make_tensor_value_info("y", floats, None)],
        [onnx.numpy_helper.from_array(part.read().numpy(), name) for name, part in product.parts.items()],
    )
    opsets = [make.make_opsetid("", 20), make.make_opsetid("com.microsoft", 1)]
    model = make.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.eye(columns, dtype=np.float32)})[0]


# ----------------------------------------------------------------------------------- the folder


def test_a_second_adapter_rewrites_nothing_but_the_record(llama: Path, copy: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file() and p.name != "export.json"}
    export = export_onnx(llama / "second", copy, name="other")
    assert export.adapters == ["first", "other"]
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert Export.open(copy).find_adapter("other").is_file()


def test_an_adapter_is_added_without_torch(llama: Path, copy: Path) -> None:
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'peft', 'onnx']))\n"
        "from hizoo_lite.edge.adapter import add_adapter\n"
        "from hizoo_lite.edge.folder import Export\n"
        "add_adapter(Export.open(sys.argv[1]), sys.argv[2], 'other')\n"
    )
    subprocess.run([sys.executable, "-c", program, str(copy), str(llama / "second")], check=True)
    assert Export.open(copy).adapters == ["first", "other"]


def test_a_peft_folder_runs_without_being_added(llama: Path, copy: Path, tmp_path: Path) -> None:
    before = sorted(copy.rglob("*"))
    export = Export.open(copy)
    model = load_base(llama / "second")
    attach_adapter(model, llama / "second")
    entries = compare.compare(Session(export), compare.Reference(check.cases(model), str(llama / "second")))
    assert max(entry["max_abs_difference"] for entry in entries) < compare.LIMIT
    assert sorted(copy.rglob("*")) == before
    changed = Path(shutil.copytree(llama / "second", tmp_path / "changed"))
    config = json.loads((changed / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "another/model"
    (changed / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"base_model_name_or_path: got 'another/model'"):
        Session(export).adapter(str(changed))


def test_bfloat16_adapters_are_read(llama: Path, copy: Path, tmp_path: Path) -> None:
    halved = shutil.copytree(llama / "first", tmp_path / "halved")
    weights = halved / "adapter_model.safetensors"
    save_file({n: t.bfloat16() for n, t in load_file(weights).items()}, weights)
    export = export_onnx(halved, copy)
    model = load_base(llama / "first")
    attach_adapter(model, halved)
    entries = compare.compare(Session(export), compare.Reference(check.cases(model), "halved"))
    assert max(entry["max_abs_difference"] for entry in entries) < compare.LIMIT
    assert export.record["adapters"]["halved"]["check"]["max_abs_difference"] < compare.LIMIT


def test_genai_config_names_the_graphs_inputs(llama: Path) -> None:
    content = json.loads((llama / "onnx/genai_config.json").read_text())
    decoder, export = content["model"]["decoder"], Export.open(llama / "onnx")
    named = [decoder["inputs"][key] for key in ("input_ids", "attention_mask")]
    named += [decoder["inputs"][f"past_{part}_names"] % 0 for part in ("key", "value")]
    assert named == export.inputs
    shown = [decoder["outputs"][f"present_{part}_names"] % 0 for part in ("key", "value")]
    assert [decoder["outputs"]["logits"], *shown] == export.outputs
    assert content["search"]["past_present_share_buffer"] is False
    assert (decoder["num_key_value_heads"], decoder["head_size"]) == export.cache[0]


def test_no_path_of_this_machine_is_in_the_graph(llama: Path) -> None:
    assert str(Path(torch.__file__).parents[1]).encode() not in (llama / "onnx/model.onnx").read_bytes()


# ------------------------------------------------------------------------------------ bad input


def test_a_graph_that_computes_something_else_is_removed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = exporting.cases

    def shifted(model: Model) -> list[compare.Case]:
        return [case._replace(logits=case.logits * (1 + 3e-4) + 3e-4) for case in real(model)]

    def written_before(model: Model, out: Path, *_: Any) -> Export:
        shutil.copytree(llama / "onnx", out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("adapters"))
        record = {**Export.open(llama / "onnx").record, "adapters": {}, "check": None}
        (out / "export.json").write_text(json.dumps(record))
        return Export(out, record)

    monkeypatch.setattr(exporting, "cases", shifted)
    monkeypatch.setattr(exporting, "export_base", written_before)
    with pytest.raises(
        ExportError, match=r"differs from the model by \d\.\d+e-0[34], allowed is \d+e-04: forward of 1 x 1"
    ):
        export_onnx(llama / "first", tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_base_is_refused(copy: Path, tmp_path: Path) -> None:
    other, _ = tuned(tmp_path / "other", "llama", "nf4", seed=5)
    with pytest.raises(UserError, match=r"base_model_name_or_path: got .* which is another model"):
        export_onnx(other, copy)
    assert Export.open(copy).adapters == ["first"]


def test_an_adapter_that_does_not_fit_is_refused_by_tensor(llama: Path, copy: Path, tmp_path: Path) -> None:
    tensors = load_file(llama / "first/adapter_model.safetensors")
    name = next(n for n in tensors if n.endswith("q_proj.lora_B.weight"))

    def changed(values: dict[str, torch.Tensor]) -> Path:
        folder = shutil.copytree(llama / "first", tmp_path / "changed", dirs_exist_ok=True)
        save_file(values, folder / "adapter_model.safetensors")
        return folder

    for values, message in (
        (
            {**tensors, name: torch.zeros(5, 2)},
            r"q_proj\.lora_B\.weight has shape \(5, 2\), .* wants \(64, 2\)",
        ),
        ({n: t for n, t in tensors.items() if n != name}, r"q_proj\.lora_A without .*q_proj\.lora_B"),
        ({**tensors, "lm_head.weight": torch.zeros(2)}, r"lm_head\.weight: the exported base has no input"),
        ({**tensors, name: tensors[name].int()}, r"lora_B\.weight: dtype 'I32'; allowed are BF16"),
        ({}, "holds no tensors"),
    ):
        with pytest.raises(UserError, match=message):
            add_adapter(Export.open(copy), changed(values), "changed")
    with pytest.raises(UserError, match=r"--name: got '\.\./x'"):
        add_adapter(Export.open(copy), llama / "second", "../x")


def test_damaged_files_are_named(copy: Path) -> None:
    graph, weights, record = copy / "model.onnx", copy / "model.onnx.data", copy / "export.json"
    whole = graph.read_bytes()
    graph.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"model\.onnx: has .* bytes, .* were written"):
        Export.open(copy)
    graph.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"model\.onnx: its sha256 is not the one"):
        Export.open(copy)
    graph.write_bytes(whole)
    opened = Export.open(copy)
    weights.rename(copy / "elsewhere")
    with pytest.raises(UserError, match=r"model\.onnx\.data: no such file; export\.json names it"):
        Export.open(copy)
    with pytest.raises(UserError, match=r"model\.onnx: its external data .* is missing"):
        Session(opened)
    record.write_text('{"format": 9}')
    with pytest.raises(UserError, match=r"export\.json: format: got 9, allowed: 1"):
        Export.open(copy)
    record.write_text('{"format": 1, "kind": "causal"}')
    with pytest.raises(UserError, match=r"export\.json: lacks adapters, base"):
        Export.open(copy)
    record.unlink()
    with pytest.raises(UserError, match=r"export\.json: no such file; allowed: a folder of"):
        Export.open(copy)


def test_a_folder_with_other_things_is_left_alone(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--out: .* is not empty; allowed: .*, or an export"):
        export_onnx(llama / "first", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_damaged_weights_are_found_before_an_adapter_is_added(llama: Path, copy: Path) -> None:
    weights = copy / "model.onnx.data"
    Export.open(copy).verify()
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    export = Export.open(copy)  # which looks at their size alone
    for add in (export.verify, lambda: export_onnx(llama / "second", copy)):
        with pytest.raises(UserError, match=r"model\.onnx\.data: its sha256 is not the one in export\.json"):
            add()
    assert Export.open(copy).adapters == ["first"]


def test_an_adapter_that_cannot_be_written_leaves_the_export_as_it_was(
    llama: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    export = Export.open(copy)

    def cut_off(self: Any, path: str) -> None:
        real(self, path)
        with open(path, "rb+") as file:
            file.truncate(Path(path).stat().st_size - 64)

    def failing(self: Any, path: str) -> None:
        raise RuntimeError("lora_adapters.cc:42 Failed to open file")

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    real = onnxruntime.AdapterFormat.export_adapter
    for owner, name, value, message in (
        (onnxruntime.AdapterFormat, "export_adapter", cut_off, r"second\.onnx_adapter: cannot be written"),
        (onnxruntime.AdapterFormat, "export_adapter", failing, r"second\.onnx_adapter: cannot be written"),
        (folders, "write_text", full, r"export\.json: cannot be written: No space left on device"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, value)
            with pytest.raises(StorageError, match=message):
                add_adapter(export, llama / "second", "second")
        assert export.adapters == ["first"]
        assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    add_adapter(export, llama / "second", "second")


class Heard(Progress):
    """Keeps the messages."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.told = threading.Event()

    def message(self, text: str) -> None:
        self.lines.append(text)
        self.told.set()


def test_what_the_exporter_says_is_counted_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    heard, loud = Heard(), logging.getLogger("torch.onnx.inside")
    loud.addHandler(handler := logging.StreamHandler())
    try:
        with trace._noted(heard):
            for _ in range(3):
                loud.warning("a note")
                warnings.warn("another", stacklevel=1)
            loud.error("an error")
        loud.warning("shown again")
    finally:
        loud.removeHandler(handler)
    assert heard.lines == ["torch's exporter had 6 notes for developers of models"]
    assert "an error" in capsys.readouterr().err
    with trace._noted(heard):
        pass
    assert len(heard.lines) == 1


def test_a_long_call_says_that_it_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard()
    monkeypatch.setattr(trace, "_ALIVE_SECONDS", 0.01)
    running = threading.active_count()
    with trace._alive(heard, "tracing"):
        assert heard.told.wait(60)
    assert re.fullmatch(r"tracing: \d+ s so far", heard.lines[0])
    assert threading.active_count() == running  # nobody is left who could speak


def test_the_optimizer_is_onnxscript_s_but_for_the_splits() -> None:
    rules = {rule.name for rule in rewriter._DEFAULT_REWRITE_RULES}
    assert optimize._LEFT_OUT in rules
    left = [rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule.name != optimize._LEFT_OUT]
    assert all(rule._target_pattern.has_single_output_node for rule in left)  # the others are linear


def test_names_that_are_one_file_on_some_disks_are_refused(llama: Path, copy: Path) -> None:
    with pytest.raises(UserError, match=r"--name: 'first' is in .*export\.json already; give another name"):
        add_adapter(Export.open(copy), llama / "second", "FIRST")
    run = Path(shutil.copytree(llama / "second", copy.parent / "my run"))
    with pytest.raises(
        UserError, match=r"--name: got 'my run', which is the run folder's name .* give --name"
    ):
        export_onnx(run, copy)


def test_an_adapter_is_replaced_on_demand_once_it_has_passed(
    llama: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"already; give another name, or --overwrite"):
        export_onnx(llama / "second", copy, name="first")
    with pytest.raises(UserError, match=r"already; give another name$"):
        export_onnx(llama / "second", copy, name="FIRST", overwrite=True)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with monkeypatch.context() as patched:
        patched.setattr("hizoo_lite.export.onnx.export._run_check", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_onnx(llama / "second", copy, name="first", overwrite=True)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    export = export_onnx(llama / "second", copy, name="first", overwrite=True)
    assert export.adapters == ["first"]
    assert export.record["adapters"]["first"]["rank"] == 3
    assert len(list((copy / "adapters").iterdir())) == 1
    runs = [entry for entry in export.record["check"]["runs"] if entry["adapter"] == "first"]
    assert len(runs) * 2 == len(export.record["check"]["runs"])
    Export.open(copy).verify()
    assert export_onnx(llama / "first", copy, name="more", overwrite=True).adapters == ["first", "more"]


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_an_unknown_adapter_is_named(llama: Path) -> None:
    session = Session(Export.open(llama / "onnx"))
    with pytest.raises(UserError, match=r"--adapter: got 'third', allowed: .* \(first\), a file"):
        session.run({}, "third")
