"""Examples of a run: what was answered before and after, which are most wrong, which classes are confused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hizoo_lite.report.record import RunRecord, number

#: Examples that are shown of each kind, and classes of which a table is made.
SHOWN, MOST_CLASSES = 5, 20


class Shown(NamedTuple):
    """An example, before and after."""

    where: str
    prompt: str
    gold: str
    before: str
    after: str


class Group(NamedTuple):
    """Some examples, and what they are."""

    title: str
    examples: list[Shown]


class Confusion(NamedTuple):
    """How often each class, a row each, was taken for which, a column each."""

    classes: list[str]
    rows: list[list[int]]


def groups(run: RunRecord) -> list[Group]:
    """The first examples; the answers that became right and wrong; those with the largest loss."""
    pairs = _pairs(run.predictions)
    first = [_shown(*pair) for pair in pairs[:SHOWN]]
    found = [Group("The first held-out examples", first)]
    sides = [(before.get("right"), after.get("right")) for before, after in pairs]
    for title, wanted in (
        ("Answers that became right", (False, True)),
        ("Answers that became wrong", (True, False)),
    ):
        own = [pair for pair, side in zip(pairs, sides, strict=True) if side == wanted]
        found.append(Group(title, [_shown(*pair) for pair in own[:SHOWN]]))
    wrong = [pair for pair in pairs if pair[1].get("right") is not True and _loss(pair[1]) is not None]
    wrong.sort(key=lambda pair: -(_loss(pair[1]) or 0.0))
    found.append(Group("The most wrong, by their loss", [_shown(*pair) for pair in wrong[:SHOWN]]))
    return [group for group in found if group.examples]


def confusion(run: RunRecord) -> Confusion | None:
    """Of the answers after the run; None if there are no classes, or too many."""
    after = [line for line in run.predictions if line.get("when") == "after" and "right" in line]
    pairs = Counter((_text(line.get("gold")), _text(line.get("answer"))) for line in after)
    classes = sorted({name for pair in pairs for name in pair})
    if not 2 <= len(classes) <= MOST_CLASSES:
        return None
    return Confusion(classes, [[pairs[gold, answer] for answer in classes] for gold in classes])


def _pairs(lines: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """(before, after) of each example, in order; of one that has no other the same twice."""
    found: dict[Any, dict[str, Mapping[str, Any]]] = {}
    for line in lines:
        found.setdefault(line["index"], {})[str(line["when"])] = line
    both = [(found[index].get("before"), found[index].get("after")) for index in sorted(found)]
    return [(before or after or {}, after or before or {}) for before, after in both]


def _shown(before: Mapping[str, Any], after: Mapping[str, Any]) -> Shown:
    where, prompt, gold = (_text(after.get(name, "")) for name in ("where", "prompt", "gold"))
    return Shown(where.rsplit("/", 1)[-1], prompt, gold, _said(before), _said(after))


def _said(line: Mapping[str, Any]) -> str:
    """The answer with its loss."""
    loss = _loss(line)
    parts = [_text(line["answer"])] if "answer" in line else []
    parts += [] if loss is None else [f"(loss {loss:.3f})" if parts else f"loss {loss:.3f}"]
    return " ".join(parts)


def _text(value: Any) -> str:
    """A value as a text that a page can hold: half of a surrogate pair becomes a question mark."""
    return str(value).encode("utf-8", "replace").decode()


def _loss(line: Mapping[str, Any]) -> float | None:
    return number(line.get("loss"))
