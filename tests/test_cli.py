"""The command line: exit codes, what goes to stdout, and every command on a real model."""

from __future__ import annotations

import errno
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import hizoo_lite as hz
from hizoo_lite.cli import app, doctor, plan
from hizoo_lite.config import TrainConfig, settings
from hizoo_lite.engine.generate import generate
from hizoo_lite.errors import UserError
from hizoo_lite.plan import hardware
from hizoo_lite.registry import CURVATURES, ESTIMATORS, SPACES
from hizoo_lite.report import verdict
from hizoo_lite.train import config_file
from hizoo_lite.train.bars import Bars
from hizoo_lite.train.folder import RunFolder
from hizoo_lite.train.progress import Lines
from hizoo_lite.train.step import StepRecord
from tests.run_fixtures import flags, nan_head, short_run, stories

ROOT = Path(__file__).parents[1]


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_methods_says_of_every_member_what_it_costs_and_where_it_pays() -> None:
    found = json.loads(call("methods", "--json").stdout)
    for axis in (ESTIMATORS, SPACES, CURVATURES):
        members = found[axis.axis]
        assert [member["name"] for member in members] == list(axis)
        assert all(member["pays"] and member["holds"] for member in members)
    forwards = {member["name"]: member["forwards"] for member in found["estimator"]}
    assert {"hizoo": 3, "mezo": 2, "kerzoo": 2, "fzoo": 9}.items() <= forwards.items()
    shown = call("methods").stdout
    assert all(f"--{axis}" in shown for axis in found)


def start(*arguments: str) -> subprocess.Popen[str]:
    """The real command, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hizoo_lite.cli", *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished short run."""
    folder = tmp_path_factory.mktemp("tuned")
    done = call("train", *flags(short_run(folder, lr=1e-2, test_examples=6)), "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 6
    return folder / "run"


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "doctor",
        "plan",
        "profiles",
        "methods",
        "quantize",
        "train",
        "eval",
        "generate",
        "replay",
        "report",
        "export",
    ],
)
def test_every_command_has_help_with_examples(command: str) -> None:
    shown = call(command, "--help")
    assert shown.exit_code == 0
    assert "Examples:" in shown.stdout
    assert f"hizoo-lite {command}" in shown.stdout


def test_a_place_that_takes_nothing_is_told_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(number: int) -> None:
        def names() -> list[str]:
            raise OSError(number, os.strerror(number), "/full/file")

        monkeypatch.setattr(hardware, "names", names)

    refused(errno.ENOSPC)
    found = call("profiles")
    assert found.exit_code == 1
    assert found.stderr == (
        "error: /full/file: No space left on device; make room there or choose another place\n"
    )
    refused(errno.EIO)
    assert isinstance(call("profiles").exception, OSError)


def test_train_has_exactly_one_flag_for_every_setting() -> None:
    command = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    spelled = {parameter.name: parameter.opts[0] for parameter in command.params}
    expected = {name: "--" + name.replace("_", "-") for name in settings()}
    assert spelled.items() >= expected.items()
    assert set(spelled) - set(expected) == {"config", "json", "quiet"}


def test_bad_input_is_one_message_on_stderr_and_exit_code_two(tmp_path: Path) -> None:
    done = call("train", "--bits", "nf5", "--steps", "many", "--out", str(tmp_path / "run"))
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "error: 4 problems in the configuration" in done.stderr
    assert "--bits: got 'nf5', allowed: nf4, fp4, int8, none" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
    assert call("train", "--nosuch").exit_code == 2


def test_errors_that_are_not_the_users_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(doctor, "examine", broken)
    done = call("doctor")
    assert isinstance(done.exception, ValueError)
    assert not isinstance(done.exception, UserError)


def test_a_run_that_failed_is_one_message_and_exit_code_one(tmp_path: Path) -> None:
    done = call("train", *flags(short_run(tmp_path, model=nan_head(tmp_path), steps=30)))
    assert done.exit_code == 1
    assert "error: step 19: the losses of 20 steps in a row were not finite" in done.stderr
    assert (tmp_path / "run/summary.json").is_file()


