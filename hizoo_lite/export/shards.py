"""A block-sharded bitsandbytes checkpoint: which tensors there are, how they look, in which file they lie.

One safetensors file for each transformer block and one for the rest, so that a block is brought in by
reading one file from one end to the other. Linears inside the blocks are in bitsandbytes' 4-bit or 8-bit
form (QLoRA 2305.14314, LLM.int8 2208.07339), everything else is as it was. transformers reads the same
folder: the names are those it saves under, and config.json says which linears are not quantized.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from hizoo_lite.base import Bits, ModelKind
from hizoo_lite.checkpoints import hub
from hizoo_lite.checkpoints.writer import Form, write_json
from hizoo_lite.errors import UserError
from hizoo_lite.model import build
from hizoo_lite.model.blocks import find_blocks, no_linear
from hizoo_lite.model.names import Names
from hizoo_lite.quant import native
from hizoo_lite.quant.fourbit import BLOCKSIZE, NESTED_BLOCKSIZE, FourBitWeight
from hizoo_lite.quant.int8 import Int8Weight
from hizoo_lite.quant.packed import PackedWeight

REST = "rest.safetensors"

#: Buffers that older checkpoints carry and that every module computes for itself.
_COMPUTED = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias|position_ids|token_type_ids)$"
)


class Linear(NamedTuple):
    """A linear of a block, to be quantized."""

    stored: str  # the checkpoint's name of its weight
    shape: tuple[int, int]  # (out_features, in_features)
    transposed: bool  # stored as (in_features, out_features): GPT-2's Conv1D


class Layout(NamedTuple):
    """Which tensors of a model go to which file, and which of them are quantized."""

    shards: dict[str, list[str]]  # file -> the checkpoint's names
    linears: dict[str, Linear]  # by the checkpoint's name of the weight
    unconverted: list[
        str
    ]  # classes of linears that transformers leaves in 16 bits, whatever config.json says

    def called_as_usual(self) -> Layout:
        """With the files' names as `save_pretrained` has them: model-00001-of-00003.safetensors."""
        count = len(self.shards)
        files = (f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))
        return self._replace(shards=dict(zip(files, self.shards.values(), strict=True)))


def lay_out(
    shapes: Mapping[str, tuple[int, ...]], module: nn.Module, kind: ModelKind, folder: Path | str
) -> Layout:
    """Distribute a checkpoint's tensors over the files.

    shapes: of the stored tensors. module: the empty model. folder: for messages. Raises `UserError` if
    tensors are missing or have other shapes, and for blocks with weights that are no linear layers.
    """
    blocks, names = find_blocks(module), Names(shapes, module)
    inside = blocks.prefix + "."
    missing = []
    for parameter, value in module.named_parameters(remove_duplicate=False):
        stored = names.find(parameter)
        if stored is None and names.find_tied(parameter) is None and not _may_lack(parameter, names, kind):
            missing.append(parameter)
        elif stored is not None and parameter.startswith(inside) and shapes[stored] != tuple(value.shape):
            raise UserError(
                f"{folder}: tensor {stored} has shape {shapes[stored]}, but the configuration wants "
                f"{tuple(value.shape)}"
            )
        if parameter.startswith(inside) and value.ndim > 2:
            raise no_linear(module, parameter, value.shape)
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} tensors that {type(module).__name__} needs are not in the checkpoint: "
            f"{', '.join(missing[:5])}"
        )
    used = {names.find(name) for name in module.state_dict()}
    kept = [name for name in shapes if name in used or not _COMPUTED.search(name)]
    shards = _shards(kept, blocks.prefix, len(blocks.modules), names.prefix)
    return Layout(shards, _linears(module, names), _unconverted(blocks.modules))


def _may_lack(parameter: str, names: Names, kind: ModelKind) -> bool:
    return kind == "classifier" and (not names.in_trunk(parameter) or ".pooler." in parameter)


def _shards(kept: Iterable[str], prefix: str, count: int, base: str) -> dict[str, list[str]]:
    """Stored names by file, the blocks in order and the rest last."""
    bare = prefix.removeprefix(base + ".")
    block = re.compile(rf"(?:{re.escape(base)}\.)?{re.escape(bare)}\.(\d+)\.")
    shards: dict[str, list[str]] = {f"block-{number:05d}.safetensors": [] for number in range(count)}
    shards[REST] = []
    files = list(shards)
    for name in kept:
        match = block.match(name)
        number = int(match[1]) if match else count
        shards[files[min(number, count)]].append(name)
    return {file: names for file, names in shards.items() if names}


def _linears(module: nn.Module, names: Names) -> dict[str, Linear]:
    inside = find_blocks(module).prefix + "."
    found = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | Conv1D) and name.startswith(inside):
            stored = names.find(f"{name}.weight")
            if stored is not None:
                transposed = isinstance(layer, Conv1D)
                first, second = layer.weight.shape
                shape = (second, first) if transposed else (first, second)
                found[stored] = Linear(stored, shape, transposed)
    return found


def _unconverted(blocks: Iterable[nn.Module]) -> list[str]:
    """Subclasses of nn.Linear: transformers converts that class itself, and any Conv1D."""
    layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
    return sorted({type(layer).__name__ for layer in layers if type(layer) is not nn.Linear})


# ------------------------------------------------------------------------------- a quantized linear


