"""Metrics, against the definitions of the tasks' authors worked out by hand."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hizoo_lite import tasks
from hizoo_lite.batch import Example, Metric
from hizoo_lite.errors import UserError
from hizoo_lite.tasks import metrics

EXACT = pytest.approx  # sums of a few float64 fractions: pytest's own 1e-6 is far above their rounding


def gold(*labels: int, group: str = "") -> list[Example]:
    return [Example({}, ("No", "Yes", "Maybe"), label, group=group) for label in labels]


def text(*references: str) -> list[Example]:
    return [Example({}, ("",), 0, references)]


def test_accuracy_is_the_share_of_gold_choices():
    assert tasks.get("sst2").score(gold(0, 1, 1, 0), [0, 1, 0, 0]) == Metric("accuracy", 0.75)


def test_cb_has_accuracy_first_and_macro_f1_second():
    found = tasks.get("cb").scores(gold(0, 0, 1, 2), [0, 1, 1, 2])
    # F1 by class: 2/3, 2/3, 1
    assert found == [Metric("accuracy", 0.75), Metric("f1", EXACT(7 / 9))]


def test_multirc_f1a_is_over_all_answers_and_exact_match_over_questions():
    examples = gold(1, 0, group="a") + gold(1, 1, group="b")
    found = dict(tasks.get("multirc").scores(examples, [1, 0, 1, 0]))
    assert found == {"f1": EXACT(0.8), "accuracy": 0.75, "exact_match": 0.5}
    assert tasks.get("multirc").metric == "f1"


def test_f1_of_a_label_that_is_never_found_is_zero():
    assert metrics.positive_f1(gold(1, 0), [0, 0]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "references", "f1", "exact"),
    [
        (" Denver Broncos\nQuestion: next", ("the Denver Broncos!", "Broncos"), 1.0, 1.0),
        ("Denver", ("Denver Broncos",), 2 / 3, 0.0),
        ("Carolina", ("Denver Broncos",), 0.0, 0.0),
        ("", ("Denver",), 0.0, 0.0),
        ("\nDenver", ("Denver",), 1.0, 1.0),
    ],
)
def test_squad_scores_equal_the_official_definition(prediction, references, f1, exact):
    found = tasks.get("squad").scores(text(*references), [prediction])
    assert found == [Metric("f1", EXACT(f1)), Metric("exact_match", exact)]


@pytest.mark.parametrize(
    ("prediction", "references", "f1", "exact"),
    [
        ("7.0", ("7",), 1.0, 1.0),
        ("7 points", ("7",), 0.67, 0.0),
        ("8 points", ("7 points",), 0.0, 0.0),  # another number: no credit for the word
        ("Bob; Ann", ("Ann; Bob",), 1.0, 1.0),
        ("Ann", ("Ann; Bob",), 0.5, 0.0),
        ("the running-back", ("running back",), 1.0, 1.0),
        ("May 1900", ("7", "May 1900"), 1.0, 1.0),
    ],
)
def test_drop_scores_equal_the_official_definition(prediction, references, f1, exact):
    found = tasks.get("drop").scores(text(*references), [prediction])
    assert found == [Metric("f1", EXACT(f1)), Metric("exact_match", exact)]


TABLES = st.integers(1, 4).flatmap(
    lambda rows: st.lists(
        st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=5, max_size=5), min_size=rows, max_size=rows
    )
)


@given(table=TABLES)
def test_span_matching_equals_the_best_of_all_assignments(table):
    rows = range(len(table))
    best = max(sum(table[row][order[row]] for row in rows) for order in permutations(range(5), len(table)))
    assert metrics._best_matching(table) == EXACT(best)


def test_matching_of_very_many_spans_gives_each_its_own_partner():
    table = np.eye(14).tolist()
    assert metrics._best_matching(table) == 14.0


def test_record_takes_the_best_reference_of_the_chosen_entity():
    fields = {"entities": ("Barack Obama", "Obama", "Clinton")}
    example = Example(fields, ("a", "b", "c"), 0, ("Barack Obama",))
    found = [tasks.get("record").scores([example], [choice]) for choice in (0, 1, 2)]
    assert [dict(scores) for scores in found] == [
        {"f1": 1.0, "exact_match": 1.0},
        {"f1": EXACT(2 / 3), "exact_match": 0.0},
        {"f1": 0.0, "exact_match": 0.0},
    ]


def test_score_of_a_language_modelling_task_is_refused():
    assert tasks.get("lm").metric == "loss"
    with pytest.raises(UserError, match="task lm: it has no predictions to score; read its loss"):
        tasks.get("lm").score(gold(0), [0])


@pytest.mark.parametrize(("examples", "predictions"), [(gold(0), []), ([], [])])
def test_score_needs_one_prediction_for_each_example(examples, predictions):
    with pytest.raises(ValueError, match=r"score: \d examples and 0 predictions"):
        tasks.get("sst2").score(examples, predictions)
