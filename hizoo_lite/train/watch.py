"""A run watched by plain lines on stderr: where it is no terminal, with --quiet, and on a device."""

from __future__ import annotations

import sys
import time

from hizoo_lite.train.events import Listener
from hizoo_lite.train.step import StepRecord

#: Share of the newest loss in the one that is shown, and of the newest step in forwards a second.
_SMOOTH = 0.05
#: Seconds between two plain lines.
LINE_SECONDS = 10.0


class Watch(Listener):
    """The running means that every kind shows."""

    def __init__(self) -> None:
        self.label, self.total, self.done = "", 0, 0
        self.loss: float | None = None
        self.forwards_per_second: float | None = None
        self._last = time.perf_counter()

    def phase(self, label: str, total: int, done: int = 0) -> None:
        """Note what is counted from now on."""
        self.label, self.total, self.done = label, total, done
        self._last = time.perf_counter()

    def stepped(self, record: StepRecord) -> None:
        """Take in a step."""
        self.done += 1
        now = time.perf_counter()
        self.forwards_per_second = _mean(
            self.forwards_per_second, record.forwards / max(now - self._last, 1e-9)
        )
        self._last = now
        if not record.skipped:
            self.loss = _mean(self.loss, sum(record.losses) / len(record.losses))

    def advanced(self, units: int) -> None:
        """Take in examples of an evaluation."""
        self.done += units

    def state(self) -> str:
        """Loss and speed, as far as they are known."""
        parts = [] if self.loss is None else [f"loss {self.loss:.4f}"]
        parts += [] if self.forwards_per_second is None else [f"{self.forwards_per_second:.1f} forwards/s"]
        return ", ".join(parts)


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + _SMOOTH * (new - old)


class Lines(Watch):
    """A line every ten seconds of training, and every message."""

    def __init__(self) -> None:
        super().__init__()
        self._began = self._printed = time.perf_counter()
        self._first = 0

    def message(self, text: str) -> None:
        """A line on stderr."""
        print(text, file=sys.stderr, flush=True)

    def phase(self, label: str, total: int, done: int = 0) -> None:
        """Begin to count."""
        super().phase(label, total, done)
        self._began = self._printed = time.perf_counter()
        self._first = done

    def stepped(self, record: StepRecord) -> None:
        """Print now and then."""
        super().stepped(record)
        now = time.perf_counter()
        if now - self._printed >= LINE_SECONDS or self.done == self.total:
            self._printed = now
            left = (now - self._began) / (self.done - self._first) * (self.total - self.done)
            self.message(f"{self.label} {self.done}/{self.total}: {self.state()}, ETA {left:.0f} s")
