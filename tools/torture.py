"""Runs are killed, starved and confused, and must go on to the very bytes of a run that was left alone.

    python tools/torture.py [--quick] [--json FILE] [--kills 50] [--only PART ...] [--seed 0] [--folder DIR]

Kills: in each mode (lora resident, lora streamed from disk, dense, scales) runs of the embedded model are
killed with SIGKILL at random moments and resumed, until so many kills were made; every run is then led to its
end, and its adapter, journal, newest checkpoint and metrics (without times) are compared with those of a run
that nobody disturbed. Half of the moments lie anywhere between the start of the process and the usual end,
the other half within the time of a few steps after the first new record of the journal.

A process that imports everything takes seconds to start. So this one imports the libraries once, computes
nothing, and forks a child for each run, which calls the command line's `main`: what is killed is a whole
process with its own model, threads and files. Some kills are of processes that were started from nothing.

Faults: signals, a full disk (a small tmpfs, filled up to so many KiB; needs root), a read-only folder, losses
that are not finite, refused memory, a clock that jumps back, two runs in one folder, other data, damaged
files. Survived: the exit code is the documented one, the message says what to do, and `--resume` ends in the
same bytes. At the end the journal's cost is measured, against a step of the demo (batch 16, 64 tokens).

JSON: {"kills", "equal", "runs", "modes", "faults": [{"fault", "survived", "message"}], "journal"}. Exit code
1 where anything was not as it should be.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # children are forked: no thread may be running here

import contextlib
import json
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from reporting import make_parser, publish

from hizoo_lite.cli import main
from hizoo_lite.quant.quantize import Quantization
from hizoo_lite.spaces import LoRA
from hizoo_lite.stream.traversal import Traversal
from hizoo_lite.train import (
    checkpoint,
    fit,  # noqa: F401 - imported before the forks
    journal,
)
from hizoo_lite.train.folder import RunFolder
from hizoo_lite.train.parts import DEMO
from hizoo_lite.train.step import Stepper

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
_FRESH_PART = 0.05  # of the kills, of processes started from nothing


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


# ----------------------------------------------------------------------------------------------- kills


class Undisturbed(NamedTuple):
    """A run that was left alone."""

    contents: dict[str, bytes]
    seconds: float  # of its process
    step_seconds: float


def undisturbed(bench: Bench, mode: str) -> Undisturbed:
    """Take such a run."""
    out, began = bench.new(), time.monotonic()
    ended = bench.call(bench.train(out, mode))
    if ended.code != 0:
        raise SystemExit(f"{mode}: a run that nobody disturbed failed: {ended.message}")
    seconds = time.monotonic() - began
    steps = [line["seconds"] for line in RunFolder(out).read_metrics() if line["kind"] == "step"]
    return Undisturbed(contents(out), seconds, statistics.median(steps))


def killed(bench: Bench, out: Path, mode: str, reference: Undisturbed) -> bool:
    """Start or resume a run and kill it at a random moment; False where it was over before that."""
    if bench.random.random() < _FRESH_PART:
        return _killed_fresh(bench, out, mode)
    child = bench.start(bench.train(out, mode))
    path = out / "journal.bin"
    deadline = time.monotonic() + bench.random.uniform(0, reference.seconds)
    if bench.random.random() < 0.5:  # not before there is a new record
        begun = path.stat().st_size if path.is_file() else 32
        await_bytes(child, path, begun + 1)
        deadline = time.monotonic() + bench.random.uniform(0, 8 * reference.step_seconds)
    while time.monotonic() < deadline and not _over(child):
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)  # where it is over it is still to be waited for, and this does nothing
    return bench.wait(child).code == -signal.SIGKILL


def _over(child: int) -> bool:
    """Whether a child has ended; it is left to be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _killed_fresh(bench: Bench, out: Path, mode: str) -> bool:
    """The same with a process of its own, after it has begun to write."""
    command = [sys.executable, "-m", "hizoo_lite.cli", *bench.train(out, mode)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        path = out / "journal.bin"
        begun = path.stat().st_size if path.is_file() else 32
        while process.poll() is None and not (path.is_file() and path.stat().st_size > begun):
            time.sleep(0.01)
        time.sleep(bench.random.uniform(0, 0.2))
        process.kill()
        return process.wait() == -signal.SIGKILL


def torture(bench: Bench, mode: str, reference: Undisturbed, kills: int) -> dict[str, Any]:
    """So many kills in a mode, spread over as many runs as it takes."""
    made = equal = runs = 0
    found: list[str] = []
    while made < kills:
        out = bench.new()
        here = 0
        while made < kills and killed(bench, out, mode, reference):
            made, here = made + 1, here + 1
        ended = bench.call(bench.train(out, mode))
        wrong = ended.message if ended.code != 0 else difference(out, reference.contents)
        found += [f"{out.name}: {wrong}"] if wrong else []
        runs, equal = runs + 1, equal + (here if not wrong else 0)
        if not wrong:
            shutil.rmtree(out)
    return {"mode": mode, "kills": made, "equal": equal, "runs": runs, "differs": found}


# ---------------------------------------------------------------------------------------------- faults


class Fault(NamedTuple):
    """What happened to a run under a fault."""

    fault: str
    survived: bool
    message: str


Check = Callable[["Bench", dict[str, bytes]], Fault]
MODE = "lora resident"


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


def await_steps(child: int, out: Path, steps: int) -> None:
    """Until a child's journal has so many records of three branches, or the child has ended."""
    await_bytes(child, out / "journal.bin", 32 + steps * journal.record_bytes(3))


def await_bytes(child: int, path: Path, size: int) -> None:
    """Until a file has so many bytes, or the child has ended."""
    while not (path.is_file() and path.stat().st_size >= size) and not _over(child):
        time.sleep(0.002)


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

    Traversal._losses = losses  # type: ignore[method-assign]


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

        def losses(self: Traversal, batch: Any, *rest: Any) -> Any:
            found = calls(self, batch, *rest)
            return (
                found._replace(per_example=found.per_example * value) if rest and now[0] in steps else found
            )

        Stepper.step, Traversal.losses = step, losses  # type: ignore[method-assign]

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
    path = place / "filler"
    found = os.statvfs(place)
    os.posix_fallocate(
        os.open(path, os.O_CREAT | os.O_WRONLY), 0, found.f_bavail * found.f_frsize - left_bytes
    )
    return path


def full_disk(left_kib: int) -> Check:
    """The disk has so much room when the run begins, and enough when it is resumed."""

    def check(bench: Bench, wanted: dict[str, bytes]) -> Fault:
        with small_disk(bench) as place:
            out, filler = place / "run", fill(place, left_kib << 10)
            ended = bench.call(bench.train(out, MODE))
            filler.unlink()
            return resumed(bench, f"disk full, {left_kib} KiB free at the start", out, wanted, ended, 1)

    return check


def full_disk_of_export(bench: Bench, wanted: dict[str, bytes]) -> Fault:
    """An ONNX export onto a full disk, then onto one with room."""
    run = bench.new()
    bench.call(bench.train(run, MODE))
    with small_disk(bench) as place:
        filler = fill(place, 256 << 10)
        arguments = ["export", str(run), "--to", "onnx", "--out", str(place / "onnx")]
        ended = bench.call(arguments)
        left = sorted(path.name for path in place.iterdir())
        filler.unlink()
        after = bench.call(arguments)
    survived = ended.code in (1, 2) and left == ["filler"] and after.code == 0
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
    *(full_disk(left) for left in (8, 48, 80, 112, 144, 176, 240, 304)),
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


# --------------------------------------------------------------------------------------------- journal


def journal_cost(bench: Bench) -> dict[str, float]:
    """Bytes and seconds of a record, and the median step of the demo's model, batch 16."""
    out = bench.new()
    bench.call(
        bench.train(
            out, MODE, batch_size=16, max_length=64, steps=20, save_every=0, eval_every=0, keep="final"
        )
    )
    steps = [line["seconds"] for line in RunFolder(out).read_metrics() if line["kind"] == "step"]
    record = journal.read(out / "journal.bin")[0]
    count = 2000
    with journal.Journal(bench.folder / "journal.bin", 3) as file:
        began = time.perf_counter()
        for number in range(count):
            file.append(record._replace(step=number))
        seconds = (time.perf_counter() - began) / count
    step = statistics.median(steps)
    found = {"record_bytes": journal.record_bytes(3), "record_seconds": seconds, "step_seconds": step}
    return {**found, "share_of_a_step": seconds / step}


def run(bench: Bench, arguments: Any) -> dict[str, Any]:
    """All of it; the figures."""
    child = os.fork()
    if not child:  # the one computation that would otherwise be this process's own
        Quantization(DEMO, bench.stored, kind="causal", bits="nf4").run()
        os._exit(0)
    os.waitpid(child, 0)
    modes: list[dict[str, Any]] = []
    chosen = [mode for mode in MODES if mode in arguments.only]
    references = {mode: undisturbed(bench, mode) for mode in {MODE, *chosen}}
    for mode in chosen:
        modes.append(torture(bench, mode, references[mode], arguments.kills))
        print(f"{mode}: {modes[-1]}", file=sys.stderr, flush=True)
    checks = () if "faults" not in arguments.only else QUICK if arguments.quick else FAULTS
    found = list(faults(bench, checks, references[MODE].contents))
    return {
        "kills": sum(mode["kills"] for mode in modes),
        "equal": sum(mode["equal"] for mode in modes),
        "runs": sum(mode["runs"] for mode in modes),
        "modes": modes,
        "faults": [fault._asdict() for fault in found],
        "journal": journal_cost(bench),
    }


def command() -> int:
    """Parse, run, print; the exit code."""
    parser = make_parser(__doc__)
    parser.add_argument("--kills", type=int, help="in each mode (default: 50, quick 3)")
    parser.add_argument("--only", nargs="+", choices=[*MODES, "faults"], help="leave the others out")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where runs are made, and left (default: removed)")
    arguments = parser.parse_args()
    arguments.kills = arguments.kills or (3 if arguments.quick else 50)
    arguments.only = arguments.only or ([MODE, "faults"] if arguments.quick else [*MODES, "faults"])
    with contextlib.ExitStack() as open_things:
        folder = arguments.folder or Path(open_things.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        figures = run(Bench(folder, arguments.seed), arguments)
    rows = [[m["mode"], m["kills"], m["equal"], m["runs"]] for m in figures["modes"]]
    publish("SIGKILL at random moments", ["mode", "kills", "equal", "runs"], rows, figures, arguments)
    rows = [[f["fault"], "yes" if f["survived"] else "NO", f["message"]] for f in figures["faults"]]
    publish("Faults", ["fault", "survived", "message"], rows, figures, arguments)
    cost = figures["journal"]
    print(
        f"\njournal: {cost['record_bytes']} bytes and {1e6 * cost['record_seconds']:.0f} us a step, "
        f"{cost['share_of_a_step']:.3%} of a step of {1e3 * cost['step_seconds']:.1f} ms"
    )
    sound = figures["kills"] == figures["equal"] and all(f["survived"] for f in figures["faults"])
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(command())