def test_texts_of_a_single_token_are_left_out_and_counted(tmp_path: Path) -> None:
    texts = ["The soup was warm.", "", "The day was cold."] * 4  # the embedded tokenizer begins with <s>
    data = tmp_path / "d"
    data.mkdir()
    for name in ("train", "test"):
        rows = "".join(json.dumps({"text": text + " "}) + "\n" for text in texts)
        (data / f"{name}.jsonl").write_text(rows)
    (tmp_path / "t.toml").write_text('name = "t"\nkind = "lm"\nprompt = "{text}"\n')
    settings = short_run(tmp_path, steps=1, dev_examples=0) | {
        "task": str(tmp_path / "t.toml"),
        "data": str(data),
    }
    done = call("train", *flags(settings))
    assert done.exit_code == 0, done.stderr
    assert "train: 3 left out, the first: " in done.stderr  # of the 10 that --train-examples allows
    left_out = list(map(json.loads, (tmp_path / "run" / "left_out.jsonl").read_text().splitlines()))
    assert {one["why"] for one in left_out} == {"a text of a single token, and nothing to predict"}
    assert len(left_out) == 3 + 4
    done = call("eval", "--adapter", str(tmp_path / "run"), "--json")
    assert json.loads(done.stdout)["examples"] == 8


def test_train_prints_its_result_on_stdout_and_progress_on_stderr(tmp_path: Path) -> None:
    done = call("train", *flags(short_run(tmp_path, steps=2)))
    assert done.exit_code == 0, done.stderr
    assert "accuracy" in done.stdout
    assert "before" in done.stdout
    assert "train 2/2: mean loss" in done.stderr
    assert "forwards/s" in done.stderr
    assert "train 2/2" not in done.stdout


def test_a_config_file_of_a_run_starts_the_same_run(tuned: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "again")
    done = call("train", "--config", str(tuned / "config.toml"), "--out", out, "--json")
    assert done.exit_code == 0, done.stderr
    first = json.loads((tuned / "summary.json").read_text())
    assert json.loads(done.stdout)["loss_after"] == first["loss_after"]


