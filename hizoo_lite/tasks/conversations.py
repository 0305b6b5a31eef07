"""Conversations in the forms that people have them in: rows to messages.

    messages        [{"role": "user", "content": ...}, ...], OpenAI's: content may be a list of text parts,
                    `developer` is `system`, `tool` and tool calls are kept, `"weight": 0` is not learnt
    ShareGPT        [{"from": "human", "value": ...}, ...]
    pairs           instruction, input (optional) and output, as alpaca's; or a prompt and its completion
    parts           prompt and completion that are lists of messages each; the completion's are learnt

Which columns have them is in a task's file: see `FIELDS`. The last message is the assistant's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from hizoo_lite.batch import Example
from hizoo_lite.errors import UserError
from hizoo_lite.files import parse_json
from hizoo_lite.tasks.files import Row

Role = Literal["system", "user", "assistant", "tool"]

#: What roles are called, and what they are.
ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}
#: Keys of a task's file that name the columns of a conversation.
FIELDS = (
    *("messages_field", "prompt_field", "completion_field"),
    *("instruction_field", "input_field", "output_field", "system_field", "tools_field"),
)
#: Entries of a message that chat templates may ask for.
_KEPT = ("name", "tool_call_id", "reasoning_content", "thinking")
#: An entry of `Message.more`: its tokens are not learnt.
UNSCORED = "unscored"


class Message(NamedTuple):
    """One turn of a conversation."""

    role: Role
    content: str
    more: Mapping[str, Any] = {}

    def __repr__(self) -> str:
        """Without `more` if there is none: runs are known by it."""
        more = f", more={dict(self.more)!r}" if self.more else ""
        return f"Message(role={self.role!r}, content={self.content!r}{more})"


class Conversations:
    """Builds the example of a row. keys: of a task's file, see `FIELDS`; none: `messages`, or a pair."""

    def __init__(self, keys: Mapping[str, Any]) -> None:
        self.keys = {name: str(keys[name]) for name in FIELDS if name in keys}

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        return tuple(self.keys.values())

    def __call__(self, row: Row) -> Iterator[Example]:
        messages = (*self._system(row), *self._turns(row))
        last = messages[-1] if messages else None
        if last is None or last.role != "assistant" or not (last.content or "tool_calls" in last.more):
            field = self.keys.get("messages_field", "messages")
            raise UserError(f"{row.where}: field {field!r}: the last message must be a non-empty assistant's")
        if all(UNSCORED in message.more for message in messages if message.role == "assistant"):
            raise UserError(f"{row.where}: no assistant's message has a weight: nothing to learn")
        fields: dict[str, Any] = {"messages": messages}
        if tools := self._tools(row):
            fields["tools"] = tools
        yield Example(fields, (last.content,), 0, (last.content,))

    def _turns(self, row: Row) -> tuple[Message, ...]:
        keys = self.keys
        if "output_field" in keys:
            return _pair(row, keys)
        if "completion_field" in keys:
            return _parts(row, keys["prompt_field"], keys["completion_field"])
        name = keys.get("messages_field", "messages")
        if name in row.values or keys:
            return tuple(message(item) for item in row.records(name))
        prompt, completion = row.text("prompt"), row.text("completion", "response")
        return Message("user", prompt), Message("assistant", completion)

    def _system(self, row: Row) -> tuple[Message, ...]:
        name = self.keys.get("system_field")
        if name is None or not row.values.get(name):
            return ()
        return (Message("system", row.text(name)),)

    def _tools(self, row: Row) -> tuple[Any, ...]:
        """The tools that may be called, as a list or as the JSON of one."""
        found = row.values.get(self.keys.get("tools_field", "tools"))
        if not found or not (
            {"messages_field", "completion_field"} & set(self.keys) or "messages" in row.values
        ):
            return ()
        found = _json(row, "tools", found) if isinstance(found, str) else found
        if not isinstance(found, list):
            raise UserError(f"{row.where}: field 'tools': expected a list, got {found!r:.80}")
        return tuple(found)


def _pair(row: Row, keys: Mapping[str, str]) -> tuple[Message, ...]:
    """alpaca's: the input, if there is one, is behind the instruction."""
    asked = [row.text(keys["instruction_field"])] if row.values.get(keys["instruction_field"]) else []
    if "input_field" in keys and row.values.get(keys["input_field"]):
        asked.append(row.text(keys["input_field"]))
    if not any(asked):
        raise UserError(f"{row.where}: field {keys['instruction_field']!r}: it is empty")
    answer = row.text(keys["output_field"])
    if not answer:
        raise UserError(f"{row.where}: field {keys['output_field']!r}: it is empty")
    return Message("user", "\n\n".join(filter(None, asked))), Message("assistant", answer)


def _parts(row: Row, prompt: str, completion: str) -> tuple[Message, ...]:
    """A prompt of messages, which is not learnt, and the messages that complete it."""
    if isinstance(row.value(prompt), str):
        return Message("user", row.text(prompt)), Message("assistant", row.text(completion))
    before = (message(item) for item in row.records(prompt))
    unscored = tuple(
        m._replace(more={**m.more, UNSCORED: True}) if m.role == "assistant" else m for m in before
    )
    return (*unscored, *(message(item) for item in row.records(completion)))


def message(item: Row) -> Message:
    """A message of any of the forms. UserError for an unknown role, and for content that is no text."""
    role = item.text("role", "from")
    if role not in ROLES:
        raise UserError(f"{item.where}: field 'role': got {role!r}; allowed: {', '.join(ROLES)}")
    more: dict[str, Any] = {name: item.values[name] for name in _KEPT if item.values.get(name)}
    if calls := _calls(item, role):
        more["tool_calls"] = calls
    if item.values.get("weight") == 0:
        more[UNSCORED] = True
    says_nothing = calls and (role == "function_call" or item.values.get("content") is None)
    return Message(ROLES[role], "" if says_nothing else _content(item), more)


def _calls(item: Row, role: str) -> tuple[dict[str, Any], ...]:
    """The tool calls of a message: OpenAI's, its older function_call, or ShareGPT's, which are its value."""
    found = item.values.get("tool_calls") or item.values.get("function_call") or ()
    if role == "function_call":
        found = _json(item, "value", item.text("value"))
    return tuple(_call(item, call) for call in (found if isinstance(found, list | tuple) else [found]))


def _content(item: Row) -> str:
    """A text, or the texts of a list of parts."""
    found = item.value("content", "value")
    if not isinstance(found, list):
        return item.text("content", "value")
    texts = []
    for part in item.records("content", "value"):
        kind = part.values.get("type", "text")
        if not str(kind).endswith("text"):
            raise UserError(f"{item.where}: field 'content': a part is {kind!r}; only text can be read")
        texts.append(part.text("text"))
    return "".join(texts)


def _call(item: Row, call: Any) -> dict[str, Any]:
    """One as chat templates have it: the arguments are an object."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f"{item.where}: field 'tool_calls': expected calls with a name, got {call!r:.80}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(item, "arguments", arguments or "{}")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _json(row: Row, name: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{row.where}: field {name!r}: not valid JSON: {error}") from error
