"""Data parallel runs on this machine: the same state on every rank, and what travels between them.

    python tools/bench_parallel.py [--quick] [--json FILE] [--steps N]

The embedded model is tuned by one process, and by 2 and 4 that torchrun starts (with --quick: 2), on the same
batches. Per number of ranks: whether all of them hold the same bits, the largest difference of a loss of a
branch from that of one process, the bytes a step that a rank hands over (`payload`), and what the loopback
interface carried in a step for all ranks together (`wire`, TCP and its answers included; the difference of a
long and a short run, so that starting up does not count; nothing else should use the interface meanwhile).

Below it what is expected of 8, 64 and 512 nodes, computed: the payload of every rank goes round a ring, each
hop of LATENCY seconds; `efficiency` is the step's time (--step-seconds) over that and the exchange. Beside it
the bytes of data parallel backpropagation: 2 (n - 1) / n times the gradients, in bf16, of all weights and of
LoRA alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from reporting import make_parser, publish

#: Seconds of a hop between two nodes: Ethernet with TCP, in a data centre.
LATENCY = 50e-6
#: Parameters of Llama-2-7B, and of its LoRA of rank 8 on query and value.
WEIGHTS, ADAPTER = 6_738_415_616, 4_194_304
#: Seconds of a step of it, NF4, 1 x 64 tokens, measured on 2 cores (tools/bench_stream.py).
STEP_SECONDS = 4.95


def child(folder: Path, steps: int) -> None:
    """One rank: train, then write the state and the bytes that were handed over."""
    from safetensors.torch import save_file

    from hizoo_lite.config import TrainConfig
    from hizoo_lite.run import fit

    config = TrainConfig(
        model="embedded", task="embedded", data="embedded", out=str(folder / "run"), steps=steps,
        batch_size=16, compute_dtype="float32", test_examples=4, device="cpu", threads=1,
    )  # fmt: skip
    run = fit(config)
    ranks = run.setup.stepper.ranks
    state = {name: value.clone() for name, value in run.setup.space.parameters.items()}
    state |= {k: v.clone() for k, v in run.setup.stepper.curvature.state_dict().items()}
    save_file(state, folder / f"state.{ranks.rank}")
    (folder / f"sent.{ranks.rank}").write_text(str(getattr(ranks, "sent_bytes", 0)))


def launch(count: int, folder: Path, steps: int) -> int:
    """Run `count` ranks to the end; the bytes that the loopback interface carried meanwhile."""
    folder.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] * (count > 1)
    before = _loopback()
    done = subprocess.run(
        [sys.executable, *launcher, __file__, "--child", str(folder), "--steps", str(steps)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return _loopback() - before


def _loopback() -> int:
    counters = psutil.net_io_counters(pernic=True)
    return next(value.bytes_sent for name, value in counters.items() if name.startswith("lo"))


def losses(folder: Path) -> list[list[float]]:
    """Of every branch in every step."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line["losses"] for line in lines if line["kind"] == "step"]


def measure(count: int, home: Path, steps: int, alone: list[list[float]]) -> dict[str, Any]:
    """One row of the table."""
    began = time.perf_counter()
    short = launch(count, home / f"{count}-short", steps // 4)
    long = launch(count, home / f"{count}", steps)
    folder = home / str(count)
    states = [(folder / f"state.{rank}").read_bytes() for rank in range(count)]
    sent = [int((home / name / "sent.0").read_text()) for name in (f"{count}-short", f"{count}")]
    more = steps - steps // 4
    difference = max(
        abs(a - b) for x, y in zip(losses(folder), alone, strict=True) for a, b in zip(x, y, strict=True)
    )
    return {
        "ranks": count,
        "identical": all(state == states[0] for state in states),
        "max_loss_difference": difference,
        "payload_bytes_a_step": (sent[1] - sent[0]) / more,
        "wire_bytes_a_step": (long - short) / more,
        "seconds": time.perf_counter() - began,
    }


def expected(nodes: int, payload: float, step_seconds: float) -> dict[str, Any]:
    """Of `nodes` nodes, computed."""
    exchange = (nodes - 1) * LATENCY
    share = 2 * (nodes - 1) / nodes * 2
    return {
        "nodes": nodes,
        "received_bytes_a_step": payload * (nodes - 1),
        "exchange_seconds": exchange,
        "efficiency": step_seconds / (step_seconds + exchange),
        "backprop_bytes_a_step": share * WEIGHTS,
        "backprop_lora_bytes_a_step": share * ADAPTER,
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--step-seconds", type=float, default=STEP_SECONDS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.steps)
        return
    steps = 40 if arguments.quick else arguments.steps
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        launch(1, home / "1", steps)
        alone = losses(home / "1")
        rows = [measure(count, home, steps, alone) for count in ([2] if arguments.quick else [2, 4])]
    table = [list(row.values()) for row in rows]
    later = [
        expected(nodes, rows[0]["payload_bytes_a_step"], arguments.step_seconds) for nodes in (8, 64, 512)
    ]
    publish(
        f"Ranks on one machine, {steps} steps of the embedded model",
        list(rows[0]),
        table,
        {"rows": rows, "expected": later},
        arguments,
    )
    what = f"a step of {arguments.step_seconds} s, hops of {LATENCY * 1e6:.0f} us"
    print(f"\nExpected of Llama-2-7B, {what} (computed):")
    for row in later:
        print("  " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()))


if __name__ == "__main__":
    main()
