"""An exported model in onnxruntime scores and writes what the model does in torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import hizoo_lite
from hizoo_lite import tasks
from hizoo_lite.batch import Example
from hizoo_lite.checkpoints.declared import positions_of
from hizoo_lite.cli import app
from hizoo_lite.config import TrainConfig
from hizoo_lite.edge.__main__ import main
from hizoo_lite.edge.answer import continue_text, eval_config, evaluate_export, sampler
from hizoo_lite.edge.model import OnnxModel
from hizoo_lite.edge.onnx_adapter import save_adapter
from hizoo_lite.edge.session import Graph
from hizoo_lite.edge.tokenizer import EdgeTokenizer
from hizoo_lite.engine import generate as in_torch
from hizoo_lite.engine.load import load
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import UserError
from hizoo_lite.spaces import LoRA
from hizoo_lite.tasks import Encoder, Task
from hizoo_lite.train import provenance
from hizoo_lite.train.evaluate import Writer, complete, evaluate
from tests.architectures import TINY_CONFIGS, save_tiny
from tests.edge_fixtures import BASE, DEMO, export_causal, export_encoder, tuned_space
from tests.run_fixtures import write_classes, write_task
from tests.tasks_fixtures import word_piece
from tests.test_edge_imports import without_torch

#: float32 on both sides, of mean log-probabilities of a few units.
ROUNDING = 2e-5
PROMPTS = ("The soup was", "A dog", "The game on the old day was very")


@pytest.fixture(scope="module")
def space() -> LoRA:
    return tuned_space()


@pytest.fixture(scope="module")
def exported(space: LoRA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_causal(space, tmp_path_factory.mktemp("export") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    task, folder = write_task(tmp_path_factory.mktemp("data"))
    return str(task), str(folder)


def base() -> hizoo_lite.Model:
    return load(str(DEMO), kind="causal", bits="none", compute_dtype="float32", device="cpu")


def models(exported: Path, space: LoRA, adapter: str | None) -> tuple[OnnxModel, Writer]:
    """The export and the model in torch, both with the adapter or without."""
    return OnnxModel(exported, adapter), Traversal(base() if adapter is None else space.model)


COMPLETION = Task(
    name="stories",
    kind="completion",
    build=lambda row: [],
    scorers={"exact": lambda examples, texts: float(np.mean([bool(text) for text in texts]))},
    causal="{text}",
    cut="text",
    stop=".",
    max_new_tokens=12,
)


@pytest.mark.parametrize("adapter", [None, "tuned"])
@pytest.mark.parametrize("loss", ["choice", "answer"])
def test_losses_and_scores_equal_those_of_torch(
    loss: Any, adapter: str | None, exported: Path, space: LoRA
) -> None:
    ours, theirs = models(exported, space, adapter)
    encoder = Encoder(EdgeTokenizer(exported), "causal", tasks.get("sst2"), 40, loss=loss)
    examples = [
        Example({"text": text}, (" bad", " very good"), number % 2) for number, text in enumerate(PROMPTS)
    ]
    batch = encoder.collate([encoder.encode(example, training=False) for example in examples])
    got, want = ours.losses(batch), theirs.losses(batch)
    np.testing.assert_allclose(got.per_example, want.per_example, rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(got.scores, want.scores, rtol=0, atol=ROUNDING)
    assert got.per_example.dtype == np.float64


def test_the_adapter_changes_the_losses(exported: Path, space: LoRA) -> None:
    encoder = Encoder(EdgeTokenizer(exported), "causal", tasks.get("sst2"), 40)
    example = Example({"text": PROMPTS[0]}, (" bad", " good"), 0)
    batch = encoder.collate([encoder.encode(example, training=False)])
    with_it, without = (OnnxModel(exported, name).losses(batch).per_example for name in ("tuned", None))
    assert abs(with_it - without).max() > 0.01


def test_rows_taken_a_few_at_a_time_give_the_same_losses(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = OnnxModel(exported)
    encoder = Encoder(model.tokenizer, "causal", tasks.get("sst2"), 40)
    examples = [Example({"text": text}, (" bad", " very good"), 1) for text in PROMPTS]
    batch = encoder.collate([encoder.encode(example, training=False) for example in examples])
    model.losses(batch)
    whole = model.losses(batch)
    monkeypatch.setattr("hizoo_lite.edge.model.LOGITS_BYTES", 1)
    one_by_one = model.losses(batch)
    np.testing.assert_allclose(one_by_one.scores, whole.scores, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("adapter", [None, "tuned"])
def test_completions_of_a_padded_batch_equal_those_of_torch(
    adapter: str | None, exported: Path, space: LoRA
) -> None:
    ours, theirs = models(exported, space, adapter)
    encoder = Encoder(ours.tokenizer, "causal", COMPLETION, 60)
    examples = [Example({"text": text}, (" x.",), 0) for text in PROMPTS]
    texts = complete(ours.write, encoder, examples)
    assert texts == complete(theirs.write, encoder, examples)
    assert any(texts)
    assert (
        evaluate(ours, encoder, examples, 2).predictions == evaluate(theirs, encoder, examples, 2).predictions
    )


@pytest.mark.parametrize("adapter", [None, "tuned"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_equals_that_of_torch(
    prompt: str, adapter: str | None, exported: Path, space: LoRA
) -> None:
    model = base() if adapter is None else space.model
    want = in_torch.generate(model, prompt, 24)
    assert continue_text(OnnxModel(exported, adapter), prompt, 24) == want
    assert want


def test_greedy_text_takes_the_most_likely_tokens_whatever_the_model_asks_for(
    exported: Path, tmp_path: Path
) -> None:
    asks = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "num_beams": 2, "min_length": 20}
    shutil.copytree(DEMO, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **asks}))
    model = load(tmp_path / "model", kind="causal", bits="none", compute_dtype="float32", device="cpu")
    for prompt in PROMPTS:
        assert in_torch.generate(model, prompt, 24) == continue_text(OnnxModel(exported), prompt, 24)
    path.write_text("[")
    with pytest.raises(UserError, match=r"generation_config\.json: cannot be read"):
        load(tmp_path / "model", kind="causal", bits="none")


def test_sampled_text_is_a_function_of_the_seed(exported: Path) -> None:
    model = OnnxModel(exported)
    texts = [continue_text(model, "The", 16, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert continue_text(model, "The", 16, temperature=1.5, top_p=1e-6) == continue_text(model, "The", 16)


def test_samples_have_the_frequencies_of_the_softmax() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], dtype=np.float32)).repeat(20_000, axis=0)
    drawn = np.bincount(sampler(1.0, 1.0, 0)(logits), minlength=4) / len(logits)
    np.testing.assert_allclose(drawn, [0.5, 0.3, 0.15, 0.05], atol=0.015)  # four standard errors
    cut = np.bincount(sampler(1.0, 0.6, 0)(logits), minlength=4) / len(logits)
    np.testing.assert_allclose(cut, [0.625, 0.375, 0, 0], atol=0.015)


@pytest.mark.parametrize("kind", ["masked", "classifier"])
def test_encoders_with_token_types_equal_torch(kind: Any, tmp_path: Path) -> None:
    tokenizer = word_piece()
    (tmp_path / "model").mkdir()
    tokenizer.save_pretrained(tmp_path / "model")
    changes = {"type_vocab_size": 2, "vocab_size": len(tokenizer), "num_hidden_layers": 1}
    plain = save_tiny("bert", tmp_path / "model", kind=kind, **changes)
    exported = export_encoder(plain, kind, tmp_path / "model", tmp_path / "export")
    ours = OnnxModel(exported)
    theirs = Traversal(load(tmp_path / "model", kind=kind, bits="none", compute_dtype="float32"))
    task = tasks.get("rte")
    texts = [("it was good", "a man is great"), ("the boy was bad. a game", "no"), ("yes", "is it true")]
    examples = [
        Example({"premise": a, "hypothesis": b}, ("Yes", "No"), number % 2)
        for number, (a, b) in enumerate(texts)
    ]
    encoder = Encoder(ours.tokenizer, kind, task, 40)
    batch = encoder.collate([encoder.encode(example, training=False) for example in examples])
    assert batch.token_type_ids is not None
    got, want = ours.losses(batch), theirs.losses(batch)
    np.testing.assert_allclose(got.per_example, want.per_example, rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(got.scores, want.scores, rtol=0, atol=ROUNDING)
    assert (
        evaluate(ours, encoder, examples, 2).predictions == evaluate(theirs, encoder, examples, 2).predictions
    )
    if kind == "classifier":
        config = TrainConfig(**write_classes(tmp_path, 3))
        with pytest.raises(UserError, match=r"--task: of3 has 3 classes \(num_labels\), .* has 2 outputs"):
            evaluate_export(exported, None, config, "test")
        config = TrainConfig(**write_classes(tmp_path, 2))
        assert evaluate_export(exported, None, config, "test")["scores"]["loss"] > 0
        with pytest.raises(UserError, match="is a classifier model; text is written by a causal one"):
            continue_text(ours, "the", 4)


# ------------------------------------------------------------------------------------ the commands


def test_both_commands_evaluate_alike(
    exported: Path, data: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--task", data[0], "--data", data[1], "--max-length", "32", "--adapter", "tuned"]
    done = CliRunner().invoke(app, ["eval", "--onnx", str(exported), *flags, "--json"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert main(["eval", str(exported), *flags]) == 0
    alike = json.loads(capsys.readouterr().out)
    assert {**shown, "seconds": 0} == {**alike, "seconds": 0}
    assert shown["adapter"] == "tuned"
    assert 0 < shown["scores"]["loss"] < 5
    base = CliRunner().invoke(app, ["eval", "--onnx", str(exported), *flags[:-2]])
    assert "the model without an adapter; --adapter has it with one of tuned" in base.stderr
    missing = CliRunner().invoke(app, ["eval", "--onnx", str(exported)])
    assert (missing.exit_code, missing.stderr.startswith("error: --data: missing, and ")) == (2, True)
    table = CliRunner().invoke(app, ["eval", "--onnx", str(exported), *flags])
    assert f"{100 * shown['scores']['accuracy']:.1f} %" in table.stdout


def test_rows_of_another_file_than_a_runs_own_are_not_called_its_training_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text('model = "m"\ntask = "auto"\ndata = "mine.csv"\n')
    for data, run, told in (
        (str(tmp_path / "mine.csv"), "run", True),
        ("other.csv", "run", False),
        ("other.csv", "no-run", True),
        ("other.csv", None, True),
    ):
        line = provenance.trained_on_line(run, TrainConfig(model="m", task="auto", data=data), "all", None)
        assert line.startswith(f"all rows of {data}, ") is told
    config = TrainConfig(model="m", task="auto", data="mine.csv")
    assert provenance.trained_on_line("run", config, "all", "all") == ""
    assert provenance.trained_on_line("run", config, "test", None) == ""


def test_a_file_of_ones_own_is_evaluated_as_a_whole(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(f"the number {n} came,{'odd' if n % 2 else 'even'}\n" for n in range(20))
    (tmp_path / "mine.csv").write_text("text,label\n" + rows)
    flags = ["--data", str(tmp_path / "mine.csv")]
    for more, count in (([], 20), (["--split", "all"], 20), (["--split", "test"], 2)):
        done = CliRunner().invoke(app, ["eval", "--onnx", str(exported), *flags, *more, "--json"])
        assert json.loads(done.stdout)["examples"] == count, done.stderr
        assert main(["eval", str(exported), *flags, *more]) == 0
        edge = capsys.readouterr()
        found = json.loads(edge.out)
        told = "mine.csv, also those that a run on it was trained on; --split test has the ones that it holds"
        assert [told in shown for shown in (done.stderr, edge.err)] == 2 * [not more]
        assert (found["examples"], found["task"]) == (count, flags[1])
    folder = ["--task", "sst2", "--data", str(tmp_path), "--split", "all"]
    refused = CliRunner().invoke(app, ["eval", "--onnx", str(exported), *folder])
    assert (refused.exit_code, "--split: got 'all', allowed with one file" in refused.stderr) == (2, True)


def test_both_commands_generate_alike(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prompt", "The soup was", "--max-new-tokens", "8"]
    done = CliRunner().invoke(app, ["generate", "--onnx", str(exported), *flags])
    assert done.exit_code == 0, done.output
    assert main(["generate", str(exported), *flags]) == 0
    assert capsys.readouterr().out == done.stdout
    assert done.stdout.startswith("The soup was ")


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_the_commands_run_without_torch(command: str, exported: Path, data: tuple[str, str]) -> None:
    asked = {
        "eval": ["--task", data[0], "--data", data[1], "--max-length", "32"],
        "generate": ["--prompt", "The"],
    }
    by_typer = (
        "Blocked.names -= {'typer', 'rich', 'psutil'}\nfrom hizoo_lite.cli import app\n"
        f"app(['{command}', '--onnx', *sys.argv[1:]])"
    )
    plain = f"from hizoo_lite.edge.__main__ import main\nsys.exit(main(['{command}', *sys.argv[1:]]))"
    for code in (by_typer, plain):
        done = without_torch(code, str(exported), *asked[command])
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_the_run_of_an_adapter_gives_the_settings(
    exported: Path, data: tuple[str, str], tmp_path: Path
) -> None:
    from hizoo_lite.train.folder import RunFolder

    run = RunFolder(tmp_path / "run")
    run.create(TrainConfig(model="embedded", task=data[0], data=data[1], max_length=24, seed=3))
    shutil.copy(exported / "adapters" / "tuned.onnx_adapter", run.path / "adapter.onnx_adapter")
    config = eval_config(exported, str(run.path), {"seed": 4})
    assert (config.max_length, config.seed, config.task) == (24, 4, data[0])
    by_run = evaluate_export(exported, str(run.path), config, "test")
    by_name = evaluate_export(exported, "tuned", config, "test")
    assert by_run["scores"] == by_name["scores"]


# --------------------------------------------------------------------------------------- bad input


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("export.json", r"export\.json: no such file; allowed: a folder of"),
        ("model.onnx", r"model\.onnx: no such file"),
        ("model.onnx.data", r"model\.onnx\.data: no such file"),
        ("adapters/tuned.onnx_adapter", r"tuned\.onnx_adapter: no such file"),
        ("tokenizer.json", r"tokenizer\.json: no such file"),
    ],
)
def test_a_missing_file_is_named(name: str, message: str, copied: Path) -> None:
    (copied / name).unlink()
    with pytest.raises(UserError, match=message):
        OnnxModel(copied, "tuned")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("export.json", r"export\.json: not valid JSON"),
        ("model.onnx", r"model\.onnx: has \d+ bytes, \d+ were written: truncated"),
        ("model.onnx.data", r"model\.onnx\.data: has \d+ bytes, \d+ were written: truncated"),
        ("adapters/tuned.onnx_adapter", r"tuned\.onnx_adapter: has \d+ bytes, \d+ were written: truncated"),
    ],
)
def test_a_truncated_file_is_named(name: str, message: str, copied: Path) -> None:
    data = (copied / name).read_bytes()
    (copied / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=message):
        OnnxModel(copied, "tuned")


@pytest.mark.parametrize("name", ["model.onnx", "adapters/tuned.onnx_adapter"])
def test_a_changed_byte_is_noticed(name: str, copied: Path) -> None:
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{Path(name).name}: its sha256 is not the one in export\.json"):
        OnnxModel(copied, "tuned")


def test_what_onnxruntime_cannot_open_is_explained(copied: Path) -> None:
    graph = copied / "model.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.onnx: it is truncated, or no ONNX graph"):
        Graph(graph)
    graph.write_bytes(whole)
    (copied / "model.onnx.data").write_bytes(b"")
    with pytest.raises(UserError, match=r"model\.onnx: its external data .* truncated"):
        Graph(graph)
    (copied / "model.onnx.data").unlink()
    with pytest.raises(UserError, match=r"model\.onnx: its external data .* is missing"):
        Graph(graph)
    with pytest.raises(UserError, match=r"nothing\.onnx: no such file"):
        Graph(copied / "nothing.onnx")


def test_a_file_that_is_no_adapter_is_named(exported: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.onnx_adapter"
    cut.write_bytes((exported / "adapters/tuned.onnx_adapter").read_bytes()[:100])
    with pytest.raises(UserError, match=r"cut\.onnx_adapter: not an adapter of onnxruntime, or truncated"):
        OnnxModel(exported, str(cut))


OUTSIDE = {
    "files": {"../x": {"bytes": 1}},
    "inputs": [],
    "outputs": [],
    "cache": [],
    "adapter_inputs": {"lora": {}, "head": {}},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 9}, "format: got 9, allowed: 1"),
        ({"kind": "x"}, "kind: got 'x', allowed: causal, masked, classifier"),
        ({"adapters": {"tuned": {"file": "../../etc/passwd", "bytes": 1}}}, "is outside of the folder"),
        ({"model": OUTSIDE}, r"model\.files\.\.\./x: .* is outside of the folder"),
        ({"adapters": {"tuned": {}}}, r"not as export writes it \(KeyError: 'file'\)"),
        ({"adapters": 3}, r"not as export writes it \(AttributeError"),
    ],
)
def test_a_wrong_record_is_named(changes: dict[str, Any], message: str, copied: Path) -> None:
    path = copied / "export.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=message):
        OnnxModel(copied, "tuned")


def test_an_unknown_adapter_is_named_with_those_that_are_there(exported: Path) -> None:
    with pytest.raises(UserError, match=r"--adapter: got 'other', allowed: an adapter of .* \(tuned\)"):
        OnnxModel(exported, "other")


def test_an_adapter_of_another_model_is_refused(exported: Path, tmp_path: Path) -> None:
    """By the record of the export or run that it is of, whatever its shapes are."""
    other = Path(shutil.copytree(exported, tmp_path / "other"))
    adapter = other / "adapters" / "tuned.onnx_adapter"
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(adapter, run / "adapter.onnx_adapter")
    same = json.dumps({"base": "embedded", "base_fingerprint": BASE["fingerprint"]})
    (run / "run.json").write_text(same)
    for sound in (adapter, run, run / "adapter.onnx_adapter"):
        OnnxModel(exported, str(sound))
    record = json.loads((other / "export.json").read_text())
    record["base"] = {"model": "another/model", "fingerprint": "0" * 64}
    (other / "export.json").write_text(json.dumps(record))
    (run / "run.json").write_text(json.dumps({"base": "another/model", "base_fingerprint": "0" * 64}))
    for odd in (adapter, run, run / "adapter.onnx_adapter"):
        with pytest.raises(
            UserError, match=r"is of 'another/model' \(fingerprint 0{12}\); the export in .* is of 'embedded'"
        ):
            OnnxModel(exported, str(odd))
    record["base"] = "another/model"
    (other / "export.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"other/export\.json: base: not as export writes it"):
        OnnxModel(exported, str(adapter))


@pytest.mark.parametrize("name", ["roberta", "bert", "opt", "llama", "gpt2"])
def test_positions_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    model = load(tmp_path, kind=TINY_CONFIGS[name].kind, bits="none", device="cpu")
    assert positions_of(tmp_path) == model.positions
    (tmp_path / "config.json").write_text('{"max_position_embeddings": "many"}')
    assert positions_of(tmp_path) is None
    (tmp_path / "config.json").unlink()
    assert positions_of(tmp_path) is None


def test_a_tensor_that_does_not_fit_is_named(exported: Path, space: LoRA, tmp_path: Path) -> None:
    path = tmp_path / "odd.onnx_adapter"
    layer = space.target_names[0]
    rows, columns = space.model.linears[layer].weight.shape

    def of(a: tuple[int, ...], b: tuple[int, ...] | None, kind: Any = np.float32) -> dict[str, np.ndarray]:
        found = {"A": a} if b is None else {"A": a, "B": b}
        return {f"{layer}.lora_{side}": np.zeros(shape, dtype=kind) for side, shape in found.items()}

    save_adapter(path, of((columns, 5), (5, rows)))
    assert continue_text(OnnxModel(exported, str(path)), "The", 4) == continue_text(
        OnnxModel(exported), "The", 4
    )
    for values, message in (
        ({"no.such.layer": np.zeros((2, 2), dtype=np.float32)}, r"no\.such\.layer: the exported base has no"),
        (of((columns + 1, 5), (5, rows)), rf"lora_A has shape \({columns + 1}, 5\), .* wants \({columns}, 5"),
        (of((columns, 5), (4, rows)), rf"lora_B has shape \(4, {rows}\), .* wants \(5, {rows}\)"),
        (of((columns, 5, 1), (5, rows)), r"lora_A has shape"),
        (of((columns, 5), None), r"has .*lora_A without .*lora_B"),
        (of((columns, 5), (5, rows), np.float16), r"lora_A is tensor\(float16\), .* wants tensor\(float\)"),
    ):
        save_adapter(path, values)
        with pytest.raises(UserError, match=rf"odd\.onnx_adapter: .*{message}"):
            OnnxModel(exported, str(path))


def test_a_damaged_adapter_stops_neither_the_base_nor_another_adapter(copied: Path, exported: Path) -> None:
    (copied / "adapters" / "tuned.onnx_adapter").write_bytes(b"x")
    want = continue_text(OnnxModel(exported), "The", 2)
    assert continue_text(OnnxModel(copied), "The", 2) == want
    OnnxModel(copied, str(exported / "adapters" / "tuned.onnx_adapter"))


def test_an_export_with_the_adapter_of_a_run_answers_as_the_run_was_asked(
    exported: Path, tmp_path: Path
) -> None:
    small = {"steps": 1, "batch_size": 2, "train_examples": 4, "test_examples": 2, "dev_examples": 0}
    run = hizoo_lite.fit(
        hizoo_lite.TrainConfig(
            model="embedded", task="embedded", data="embedded", bits="none", head="none", device="cpu",
            out=str(tmp_path / "run"), **small,
        )
    )  # fmt: skip
    asked = ["generate", "--adapter", str(run.folder), "--prompt", "The soup was cold."]
    inside = CliRunner().invoke(app, asked)
    outside = CliRunner().invoke(app, [*asked, "--onnx", str(exported)])
    assert (inside.exit_code, outside.exit_code) == (0, 0), outside.output
    assert outside.stdout == inside.stdout
    assert outside.stdout.strip() in ("great", "terrible")  # the labels of its task
    raw = CliRunner().invoke(app, [*asked, "--onnx", str(exported), "--raw"])
    assert raw.stdout.startswith("The soup was cold.")


def test_flags_of_a_model_in_torch_are_refused_beside_onnx(exported: Path) -> None:
    done = CliRunner().invoke(
        app, ["generate", "--onnx", str(exported), "--prompt", "x", "--bits", "nf4", "--model", "m"]
    )
    assert done.exit_code == 2
    assert "--bits: got 'nf4', not allowed with --onnx" in done.output
    assert "--model: got 'm', not allowed with --onnx" in done.output
    for command in (["generate", "--prompt", "x"], ["eval", "--task", "embedded"]):
        done = CliRunner().invoke(app, [*command, "--onnx", str(exported), "--profile", "l4-24gb"])
        assert done.exit_code == 2
        assert "--profile: got 'l4-24gb', not allowed with --onnx" in done.output


def test_texts_beyond_the_positions_and_empty_prompts_are_refused(exported: Path) -> None:
    model = OnnxModel(exported)
    with pytest.raises(UserError, match="allowed: 256 tokens in all"):
        continue_text(model, "The", 256)
    assert torch.tensor(model.tokenizer("")["input_ids"]).tolist() == [1]  # the embedded one begins with <s>
    model.tokenizer._backend.post_processor = None
    in_torch_too = base()
    in_torch_too.tokenizer = model.tokenizer
    with pytest.raises(UserError, match=r"--prompt: got .*half of a character; allowed: UTF-8 text"):
        continue_text(OnnxModel(exported), "caf\udce9", 1)
    with pytest.raises(UserError, match="--prompt: got no token to begin with"):
        continue_text(model, "", 2)
    with pytest.raises(UserError, match="--prompt: got no token to begin with"):
        in_torch.generate(in_torch_too, "", 2)


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("--max-new-tokens", "-1", "a whole number of 1 or more"),
        ("--max-new-tokens", "0", "a whole number of 1 or more"),
        ("--temperature", "-1.0", "a finite number of 0 or more"),
        ("--temperature", "nan", "a finite number of 0 or more"),
        ("--temperature", "inf", "a finite number of 0 or more"),
        ("--top-p", "7.0", "a number above 0, at most 1"),
        ("--top-p", "0.0", "a number above 0, at most 1"),
        ("--top-p", "nan", "a number above 0, at most 1"),
        ("--seed", "-1", "a whole number from 0"),
    ],
)
def test_a_number_that_no_text_can_be_written_with_is_refused(
    flag: str, value: str, allowed: str, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(exported), "--prompt", "The", flag, value]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {flag}: got {value}")
    assert f", allowed: {allowed}" in captured.err
    assert captured.out == ""
    for source in (["--onnx", str(exported)], ["--model", "embedded"]):
        done = CliRunner().invoke(app, ["generate", *source, "--prompt", "The", flag, value])
        assert done.exit_code == 2
        assert flag in done.output


@pytest.mark.parametrize("examples", ["-5", "0"])
def test_a_number_of_examples_below_1_is_refused(
    examples: str, exported: Path, data: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--task", data[0], "--data", data[1], "--examples", examples]
    assert main(["eval", str(exported), *flags]) == 2
    assert f"--examples: got {examples}, allowed: a whole number of 1 or more" in capsys.readouterr().err
