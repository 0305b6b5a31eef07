"""Files of others stay data: no name leads out of its folder, no code runs, nothing is unpickled."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import hizoo_lite
from hizoo_lite.checkpoints import tensorfile
from hizoo_lite.checkpoints.adapter import read_peft_config, read_record
from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.checkpoints.fingerprint import of_model
from hizoo_lite.edge.folder import Export
from hizoo_lite.errors import UserError
from hizoo_lite.files import is_inside, parse_json, parse_toml
from hizoo_lite.model import build
from hizoo_lite.plan import hardware
from hizoo_lite.train import checkpoint, config_file
from hizoo_lite.units import parse_bytes

_SOURCES = [
    path
    for folder in (Path(hizoo_lite.__file__).parent, Path(__file__).parents[1] / "tools")
    for path in sorted(folder.rglob("*.py"))
]
_OUT = ("../x.safetensors", "a/../../x.safetensors", "{outside}/x.safetensors", "..\\x.safetensors")

# ------------------------------------------------------------------------------------------- names of files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder beside a sound tensor file x.safetensors."""
    tensorfile.save(tmp_path / "x.safetensors", {"w": np.zeros(2, dtype=np.float32)})
    (tmp_path / "folder" / "a").mkdir(parents=True)
    return tmp_path / "folder"


@pytest.mark.parametrize("name", _OUT)
@pytest.mark.parametrize("read", [Checkpoint.open, of_model])
def test_index_names_no_file_outside(folder: Path, name: str, read: Callable[[Path], object]) -> None:
    (folder / "config.json").write_text("{}")
    name = name.format(outside=folder.parent)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(UserError, match=r"index\.json: weight_map.*(inside|outside of) the folder"):
        read(folder)
    (folder / "a" / "y.safetensors").write_bytes((folder.parent / "x.safetensors").read_bytes())
    index.write_text(json.dumps({"weight_map": {"w": "a/y.safetensors"}}))
    read(folder)


@pytest.mark.parametrize("name", _OUT)
def test_state_names_no_file_outside(folder: Path, name: str) -> None:
    folder = folder.rename(folder.with_name("step-000001"))
    digest = hashlib.sha256((folder.parent / "x.safetensors").read_bytes()).hexdigest()
    inside = {"curvature.safetensors": digest, "adapter/x.safetensors": digest}
    (folder / "adapter").mkdir()
    for kept in inside:
        (folder / kept).write_bytes((folder.parent / "x.safetensors").read_bytes())
    record = {"step": 1, "bad_steps": 0, "halvings": 0, "step_size": {}, "library": "torch", "parameters": []}
    path = folder / checkpoint.STATE
    path.write_text(json.dumps({**record, "files": {**inside, name.format(outside=folder.parent): digest}}))
    with pytest.raises(UserError, match="is not inside the checkpoint"):
        checkpoint.check(folder)
    path.write_text(json.dumps({**record, "files": inside}))
    assert checkpoint.check(folder)["step"] == 1


def _export(folder: Path, model_file: str, adapter_file: str) -> None:
    data = (folder.parent / "x.safetensors").read_bytes()
    about = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    inputs = {"lora": {}, "head": {}}
    model = {"files": {model_file: about}, "inputs": [], "outputs": [], "cache": [], "adapter_inputs": inputs}
    record = {
        "format": 1,
        "kind": "causal",
        "form": "base",
        "bits": "nf4",
        "products": "exact",
        "base": {},
        "tuned": None,
        "check": None,
        "model": model,
        "adapters": {"a": {"file": adapter_file, **about}},
    }
    (folder / "export.json").write_text(json.dumps(record))


@pytest.mark.parametrize("name", _OUT)
@pytest.mark.parametrize("of_adapter", [False, True])
def test_export_names_no_file_outside(folder: Path, name: str, of_adapter: bool) -> None:
    (folder / "in").write_bytes((folder.parent / "x.safetensors").read_bytes())
    name = name.format(outside=folder.parent)
    _export(folder, "in" if of_adapter else name, name if of_adapter else "in")
    with pytest.raises(UserError, match="is outside of the folder"):
        Export.open(folder)
    _export(folder, "in", "in")
    Export.open(folder)


def test_export_follows_no_link_outside(folder: Path) -> None:
    (folder / "in").symlink_to(folder.parent / "x.safetensors")
    _export(folder, "in", "in")
    with pytest.raises(UserError, match="is outside of the folder"):
        Export.open(folder)


def test_is_inside() -> None:
    assert all(map(is_inside, ("a", "a/b.safetensors", "a..b", "é.txt", "...")))
    wrong = ("", ".", "..", "/a", "a/..", "a/../b", "a\\b", "C:a", "a\0", "\ud800", "x" * 256, None, 1, ["a"])
    assert not any(map(is_inside, wrong))


# ------------------------------------------------------------------------------------------- documents


