"""What else can happen to a run than to be killed: the faults of `torture.py`, one function each.

A check makes a run of `MODE` that something happens to, leads it to its end, and compares the bytes with
those of a run that was left alone.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from forked import MODE, STEPS, Bench, Ended, await_steps, contents, difference

from hizoo_lite.config import DEMO
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.spaces import LoRA
from hizoo_lite.train import checkpoint
from hizoo_lite.train.folder import RunFolder
from hizoo_lite.train.step import Stepper


class Fault(NamedTuple):
    """What happened to a run under a fault."""

    fault: str
    survived: bool
    message: str


Check = Callable[[Bench, dict[str, bytes]], Fault]


def resumed(bench: Bench, name: str, out: Path, wanted: dict[str, bytes], ended: Ended, code: int) -> Fault:
    """A run ended with `code`; it must go on to the same bytes."""
    after = bench.call(bench.train(out, MODE))
    wrong = after.message if after.code != 0 else difference(out, wanted)
    if ended.code != code:
        return Fault(name, False, f"exit code {ended.code} instead of {code}: {ended.message}")
    return Fault(name, not wrong, ended.message if not wrong else f"{ended.message}; then: {wrong}")


def by_signal(number: signal.Signals, code: int) -> Check:
    """A signal in the middle of the steps."""

    def check(bench: Bench, wanted: dict[str, bytes]) -> Fault:
        out = bench.new()
        child = bench.start(bench.train(out, MODE))
        await_steps(child, out, 12)
        os.kill(child, number)
        ended = bench.wait(child)
        if number == signal.SIGKILL:
            ended = Ended(ended.code, "(none: the process is gone)")
        return resumed(bench, number.name, out, wanted, ended, code)

    return check


def at_step(number: int, error: Callable[[], BaseException], where: str) -> Callable[[], None]:
    """Makes a method of `Stepper` fail in that step, once."""
    plain = getattr(Stepper, where)

    def failing(self: Stepper, step: Any, *rest: Any) -> Any:
        if step == number:
            raise error()
        return plain(self, step, *rest)

    return lambda: setattr(Stepper, where, failing)


def in_child(name: str, prepare: Callable[[], None], code: int) -> Check:
    """A run whose process was prepared to fail."""

    def check(bench: Bench, wanted: dict[str, bytes]) -> Fault:
        out = bench.new()
        return resumed(bench, name, out, wanted, bench.call(bench.train(out, MODE), prepare), code)

    return check


def full_at_journal() -> None:
    """The disk refuses the twelfth write to the journal, after half of its bytes."""
    plain, calls = os.pwrite, [0]

    def narrow(file: int, data: bytes, offset: int) -> int:
        calls[0] += 1
        if calls[0] == 12:
            return plain(file, data[: len(data) // 2], offset)
        if calls[0] > 12:
            raise OSError(28, "No space left on device")
        return plain(file, data, offset)

    os.pwrite = narrow  # type: ignore[assignment]


def refusing_saves(first: int) -> Callable[[], None]:
    """The disk refuses adapters from the given one on; that of the start is the first."""

    def prepare() -> None:
        plain, calls = LoRA.save, [0]

        def save(self: LoRA, folder: Path | str) -> None:
            calls[0] += 1
            plain(self, folder)
            if calls[0] >= first:
                raise OSError(28, "No space left on device", str(folder))

        LoRA.save = save  # type: ignore[method-assign]

    return prepare


def starved() -> None:
    """From the ninth pass on a GiB more is wanted than the process gets (RLIMIT_DATA)."""
    import torch  # not before `forked` has said how many threads

    plain, calls = Traversal._losses, [0]

    def losses(self: Traversal, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] > 8:
            resource.setrlimit(resource.RLIMIT_DATA, (1, resource.RLIM_INFINITY))
            try:
                torch.empty(1 << 28)
            finally:
                resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return plain(self, *arguments)

    Traversal._losses = losses  # type: ignore[assignment, method-assign]


def jumping_clock() -> None:
    """Both clocks go back by an hour now and then."""
    for name in ("time", "perf_counter"):
        plain, calls = getattr(time, name), [0]

        def now(plain: Callable[[], float] = plain, calls: list[int] = calls) -> float:
            calls[0] += 1
            return float(plain()) - 3600.0 * (calls[0] // 25)

        setattr(time, name, now)


def bad_losses(value: float, steps: range) -> Callable[[], None]:
    """The losses of some training batches are not finite."""

    def prepare() -> None:
        plain, calls = Stepper.step, Traversal.losses
        now = [0]

        def step(self: Stepper, number: int, batch: Any) -> Any:
            now[0] = number
            return plain(self, number, batch)

        def losses(self: Traversal, batch: Any, *rest: Any, **named: Any) -> Any:
            found = calls(self, batch, *rest, **named)
            return (
                found._replace(per_example=found.per_example * value) if rest and now[0] in steps else found
            )

        Stepper.step, Traversal.losses = step, losses  # type: ignore[assignment, method-assign]

    return prepare


def few_bad_losses(bench: Bench, wanted: dict[str, bytes]) -> Fault:
    """Skipped and counted; a run that is stopped among them and resumed under the same ends the same."""
    out, again, prepare = bench.new(), bench.new(), bad_losses(float("nan"), range(10, 14))
    ended = bench.call(bench.train(out, MODE), prepare)
    child = bench.start(bench.train(again, MODE), prepare)
    await_steps(child, again, 12)
    os.kill(child, signal.SIGKILL)
    bench.wait(child)
    bench.call(bench.train(again, MODE), prepare)
    skipped = RunFolder(again).read_summary().get("skipped_steps")
    wrong = difference(again, contents(out))
    survived = ended.code == 0 and skipped == 4 and not wrong
    return Fault("four losses are NaN", survived, wrong or f"{skipped} steps skipped and counted")


def many_bad_losses(bench: Bench, wanted: dict[str, bytes]) -> Fault:
    """The run is stopped with everything saved, and goes on where losses are finite again."""
    out = bench.new()
    ended = bench.call(bench.train(out, MODE), bad_losses(float("inf"), range(10, STEPS)))
    summary = RunFolder(out).read_summary()
    after = bench.call(bench.train(out, MODE))
    survived = ended.code == 1 and summary.get("skipped_steps") == 20 and after.code == 0
    return Fault("losses stay infinite", survived, ended.message)


def two_runs(bench: Bench, wanted: dict[str, bytes]) -> Fault:
    """The second one is refused, the first one goes on."""
    out = bench.new()
    first = bench.start(bench.train(out, MODE))
    await_steps(first, out, 3)
    os.kill(first, signal.SIGSTOP)
    second = bench.call(bench.train(out, MODE))
    os.kill(first, signal.SIGCONT)
    ended = bench.wait(first)
    wrong = ended.message if ended.code != 0 else difference(out, wanted)
    return Fault("two runs in one folder", second.code == 2 and not wrong, wrong or second.message)


def other_data(bench: Bench, wanted: dict[str, bytes]) -> Fault:
    """Resumed with one changed training example."""
    out, data = bench.new(), bench.folder / "data"
    shutil.copytree(DEMO, data, dirs_exist_ok=True)
    arguments = bench.train(out, MODE, data=str(data))
    child = bench.start(arguments)
    await_steps(child, out, 12)
    os.kill(child, signal.SIGKILL)
    bench.wait(child)
    text = (data / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(text.replace(" the ", " a "))
    refused = bench.call(bench.train(out, MODE))
    (data / "train.jsonl").write_text(text)
    after = bench.call(bench.train(out, MODE))
    wrong = after.message if after.code != 0 else difference(out, wanted)
    return Fault("other data on --resume", refused.code == 2 and not wrong, wrong or refused.message)


def damaged_checkpoint(bench: Bench, wanted: dict[str, bytes]) -> Fault:
    """A flipped bit in the newest one: an older one and the journal make up for it."""
    out = bench.new()
    child = bench.start(bench.train(out, MODE))
    await_steps(child, out, 24)
    os.kill(child, signal.SIGKILL)
    bench.wait(child)
    newest = checkpoint.newest(out / "checkpoints")
    assert newest is not None
    path = newest / "adapter/adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    after = bench.call(bench.train(out, MODE))
    wrong = after.message if after.code != 0 else difference(out, wanted)
    told = [line for line in bench._log.read_text().splitlines() if "is damaged" in line]
    return Fault("a damaged checkpoint", not wrong and bool(told), wrong or told[0])


@contextlib.contextmanager
def small_disk(bench: Bench) -> Iterator[Path]:
    """A tmpfs of 16 MiB. OSError where this user may not mount one."""
    place = bench.folder / "small"
    place.mkdir(exist_ok=True)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], capture_output=True
    ).returncode:
        raise OSError("a tmpfs cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def fill(place: Path, left_bytes: int) -> Path:
    """A file that leaves so much room."""
    path = place / "loader"
    found = os.statvfs(place)
    size = found.f_bavail * found.f_frsize - left_bytes
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return path


def full_disk(left_kib: int) -> Check:
    """The disk has so much room when the run begins, and enough when it is resumed."""

    def check(bench: Bench, wanted: dict[str, bytes]) -> Fault:
        with small_disk(bench) as place:
            out, loader = place / "run", fill(place, left_kib << 10)
            ended = bench.call(bench.train(out, MODE))
            loader.unlink()
            return resumed(bench, f"disk full, {left_kib} KiB free at the start", out, wanted, ended, 1)

    return check


def full_disk_of_export(bench: Bench, wanted: dict[str, bytes]) -> Fault:
    """An ONNX export onto a full disk, then onto one with room."""
    run = bench.new()
    bench.call(bench.train(run, MODE))
    with small_disk(bench) as place:
        loader = fill(place, 256 << 10)
        arguments = ["export", str(run), "--to", "onnx", "--out", str(place / "onnx")]
        ended = bench.call(arguments)
        left = sorted(path.name for path in place.iterdir())
        loader.unlink()
        after = bench.call(arguments)
    survived = ended.code in (1, 2) and left == ["loader"] and after.code == 0
    wrong = "" if survived else f"left {left}, then exit code {after.code}: {after.message}; "
    return Fault("disk full at an ONNX export", survived, wrong + ended.message)


def read_only(bench: Bench, wanted: dict[str, bytes]) -> Fault:
    """A run is to begin, and to go on, where nothing can be written."""
    with small_disk(bench) as place:
        out = place / "run"
        child = bench.start(bench.train(out, MODE))
        await_steps(child, out, 12)
        os.kill(child, signal.SIGKILL)
        bench.wait(child)
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        begun = bench.call(bench.train(place / "other", MODE))
        ended = bench.call(bench.train(out, MODE))
        subprocess.run(["mount", "-o", "remount,rw", place], check=True)
        found = resumed(bench, "read-only folder", out, wanted, ended, 1)
    return found._replace(
        survived=found.survived and begun.code == 2, message=f"{begun.message} | {found.message}"
    )


QUICK: tuple[Check, ...] = (
    by_signal(signal.SIGKILL, -signal.SIGKILL),
    by_signal(signal.SIGTERM, 130),
    in_child("disk full at the journal", full_at_journal, 1),
    in_child("disk full at a checkpoint", refusing_saves(3), 1),
    in_child("memory refused in an update", at_step(9, MemoryError, "_learn"), 3),
    few_bad_losses,
    two_runs,
    other_data,
)
FAULTS: tuple[Check, ...] = (
    *QUICK,
    by_signal(signal.SIGINT, 130),
    in_child("disk full at the adapter", refusing_saves(9), 1),
    in_child("memory refused from the eighth pass on", starved, 3),
    in_child("clocks that jump back", jumping_clock, 0),
    many_bad_losses,
    damaged_checkpoint,
    read_only,
    *(full_disk(left) for left in (8, 48, 64, 80, 96, 112, 144, 176)),
    full_disk_of_export,
)


def faults(bench: Bench, chosen: tuple[Check, ...], wanted: dict[str, bytes]) -> Iterator[Fault]:
    """Each of them; one that cannot be made here is told, and counts as neither."""
    for check in chosen:
        try:
            found = check(bench, wanted)
        except OSError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        print(
            ("survived: " if found.survived else "NOT SURVIVED: ") + found.fault, file=sys.stderr, flush=True
        )
        yield found
