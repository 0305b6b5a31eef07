"""The run folder: config.toml, run.json, metrics.jsonl, journal.bin, checkpoints/, adapter/, summary.json
and others.

A folder is used for one run, by one process at a time. A new run refuses a folder with anything in it;
`--resume` continues the one that is there. Files are replaced as a whole (see `files.py`), metrics are
written line by line and flushed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hizoo_lite import locks
from hizoo_lite.config import TrainConfig
from hizoo_lite.errors import UserError
from hizoo_lite.files import parse_json, read_json, storage_errors, sync_file, temporary_path, write_text
from hizoo_lite.train import config_file

_NUMBER = (int, float, type(None))
#: What every line of metrics.jsonl has, by its kind.
_LINES: dict[str, dict[str, tuple[type, ...]]] = {
    "step": {"step": (int,), "skipped": (bool,), "forwards": (int,), "seconds": _NUMBER, "tokens": _NUMBER},
    "eval": {"step": (int,), "when": (str,)},
}


def next_free(name: str) -> Path:
    """`name`, or `name-2`, `name-3`, ... if that exists already."""
    path, number = Path(name), 2
    while path.exists():
        path, number = Path(f"{name}-{number}"), number + 1
    return path


def plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


class RunFolder:
    """The paths of one run and its small files.

    writes: False for a rank that is not the main one: nothing is written, evaluations are known all the same.
    """

    def __init__(self, path: Path | str, writes: bool = True) -> None:
        self.path, self.writes = Path(path), writes
        self._evaluations: list[dict[str, Any]] | None = None  # lines of metrics.jsonl, once they are read
        self._settings: TrainConfig | None = None  # of config.toml, as it was first read or last written
        self.adapter = self.path / "adapter"
        self.checkpoints = self.path / "checkpoints"
        self.data = self.path / config_file.OWN["data"]  # of a run whose rows were in memory
        self.task = self.path / config_file.OWN["task"]  # of one whose task was given as keys
        self.metrics = self.path / "metrics.jsonl"
        self.journal = self.path / "journal.bin"
        self._config = self.path / "config.toml"
        self._summary = self.path / "summary.json"
        self.identity = self.path / "run.json"
        self.plan = self.path / "plan.json"
        self.memory = self.path / "memory.json"
        self.predictions = self.path / "predictions.jsonl"
        self._left_out = self.path / "left_out.jsonl"

    def check_new(self) -> None:
        """UserError unless a run may begin here: no folder yet, or an empty one. The main rank asks."""
        if not self.writes or not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"--out: {self.path} is a file; allowed: a new or empty folder")
        if self._config.exists():
            raise UserError(
                f"--out: {self.path} holds a run already; allowed: a new or empty folder, or --resume"
            )
        if {path.name for path in self.path.iterdir()} - {temporary_path(self._config).name, locks.NAME}:
            raise UserError(f"--out: {self.path} is not empty; allowed: a new or empty folder")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While this is open, no other process runs in this folder, which is made if it is not there.

        UserError if one does, or the folder cannot be made. The system ends the lock with the process,
        however that ends.
        """
        if not self.writes:
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--out: {self.path} cannot be made: {error.strerror}; allowed: a folder that can be written"
            ) from error
        busy = f"--out: another process runs in {self.path}; wait for it, end it, or use another folder"
        with locks.held(self.path, busy):
            yield

    def config(self) -> TrainConfig:
        """The settings of the run that is here. UserError if there is none.

        Once read they stay: a rank still needs the old ones when the main one has written the new ones.
        """
        if self._settings is not None:
            return self._settings
        if not self._config.is_file():
            raise UserError(
                f"--resume: {self.path} holds no run (no config.toml); leave --resume out to begin one"
            )
        self._settings = config_file.read(self._config)
        return self._settings

    def create(self, config: TrainConfig) -> None:
        """Make the folder, if it is not there, and write the settings."""
        if not self.writes:
            return
        with storage_errors(self._config):
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self._config, config_file.write(config))
        self._settings = config

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every complete line of metrics.jsonl, in order. UserError if one is damaged."""
        if not self.metrics.is_file():
            return []
        lines = self.metrics.read_bytes().split(b"\n")
        return [self._parsed(number, line) for number, line in enumerate(lines[:-1], start=1)]

    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of evaluations, in order; the same on every rank."""
        if self._evaluations is None:
            self._evaluations = [line for line in self.read_metrics() if line["kind"] == "eval"]
        return self._evaluations

    def _parsed(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            found = parse_json(line)
            wanted = _LINES[found["kind"]]
            if all(isinstance(found.get(name), kinds) for name, kinds in wanted.items()):
                return found
        except (ValueError, TypeError, KeyError):
            pass
        raise UserError(f"{self.metrics}: line {number} is damaged; remove it and what follows, and --resume")

    def keep_metrics(self, step: int, *, ended: bool) -> None:
        """Drop what was recorded after `step` steps: a resumed run records it again.

        ended: the run has no more steps than that; its last evaluation is made again too.
        """
        kept = [
            line
            for line in self.read_metrics()
            if line["step"] + (line["kind"] == "step") <= step
            and not (ended and line.get("when") == "after" and line["step"] == step)
        ]
        self._evaluations = [line for line in kept if line["kind"] == "eval"]
        if not self.writes:
            return
        self._write_metrics(kept)

    def insert_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Add lines of steps where they belong. Non-finite numbers become null."""
        found = [*self.read_metrics(), *map(plain, lines)]
        self._write_metrics(sorted(found, key=lambda line: (line["step"], line["kind"] == "step")))

    def _write_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        with storage_errors(self.metrics):
            write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in lines))

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add a line; it is in the file when this returns. Non-finite numbers become null."""
        line = plain(record)
        if record["kind"] == "eval":
            self.evaluations().append(line)
        if not self.writes:
            return
        with storage_errors(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def write_predictions(self, when: str, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """What was predicted of each test example `when`, in place of what was before; how many steps in."""
        if not self.writes:
            return
        there = self.predictions.is_file()
        held = self.predictions.read_text(encoding="utf-8").splitlines() if there else []
        kept = [line for line in held if parse_json(line)["when"] != when]
        made = [json.dumps({"when": when, "step": step, **plain(line)}) for line in lines]
        with storage_errors(self.predictions):
            write_text(self.predictions, "".join(line + "\n" for line in [*kept, *made]))

    def sync_metrics(self) -> None:
        """Force what was appended to the disk."""
        if self.metrics.is_file():
            with storage_errors(self.metrics):
                sync_file(self.metrics)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replace summary.json."""
        self._write_json(self._summary, summary, indent=2)

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        """Replace plan.json."""
        self._write_json(self.plan, plan, indent=2)

    def write_memory(self, record: Mapping[str, Any]) -> None:
        """Replace memory.json."""
        self._write_json(self.memory, record)

    def write_identity(self, identity: Mapping[str, str]) -> None:
        """Replace run.json: `identity`, and the settings of config.toml that cannot change any more."""
        if self.writes:
            self._write_json(self.identity, {**identity, **config_file.lasting(self.config())}, indent=2)

    def write_left_out(self, examples: Sequence[tuple[str, str]]) -> None:
        """left_out.jsonl: where each example is that is not used, and why; no file if there is none."""
        if not self.writes or not examples:
            return
        lines = (json.dumps({"where": where, "why": why}, ensure_ascii=True) for where, why in examples)
        with storage_errors(self._left_out):
            write_text(self._left_out, "".join(line + "\n" for line in lines))

    def _write_json(self, path: Path, value: Mapping[str, Any], indent: int | None = None) -> None:
        if not self.writes:
            return
        with storage_errors(path):
            write_text(path, json.dumps(plain(value), indent=indent, allow_nan=False) + "\n")

    def read_summary(self) -> dict[str, Any]:
        """What `write_summary` wrote; empty if nothing was."""
        return read_json(self._summary, "the summary of a run") if self._summary.is_file() else {}
