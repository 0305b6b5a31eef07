"""Exported adapters: PEFT loads them and gives our logits, and the card's own code does."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch

from hizoo_lite.checkpoints.adapter import read_peft_config
from hizoo_lite.config import TrainConfig
from hizoo_lite.engine.load import load
from hizoo_lite.errors import UserError
from hizoo_lite.export.merged import prepare
from hizoo_lite.export.peft import export
from hizoo_lite.run import fit
from hizoo_lite.spaces import LoRA
from hizoo_lite.train import provenance, saved
from hizoo_lite.train.folder import RunFolder
from tests.architectures import save_tiny
from tests.run_fixtures import short_run
from tests.tasks_fixtures import word_piece
from tests.test_export_merged import AUTO, FLOAT32, logits, tuned


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on the embedded model; its adapter is moved far enough to matter."""
    settings = short_run(tmp_path_factory.mktemp("tuned"), lr=1.0, bits="nf4")
    fit(TrainConfig(**settings))
    return Path(settings["out"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "causal"),
        ("gpt2", "causal"),
        ("gemma2", "causal"),
        ("roberta", "masked"),
        ("bert", "classifier"),
        ("roberta", "classifier"),
        ("llama", "classifier"),
    ],
)
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_gives_our_logits(name, kind, rslora, tmp_path):
    labels = {"num_labels": 3} if kind == "classifier" else {}
    save_tiny(name, tmp_path / "base", kind=kind, **labels)
    model = load(tmp_path / "base", kind=kind, bits="none", compute_dtype="float32", device="cpu", **labels)
    tuned(model, "lora", rank=4, alpha=6, rslora=rslora).save(tmp_path / "adapter")
    assert export(tmp_path / "adapter", tmp_path / "out") == tmp_path / "out"
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    base = AUTO[kind].from_pretrained(config["base_model_name_or_path"], **labels)
    untuned = logits(base.eval())
    theirs = logits(peft.PeftModel.from_pretrained(base, tmp_path / "out").eval())
    torch.testing.assert_close(theirs, logits(model.module), **FLOAT32)
    assert (theirs - untuned).abs().max() > 1e-2
    assert ("num_labels=3" in (tmp_path / "out" / "README.md").read_text()) == bool(labels)


def test_the_code_of_the_card_gives_our_logits(run, tmp_path):
    out = export(run, tmp_path / "out")
    card = (out / "README.md").read_text()
    assert 'bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True' in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    made = {"ADAPTER": str(out)}
    exec(code[1], made)
    theirs, text = made["model"].float().eval(), "The soup was"
    model = load(provenance.base_model(out), bits="nf4", compute_dtype="float32", device="cpu")
    untuned = logits(model.module)
    saved.attach_adapter(model, run)
    assert made["tokenizer"](text)["input_ids"] == model.tokenizer(text)["input_ids"]
    assert (logits(model.module) - untuned).abs().max() > 0.1
    # bitsandbytes multiplies float32 inputs with its decoded weight in float32
    torch.testing.assert_close(logits(theirs), logits(model.module), **FLOAT32)


def test_the_code_of_the_card_answers_as_the_run_does(run, tmp_path, capsys):
    card = (export(run, tmp_path / "out") / "README.md").read_text()
    loading, asking = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    made = {"ADAPTER": str(tmp_path / "out")}
    exec(loading, made)
    made["model"].float().eval()
    model = load(provenance.base_model(tmp_path / "out"), bits="nf4", compute_dtype="float32", device="cpu")
    saved.attach_adapter(model, run)
    shown = "A short text of your own."
    assert shown in asking
    found = set()
    for text in ("The soup was warm.", "The room was cold.", "A kind waiter.", "Nobody came."):
        exec(asking.replace(shown, text), made)
        found.add(capsys.readouterr().out.strip())
        answer = saved.answered(model, run, text)
        assert answer is not None
        assert answer.strip() in found
    assert found <= {"good", "bad"}


