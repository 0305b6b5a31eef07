"""How well bf16 products keep the tiny loss differences of a step: even/odd basis against branch by branch.

    python tools/bench_numerics.py [--quick] [--model DIR] [--bits nf4] [--json FILE]

For ten noise seeds, LoRA rank 8 on query and value and mu = 1e-3, the projected gradient and the
directional curvature of one HiZOO step are compared with a float64 evaluation of the same packed
weights, adapter and direction. Rows: float32 products, bf16 products branch by branch (what folding
alone gives), bf16 products in the even/odd basis (what hizoo_lite does), bf16 throughout.
Reported: the median over the seeds of |value - float64| / |float64|.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from reporting import make_parser, publish
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import hizoo_lite.model.linear as linear_module
from hizoo_lite.batch import Batch
from hizoo_lite.branches import EVALUATION, Branches
from hizoo_lite.engine.load import load
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.model.basis import rebuild
from hizoo_lite.model.model import Model
from hizoo_lite.noise import generator, normal
from hizoo_lite.spaces.lora import LoRA

MU = 1e-3
STORIES = Path(__file__).parents[1] / "../shared/models/stories260K"


class Float64Norm(nn.Module):
    """RMS norm without transformers' cast to float32, so that the reference is float64 throughout."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(weight), epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)


def float64_twin(model: Model) -> nn.Module:
    """A transformers model with the very weights of `model` (unpacked), in float64."""
    twin = AutoModelForCausalLM.from_config(model.config, attn_implementation="sdpa", trust_remote_code=False)
    twin = twin.double().eval()
    for name, parameter in twin.named_parameters():
        owner, leaf = name.rsplit(".", 1)
        if owner in model.linears and leaf == "weight":
            packed = model.linears[owner].weight
            value = packed.unpack(torch.empty(packed.shape, device=model.device))
            if packed.row_scale is not None:
                value *= packed.row_scale[:, None]
        elif owner in model.linears:
            value = model.linears[owner].bias
        else:
            value = model.module.get_parameter(name)
        parameter.data.copy_(value.double())
    for name, child in list(twin.named_modules()):
        if type(child).__name__ == "LlamaRMSNorm":
            twin.set_submodule(name, Float64Norm(child.weight.data, child.variance_epsilon))
        elif type(child).__name__.endswith("RMSNorm"):
            raise SystemExit(f"no float64 form of {type(child).__name__} here: choose a Llama model")
    return twin.requires_grad_(False)


@torch.no_grad()
def reference_losses(
    model: Model, twin: nn.Module, space: LoRA, ids: Tensor, directions: Mapping[str, Tensor]
) -> list[float]:
    """Losses at theta, theta + mu d, theta - mu d: three separate forwards with merged weights."""
    clean = {name: twin.get_submodule(name).weight.data.clone() for name in space.target_names}
    losses = []
    for sign in (0, 1, -1):
        for name, weight in clean.items():
            a, b = (
                space.parameters[key].cpu().double() + sign * MU * directions[key][0].cpu().double()
                for key in (f"{name}.lora_A.weight", f"{name}.lora_B.weight")
            )
            twin.get_submodule(name).weight.data.copy_(weight + space.scaling * b @ a)
        logits = twin(input_ids=ids).logits[:, :-1]
        token_losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        losses.append(float(token_losses.view(ids.shape[0], -1).mean(1).mean()))
    for name, weight in clean.items():
        twin.get_submodule(name).weight.data.copy_(weight)
    return losses


@contextmanager
def branch_by_branch() -> Iterator[None]:
    """Products of x0, x+ and x-, each rounded on its own: what the basis is measured against."""
    kept = linear_module.split, linear_module.rebuild
    linear_module.split = lambda x, out, branches, gain: out.copy_(x)
    linear_module.rebuild = lambda product, out, branches, *more: rebuild(product, out, EVALUATION, *more)
    try:
        yield
    finally:
        linear_module.split, linear_module.rebuild = kept


