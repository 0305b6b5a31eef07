"""What equal numbers of forwards buy on real input: hizoo, its ablations, mezo, and LoRA by backpropagation.

    python tools/get_models.py MODELS
    python tools/bench_quality.py --models MODELS --results DIR [--cells smollm2-sst2,demo] [--seeds 0,1,2]
        [--methods 'hizoo;mezo'] [--forwards 300,1500] [--json FILE] [--picture FILE.png] [--quick]

A cell is a model and a task: SmolLM2-135M-Instruct with label words on SST-2, RTE, CB, BoolQ and SNLI, and
on data of one's own (`tickets.py`, batch 8), MiniLM with a new head on SST-2 and SNLI, all in NF4 with LoRA 8
on query and value, 1 000 training examples at most, batch 16, and the demo as it is. Data: ../shared/data.
What is absent is left out, and said.

A row is one run, in a process of its own: cell, method, setting, seed, forwards. Rows are appended to
DIR/rows.jsonl as they are made, and those that are there are not made again: a bench that was interrupted
goes on, and several processes may share DIR where each has other cells. The table, --json and --picture are
of all rows in DIR; `summary` in --json is what versions are compared by (`headline`).

Forwards are branches evaluated; a backpropagation step counts as three. `hizoo` has no tuned number; `hizoo,
as published` has three losses, all blocks, curvature of predictions a module, an estimated head. `mezo`
has the rate of a grid with the lowest dev loss of the first seed (constant, its head estimated as published;
A frozen as for hizoo, or trained), backpropagation AdamW's. Dev examples are of the training file; the test
set is the official dev file.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import peft
import tickets
import torch
import torch.nn.functional as F
import transformers
from quality_cells import ALL, CELLS, METHODS, TICKETS, USUAL, Cell, Method
from quality_summary import draw, headline, in_equal_seconds, judged, summarized, to_mezo
from reporting import make_parser, publish
from torch import Tensor

from hizoo_lite import estimators
from hizoo_lite.batch import Batch
from hizoo_lite.config import TrainConfig
from hizoo_lite.errors import TooManyBadSteps
from hizoo_lite.memory.peak import PeakMeter
from hizoo_lite.run import Run, fit
from hizoo_lite.tasks import Encoder, batch_indices
from hizoo_lite.tensors import batch_tensors
from hizoo_lite.train.callbacks import HIDDEN
from hizoo_lite.train.components import find_task, make_splits
from hizoo_lite.train.config_file import resolve
from hizoo_lite.train.evaluate import evaluate

DATA = Path(__file__).parents[1] / "../shared/data"
#: What a step with a backward pass counts as, in forwards.
BACKWARD = 3
#: Evaluations on dev examples within a run: this many, and one each so many forwards in a longer one.
CURVE, CURVE_FORWARDS = 3, 300
#: What every run needs.
_IMPORTS = ["peft", "transformers", "bitsandbytes", "hizoo_lite.run"]


def configuration(cell: Cell, models: Path, seed: int, arguments: Any) -> TrainConfig:
    """What all methods share."""
    small = {"test_examples": 100} if arguments.quick else {}
    shared = {
        "seed": seed,
        "device": arguments.device,
        "threads": arguments.threads,
        "save_every": 0,
        **small,
    }
    if not cell.model:
        return replace(resolve("demo"), **shared)
    task, data = cell.task, DATA / cell.task
    if cell.task == TICKETS:
        data = arguments.results / TICKETS
        task = str(tickets.write(data))
    config = TrainConfig(
        model=str(models / cell.model),
        kind=cell.kind,
        task=task,
        data=str(data),
        bits="nf4",
        batch_size=cell.batch,
        eval_batch_size=cell.batch,  # or what a larger one leaves in the heap would count in the steps' peak
        max_length=cell.max_length,
        train_examples=1000,
        dev_examples=100,
        test_examples=1000,
    )
    return replace(config, **shared)


class Clock:
    """The examples whose hidden states a run computes beforehand, seconds of that, the processor's of all.

    `processor` is of the threads of this process, in these hidden states and in steps: other work is
    not in it.
    """

    def __init__(self) -> None:
        self.examples, self.seconds, self.processor = 0, 0.0, 0.0
        self._began: tuple[float, float] | None = None

    def on_evaluate_begin(self, args: Any, state: Any, control: Any, *, when: str, **more: Any) -> None:
        """An evaluation, or those hidden states."""
        self._began = (time.perf_counter(), time.process_time()) if when == HIDDEN else None

    def on_prediction_step(self, args: Any, state: Any, control: Any, *, examples: int, **more: Any) -> None:
        """So many more are done."""
        if self._began is not None:
            wall, processor = time.perf_counter(), time.process_time()
            self.examples += examples
            self.seconds += wall - self._began[0]
            self.processor += processor - self._began[1]
            self._began = wall, processor

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """A step."""
        self._began = None
        self.processor -= time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Its end."""
        self.processor += time.process_time()


