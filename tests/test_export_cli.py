"""`hizoo-lite export` for every target, and the same from Python."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hizoo_lite.cli.export import TARGETS, try_line
from hizoo_lite.config import TrainConfig
from hizoo_lite.edge.folder import Export
from hizoo_lite.engine.load import load
from hizoo_lite.export import merged
from hizoo_lite.export.onnx.compare import LIMIT
from hizoo_lite.extras import need
from hizoo_lite.model.kinds import model_path
from hizoo_lite.run import Run, fit
from hizoo_lite.train import provenance, saved
from tests.run_fixtures import short_run
from tests.test_cli import call
from tests.test_export_merged import FLOAT32, logits, theirs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A short run on the embedded model; its adapter is moved far enough to matter."""
    return fit(TrainConfig(**short_run(tmp_path_factory.mktemp("tuned"), lr=0.1, bits="nf4")))


@pytest.fixture(scope="module")
def ours(run: Run) -> torch.Tensor:
    """The tuned model's logits."""
    model = load(model_path("embedded"), bits="nf4", compute_dtype="float32", device="cpu")
    untuned = logits(model.module)
    saved.attach_adapter(model, run.folder)
    assert (logits(model.module) - untuned).abs().max() > 0.01
    return logits(model.module)


def export(run: Run, to: str, out: Path, *options: str) -> dict[str, Any]:
    """The figures that the command prints."""
    done = call("export", str(run.folder), "--to", to, "--out", str(out), "--json", *options)
    assert done.exit_code == 0, done.stderr
    figures = json.loads(done.stdout)
    assert (figures["out"], figures["to"]) == (str(out), to)
    return figures


def test_the_help_has_an_example_of_every_target() -> None:
    shown = call("export", "--help").stdout
    for target in TARGETS:
        assert f"--to {target} " in shown
    assert "those of the quantized base (not the 16-bit ones" in " ".join(shown.replace("│", " ").split())


