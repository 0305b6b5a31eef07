"""The Hugging Face module of a model folder with no weights in it, and the choices made before loading.

The module is built with its parameters on the meta device (accelerate's `init_empty_weights`) and its
buffers, which are computed and small, on CPU. Code from a model folder is never run.
"""

from __future__ import annotations

import math
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from hizoo_lite.base import Bits, ComputeDtype, ModelKind
from hizoo_lite.device import is_gpu, kind_of
from hizoo_lite.errors import UserError

_CLASSES = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "classifier": AutoModelForSequenceClassification,
}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.txt",
    "vocab.json",
)
#: Elements from which on a tensor made by `torch.empty` is taken for a parameter.
_LARGE_ELEMENTS = 1 << 16
#: What draws first values.
_DRAWN = {nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_}
_COMPUTE: dict[ComputeDtype, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "float32": torch.float32,
}


def read_config(folder: Path, kind: ModelKind, num_labels: int) -> Any:
    """transformers' config of a folder, for float32 activations and without its quantization.

    Raises `UserError` for an unknown kind or architecture, and for fewer than one label.
    """
    if kind not in get_args(ModelKind):
        raise UserError(f"kind: got {kind!r}, allowed are {', '.join(get_args(ModelKind))}")
    if num_labels < 1:
        raise UserError(f"num_labels: got {num_labels}, at least 1 is wanted")
    labels = {"num_labels": num_labels} if kind == "classifier" else {}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **labels)
    except (ValueError, KeyError, OSError, StrictDataclassError) as error:
        lines = str(error.__cause__ if isinstance(error, StrictDataclassError) else error).splitlines()
        first = lines[0] if lines else type(error).__name__
        raise UserError(
            f"{folder / 'config.json'}: not a configuration this transformers knows: {first}"
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def vocabulary_of(config: Any) -> int | None:
    """How many tokens a model of this configuration has embeddings for; None if it does not say."""
    return getattr(config.get_text_config(), "vocab_size", None)


def build(config: Any, kind: ModelKind) -> nn.Module:
    """The module with parameters on meta, in eval mode. Raises `UserError` if there is none of `kind`.

    Attention is torch's scaled_dot_product_attention, which keeps no (length x length) matrix; eager
    if an architecture has none, or caps its attention logits (Gemma2): it cannot do that, and
    transformers 5.17 would leave the cap out without a word (5.23 refuses).
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    order = ("eager",) if capped else ("sdpa", "eager")
    for attempt, attention in enumerate(order, start=1):
        try:
            with init_empty_weights(include_buffers=False), _LargeOnMeta():
                module = _CLASSES[kind].from_config(
                    config, attn_implementation=attention, dtype=torch.float32, trust_remote_code=False
                )
        except (ValueError, ImportError) as error:
            if attempt < len(order) and "attention" in str(error).lower():
                continue
            raise UserError(
                f"model type {config.model_type!r} cannot be loaded as {kind}: {error}"
            ) from error
        break
    if kind == "classifier" and hasattr(module.config, "use_cache"):
        module.config.use_cache = False  # a cache of all keys and values would be filled and never read
    return module.requires_grad_(False).eval()


class _LargeOnMeta(TorchFunctionMode):
    """Has large `torch.empty` tensors, which are parameters, made without memory from the start.

    accelerate makes every parameter on CPU first and drops it: 524 MB of address space for one embedding,
    too much under a hard limit of the process's memory. On meta no first values are drawn.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DRAWN:
            tensor = args[0] if args else (kwargs or {})["tensor"]
            if tensor.is_meta:
                return tensor
        result_kwargs = dict(kwargs or {})
        if func is torch.empty and math.prod(_size(args)) >= _LARGE_ELEMENTS:
            result_kwargs["device"] = "meta"
        return func(*args, **result_kwargs)


def _size(args: tuple[Any, ...]) -> tuple[int, ...]:
    """The size that `torch.empty` is called with."""
    return tuple(args[0]) if args and isinstance(args[0], tuple | list) else tuple(args)


def read_tokenizer(folder: Path) -> Any | None:
    """The folder's tokenizer, None if it has none. Raises `UserError` if it cannot be read."""
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing more special
        raise UserError(
            f"{folder}: the tokenizer cannot be read: {error}; {_TOKENIZER_FILES[0]} may be damaged, or of "
            f"another version than tokenizers {version('tokenizers')}, which is installed here"
        ) from error


def read_generation_config(folder: Path, module: nn.Module) -> None:
    """Give the module the tokens that begin, end and fill its texts.

    Nothing else of generation_config.json and config.json: the most likely token is that of the logits, as in
    an export, without penalties, beams or a least length. Raises `UserError` if generation_config.json
    cannot be read.
    """
    own = getattr(module, "generation_config", None)
    if own is None:  # writes no text
        return
    path, stored = folder / "generation_config.json", own
    if path.exists():
        try:
            stored = GenerationConfig.from_pretrained(folder)
        except (ValueError, TypeError, OSError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
    ids = {name: getattr(stored, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids = {name: getattr(own, name) if value is None else value for name, value in ids.items()}
    for name, value in ids.items():
        several = value if name == "eos_token_id" and isinstance(value, list) else [value]
        if not all(token is None or type(token) is int for token in several):
            raise UserError(f"{path}: {name}: got {value!r:.80}, allowed: the number of a token")
    module.generation_config = GenerationConfig(**ids)


def choose_bits(wanted: Bits | None, stored: Bits | None) -> Bits:
    """The bits of the linears: those of an already quantized checkpoint, else what is wanted, else nf4.

    Raises `UserError` if both are given and differ, and for unknown bits.
    """
    if wanted is not None and wanted not in get_args(Bits):
        raise UserError(f"bits: got {wanted!r}, allowed are {', '.join(get_args(Bits))}")
    if stored is not None and wanted not in (None, stored):
        raise UserError(f"bits: got {wanted!r}, but the checkpoint is already quantized to {stored!r}")
    return stored or wanted or "nf4"


def choose_compute(wanted: ComputeDtype, device: torch.device) -> torch.dtype:
    """The dtype of products. `auto`: bf16 if the device multiplies it natively.

    A GPU otherwise fp16; CPU otherwise float32 (fp16 products are about 15 times slower there).
    Raises `UserError` for an unknown name.
    """
    if wanted != "auto" and wanted not in _COMPUTE:
        raise UserError(f"compute_dtype: got {wanted!r}, allowed are {', '.join(get_args(ComputeDtype))}")
    if wanted != "auto":
        return _COMPUTE[wanted]
    if kind_of(device).multiplies_bf16():
        return torch.bfloat16
    return torch.float16 if is_gpu(device) else torch.float32


def compute_name(dtype: torch.dtype) -> ComputeDtype:
    """The name of a dtype of products."""
    return next(name for name, known in _COMPUTE.items() if known == dtype)
