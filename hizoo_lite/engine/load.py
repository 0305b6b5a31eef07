"""Load a Hugging Face model with its linears quantized, one tensor at a time.

The module is built without weights; every tensor is read from the checkpoint a few rows at a time,
quantized, and dropped. At no time is there a full-precision copy of more than one tensor (of one chunk of
rows, for the matrices that are quantized). QLoRA 2305.14314 keeps embeddings, norms and head in 16 bits;
so do we, with one difference: norms, biases and the activations between layers are float32, because a
zeroth-order step lives off small differences of losses.
"""

from __future__ import annotations

import atexit
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import psutil
import torch

from hizoo_lite.base import Bits, ComputeDtype, ModelKind
from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.device import choose_device, is_gpu, kind_of
from hizoo_lite.engine.block import install
from hizoo_lite.engine.residency import Resident, Streamed
from hizoo_lite.errors import BudgetError, UserError
from hizoo_lite.memory.limits import Budgets, Limits, Place, ResidencyName
from hizoo_lite.model import attention, build, fused
from hizoo_lite.model.kinds import find_kind, model_path
from hizoo_lite.model.model import Model
from hizoo_lite.model.rope import RowPositions
from hizoo_lite.model.weights import WeightLoader
from hizoo_lite.process import keep_heap, map_large
from hizoo_lite.quant import native
from hizoo_lite.tasks import chat_templates
from hizoo_lite.units import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Share of the host's free memory that blocks may take if no budget says so.
_HOST_SHARE = 0.8
_BYTES_AN_ELEMENT: dict[Bits, float] = {"nf4": 0.516, "fp4": 0.516, "int8": 1.0, "none": 2.0}


def load(
    source: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    folder: str | Path | None = None,
    kind: ModelKind | None = None,
    bits: Bits | None = None,
    compute_dtype: ComputeDtype = "auto",
    device: str = "auto",
    double_quant: bool = True,
    num_labels: int = 2,
    seed: int = 0,
    revision: str | None = None,
    residency: ResidencyName = "auto",
    device_budget: str | int | None = None,
    host_budget: str | int | None = None,
    chat_template: str | None = None,
) -> Model:
    """Load a model, quantizing the linear layers of its blocks on the way.

    Args:
        source: a model folder, a hub id, "embedded", or a model that transformers has loaded. The last one is
            saved first (`save_pretrained`), because blocks, fingerprints and exports are of files.
        tokenizer: of a model that transformers has loaded, saved with it.
        folder: where that is saved, new or empty; None: in a temporary folder that goes with the process, so
            that a run of it cannot be resumed by another one.
        kind: causal, masked or classifier; None: causal, of a loaded model what its class says.
        bits: of those linears; None takes what the checkpoint is quantized to, else nf4.
        compute_dtype: of their products; auto is bf16 if the device multiplies it natively, else fp16 on a
            GPU and float32 on a CPU.
        device: auto, cpu, cuda or cuda:N.
        double_quant: of 4-bit weights that are quantized here: their scales in 8 bits.
        num_labels: of a classifier.
        seed: of a classifier head that the checkpoint lacks.
        revision: of a hub id.
        residency: where the blocks are while they do not run: resident (on the device), host, disk; auto is
            resident without a budget, else as many blocks as `device_budget` allows stay on the device and
            the others stream from host memory, within `host_budget`, or from disk.
        device_budget: memory of the device, in bytes or such as "24GiB".
        host_budget: memory of the host, likewise.
        chat_template: in place of the tokenizer's own: chatml, zephyr, alpaca, or a .jinja file.

    Raises:
        UserError: naming file, tensor or argument, if something is missing, contradictory, malformed, damaged
            (its checksum differs) or not supported, or if the environment would round the products of a GPU.
        BudgetError: if the weights do not fit into the budget.

    Example:
        >>> import hizoo_lite as hz
        >>> model = hz.load("embedded", bits="nf4", device="cpu")
        >>> model.kind, len(model.blocks), model.block_of("model.layers.1.self_attn.q_proj")
        ('causal', 4, 1)
    """
    if not isinstance(source, str | Path):
        source = saved_model(source, tokenizer, folder)
        kind = find_kind(source, None, None) if kind is None else kind
    elif tokenizer is not None or folder is not None:
        raise UserError(
            "load: got a tokenizer or a folder beside the path of a model, allowed: beside a loaded model"
        )
    kind = kind or "causal"
    if device_budget is None and host_budget is None:
        keep_heap()
    else:
        map_large()  # slower, but the peak is what the planner says
    source = model_path(str(source))
    checkpoint = Checkpoint.open(source, revision=revision)
    checkpoint.verify()
    chosen = build.choose_bits(bits, checkpoint.quantized_bits)
    place = choose_device(device)
    kind_of(place).prepare()
    compute = build.choose_compute(compute_dtype, place)
    config = build.read_config(checkpoint.folder, kind, num_labels)
    module = build.build(config, kind)
    if is_gpu(place):
        attention.repeat_groups(module)
    budgets = Budgets.parse(device_budget, host_budget, place)
    where = choose(residency, place, checkpoint, chosen, budgets)
    on = "device" if where == "resident" else where
    native.launch_all(place, compute)
    fused.launch_all(place, compute)
    loader = WeightLoader(checkpoint, module, kind, chosen, double_quant, compute, place, seed, on)
    model = assemble(loader, config, source, Limits(residency, device_budget, host_budget))
    loader.warn_of_leftovers()
    build.read_generation_config(checkpoint.folder, module)
    model.tokenizer, model.chat_template = build.read_tokenizer(checkpoint.folder), chat_template
    chat_templates.give(model.tokenizer, chat_template)
    if where != "resident":
        model.residency = Streamed(model, where, budgets.device_bytes if residency == "auto" else None)
    install(model)
    return model


