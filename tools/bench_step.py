"""A HiZOO step as published against bitsandbytes inference and PEFT backpropagation, as ratios of one run.

    python tools/bench_step.py [--quick] [--json FILE] [--rounds N] [--device cuda]

A random Llama (hidden 4096, intermediate 11008, vocabulary 32 000, 2 layers; with --quick 1024, 2752, 8 000)
is saved once and loaded in NF4 by separate processes, one for each contender, which then take turns, so that
a slow moment of the machine falls on all of them (they are forked from one that has imported everything):

    inference            transformers + bitsandbytes, eval(), logits of the last position
    inference, same allocator   the same with glibc's allocator set as hizoo_lite sets it
    inference, unpacked  the same, with bitsandbytes' repacking for AVX512-BF16 switched off
    step                 hizoo_lite: three branches in one traversal, noise, update
    separate             hizoo_lite: the three losses as three traversals, no update
    step float32         like `step` with float32 products
    products             the bare products of three branches with dense weights: the floor of `step`
    backpropagation      PEFT LoRA (the same targets), loss.backward() and AdamW

Products are of the type that `--compute-dtype auto` takes on the device, in all of them: bf16 where there are
instructions for it, float32 on other CPUs, where `inference, unpacked` and `step float32` say nothing new.

Times are medians; peaks are of anonymous memory (allocator peak on CUDA) during the step, above what the
imports take. Batches: 1 x 64 and 8 x 64 tokens, one label a row.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from reporting import make_parser, publish

from hizoo_lite.device import choose_device
from hizoo_lite.model.build import choose_compute, compute_name

CONTENDERS = ("inference", "inference_same_allocator", "step", "separate", "products", "backprop")
#: Where the products of the others are bf16.
WITH_BF16 = ("inference_unpacked", "step_float32")
ROWS = {"tokens_64": 1, "tokens_512": 8}
LENGTH = 64
#: What a contender needs.
IMPORTS = ["torch", "transformers", "peft", "bitsandbytes", "hizoo_lite.engine.load", "hizoo_lite.train.step"]


def make_checkpoint(folder: Path, hidden: int, intermediate: int, vocabulary: int) -> None:
    """A random bf16 Llama in a Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=2, vocab_size=vocabulary,
        num_attention_heads=hidden // 128, num_key_value_heads=hidden // 128, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    model.save_pretrained(folder)


# ---------------------------------------------------------------------------- one contender's process


def ours(folder: str, device: str, compute: str, contender: str) -> Callable[[int], None]:
    """A function of the number of rows that takes one step, or three separate traversals."""
    import torch

    from hizoo_lite import curvature, estimators
    from hizoo_lite.batch import Batch
    from hizoo_lite.engine.load import load
    from hizoo_lite.engine.traversal import Traversal
    from hizoo_lite.noise import normal
    from hizoo_lite.optimizers.step_size import FixedRate, Schedule
    from hizoo_lite.spaces.lora import LoRA
    from hizoo_lite.tensors import TorchArrays
    from hizoo_lite.train.step import Stepper

    dtype = "float32" if contender == "step_float32" else compute
    model = load(folder, bits="nf4", compute_dtype=dtype, device=device)
    space = LoRA(rank=8, train_a=True, blocks="all")
    space.attach(model, seed=0)
    traversal = Traversal(model)
    stepper = Stepper(
        traversal, TorchArrays(model.device), space,
        estimators.get("hizoo", curvature_from="losses"), curvature.get("grouped"),
        FixedRate(Schedule("constant", 1e-6, 0, 1000)), seed=0, mu=1e-3,
        smoothing=Schedule("constant", 0.01, 0, 1000),
    )  # fmt: skip
    steps, vocabulary = iter(range(10**9)), model.config.vocab_size

    def batch(rows: int) -> Batch:
        ids = (normal(0, 0, "ids", (rows, LENGTH)).abs() * vocabulary / 4).long()
        ids.clamp_(max=vocabulary - 1)
        one = torch.arange(rows)
        return Batch(
            ids,
            torch.ones_like(ids),
            None,
            one,
            one * 0 + LENGTH - 2,
            one,
            ids[:, -1],
            one,
            one,
            one,
            "answer",
        )

    def run(rows: int) -> None:
        if contender == "separate":
            for _ in range(3):
                traversal.losses(batch(rows))
        else:
            stepper.step(next(steps), batch(rows))

    return run


