"""Hostile files for everything that reads one: a message (`UserError`), a value, and nothing else.

Usage: python tools/fuzz.py [--quick] [--cases N] [--only NAME] [--json FILE]

For each target N files (10 000; --quick: 300), always the same ones, that are damaged, of another form or
extreme (`hostile.py`). A case fails where it raises something else than a `UserError` or a `StorageError`,
takes more than 2 seconds of processor time, or more than 1 GiB of memory. A failure is printed once with the
exception and the file in base64; the exit code is then 1. Needs hypothesis; POSIX only.
"""

from __future__ import annotations

import base64
import contextlib
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fuzz_targets import Target, targets
from hostile import contents
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from reporting import make_parser, publish

from hizoo_lite.errors import StorageError, UserError

_CPU_SECONDS, _SECONDS = 2.0, 60.0
_MEMORY_BYTES = 1 << 30
_ROUND = 500  # cases that hypothesis makes at a time: it remembers all of them


class _TooSlow(BaseException):
    """A case takes too long; no reader catches it."""


@dataclass
class Figures:
    """What became of a target's cases."""

    target: str
    accepted: int = 0
    refused: int = 0
    failed: int = 0
    failures: dict[str, str] = field(default_factory=dict)  # what and where -> file and its base64
    seconds: float = 0.0

    @property
    def cases(self) -> int:
        """All of them."""
        return self.accepted + self.refused + self.failed


def attack(target: Target, cases: int) -> Figures:
    """At least so many cases. UserError where the target refuses even its valid folder."""
    figures = Figures(target.name)
    with tempfile.TemporaryDirectory() as name, limited():
        folder = Path(name) / "folder"
        restored(target, folder)
        target.read(folder)
        begin, done, rounds = time.perf_counter(), 0, 0
        while done < cases:
            done += _round(target, folder, min(cases - done, _ROUND), rounds, figures)
            rounds += 1
        figures.seconds = time.perf_counter() - begin
    tell(figures)
    return figures


def tell(figures: Figures) -> None:
    """A line of progress."""
    counts = f"{figures.cases} cases, {figures.accepted} accepted, {figures.failed} failures"
    print(f"{figures.target}: {counts}, {figures.seconds:.0f} s", file=sys.stderr, flush=True)


def _round(target: Target, folder: Path, cases: int, number: int, figures: Figures) -> int:
    """hypothesis may make fewer cases than it is asked for; how many it made."""
    before = figures.cases
    seed(number)(hostile_case(target, folder, figures, cases))()
    return figures.cases - before


def hostile_case(target: Target, folder: Path, figures: Figures, cases: int) -> Callable[[], None]:
    """A test of hypothesis: one file of a folder that is there is replaced, and the folder read."""
    of_file = [st.tuples(st.just(n), contents(f, target.files[n])) for n, f in target.attacked.items()]

    @settings(
        max_examples=cases,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(of_file))
    def run(case: tuple[str, bytes]) -> None:
        _try(target, folder, *case, figures)

    return run


def _try(target: Target, folder: Path, name: str, data: bytes, figures: Figures) -> None:
    restored(target, folder)
    (folder / name).write_bytes(data)
    try:
        with _timed():
            target.read(folder)
    except (UserError, StorageError):
        figures.refused += 1
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        figures.failed += 1
        what = f"{target.name}: {_place(error)}"
        shown = f"{str(error)[:100]!r}\n  {name} {base64.b64encode(data).decode()}"
        figures.failures[what] = min(figures.failures.get(what, shown), shown, key=len)
    else:
        figures.accepted += 1


def restored(target: Target, folder: Path) -> None:
    """Write the valid folder."""
    for name, data in target.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _place(error: BaseException) -> str:
    """The exception, and the last line of the package that it came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "hizoo_lite" in f.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {where}"


@contextlib.contextmanager
def _timed() -> Iterator[None]:
    timers = ((signal.ITIMER_PROF, _CPU_SECONDS), (signal.ITIMER_REAL, _SECONDS))
    for timer, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, _ in timers:
            signal.setitimer(timer, 0)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Signals end a case; memory is limited to what is there and `_MEMORY_BYTES`."""

    def slow(*_: Any) -> None:
        raise _TooSlow(f"more than {_CPU_SECONDS:g} s of processor time")

    handlers = {number: signal.signal(number, slow) for number in (signal.SIGPROF, signal.SIGALRM)}
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    taken = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line)
    limit = int(taken.split()[1]) * 1024 + _MEMORY_BYTES
    resource.setrlimit(
        resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        for number, handler in handlers.items():
            signal.signal(number, handler)


def fuzz(text: str | None, title: str, attack: Callable[[Target, int], Figures]) -> int:
    """The command line: `attack` every target that is asked for; the exit code. text: of the help."""
    parser = make_parser(text)
    parser.add_argument("--cases", type=int, default=10_000, help="for each target")
    parser.add_argument("--only", metavar="NAME", action="append", help="this target alone; may be repeated")
    arguments = parser.parse_args()
    known = {target.name: target for target in targets()}
    for name in arguments.only or ():
        if name not in known:
            parser.error(f"--only: got {name!r}, allowed: {', '.join(known)}")
    cases = 300 if arguments.quick else arguments.cases
    found = [attack(known[name], cases) for name in arguments.only or known]
    rows = [(f.target, f.cases, f.accepted, f.refused, f.failed, f.seconds) for f in found]
    columns = ("target", "cases", "accepted", "refused", "failures", "s")
    publish(title, columns, rows, {"targets": [asdict(f) for f in found]}, arguments)
    failures = [item for figures in found for item in figures.failures.items()]
    for what, reproduced in failures:
        print(f"\nFAILED {what}\n  {reproduced}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(fuzz(__doc__, "hostile files", attack))
