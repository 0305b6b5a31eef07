"""`fuzz.py` led by coverage: atheris makes the choices that hypothesis draws its hostile files from.

Usage: python tools/fuzz_guided.py [--cases N] [--only NAME] [--json FILE]     (pip install atheris)

The targets and the rules are those of `fuzz.py`; what is new is that a case which reaches code that no case
before has reached is kept and varied. The code of `hizoo_lite` is instrumented while it is imported, so each
target has a process of its own, which libFuzzer ends. Slower by case than `fuzz.py`, and not the same every
time: it looks for what that one does not find.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit("atheris is not installed; run: pip install atheris, or take tools/fuzz.py")

with atheris.instrument_imports(include=["hizoo_lite"]):
    from fuzz import Figures, fuzz, hostile_case, limited, restored, tell
    from fuzz_targets import Target


def attack(target: Target, cases: int) -> Figures:
    """So many cases in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        result, begin = Path(name) / "figures.json", time.perf_counter()
        child = os.fork()
        if child == 0:
            _fuzz(target, cases, Path(name) / "folder", result)
        _, status = os.waitpid(child, 0)
        figures = Figures(target.name)
        if result.is_file():
            figures = Figures(**json.loads(result.read_text()))
        if status != 0:
            figures.failed += 1
            figures.failures[f"{target.name}: the process"] = f"it ended with {status}"
        figures.seconds = time.perf_counter() - begin
    tell(figures)
    return figures


def _fuzz(target: Target, cases: int, folder: Path, result: Path) -> None:
    """Does not return: the process ends after so many cases, or where libFuzzer ends it."""
    figures = Figures(target.name)
    restored(target, folder)
    target.read(folder)
    one = hostile_case(target, folder, figures, cases).hypothesis.fuzz_one_input  # type: ignore[attr-defined]

    def run(data: bytes) -> None:
        one(data)
        if figures.cases >= cases:
            result.write_text(json.dumps(asdict(figures)))
            os._exit(0)

    with limited():
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, sys.stderr.fileno())  # libFuzzer's progress
        atheris.Setup([sys.argv[0], "-max_len=8192", "-rss_limit_mb=0", "-timeout=0"], run)
        atheris.Fuzz()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(fuzz(__doc__, "hostile files, led by coverage", attack))
