"""Predicted beside measured peak memory, training beside inference, and backpropagation beside both.

    python tools/bench_memory.py [--quick] [--json FILE] [--layers N] [--only TEXT]

A random Llama (shape tinyllama-1.1b with 4 blocks) is written once in NF4 and int8. Every figure is the peak
of RssAnon, sampled each millisecond from before the imports on, of a fresh process that loads the model and
then evaluates a batch (`inference`; with what the space adds, a dense one its residual), takes steps on it
and evaluates it, as a run does (`train`; the batch comes with hidden states where a run would keep them), or
backpropagates through a PEFT LoRA on bitsandbytes' layers (`backprop`). The prediction is the planner's,
which has seen the headers only; its `framework` is measured in a fresh process too. Batches are padded on the
right, with one label a row.

Training is measured twice: under a budget of 1.05 times the peak of inference, held as in a run (the plan's
chunks, the system's limit), and in the usual chunks without a limit (`usual_`). Where the plan says that the
budget cannot be met, the smallest chunks are taken, without a limit, and `held` is false.

The columns: predicted and measured peak of a run, their difference, the measured peak of inference, the
steps' peak over it; the first three of usual chunks. With --quick: 2 blocks, two configurations,
backpropagation at 2 x 64.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

_STEPS = 2
_MIB = 1 << 20
#: More than any of the cases takes: a run with a budget gives large buffers back (process.py).
AMPLE = 64 << 30
#: Of inference: what training is held to.
HELD = 1.05


class Case(NamedTuple):
    """One run."""

    bits: str
    space: str  # lora, scales, or one of weights with a residual
    residency: str
    rows: int
    length: int
    budget_bytes: int = AMPLE
    chunk_halvings: int | None = None  # of chunks; None is what the plan says

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.bits} {self.space} {self.residency} {self.rows}x{self.length}"


CASES = [
    Case("nf4", "lora", "resident", 8, 256),
    Case("nf4", "lora", "resident", 2, 64),
    Case("nf4", "lora", "disk", 8, 256),
    Case("nf4", "lora", "disk", 2, 64),
    Case("int8", "lora", "resident", 8, 256),
    Case("int8", "lora", "disk", 2, 256),
    Case("nf4", "dense", "resident", 8, 64),
    Case("nf4", "dense", "disk", 8, 256),
    Case("int8", "dense", "resident", 2, 256),
    Case("int8", "dense", "disk", 2, 64),
    Case("nf4", "lora", "resident", 1, 512),
    Case("nf4", "lora", "disk", 16, 128),
    *(Case("nf4", space, "disk", 2, 64) for space in ("lowrank", "subspace", "small", "scales")),
]
QUICK = [CASES[1], CASES[3]]


# --------------------------------------------------------------------------------- a child process


class Sampler:
    """The peak of this process's anonymous memory, in bytes."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._status = open("/proc/self/status", "rb", buffering=0)  # noqa: SIM115 - for the process's life
        self._done = threading.Event()
        threading.Thread(target=self._sample, daemon=True).start()

    def now(self) -> int:
        """RssAnon."""
        text = os.pread(self._status.fileno(), 4096, 0)  # the thread and the caller share the file
        at = text.index(b"RssAnon:")
        return int(text[at + 8 : text.index(b"kB", at)]) * 1024

    def _sample(self) -> None:
        while not self._done.wait(0.001):
            self.peak_bytes = max(self.peak_bytes, self.now())


def config_of(case: Case, folder: str) -> Any:
    """The configuration of a case, as `train` would have it."""
    from hizoo_lite.config import TrainConfig

    return TrainConfig(
        model=folder, task="sst2", device="cpu", space=case.space, residency=case.residency,
        dense_update="residual", batch_size=case.rows, max_length=case.length, double_quant=False,
        eval_batch_size=case.rows, device_budget=f"{case.budget_bytes}B",
    )  # fmt: skip


def make_batch(rows: int, length: int) -> Any:
    """Random tokens; the last row is shorter than the others; a label at the end of every row."""
    import torch

    from hizoo_lite.batch import Batch
    from hizoo_lite.noise import generator

    ids = torch.from_numpy(generator(0, "ids").integers(5, 32000, (rows, length)))
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    one = torch.arange(rows)
    last = mask.sum(1) - 1
    return Batch(ids, mask, None, one, last, one, ids[:, 0], one, one, one, "answer")


