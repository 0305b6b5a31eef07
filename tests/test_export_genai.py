"""onnxruntime-genai runs an export as it is: its tokenizer, its cache, and adapters swapped by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hizoo_lite.edge import answer
from hizoo_lite.edge.folder import Export
from hizoo_lite.edge.model import OnnxModel
from hizoo_lite.engine.generate import generate
from hizoo_lite.engine.load import load
from hizoo_lite.export.onnx.export import export_onnx
from hizoo_lite.export.quantize import Quantization
from hizoo_lite.noise import normal
from hizoo_lite.spaces import LoRA
from hizoo_lite.train.saved import attach_adapter
from tests.edge_fixtures import DEMO

PROMPTS = ("The soup was", "A dog", "The game on the old day was very")
NEW_TOKENS = 16

pytestmark = (
    pytest.mark.grid
)  # its export takes half a minute; tests/test_export_onnx.py reads genai_config.json


@pytest.fixture(scope="module")
def genai() -> Any:
    return pytest.importorskip(
        "onnxruntime_genai", reason="onnxruntime-genai is not installed (extra: genai)"
    )


@pytest.fixture(scope="module")
def exported(genai: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in NF4, with two adapters of other ranks and layers that change what it says."""
    folder = tmp_path_factory.mktemp("genai")
    Quantization(str(DEMO), folder / "model", kind="causal", bits="nf4").run()
    made = (("first", 2, "all-linear", 0.15), ("second", 3, "attention", 0.25))
    for name, rank, targets, strength in made:
        model = load(folder / "model", compute_dtype="float32", device="cpu")
        space = LoRA(rank=rank, targets=targets, train_a=True, blocks="all")
        space.attach(model, 0)
        for key, value in space.parameters.items():
            value.add_(normal(rank, 0, key, value.shape), alpha=strength)
        space.save(folder / name)
        export_onnx(folder / name, folder / "onnx")
    return folder / "onnx"


def written(genai: Any, model: Any, adapters: Any, prompt: str, adapter: str | None) -> str:
    """What genai writes after a prompt, greedily."""
    tokenizer = genai.Tokenizer(model)
    tokenizer.update_options(add_special_tokens="true")  # else it leaves out the <s> that a text begins with
    ids = tokenizer.encode(prompt)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + NEW_TOKENS)
    generator = genai.Generator(model, parameters)
    if adapter is not None:
        generator.set_active_adapter(adapters, adapter)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return prompt + tokenizer.decode(generator.get_sequence(0)[len(ids) :])


def test_genai_writes_what_we_write_with_every_adapter(genai: Any, exported: Path) -> None:
    export = Export.open(exported)
    model = genai.Model(str(exported))
    adapters = genai.Adapters(model)
    for name in export.adapters:
        adapters.load(str(export.find_adapter(name)), name)
    texts = {}
    for adapter in (None, "first", "second"):
        tuned = load(exported.parent / "model", compute_dtype="float32", device="cpu")
        if adapter is not None:
            attach_adapter(tuned, exported.parent / adapter)
        for prompt in PROMPTS:
            texts[adapter, prompt] = text = written(genai, model, adapters, prompt, adapter)
            assert text == prompt + generate(tuned, prompt, NEW_TOKENS)
            assert text == prompt + answer.continue_text(OnnxModel(exported, adapter), prompt, NEW_TOKENS)
    told = {tuple(texts[adapter, prompt] for prompt in PROMPTS) for adapter in (None, "first", "second")}
    assert len(told) == 3  # the adapters are strong enough to be seen


def test_genais_tokenizer_gives_our_ids_when_it_is_asked_for_special_tokens(
    genai: Any, exported: Path
) -> None:
    theirs, ours = genai.Tokenizer(genai.Model(str(exported))), OnnxModel(exported).tokenizer
    for prompt in PROMPTS:
        without = ours(prompt, add_special_tokens=False)["input_ids"]
        assert theirs.encode(prompt).tolist() == without
    theirs.update_options(add_special_tokens="true")
    for prompt in PROMPTS:
        assert theirs.encode(prompt).tolist() == ours(prompt)["input_ids"]
