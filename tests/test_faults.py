"""The quick part of tools/torture.py: kills and faults in forked processes, each ended in the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.grid  # a minute; tests/test_resume.py kills and fails runs in this process

ROOT = Path(__file__).parents[1]
#: What a user reads, by fault: it names the trouble and what to do.
MESSAGES = {
    "SIGKILL": ["the process is gone"],
    "SIGTERM": ["interrupted; saved in", "go on with: hizoo-lite train --resume --out"],
    "disk full at the journal": [
        "journal.bin: cannot be written: No space left on device",
        "--resume goes on",
    ],
    "disk full at a checkpoint": ["cannot be written: No space left on device", "--resume goes on after"],
    "memory refused in an update": ["memory ran out", "--resume goes on after 9 steps"],
    "four losses are NaN": ["4 steps skipped and counted"],
    "two runs in one folder": ["another process runs in", "wait for it, end it, or use another folder"],
    "other data on --resume": ["--data: the training examples", "put them back; other ones need a run"],
}


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not hasattr(os, "fork"):
        pytest.skip("processes cannot be forked here")
    folder = tmp_path_factory.mktemp("torture")
    command = [sys.executable, str(ROOT / "tools/torture.py"), "--quick", "--json", str(folder / "json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--folder", str(folder / "runs")], env=environment, capture_output=True, text=True
    )
    assert (folder / "json").is_file(), done.stderr
    found = json.loads((folder / "json").read_text())
    assert (done.returncode == 0) == all(fault["survived"] for fault in found["faults"])
    return found


def test_killed_runs_end_in_the_bytes_of_one_that_was_not(figures: dict[str, Any]) -> None:
    assert figures["kills"] == figures["equal"] == 3


@pytest.mark.parametrize("fault", MESSAGES)
def test_a_fault_is_survived_and_explained(fault: str, figures: dict[str, Any]) -> None:
    (found,) = [found for found in figures["faults"] if found["fault"] == fault]
    assert found["survived"], found["message"]
    assert all(words in found["message"] for words in MESSAGES[fault]), found["message"]


def test_every_quick_fault_is_looked_at(figures: dict[str, Any]) -> None:
    assert {found["fault"] for found in figures["faults"]} == set(MESSAGES)


def test_the_journal_costs_little(figures: dict[str, Any]) -> None:
    journal = figures["journal"]
    assert journal["record_bytes"] - journal["exact_bytes"] < 128
    assert 0 < journal["exact_bytes"] <= 4 * (2 * 128 + 2)  # a row of the head for each label, and its reach
    assert journal["share_of_a_step"] < 0.01
