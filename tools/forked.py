"""Runs of the embedded model in forked children, and what must be the same of two of them.

Used by `torture.py`: a process that imports everything takes seconds to start, a fork of one that has
imported it does not.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # children are forked: no thread may be running here

import contextlib
import json
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hizoo_lite.run  # noqa: F401 - imported before the forks
from hizoo_lite.cli import main
from hizoo_lite.train import checkpoint
from hizoo_lite.train.folder import RunFolder

STEPS = 40
#: A run that is over in a second or two and has checkpoints, evaluations and a best state on its way.
SETTINGS: dict[str, Any] = {
    "model": "embedded",
    "task": "embedded",
    "data": "embedded",
    "device": "cpu",
    "threads": 1,
    "steps": STEPS,
    "batch_size": 4,
    "max_length": 32,
    "rank": 2,
    "lr": 1e-3,
    "train_examples": 40,
    "dev_examples": 6,
    "test_examples": 8,
    "eval_every": 10,
    "save_every": 7,
    "save_total_limit": 2,
}
MODES: dict[str, dict[str, Any]] = {
    "lora resident": {"keep": "best", "lr": "auto"},
    "lora from disk": {"model": "STORED", "residency": "disk", "curvature": "diagonal"},
    "dense": {"space": "dense", "lr": 1e-4},
    "scales": {"space": "scales", "lr": 1e-4, "curvature": "factored"},
}
#: What a metrics line has of time and of memory.
_MEASURED = ("seconds", "inference_peak_bytes")
#: The mode that faults are tried in.
MODE = "lora resident"


class Ended(NamedTuple):
    """How a child ended."""

    code: int  # negative: the signal
    message: str  # the last line that its user saw


class Bench:
    """The folder of everything, and how children are started in it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.stored = folder / "stored"
        self._log = folder / "log"
        self._count = 0

    def new(self) -> Path:
        """A run folder that is not there yet."""
        self._count += 1
        return self.folder / f"run-{self._count}"

    def train(self, out: Path, mode: str, **changes: Any) -> list[str]:
        """The command line of a run in some mode; of its continuation where it is there."""
        if (out / "config.toml").is_file() and not changes:
            return ["train", "--quiet", "--resume", "--out", str(out)]
        settings = {**SETTINGS, **MODES[mode], "out": str(out), **changes}
        if settings["model"] == "STORED":
            settings["model"] = str(self.stored)
        flags = [text for name, value in settings.items() for text in (_flag(name), str(value))]
        return ["train", "--quiet", *flags, *(["--resume"] if (out / "config.toml").is_file() else [])]

    def start(self, arguments: list[str], prepare: Callable[[], None] | None = None) -> int:
        """Fork a child that runs the command; its process id. `prepare` is called in it first."""
        child = os.fork()
        if child:
            return child
        code = 70
        try:
            descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            if prepare is not None:
                prepare()
            sys.argv = ["hizoo-lite", *arguments]
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def wait(self, child: int) -> Ended:
        """Until the child has ended."""
        _, status = os.waitpid(child, 0)
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        wanted = [line for line in lines if line.startswith(("error:", "interrupted;"))]
        first = lines.index(wanted[-1]) if wanted else len(lines) - 1
        return Ended(os.waitstatus_to_exitcode(status), " ".join(map(str.strip, lines[first:])))

    def call(self, arguments: list[str], prepare: Callable[[], None] | None = None) -> Ended:
        """A command from its start to its end."""
        return self.wait(self.start(arguments, prepare))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def contents(run: Path) -> dict[str, bytes]:
    """What must be the same of two runs: adapter, journal, newest checkpoint, metrics without times."""
    folder = RunFolder(run)
    newest = checkpoint.newest(folder.checkpoints)
    assert newest is not None, run
    files = [path for top in (folder.adapter, newest) for path in sorted(top.rglob("*")) if path.is_file()]
    found = {str(path.relative_to(run)): path.read_bytes() for path in [*files, folder.journal]}
    lines = [{k: v for k, v in line.items() if k not in _MEASURED} for line in folder.read_metrics()]
    return {**found, "metrics": json.dumps(lines).encode()}


def difference(run: Path, wanted: dict[str, bytes]) -> str:
    """The names of what differs; empty where all is the same."""
    found = contents(run)
    return ", ".join(sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n)))


def await_steps(child: int, out: Path, steps: int) -> None:
    """Until a child's journal has so many records, or the child has ended."""
    path = out / "journal.bin"
    await_bytes(child, path, 32)  # the header, which has a record's size
    size = int.from_bytes(path.read_bytes()[12:16], "little") if path.is_file() else 0
    await_bytes(child, path, 32 + steps * size)


def await_bytes(child: int, path: Path, size: int) -> None:
    """Until a file has so many bytes, or the child has ended."""
    while not (path.is_file() and path.stat().st_size >= size) and not over(child):
        time.sleep(0.002)


def over(child: int) -> bool:
    """Whether a child has ended; it is left to be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
