"""Prompt templates: `{field}` is replaced by an example's field, with three conversions for style.

The masked templates of LM-BFF (2012.15723, Table 1, used by MeZO 2305.17333, Appendix E.2) drop the
final punctuation of a first sentence and put the second one's first letter in lower case. These are
conversions here, so that the field that is cut when a prompt is too long stays one field:

    {premise!o}     "open": without the final . ? ! ; or ,
    {hypothesis!l}  first letter in lower case
    {question!u}    first letter in upper case

LM-BFF drops the last character whatever it is; ours drops punctuation only, so no letter is lost.
Attribute and index look-ups are refused: a template comes from a user's file.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

_FINAL_PUNCTUATION = ".?!;,"


class _Formatter(string.Formatter):
    """`str.format` restricted to plain names, with the conversions of the module docstring."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return kwargs[field_name], field_name

    def convert_field(self, value: Any, conversion: str | None) -> str:
        text = str(value)
        if conversion == "o":
            text = text.rstrip()
            return text[:-1].rstrip() if text.endswith(tuple(_FINAL_PUNCTUATION)) else text
        if conversion == "l":
            return text[:1].lower() + text[1:]
        if conversion == "u":
            return text[:1].upper() + text[1:]
        return text


_FORMATTER = _Formatter()


def render(template: str, fields: Mapping[str, Any]) -> str:
    """The template with every `{field}` replaced. Braces inside a field's text stay as they are."""
    return _FORMATTER.vformat(template, (), fields)


def fields_of(template: str) -> list[str]:
    """The field names a template uses, in order, each once.

    Raises ValueError if the template is malformed: unbalanced braces, a name that is not an
    identifier, a format specification, or a conversion other than !o, !l, !u.
    """
    found: list[str] = []
    for _, name, specification, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name.isidentifier():
            raise ValueError(f"field {{{name}}}: a field is a plain name (write {{{{ and }}}} for braces)")
        if specification:
            raise ValueError(f"field {{{name}:{specification}}}: format specifications are not allowed")
        if conversion not in (None, "", "o", "l", "u"):
            raise ValueError(f"field {{{name}!{conversion}}}: conversion is none of !o, !l, !u")
        if name not in found:
            found.append(name)
    return found