@contextmanager
def rounded_activations(model: Model) -> Iterator[None]:
    """Every module's float output rounded to bf16: the model as if it ran in bf16 throughout."""

    def rounded(module: nn.Module, inputs: object, output: object) -> object:
        is_float = isinstance(output, Tensor) and output.is_floating_point()
        return output.bfloat16().to(output.dtype) if is_float else output

    hooks = [m.register_forward_hook(rounded) for m in model.module.modules()]
    try:
        with branch_by_branch():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def lm_batch(ids: Tensor) -> Batch:
    """Next-token loss on every position of `ids` (rows, length)."""
    rows, length = ids.shape
    count = rows * (length - 1)
    row = torch.arange(rows).repeat_interleave(length - 1)
    return Batch(
        ids, torch.ones_like(ids), None, row, torch.arange(length - 1).repeat(rows), torch.arange(count),
        ids[:, 1:].flatten(), row, torch.arange(rows), torch.arange(rows), "answer",
    )  # fmt: skip


def scalars(losses: list[float]) -> tuple[float, float]:
    """Projected gradient and directional curvature of (l0, l+, l-)."""
    zero, plus, minus = losses
    return (plus - minus) / (2 * MU), (plus + minus - 2 * zero) / MU**2


def measure(
    source: Path, bits: str, ids: Tensor, seeds: int, device: str = "cpu"
) -> dict[str, tuple[float, float]]:
    """Median relative errors (projected gradient, curvature) by kind of product."""
    model = load(str(source), bits=bits, compute_dtype="bf16", device=device)
    space = LoRA(rank=8, train_a=True, blocks="all")
    space.attach(model, seed=0)
    for name, value in space.parameters.items():  # an adapter in mid-training, not at B = 0
        if "lora_B" in name:
            value.copy_(0.02 * normal(0, 0, "start " + name, value.shape))
    twin, traversal, batch = float64_twin(model), Traversal(model), lm_batch(ids)
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(seeds):
        directions = {
            name: normal(seed, 1, name, p.shape).to(model.device)[None]
            for name, p in space.parameters.items()
        }
        truth = scalars(reference_losses(model, twin, space, ids, directions))

        def record(kind: str) -> None:
            losses = traversal.losses(batch, Branches.of(), MU, directions).mean().tolist()  # noqa: B023
            pairs = zip(scalars(losses), truth, strict=True)  # noqa: B023
            errors.setdefault(kind, []).append(tuple(abs(got - want) / abs(want) for got, want in pairs))

        record("even/odd bf16 products")
        with branch_by_branch():
            record("bf16 branch by branch")
        with rounded_activations(model):
            record("bf16 throughout")
        for layer in model.linears.values():
            layer.compute = torch.float32
        record("float32 products")
        for layer in model.linears.values():
            layer.compute = torch.bfloat16
    return {
        kind: tuple(statistics.median(values) for values in zip(*found, strict=True))
        for kind, found in errors.items()
    }


def random_llama(folder: Path, seed: int = 0) -> Path:
    """A random 8-layer Llama (hidden 256), saved as a Hugging Face folder."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=1024, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    draw = generator(seed, "random llama")
    for name, value in model.named_parameters():
        if value.ndim > 1:
            value.data.copy_(torch.from_numpy(draw.normal(0, 0.05, value.shape).astype(np.float32)))
        else:
            assert "norm" in name
    model.save_pretrained(folder)
    return folder


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, help="a folder with another Llama checkpoint")
    parser.add_argument("--bits", choices=("nf4", "fp4", "int8", "none"), default="none")
    arguments = parser.parse_args()
    seeds = 10
    draw = generator(1, "tokens")
    found: dict[str, dict[str, tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sources = {"random_llama": random_llama(Path(folder) / "random")}
        if arguments.model:
            sources = {arguments.model.name: arguments.model}
        elif STORIES.is_dir():
            sources["stories260K"] = STORIES
        for name, source in sources.items():
            ids = torch.from_numpy(draw.integers(3, 500, (4, 32 if arguments.quick else 64)))
            found[name] = measure(source, arguments.bits, ids, seeds, arguments.device)
    rows = [[name, kind, *errors] for name, kinds in found.items() for kind, errors in kinds.items()]
    figures = {
        name: {
            "projected_gradient_error": kinds["even/odd bf16 products"][0],
            "curvature_error": kinds["even/odd bf16 products"][1],
            "branchwise_projected_gradient_error": kinds["bf16 branch by branch"][0],
            "branchwise_curvature_error": kinds["bf16 branch by branch"][1],
            "all": kinds,
        }
        for name, kinds in found.items()
    }
    title = (
        f"Relative error against float64, mu = {MU}, bits = {arguments.bits}, median of {seeds} noise seeds"
    )
    publish(title, ["model", "products", "projected gradient", "curvature"], rows, figures, arguments)


if __name__ == "__main__":
    main()
