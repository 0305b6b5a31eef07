"""Chat templates by name, for models whose tokenizer has none: how a conversation is written down as text.

If the end of a turn is no end-of-sequence token of the model, the assistant's turns end with that as well:
a model that has learnt to write it stops there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hizoo_lite.errors import UserError
from hizoo_lite.tasks.task import Task

#: What `--chat-template` names, in the order in which they are listed.
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>"
        "{% if message.role == 'assistant' and eos_token and eos_token != '<|im_end|>' %}{{ eos_token }}"
        "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{{ eos_token }}\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "alpaca": (
        "{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}\n\n"
        "{% elif message.role == 'user' %}### Instruction:\n{{ message.content }}\n\n"
        "{% else %}### Response:\n{{ message.content }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
}
#: What a tokenizer's folder calls its template.
FILE = "chat_template.jinja"


def read(name_or_file: str) -> str:
    """The text of a template: of a shipped one, or of a file. UserError if there is none."""
    if name_or_file in TEMPLATES:
        return TEMPLATES[name_or_file]
    path = Path(name_or_file)
    if path.suffix == ".jinja" and path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--chat-template: {path}: cannot be read: {error}") from error
    raise UserError(
        f"--chat-template: got {name_or_file!r}, allowed: {', '.join(TEMPLATES)}, or a .jinja file"
    )


def lacking(tokenizer: Any | None, task: Task) -> str:
    """What is to be told of conversations for a model whose tokenizer has no template; "" for any other."""
    if tokenizer is None or tokenizer.chat_template or not any(part.chat for part in task.parts):
        return ""
    return (
        "the model has no chat template: turns are lines that begin with User: and Assistant:; "
        "--chat-template chatml gives it one, which goes with adapter and exports"
    )


def give(tokenizer: Any | None, name_or_file: str | None) -> None:
    """Have the tokenizer use a template in place of its own; nothing for None."""
    if tokenizer is not None and name_or_file is not None:
        tokenizer.chat_template = read(name_or_file)
