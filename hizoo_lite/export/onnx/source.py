"""The model that a run tuned, found, and loaded for an export so that no more than a tensor is in memory.

While it runs, to be compared with, its blocks are read from disk one at a time, embeddings and head in parts.
A checkpoint in 16 bits that was quantized on loading is first quantized into a working folder, with the same
codes; GPT-2's transposed matrices become usual ones by that. Held as a whole are only models whose matrices
are used in another form than they are stored in otherwise: transposed in 16 bits, in 64 bits, or with scales
in 8 bits that were tuned.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from hizoo_lite.arrays import NumpyArrays
from hizoo_lite.base import Bits, ModelKind
from hizoo_lite.checkpoints.adapter import SPACE_FILE, find_adapter, read_record
from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.checkpoints.fingerprint import of_model
from hizoo_lite.engine.load import load
from hizoo_lite.engine.residency import Streamed
from hizoo_lite.errors import UserError
from hizoo_lite.export.quantize import Quantization
from hizoo_lite.model import build, kinds
from hizoo_lite.model.model import Model
from hizoo_lite.process import map_large
from hizoo_lite.registry import SPACES
from hizoo_lite.spaces import read_changes
from hizoo_lite.spaces.changes import Changes
from hizoo_lite.tasks.tokens import pad_id
from hizoo_lite.train import components, identity, saved
from hizoo_lite.train.folder import RunFolder
from hizoo_lite.train.progress import Progress


class Source(NamedTuple):
    """What a run says of its model, and what it changed of the weights (None with an adapter)."""

    name: str  # folder or Hub id, as the adapter says
    checkpoint: Checkpoint
    kind: ModelKind
    bits: Bits
    double_quant: bool
    num_labels: int
    seed: int
    changes: Changes | None


def read_source(run: Path, base_bits: Bits | None = None, model: str | None = None) -> Source:
    """That of a run or an adapter folder. Raises `UserError` if its model is not there, or another one.

    base_bits: of an adapter without a run, on a checkpoint in 16 bits; nf4 by default. model: folder or Hub
    id where the model is now.
    """
    config, adapter = saved.saved_config(run), find_adapter(run)
    changes = read_changes(adapter) if (adapter / SPACE_FILE).is_file() else None
    tuned = None if config is None else config.bits
    if tuned is None and changes is not None:
        tuned = read_record(adapter)["bits"]
    if base_bits is not None and tuned not in (None, base_bits):
        raise UserError(f"--base-bits: got {base_bits!r}, but {run} was tuned with bits {tuned!r}")
    name = saved.base_model(run)
    where = kinds.model_path(model or (name if config is None else config.model))
    if not where:
        raise UserError(f"--model: missing; {adapter} does not say which model it was made for")
    checkpoint = Checkpoint.open(where, revision=None if config is None else config.revision)
    _check_same(run, checkpoint, where)
    labels = None if config is None else components.find_task(config.task).num_labels
    return Source(
        name or where,
        checkpoint,
        saved.kind_of(run, checkpoint.folder),
        build.choose_bits(base_bits or tuned, checkpoint.quantized_bits),
        # as `Resolved.double_quant`: spaces that train weights need scales in float32
        (config is None or config.double_quant) and (changes is None or not _in_weights(changes)),
        labels or 2,
        0 if config is None else config.seed,
        changes,
    )


def _check_same(run: Path, checkpoint: Checkpoint, where: str) -> None:
    """UserError if run.json knows the model, and this is another one."""
    path = RunFolder(run).identity
    made_of = identity.read(path)
    if made_of.get("library") == NumpyArrays.name:  # a run on a device, which knows its graph alone
        return
    if made_of.get("model") not in (None, of_model(checkpoint.folder)):
        raise UserError(f"--model: {where} has other weights than the model that was tuned, says {path}")


def stored_folder(source: Source, work: Path, progress: Progress) -> Path:
    """A folder with the model in the form it was tuned in: its own, or one that is made in `work`."""
    checkpoint = source.checkpoint
    if source.bits == (checkpoint.quantized_bits or "none"):
        return checkpoint.folder
    progress.message(f"quantizing {source.checkpoint.folder} to {source.bits}")
    Quantization(
        str(checkpoint.folder),
        work / "quantized",
        kind=source.kind,
        bits=source.bits,
        double_quant=source.double_quant,
    ).run()
    return work / "quantized"


def load_base(source: Source, folder: Path) -> Model:
    """The model of `stored_folder`, untuned, in float32 products on the CPU."""
    return load_folder(source, folder, None if folder == source.checkpoint.folder else source.bits)


def load_folder(source: Source, folder: Path, bits: Bits | None) -> Model:
    """A model in that folder with the source's kind, labels and seed; bits: None for what is stored."""

    def loaded(residency: str) -> Model:
        return load(
            folder,
            kind=source.kind,
            bits=bits or Checkpoint.open(folder).quantized_bits or "none",
            compute_dtype="float32",
            device="cpu",
            double_quant=source.double_quant,
            num_labels=source.num_labels,
            seed=source.seed,
            residency=residency,  # type: ignore[arg-type]
        )

    try:
        model = loaded("resident" if _must_be_here(source, folder) else "disk")
    except UserError:  # a matrix that is stored transposed, or in 64 bits
        model = loaded("resident")
    if isinstance(model.residency, Streamed):
        model.residency.slots = 1  # memory counts here, not time
    map_large()  # what is freed is given back: every tensor is read once and dropped
    if model.kind == "classifier" and model.config.pad_token_id is None and model.tokenizer is not None:
        model.config.pad_token_id = pad_id(model.tokenizer, model.vocabulary)
    return model


def _in_weights(changes: Changes) -> bool:
    return SPACES.lines[changes.space].in_weights


def _must_be_here(source: Source, folder: Path) -> bool:
    """Whether scales were tuned that are stored in 8 bits."""
    changes = source.changes
    if changes is None or not _in_weights(changes) or changes.linears <= changes.residuals:
        return False
    return any(name.endswith(".nested_absmax") for name in Checkpoint.open(folder).names())
