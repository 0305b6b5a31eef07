"""Every method of the family on the demo's task: is it the paper's, is it exact, and does it learn?

    python tools/bench_family.py [--json FILE] [--quick] [--only fzoo,lowrank]

A row is a method in a stored form. `difference`: the largest difference of our moves from a float64
reference written from the paper (`tests/family.py`), relative to a step's largest move; of a space, its
noise's or product's as well. `resumed`: a run that is killed between two checkpoints and goes on has the same
bytes as one that was never stopped (of dp, whose further noise is another one, that it goes on). `replayed`:
its journal alone makes the same bytes. `planned`: the peak that was planned over the one measured, in a
process of its own. Losses are of the test examples, before and after. With --quick runs are shorter and forks
of one process, as many at once as there are cores, and a method has one stored form.
"""

from __future__ import annotations

import forked  # first: it sets the number of threads before torch is imported

# isort: split
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from reporting import make_parser, publish

sys.path.insert(0, str(Path(__file__).parents[1]))

from hizoo_lite.config import DEMO, TrainConfig
from hizoo_lite.export.quantize import Quantization
from hizoo_lite.registry import ESTIMATORS, SPACES
from hizoo_lite.train import checkpoint
from tests import family

#: Settings of every run, beside those of the method.
SHARED: dict[str, Any] = {
    "task": "embedded",
    "data": "embedded",
    "device": "cpu",
    "threads": 1,
    "max_length": 32,
    "save_every": 10,
    "hidden_states": "off",
}
#: Of a run: forwards, and examples that it is evaluated on.
FULL, QUICK = (240, 300), (24, 40)
#: Stored forms; with --quick each method has one of them, in turns.
BITS = ("nf4", "int8")
#: Bytes in front of a journal's records.
HEADER = 32


class Method(NamedTuple):
    """Settings on the command line, and the noise whose reference its space has."""

    settings: dict[str, Any]
    noise: str = ""


METHODS = {
    "hizoo": Method({"estimator": "hizoo"}),
    "mezo": Method({"estimator": "mezo", "lr": 1e-2}),
    "mezo, 4 directions": Method({"estimator": "mezo", "lr": 1e-2, "directions": 4}),
    "kerzoo": Method({"estimator": "kerzoo", "lr": 1e-2}),
    "fzoo": Method({"estimator": "fzoo", "lr": 3e-3}),
    "grzo": Method({"estimator": "grzo", "lr": 3e-3}),
    "dp": Method({"estimator": "dp", "lr": 1e-2, "dp_noise": 0.5}),
    "dense": Method({"space": "dense"}),
    "lowrank": Method({"space": "lowrank"}, "lowrank"),
    "lowrank, momentum": Method({"space": "lowrank", "momentum": 0.9}, "lowrank, momentum"),
    "subspace": Method({"space": "subspace"}, "subspace"),
    "small": Method({"space": "small"}, "small"),
    "sparse": Method({"space": "sparse"}, "sparse"),
    "mazo": Method({"space": "mazo"}, "mazo"),
    "scales": Method({"space": "scales"}),
}


def config_of(method: Method, model: str, out: Path, steps: int) -> TrainConfig:
    """The configuration of a run."""
    return TrainConfig(**{**SHARED, **method.settings, "model": model, "out": str(out), "steps": steps})


