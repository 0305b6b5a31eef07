"""A step of a model that streams from disk under a hard memory cap, against the same model in memory.

    python tools/bench_stream.py [--quick] [--json FILE] [--shape llama-2-7b] [--layers N] [--cap-mib 850]
    python tools/bench_stream.py --device cuda --cap-gib 24 --shape llama-2-70b --rows 16 --length 256

A random NF4 checkpoint of a published shape is written (tools/make_random_model.py), or taken from --folder.
Processes of their own then take turns:

    resident          every block in memory
    streamed          two block slots, packed blocks, embedding and head from disk, page cache warm
    capped            the same under a hard cap of its private memory (RLIMIT_DATA), page cache cold at first
    folded, separate  one traversal for three branches, and three traversals for one each, of four tokens,
                      the page cache dropped before every pass, so that the disk decides

Each takes HiZOO steps with LoRA (rank 8, query and value) on the same batches and noise; the losses must be
bitwise the same. With --quick the model is small and the cap larger than its weights. On CUDA blocks stream
from page-locked host memory, and `resident` is left out where the model does not fit under --cap-gib.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from reporting import make_parser, publish

GPU_MEMORY_OF_ZO2_GB = {  # arXiv 2503.12668, table 2: batch 1, length 2048, fp16
    "opt-1.3b": 3.75, "opt-2.7b": 4.14, "opt-6.7b": 4.99, "opt-13b": 6.18,
    "opt-30b": 8.86, "opt-66b": 12.07, "opt-175b": 18.04,
}  # fmt: skip


# ---------------------------------------------------------------------------- one contender's process


def serve(arguments: Any) -> None:
    """Load, then take one step for every line on standard input.

    The peak on CPU is VmData: every private writable page asked for, an upper bound of anonymous memory.
    """
    contender, folder = arguments.serve
    if contender == "capped":
        cap = arguments.cap_mib << 20
        resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
    import torch

    from hizoo_lite.engine.load import load
    from hizoo_lite.engine.residency import Streamed
    from hizoo_lite.process import private_bytes

    cuda = arguments.device == "cuda"
    if cuda and arguments.cap_gib:
        share = arguments.cap_gib * 2**30 / torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))  # a card of 24 GB reports 23.6 GiB
    where = "resident" if contender == "resident" else "host" if cuda else "disk"
    model = load(
        folder, bits="nf4", compute_dtype=arguments.compute, device=arguments.device, residency=where
    )
    if contender == "capped":  # the checksums were compared: that has read every file
        drop_cache(Path(folder))
    rows, length = (1, 4) if contender in ("folded", "separate") else (arguments.rows, arguments.length)
    stepper = make_stepper(model)
    print(json.dumps("ready"), flush=True)
    for number, _ in enumerate(sys.stdin):
        batch = make_batch(number, rows, length, model.config.vocab_size)
        if contender in ("folded", "separate"):
            seconds = cold_passes(model, stepper, batch, Path(folder), contender)
            answer = {"seconds": seconds, "losses": []}
        else:
            waited = model.residency.waited_seconds if isinstance(model.residency, Streamed) else 0.0
            moved = model.residency.moved_bytes if isinstance(model.residency, Streamed) else 0
            start = time.perf_counter()
            record = stepper.step(number, batch)
            if cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            answer = {"seconds": seconds, "losses": record.losses, "weights_bytes": model.nbytes()}
            if isinstance(model.residency, Streamed):
                answer["waited"] = model.residency.waited_seconds - waited
                answer["moved"] = model.residency.moved_bytes - moved
        answer["peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else private_bytes()
        print(json.dumps(answer), flush=True)


def make_stepper(model: Any) -> Any:
    """HiZOO as published, three branches, with the grouped curvature on a LoRA of query and value."""
    from hizoo_lite import curvature, estimators
    from hizoo_lite.engine.traversal import Traversal
    from hizoo_lite.optimizers.step_size import FixedRate, Schedule
    from hizoo_lite.spaces.lora import LoRA
    from hizoo_lite.tensors import TorchArrays
    from hizoo_lite.train.step import Stepper

    space = LoRA(rank=8, train_a=True, blocks="all")
    space.attach(model, seed=0)
    return Stepper(
        Traversal(model), TorchArrays(model.device), space,
        estimators.get("hizoo", curvature_from="losses"), curvature.get("grouped"),
        FixedRate(Schedule("constant", 1e-6, 0, 1000)), seed=0, mu=1e-3,
        smoothing=Schedule("constant", 0.01, 0, 1000),
    )  # fmt: skip


def make_batch(number: int, rows: int, length: int, vocabulary: int) -> Any:
    """Random tokens; the loss is read at the last position of every row."""
    import torch

    from hizoo_lite.batch import Batch
    from hizoo_lite.noise import generator

    ids = torch.from_numpy(generator(number, "ids").integers(5, vocabulary, (rows, length)))
    one = torch.arange(rows)
    last = torch.full((rows,), length - 2)
    return Batch(ids, torch.ones_like(ids), None, one, last, one, ids[:, -1], one, one, one, "answer")


def cold_passes(model: Any, stepper: Any, batch: Any, folder: Path, contender: str) -> float:
    """Seconds of one folded traversal, or of three traversals of one branch, each from a cold page cache."""
    from hizoo_lite.branches import EVALUATION, Branches
    from hizoo_lite.noise import normal

    directions = {name: normal(0, 0, name, p.shape)[None] for name, p in stepper.space.parameters.items()}
    total = 0.0
    for _ in range(1 if contender == "folded" else 3):
        model.residency.close()  # also what the slots hold must be read again
        drop_cache(folder)
        start = time.perf_counter()
        if contender == "folded":
            stepper.traversal.losses(batch, Branches.of(), 1e-3, directions)
        else:
            stepper.traversal.losses(batch, EVALUATION)
        total += time.perf_counter() - start
    return total


def drop_cache(folder: Path) -> None:
    """Have the kernel forget the clean pages of the checkpoint's files."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