def test_deep_documents_are_value_errors() -> None:
    for text in ("[" * 100_000, '{"a":' * 100_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json(text)
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_toml("a = " + "[" * 10_000)


@pytest.mark.parametrize(
    "shape", [[0, 10**30], [2**62, 4, 0], [1] * 70 + [0], [10**4200, 10**4200, 0], [0, -1], [True, 0]]
)
def test_shapes_that_no_array_has_are_refused(tmp_path: Path, shape: list[int]) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="tensor w"):
        tensorfile.load(path)


def test_sizes_and_names_beyond_all_use_are_refused() -> None:
    with pytest.raises(ValueError, match="less than"):
        parse_bytes("9" * 400 + "GiB")
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(UserError, match="which is no file"):
            hardware.find(name)
        with pytest.raises(UserError, match="which is no file"):
            config_file.find(name)


@pytest.mark.parametrize(
    ("key", "value"), [("r", 0), ("r", 2.5), ("r", True), ("lora_alpha", 10**400), ("lora_alpha", [1])]
)
def test_numbers_of_an_adapter_are_checked(tmp_path: Path, key: str, value: object) -> None:
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["q"], key: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"adapter_config\.json: {key}: got"):
        read_peft_config(tmp_path)


@pytest.mark.parametrize("targets", [3, None, [["q"]], {"q": 1}])
def test_layers_of_an_adapter_are_named_by_texts(tmp_path: Path, targets: object) -> None:
    config = {"r": 2, "lora_alpha": 4, "target_modules": targets}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"adapter_config\.json: target_modules: got"):
        read_peft_config(tmp_path)
    space = {"format": 1, "space": "dense", "targets": targets, "base_model": "b", "kind": "k", "bits": "nf4"}
    (tmp_path / "hizoo_space.json").write_text(json.dumps(space))
    with pytest.raises(UserError, match=r"hizoo_space\.json: targets: got"):
        read_record(tmp_path)
    (tmp_path / "hizoo_space.json").write_text(json.dumps({**space, "targets": [], "space": ["dense"]}))
    with pytest.raises(UserError, match=r"hizoo_space\.json: space: got"):
        read_record(tmp_path)


# ------------------------------------------------------------------------------------------- code of others

_CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): pass
class Model(LlamaForCausalLM): pass
class Tokenizer(PreTrainedTokenizerFast): pass
"""
_MAP = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
_SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("model_type", ["llama", "of-its-own"])
def test_code_beside_a_config_does_not_run(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "code.py").write_text(_CODE)
    config = {
        "model_type": model_type,
        "auto_map": _MAP,
        "vocab_size": 32,
        "num_key_value_heads": 2,
        **_SMALL,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    if model_type == "llama":
        module = build.build(build.read_config(tmp_path, "causal", 2), "causal")
        assert type(module).__module__.startswith("transformers.models.llama")
    else:
        with pytest.raises(UserError, match=r"config\.json"):
            build.read_config(tmp_path, "causal", 2)
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_tokenizer_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(_CODE)
    settings = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of-its-own"}))
    with pytest.raises(UserError, match="tokenizer"):
        build.read_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


_UNPICKLING = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
_LOADERS = {"torch.load", "torch.jit.load", "torch.hub.load", "yaml.load"}
_RUNNERS = {"eval", "exec", "compile", "__import__"}


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def _problems(tree: ast.AST) -> Iterator[str]:
    """What could run others' code, in a module."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module)]
            if {f"{node.module}.{alias.name}" for alias in node.names} & {*_LOADERS, "numpy.load"}:
                yield f"line {node.lineno}: a loader by a name of its own"
        if {name.split(".")[0] for name in names} & _UNPICKLING:
            yield f"line {node.lineno}: imports {names}"
        if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            yield f"line {node.lineno}: trust_remote_code as a text"
        if not isinstance(node, ast.Call):
            continue
        called, given = _dotted(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        if called in _LOADERS | _RUNNERS or called.endswith(".read_pickle"):
            yield f"line {node.lineno}: calls {called}"
        for key, loads in (
            ("trust_remote_code", False),
            ("allow_pickle", called in ("np.load", "numpy.load")),
        ):
            value = given.get(key)
            if (value is not None or loads) and not (
                isinstance(value, ast.Constant) and value.value is False
            ):
                yield f"line {node.lineno}: {called}: {key} is not False"
        if called.startswith("Auto") and "." in called and "trust_remote_code" not in given:
            yield f"line {node.lineno}: {called} without trust_remote_code=False"


@pytest.mark.parametrize("path", _SOURCES, ids=lambda path: "/".join(path.parts[-3:]))
def test_nothing_runs_what_it_reads(path: Path) -> None:
    assert not list(_problems(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "from torch import load",
        "torch.load(path)",
        "np.load(path)",
        "numpy.load(path, allow_pickle=True)",
        "eval(text)",
        "exec(text)",
        "AutoConfig.from_pretrained(path)",
        "AutoConfig.from_pretrained(path, trust_remote_code=True)",
        "open_it(**{'trust_remote_code': True})",
    ],
)
def test_the_search_finds_it(code: str) -> None:
    assert list(_problems(ast.parse(code)))
