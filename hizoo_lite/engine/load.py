"""Load a Hugging Face model with its linears quantized, one tensor at a time.

The module is built without weights; every tensor is read from the checkpoint a few rows at a time,
quantized, and dropped. At no time is there a full-precision copy of more than one tensor (of one chunk of
rows, for the matrices that are quantized). QLoRA 2305.14314 keeps embeddings, norms and head in 16 bits;
so do we, with one difference: norms, biases and the activations between layers are float32, because a
zeroth-order step lives off small differences of losses.
"""

from __future__ import annotations

from pathlib import Path

from hizoo_lite.base import Bits, ComputeDtype, ModelKind
from hizoo_lite.device import choose_device, is_gpu, kind_of
from hizoo_lite.engine.block import install
from hizoo_lite.engine.choose import Budgets, Limits, ResidencyName, choose
from hizoo_lite.engine.residency import Streamed
from hizoo_lite.memory.allocator import keep_heap, map_large
from hizoo_lite.model import attention, build, fused
from hizoo_lite.model.model import Model
from hizoo_lite.model.rope import RowPositions
from hizoo_lite.model.weights import Filler
from hizoo_lite.quant import Checkpoint, native


def load(
    source: str | Path,
    *,
    kind: ModelKind = "causal",
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
) -> Model:
    """Load a model folder or Hub id, quantizing the linears of its blocks on the way.

    bits: of those linears; None takes what the checkpoint is quantized to, else nf4. compute_dtype: of
    their products; auto is described at `build.choose_compute`. device: auto, cpu, cuda or cuda:N.
    double_quant: of 4-bit weights that are quantized here. num_labels: of a classifier. seed: of a
    classifier head that the checkpoint lacks. revision: of a Hub id.
    residency: where the blocks are while they do not run: resident (on the device), host, disk; auto is
    resident without a budget, else as many blocks as `device_budget` ("24GiB", or bytes) allows stay on the
    device and the others stream from host memory, within `host_budget`, or from disk.

    Raises `UserError`, naming file, tensor or argument, where something is missing, contradictory,
    malformed, damaged (its checksum differs) or not supported, or where the environment would round
    the products of a GPU.
    """
    if device_budget is None and host_budget is None:
        keep_heap()
    else:
        map_large()  # slower, but the peak is what the planner says
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
    filler = Filler(checkpoint, module, kind, chosen, double_quant, compute, place, seed, on)
    linears = filler.fill()
    build.read_generation_config(checkpoint.folder, module)
    model = Model(
        module=module,
        tokenizer=build.read_tokenizer(checkpoint.folder),
        kind=kind,
        config=config,
        bits=chosen,
        compute=compute,
        device=place,
        state=filler.state,
        scratch=filler.scratch,
        linears=linears,
        blocks=filler.blocks.modules,
        block_prefix=filler.blocks.prefix,
        source=str(source),
        folder=checkpoint.folder,
        checkpoint=checkpoint,
        stored_names=filler.stored_names,
        row_positions=RowPositions(module, filler.state),
        away=set(filler.away),
        new_parameters=filler.new,
        limits=Limits(residency, device_budget, host_budget),
    )
    if where != "resident":
        model.residency = Streamed(model, where, budgets.device_bytes if residency == "auto" else None)
    install(model)
    return model