def row(name: str, bits: str, stored: Path, folder: Path, quick: bool) -> dict[str, Any]:
    """Train, stop, resume and replay a method."""
    method, straight, killed = METHODS[name], folder / "straight", folder / "killed"
    bench, (budget, examples) = forked.Bench(folder, 0), QUICK if quick else FULL
    method = method._replace(settings={**method.settings, "test_examples": examples})
    estimator: Any = ESTIMATORS.configured(config_of(method, str(stored), straight, 1))
    forwards = len(estimator.points(0))
    steps = max(4, budget // forwards)
    train(bench, method, stored, straight, steps, quick)
    summary = json.loads((straight / "summary.json").read_text())
    stop_between(straight, killed, steps)
    resumed = bench.call(["train", "--quiet", "--resume", "--out", str(killed)])
    same = resumed.code == 0 and (
        estimator.secret or not forked.difference(killed, forked.contents(straight))
    )
    replayed = bench.call(["replay", str(straight), "--step", str(steps), "--out", str(folder / "replayed")])
    shutil.rmtree(folder)
    return {
        "method": name,
        "estimator": estimator.name,
        "space": method.settings.get("space", next(iter(SPACES))),
        "bits": bits,
        "reference_max_difference": reference(method, estimator),
        "resume_equal": same,
        "replay_equal": replayed.code == 0,
        "planned_over_measured": summary["predicted_peak_bytes"] / summary["measured_peak_bytes"],
        "loss_before": summary["loss_before"],
        "loss_after": summary["loss_after"],
        "metric_after": summary["metric_after"],
        "forwards": forwards * steps,
        "seconds_per_step": summary["seconds_per_step"],
    }


def train(bench: forked.Bench, method: Method, stored: Path, out: Path, steps: int, quick: bool) -> None:
    """A run from its start to its end, in a process of its own, or in a fork of this one."""
    settings = {**SHARED, **method.settings, "model": stored, "steps": steps, "out": out}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    if quick:
        code, message = bench.call(["train", "--quiet", *flags])
    else:
        command = [sys.executable, "-m", "hizoo_lite.cli", "train", "--quiet", *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        code, message = done.returncode, done.stderr
    if code:
        raise SystemExit(f"{method.settings}: {message}")


def stop_between(straight: Path, killed: Path, steps: int) -> None:
    """What a run leaves that is killed half way to its end, behind a checkpoint and before the next one."""
    shutil.copytree(straight, killed)
    shutil.rmtree(killed / "adapter")
    last = steps - max(steps // 2, 1)
    for path in checkpoint.every(killed / "checkpoints"):
        if checkpoint.steps_of(path) > last:
            shutil.rmtree(path)
    data = (killed / "journal.bin").read_bytes()
    (killed / "journal.bin").write_bytes(data[: HEADER + (len(data) - HEADER) * last // steps])
    (killed / "summary.json").unlink()


def reference(method: Method, estimator: Any) -> float | None:
    """The larger difference of the estimator's moves and of the space's noise."""
    if estimator.secret:
        return None  # its noise is nobody's to know: tests/test_dp.py
    found = [family.difference(estimator)]
    if method.noise:
        found.append(family.NOISES[method.noise]())
    return max(found)


def _shown(difference: float | None) -> str:
    return "-" if difference is None else f"{difference:.1e}"


def made(names: list[str], scratch: Path, quick: bool) -> list[dict[str, Any]]:
    """The rows of these methods, told as they are made."""
    os.environ["HIZOO_LITE_REPORT"] = "0"  # each run would have its page drawn
    work = []
    for number, bits in enumerate(BITS):
        stored = scratch / bits
        Quantization(DEMO, stored, kind="causal", bits=bits, double_quant=False).run()
        for name in names[number :: len(BITS)] if quick else names:
            folder = scratch / f"{name} {bits}"
            folder.mkdir()
            work.append((name, bits, stored, folder, quick))
    rows = []
    with ProcessPoolExecutor(os.cpu_count() if quick else 1, multiprocessing.get_context("fork")) as pool:
        for found in pool.map(row, *zip(*work, strict=True)):
            rows.append(found)
            print(json.dumps(found), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """See the module."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", default="", help="methods with commas (default: all)")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(METHODS)
    with tempfile.TemporaryDirectory() as scratch:
        rows = made(names, Path(scratch), arguments.quick)
    columns = [
        "method",
        "bits",
        "difference",
        "resumed",
        "replayed",
        "planned",
        "loss",
        "accuracy",
        "forwards",
    ]
    shown = [
        [
            found["method"], found["bits"], _shown(found["reference_max_difference"]),
            "equal" if found["resume_equal"] else "DIFFERS", "equal" if found["replay_equal"] else "DIFFERS",
            f"{found['planned_over_measured']:.3f}",
            f"{found['loss_before']:.3f} -> {found['loss_after']:.3f}",
            f"{100 * found['metric_after']:.1f} %", found["forwards"],
        ]
        for found in rows
    ]  # fmt: skip
    figures = {
        "rows": rows,
        "planned_over_measured": statistics.median(found["planned_over_measured"] for found in rows),
    }
    publish("The family on the demo's task", columns, shown, figures, arguments)


if __name__ == "__main__":
    main()