def with_hidden_states(traversal: Any, batch: Any) -> Any:
    """The batch as a run has it that keeps hidden states: they come from a file."""
    import numpy as np

    from hizoo_lite.engine.hidden import first_trained

    found = traversal.hidden_states(batch, first_trained(traversal.model))
    return batch._replace(hidden=np.where(batch.attention_mask.numpy()[..., None], found, np.float32(0)))


def run_ours(case: Case, folder: str, training: bool, sampler: Sampler) -> dict[str, Any]:
    """Load, then steps or evaluations, held to the budget of the case; what was there when."""
    import torch

    import hizoo_lite.run  # noqa: F401 - what a run imports
    from hizoo_lite.checkpoints.checkpoint import Checkpoint
    from hizoo_lite.engine.budget import Budget, enforced
    from hizoo_lite.engine.hidden import worth_keeping
    from hizoo_lite.engine.load import load
    from hizoo_lite.engine.traversal import Traversal
    from hizoo_lite.memory.limits import Budgets
    from hizoo_lite.plan import planner
    from hizoo_lite.process import trim
    from hizoo_lite.spaces import SPACES
    from hizoo_lite.tasks.splits import PUBLISHED
    from hizoo_lite.tensors import TorchArrays
    from hizoo_lite.train import components

    found: dict[str, Any] = {"framework": sampler.now()}
    config = config_of(case, folder)
    chunk_halvings = case.chunk_halvings
    if chunk_halvings is None:
        chunk_halvings = planner.plan_run(config, Checkpoint.open(folder), "causal").chunk_halvings
    trim()
    limit = None if case.budget_bytes == AMPLE else case.budget_bytes
    with enforced(limit, torch.device("cpu")) as cap:
        model = load(
            folder, device="cpu", double_quant=False, residency=case.residency,
            device_budget=config.device_budget,
        )  # fmt: skip
        found |= {"loaded": sampler.now(), "load_peak": sampler.peak_bytes}
        model.chunk_halvings = chunk_halvings
        traversal, batch = Traversal(model), make_batch(case.rows, case.length)
        budget = Budget(Budgets(limit, limit), model, cap=cap)
        traversal.guard = budget.fitting
        space = SPACES.configured(config)
        if training or case.space != "lora":
            space.attach(model, seed=0)
        arrays = TorchArrays(model.device)
        stepper = components.make_stepper(config, traversal, arrays, space) if training else None
        trim()
        if stepper is not None:
            keeps = worth_keeping(model, space, config.steps * config.batch_size, PUBLISHED.train)
            own = with_hidden_states(traversal, batch) if keeps else batch
            for step in range(_STEPS):
                stepper.step(step, own)
            del own
            found["step_bytes"] = sampler.peak_bytes
            trim()
        for _ in range(_STEPS):
            traversal.losses(batch)
    scratch = {key[0]: value.numel() for key, value in model.scratch._buffers.items()}
    return {**found, "halvings": model.chunk_halvings, "retries": budget.retries, "scratch": scratch}


