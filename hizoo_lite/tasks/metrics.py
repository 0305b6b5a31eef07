"""The tasks' metrics, as their authors define them. Every value is in [0, 1].

A choice is the index of the chosen answer; a completion is a text.

    SQuAD v1.1   exact match and token F1 after normalising (lower case, no punctuation, no articles),
                 the best over the references (Rajpurkar et al. 2016, evaluate-v1.1)
    DROP         the same over *spans*: a text is split at "; " into spans, numbers are compared as
                 numbers, spans are matched one to one (Dua et al. 2019, section 5, drop_eval)
    MultiRC      F1a: F1 of "this answer is correct" over all answers; exact match over whole questions
    ReCoRD       SQuAD's token F1 and exact match of the chosen entity, the best over the references
"""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from hizoo_lite.batch import Example

Prediction = int | str
Scorer = Callable[[Sequence[Example], Sequence[Prediction]], float]

#: Splits a DROP completion, and joins a DROP reference, of several spans.
SPAN_SEPARATOR = "; "

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = set(string.punctuation)


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean of a non-empty sequence."""
    return sum(values) / len(values)


def accuracy(examples: Sequence[Example], predictions: Sequence[Prediction]) -> float:
    """The share of examples whose gold answer was chosen."""
    return mean(
        [float(choice == example.gold) for example, choice in zip(examples, predictions, strict=True)]
    )


def label_f1(label: int, examples: Sequence[Example], predictions: Sequence[Prediction]) -> float:
    """F1 of one label: 2 TP / (2 TP + FP + FN); 0 if the label is neither present nor predicted."""
    pairs = [
        (example.gold == label, choice == label)
        for example, choice in zip(examples, predictions, strict=True)
    ]
    true_positive = sum(gold and chosen for gold, chosen in pairs)
    wrong = sum(gold != chosen for gold, chosen in pairs)
    return 2 * true_positive / (2 * true_positive + wrong) if true_positive else 0.0


def positive_f1(examples: Sequence[Example], predictions: Sequence[Prediction]) -> float:
    """F1 of label 1: MultiRC's F1a when every example is one answer option."""
    return label_f1(1, examples, predictions)


def macro_f1(examples: Sequence[Example], predictions: Sequence[Prediction]) -> float:
    """The mean F1 over the labels that occur as gold or as prediction (CB's second metric)."""
    labels = sorted({example.gold for example in examples} | {int(choice) for choice in predictions})
    return mean([label_f1(label, examples, predictions) for label in labels])


def group_exact_match(examples: Sequence[Example], predictions: Sequence[Prediction]) -> float:
    """The share of groups (MultiRC questions) of which every example is right."""
    groups: dict[str, bool] = defaultdict(lambda: True)
    for example, choice in zip(examples, predictions, strict=True):
        groups[example.group] &= choice == example.gold
    return mean([float(right) for right in groups.values()])


