"""`hizoo-lite generate`: text from a causal model, with or without an adapter; a conversation with --chat."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from hizoo_lite.cli.options import (
    ChatTemplate,
    DeviceBudget,
    Onnx,
    Profile,
    Residency,
    of_profile,
    refuse_with_onnx,
)
from hizoo_lite.config import refuse
from hizoo_lite.errors import UserError

if TYPE_CHECKING:
    from hizoo_lite.tasks.chat import Prompt
    from hizoo_lite.tasks.tokens import Tokenizer

#: Room of a streamed model for a conversation, whose length nobody knows beforehand, in tokens.
CONVERSATION = 4096

#: What a model writes after a prompt, with `on_text` in pieces as it is written.
Write = Callable[..., str]


class _Writer(NamedTuple):
    """A model that is ready to write.

    answer: to a text, as the task of the run asks about one; None if it asks about something else.
    """

    source: str
    tokenizer: Tokenizer | None
    write: Write
    answer: Callable[[str], str | None]


def command(
    prompt: Annotated[
        str | None,
        typer.Option(help="a question, or a text to continue (--raw); without it standard input"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="folder or hub id; without it the one the adapter was made for")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="RUN", help="run folder, or a PEFT adapter's")
    ] = None,
    onnx: Onnx = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="a conversation, turn by turn; an empty line or Ctrl-D ends it")
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="a system turn in front, for a prompt in a chat template")
    ] = None,
    raw: Annotated[
        bool | None,
        typer.Option(
            "--raw/--template",
            help="the prompt as it is, or in the chat template (default: with an adapter as its run's task "
            "asks; else in the template if there is one)",
            show_default=False,
        ),
    ] = None,
    chat_template: ChatTemplate = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="sample from this share of the mass")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="of the sampling")] = 0,
    bits: Annotated[str | None, typer.Option(metavar="nf4|fp4|int8|none", help="stored form")] = None,
    compute_dtype: Annotated[str | None, typer.Option(metavar="auto|bf16|fp16|float32")] = None,
    device: Annotated[str | None, typer.Option(metavar="auto|cpu|cuda|cuda:N")] = None,
    residency: Residency = None,
    device_budget: DeviceBudget = None,
    profile: Profile = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON, nothing else")] = False,
) -> None:
    """Answer a prompt, or continue it.

    Examples:

    hizoo-lite generate --model embedded --prompt "The soup was"

    hizoo-lite generate --model models/smollm2-instruct --prompt "Why is the sky blue?"

    hizoo-lite generate --adapter runs/chat --chat --system "Answer in one sentence." --max-new-tokens 200

    hizoo-lite generate --model models/smollm2 --chat-template chatml --prompt "Why is the sky blue?"

    hizoo-lite generate --adapter runs/sst2 --raw --prompt "The film was" --temperature 0.8 --top-p 0.9

    hizoo-lite generate --onnx exports/sst2 --adapter sst2 --prompt "The film was"

    hizoo-lite generate --model models/smollm2-instruct < question.txt
    """
    flags = {"bits": bits, "compute_dtype": compute_dtype, "device": device}
    flags |= {"residency": residency, "device_budget": device_budget, "chat_template": chat_template}
    given = {name: value for name, value in flags.items() if value is not None}
    _check(chat, raw, {"--system": system, "--chat-template": chat_template}, json, prompt)
    text = "" if chat else _text(prompt)
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    sampling |= {"top_p": top_p, "seed": seed}
    if onnx is not None:
        writer = _export(onnx, adapter, {**given, "model": model, "profile": profile}, sampling)
    else:
        room = CONVERSATION if chat else len(text) + len(system or "") + max_new_tokens
        writer = _model(model, adapter, of_profile(profile, given) | given, room, sampling)
    first = [] if system is None else [{"role": "system", "content": system}]
    if chat:
        converse(writer.write, first)
        return
    # How to ask is open, and the run's task may say it.
    is_open = raw is None and system is None and chat_template is None
    answer = writer.answer(text) if is_open else None
    is_raw = answer is None and (_is_raw(writer.tokenizer, adapter) if is_open else bool(raw))
    asked: Prompt = text if is_raw else [*first, {"role": "user", "content": text}]
    if json:
        from hizoo_lite.cli import output

        written = writer.write(asked) if answer is None else answer
        found = {"prompt": text, "text": written, "model": writer.source, "adapter": adapter, "raw": is_raw}
        output.print_json(found if system is None else {**found, "system": system})
    elif answer is not None:
        typer.echo(answer)
    else:
        typer.echo(text if is_raw else "", nl=False)
        writer.write(asked, on_text=_tell)
        typer.echo()


def _export(folder: str, adapter: str | None, given: dict[str, Any], sampling: dict[str, Any]) -> _Writer:
    """An exported model. UserError for settings of one in torch."""
    from hizoo_lite.edge import answer
    from hizoo_lite.edge.model import OnnxModel

    refuse_with_onnx({name: value for name, value in given.items() if value is not None})
    typer.echo(f"loading {folder}", err=True)
    exported = OnnxModel(Path(folder), adapter)
    write = partial(answer.continue_text, exported, **sampling)
    return _Writer(folder, exported.tokenizer, write, partial(answer.answered, exported, adapter))


def _model(
    source: str | None, adapter: str | None, given: dict[str, Any], room: int, sampling: dict[str, Any]
) -> _Writer:
    """A model in torch. room: tokens of the text with what is written, at most."""
    from hizoo_lite.train import preflight

    preflight.check_adapter(adapter)
    preflight.check_model(source)
    preflight.check_template(given.get("chat_template"))
    from hizoo_lite.cli import output

    output.say_loading()
    from hizoo_lite.engine.generate import generate
    from hizoo_lite.train.saved import answered, load_to_write

    loaded = load_to_write(source, adapter, given, room)
    write = partial(generate, loaded, **sampling)
    return _Writer(loaded.source, loaded.tokenizer, write, partial(answered, loaded, adapter))


def converse(write: Write, turns: list[dict[str, str]]) -> None:
    """Read a turn, write one, until nothing more is read; the oldest turns go if there is no room."""
    head = len(turns)
    while text := _read_turn():
        turns.append({"role": "user", "content": text})
        while True:
            try:
                found = write(turns, on_text=_tell)
                break
            except UserError as error:
                if "positions" not in str(error) or len(turns) <= head + 2:
                    raise
                del turns[head : head + 2]
        typer.echo()
        turns.append({"role": "assistant", "content": found.strip()})


def _read_turn() -> str:
    """A line from standard input, "" at its end; a terminal shows a sign to begin behind."""
    if sys.stdin.isatty():
        typer.echo("> ", nl=False, err=True)
    return _read(sys.stdin.readline).strip()


def _tell(text: str) -> None:
    typer.echo(text, nl=False)
    sys.stdout.flush()


def _text(prompt: str | None) -> str:
    """The prompt, or standard input without the line end behind it."""
    if prompt is None and sys.stdin.isatty():
        refuse(["--prompt: missing; allowed: a text, standard input (generate < FILE), or --chat"])
    return _read(sys.stdin.read).removesuffix("\n") if prompt is None else prompt


def _read(source: Callable[[], str]) -> str:
    """What standard input has. UserError if that is no text."""
    try:
        return source()
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt: standard input is not {error.encoding} text ({error.reason})") from error


def _check(
    chat: bool, raw: bool | None, of_turns: dict[str, str | None], json: bool, prompt: str | None
) -> None:
    """UserError for flags that exclude each other."""
    problems = []
    for flag, given in of_turns.items():
        if raw and given is not None:
            problems.append(f"{flag}: got a text, but --raw has no turns; allowed: without --raw")
    for flag, is_given in (("--raw", bool(raw)), ("--json", json), ("--prompt", prompt is not None)):
        if chat and is_given:
            problems.append(f"{flag}: not allowed with --chat")
    refuse(problems)


def _is_raw(tokenizer: Tokenizer | None, adapter: str | None) -> bool:
    """Whether the prompt is continued as it is: with an adapter of a run as its task was put to the model."""
    from hizoo_lite.train.provenance import saved_task

    saved, has_template = saved_task(adapter), tokenizer is not None and bool(tokenizer.chat_template)
    if saved is None:
        return not has_template
    run, task = saved
    is_raw = not task.chat
    if is_raw and has_template:
        typer.echo(
            f"the prompt is continued as it is, as the prompts of the run's task ({run.task}) were; "
            "--template puts it into the chat template",
            err=True,
        )
    return is_raw