def zeroth_order(config: TrainConfig, method: Method, forwards: int, lr: float | None) -> dict[str, Any]:
    """A run of the product itself, in a folder that is thrown away."""
    os.environ["HIZOO_LITE_REPORT"] = "0"
    settings = dict(method.settings) if lr is None else {**method.settings, "lr": lr}
    method_config = replace(config, **settings)
    branches = len(estimators.configured(method_config).points(0)) if method_config.estimates else BACKWARD
    steps = forwards // branches
    every, clock = between(steps, forwards) if config.dev_examples else 0, Clock()
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "run")
        run = fit(replace(config, **settings, out=out, steps=steps, eval_every=every), callbacks=[clock])
        if run.interrupted:  # it would look like a finished row
            raise KeyboardInterrupt
        dev = run.setup.splits.dev
        last = [dev_point(run, dev, branches * steps)] if dev else []
        lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    summary = run.summary
    taken = [line for line in lines if line["kind"] == "step"]
    seconds: Sequence[float | None] = [None] * (len(taken) + 1)  # a private run tells none, and no losses
    if all(line["seconds"] is not None for line in taken):
        seconds = list(accumulate((line["seconds"] for line in taken), initial=clock.seconds))
    return {
        "forwards": branches * steps,
        "seconds": seconds[-1],
        "processor_seconds": clock.processor,
        "kept_examples": clock.examples,
        "peak_bytes": summary.get("training_peak_bytes"),
        "inference_peak_bytes": summary.get("inference_peak_bytes"),
        **{name: summary[name] for name in ("loss_before", "loss_after", "metric_before", "metric_after")},
        "seconds_per_step": summary["seconds_per_step"],
        "curve": [
            *(
                [branches * line["step"], line["loss"], line[summary["metric"]], seconds[line["step"]]]
                for line in lines
                if line["kind"] == "eval" and line["when"] == "dev" and line["step"] < steps
            ),
            *([*point, seconds[-1]] for point in last),
        ],
        "train_curve": _smoothed(
            [[branches * (r["step"] + 1), statistics.fmean(r["losses"])] for r in taken if r["losses"]]
        ),
        "skipped_steps": summary["skipped_steps"],
        "slowed_steps": _slowed(taken) if lr is None else 0,
    }


