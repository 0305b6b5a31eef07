"""Write a checkpoint of a published shape with random weights, quantized, without ever holding it.

    python tools/make_random_model.py --shape llama-2-7b --bits nf4 --out models/random-7b
    python tools/make_random_model.py --shape opt-175b --layers 2 --out models/random-175b-2

For measuring memory and speed at sizes that are not at hand: the files are those of `hizoo-lite quantize`,
the values useless but well behaved. Matrices are normal with the configuration's initializer_range, norms
are 1, biases 0, so losses are finite and near ln(vocabulary). One chunk of normal values is quantized once
and every matrix is made of its blocks in a random order; double quantization has one scale for all blocks.
The same arguments give the same bytes. There is no tokenizer.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import transformers
from torch import Tensor

from hizoo_lite.base import Bits
from hizoo_lite.checkpoints.writer import Form, ShardWriter, file_bytes, write_json
from hizoo_lite.errors import UserError
from hizoo_lite.export import shards
from hizoo_lite.export.quantize import METADATA
from hizoo_lite.export.shards import Linear
from hizoo_lite.files import check_space
from hizoo_lite.model import build
from hizoo_lite.quant import native
from hizoo_lite.quant.fourbit import BLOCKSIZE, NESTED_BLOCKSIZE
from hizoo_lite.units import format_bytes

_CHUNK = 1 << 20  # elements that are drawn once, and written at a time
_BLOCKS = _CHUNK // BLOCKSIZE
_INT8_DEVIATIONS = 4.0  # the largest of a row of some thousand normal values


class Shape(NamedTuple):
    """A configuration class of transformers with the arguments of a published model."""

    config_class: str
    arguments: dict[str, Any]


def _opt(hidden: int, layers: int, heads: int) -> Shape:
    return Shape(
        "OPTConfig",
        {
            "hidden_size": hidden,
            "word_embed_proj_dim": hidden,
            "ffn_dim": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "vocab_size": 50272,
            "max_position_embeddings": 2048,
        },
    )


def _llama(
    hidden: int, inner: int, layers: int, heads: int, groups: int, family: str = "Llama", **more: Any
) -> Shape:
    arguments = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    return Shape(f"{family}Config", {**arguments, **more})


_LLAMA_3 = {"vocab_size": 128256, "max_position_embeddings": 8192, "bos_token_id": 128000}
_LLAMA_3 |= {"eos_token_id": 128001}
_QWEN = {"family": "Qwen2", "vocab_size": 152064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6}

SHAPES: dict[str, Shape] = {
    "opt-125m": _opt(768, 12, 12),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "opt-175b": _opt(12288, 96, 96),
    "tinyllama-1.1b": _llama(2048, 5632, 22, 32, 4, max_position_embeddings=2048),
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8),
    "mistral-7b": _llama(4096, 14336, 32, 32, 8, family="Mistral", max_position_embeddings=32768),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, **_LLAMA_3),
    "llama-3-70b": _llama(8192, 28672, 80, 64, 8, **_LLAMA_3),
    "qwen2.5-7b": _llama(3584, 18944, 28, 28, 4, **_QWEN),
    "qwen2.5-72b": _llama(8192, 29568, 80, 64, 8, **{**_QWEN, "rms_norm_eps": 1e-5}),
}


class Chunks:
    """Random blocks of 64 elements in stored form, drawn once and handed out in random order."""

    def __init__(self, bits: Bits, double_quant: bool, deviation: float, seed: int) -> None:
        self.bits, self.double_quant = bits, double_quant
        self._generator = torch.Generator().manual_seed(seed)
        values = torch.empty(_CHUNK).normal_(0.0, deviation, generator=self._generator)
        self.plain = values.to(torch.bfloat16).view(_BLOCKS, BLOCKSIZE)
        self.scale = _INT8_DEVIATIONS * deviation  # of every row in int8
        if bits == "int8":
            codes = (values * (127 / self.scale)).round_().clamp_(-127, 127)
            self.codes = codes.to(torch.int8).view(_BLOCKS, BLOCKSIZE)
        elif bits != "none":
            codes, absmax = native.quantize_blocks(self.plain, bits, BLOCKSIZE)
            self.codes, self.absmax = codes.view(_BLOCKS, BLOCKSIZE // 2), absmax
            self._quantize_absmax(absmax)

    def _quantize_absmax(self, absmax: Tensor) -> None:
        """absmax in 8 bits with one scale for all, so that blocks may be put in any order."""
        self.offset = float(absmax.mean())
        centred = absmax - self.offset
        self.nested_scale = float(centred.abs().max())
        _, _, self.nested_table, _ = native.quantize_absmax(absmax)
        middles = (self.nested_table[1:] + self.nested_table[:-1]) / 2
        self.nested_codes = torch.bucketize(centred / self.nested_scale, middles).to(torch.uint8)

    def orders(self, elements: int) -> Iterator[tuple[Tensor, int]]:
        """Random choices of blocks, with how many elements of them are wanted, `elements` in all."""
        for done in range(0, elements, _CHUNK):
            count = min(_CHUNK, elements - done)
            order = torch.randint(_BLOCKS, (-(-count // BLOCKSIZE),), generator=self._generator)
            yield order, count


def write_plain(writer: ShardWriter, name: str, form: Form, chunks: Chunks) -> None:
    """Matrices normal, vectors 1 where they are weights and 0 where they are biases."""
    if len(form.shape) < 2:
        writer.write(name, torch.full(form.shape, float(name.endswith("weight")), dtype=form.dtype))
        return
    for order, count in chunks.orders(math.prod(form.shape)):
        writer.write_piece(name, chunks.plain[order].view(-1)[:count])


def write_linear(writer: ShardWriter, linear: Linear, chunks: Chunks, state: bytes) -> None:
    """The codes of a matrix and what bitsandbytes keeps beside them."""
    name, stem = linear.stored, linear.stored.removesuffix("weight")
    elements = linear.shape[0] * linear.shape[1]
    four = chunks.bits != "int8"
    for order, count in chunks.orders(elements):
        packed = (count + 1) // 2 if four else count
        writer.write_piece(name, chunks.codes[order].view(-1)[:packed])
        if four:
            absmax = chunks.nested_codes if chunks.double_quant else chunks.absmax
            writer.write_piece(f"{name}.absmax", absmax[order])
    if not four:
        writer.write(f"{stem}SCB", torch.full((linear.shape[0],), chunks.scale))
        writer.write(f"{stem}weight_format", torch.zeros((), dtype=torch.uint8))
        return
    for key, tensor in shards.constant_tensors(linear, chunks.bits, state).items():  # type: ignore[arg-type]
        writer.write(key, tensor)
    if chunks.double_quant:
        groups = math.ceil(math.ceil(elements / BLOCKSIZE) / NESTED_BLOCKSIZE)
        writer.write(f"{name}.nested_absmax", torch.full((groups,), chunks.nested_scale))
        writer.write(f"{name}.nested_quant_map", chunks.nested_table)


def make(
    shape: str,
    out: Path,
    *,
    bits: Bits = "nf4",
    double_quant: bool = True,
    layers: int | None = None,
    seed: int = 0,
    overrides: dict[str, Any] | None = None,
) -> int:
    """Write the checkpoint into a new or empty folder; the bytes of its files.

    layers: fewer than the published model has. overrides: other arguments of the configuration. Raises
    `UserError` for unknown shapes, used folders and full disks.
    """
    if shape not in SHAPES:
        raise UserError(f"--shape: got {shape!r}, allowed: {', '.join(SHAPES)}")
    if bits not in get_args(Bits):
        raise UserError(f"--bits: got {bits!r}, allowed: {', '.join(get_args(Bits))}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} is not empty; allowed: a new or empty folder")
    config = _config(shape, layers, overrides or {})
    module = build.build(config, "causal")
    ties = set(getattr(module, "all_tied_weights_keys", None) or ())
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters() if n not in ties}
    plan = shards.lay_out(shapes, module, "causal", out)
    linears = plan.linears if bits != "none" else {}
    double_quant = double_quant and bits in ("nf4", "fp4")
    chunks = Chunks(bits, double_quant, _deviation(config), seed)
    offset = chunks.offset if double_quant else None
    states = {n: shards.quant_state(bits, x.shape, torch.bfloat16, offset) for n, x in linears.items()}
    forms = {
        shard: _forms(names, shapes, linears, states, bits, double_quant)
        for shard, names in plan.shards.items()
    }
    total_bytes = sum(file_bytes(tensors, METADATA) for tensors in forms.values())
    check_space(out, total_bytes)
    out.mkdir(parents=True, exist_ok=True)
    sha256 = {}
    for shard, names in plan.shards.items():
        with ShardWriter(out / shard, forms[shard], METADATA) as writer:
            for name in names:
                if name in linears:
                    write_linear(writer, linears[name], chunks, states[name])
                else:
                    write_plain(writer, name, forms[shard][name], chunks)
        sha256[shard] = writer.sha256
    modules = [name.removesuffix(".weight") for name in linears]
    content = {**config.to_dict(), "architectures": [type(module).__name__]}
    write_json(
        out / "config.json",
        shards.quantized_config(content, config, "causal", modules, bits, double_quant, torch.bfloat16),
    )
    tensor_bytes = sum(form.nbytes for tensors in forms.values() for form in tensors.values())
    made = {"shape": shape, "seed": seed, "bits": bits}
    shards.write_index(out, forms, tensor_bytes, sha256, {"random": made})
    return total_bytes


def _forms(
    names: list[str],
    shapes: dict[str, tuple[int, ...]],
    linears: dict[str, Linear],
    states: dict[str, bytes],
    bits: Bits,
    double_quant: bool,
) -> dict[str, Form]:
    """The tensors of one file."""
    forms: dict[str, Form] = {}
    for name in names:
        if name in linears:
            forms |= shards.linear_forms(linears[name], bits, double_quant, states[name])
        else:
            forms[name] = Form(torch.bfloat16, shapes[name])
    return forms


def _config(shape: str, layers: int | None, overrides: dict[str, Any]) -> Any:
    arguments = {**SHAPES[shape].arguments, **overrides}
    if layers is not None:
        most = arguments["num_hidden_layers"]
        if not 1 <= layers <= most:
            raise UserError(f"--layers: got {layers}, allowed: 1 to {most}")
        arguments["num_hidden_layers"] = layers
    return getattr(transformers, SHAPES[shape].config_class)(**arguments, dtype="bfloat16")


def _deviation(config: Any) -> float:
    """Of new matrices; OPT has a name of its own for it."""
    return float(getattr(config, "initializer_range", getattr(config, "init_std", 0.02)))


def main() -> int:
    """Parse, write, say how large it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", required=True, help=", ".join(SHAPES))
    parser.add_argument("--bits", default="nf4", help=", ".join(get_args(Bits)))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--no-double-quant", action="store_true")
    parser.add_argument("--layers", type=int, help="fewer blocks than the published model has")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began = time.perf_counter()
    try:
        written = make(
            given.shape,
            given.out,
            bits=given.bits,
            double_quant=not given.no_double_quant,
            layers=given.layers,
            seed=given.seed,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.out}: {format_bytes(written)}, {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