def theirs(folder: str, device: str, compute: str, contender: str) -> Callable[[int], None]:
    """A function of the number of rows: one inference forward, or one backpropagation step."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from hizoo_lite.process import keep_heap

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_dtype(compute),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=config,
        device_map={"": device},
        dtype=_dtype(compute),
        trust_remote_code=False,
    ).eval()
    if contender == "inference_same_allocator":
        keep_heap()
    ids = torch.randint(
        0, model.config.vocab_size, (8, LENGTH), generator=torch.Generator().manual_seed(0)
    ).to(device)
    if contender == "inference_unpacked":
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    if contender != "backprop":

        def run(rows: int) -> None:
            with torch.no_grad():
                model(ids[:rows], logits_to_keep=1).logits.float().sum().item()

        return run
    import peft

    tuned = peft.get_peft_model(
        model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    )
    tuned.train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-6)

    def step(rows: int) -> None:
        logits = tuned(ids[:rows], logits_to_keep=2).logits[:, 0].float()
        torch.nn.functional.cross_entropy(logits, ids[:rows, -1]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def products(folder: str, device: str, compute: str) -> Callable[[int], None]:
    """A function of the number of rows: the products of a step alone, over weights that need no unpacking."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = [*[(hidden, hidden)] * 4, (inner, hidden), (inner, hidden), (hidden, inner)]
    dtype = _dtype(compute)
    weights = [torch.randn(shape, device=device).to(dtype) for shape in shapes * config.num_hidden_layers]

    def run(rows: int) -> None:
        for weight in weights:
            x = torch.ones(3 * rows * LENGTH, weight.shape[1], dtype=dtype, device=device)
            x @ weight.t()

    return run


def _dtype(compute: str) -> Any:
    """torch's, of a name of `--compute-dtype`."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}[compute]


class PeakSampler:
    """Peak anonymous memory of this process while the block runs, in bytes (allocator peak on CUDA)."""

    def __init__(self, device: str) -> None:
        self.device, self.peak_bytes = device, 0

    def __enter__(self) -> PeakSampler:
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.002):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if self.device == "cuda":
            import torch

            self.peak_bytes = torch.cuda.max_memory_allocated()


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def cap_device(gib: float | None) -> None:
    """Let torch's CUDA allocator have at most so much: a smaller card on a larger one.

    All of the device where it has less: a card of 24 GB reports 23.6 GiB.
    """
    if gib:
        import torch

        share = gib * 2**30 / torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))


def serve(
    pipe: Connection, contender: str, folder: str, device: str, compute: str, cap_gib: float | None
) -> None:
    """Load, then time one run for each number of rows that arrives."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()

    cap_device(cap_gib)
    imports_bytes = anonymous_bytes() if device == "cpu" else 0
    if contender == "products":
        run = products(folder, device, compute)
    else:
        kind = ours if contender in ("step", "separate", "step_float32") else theirs
        run = kind(folder, device, compute, contender)
    pipe.send("ready")
    while wanted := _received(pipe):
        rows, warm = wanted
        if warm:
            run(rows)
        with PeakSampler(device) as sampler:
            start = time.perf_counter()
            run(rows)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        pipe.send((seconds, sampler.peak_bytes - imports_bytes))


def _received(pipe: Connection) -> tuple[int, bool] | None:
    try:
        return pipe.recv()
    except EOFError:
        return None


# --------------------------------------------------------------------------------------- the parent