def between(steps: int, forwards: int) -> int:
    """Steps from one evaluation on dev examples to the next."""
    return max(steps // max(CURVE, forwards // CURVE_FORWARDS), 1)


def dev_point(run: Run, dev: Sequence[Any], forwards: int) -> list[float]:
    """Loss and metric on dev of what a run has ended with, which a run itself evaluates on test alone."""
    found = evaluate(run.setup.traversal, run.setup.encoder, dev, run.setup.config.eval_batch_size)
    return [forwards, found.loss, found.metrics[0].value]


def _smoothed(points: Sequence[Sequence[float]], parts: int = 25) -> list[list[float]]:
    """Means of neighbouring points, as many as `parts`."""
    size = max(1, len(points) // parts)
    groups = [points[first : first + size] for first in range(0, len(points), size)]
    return [[statistics.fmean(column) for column in zip(*group, strict=True)] for group in groups]


def _slowed(steps: Sequence[Mapping[str, Any]]) -> int:
    """Steps whose rate was less than half of the step's before: those that the guards of `--lr auto` held."""
    return sum(after["lr"] < before["lr"] / 2 for before, after in pairwise(steps))


def backpropagation(
    config: TrainConfig, targets: Sequence[str], method: Method, forwards: int, lr: float
) -> dict[str, Any]:
    """PEFT LoRA over bitsandbytes NF4 weights with AdamW, on the same examples in the same order."""
    task = find_task(config.task)
    splits = make_splits(config, task)
    model = tunable(config, targets, method.settings.get("exact_blocks"))
    if method.settings.get("checkpointed"):
        checkpoint_activations(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    encoder = Encoder(tokenizer, config.kind, task, config.max_length)
    encoded = [encoder.encode(example, training=True) for example in splits.train]
    labels = [example.gold for example in splits.train]
    lengths = [max(map(len, example.rows)) for example in encoded]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    steps = forwards // BACKWARD
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    meter = PeakMeter(next(model.parameters()).device)
    meter.restart()
    before = evaluated(model, encoder, splits.test)
    inference_peak_bytes = meter.phase_bytes()
    meter.restart()
    curve, seconds, processor = [], 0.0, 0.0
    for step in range(steps):
        began, busy = time.perf_counter(), time.process_time()
        picked = batch_indices(
            len(encoded), config.batch_size, config.seed, step, labels, lengths.__getitem__
        )
        losses, _ = losses_and_scores(model, batch_tensors(encoder.collate([encoded[i] for i in picked])))
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        seconds += time.perf_counter() - began
        processor += time.process_time() - busy
        if (step + 1) % between(steps, forwards) == 0:
            curve.append([BACKWARD * (step + 1), *evaluated(model, encoder, splits.dev), seconds])
    peak_bytes = meter.phase_bytes()
    after = evaluated(model, encoder, splits.test)
    return {
        "forwards": BACKWARD * steps,
        "seconds": seconds,
        "processor_seconds": processor,
        "kept_examples": 0,
        "peak_bytes": peak_bytes,
        "inference_peak_bytes": inference_peak_bytes,
        "loss_before": before[0],
        "loss_after": after[0],
        "metric_before": before[1],
        "metric_after": after[1],
        "seconds_per_step": seconds / steps,
        "curve": curve,
    }


def tunable(config: TrainConfig, targets: Sequence[str], top: int | None = None) -> torch.nn.Module:
    """The model in bitsandbytes NF4 with a PEFT adapter, in the top blocks if `top` says how many.

    A classifier's new head is drawn from the seed.
    """
    classifier = config.kind == "classifier"
    name = "AutoModelForSequenceClassification" if classifier else "AutoModelForCausalLM"
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["classifier", "pooler", "lm_head"],
    )  # fmt: skip
    classes = {"num_labels": find_task(config.task).num_labels} if classifier else {}
    model = getattr(transformers, name).from_pretrained(
        config.model, quantization_config=quantization, device_map={"": config.device}, dtype=torch.float32,
        **classes,
    )  # fmt: skip
    if classifier:
        draw = torch.Generator().manual_seed(config.seed)
        model.classifier.weight.data.copy_(0.02 * torch.randn(model.classifier.weight.shape, generator=draw))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # eval() would repack the weights in place
    task_type = peft.TaskType.SEQ_CLS if classifier else peft.TaskType.CAUSAL_LM
    layers = model.config.num_hidden_layers
    adapter = peft.LoraConfig(
        task_type=task_type, r=8, lora_alpha=16, target_modules=list(targets),
        layers_to_transform=list(range(layers - top, layers)) if top else None,
    )  # fmt: skip
    return peft.get_peft_model(model, adapter).eval()  # no dropout, as in a zeroth-order step


def checkpoint_activations(model: torch.nn.Module) -> None:
    """Keep the inputs of blocks alone for the backward pass, which computes the rest again."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # or it would be left out
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def losses_and_scores(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Per-example losses and per-slot (or per-class) scores, differentiable."""
    device = next(model.parameters()).device
    extra = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids.to(device)}
    logits = model(
        input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device), **extra
    ).logits.float().cpu()  # fmt: skip
    if batch.loss == "class":
        return F.cross_entropy(logits, batch.gold, reduction="none"), logits
    at = logits[batch.site_row, batch.site_position].log_softmax(-1)
    picked = at[batch.token_site, batch.token_id]
    slots = batch.slot_example.shape[0]
    scores = torch.zeros(slots).index_add(0, batch.token_slot, picked)
    scores = scores / torch.bincount(batch.token_slot, minlength=slots)
    table = scores.view(batch.examples, -1)  # these tasks have as many answers for every example
    gold = batch.gold - torch.arange(batch.examples) * table.shape[1]
    return F.cross_entropy(table, gold, reduction="none"), scores


