"""Language modelling on plain text (`lm`) and chat-style tuning (`chat`). Causal models only.

`lm`: the loss is on every token up to the encoder's max_length; what is beyond it is not used. A `.txt` file
is cut at line ends into pieces of at most 2 000 characters (a longer line is a piece of its own), each one
example; in tables and JSON Lines the field `text` is one.

`chat`: the loss is on the assistant's turns only. JSON Lines with `messages` (a list of
`{"role": "system" | "user" | "assistant", "content": ...}`), or with `prompt` and `completion` for one
exchange. The last message is the assistant's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from hizoo_lite.batch import Example
from hizoo_lite.errors import UserError
from hizoo_lite.tasks import files
from hizoo_lite.tasks.files import Row
from hizoo_lite.tasks.task import Task

PIECE_CHARACTERS = 2000

Role = Literal["system", "user", "assistant"]


class Message(NamedTuple):
    """One turn of a conversation."""

    role: Role
    content: str


def pieces(path: Path) -> Iterator[Row]:
    """The pieces of a text file, each with the line it starts at."""
    held: list[str] = []
    size, first = 0, 1
    for number, line in files.lines(path):
        if held and size + len(line) + 1 > PIECE_CHARACTERS:
            yield Row(f"{path}:{first}", {"text": "\n".join(held)})
            held, size = [], 0
        if not held:
            if not line.strip():
                continue
            first = number
        held.append(line)
        size += len(line) + 1
    if held:
        yield Row(f"{path}:{first}", {"text": "\n".join(held)})


def _lm(row: Row) -> Iterator[Example]:
    text = row.text("text")
    if text:
        yield Example({"text": text}, (text,), 0)


def chat(row: Row) -> Iterator[Example]:
    """The conversation of a row, checked."""
    if "messages" in row.values:
        messages = tuple(_message(item) for item in row.records("messages"))
    else:
        prompt, completion = row.text("prompt"), row.text("completion", "response")
        messages = (Message("user", prompt), Message("assistant", completion))
    if not messages or messages[-1].role != "assistant" or not messages[-1].content:
        raise UserError(f"{row.where}: field 'messages': the last message must be a non-empty assistant's")
    answer = messages[-1].content
    yield Example({"messages": messages}, (answer,), 0, (answer,))


def _message(item: Row) -> Message:
    role = item.text("role")
    if role not in get_args(Role):
        raise UserError(f"{item.where}: field 'role': got {role!r}; allowed: {', '.join(get_args(Role))}")
    return Message(role, item.text("content"))  # type: ignore[arg-type]  # checked on the line above


LM = Task(
    name="lm",
    kind="lm",
    build=_lm,
    causal="{text}",
    cut="text",
    text_reader=pieces,
    max_new_tokens=128,
    dev_from="dev",
    test_from="test",
)

CHAT = Task(
    name="chat",
    kind="lm",
    build=chat,
    chat=True,
    max_new_tokens=256,
    dev_from="dev",
    test_from="test",
)

TASKS = (LM, CHAT)