# --------------------------------------------------------------------------------------- the parent


class Contender:
    """A process that takes a step when it is asked to."""

    def __init__(self, name: str, folder: Path, options: list[str]) -> None:
        self.name = name
        self.answers: list[dict[str, Any]] = []
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", name, str(folder), *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != '"ready"':
            raise SystemExit(f"{name}: did not start")

    def ask(self) -> None:
        """One step."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: ended in the middle of a step")
        self.answers.append(json.loads(line))

    def median(self, key: str, first: int = 1) -> float:
        """Over the steps from `first` on; step 0 warms up."""
        return statistics.median(answer[key] for answer in self.answers[first:])

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def take_turns(names: list[str], folder: Path, options: list[str], rounds: int) -> dict[str, Contender]:
    """Every contender takes `rounds` steps after a first one, in turns."""
    found: dict[str, Contender] = {}
    try:
        for name in names:
            found[name] = Contender(name, folder, options)
        for _ in range(rounds + 1):
            for contender in found.values():
                contender.ask()
    finally:
        for contender in found.values():
            contender.end()
    return found


def measure(folder: Path, arguments: Any, rounds: int) -> tuple[dict[str, Any], list[list[Any]]]:
    """The figures and the rows of the table."""
    options = ["--device", arguments.device, "--rows", str(arguments.rows), "--length", str(arguments.length)]
    options += ["--compute", arguments.compute, "--cap-mib", str(arguments.cap_mib)]
    options += ["--cap-gib", str(arguments.cap_gib)] if arguments.cap_gib else []
    cuda = arguments.device == "cuda"
    fits = not cuda or folder_bytes(folder) < (arguments.cap_gib or 1e9) * 2**30
    steps = take_turns((["resident"] if fits else []) + ["streamed"], folder, options, rounds)
    figures: dict[str, Any] = {}
    if not cuda:
        steps |= take_turns(["capped"], folder, options, max(2, rounds))
        passes = take_turns(["folded", "separate"], folder, options, max(2, rounds // 2))
        capped = steps["capped"]
        cap_bytes = arguments.cap_mib << 20
        figures |= {
            "folded_over_separate_disk": passes["folded"].median("seconds")
            / passes["separate"].median("seconds"),
            "cold_pass_seconds": passes["folded"].median("seconds"),
            "weights_over_cap": capped.answers[0]["weights_bytes"] / cap_bytes,
            "peak_anonymous_bytes": max(answer["peak_bytes"] for answer in capped.answers),
            "cap_bytes": cap_bytes,
            "capped_first_step_seconds": capped.answers[0]["seconds"],
        }
    streamed = steps["streamed"]
    losses = [
        [answer["losses"] for answer in contender.answers[: rounds + 1]] for contender in steps.values()
    ]
    figures |= {
        "bitwise_equal": all(one == losses[0] for one in losses) if len(losses) > 1 else None,
        "streamed_over_resident": (
            streamed.median("seconds") / steps["resident"].median("seconds") if fits else None
        ),
        "io_wait_share": streamed.median("waited") / streamed.median("seconds"),
        "streamed_bytes_a_second": streamed.median("moved") / streamed.median("seconds"),
        "streamed_peak_bytes": max(answer["peak_bytes"] for answer in streamed.answers),
    }
    rows = [
        [name, contender.median("seconds"), max(a["peak_bytes"] for a in contender.answers) / 2**20]
        for name, contender in steps.items()
    ]
    return figures, rows


def folder_bytes(folder: Path) -> int:
    """Bytes of the checkpoint's files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def host_to_device_bytes_a_second() -> float:
    """The best of some copies of 1 GiB of page-locked memory."""
    import torch

    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    best = 0.0
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        best = max(best, host.numel() / (time.perf_counter() - start))
    return best