@torch.no_grad()
def evaluated(model: torch.nn.Module, encoder: Encoder, examples: Sequence[Any]) -> tuple[float, float]:
    """Mean loss and accuracy."""
    total, right = 0.0, 0
    for first in range(0, len(examples), 32):
        part = examples[first : first + 32]
        batch = encoder.collate([encoder.encode(example, training=False) for example in part])
        losses, scores = losses_and_scores(model, batch_tensors(batch))
        total += float(losses.double().sum())
        picked = scores.view(len(part), -1).argmax(1)
        right += sum(int(p) == example.gold for p, example in zip(picked, part, strict=True))
    return total / len(examples), right / len(examples)


# -------------------------------------------------------------------------------------------- rows


class Rows:
    """rows.jsonl: what was run. A row is known by cell, method, rate, seed and the forwards asked for.

    Of a rate that was tried and broke it says so, as `ended`, and holds no figures.
    """

    KEY = ("cell", "method", "lr", "seed", "budget")

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "rows.jsonl"

    def all(self) -> list[dict[str, Any]]:
        """Every row of a run that came to its end, in the order in which they were made."""
        return [row for row in self._read() if "ended" not in row]

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The row with this key, however it ended."""
        return next((row for row in self._read() if all(row[name] == key[name] for name in self.KEY)), None)

    def _read(self) -> list[dict[str, Any]]:
        text = self.path.read_text() if self.path.is_file() else ""
        return [json.loads(line) for line in text.splitlines()]

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row, in one write."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def run_cell(name: str, wanted: Sequence[str], budget: int, rows: Rows, arguments: Any) -> None:
    """Every method and seed of a cell at a number of forwards."""
    cell = CELLS[name]
    for method_name in wanted:
        method = METHODS[method_name]
        is_backward = method_name.startswith("backpropagation")
        if is_backward and not cell.model:
            continue
        rates: Sequence[float | None] = method.rates(cell)
        for number, seed in enumerate(arguments.seeds):
            if number == 1 and len(rates) > 1:
                rates = best_rate(rows, name, method_name, budget, arguments.seeds[0])
            for lr in rates:
                key = {"cell": name, "method": method_name, "lr": lr, "seed": seed, "budget": budget}
                if rows.find(**key):
                    continue
                config = configuration(cell, arguments.models, seed, arguments)
                try:
                    if is_backward:
                        found = alone(arguments, backpropagation, config, cell.targets, method, budget, lr)
                    else:
                        found = alone(arguments, zeroth_order, config, method, budget, lr)
                except TooManyBadSteps as error:
                    if len(rates) == 1:  # of a method, not of a rate that is tried
                        raise
                    rows.add({**key, "ended": str(error)})
                    print(name, method_name, lr or "", seed, error, flush=True)
                    continue
                more = {"batch_size": config.batch_size, "threads": arguments.threads}
                rows.add({**key, **found, **more})
                print(
                    name, method_name, lr or "", seed, found["forwards"],
                    f"loss {found['loss_after']:.4f}, {found['metric_after']:.3f}", flush=True,
                )  # fmt: skip


def alone(arguments: Any, work: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """What `work` gives, in a process of its own: its peak of memory has nothing of another run."""
    context = multiprocessing.get_context("forkserver" if arguments.device == "cpu" else "spawn")
    if arguments.device == "cpu":
        context.set_forkserver_preload(_IMPORTS)
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (arguments.threads,)) as pool:
        return pool.submit(work, *given).result()


def best_rate(rows: Rows, cell: str, method: str, budget: int, seed: int) -> list[float]:
    """Of the grid, by the rows of one seed; none if no run came to its end."""
    key = {"cell": cell, "method": method, "budget": budget, "seed": seed}
    found = [row for row in rows.all() if all(row[name] == value for name, value in key.items())]
    return [min(found, key=judged)["lr"]] if found else []


def main() -> None:
    """Run what is missing, then show all."""
    parser = make_parser(__doc__)
    parser.add_argument("--models", type=Path, default=Path("models"), help="made by get_models.py")
    parser.add_argument("--results", type=Path, help="folder of the rows (default: one that is thrown away)")
    parser.add_argument("--cells", help="default: those whose model and data are there")
    parser.add_argument("--methods", default=";".join(USUAL), help=f"all, or with ';': {'; '.join(METHODS)}")
    parser.add_argument("--seeds", default="0,1,2", help="(default: %(default)s)")
    parser.add_argument(
        "--forwards", default="300", help="of a run, several with commas (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a run (default: %(default)s)")
    parser.add_argument("--picture", type=Path, metavar="FILE.png")
    arguments = parser.parse_args()
    methods = [name.strip() for name in arguments.methods.split(";") if name.strip()]
    methods = list(ALL) if methods == ["all"] else methods
    cells = list(CELLS) if arguments.cells is None else arguments.cells.split(",")
    for kind, given, known in (("--cells", cells, CELLS), ("--methods", methods, METHODS)):
        if odd := [name for name in given if name not in known]:
            parser.error(f"{kind}: got {odd[0]!r}, allowed: {', '.join(known)}")
    arguments.seeds = [int(seed) for seed in arguments.seeds.split(",")]
    budgets = [int(number) for number in arguments.forwards.split(",")]
    if arguments.quick:
        cells, methods, arguments.seeds, budgets = ["demo"], ["hizoo", "mezo"], [0], [60]
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        arguments.results = arguments.results or Path(scratch)
        rows = Rows(arguments.results)
        for name in cells:
            cell = CELLS[name]
            needed = [arguments.models / cell.model / "config.json"] if cell.model else []
            needed += [DATA / cell.task] if cell.task not in ("", TICKETS) else []
            if missing := [path for path in needed if not path.exists()]:
                print(f"left out: {name} (no {missing[0]})")
                continue
            for budget in budgets:
                run_cell(name, methods, budget, rows, arguments)
        found = rows.all()
    lines, reached, summary = list(summarized(found)), to_mezo(found), headline(found)
    columns = list(lines[0]) if lines else []
    timed = in_equal_seconds(found)
    figures = {
        "rows": found,
        "lines": lines,
        "to_mezo": reached,
        "in_equal_seconds": timed,
        "summary": summary,
    }
    title = "LoRA rank 8, NF4; medians over seeds, and the worst seed"
    publish(title, columns, [[line[c] for c in columns] for line in lines], figures, arguments)
    for name, value in {**reached, **summary}.items():
        print(f"{name}: {value}")
    for name, value in timed.items():
        print(f"{name}, dev loss in equal seconds: {value}")
    if arguments.picture and found:
        draw(found, arguments.picture)


if __name__ == "__main__":
    main()
