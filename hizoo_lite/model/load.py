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
from hizoo_lite.memory.allocator import keep_heap
from hizoo_lite.model import skeleton
from hizoo_lite.model.fill import Filler
from hizoo_lite.model.model import Model
from hizoo_lite.quant import Checkpoint
from hizoo_lite.stream.block import install


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
) -> Model:
    """Load a model folder or Hub id, quantizing the linears of its blocks on the way.

    bits: of those linears; None takes what the checkpoint is quantized to, else nf4. compute_dtype: of
    their products; auto is described at `skeleton.choose_compute`. device: auto, cpu, cuda or cuda:N.
    double_quant: of 4-bit weights that are quantized here. num_labels: of a classifier. seed: of a
    classifier head that the checkpoint lacks. revision: of a Hub id.

    Raises `UserError`, naming file, tensor or argument, where something is missing, contradictory,
    malformed or not supported.
    """
    keep_heap()
    checkpoint = Checkpoint.open(source, revision=revision)
    chosen = skeleton.choose_bits(bits, checkpoint.quantized_bits)
    place = skeleton.choose_device(device)
    compute = skeleton.choose_compute(compute_dtype, place)
    config = skeleton.read_config(checkpoint.folder, kind, num_labels)
    module = skeleton.build(config, kind)
    filler = Filler(checkpoint, module, kind, chosen, double_quant, compute, place, seed)
    linears = filler.fill()
    skeleton.read_generation_config(checkpoint.folder, module)
    model = Model(
        module=module,
        tokenizer=skeleton.read_tokenizer(checkpoint.folder),
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
        new_parameters=filler.new,
    )
    install(model)
    return model