# -------------------------------------------------------------------------------- the analytic table


def against_zo2() -> list[list[Any]]:
    """Our device memory for zo2's published cases, from shapes alone: batch 1, 2048 tokens, NF4, LoRA."""
    rows = []
    for shape, theirs in GPU_MEMORY_OF_ZO2_GB.items():
        ours = device_bytes(shape, rows=1, length=2048) / 1e9
        rows.append([shape, theirs, ours, ours / theirs])
    return rows


def device_bytes(shape: str, rows: int, length: int, branches: int = 3, rank: int = 8) -> int:
    """Everything on a GPU while blocks stream: two slots, what is outside of blocks, adapters, a pass."""
    import torch
    import transformers
    from make_random_model import SHAPES

    from hizoo_lite.branches import Branches
    from hizoo_lite.model.build import build
    from hizoo_lite.plan.dry_run import DryRun, Held, Pass, Source
    from hizoo_lite.plan.inventory import Inventory
    from hizoo_lite.spaces import LoRA

    config = getattr(transformers, SHAPES[shape].config_class)(**SHAPES[shape].arguments)
    module = build(config, "causal")
    inventory = Inventory.of_shapes(Path(), {"dtype": "bfloat16"}, module)
    source = Source(inventory, config, "causal", "nf4", True, torch.bfloat16, "cuda")
    held = Held(source, "host", module, LoRA(rank=rank, blocks="all"))
    wanted = Pass(rows, length, Branches.of(base=branches % 2 == 1, pairs=branches // 2), rows)
    dry = DryRun(source, "host", build(config, "causal"), LoRA(rank=rank, blocks="all"))
    noise = sum(value.nbytes for value in held.space.parameters.values())
    weights = sum(size for category, size in held.categories.items() if category != "resident_blocks")
    return 2 * max(held.block_bytes) + weights + noise + dry.run(wanted).peak_bytes


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="fewer blocks than the shape has")
    parser.add_argument("--folder", type=Path, help="a checkpoint that is there already")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compute", default="auto")
    parser.add_argument("--cap-mib", type=int, default=850, help="hard cap of anonymous memory, on CPU")
    parser.add_argument("--cap-gib", type=float, help="cap of torch's CUDA allocator")
    parser.add_argument("--serve", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments)
        return
    rounds = 2 if arguments.quick else arguments.rounds
    shape = "tinyllama-1.1b" if arguments.quick else arguments.shape
    layers = 6 if arguments.quick else arguments.layers
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
        folder = arguments.folder or Path(scratch) / "model"
        if arguments.folder is None:
            from make_random_model import make

            make(shape, folder, bits="nf4", layers=layers)
        figures, rows = measure(folder, arguments, rounds)
    if arguments.device == "cuda":
        best = host_to_device_bytes_a_second()
        figures["share_of_bandwidth"] = figures["streamed_bytes_a_second"] / best
        figures["host_to_device_bytes_a_second"] = best
    blocks = f"{layers} blocks" if layers else "all blocks"
    title = f"{shape}, {blocks}, NF4, {arguments.rows} x {arguments.length} tokens, median of {rounds} steps"
    publish(title, ["contender", "s a step", "peak MiB"], rows, figures, arguments)
    print(json.dumps(figures, indent=2))
    table = against_zo2()
    publish(
        "Device memory, batch 1 x 2048: zo2 (fp16, published) and ours (NF4, LoRA, three branches, computed)",
        ["shape", "zo2 GB", "ours GB", "share"], table,
        {**figures, "zo2": {row[0]: {"zo2_gb": row[1], "ours_gb": row[2]} for row in table}}, arguments,
    )  # fmt: skip


if __name__ == "__main__":
    main()
