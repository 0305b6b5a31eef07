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

import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from faults import FAULTS, QUICK, faults
from forked import MODE, MODES, Bench, await_bytes, contents, difference, over
from reporting import make_parser, publish

from hizoo_lite.config import DEMO
from hizoo_lite.export.quantize import Quantization
from hizoo_lite.train import journal
from hizoo_lite.train.folder import RunFolder

_FRESH_PART = 0.05  # of the kills, of processes started from nothing


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
    while time.monotonic() < deadline and not over(child):
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)  # where it is over it is still to be waited for, and this does nothing
    return bench.wait(child).code == -signal.SIGKILL


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


def journal_cost(bench: Bench) -> dict[str, float]:
    """Bytes and seconds of a record, and the median step of the demo's model, batch 16.

    `exact_bytes` of a record are gradients of the label rows, which a replay needs.
    """
    out = bench.new()
    bench.call(
        bench.train(
            out, MODE, batch_size=16, max_length=64, steps=20, save_every=0, eval_every=0, keep="final"
        )
    )
    steps = [line["seconds"] for line in RunFolder(out).read_metrics() if line["kind"] == "step"]
    record = journal.read(out / "journal.bin")[0]
    count = 2000
    form = journal.Form(len(record.losses), len(record.coefficients), len(record.exact) // 4)
    with journal.Journal(bench.folder / "journal.bin", *form) as file:
        began = time.perf_counter()
        for number in range(count):
            file.append(record._replace(step=number))
        seconds = (time.perf_counter() - began) / count
    step = statistics.median(steps)
    size = {"record_bytes": journal.record_bytes(*form), "exact_bytes": len(record.exact)}
    return {**size, "record_seconds": seconds, "step_seconds": step, "share_of_a_step": seconds / step}


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
