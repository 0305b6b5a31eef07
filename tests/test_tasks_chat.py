"""Chat: which tokens are the assistant's, with and without a chat template, and what is cut when long."""

from __future__ import annotations

import pytest

from hizoo_lite import tasks
from hizoo_lite.batch import Example
from hizoo_lite.errors import UserError
from hizoo_lite.tasks import Encoder, chat
from hizoo_lite.tasks.conversations import Message
from hizoo_lite.tasks.task import WHERE
from tests.tasks_fixtures import answer_text, byte_level, check_consistent, sequence

CHAT = tasks.get("chat")

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Renders an assistant's turn with a thought only while it is the last one, as reasoning models do.
FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if loop.last and m.role == 'assistant' %}(thought){% endif %}{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat_example(*contents: str) -> Example:
    roles = ("user", "assistant") * len(contents)
    messages = tuple(Message(role, text) for role, text in zip(roles, contents, strict=False))
    return Example({WHERE: "chat.jsonl:3", "messages": messages}, (contents[-1],), 0, (contents[-1],))


def test_chat_without_a_template_scores_the_assistants_turns_only():
    tokenizer = byte_level(eos=True)
    example = chat_example("Hi", "Hello", "Who?", "Ann")
    encoded = Encoder(tokenizer, "causal", CHAT, 128).encode(example, training=True)
    assert answer_text(tokenizer, encoded, 0) == " Hello</s>\n Ann</s>\n"
    text = "User: Hi\nAssistant: Hello</s>\nUser: Who?\nAssistant: Ann</s>\n"
    assert sequence(encoded, 0) == tokenizer(text)["input_ids"]
    check_consistent(encoded)


def test_chat_uses_the_tokenizers_template_without_further_special_tokens():
    tokenizer = byte_level(bos=True, eos=True)
    tokenizer.chat_template = CHATML
    encoder = Encoder(tokenizer, "causal", CHAT, 128)
    example = chat_example("Hi", "Hello", "Who?", "Ann")
    encoded = encoder.encode(example, training=True)
    assert answer_text(tokenizer, encoded, 0) == "Hello</s>\nAnn</s>\n"
    assert encoded.rows[0][0] != 0
    prompt = tokenizer.decode(encoder.prompt_ids(example))
    assert prompt == "<|user|>Hi</s>\n<|assistant|>Hello</s>\n<|user|>Who?</s>\n<|assistant|>"


def test_chat_turn_that_the_template_rewrites_later_is_not_scored():
    tokenizer = byte_level(eos=True)
    tokenizer.chat_template = FORGETFUL
    example = chat_example("Hi", "Hello", "Who?", "Ann")
    encoded = Encoder(tokenizer, "causal", CHAT, 128).encode(example, training=True)
    assert answer_text(tokenizer, encoded, 0) == "(thought)Ann</s>\n"


def test_chat_template_without_a_usable_generation_prompt_is_an_error():
    tokenizer = byte_level(eos=True)
    tokenizer.chat_template = CHATML.replace("<|assistant|>{% endif %}", "<|bot|>{% endif %}")
    with pytest.raises(UserError, match=r"chat\.jsonl:3: the chat template's generation prompt"):
        Encoder(tokenizer, "causal", CHAT, 128).encode(chat_example("Hi", "Hello"), training=True)


def test_long_chat_loses_its_oldest_exchanges_and_keeps_the_system_message():
    tokenizer = byte_level(eos=True)
    system = Message("system", "Be kind")
    old = chat_example(*["Hi there", "Hello there"] * 10, "Who?", "Ann")
    fields = {WHERE: "chat.jsonl:3", "messages": (system, *old.fields["messages"])}
    encoder = Encoder(tokenizer, "causal", CHAT, 120)
    encoded = encoder.encode(old._replace(fields=fields), training=True)
    text = tokenizer.decode(sequence(encoded, 0))
    assert len(sequence(encoded, 0)) <= 120
    assert text.startswith("System: Be kind\nUser: Hi there\n")
    assert text.endswith("Assistant: Ann</s>\n")
    prompt = encoder.prompt_ids(old._replace(fields=fields))
    assert len(prompt) + encoder.max_new_tokens <= 120
    assert tokenizer.decode(prompt).endswith("User: Who?\nAssistant:")


def test_chat_whose_last_exchange_does_not_fit_is_an_error():
    with pytest.raises(UserError, match=r"max_length: chat\.jsonl:3 needs \d+ tokens for its last exchange"):
        Encoder(byte_level(), "causal", CHAT, 10).encode(chat_example("Hi " * 20, "Hello"), training=True)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ messages[7].content.text }}", "has no element 7"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_template_that_refuses_a_conversation_is_an_error_that_names_the_example(template, reason):
    tokenizer = byte_level(eos=True)
    tokenizer.chat_template = template
    encoder = Encoder(tokenizer, "causal", CHAT, 128)
    message = rf"chat\.jsonl:3: the tokenizer's chat template refuses .*\(turns: user.*\): .*{reason}"
    for attempt in (lambda e: encoder.encode(e, training=True), encoder.prompt_ids):
        with pytest.raises(UserError, match=message):
            attempt(chat_example("Hi", "Hello"))


def test_a_first_turn_of_the_assistant_is_not_scored() -> None:
    class Strict:
        chat_template = "strict"
        eos_token = "</s>"
        eos_token_id = 1

        def apply_chat_template(self, turns, tokenize, add_generation_prompt):
            if not turns:
                raise ValueError("Cannot apply chat template to an empty conversation")
            return "".join(f"{turn['role']}: {turn['content']}\n" for turn in turns) + (
                "assistant: " * add_generation_prompt
            )

        def __call__(self, text, **options):
            return {"input_ids": [ord(letter) for letter in text]}

    turns = [Message("assistant", "Hi"), Message("user", "U"), Message("assistant", "A")]
    ids, scored = chat.assistant_tokens(Strict(), turns, "here")
    assert "".join(chr(ids[place]) for place in scored) == "A\n"