def linear_forms(linear: Linear, bits: Bits, double_quant: bool, state: bytes) -> dict[str, Form]:
    """The tensors that bitsandbytes keeps of a linear, by full name. state: `quant_state`; unused in int8."""
    name, stem = linear.stored, linear.stored.removesuffix("weight")
    elements = linear.shape[0] * linear.shape[1]
    if bits == "int8":
        return {
            name: Form(torch.int8, linear.shape),
            f"{stem}SCB": Form(torch.float32, (linear.shape[0],)),
            f"{stem}weight_format": Form(torch.uint8, ()),
        }
    blocks = -(-elements // BLOCKSIZE)
    forms = {
        name: Form(torch.uint8, ((elements + 1) // 2, 1)),
        f"{name}.absmax": Form(torch.uint8 if double_quant else torch.float32, (blocks,)),
        f"{name}.quant_map": Form(torch.float32, (16,)),
        f"{name}.quant_state.bitsandbytes__{bits}": Form(torch.uint8, (len(state),)),
    }
    if double_quant:
        forms[f"{name}.nested_absmax"] = Form(torch.float32, (-(-blocks // NESTED_BLOCKSIZE),))
        forms[f"{name}.nested_quant_map"] = Form(torch.float32, (256,))
    return forms


def linear_tensors(linear: Linear, weight: PackedWeight, state: bytes) -> dict[str, Tensor]:
    """What `linear_forms` declares, of a packed weight."""
    name, stem = linear.stored, linear.stored.removesuffix("weight")
    if isinstance(weight, Int8Weight):
        layout = torch.zeros((), dtype=torch.uint8)  # row-major
        return {name: weight.codes, f"{stem}SCB": weight.scb, f"{stem}weight_format": layout}
    assert isinstance(weight, FourBitWeight)
    tensors = {
        name: weight.codes.view(-1, 1),
        f"{name}.absmax": weight.absmax,
        **constant_tensors(linear, weight.bits, state),
    }
    if weight.double_quant:
        tensors[f"{name}.nested_absmax"] = weight.nested_absmax
        tensors[f"{name}.nested_quant_map"] = weight.nested_table
    return tensors


def constant_tensors(linear: Linear, bits: native.FourBits, state: bytes) -> dict[str, Tensor]:
    """The code table and the description of a 4-bit linear."""
    return {
        f"{linear.stored}.quant_map": native.code_table(bits),
        f"{linear.stored}.quant_state.bitsandbytes__{bits}": torch.frombuffer(
            bytearray(state), dtype=torch.uint8
        ),
    }


def quant_state(bits: Bits, shape: tuple[int, int], dtype: torch.dtype, offset: float | None) -> bytes:
    """bitsandbytes' description of a 4-bit weight, its JSON byte for byte (`QuantState.as_dict`).

    dtype: of the matrix that was quantized. offset: the mean of absmax if that is quantized too.
    """
    state: dict[str, Any] = {
        "quant_type": bits,
        "blocksize": BLOCKSIZE,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": shape,
    }
    if offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(state).encode()


# ------------------------------------------------------------------------------------- config, index


def quantized_config(
    source: Mapping[str, Any],
    config: Any,
    kind: ModelKind,
    linears: Iterable[str],
    bits: Bits,
    double_quant: bool,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The source's config.json with a `quantization_config` that transformers understands.

    config: transformers' own. linears: module names of the quantized ones. dtype: of the weights; what
    transformers shall multiply in. Linears outside of the blocks are named as not converted, those of
    a classifier too: any model can be loaded as one.
    """
    name = str(dtype).removeprefix("torch.")
    # Said anew: transformers casts biases to the dtype named here, but not what is called weight.
    content = {**source, "dtype": name}
    content.pop("torch_dtype", None)
    content.pop("quantization_config", None)  # of a model that was merged by hand and kept it
    if bits == "none":
        return content
    four: dict[str, Any] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": bits,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": name,
    }
    options = {"load_in_8bit": True} if bits == "int8" else four
    skipped = skip_patterns(_outside(config, kind), list(linears))
    quantization = BitsAndBytesConfig(**options, llm_int8_skip_modules=skipped).to_dict()
    quantization["quant_method"] = "bitsandbytes"
    content["quantization_config"] = {k: v for k, v in quantization.items() if not k.startswith("_")}
    return content


def _outside(config: Any, kind: ModelKind) -> list[str]:
    """Names of the linears outside of the blocks, with a head of `kind` and with a classifier's.

    Without the trunk's prefix: transformers compares endings, and loads bare trunks too.
    """
    found: dict[str, None] = {}
    kinds: tuple[ModelKind, ...] = (kind, "classifier")
    for each in kinds:
        try:
            module = build.build(config, each)
            outside, _ = split_linears(module)
        except UserError:  # there is no classifier, or one of another form (BART's decoder alone has none)
            continue
        found |= dict.fromkeys(name.removeprefix(f"{module.base_model_prefix}.") for name in outside)
    return list(found)


def split_linears(module: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the linears outside of the blocks, and of those inside."""
    linears = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | Conv1D)]
    inside = find_blocks(module).prefix + "."
    outside = [name for name in linears if not name.startswith(inside)]
    return outside, [name for name in linears if name.startswith(inside)]


def skip_patterns(outside: Iterable[str], inside: list[str]) -> list[str]:
    """Names as transformers matches them: from the start, or as an ending; anchored if one is both."""

    def hits(name: str) -> bool:
        return any(linear.endswith(name) or linear.startswith(name + ".") for linear in inside)

    return [rf"^(\w+\.)?{re.escape(name)}$" if hits(name) else name for name in outside]


def write_index(
    folder: Path,
    names: Mapping[str, Iterable[str]],
    total_bytes: int,
    sha256: Mapping[str, str],
    more: Mapping[str, Any],
) -> None:
    """model.safetensors.index.json: which file each tensor is in, and the files' checksums.

    names: by file. total_bytes: of the tensors. more: for `metadata`.
    """
    metadata = {"total_size": total_bytes, "sha256": dict(sha256), **more}
    weight_map = {name: file for file, content in names.items() for name in content}
    write_json(
        folder / hub.INDEX_FILE, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    )