class Contender:
    """A process past its loading. On a CPU it is forked from one that has imported what all of them need."""

    def __init__(self, name: str, folder: str, device: str, *arguments: Any) -> None:
        self.name = name
        processes = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
        processes.set_forkserver_preload(IMPORTS)
        self._pipe, its = processes.Pipe()
        self._process = processes.Process(
            target=serve, args=(its, name, folder, device, *arguments), daemon=True
        )
        self._process.start()
        its.close()
        self._answer()

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise SystemExit(f"{self.name}: ended; what it said is above") from None

    def ask(self, rows: int, warm: bool) -> tuple[float, int]:
        """Seconds and peak bytes of one run."""
        self._pipe.send((rows, warm))
        return self._answer()

    def end(self) -> None:
        """Have it end."""
        self._pipe.close()
        self._process.join()


def measure(
    contenders: Sequence[str], rounds: int, *arguments: Any
) -> dict[str, dict[str, tuple[float, int]]]:
    """Median seconds and largest peak of every contender, by batch. arguments: of `serve`."""
    processes: list[Contender] = []
    found: dict[str, dict[str, tuple[float, int]]] = {}
    try:
        for name in contenders:
            processes.append(Contender(name, *arguments))
        for batch, rows in ROWS.items():
            runs: dict[str, list[tuple[float, int]]] = {name: [] for name in contenders}
            for turn in range(rounds):
                for process in processes:
                    runs[process.name].append(process.ask(rows, warm=turn == 0))
            found[batch] = {
                name: (statistics.median(s for s, _ in pairs), max(p for _, p in pairs))
                for name, pairs in runs.items()
            }
    finally:
        for process in processes:
            process.end()
    return found


def ratios(times: dict[str, tuple[float, int]]) -> dict[str, Any]:
    """The figures of one batch."""
    step, step_peak = times["step"]
    inference = times["inference"][0]
    with_bf16 = {}
    if "step_float32" in times:
        with_bf16 = {
            "step_over_inference_unpacked": step / times["inference_unpacked"][0],
            "float32_step_over_inference": times["step_float32"][0] / inference,
        }
    return {
        "step_over_inference": step / inference,
        "step_over_inference_same_allocator": step / times["inference_same_allocator"][0],
        **with_bf16,
        "products_over_inference": times["products"][0] / inference,
        "step_over_products": step / times["products"][0],
        "folded_over_separate": step / times["separate"][0],
        "backprop_time_over_step": times["backprop"][0] / step,
        "backprop_peak_over_step": times["backprop"][1] / step_peak,
        "seconds": {contender: seconds for contender, (seconds, _) in times.items()},
        "peak_bytes": {contender: peak for contender, (_, peak) in times.items()},
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cap-gib", type=float, help="cap torch's CUDA allocator, in each process")
    arguments = parser.parse_args()
    compute = str(compute_name(choose_compute("auto", choose_device(arguments.device))))
    contenders = CONTENDERS + (WITH_BF16 if compute == "bf16" else ())
    hidden, intermediate, vocabulary = (1024, 2752, 8000) if arguments.quick else (4096, 11008, 32000)
    rounds = 3 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), hidden, intermediate, vocabulary)
        found = measure(contenders, rounds, folder, arguments.device, compute, arguments.cap_gib)
    figures = {name: ratios(times) for name, times in found.items()}
    rows = [
        [name, contender, 1e3 * seconds, peak / 2**20, seconds / times["inference"][0]]
        for name, times in found.items()
        for contender, (seconds, peak) in times.items()
    ]
    title = (
        f"One step, Llama {hidden}/{intermediate}, 2 layers, NF4, products in {compute}, "
        f"median of {rounds} interleaved rounds"
    )
    publish(title, ["batch", "contender", "ms", "peak MiB", "x inference"], rows, figures, arguments)
    for name, values in figures.items():
        print(name, {key: round(value, 3) for key, value in values.items() if isinstance(value, float)})


if __name__ == "__main__":
    main()