@pytest.mark.parametrize(
    ("name", "kind"), [("bert", "classifier"), ("roberta", "masked"), ("llama", "classifier")]
)
def test_the_cards_code_quantizes_what_the_run_did_and_no_head(name, kind, tmp_path):
    labels = {"num_labels": 3} if kind == "classifier" else {}
    save_tiny(name, tmp_path / "base", kind=kind, **labels)
    word_piece().save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base", kind=kind, bits="nf4", compute_dtype="float32", device="cpu", **labels)
    untuned = logits(model.module)
    tuned(model, "lora", rank=4).save(tmp_path / "run" / "adapter")
    settings = TrainConfig(model=str(tmp_path / "base"), task="sst2", data="data", kind=kind, bits="nf4")
    RunFolder(tmp_path / "run").create(settings)
    made = {"ADAPTER": str(export(tmp_path / "run", tmp_path / "out"))}
    code = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    assert code is not None
    exec(code[1], made)
    torch.testing.assert_close(logits(made["model"].eval()), logits(model.module), **FLOAT32)
    assert (logits(model.module) - untuned).abs().max() > 1e-2
    assert ("llm_int8_skip_modules" in code[1]) == (name != "llama")  # whose head is left by itself


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {}, r"does not fit .*other; first of \d+ names that the model lacks: 'model\.layers"),
        ("llama", {"num_hidden_layers": 1}, r"the model lacks: 'model\.layers\.1\."),
        ("llama", {"hidden_size": 32}, r"has A \(2, 128\) and B \(64, 2\), the model's weight is \("),
    ],
)
def test_a_base_that_the_adapter_does_not_fit_is_refused(name, changes, message, tmp_path):
    save_tiny("llama", tmp_path / "base")
    model = load(tmp_path / "base", bits="none", compute_dtype="float32", device="cpu")
    tuned(model, "lora", rank=2).save(tmp_path / "adapter")
    save_tiny(name, tmp_path / "other", **changes)
    with pytest.raises(UserError, match=message):
        export(tmp_path / "adapter", tmp_path / "out", model=str(tmp_path / "other"))
    assert not (tmp_path / "out").exists()


def test_the_card_tells_what_came_of_the_run(run, tmp_path):
    card = (export(run, tmp_path / "out") / "README.md").read_text()
    summary = json.loads((run / "summary.json").read_text())
    for name in ("loss_before", "loss_after", "metric_before", "metric_after"):
        assert (
            f"{name.replace('metric', summary['metric']).replace('_', ' ')} | {summary[name]:.4g} |" in card
        )
    assert "| steps | 6 |" in card
    head = card.split("---")[1]
    assert "base_model:" not in head  # a folder, which the Hub refuses
    assert "pipeline_tag: text-generation" in head


def test_tokenizer_and_adapter_go_along_and_the_models_config_does_not(run, tmp_path):
    out = export(run, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    exported, trained = (f / "adapter_model.safetensors" for f in (out, run / "adapter"))
    assert exported.read_bytes() == trained.read_bytes()


def test_an_export_can_be_exported_and_a_base_named_anew(run, tmp_path):
    first = export(run, tmp_path / "first")
    base = Path(shutil.copytree(provenance.base_model(first), tmp_path / "base"))
    second = export(first, tmp_path / "second", model=str(base))
    assert provenance.base_model(second) == str(base)
    assert "quantization_config" not in (second / "README.md").read_text()  # a bare adapter does not know


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "causal"), ("roberta", "masked"), ("bert", "classifier")]
)
def test_an_adapter_without_a_task_type_is_one_of_its_bases_kind(name, kind, tmp_path):
    base = save_tiny(name, tmp_path / "base", kind=kind)
    target = "q_proj" if name == "llama" else "query"
    settings = peft.LoraConfig(r=2, target_modules=[target])  # PEFT's default: no task type
    peft.get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    assert provenance.saved_kind(tmp_path / "adapter") is None
    export(tmp_path / "adapter", tmp_path / "out", model=str(tmp_path / "base"))
    assert f"{AUTO[kind].__name__}.from_pretrained" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*layers\.1\..*\.(q|up)_proj"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0\..*"},
    ],
)
def test_an_adapter_whose_layers_a_pattern_names_gives_pefts_logits(settings, tmp_path):
    base = save_tiny("llama", tmp_path / "base")
    tuned_by_peft(base, tmp_path / "adapter", **settings)
    want = logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval())
    model = load(tmp_path / "base", bits="none", compute_dtype="float32", device="cpu")
    saved.attach_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model.module), want, **FLOAT32)
    prepare(
        tmp_path / "adapter", tmp_path / "m", model=tmp_path / "base", base_bits="none", dtype="float32"
    ).run()
    torch.testing.assert_close(logits(AUTO["causal"].from_pretrained(tmp_path / "m")), want, **FLOAT32)