@pytest.mark.parametrize("to", ["onnx", "onnx-train"])
@pytest.mark.parametrize("module", ["onnx_ir", "onnxscript"])
def test_without_the_exporter_one_line_says_what_to_install(
    to: str, module: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("hizoo_lite.export.onnx")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    refused = call("export", str(run.folder), "--to", to, "--out", str(tmp_path / "out"))
    assert refused.exit_code == 2
    assert refused.stderr == (
        f"error: export to ONNX: {module} is not installed; run: pip install 'hizoo-lite[onnx]'\n"
    )


def test_a_library_that_lacks_one_of_its_own_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(name: str) -> None:
        raise ModuleNotFoundError("No module named 'inner'", name="inner")

    monkeypatch.setattr("importlib.import_module", lacking)
    with pytest.raises(ModuleNotFoundError, match="inner"):
        need("outer", "extra", "a flag")


def test_a_run_becomes_an_adapter_for_peft(run: Run, tmp_path: Path) -> None:
    figures = export(run, "peft", tmp_path / "out")
    assert figures["rank"] == 2
    assert figures["model"] == provenance.base_model(tmp_path / "out")
    assert figures["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(figures["model"]), tmp_path / "out")
    done = call("export", str(run.folder), "--to", "peft", "--out", str(tmp_path / "again"))
    assert done.stdout.startswith(f"{tmp_path / 'again'}: PEFT adapter of rank 2 for ")


def test_a_run_becomes_an_export_for_onnxruntime_and_takes_more_adapters(run: Run, tmp_path: Path) -> None:
    record = export(run, "onnx", tmp_path / "out")
    assert record["adapters"]["run"]["rank"] == 2
    assert record["check"]["max_abs_difference"] < LIMIT
    assert (tmp_path / "out/tokenizer.json").is_file()
    arguments = ("export", str(run.folder), "--to", "onnx", "--out", str(tmp_path / "out"))
    again = call(*arguments)
    assert again.exit_code == 2
    assert "--name: 'run' is in" in again.stderr
    more = call(*arguments, "--name", "more")
    assert "causal, nf4, " in more.stdout
    assert "adapters run, more; logits within" in more.stdout
    assert run.export_onnx(tmp_path / "out", name="mine").adapters == ["run", "more", "mine"]


@pytest.mark.parametrize("to", ["onnx", "onnx-train"])
@pytest.mark.parametrize("is_exported", [False, pytest.param(True, marks=pytest.mark.grid)])
def test_a_model_that_was_moved_is_named_and_must_be_the_same(
    to: str, is_exported: bool, run: Run, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(run.folder, tmp_path / "moved"))
    for path in (moved / "config.toml", moved / "adapter/adapter_config.json"):
        old = "embedded" if path.suffix == ".toml" else model_path("embedded")
        assert f'"{old}"' in path.read_text()
        path.write_text(path.read_text().replace(f'"{old}"', '"models/gone"'))
    model = Path(shutil.copytree(model_path("embedded"), tmp_path / "model"))
    arguments = ("export", str(moved), "--to", to, "--out", str(tmp_path / "out"))
    assert call(*arguments).exit_code == 2
    tensors = load_file(model / "model.safetensors")
    other = Path(shutil.copytree(model, tmp_path / "other"))
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    refused = call(*arguments, "--model", str(other))
    assert refused.exit_code == 2
    assert f"--model: {other} has other weights than the model that was tuned" in refused.stderr
    assert not (tmp_path / "out").exists()
    if not is_exported:
        return
    done = call(*arguments, "--model", str(model))
    assert done.exit_code == 0, done.stderr
    if to == "onnx":
        more = call(*arguments, "--model", str(model), "--name", "more")
        assert "adapters moved, more; logits within" in more.stdout, more.stderr
        assert "skipped" not in (tmp_path / "out/export.json").read_text()
        refused = call(*arguments, "--model", str(other), "--name", "another")
        assert f"--model: {other} has other weights" in refused.stderr


@pytest.mark.parametrize(("share", "is_warned"), [(0.91, False), (0.89, True)])
def test_an_export_that_chooses_otherwise_is_warned_of(
    share: float, is_warned: bool, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = {"max_abs_difference": 1.0, "mean_abs_difference": 0.5, "same_choice": share}
    files = {"model.onnx": {"bytes": 1}}
    record = {"kind": "causal", "bits": "nf4", "form": "tuned", "model": {"files": files}, "check": check}
    export = Export(tmp_path, record | {"adapters": {}})
    monkeypatch.setattr("hizoo_lite.export.onnx.export.export_onnx", lambda *_, **__: export)
    done = call("export", str(run.folder), "--to", "onnx", "--out", str(tmp_path), "--format", "fast")
    assert ("WARNING" in done.stdout) == is_warned


def test_a_run_becomes_a_plain_model(run: Run, ours: torch.Tensor, tmp_path: Path) -> None:
    figures = export(run, "merged", tmp_path / "out", "--dtype", "float32")
    assert (figures["dtype"], figures["bits"], figures["was_complete"]) == ("float32", "none", False)
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert figures["bytes"] == pytest.approx(written, rel=0.01)
    torch.testing.assert_close(logits(theirs(tmp_path / "out", "causal")), ours, **FLOAT32)
    arguments = ("export", str(run.folder), "--to", "merged", "--out", str(tmp_path / "out"))
    assert "is complete already: float32, " in call(*arguments, "--dtype", "float32").stdout
    other = call(*arguments, "--dtype", "fp16")
    assert other.exit_code == 2
    assert "--out: " in other.stderr


def test_a_merged_model_can_be_quantized_again(run: Run, tmp_path: Path) -> None:
    arguments = ("export", str(run.folder), "--to", "merged", "--out", str(tmp_path / "out"))
    done = call(*arguments, "--bits", "int8", "--base-bits", "nf4", "--base-double-quant")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'out'}: int8 (bf16 beside it), ")
    assert "merge, MiB" in done.stderr
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["load_in_8bit"] is True
    assert torch.isfinite(logits(load(tmp_path / "out", device="cpu").module)).all()


@pytest.mark.parametrize(("to", "command"), [("peft", "eval"), ("merged", "eval"), ("onnx", "generate")])
def test_what_was_exported_answers_to_the_command_that_is_told(
    to: str, command: str, run: Run, tmp_path: Path
) -> None:
    """The run tells labels apart: one is answered where the run says the task, else they are counted."""
    done = call("export", str(run.folder), "--to", to, "--out", str(tmp_path / "an export"))
    assert done.exit_code == 0, done.stderr
    program, *tried = shlex.split(done.stderr.rpartition("try it: ")[2])
    assert (program, tried[0]) == ("hizoo-lite", command)
    asked = call(*tried)
    assert asked.exit_code == 0, asked.stderr
    if command == "eval":
        assert "accuracy" in asked.stdout
    else:
        assert asked.stdout.strip() in {answer.strip() for answer in run.setup.splits.test[0].answers}


@pytest.mark.parametrize(
    ("to", "kind", "data", "takes_adapter", "expected"),
    [
        ("peft", "causal", "d", False, 'hizoo-lite generate --adapter out --prompt "..."'),
        ("merged", "classifier", "d/x y", False, "hizoo-lite eval --model out --task sst2 --data 'd/x y'"),
        ("onnx", "masked", "d", True, "hizoo-lite eval --onnx out --adapter run"),
        ("onnx", "classifier", "d", False, "hizoo-lite eval --onnx out --task sst2 --data d"),
        ("onnx-train", "causal", "d", False, "python -m hizoo_lite.edge train out"),
        ("gguf", "causal", "d", False, ""),  # Ollama's command is in the line before
        ("peft", None, None, False, ""),  # PEFT's own adapter, of a kind that it does not say
    ],
)
def test_the_command_that_is_told_is_of_the_kind_of_model(
    to: str, kind: Any, data: str | None, takes_adapter: bool, expected: str
) -> None:
    settings = None if data is None else TrainConfig(model="m", task="sst2", data=data)
    assert try_line("run", to, "out", kind, settings, takes_adapter=takes_adapter) == expected


def test_an_interrupted_merge_goes_on_when_it_is_repeated(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(run, "merged", tmp_path / "whole")
    real, calls = merged.Merged.read_rows, 0

    def interrupted(self: merged.Merged, name: str, start: int, stop: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise KeyboardInterrupt
        return real(self, name, start, stop)

    arguments = ("export", str(run.folder), "--to", "merged", "--out", str(tmp_path / "out"))
    with monkeypatch.context() as patched:
        patched.setattr(merged.Merged, "read_rows", interrupted)
        done = call(*arguments)
    assert done.exit_code == 130
    assert "merge: interrupted; the same call goes on" in done.stderr
    assert call(*arguments).exit_code == 0
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_python_exports_what_the_command_does(run: Run, tmp_path: Path) -> None:
    export(run, "peft", tmp_path / "peft")
    export(run, "merged", tmp_path / "merged", "--dtype", "fp16")
    run.export_peft(tmp_path / "peft-too")
    assert run.export_merged(tmp_path / "merged-too", dtype="fp16") == tmp_path / "merged-too"
    for folder in ("peft", "merged"):
        for path in (tmp_path / folder).glob("*.safetensors"):
            assert (tmp_path / f"{folder}-too" / path.name).read_bytes() == path.read_bytes()


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("to", "options", "messages"),
    [
        ("ggml", [], ["--to: got 'ggml', allowed: peft, onnx, onnx-train, merged, gguf"]),
        ("peft", ["--dtype", "bf16"], ["--dtype: got 'bf16', allowed only with --to onnx or merged or gguf"]),
        ("onnx", ["--fresh"], ["--fresh: got True, allowed only with --to onnx-train"]),
        ("onnx", ["--base-bits", "int8"], ["--base-bits: got 'int8', but ", " was tuned with bits 'nf4'"]),
        ("onnx", ["--model", "/nowhere/at/all"], ["the folder /nowhere/at/all does not exist"]),
        ("onnx-train", ["--model", "/nowhere/at/all"], ["the folder /nowhere/at/all does not exist"]),
        (
            "merged",
            ["--format", "fast", "--name", "x"],
            [
                "--format: got 'fast', allowed only with --to onnx",
                "--name: got 'x', allowed only with --to onnx",
            ],
        ),
        ("peft", ["--no-double-quant"], ["--double-quant: got False, allowed only with --to merged"]),
        ("merged", ["--bits", "nf5"], ["'nf5' is not one of"]),
        ("merged", ["--model", "/nowhere/at/all"], ["the folder /nowhere/at/all does not exist"]),
    ],
)
def test_what_does_not_belong_together_is_refused_and_nothing_is_written(
    to: str, options: list[str], messages: list[str], run: Run, tmp_path: Path
) -> None:
    done = call("export", str(run.folder), "--to", to, "--out", str(tmp_path / "out"), *options)
    assert done.exit_code == 2
    assert done.stdout == ""
    for message in messages:
        assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_result_is_named(run: Run, tmp_path: Path) -> None:
    shutil.copy(run.folder / "config.toml", tmp_path)
    done = call("export", str(tmp_path), "--to", "onnx", "--out", str(tmp_path / "out"))
    assert done.exit_code == 2
    assert (
        f"{tmp_path}: the run has no result yet; finish it with --resume, or give one of its" in done.stderr
    )
    assert str(tmp_path / "checkpoints" / "step-N") in done.stderr


@pytest.mark.parametrize("to", list(TARGETS))
def test_a_folder_with_nothing_tuned_is_refused(to: str, tmp_path: Path) -> None:
    done = call("export", str(tmp_path), "--to", to, "--out", str(tmp_path / "out"))
    assert done.exit_code == 2
    assert f"RUN: got '{tmp_path}', allowed: a run folder" in done.stderr
    missing = call("export", str(tmp_path / "rnus"), "--to", to, "--out", str(tmp_path / "out"))
    assert f"RUN: got '{tmp_path / 'rnus'}' (no such folder), allowed: a run folder" in missing.stderr
