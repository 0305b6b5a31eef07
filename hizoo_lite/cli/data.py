"""`hizoo-lite data inspect`: what a run would make of a user's data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hizoo_lite.cli.options import ChatTemplate

if TYPE_CHECKING:
    from hizoo_lite.config import TrainConfig
    from hizoo_lite.tasks import Encoder, Task

_MOST_CHARACTERS = 800  # of an example that is printed
_MOST_LISTED = 10  # texts with different labels

app = typer.Typer(help="Look at data before it is trained on.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Look at data before it is trained on."""


@app.command("inspect")
def inspect(
    data: Annotated[
        list[str],
        typer.Argument(help="files, folders, or data sets of the hub (org/name[:split]), each by itself"),
    ],
    model: Annotated[
        str | None, typer.Option(help="folder or hub id: its tokens are counted, its chat template shown")
    ] = None,
    task: Annotated[
        str, typer.Option(help="a built-in task, a task's .toml, or a form of data; auto: as it looks")
    ] = "auto",
    text_field: Annotated[str | None, typer.Option(help="column of the texts, or of the questions")] = None,
    label_field: Annotated[str | None, typer.Option(help="column of the labels, or of the answers")] = None,
    max_length: Annotated[
        str | None, typer.Option(metavar="INT", help="tokens a prompt and its answer may have")
    ] = None,
    chat_template: ChatTemplate = None,
    eval_every: Annotated[
        str | None, typer.Option(metavar="INT", help="as in training: dev examples are held out")
    ] = None,
    dev_examples: Annotated[
        str | None, typer.Option(metavar="INT", help="as in training: so many are held out")
    ] = None,
    test_examples: Annotated[str | None, typer.Option(metavar="INT", help="likewise")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="refuse what a run would leave out")] = False,
    write_task: Annotated[
        str | None, typer.Option(metavar="FILE.toml", help="write what was understood, as a task's file")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON, nothing else")] = False,
) -> None:
    """Show what data is understood to be: form, examples, lengths, labels, division, and what is left out.

    Between » and « is what is learnt. Exit code 2 for data that a run would refuse.

    Examples:

    hizoo-lite data inspect mine/alpaca.json

    hizoo-lite data inspect mine/reviews.csv --label-field verdict --write-task mine/reviews.toml

    hizoo-lite data inspect mine/chats.jsonl --model models/smollm2 --json

    hizoo-lite data inspect mine/chats.jsonl mine/reviews.csv --write-task mine/both.toml
    """
    from hizoo_lite.cli import output
    from hizoo_lite.train import components
    from hizoo_lite.train.config_file import resolve
    from hizoo_lite.train.inspection import inspect as looked_at

    flags: dict[str, Any] = {
        "data": data,
        "task": task,
        "model": model or "none",
        "text_field": text_field,
        "label_field": label_field,
        "max_length": max_length,
        "chat_template": chat_template,
        "eval_every": eval_every,
        "dev_examples": dev_examples,
        "test_examples": test_examples,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    config = resolve(None, {**given, "strict": strict})
    forms = components.understood(config)
    each = components.of_each(config)
    found = [looked_at(one, None if model is None else _encoder_of(one)) for one in each]
    if write_task is not None:
        components.task_of(config)  # what a run refuses is not written
        _write(Path(write_task), components.made_of(forms))
    if json:
        output.print_json(found[0] if len(found) == 1 else {"sources": found})
        return
    for one, of in zip(found, data, strict=True):
        if len(found) > 1:
            typer.echo(f"=== {of}")
        _print(one)


def _encoder_of(config: TrainConfig) -> Any:
    """What makes the encoder of a task for the model, of which the tokenizer alone is read."""

    def made(task: Task) -> Encoder:
        from hizoo_lite.cli import output

        output.say_loading()
        from hizoo_lite.checkpoints.checkpoint import Checkpoint
        from hizoo_lite.errors import UserError
        from hizoo_lite.model.kinds import find_kind, model_path
        from hizoo_lite.train.tokenizing import encoder_of

        source = model_path(config.model)
        kind = find_kind(source, config.revision, task)
        encoder = encoder_of(Checkpoint.open(source).folder, kind, task, config)
        if encoder is None:
            raise UserError(f"--model: {config.model} has no tokenizer files")
        return encoder

    return made


def _write(path: Path, keys: dict[str, Any] | None) -> None:
    import tomli_w

    from hizoo_lite.errors import UserError
    from hizoo_lite.files import storage_errors, write_text

    if keys is None:
        raise UserError("--write-task: the task that was given says what the data is; allowed: --task auto")
    if path.exists():
        raise UserError(f"--write-task: {path} is there already; allowed: a new file")
    with storage_errors(path):
        write_text(path, tomli_w.dumps({**keys, "name": path.stem} if "name" in keys else keys))
    typer.echo(f"wrote {path}", err=True)


def _print(found: dict[str, Any]) -> None:
    from hizoo_lite.units import counted

    for line in found["lines"]:
        typer.echo(line)
    if found["columns"]:
        typer.echo(f"columns: {', '.join(found['columns'])}")
    typer.echo(f"division: {found['division']}")
    for line in found["notes"]:
        typer.echo(f"  {line}")
    lengths = found["lengths"]
    words = {"min": "min", "median": "median", "p95": "95 %", "p99": "99 %", "max": "max"}
    listed = ", ".join(f"{word} {lengths[name]:,}" for name, word in words.items())
    typer.echo(f"{lengths['unit']} of {counted(lengths['examples'], 'example')}: {listed}")
    if found["labels"]:
        typer.echo("labels: " + ", ".join(f"{name} {count:,}" for name, count in found["labels"].items()))
    contradictions = found["contradictions"]
    differ = f", with different labels: {len(contradictions):,}" if contradictions else ""
    typer.echo(f"there twice or more: {found['duplicates']:,}{differ}")
    for group in contradictions[:_MOST_LISTED]:
        typer.echo("  " + ", ".join(f"{one['where']} {one['label']}" for one in group))
    if (more := len(contradictions) - _MOST_LISTED) > 0:
        typer.echo(f"  and {counted(more, 'text')} more; --json lists all")
    left_out = found["left_out"]
    typer.echo(f"left out: {left_out['count']:,}")
    for one in left_out["first"]:
        typer.echo(f"  {one['where']}: {one['why']}")
    for example in found["examples"]:
        text, more = example["text"][:_MOST_CHARACTERS], len(example["text"]) - _MOST_CHARACTERS
        typer.echo(f"\n--- {example['where']}, {example['length']} {lengths['unit']}")
        typer.echo(text + (f" ... {more:,} characters more" if more > 0 else ""))
    typer.echo("")
    for line in found["advice"]:
        typer.echo(f"advice: {line}")
