"""journal.bin: what is written is read again; what is torn or damaged ends it, and is dropped."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hizoo_lite.errors import StorageError, UserError
from hizoo_lite.train.journal import MOST_BRANCHES, Journal, Record, read, record_bytes, scan

FLOATS = st.floats(allow_nan=False)


def records(directions: int, exact: int) -> st.SearchStrategy[Record]:
    """Any record of a step along so many directions; a skipped one has no slopes."""
    along = st.tuples(*[FLOATS] * directions)
    return st.builds(
        Record,
        step=st.integers(0, 2**40),
        seed=st.integers(0, 2**63),
        position=st.integers(0, 2**40),
        losses=st.lists(FLOATS, min_size=1, max_size=3).map(tuple),
        coefficients=along,
        curvatures=st.none() | along,
        smoothing=FLOATS,
        lr=FLOATS,
        decay=FLOATS,
        skipped=st.booleans(),
        clipped=st.booleans(),
        chunk_halvings=st.integers(0, 10),
        predicted=st.booleans(),
        exact=st.binary(min_size=4 * exact, max_size=4 * exact),
    ).map(lambda r: r._replace(coefficients=(), exact=b"") if r.skipped else r)


def record(step: int) -> Record:
    return Record(step, 7, 4 * step, (0.5, 0.6, 0.4), (1.5 * step,), (3.0,), 0.1, 1e-3, 0.0)


def write(path: Path, count: int) -> None:
    with Journal(path, 3) as journal:
        for step in range(count):
            journal.append(record(step))


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(0, 3))
def test_records_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, directions: int, exact: int
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.bin"
    found = data.draw(st.lists(records(directions, exact), max_size=5, unique_by=lambda r: r.step))
    wanted = sorted(found, key=lambda r: r.step)
    with Journal(path, 3, directions, exact) as journal:
        for one in wanted:
            journal.append(one)
    assert read(path) == wanted
    assert path.stat().st_size == 32 + len(wanted) * record_bytes(3, directions, exact)


def test_the_most_branches_of_a_record_are_kept_and_more_are_refused(tmp_path: Path) -> None:
    path, most = tmp_path / "journal.bin", MOST_BRANCHES
    one = Record(0, 1, 0, (1.0,) * most, (0.5,) * (most - 1), (0.25,) * (most - 1), 0.1, 0.2, 0.0)
    with Journal(path, most, most - 1) as journal:
        journal.append(one)
    assert read(path) == [one]
    with pytest.raises(UserError, match="got 256 branches a step, a journal holds up to 255"):
        Journal(tmp_path / "other.bin", most + 1, most)


def test_a_skipped_step_keeps_its_losses(tmp_path: Path) -> None:
    path = tmp_path / "journal.bin"
    with Journal(path, 3) as journal:
        journal.append(Record(0, 1, 0, (math.inf, math.nan), (), None, 0.0, 0.0, 0.0, skipped=True))
    (found,) = read(path)
    assert found.skipped
    assert found.curvatures is None
    assert (found.losses[0], math.isnan(found.losses[1])) == (math.inf, True)


def test_a_record_torn_at_any_byte_is_dropped_and_the_journal_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "journal.bin"
    write(path, 3)
    whole = path.read_bytes()
    for length in range(len(whole) - record_bytes(3), len(whole)):
        path.write_bytes(whole[:length])
        assert [r.step for r in read(path)] == [0, 1]
        with Journal(path, 3) as journal:
            journal.append(record(2))
        assert path.read_bytes() == whole
    for length in range(32):  # killed before the header was whole
        path.write_bytes(whole[:length])
        write(path, 3)
        assert path.read_bytes() == whole


def test_a_last_record_of_which_not_all_bytes_arrived_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "journal.bin"
    write(path, 3)
    data = bytearray(path.read_bytes())
    data[-40:] = bytes(40)  # the file has its length, the disk not its content
    path.write_bytes(data)
    assert [r.step for r in read(path)] == [0, 1]


def test_a_flipped_bit_ends_the_journal_or_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.bin"
    write(path, 4)
    whole, size = path.read_bytes(), record_bytes(3)
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        if position < 32:
            with pytest.raises(
                UserError, match=r"(damaged|not a journal|reads 1, 2, 3, 4); move it away: --resume"
            ):
                scan(path)
            continue
        sound = (position - 32) // size
        found = scan(path)
        assert found.records == [record(step) for step in range(sound)]
        assert found.lost_bytes == (4 - sound) * size


@pytest.mark.parametrize("lost", [1, 2, 4])
def test_records_of_which_only_zeros_reached_the_disk_are_dropped(lost: int, tmp_path: Path) -> None:
    path = tmp_path / "journal.bin"
    write(path, 4)
    whole, size = path.read_bytes(), record_bytes(3)
    path.write_bytes(whole[: -lost * size] + bytes(lost * size))
    assert scan(path)[:2] == ([record(step) for step in range(4 - lost)], lost * size)
    with Journal(path, 3) as journal:
        assert path.stat().st_size == len(whole) - lost * size
        for step in range(4 - lost, 4):
            journal.append(record(step))
    assert path.read_bytes() == whole


def test_a_journal_of_zeros_is_begun_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.bin"
    write(path, 2)
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    assert scan(path)[:2] == ([], 2 * record_bytes(3))
    write(path, 2)
    assert path.read_bytes() == whole


def test_a_record_that_is_missing_ends_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.bin"
    write(path, 4)
    data, size = path.read_bytes(), record_bytes(3)
    path.write_bytes(data[: 32 + size] + data[32 + 2 * size :])
    assert scan(path)[:2] == ([record(0)], 2 * size)


def test_records_can_be_taken_back(tmp_path: Path) -> None:
    path, other = tmp_path / "a.bin", tmp_path / "b.bin"
    write(path, 5)
    write(other, 5)
    with Journal(path, 3) as journal:
        journal.truncate(2)
        assert [r.step for r in read(path)] == [0, 1]
        for step in range(2, 5):
            journal.append(record(step))
    assert path.read_bytes() == other.read_bytes()


def test_what_is_not_this_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.bin"
    path.write_bytes(b"something else, which is long enough for a header")
    with pytest.raises(UserError, match="is not a journal"):
        Journal(path, 3)
    path.unlink()
    write(path, 1)
    with pytest.raises(
        UserError, match="made for 3 branches a step along 1, this run has 2 branches a step along 1"
    ):
        Journal(path, 2)
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "nowhere.bin")
    with pytest.raises(StorageError, match="cannot be written"):
        Journal(tmp_path / "no" / "journal.bin", 3)


def test_a_full_disk_leaves_whole_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.bin"
    plain, room = os.pwrite, [300]

    def narrow(file: int, data: bytes, offset: int) -> int:
        if room[0] == 0:
            raise OSError(28, "No space left on device")
        done = plain(file, data[: room[0]], offset)
        room[0] -= done
        return done

    with Journal(path, 3) as journal:
        monkeypatch.setattr(os, "pwrite", narrow)
        journal.append(record(0))
        journal.append(record(1))
        with pytest.raises(StorageError, match="No space left"):
            journal.append(record(2))
    assert [r.step for r in read(path)] == [0, 1]
    assert path.stat().st_size == 32 + 2 * record_bytes(3)


def test_a_disk_that_refuses_all_leaves_whole_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal.bin"
    plain = os.pwrite

    def half(file: int, data: bytes, offset: int) -> int:
        if len(data) <= 52:
            raise OSError(5, "Input/output error")
        return plain(file, data[:52], offset)

    def refused(file: int, size: int) -> None:
        raise OSError(5, "Input/output error")

    with Journal(path, 3) as journal:
        journal.append(record(0))
        with monkeypatch.context() as broken:
            broken.setattr(os, "pwrite", half)
            broken.setattr(os, "ftruncate", refused)
            with pytest.raises(StorageError, match=r"journal.bin: cannot be written: Input/output error"):
                journal.append(record(1))
            with pytest.raises(StorageError, match=r"journal.bin: cannot be written: Input/output error"):
                journal.truncate(0)
        assert [r.step for r in read(path)] == [0]
