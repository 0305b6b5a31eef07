"""Chat templates through jinja2, rendered as transformers does: in its sandbox, with the same additions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from hizoo_lite.errors import UserError


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
    where: str,
    tools: Sequence[Any] | None = None,
) -> str:
    """The text of a conversation. `where` names the template in messages.

    Raises UserError if jinja2 is not installed or too old to be trusted with a template of others (before
    3.1.6 its sandbox leaked), and if the template refuses the conversation.
    """
    try:
        import jinja2
    except ImportError as error:
        raise UserError(f"{where}: its chat template needs jinja2; run: pip install jinja2") from error
    if tuple(int(part) for part in jinja2.__version__.split(".")[:3]) < (3, 1, 6):
        raise UserError(f"{where}: its chat template needs jinja2 3.1.6 or newer, got {jinja2.__version__}")
    try:
        return (
            _environment()
            .from_string(template)
            .render(
                messages=[dict(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
        )
    except jinja2.TemplateError as error:
        raise UserError(f"{where}: its chat template refuses the conversation: {error}") from error


def _environment() -> Any:
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text for training; here it only lets it through."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # without jinja's HTML escapes

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
