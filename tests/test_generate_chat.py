"""Questions through a chat template: one prompt, standard input, a conversation; texts told while written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import hizoo_lite as hz
from hizoo_lite.cli import app, generate
from hizoo_lite.config import DEMO
from hizoo_lite.errors import UserError
from hizoo_lite.tasks.chat import Shown

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a chat template."""
    folder = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(DEMO, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def call(*arguments: str, given: str = "") -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["generate", "--max-new-tokens", "6", *arguments], input=given)
    return done.exit_code, done.stdout, done.stderr


def test_a_prompt_is_put_into_the_template_unless_raw(chatty: Path) -> None:
    model = hz.load(chatty, device="cpu")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The soup was"}]
    wanted = hz.generate(model, "[system] Be brief.\n[user] The soup was\n[assistant] ", 6)
    assert hz.generate(model, turns, 6) == wanted
    flags = ("--model", str(chatty), "--prompt", "The soup was")
    assert call(*flags, "--system", "Be brief.") == (0, wanted + "\n", "")
    assert call(*flags[:2], "--system", "Be brief.", given="The soup was\n")[1] == wanted + "\n"
    plain = hz.generate(model, "The soup was", 6)
    assert call(*flags, "--raw")[1] == f"The soup was{plain}\n"
    told = json.loads(call(*flags, "--json")[1])
    assert told["text"] == hz.generate(model, turns[1:], 6)
    assert told["raw"] is False
    assert call("--model", "embedded", "--prompt", "The soup was")[1].startswith("The soup was")


def test_a_base_model_gets_a_template_by_its_name() -> None:
    model = hz.load("embedded", device="cpu", chat_template="chatml")
    wanted = hz.generate(model, [{"role": "user", "content": "The soup was"}], 6)
    flags = ("--model", "embedded", "--chat-template", "chatml")
    assert call(*flags, "--prompt", "The soup was") == (0, wanted + "\n", "")
    assert call(*flags, "--chat", given="The soup was\n\n")[:2] == (0, wanted + "\n")


def test_pieces_are_told_while_they_are_written(chatty: Path) -> None:
    model, pieces = hz.load(chatty, device="cpu"), []
    whole = hz.generate(model, "The soup was", 12, on_text=pieces.append)
    assert "".join(pieces) == whole
    assert len(pieces) > 6


def test_half_of_a_character_waits_for_the_other_half() -> None:
    class Bytes:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return bytes(ids).decode(errors="replace")

    told: list[str] = []
    shown = Shown(Bytes(), b"ab", told.append)  # type: ignore[arg-type]
    for end in range(1, 5):
        assert shown([list("é!x".encode()[:end])]) == [False]
    assert told == ["é", "!", "x"]
    shown.finish("é!x.")
    assert "".join(told) == "é!x."


def test_a_conversation_keeps_its_turns_and_drops_the_oldest_for_room(
    chatty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def write(turns: list[dict[str, str]], on_text: object) -> str:
        if len(turns) > 4:
            raise UserError("the model's positions")
        seen.append([turn["content"] for turn in turns])
        return f" answer {len(seen)}"

    lines = iter(["one", "two", "three", ""])
    monkeypatch.setattr(generate, "_read_turn", lambda: next(lines))
    generate.converse(write, [{"role": "system", "content": "S"}])
    assert seen == [["S", "one"], ["S", "one", "answer 1", "two"], ["S", "two", "answer 2", "three"]]
    monkeypatch.undo()
    code, out, _ = call("--model", str(chatty), "--chat", given="The soup was\nAnd then\n\n")
    assert code == 0
    assert len(out.splitlines()) >= 2


def test_a_conversation_that_cannot_be_begun_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(turns: object, on_text: object) -> str:
        raise UserError("the model's positions")

    monkeypatch.setattr(generate, "_read_turn", lambda: "one")
    with pytest.raises(UserError):
        generate.converse(write, [])


def test_with_an_adapter_the_prompt_is_as_its_run_had_it(chatty: Path, tmp_path: Path) -> None:
    small = {"steps": 1, "batch_size": 2, "dev_examples": 0, "device": "cpu", "max_length": 64}
    hz.fit(
        hz.TrainConfig(
            model=str(chatty), task="embedded", data="embedded", train_examples=4, test_examples=2,
            out=str(tmp_path / "words"), **small,
        )
    )  # fmt: skip
    code, out, _ = call("--adapter", str(tmp_path / "words"), "--prompt", "The soup was cold.")
    assert (code, out.strip() in ("great", "terrible")) == (0, True)  # the labels of its task
    rows = [{"prompt": f"Say {word}", "completion": word} for word in ("soup", "film", "cake", "bread")]
    hz.fit(str(chatty), task="chat", data=rows, out=str(tmp_path / "chat"), **small)
    code, out, _ = call("--adapter", str(tmp_path / "chat"), "--prompt", "The soup was")
    assert (code, out.startswith("The soup was")) == (0, False)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--raw", "--system", "a", "--prompt", "b"), "--system: got a text, but --raw has no turns"),
        (
            ("--raw", "--chat-template", "chatml", "--prompt", "b"),
            "--chat-template: got a text, but --raw has",
        ),
        (("--chat-template", "nope", "--prompt", "b"), "--chat-template: got 'nope', allowed: chatml"),
        (("--chat", "--json"), "--json: not allowed with --chat"),
        (("--chat", "--prompt", "b"), "--prompt: not allowed with --chat"),
    ],
)
def test_flags_that_exclude_each_other(flags: tuple[str, ...], told: str) -> None:
    code, _, err = call("--model", "embedded", *flags)
    assert code == 2
    assert told in err


@pytest.mark.parametrize("turns", [[], [{"role": "robot", "content": "a"}], [{"role": "user"}]])
def test_turns_that_are_none(chatty: Path, turns: list[dict[str, str]]) -> None:
    with pytest.raises(UserError, match="prompt: got"):
        hz.generate(hz.load(chatty, device="cpu"), turns, 4)


def test_a_tuned_task_is_asked_and_answers_with_its_labels(tmp_path: Path) -> None:
    rows = "".join(f"the number {n} came,{'odd one' if n % 2 else 'even one'}\n" for n in range(20))
    (tmp_path / "mine.csv").write_text("text,kind\n" + rows)
    hz.fit(
        "embedded", data=str(tmp_path / "mine.csv"), label_field="kind", steps=1, batch_size=2, device="cpu",
        out=tmp_path / "run",
    )  # fmt: skip
    flags = ("--adapter", str(tmp_path / "run"), "--prompt", "the number 7 came")
    code, out, _ = call(*flags)
    assert (code, out.strip() in ("odd one", "even one")) == (0, True)
    assert json.loads(call(*flags, "--json")[1])["text"] == out.strip()
    assert call(*flags, "--raw")[1].startswith("the number 7 came")