def assemble(loader: WeightLoader, config: Any, source: str, limits: Limits | None = None) -> Model:
    """Fill the module and make a model of it, without a tokenizer; its blocks are resident."""
    linears = loader.fill()
    return Model(
        module=loader.module,
        tokenizer=None,
        kind=loader.kind,
        config=config,
        bits=loader.bits,
        compute=loader.compute,
        device=loader.device,
        state=loader.state,
        scratch=loader.scratch,
        linears=linears,
        blocks=loader.blocks.modules,
        block_prefix=loader.blocks.prefix,
        source=source,
        folder=loader.checkpoint.folder,
        checkpoint=loader.checkpoint,
        stored_names=loader.stored_names,
        row_positions=RowPositions(loader.module, loader.state),
        residency=Resident(),
        offloaded=set(loader.offloaded),
        new_parameters=loader.new,
        limits=limits or Limits(),
    )


def choose(
    wanted: ResidencyName, device: torch.device, checkpoint: Checkpoint, bits: Bits, budgets: Budgets
) -> Place:
    """The residency to load for. Raises `UserError` for an unknown name."""
    if wanted not in get_args(ResidencyName):
        raise UserError(f"residency: got {wanted!r}, allowed are {', '.join(get_args(ResidencyName))}")
    if wanted != "auto":
        return wanted
    if budgets.device_bytes is None:
        return "resident"
    is_stored = bits == (checkpoint.quantized_bits or "none")
    if device.type == "cpu":
        return "disk" if is_stored else _refuse_too_large(checkpoint, bits, budgets.device_bytes)
    if not is_stored:
        return "host"
    weights_bytes = sum(checkpoint.nbytes(name) for name in checkpoint)
    host_bytes = budgets.host_bytes
    if host_bytes is None:
        host_bytes = int(psutil.virtual_memory().available * _HOST_SHARE)
    return "host" if weights_bytes <= host_bytes else "disk"


def _refuse_too_large(checkpoint: Checkpoint, bits: Bits, budget_bytes: int) -> Place:
    """On CPU weights that are quantized while they are loaded must fit as a whole."""
    elements = sum(checkpoint.nbytes(name) // checkpoint.dtype(name).itemsize for name in checkpoint)
    packed_bytes = int(elements * _BYTES_AN_ELEMENT[bits])
    if packed_bytes > budget_bytes:
        raise BudgetError(
            f"--device-budget: got {format_bytes(budget_bytes)}, but the weights take about "
            f"{format_bytes(packed_bytes)} in {bits}; quantize them once, they can then be streamed from "
            f"disk: hizoo-lite quantize --model {checkpoint.folder} --bits {bits} --out DIR"
        )
    return "resident"


def saved_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: str | Path | None
) -> str:
    """The folder of a model that transformers has loaded, written here; arguments as for `load`."""
    if not hasattr(model, "save_pretrained") or hasattr(model, "peft_config"):
        raise UserError(
            f"load: got a {type(model).__name__}, allowed: a path, a hub id or a model of transformers (for "
            "one of PEFT its base, and the adapter's folder as init_adapter)"
        )
    if folder is None:
        temporary = tempfile.TemporaryDirectory(prefix="hizoo-lite-")
        atexit.register(temporary.cleanup)
        path = Path(temporary.name)
    else:
        path = Path(folder).expanduser()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"folder: {path} is not empty; allowed: a new or empty folder")
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return str(path)
