"""The trainer beside onnxruntime against the one in torch: steps a second and peak memory of the same run.

    python tools/bench_edge.py [--quick] [--json FILE] [--steps N] [--threads N] [--rounds N]

The demo (embedded model, NF4, rank 8 on every linear layer, batch 16) is tuned for two steps and its training
graph exported; then the same run (same data, batches and noise) is made anew by each contender, in a fresh
process each time, in turns:

    edge             python -m hizoo_lite.edge train
    torch            hizoo-lite train, products in the dtype it chooses by itself
    torch float32    the same with float32 products, which are what the graph computes

Seconds are the median step's, of the medians of the rounds. Peaks are of the whole process, imports,
evaluation and checkpoints included, read from /proc every 5 ms: VmHWM, and RssAnon of it. `start` is the time
from the command to the run's first file. The last column is the largest difference of a step's losses from
those of torch float32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from reporting import make_parser, publish

from hizoo_lite.export.onnx_train.export import export_train
from hizoo_lite.run import fit
from hizoo_lite.train import config_file

EDGE, TORCH, FLOAT32 = "edge", "torch", "torch float32"
POLL_SECONDS = 0.005
#: Steps in front of those that are timed: first runs allocate.
WARM_UP = 5


def measure(steps: int, threads: int, rounds: int) -> dict[str, dict[str, float]]:
    """The figures of every contender."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = replace(
            config_file.read(config_file.find("demo")),
            out=str(folder / "run"), compute_dtype="float32", steps=2, test_examples=32, threads=threads,
        )  # fmt: skip
        run = fit(config)
        export_train(run.folder, folder / "graph", fresh=True)
        (folder / "run.toml").write_text(config_file.write(config), encoding="utf-8")
        wanted = ["--steps", str(steps)]
        train = ["-m", "hizoo_lite.cli", "train", "--config", str(folder / "run.toml"), "--quiet", *wanted]
        commands = {
            EDGE: ["-m", "hizoo_lite.edge", "train", str(folder / "graph"), *wanted],
            TORCH: [*train, "--compute-dtype", "auto"],
            FLOAT32: train,
        }
        found: dict[str, list[dict[str, Any]]] = {contender: [] for contender in commands}
        for turn in range(rounds):
            for contender, command in commands.items():
                out = folder / f"{contender.replace(' ', '-')}-{turn}"
                found[contender].append(_measured([*command, "--out", str(out)], out))
    reference = found[FLOAT32][0]["losses"]
    return {contender: _figures(runs, reference) for contender, runs in found.items()}


def _measured(command: list[str], out: Path) -> dict[str, Any]:
    """One run in a process of its own."""
    peak_bytes = anon_bytes = 0
    first_step = None
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=log, text=True, env=os.environ
        )
        while process.poll() is None:
            now = _status(process.pid)
            peak_bytes = max(peak_bytes, now.get("VmHWM", 0))
            anon_bytes = max(anon_bytes, now.get("RssAnon", 0))
            if first_step is None and (out / "journal.bin").is_file():
                first_step = time.perf_counter() - began
            time.sleep(POLL_SECONDS)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}\n{log.read()}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    taken = [line for line in lines if line["kind"] == "step"]
    return {
        "seconds": statistics.median(line["seconds"] for line in taken[WARM_UP:]),
        "start_seconds": first_step,
        "peak_bytes": peak_bytes,
        "peak_anon_bytes": anon_bytes,
        "losses": [line["losses"] for line in taken],
    }


def _status(pid: int) -> dict[str, int]:
    """Bytes by name, of a process; empty once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = [line.split() for line in lines if line.startswith(("VmHWM", "RssAnon"))]
    return {name.rstrip(":"): int(value) * 1024 for name, value, _ in pairs}


def _figures(runs: list[dict[str, Any]], reference: list[list[float]]) -> dict[str, float]:
    differences = [
        abs(ours - theirs)
        for run in runs
        for got, want in zip(run["losses"], reference, strict=True)
        for ours, theirs in zip(got, want, strict=True)
    ]
    seconds = statistics.median(run["seconds"] for run in runs)
    return {
        "steps_per_second": 1 / seconds,
        "step_seconds": seconds,
        "start_seconds": statistics.median(run["start_seconds"] for run in runs),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "peak_anon_bytes": max(run["peak_anon_bytes"] for run in runs),
        "largest_loss_difference": max(differences),
    }


def report(arguments: argparse.Namespace) -> None:
    """Measure, print the table and write the figures."""
    steps, rounds = (20, 1) if arguments.quick else (arguments.steps, arguments.rounds)
    found = measure(steps, arguments.threads, rounds)
    rows = [
        [
            contender,
            f"{values['steps_per_second']:.1f}",
            f"{1e3 * values['step_seconds']:.1f}",
            f"{values['start_seconds']:.1f}",
            f"{values['peak_bytes'] / 2**20:.0f}",
            f"{values['peak_anon_bytes'] / 2**20:.0f}",
            f"{values['largest_loss_difference']:.1e}",
        ]
        for contender, values in found.items()
    ]
    title = (
        f"The embedded model, NF4, {steps} steps, {arguments.threads} thread(s), median of {rounds} rounds"
    )
    columns = ["", "steps/s", "ms a step", "start, s", "VmHWM, MiB", "RssAnon, MiB", "losses apart"]
    publish(title, columns, rows, {"steps": steps, "rounds": rounds, "contenders": found}, arguments)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="the demo is too small for more")
    report(parser.parse_args())


if __name__ == "__main__":
    main()
