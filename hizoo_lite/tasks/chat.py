"""Conversations as tokens: which tokens are the assistant's.

With the tokenizer's chat template the text is the template's own, tokenized without further special tokens.
Without one, a plain form is used:

    System: content
    User: content
    Assistant: content</s>

one line a turn, the end-of-sequence token (if there is one) after each of the assistant's. In both, an
assistant's turn reaches from the end of the generation prompt ("Assistant:") to the end of the turn as the
template renders it there, end marker included. Templates may rewrite a turn once it is history (Qwen3 drops
its reasoning): such a turn is not scored, because its text is not what the model writes; the last turn
always is.

A template that knows no tool calls would leave them out, and what tools say: there they are text, in Hermes'
form (`<tool_call>` with JSON in it, `<tool_response>` in a user's turn; tools in the system's).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hizoo_lite.errors import UserError
from hizoo_lite.tasks.conversations import ROLES, UNSCORED, Message
from hizoo_lite.tasks.tokens import Tokenizer, common_prefix, open_ids

Tools = Sequence[Any]


def chat_text(
    tokenizer: Tokenizer, messages: Sequence[Message], prompt: bool, name: str, tools: Tools = ()
) -> str:
    """The conversation as text; with `prompt` it ends where the assistant's next turn begins.

    `tools` are those that may be called, as JSON has them; `name` is the example's, for messages. Raises
    UserError if the tokenizer's template refuses it: some take no system turns, or only turns that alternate.
    """
    template = str(tokenizer.chat_template or "")
    if tools and not re.search(r"\btools\b", template):
        messages, tools = _with_tools(messages, tools), ()
    if "tool_calls" not in template:
        messages = [_as_text(message) for message in messages]
    if template:
        turns = [_turn(message) for message in messages]
        more: dict[str, Any] = {"tools": list(tools)} if tools else {}
        try:
            return str(
                tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt, **more)
            )
        except Exception as error:  # a template is a program of others, which raises what it likes
            roles = ", ".join(message.role for message in messages) or "none"
            raise UserError(
                f"{name}: the tokenizer's chat template refuses the conversation (turns: {roles}): {error}"
            ) from error
    end = tokenizer.eos_token or ""
    lines = [
        f"{role.capitalize()}: {content}{end if role == 'assistant' else ''}\n"
        for role, content, _ in messages
    ]
    return "".join(lines) + ("Assistant:" if prompt else "")


def _turn(message: Message) -> dict[str, Any]:
    """A message as templates take it."""
    more = {key: value for key, value in message.more.items() if key != UNSCORED}
    calls = {"tool_calls": list(more["tool_calls"])} if "tool_calls" in more else {}
    return {"role": message.role, "content": message.content, **more, **calls}


def _with_tools(messages: Sequence[Message], tools: Tools) -> list[Message]:
    """The tools, as text, at the end of the system's turn."""
    listed = "Tools:\n" + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    if messages and messages[0].role == "system":
        return [messages[0]._replace(content=f"{messages[0].content}\n\n{listed}"), *messages[1:]]
    return [Message("system", listed), *messages]


def _as_text(message: Message) -> Message:
    """Without tool calls or a tool's role: they are in the content."""
    if message.role == "tool":
        return Message("user", f"<tool_response>\n{message.content}\n</tool_response>")
    if "tool_calls" not in message.more:
        return message
    more: Mapping[str, Any] = {key: value for key, value in message.more.items() if key != "tool_calls"}
    calls = (json.dumps(call["function"], ensure_ascii=False) for call in message.more["tool_calls"])
    texts = [message.content, *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)]
    return message._replace(content="\n".join(filter(None, texts)), more=more)


def chat_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of `chat_text`: a chat template writes its special tokens itself."""
    return open_ids(tokenizer, text, special=not tokenizer.chat_template)


def assistant_tokens(
    tokenizer: Tokenizer, messages: Sequence[Message], name: str, tools: Tools = ()
) -> tuple[list[int], list[int]]:
    """(token ids of the conversation, positions of the assistant's tokens).

    `name` is the example's, for messages. Raises UserError if the template renders the last turn in a way
    that does not begin with its own generation prompt, so that the assistant's tokens cannot be told apart.
    """
    whole = chat_text(tokenizer, messages, False, name, tools)
    ids = chat_ids(tokenizer, whole)
    scored: list[int] = []
    for number, message in enumerate(messages):
        if message.role != "assistant" or UNSCORED in message.more or number == 0:  # answers nothing
            continue
        last = number == len(messages) - 1
        before = chat_text(tokenizer, messages[:number], True, name, tools)
        after = whole if last else chat_text(tokenizer, messages[: number + 1], False, name, tools)
        if not (whole.startswith(after) and after.startswith(before)):
            if last:
                raise UserError(
                    f"{name}: the chat template's generation prompt is no beginning of the answer"
                )
            continue
        first = common_prefix(chat_ids(tokenizer, before), ids)
        end = len(ids) if last else common_prefix(chat_ids(tokenizer, after), ids)
        scored += range(max(first, 1), end)
    return ids, scored


def shortened(messages: Sequence[Message]) -> tuple[Message, ...] | None:
    """The conversation without its oldest exchange (a leading system message stays); None at the last one."""
    head = 1 if messages[0].role == "system" else 0
    starts = [number for number in range(head, len(messages)) if messages[number].role == "user"]
    if len(starts) < 2:
        return None
    return (*messages[:head], *messages[starts[1] :])


#: What a model is to continue: a text, or the turns of a conversation, with `role` and `content` each.
Prompt = str | Sequence[Mapping[str, str]]


def prompt_text(tokenizer: Tokenizer, prompt: Prompt) -> tuple[str, bool]:
    """The text that is continued, and whether the tokenizer adds its special tokens to it.

    Raises UserError for turns that are none, and if the tokenizer's template refuses them.
    """
    if isinstance(prompt, str):
        return prompt, True
    turns = []
    for turn in prompt:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            allowed = ", ".join(dict.fromkeys(ROLES.values()))
            raise UserError(f"prompt: got the turn {turn!r:.80}; allowed: a content, and a role of {allowed}")
        turns.append(Message(ROLES[role], content))
    if not turns:
        raise UserError("prompt: got no turns; allowed: one or more")
    return chat_text(tokenizer, turns, True, "prompt"), not tokenizer.chat_template


class Shown:
    """Tells of a text while it is written, token by token: of the first row that `ended` is asked about.

    ids: of the prompt. Half of a character waits for the other half.
    """

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int], tell: Callable[[str], None]) -> None:
        self._tokenizer, self._ids, self._tell = tokenizer, list(ids), tell
        self._start = len(tokenizer.decode(self._ids, skip_special_tokens=True))
        self._told = 0

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[bool]:
        """As `ended` of a model that writes; nothing ends here."""
        text = self._text(rows[0])
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._tell(text[self._told :])
            self._told = len(text)
        return [False] * len(rows)

    def finish(self, text: str) -> None:
        """With the whole text: what was not told yet."""
        self._tell(text[self._told :])

    def _text(self, row: Sequence[int]) -> str:
        return self._tokenizer.decode([*self._ids, *row], skip_special_tokens=True)[self._start :]
