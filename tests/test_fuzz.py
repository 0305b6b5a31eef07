"""Whatever is in a file, its reader returns or says what is wrong: some cases of `tools/fuzz.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")
if sys.platform == "win32":
    pytest.skip("limits of time and memory are those of POSIX", allow_module_level=True)

import fuzz
from fuzz_targets import Target, targets

from hizoo_lite.errors import UserError

_CASES = 100


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
def test_hostile_files_are_refused_in_words(target: Target) -> None:
    figures = fuzz.attack(target, _CASES)
    assert not figures.failures
    assert figures.cases >= _CASES
    assert figures.accepted > 0  # the cases are near enough to what is valid
    assert figures.refused > 0


def _reads(read: Any) -> Target:
    def checked(folder: Path) -> None:
        if (folder / "x.json").read_bytes() != valid:
            read()

    valid = json.dumps({"a": [1, 2]}).encode()
    return Target("made", {"x.json": valid}, {"x.json": "json"}, checked)


def _endless() -> None:
    while True:
        pass


def _raise() -> None:
    raise KeyError("a")


@pytest.mark.parametrize(
    ("read", "named"),
    [
        (_raise, "KeyError"),
        (_endless, "_TooSlow"),
        (lambda: len(bytearray(8 << 30)), "MemoryError"),
    ],
)
def test_what_is_no_refusal_fails(read: Any, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "_CPU_SECONDS", 0.05)
    figures = fuzz.attack(_reads(read), 5)
    assert figures.failed >= 4
    assert figures.refused == 0
    assert all(named in what for what in figures.failures)


def test_a_target_must_accept_its_own_folder() -> None:
    def refuses(folder: Path) -> None:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        fuzz.attack(Target("made", {"x": b"1"}, {"x": "json"}, refuses), 1)


def test_cases_are_the_same_every_time() -> None:
    seen: list[list[bytes]] = []
    for _ in range(2):
        seen.append([])
        found = seen[-1]
        read = lambda folder, found=found: found.append((folder / "x.json").read_bytes())
        fuzz.attack(Target("made", {"x.json": b'{"a": 1}'}, {"x.json": "json"}, read), 60)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) > 30