def normalise(text: str) -> str:
    """SQuAD's normal form: lower case, without punctuation and articles, single spaces."""
    bare = "".join(letter for letter in text.lower() if letter not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def token_f1(prediction: str, reference: str) -> float:
    """SQuAD's F1 of the two texts' bags of normalised words."""
    predicted, expected = normalise(prediction).split(), normalise(reference).split()
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0


def squad_f1(examples: Sequence[Example], predictions: Sequence[Prediction]) -> float:
    """Mean over the examples of the best token F1 over the references."""
    return _mean_best(token_f1, examples, predictions)


def squad_exact(examples: Sequence[Example], predictions: Sequence[Prediction]) -> float:
    """The share of completions that equal a reference after normalising."""
    return _mean_best(_exact, examples, predictions)


def record_f1(examples: Sequence[Example], predictions: Sequence[Prediction]) -> float:
    """SQuAD's F1 of the chosen entities."""
    return squad_f1(examples, _entities(examples, predictions))


def record_exact(examples: Sequence[Example], predictions: Sequence[Prediction]) -> float:
    """The share of chosen entities that equal a reference after normalising."""
    return squad_exact(examples, _entities(examples, predictions))


def _entities(examples: Sequence[Example], predictions: Sequence[Prediction]) -> list[Prediction]:
    return [example.fields["entities"][choice] for example, choice in zip(examples, predictions, strict=True)]


def _exact(prediction: str, reference: str) -> float:
    return float(normalise(prediction) == normalise(reference))


def _mean_best(
    score: Callable[[str, str], float], examples: Sequence[Example], predictions: Sequence[Prediction]
) -> float:
    """The mean over the examples of the best score over their references."""
    pairs = zip(examples, map(str, predictions), strict=True)
    return mean([max(score(text, reference) for reference in example.references) for example, text in pairs])


def drop_f1(examples: Sequence[Example], predictions: Sequence[Prediction]) -> float:
    """Mean over the examples of DROP's F1, the best over the references, each rounded to 0.01."""
    return _mean_best(_spans_f1, examples, predictions)


def drop_exact(examples: Sequence[Example], predictions: Sequence[Prediction]) -> float:
    """The share of completions whose spans are, as a set and in number, those of a reference."""
    return _mean_best(_spans_exact, examples, predictions)


def _drop_normalise(text: str) -> str:
    """DROP's normal form: SQuAD's, word by word (hyphens separate words), numbers as floats."""
    words = (_drop_word(word) for word in re.split(r"[ -]", text.lower()))
    return " ".join(word for word in words if word).strip()


def _drop_word(word: str) -> str:
    if not _is_number(word):
        word = "".join(letter for letter in word if letter not in _PUNCTUATION)
    if _is_number(word):
        word = str(float(word))
    return " ".join(_ARTICLES.sub(" ", word).split())


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _spans(text: str) -> list[str]:
    return [_drop_normalise(span) for span in text.split(SPAN_SEPARATOR)]


def _spans_exact(prediction: str, reference: str) -> float:
    predicted, expected = _spans(prediction), _spans(reference)
    return float(set(predicted) == set(expected) and len(predicted) == len(expected))


def _spans_f1(prediction: str, reference: str) -> float:
    """The mean F1 of the best one-to-one matching of spans; a span without a partner scores 0."""
    predicted = [set(span.split()) for span in _spans(prediction)]
    expected = [set(span.split()) for span in _spans(reference)]
    few, many = sorted((predicted, expected), key=len)
    table = [[_bag_f1(a, b) if few is predicted else _bag_f1(b, a) for b in many] for a in few]
    return round(_best_matching(table) / len(many), 2)


def _bag_f1(predicted: set[str], expected: set[str]) -> float:
    """F1 of two sets of words; 0 if the expected span has numbers and none of them was predicted."""
    numbers = {word for word in expected if _is_number(word)}
    if numbers and not numbers & {word for word in predicted if _is_number(word)}:
        return 0.0
    common = len(predicted & expected)
    precision = common / len(predicted) if predicted else 1.0
    recall = common / len(expected) if expected else 1.0
    return 2 * precision * recall / (precision + recall) if common or not (predicted or expected) else 0.0


def _best_matching(table: Sequence[Sequence[float]]) -> float:
    """The largest sum of a one-to-one assignment of rows to columns (rows <= columns).

    Dynamic programming over the set of rows already placed, column by column: exact, and 2^rows small
    because a DROP answer has few spans. Above 12 rows, where that set would be large, rows take their best
    free column in turn.
    """
    count = len(table)
    if count > 12:
        return _greedy_matching(table)
    best = {0: 0.0}
    for column in range(len(table[0])):
        step = dict(best)
        for placed, score in best.items():
            for row in range(count):
                if not placed >> row & 1:
                    key = placed | 1 << row
                    step[key] = max(step.get(key, 0.0), score + table[row][column])
        best = step
    return max(best.values())


def _greedy_matching(table: Sequence[Sequence[float]]) -> float:
    free, total = set(range(len(table[0]))), 0.0
    for row in table:
        column = max(sorted(free), key=lambda index: row[index])
        free.remove(column)
        total += row[column]
    return total
