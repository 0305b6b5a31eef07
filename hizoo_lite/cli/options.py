"""The flags of `train`, made from the fields of `TrainConfig`: name, help, choices and default are theirs.

A flag is passed on as text and parsed with the configuration, so that all problems of a command line and
its TOML file are reported together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field
from typing import Annotated, Any, Optional

import typer

from hizoo_lite.config import choices, help_of, kinds, members, refuse, settings
from hizoo_lite.plan import hardware
from hizoo_lite.train.config_file import flag

#: What the commands that only run a model say about where its blocks live.
Residency = Annotated[str | None, typer.Option(metavar="auto|resident|host|disk", help="of blocks")]
DeviceBudget = Annotated[str | None, typer.Option(metavar="SIZE", help="memory of the device, e.g. 24GiB")]
Profile = Annotated[
    str | None,
    typer.Option(metavar="NAME|FILE", help="machine, see `hizoo-lite profiles`: its budgets and residency"),
]

ChatTemplate = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE", help="for a model that has none, or in place of its own: chatml, zephyr, alpaca"
    ),
]


def of_profile(profile: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a profile says about device and memory, but for what is `given`. UserError for no such profile."""
    if profile is None:
        return {}
    found = hardware.find(profile).settings(given)
    return {name: value for name, value in found.items() if name != "batch_size"}


#: What the commands that only run a model say to run an exported one; --adapter is then a name of its own.
Onnx = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="run an exported folder in onnxruntime; --adapter may be a name in it"),
]


def refuse_with_onnx(given: Mapping[str, object]) -> None:
    """UserError for settings of a model in torch beside --onnx."""
    odd = (
        *("model", "bits", "kind", "compute_dtype", "device", "residency", "device_budget", "profile"),
        "chat_template",
    )
    refuse([f"{flag(name)}: got {given[name]!r}, not allowed with --onnx" for name in odd if name in given])


def with_settings(
    function: Callable[..., None], names: Sequence[str] | None = None, help: Mapping[str, str] | None = None
) -> Callable[..., None]:
    """`function(settings, ...)` as a command with one flag a field; `settings` gets those that were given.

    names: of the fields; None: all. help: of those that mean something else to this command.
    """
    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "settings"]
    shown = settings() if names is None else {name: settings()[name] for name in names}

    def command(**given: Any) -> None:
        flags = {name: given.pop(name) for name in shown}
        function({name: value for name, value in flags.items() if value not in (None, [])}, **given)

    texts = {name: _help(field) for name, field in shown.items()} | dict(help or {})
    parameters = [*own, *(_parameter(name, field, texts[name]) for name, field in shown.items())]
    command.__doc__ = function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _parameter(name: str, field: Field[Any], help: str) -> inspect.Parameter:
    is_switch = bool in members(kinds()[name])
    spelled = f"{flag(name)}/--no-{flag(name)[2:]}" if is_switch else flag(name)
    option = typer.Option(
        None,
        spelled,
        help=help,
        metavar=None if is_switch else _metavar(name),
        rich_help_panel=field.metadata["group"],
        show_default=False,
    )
    # typer reads Optional, not every spelling of a union
    kind: Any = Optional[bool] if is_switch else Optional[str]  # noqa: UP045
    if "several" in field.metadata:
        kind = Optional[list[str]]  # noqa: UP045
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)


def _help(field: Field[Any]) -> str:
    text = help_of(field.name)
    if field.default in (None, ""):
        return text
    shown = {True: "on", False: "off"}[field.default] if isinstance(field.default, bool) else field.default
    return f"{text} (default: {shown})"


def _metavar(name: str) -> str:
    annotation, called = kinds()[name], settings()[name].metadata.get("called", "TEXT")
    parts = list(choices(annotation))
    parts += [
        word for kind, word in ((int, "INT"), (float, "FLOAT"), (str, called)) if kind in members(annotation)
    ]
    return "|".join(parts)
