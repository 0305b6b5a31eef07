"""A chat template by name for a model without one: in training, generation, exports and merged folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import hizoo_lite as hz
from hizoo_lite.config import DEMO
from hizoo_lite.edge.tokenizer import EdgeTokenizer
from hizoo_lite.errors import UserError
from hizoo_lite.export import merged, peft
from hizoo_lite.tasks import chat_templates
from hizoo_lite.train.saved import load_to_write

TURNS = [{"role": role, "content": role[0].upper()} for role in ("system", "user", "assistant")]
#: What the demo's tokenizer ends a text with.
END = "</s>"
WANTED = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA"
    f"<|im_end|>{END}\n",
    "zephyr": f"<|system|>\nS{END}\n<|user|>\nU{END}\n<|assistant|>\nA{END}\n",
    "alpaca": f"S\n\n### Instruction:\nU\n\n### Response:\nA{END}\n\n",
}


def tokenizer(eos: str = END) -> AutoTokenizer:
    found = AutoTokenizer.from_pretrained(DEMO)
    found.eos_token = eos
    return found


@pytest.mark.parametrize("name", chat_templates.TEMPLATES)
def test_a_template_writes_turns_down(name: str) -> None:
    known = tokenizer()
    chat_templates.give(known, name)
    assert known.apply_chat_template(TURNS, tokenize=False) == WANTED[name]
    asked = known.apply_chat_template(TURNS[:2], tokenize=False, add_generation_prompt=True)
    assert WANTED[name].startswith(asked)  # an answer begins where the prompt ends


def test_an_end_of_turn_that_is_the_end_is_written_once() -> None:
    known = tokenizer("<|im_end|>")
    chat_templates.give(known, "chatml")
    assert known.apply_chat_template(TURNS, tokenize=False).endswith("A<|im_end|>\n")


def test_a_template_of_a_file_and_what_is_none(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}")
    assert chat_templates.read(str(tmp_path / "mine.jinja")) == "{{ messages[0].content }}"
    for wrong in ("nope", "nope.jinja", str(tmp_path)):
        with pytest.raises(UserError, match=r"--chat-template: got .*allowed: chatml, zephyr, alpaca"):
            chat_templates.read(wrong)


@pytest.mark.parametrize("template", [None, "chatml"])
def test_a_run_says_what_a_model_without_a_template_is_given(template: str | None, tmp_path: Path) -> None:
    told: list[str] = []

    class Told:
        def on_message(self, args: Any, state: Any, control: Any, *, text: str, **more: Any) -> None:
            told.append(text)

    rows = [{"prompt": f"Say {word}", "completion": word} for word in ("soup", "film", "cake", "bread")]
    hz.fit(
        "embedded", task="chat", data=rows, chat_template=template, steps=1, batch_size=2, dev_examples=0,
        device="cpu", out=tmp_path / "run", callbacks=[Told()],
    )  # fmt: skip
    said = [line for line in told if line.startswith("the model has no chat template: ")]
    assert len(said) == (template is None)


def test_it_goes_with_the_run_and_its_exports(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {word}", "completion": word} for word in ("soup", "film", "cake", "bread")]
    run = hz.fit(
        "embedded", task="chat", data=rows, chat_template="zephyr", steps=1, batch_size=2, dev_examples=0,
        device="cpu", out=tmp_path / "run",
    )  # fmt: skip
    wanted = chat_templates.TEMPLATES["zephyr"]
    assert run.setup.model.tokenizer.chat_template == wanted
    assert load_to_write(None, str(run.folder), {}, 100).tokenizer.chat_template == wanted
    peft.export(run.folder, tmp_path / "peft")
    merged.prepare(run.folder, tmp_path / "merged").run()
    for folder in ("peft", "merged"):
        assert AutoTokenizer.from_pretrained(tmp_path / folder).chat_template == wanted
        assert EdgeTokenizer(tmp_path / folder).chat_template == wanted
    loaded = hz.load("embedded", device="cpu", chat_template="zephyr")
    again = hz.fit(
        loaded, task="chat", data=rows, steps=1, batch_size=2, dev_examples=0, out=tmp_path / "again"
    )
    assert again.setup.config.chat_template == "zephyr"
    assert again.summary["loss_before"] == run.summary["loss_before"]
