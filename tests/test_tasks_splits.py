"""Splits by seed and the order of training batches."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hizoo_lite import tasks
from hizoo_lite.batch import Example
from hizoo_lite.errors import UserError
from hizoo_lite.tasks import batch_indices, batches, forms, make_splits
from hizoo_lite.tasks.task import WHERE
from tests.tasks_fixtures import data

SST2 = tasks.get("sst2")


def sst2_file(folder: Path, name: str, count: int, same: bool = False) -> None:
    lines = [f"{name} {0 if same else number}\t{number % 2}\n" for number in range(count)]
    (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(lines))


def wheres(examples: list[Example]) -> list[str]:
    return [example.fields[WHERE] for example in examples]


def test_sst2_splits_have_the_papers_sizes():
    splits = make_splits(SST2, data("sst2"), test_examples=None)
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (1000, 500, 872)
    assert all("dev.tsv" in place for place in wheres(splits.test))
    assert all("train.tsv" in place for place in wheres(splits.train + splits.dev))


@pytest.mark.parametrize("name", ["dev", "val", "valid", "validation", "eval", "evaluation"])
def test_files_of_dev_and_test_are_taken_by_their_usual_names(name, tmp_path, caplog):
    for stem in ("train", name, "test"):
        (tmp_path / f"{stem}.jsonl").write_text("".join(f'{{"text": "{stem} {n}"}}\n' for n in range(3)))
    splits = make_splits(tasks.get("lm"), tmp_path)
    for stem, part in (("train", splits.train), (name, splits.dev), ("test", splits.test)):
        assert sorted(example.fields["text"] for example in part) == [f"{stem} {n}" for n in range(3)]
    assert not caplog.text


def test_files_that_are_no_part_are_named(tmp_path, caplog):
    for stem in ("train", "holdout"):
        sst2_file(tmp_path, stem, 10)
    (tmp_path / "tokenizer.json").write_text("{}")  # a model beside the data, as in the demo
    splits = make_splits(SST2, tmp_path)
    assert all("train.tsv" in place for place in wheres(splits.train + splits.dev + splits.test))
    assert "not taken: holdout.tsv; names that tell their part: train, training, dev, val" in caplog.text


def test_boolq_parts_are_carved_out_of_its_only_file_in_proportion():
    splits = make_splits(tasks.get("boolq"), data("boolq"))
    every = wheres(splits.train + splits.dev + splits.test)
    # 1491 * 1000 / 2500 = 596, and so on; a repeated question may be left out of dev or test.
    assert len(splits.train) == 597
    assert 290 <= len(splits.dev) <= 298
    assert 590 <= len(splits.test) <= 596
    assert len(set(every)) == len(every)


def test_cb_shares_its_small_train_file_between_train_and_dev():
    splits = make_splits(tasks.get("cb"), data("cb"))
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (167, 83, 56)


@pytest.mark.parametrize("name", ["rte", "wsc", "snli"])
def test_carved_parts_share_no_example(name):
    splits = make_splits(tasks.get(name), data(name), dev_examples=100)

    def key(example: Example) -> str:
        return repr([value for field, value in example.fields.items() if field != WHERE])

    train, dev = ({key(example) for example in part} for part in (splits.train, splits.dev))
    assert len(train) > len(dev) > 0
    assert not train & dev


def test_splits_are_a_function_of_the_seed(tmp_path):
    sst2_file(tmp_path, "train", 50)
    first, again, other = (make_splits(SST2, tmp_path, train_examples=10, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert wheres(first.train) != wheres(other.train)


def test_own_rows_are_all_used_and_their_division_is_told(tmp_path):
    texts = [f"row {number % 55}" for number in range(60)]  # five are there twice
    lines = "".join(f"{text}\t{number % 2}\n" for number, text in enumerate(texts))
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + lines)
    splits = make_splits(SST2, tmp_path)
    parts = [
        {text for example in part for name, text in example.fields.items() if name != WHERE}
        for part in (splits.train, splits.dev, splits.test)
    ]
    assert len(splits.train) + len(splits.dev) + len(splits.test) == 60
    assert sum(map(len, parts)) == len(set.union(*parts)) == 55
    assert (splits.unused, splits.shared) == (0, True)
    assert str(splits).startswith(f"60 examples: {len(splits.train)} train, {len(splits.dev)} dev, ")
    assert "taken from train in proportion to their limits" in str(splits)


def test_what_is_beyond_the_limits_is_counted(tmp_path):
    sst2_file(tmp_path, "train", 2000)
    sst2_file(tmp_path, "dev", 30)
    splits = make_splits(SST2, tmp_path, train_examples=100, dev_examples=20, test_examples=10)
    assert splits.unused == 1880 + 20
    assert str(splits).startswith("2,030 examples: 100 train, 20 dev, 10 test, 1,900 not used (beyond")


def test_dev_examples_equal_to_a_train_example_are_left_out(tmp_path):
    sst2_file(tmp_path, "train", 40, same=True)
    splits = make_splits(SST2, tmp_path, train_examples=5, dev_examples=5, test_examples=5)
    assert len(splits.train) == 5
    assert splits.dev == splits.test == []


def test_none_takes_everything(tmp_path):
    sst2_file(tmp_path, "train", 50)
    sst2_file(tmp_path, "dev", 30)
    splits = make_splits(SST2, tmp_path, train_examples=None, dev_examples=7, test_examples=None)
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (43, 7, 30)
    carved = make_splits(
        SST2, tmp_path / "train.tsv", train_examples=None, dev_examples=None, test_examples=None
    )
    assert (len(carved.train), len(carved.dev), len(carved.test)) == (30, 10, 10)


def test_k_shot_takes_k_of_each_class_for_train_and_dev(tmp_path):
    sst2_file(tmp_path, "train", 60)
    sst2_file(tmp_path, "dev", 30)
    splits = make_splits(SST2, tmp_path, k_shot=8)
    assert Counter(example.gold for example in splits.train) == {0: 8, 1: 8}
    assert Counter(example.gold for example in splits.dev) == {0: 8, 1: 8}
    assert len(splits.test) == 30
    assert not set(wheres(splits.train)) & set(wheres(splits.dev))


def test_k_shot_takes_the_test_part_from_what_is_left(tmp_path):
    sst2_file(tmp_path, "train", 60)
    splits = make_splits(SST2, tmp_path, k_shot=8, test_examples=20)
    every = wheres(splits.train + splits.dev + splits.test)
    assert len(set(every)) == len(every) == 16 + 16 + 20


def test_custom_tasks_use_their_own_dev_and_test_files(tmp_path):
    for name, count in (("train", 30), ("dev", 10), ("test", 20)):
        sst2_file(tmp_path, name, count)
    path = tmp_path / "task.toml"
    path.write_text(
        'name = "t"\nkind = "choice"\nprompt = "{sentence} It was"\nlabel_field = "label"\n'
        '[answers]\n0 = " bad"\n1 = " good"\n'
    )
    splits = make_splits(tasks.get(path), tmp_path, k_shot=3)
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (6, 10, 20)
    (tmp_path / "test.tsv").unlink()
    splits = make_splits(tasks.get(path), tmp_path, train_examples=20, dev_examples=5)
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (20, 5, 10)
    assert all("train.tsv" in place for place in wheres(splits.dev))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_examples": 0}, "train_examples: got 0; allowed: a positive number, or none for all"),
        ({"dev_examples": -1}, "dev_examples: got -1"),
        ({"test_examples": -1}, "test_examples: got -1"),
        ({"seed": -1}, "seed: got -1; allowed: 0 or more"),
        ({"k_shot": 0}, "k_shot: got 0; allowed: a positive number"),
        ({"k_shot": 6}, "k_shot: got 6, but class 'terrible' has 5 training examples"),
    ],
)
def test_impossible_counts_are_errors(tmp_path, options, message):
    sst2_file(tmp_path, "train", 10)
    with pytest.raises(UserError, match=message):
        make_splits(SST2, tmp_path, **options)


def test_k_shot_needs_fixed_classes():
    with pytest.raises(UserError, match="k_shot: task squad has no fixed classes; use train_examples"):
        make_splits(tasks.get("squad"), data("xquad"), k_shot=4)


# ----------------------------------------------------------------------------------------- batches


@given(count=st.integers(1, 40), size=st.integers(1, 50), seed=st.integers(0, 2**32))
def test_every_epoch_shows_every_example_once(count, size, seed):
    steps = -(-3 * count // size)
    stream = [index for step in range(steps) for index in batch_indices(count, size, seed, step)]
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_every_batch_is_full():
    assert {len(batch) for batch in itertools.islice(batches(range(7), 3, 0), 20)} == {3}


def test_resumed_batches_equal_uninterrupted_ones():
    whole = list(itertools.islice(batches(range(11), 4, 5), 30))
    resumed = list(itertools.islice(batches(range(11), 4, 5, start_step=13), 17))
    assert resumed == whole[13:]


def test_batches_depend_on_the_seed_and_change_with_the_epoch():
    assert batch_indices(100, 100, 0, 0) != batch_indices(100, 100, 1, 0)
    assert batch_indices(100, 100, 0, 0) != batch_indices(100, 100, 0, 1)


@pytest.mark.parametrize("arguments", [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, -1, 0), (1, 1, 0, -1)])
def test_batches_of_nothing_are_refused(arguments):
    with pytest.raises(ValueError, match=r"batch: got \d examples, batch size \d, seed -?\d, step -?\d"):
        batch_indices(*arguments)


def test_classes_are_spread_evenly_over_an_epoch():
    labels = [0] * 20 + [1] * 70 + [2] * 10
    for seed in range(3):
        order = batch_indices(100, 100, seed, 0, labels)
        assert sorted(order) == list(range(100))  # each once
        for first in range(0, 100, 10):
            counts = np.bincount([labels[index] for index in order[first : first + 10]], minlength=3)
            assert np.abs(counts - [2, 7, 1]).max() <= 1


def test_classes_that_are_about_as_frequent_come_in_equal_numbers():
    labels = [0] * 60 + [1] * 40
    taken: dict[int, list[int]] = {0: [], 1: []}
    for step in range(40):
        batch = batch_indices(100, 10, 3, step, labels)
        assert batch == batch_indices(100, 10, 3, step, labels)
        for index in batch:
            taken[labels[index]].append(index)
        assert len(taken[0]) == len(taken[1])
    assert sorted(taken[0][:60]) == list(range(60))  # every example of a class once before any twice
    assert sorted(taken[1][:40]) == list(range(60, 100))
    assert taken[1][:40] != taken[1][40:80]
    three = [label for label in [0, 1, 2] for _ in range(7)]
    counts = np.bincount([three[index] for index in batch_indices(21, 16, 0, 5, three)])
    assert sorted(counts) == [5, 5, 6]


def test_a_rare_class_stays_rare():
    labels = [0] * 61 + [1] * 40
    assert sorted(batch_indices(101, 101, 0, 0, labels)) == list(range(101))


def test_examples_of_a_class_come_in_another_order_each_epoch():
    labels = [0, 1] * 50
    first, second = (batch_indices(100, 100, 0, step, labels) for step in (0, 1))
    assert first != second
    assert first == batch_indices(100, 100, 0, 0, labels)
    assert first != batch_indices(100, 100, 1, 0, labels)


def test_labels_that_are_all_alike_change_nothing_that_matters():
    assert sorted(batch_indices(9, 9, 3, 0, [4] * 9)) == list(range(9))


LENGTHS = [int(n) for n in np.random.default_rng(0).integers(5, 100, 640)]


def by_length(step, seed=0, labels=None):
    return batch_indices(len(LENGTHS), 16, seed, step, labels, LENGTHS.__getitem__)


@pytest.mark.parametrize("labels", [None, [0, 1] * 320, [0, 0, 0, 1] * 160])
def test_batches_of_like_length_have_the_same_examples_and_classes_among_eight(labels):
    for first in range(0, 80, 8):  # two epochs
        plain = [batch_indices(640, 16, 0, step, labels) for step in range(first, first + 8)]
        found = [by_length(step, labels=labels) for step in range(first, first + 8)]
        assert sorted(itertools.chain(*plain)) == sorted(itertools.chain(*found))
        if labels is not None:
            counts = [
                sorted(sum(labels[index] for index in batch) for batch in part) for part in (plain, found)
            ]
            assert counts[0] == counts[1]


def test_batches_of_like_length_are_padded_less_and_come_in_any_order():
    def padded(batch):
        return len(batch) * max(LENGTHS[index] for index in batch)

    plain = sum(padded(batch_indices(640, 16, 0, step)) for step in range(40))
    found = [by_length(step) for step in range(40)]
    assert sum(map(padded, found)) - sum(LENGTHS) < (plain - sum(LENGTHS)) / 4
    orders = {tuple(np.argsort([padded(batch) for batch in found[k : k + 8]])) for k in range(0, 40, 8)}
    assert len(orders) == 5
    assert found != [by_length(step, seed=1) for step in range(40)]


def test_batches_with_little_padding_come_as_they_are():
    lengths = [30 + length % 10 for length in LENGTHS]
    for step in range(16):
        plain = batch_indices(640, 16, 0, step)
        assert batch_indices(640, 16, 0, step, None, lengths.__getitem__) == plain


def test_an_example_of_two_epochs_does_not_lie_beside_itself():
    lengths = [2] * 60 + [20] * 67  # of 127 examples the second window begins an epoch
    for step in range(8):
        batch = batch_indices(127, 4, 3, step + 28, None, lengths.__getitem__)
        assert len(batch) == len(set(batch))


def test_few_examples_stay_as_they_come():
    assert batch_indices(100, 16, 0, 3, None, LENGTHS.__getitem__) == batch_indices(100, 16, 0, 3)


# ------------------------------------------------------------------------------- a user's own data

AUTO: dict[str, Any] = {"train_examples": "auto", "dev_examples": "auto", "test_examples": "auto"}
OWN = tasks.get({"name": "own", "kind": "lm", "prompt": "{text}"})


def own_files(folder: Path, **counts: int) -> Path:
    for name, count in counts.items():
        rows = "".join(f'{{"text": "{name} {number}"}}\n' for number in range(count))
        (folder / f"{name}.jsonl").write_text(rows)
    return folder


def own_sizes(folder: Path, needs_dev: bool = False, **limits: Any) -> tuple[int, int, int]:
    splits = make_splits(OWN, folder, exact=True, needs_dev=needs_dev, **{**AUTO, **limits})
    parts = splits.train, splits.dev, splits.test
    every = [where for part in parts for where in wheres(part)]
    assert len(every) == len(set(every)) == splits.total - splits.unused
    assert str(splits).startswith(
        f"{splits.total:,} examples: {len(parts[0])} train, {len(parts[1])} dev, {len(parts[2])} test"
    )
    return len(parts[0]), len(parts[1]), len(parts[2])


@pytest.mark.parametrize(
    ("files", "needs_dev", "limits", "sizes"),
    [
        ({"train": 400}, False, {}, (360, 0, 40)),
        ({"train": 400}, True, {}, (320, 40, 40)),
        ({"train": 50_000}, False, {}, (49_800, 0, 200)),
        ({"train": 5}, False, {}, (4, 0, 1)),
        ({"train": 30}, False, {"test_examples": 20}, (10, 0, 20)),
        ({"train": 30}, False, {"test_examples": 20, "dev_examples": 3}, (7, 3, 20)),
        ({"train": 400}, False, {"train_examples": 100}, (100, 0, 40)),
        ({"train": 400}, False, {"train_examples": 1000}, (360, 0, 40)),
        ({"train": 40, "valid": 20}, False, {}, (36, 20, 4)),
        ({"train": 40, "valid": 20, "test": 10}, True, {}, (40, 20, 10)),
        ({"train": 40, "test": 2000}, False, {}, (40, 0, 1000)),
        ({"train": 40, "test": 2000}, False, {"test_examples": 1500}, (40, 0, 1500)),
    ],
)
def test_own_data_is_used_as_a_whole_and_limits_are_exact(tmp_path, files, needs_dev, limits, sizes):
    assert own_sizes(own_files(tmp_path, **files), needs_dev, **limits) == sizes


def test_limits_that_leave_nothing_to_train_on_are_refused(tmp_path):
    own_files(tmp_path, train=30)
    with pytest.raises(
        UserError, match="30 examples in train, of which 0 are to be held out for dev and 30 for"
    ):
        own_sizes(tmp_path, test_examples=30)


def test_own_examples_that_are_there_twice_are_in_one_part(tmp_path):
    lines = "".join(f'{{"text": "row {number % 30}"}}\n' for number in range(60))
    (tmp_path / "train.jsonl").write_text(lines)
    splits = make_splits(OWN, tmp_path, exact=True, needs_dev=True, **AUTO)
    parts = [{example.fields["text"] for example in p} for p in (splits.train, splits.dev, splits.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 30
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (48, 6, 6)


def test_published_tasks_keep_the_papers_division_unless_numbers_are_given(tmp_path):
    for options in ({}, {"exact": True, **AUTO}):
        splits = make_splits(tasks.get("cb"), data("cb"), **options)
        assert (len(splits.train), len(splits.dev), len(splits.test)) == (167, 83, 56)
    sst2_file(tmp_path, "train", 30)
    splits = make_splits(SST2, tmp_path, exact=True, **{**AUTO, "test_examples": 20, "dev_examples": 4})
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (6, 4, 20)


def test_held_out_examples_have_the_classes_in_their_shares(tmp_path):
    lines = ["text,label\n", *(f"row {n},{'rare' if n % 10 == 0 else 'usual'}\n" for n in range(200))]
    (tmp_path / "train.csv").write_text("".join(lines))
    task = tasks.get(forms.recognise(tmp_path).keys)
    splits = make_splits(task, tmp_path, exact=True, needs_dev=True, **AUTO)
    for part, rare in ((splits.dev, 2), (splits.test, 2), (splits.train, 16)):
        assert len(part) == 10 * rare
        assert sum(example.answers[example.gold].strip() == "rare" for example in part) == rare