@pytest.mark.parametrize("whole", ["embed_tokens", "norm", "lm_head"])
def test_what_is_tuned_as_a_whole_beside_an_adapter_is_refused_by_all(whole, tmp_path):
    base = save_tiny("llama", tmp_path / "base")
    tuned_by_peft(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=[whole])
    message = rf"adapter_model\.safetensors: .*{whole}.* was tuned as a whole .* a classifier's head alone"
    model = load(tmp_path / "base", bits="none", device="cpu")
    with pytest.raises(UserError, match=message):
        saved.attach_adapter(model, tmp_path / "adapter")
    with pytest.raises(UserError, match=message):
        export(tmp_path / "adapter", tmp_path / "out", model=str(tmp_path / "base"))
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "adapter", tmp_path / "m", model=tmp_path / "base", base_bits="none")


def test_an_adapter_of_other_layers_is_refused_by_its_name(tmp_path):
    tuned_by_peft(save_tiny("llama", tmp_path / "base"), tmp_path / "adapter", target_modules=["q_proj"])
    save_tiny("gpt2", tmp_path / "other")
    with pytest.raises(UserError, match=r"not those of .*other; first of \d+ .*lack: 'model\.layers"):
        saved.attach_adapter(load(tmp_path / "other", bits="none", device="cpu"), tmp_path / "adapter")


def tuned_by_peft(base, folder, **settings):
    """An adapter that PEFT made, moved far enough to matter."""
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, init_lora_weights=False, **settings))
    model.save_pretrained(folder)
    model.unload()


@pytest.mark.parametrize(("space", "bits"), [("dense", "nf4"), ("scales", "int8")])
def test_trained_weights_have_no_peft_form(space, bits, tmp_path):
    save_tiny("llama", tmp_path / "base")
    model = load(tmp_path / "base", bits=bits, device="cpu", double_quant=False)
    tuned(model, space).save(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"--to: got peft, .*PEFT has no form for them; allowed: merged"):
        export(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_an_initialization_that_leaves_the_base_alone_is_taken(init, tmp_path):
    save_peft_config(tmp_path, init_lora_weights=init)
    assert read_peft_config(tmp_path)["init_lora_weights"] == init


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("init_lora_weights", init) for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq")),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("alora_invocation_tokens", [1, 2]),
        ("trainable_token_indices", [3]),
        ("kasa_config", {"beta": 1e-4}),
    ],
)
def test_what_makes_peft_compute_something_else_is_refused(key, value, tmp_path):
    save_peft_config(tmp_path, **{key: value})
    with pytest.raises(UserError, match=rf"adapter_config\.json: {key}: got .*, supported: ") as caught:
        read_peft_config(tmp_path)
    assert ("path_initial_model_for_weight_conversion" in str(caught.value)) == (key == "init_lora_weights")


def save_peft_config(folder, **settings):
    """adapter_config.json of a plain adapter, but for some settings."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path):
    save_tiny("llama", tmp_path / "base")
    space = LoRA(rank=2)
    space.attach(load(tmp_path / "base", bits="nf4", device="cpu"), seed=0)
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    space.save(adapter)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--out: .*thesis is not empty; allowed: a new or empty folder"):
        export(adapter, tmp_path / "thesis")
    with pytest.raises(UserError, match=r"--out: .*a\.txt is a file"):
        export(adapter, tmp_path / "thesis" / "a.txt")
    with pytest.raises(UserError, match="the folder /nowhere/at/all does not exist"):
        export(adapter, out, model="/nowhere/at/all")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(UserError, match=r"--model: missing; .*does not name the base"):
        export(adapter, out)
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(UserError, match="use_dora: got True, supported: False, None"):
        export(adapter, out)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: no such file"):
        export(adapter, out)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["a.txt"]
    assert not out.exists()