def run_backprop(case: Case, folder: str) -> dict[str, Any]:
    """PEFT LoRA on bitsandbytes' layers, AdamW; transformers in bf16."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map={"": "cpu"}, dtype=torch.bfloat16, trust_remote_code=False
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    )
    tuned.train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-6)
    batch = make_batch(case.rows, case.length)
    for _ in range(_STEPS):
        logits = (
            tuned(batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=2).logits[:, 0].float()
        )
        torch.nn.functional.cross_entropy(logits, batch.token_id).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {}


def serve(mode: str, folder: str, text: str) -> None:
    """What a child does: print its figures as JSON."""
    sampler = Sampler()
    case = Case(*json.loads(text))
    began = time.perf_counter()
    if mode == "plan":
        import hizoo_lite.run  # noqa: F401 - its libraries count
        from hizoo_lite.checkpoints.checkpoint import Checkpoint
        from hizoo_lite.plan import planner, subject

        subject.framework_bytes()
        plan = planner.plan_run(config_of(case, folder), Checkpoint.open(folder), "causal")
        found: dict[str, Any] = plan.to_json()
    elif mode == "backprop":
        found = run_backprop(case, folder)
    else:
        found = run_ours(case, folder, mode == "train", sampler)
    found["measured_bytes"] = sampler.peak_bytes
    found["seconds"] = time.perf_counter() - began
    print(json.dumps(found))


# --------------------------------------------------------------------------------------- the parent


def ask(mode: str, folder: Path, case: Case) -> dict[str, Any]:
    """The figures of a fresh process."""
    command = [sys.executable, __file__, "--serve", mode, str(folder), json.dumps(list(case))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{mode} {case.name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    inference = ask("inference", folder, case)
    usual, usual_plan = ask("train", folder, case), ask("plan", folder, case)
    held = case._replace(budget_bytes=int(HELD * inference["measured_bytes"]))
    plan = ask("plan", folder, held)
    training = ask("train", folder, held if plan["fits"] else case._replace(chunk_halvings=plan["halvings"]))
    row = {
        "config": case.name,
        "predicted_bytes": plan["peak_bytes"],
        "measured_bytes": training["measured_bytes"],
        "inference_bytes": inference["measured_bytes"],
        "error": plan["peak_bytes"] / training["measured_bytes"] - 1,
        "training_over_inference": training["step_bytes"] / inference["measured_bytes"],
        "held": plan["fits"],
        "usual_predicted_bytes": usual_plan["peak_bytes"],
        "usual_measured_bytes": usual["measured_bytes"],
        "usual_error": usual_plan["peak_bytes"] / usual["measured_bytes"] - 1,
        "ledger": plan["ledger"],
        "training": training,
        "inference": inference,
        "usual": usual,
    }
    print(*_shown(row), file=sys.stderr, flush=True)
    return row


def _shown(row: dict[str, Any]) -> list[Any]:
    """A row of the table, for people."""
    mib = {key: value // _MIB for key, value in row.items() if key.endswith("_bytes")}
    return [
        row["config"],
        mib["predicted_bytes"],
        mib["measured_bytes"],
        100 * row["error"],
        mib["inference_bytes"],
        row["training_over_inference"],
        mib["usual_predicted_bytes"],
        mib["usual_measured_bytes"],
        100 * row["usual_error"],
    ]


def main() -> None:
    from reporting import make_parser, publish

    parser = make_parser(__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--only", default="", help="configurations with this text in their name")
    parser.add_argument("--folder", type=Path, help="where the models are, or are written to and kept")
    parser.add_argument("--no-backprop", action="store_true")
    parser.add_argument("--serve", nargs=3, metavar=("MODE", "FOLDER", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(*arguments.serve)
        return
    from make_random_model import make

    layers = 2 if arguments.quick else arguments.layers
    cases = [case for case in (QUICK if arguments.quick else CASES) if arguments.only in case.name]
    with tempfile.TemporaryDirectory() as scratch:
        home = arguments.folder or Path(scratch)
        for bits in sorted({case.bits for case in cases} | {"nf4"}):
            if not (home / bits).exists():
                make("tinyllama-1.1b", home / bits, bits=bits, double_quant=False, layers=layers)
        rows = [measure(case, home / case.bits) for case in cases]
        figures: dict[str, Any] = {"rows": rows}
        if not arguments.no_backprop:
            case = CASES[1] if arguments.quick else CASES[0]
            figures["backprop"] = ask("backprop", home / case.bits, case)
            ours = next((row for row in rows if row["config"] == case.name), None) or measure(
                case, home / case.bits
            )
            streamed = case._replace(residency="disk")
            figures["backprop_over_ours"] = figures["backprop"]["measured_bytes"] / ours["measured_bytes"]
            found = next((row for row in rows if row["config"] == streamed.name), None)
            if found:
                figures["backprop_over_streamed"] = (
                    figures["backprop"]["measured_bytes"] / found["measured_bytes"]
                )
    columns = [
        "configuration",
        "predicted MiB",
        "measured MiB",
        "error %",
        "inference MiB",
        "training/inference",
        "usual chunks: predicted MiB",
        "measured MiB",
        "error %",
    ]
    table = [_shown(row) for row in rows]
    title = f"Peak anonymous memory, tinyllama-1.1b with {layers} blocks"
    publish(title, columns, table, figures, arguments)
    for key in ("backprop_over_ours", "backprop_over_streamed"):
        if key in figures:
            print(f"{key}: {figures[key]:.2f}")


if __name__ == "__main__":
    main()