def test_resume_needs_only_the_folder(tmp_path: Path) -> None:
    first = call("train", *flags(short_run(tmp_path, steps=2)))
    assert first.exit_code == 0
    assert re.search(r"^2 steps of \d+ examples: [\d.]+ epochs of \d+$", first.stderr, re.MULTILINE)
    done = call("train", "--resume", "--out", str(tmp_path / "run"), "--steps", "3", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 3
    assert "resuming after 2 of 3 steps" in done.stderr


@pytest.mark.grid  # tests/test_run.py sends signals in this process
def test_sigint_ends_a_process_with_130_and_a_resumable_run(tmp_path: Path) -> None:
    process = start("train", *flags(short_run(tmp_path, steps=100000)))
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and '"kind": "step"' in metrics.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert f"hizoo-lite train --resume --out {tmp_path / 'run'}" in errors
    assert "Traceback" not in errors
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["interrupted"]
    assert summary["steps"] >= 1
    more = str(summary["steps"] + 1)
    done = call("train", "--resume", "--out", str(tmp_path / "run"), "--steps", more, "--json")
    assert done.exit_code == 0, done.stderr
    assert not json.loads(done.stdout)["interrupted"]


def test_a_real_process_answers_help_and_bad_input() -> None:
    shown, _ = start("--help").communicate(timeout=60)
    assert all(name in shown for name in ("demo", "doctor", "train", "eval", "generate"))
    process = start("train", "--config", "nosuch")
    out, errors = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert re.fullmatch(r"error: --config: got 'nosuch'.*\n", errors)


def test_eval_of_a_run_gives_the_loss_of_its_summary(tuned: Path) -> None:
    summary = json.loads((tuned / "summary.json").read_text())
    done = call("eval", "--adapter", str(tuned), "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["scores"] == {"loss": summary["loss_after"], "accuracy": summary["metric_after"]}
    config = hz.TrainConfig(**short_run(tuned.parent))
    base = call(
        "eval", "--model", "embedded", "--task", config.task, "--data", str(config.data), "--max-length", "32"
    )
    assert base.exit_code == 0, base.stderr
    assert f"{summary['loss_before']:.4f}" in base.stdout
    before, count = summary["metric_before"], summary["test_examples"]
    bar = verdict.bar_of({"accuracy": before}, "accuracy", count)
    assert f"{100 * before:.1f} % {bar}" in base.stdout
    assert re.search(r"^embedded: causal, nf4, .*; nf4: the default of --bits; with --bits none", base.stderr)
    assert "; quantized to nf4 on loading (--bits, or the run's setting)\n" in done.stderr


def test_eval_of_an_adapter_without_a_run_uses_the_model_it_names(tuned: Path, tmp_path: Path) -> None:
    config = hz.TrainConfig(**short_run(tuned.parent))
    chosen = ["--task", config.task, "--data", str(config.data), "--max-length", "32", "--examples", "2"]
    done = call("eval", "--adapter", str(tuned / "adapter"), *chosen, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["examples"] == 2
    empty = call("eval", "--model", "embedded", "--task", "lm", "--data", str(tmp_path))
    assert empty.exit_code == 2
    missing = call("eval", "--adapter", str(tuned / "adapter"))
    assert (missing.exit_code, missing.stderr.startswith("error: --data: missing, and ")) == (2, True)


def test_data_of_a_run_that_is_seen_from_elsewhere_is_told(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(tuned, tmp_path / "run"))
    config = RunFolder(run).config()
    (run / "config.toml").write_text(config_file.write(replace(config, data="mine/rows.csv")))
    monkeypatch.chdir(tmp_path)
    done = call("eval", "--adapter", str(run))
    assert done.exit_code == 2
    assert "mine/rows.csv" in done.stderr
    assert "as seen from where the run was begun; allowed: the same command there, or --data" in done.stderr


def test_eval_of_a_model_that_computes_nothing_fails(tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: value.fill_(torch.nan) for name, value in load_file(file).items()}, file)
    config = hz.TrainConfig(**short_run(tuned.parent))
    chosen = ["--task", config.task, "--data", str(config.data), "--max-length", "32", "--examples", "2"]
    done = call("eval", "--adapter", str(tmp_path / "adapter"), *chosen, "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["scores"]["loss"] is None
    assert re.search(r"error: \S+: the loss on \S+ is nan, not a finite number", done.stderr)


def test_an_empty_part_is_refused(tuned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert call("train", *flags(short_run(tmp_path, steps=1, dev_examples=0))).exit_code == 0
    done = call("eval", "--adapter", str(folder), "--split", "dev")
    assert done.exit_code == 2
    assert re.search(r"--split: the dev part of \S+ is empty; allowed: another part", done.stderr)


def test_generate_continues_the_prompt_and_the_adapter_changes_it(tuned: Path) -> None:
    plain = call("generate", "--model", "embedded", "--prompt", "The soup was", "--max-new-tokens", "8")
    assert plain.exit_code == 0, plain.stderr
    assert plain.stdout.startswith("The soup was")
    assert len(plain.stdout.strip()) > len("The soup was")
    done = call(
        "generate", "--adapter", str(tuned), "--prompt", "The soup was", "--max-new-tokens", "8", "--json"
    )
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["adapter"] == str(tuned)


def test_generate_without_a_model_is_refused(tmp_path: Path) -> None:
    done = call("generate", "--prompt", "x")
    assert done.exit_code == 2
    assert "--model: missing" in done.stderr


def test_sampling_is_a_function_of_its_seed() -> None:
    model = hz.load(stories(), bits="none", device="cpu")
    texts = [generate(model, "Once", 12, temperature=1.0, top_p=0.95, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    greedy = generate(model, "Once", 12)
    assert greedy == generate(model, "Once", 12, temperature=1e-6, seed=3)
    model.tokenizer = None
    with pytest.raises(UserError, match="has no tokenizer files"):
        generate(model, "Once", 12)


def test_doctor_reports_this_machine() -> None:
    done = call("doctor", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["quantization"] == {"nf4": "works", "int8": "works"}
    assert report["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert report["memory_bytes"] > report["memory_free_bytes"] > 0
    assert report["compute_dtype"] in ("bfloat16", "float16", "float32")
    assert "problems" in report
    assert "works" in call("doctor").stdout


def test_doctor_says_what_to_do_about_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "_check_quantization", lambda: {"nf4": "wrong: off by 0.500", "int8": "works"}
    )
    report = doctor.examine()
    assert any("nf4 quantization wrong" in text and "reinstall" in text for text in report["problems"])


def test_doctor_calls_nothing_a_problem_that_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hizoo_lite.model.build.choose_compute", lambda wanted, device: torch.float32)
    monkeypatch.setattr("hizoo_lite.device.choose_device", lambda wanted: torch.device("cpu"))
    monkeypatch.setattr(doctor, "_LITTLE_DISK_BYTES", 2**60)
    monkeypatch.setattr("hizoo_lite.checkpoints.hub.reach", lambda: "on")
    report = doctor.examine()
    assert report["notes"] == ["this CPU has no bf16 products: float32 is used, steps are slower"]
    assert any("make room, or work in a folder on another disk" in text for text in report["problems"])
    shown = call("doctor").stdout
    assert "note: this CPU has no bf16 products" in shown
    assert "problem: less than 5 GiB" in shown


class _Answer(http.server.BaseHTTPRequestHandler):
    """Answers HEAD with the server's status, after its delay; notes what was asked for."""

    def do_HEAD(self) -> None:
        server: Any = self.server
        server.asked.append(self.path)
        time.sleep(server.delay)
        with suppress(OSError):
            self.send_response(server.status)
            self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server that stands for the hub, whatever the machine's own settings are."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answer)
    server.asked, server.delay, server.status = [], 0.0, 200
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    close_session()
    yield server
    server.shutdown()
    server.server_close()
    close_session()


def test_doctor_asks_the_hub_and_waits_no_longer_than_it_says(
    hub_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    from hizoo_lite.checkpoints import hub

    assert hub.reach() == f"on ({constants.ENDPOINT} answers)"
    hub_server.status = 503
    assert hub.reach().endswith(" answers with status 503)")
    monkeypatch.setattr(hub, "REACH_SECONDS", 0.2)
    hub_server.delay = 1.0
    assert hub.reach().startswith(f"no answer of {constants.ENDPOINT}")
    released = threading.Event()
    with monkeypatch.context() as patched:  # a name that takes a minute to be found: it is not waited for
        patched.setattr(hub, "_ask", lambda: f"on, {released.wait(60)}")
        assert hub.reach() == f"no answer of {constants.ENDPOINT} within 0.2 s"
    released.set()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    report = doctor.examine()
    assert report["hub"].startswith("no answer of http://127.0.0.1:1")
    assert any("the hub is not reached" in note for note in report["notes"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.reach() == "off (HF_HUB_OFFLINE)"


def test_doctor_asks_the_hub_by_the_system_s_proxy(hub_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from hizoo_lite.checkpoints import hub

    monkeypatch.setenv("HTTP_PROXY", constants.ENDPOINT)
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    assert hub.reach() == "on (http://hub.invalid answers)"
    assert hub_server.asked == ["http://hub.invalid/"]


def test_plan_explains_its_flags_as_train_does() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    texts = {
        name: {parameter.name: getattr(parameter, "help", None) for parameter in commands[name].params}
        for name in ("train", "plan")
    }
    assert all(texts["plan"].values())
    assert set(plan.SHARED) < set(texts["plan"])
    same = [name for name in plan.SHARED if texts["plan"][name] == texts["train"][name]]
    assert set(plan.SHARED) - set(same) == {
        *("model", "task", "data", "batch_size", "profile", "device_budget")
    }


@pytest.mark.parametrize("kind", [Bars, Lines])
def test_both_watchers_show_loss_and_speed(
    kind: type[Bars] | type[Lines], capsys: pytest.CaptureFixture[str]
) -> None:
    watch = kind()
    watch.message("begin [not markup]")
    watch.phase("train", 2)
    for step in range(2):
        watch.stepped(StepRecord(step, (1.0, 2.0, 3.0), (0.1,), (0.2,), 0.3, 3, step == 1))
    watch.finish()
    assert (watch.done, watch.loss) == (2, 2.0)
    errors = click.unstyle(capsys.readouterr().err)
    assert "begin [not markup]" in errors
    assert "mean loss 2.0000" in watch.state()
    assert "forwards/s" in errors


def test_the_demo_shows_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shorter(profile: str, given: dict[str, Any]) -> TrainConfig:
        return plain(profile, {**given, "steps": 2, "test_examples": 12})

    plain = config_file.resolve
    monkeypatch.setattr(config_file, "resolve", shorter)
    done = call("demo", "--out", str(tmp_path / "demo"))
    assert done.exit_code == 0, done.stderr
    summary = json.loads((tmp_path / "demo/summary.json").read_text())
    assert (summary["steps"], summary["bits"], summary["test_examples"]) == (2, "nf4", 12)
    assert "some test sentences" in done.stdout


@pytest.mark.slow
@pytest.mark.grid
def test_the_demo_learns_its_task(tmp_path: Path) -> None:
    done = call("demo", "--out", str(tmp_path / "demo"))
    assert done.exit_code == 0, done.stderr
    summary = json.loads((tmp_path / "demo/summary.json").read_text())
    assert summary["metric_before"] <= 0.70
    assert summary["metric_after"] >= 0.85
    assert "some test sentences" in done.stdout
    assert summary["bits"] == "nf4"
