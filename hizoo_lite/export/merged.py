"""The tuned model as a plain Hugging Face folder, in 16 or 32 bits or quantized again.

Every matrix of the blocks is W + (alpha / r) B A, computed in float32 from the values that the run has seen:
those that the quantized base stands for, not the 16-bit ones that it was once made from, because the adapter
was tuned on the former and makes up for their errors. Of spaces that train weights, the changed ones.
Everything else is the base's: embeddings, norms, a tied head, unless a classifier's was trained, or rows for
labels, with which a tied head becomes a matrix of its own.

The values are made a few rows at a time, when the writer of `quantize.py` asks for them: beside the packed
form of one matrix nothing large is held (GPT-2's transposed ones: the matrix in float32). Files are whole or
not there, the index comes last, and a killed call goes on where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, final, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hizoo_lite.base import Bits, ModelKind
from hizoo_lite.checkpoints.adapter import SPACE_FILE, check_heads, find_adapter, read_record
from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.config import TrainConfig
from hizoo_lite.errors import UserError
from hizoo_lite.export import card
from hizoo_lite.export.card import CLASSES
from hizoo_lite.export.quantize import Quantization
from hizoo_lite.model import build, kinds
from hizoo_lite.model.blocks import find_blocks
from hizoo_lite.model.names import Names
from hizoo_lite.process import map_large
from hizoo_lite.quant import from_checkpoint, pack_rows
from hizoo_lite.quant.packed import PackedWeight
from hizoo_lite.quant.rows import row_chunks
from hizoo_lite.registry import SPACES
from hizoo_lite.spaces import read_changes
from hizoo_lite.spaces.changes import Changes, check_head
from hizoo_lite.tasks import chat_templates
from hizoo_lite.tasks.tokens import pad_id
from hizoo_lite.train import provenance, saved

Dtype = Literal["bf16", "fp16", "float32"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}


def prepare(
    run: Path | str,
    out: Path | str,
    *,
    model: str | None = None,
    base_bits: Bits | None = None,
    base_double_quant: bool | None = None,
    dtype: Dtype = "bf16",
    bits: Bits = "none",
    double_quant: bool = True,
) -> Quantization:
    """Look at a run (or an adapter's folder) and its model, touching nothing; `.run()` writes `out`.

    model: folder or Hub id, instead of the one the run names. base_bits, base_double_quant: how a base in 16
    bits was quantized on loading; None takes the run's settings, and is refused for an adapter without a run
    on such a base. dtype: of what is written. bits: nf4, fp4 or int8 quantizes the blocks' matrices again,
    `double_quant` with their scales in 8 bits; what the quantizer's grid cannot hold of the change is lost.

    Raises `UserError` if run and model do not fit, and if `out` is not a new or empty folder, or one
    of the same call.
    """
    if dtype not in _DTYPES:
        raise UserError(f"--dtype: got {dtype!r}, allowed: {', '.join(_DTYPES)}")
    merged, settings = open_merged(
        run, model, base_bits, base_double_quant, dtype=_DTYPES[dtype], is_packed=bits != "none"
    )
    template = None if settings is None else settings.chat_template
    beside = {} if template is None else {chat_templates.FILE: chat_templates.read(template)}
    beside[card.FILE] = _card(run, merged, provenance.base_of(run, model), bits, dtype)
    form: dict[str, Any] = {"bits": bits, "double_quant": double_quant}
    return Quantization(merged, out, kind=merged.kind, beside=beside, usual_names=True, **form)


def open_merged(
    run: Path | str,
    model: str | None,
    base_bits: Bits | None,
    base_double_quant: bool | None,
    *,
    dtype: torch.dtype,
    is_packed: bool = False,
) -> tuple[Merged, TrainConfig | None]:
    """The tensors of a run's tuned model, and the run's settings; arguments as of `prepare` and `Merged`."""
    map_large()  # 100 MiB instead of 137 for a GPT-2 of 2048: matrices come and go
    folder, settings = find_adapter(run), provenance.saved_config(run)
    source = provenance.base_of(run, model)
    if not source:
        raise UserError(f"--model: missing; {folder} does not say which model it was made for")
    path = kinds.model_path(source)
    checkpoint = Checkpoint.open(path, revision=settings.revision if settings else None)
    checkpoint.verify()
    changes = read_changes(folder)
    kind = saved.kind_of(run, checkpoint.folder)
    wanted = base_bits or (settings.bits if settings else None) or _recorded_bits(folder)
    if wanted is None and settings is None and checkpoint.quantized_bits is None:
        raise UserError(
            f"--base-bits: missing; {folder} does not say how {source} was quantized on loading; "
            f"allowed: {', '.join(get_args(Bits))}"
        )
    base = _Base(
        checkpoint,
        kind,
        build.choose_bits(wanted, checkpoint.quantized_bits),
        # as `Resolved.double_quant`
        (settings is None or settings.double_quant) and not SPACES.lines[changes.space].in_weights
        if base_double_quant is None
        else base_double_quant,
    )
    return Merged(base, changes, dtype, is_packed=is_packed), settings


def _card(run: Path | str, merged: Merged, base: str, bits: Bits, dtype: Dtype) -> str:
    auto = CLASSES[merged.kind]
    lines = [
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f"model = {auto}.from_pretrained(MODEL)  # this folder",
        "tokenizer = AutoTokenizer.from_pretrained(MODEL)",
    ]
    return card.write(
        run,
        title=f"Tuned {Path(base).name}",
        about=f"Weights in {dtype if bits == 'none' else bits}, tuned by hizoo-lite.",
        base=base,
        base_folder=merged.folder,
        kind=merged.kind,
        library="transformers",
        tags="hizoo, merged",
        how="```python\n" + "\n".join(lines) + "\n```\n",
    )


def _recorded_bits(folder: Path) -> Bits | None:
    return read_record(folder)["bits"] if (folder / SPACE_FILE).is_file() else None


class _Base(NamedTuple):
    """The model that was tuned, in the form that it had then."""

    checkpoint: Checkpoint
    kind: ModelKind
    bits: Bits  # of the blocks' matrices
    double_quant: bool  # of those that are quantized when they are read


class _Matrix(NamedTuple):
    """A linear layer's weight."""

    linear: str  # name in the module tree
    stored: str  # of its weight in the checkpoint
    shape: tuple[int, int]  # (out_features, in_features)
    transposed: bool  # stored as (in_features, out_features): GPT-2's Conv1D
    is_inside: bool  # one of a block


@final
class Merged:
    """The tensors of a tuned model, made when they are read: `quantize.Tensors`.

    They have the checkpoint's names, with the trunk's prefix if it lacked that.
    """

    def __init__(self, base: _Base, changes: Changes, dtype: torch.dtype, *, is_packed: bool) -> None:
        """is_packed: matrices of blocks are quantized afterwards, and read in float32 for that."""
        self.folder, self.kind = base.checkpoint.folder, base.kind
        self._base, self._changes, self._dtype, self._is_packed = base, changes, dtype, is_packed
        config, self._module = _build(base, changes)
        self._names = Names(base.checkpoint.names(), self._module)
        self._matrices: dict[str, _Matrix] = {}
        self._heads: dict[str, Tensor] = {}
        self._copied: dict[str, str] = {}  # name -> the checkpoint's
        self._now: tuple[str, PackedWeight | Tensor] | None = None  # the matrix that was read last
        self._untied = False
        self._collect()
        self.config = self._describe(config)

    def __iter__(self) -> Iterator[str]:
        yield from (*self._copied, *self._matrices, *self._heads)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        if name in self._matrices:
            rows, columns = self._matrices[name].shape
            return (columns, rows) if self._matrices[name].transposed else (rows, columns)
        if name in self._heads:
            return tuple(self._heads[name].shape)
        return self._base.checkpoint.shape(self._copied[name])

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor is written in, or quantized from; buffers of integers keep theirs."""
        stored = self._base.checkpoint.dtype(self._copied[name]) if name in self._copied else self._dtype
        return self._dtype if stored.is_floating_point else stored

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        shape = self.shape(name)
        if not shape:
            return self._cast(self._base.checkpoint.read(self._copied[name]), name)
        return self.read_rows(name, 0, shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start .. stop of a tensor. Raises `UserError` for values that the dtype cannot hold."""
        if name in self._heads:
            return self._cast(self._heads[name][start:stop], name)
        if name in self._copied:
            return self._cast(self._base.checkpoint.read_rows(self._copied[name], start, stop), name)
        matrix = self._matrices[name]
        rows = self._whole(matrix)[start:stop] if matrix.transposed else self._values(matrix, start, stop)
        return rows if self._is_packed and matrix.is_inside else self._cast(rows, name)

    def files(self) -> list[Path]:
        """Those of the base and of what was tuned."""
        return [*self._base.checkpoint.files(), *self._changes.files]

    # --------------------------------------------------------------------------------- the values

    def _values(self, matrix: _Matrix, start: int, stop: int) -> Tensor:
        """Merged rows of (out_features, in_features), float32."""
        if self._now is None or self._now[0] != matrix.linear:
            self._now = None  # frees the one before
            self._now = (matrix.linear, self._changes.weight(matrix.linear, self._weight(matrix)))
        weight = self._now[1]
        assert isinstance(weight, PackedWeight)
        rows = weight.values(torch.empty(stop - start, matrix.shape[1]), start)
        self._changes.add(matrix.linear, rows, start)
        return rows

    def _whole(self, matrix: _Matrix) -> Tensor:
        """The merged matrix as it is stored, (in_features, out_features), float32."""
        key = f"{matrix.linear}, transposed"
        if self._now is None or self._now[0] != key:
            whole = torch.empty(matrix.shape[::-1])
            for start, stop in row_chunks(*matrix.shape, multiple=1):
                whole[:, start:stop] = self._values(matrix, start, stop).t()
            self._now = (key, whole)
        assert isinstance(self._now[1], Tensor)
        return self._now[1]

    def _weight(self, matrix: _Matrix) -> PackedWeight:
        """The base's weight in the form in which it was tuned."""
        checkpoint, stored = self._base.checkpoint, matrix.stored
        quantized = self._names.beside(stored)
        if quantized:
            tensors = {
                short: checkpoint.read(full) for short, full in {**quantized, "weight": stored}.items()
            }
            weight = from_checkpoint(tensors, name=stored)
            self._check_shape(stored, weight.shape, matrix.shape)
            return weight
        wanted = matrix.shape[::-1] if matrix.transposed else matrix.shape
        self._check_shape(stored, checkpoint.shape(stored), wanted)
        whole = checkpoint.read(stored).t() if matrix.transposed else None

        def read(start: int, stop: int) -> Tensor:
            return checkpoint.read_rows(stored, start, stop) if whole is None else whole[start:stop]

        bits: Bits = self._base.bits if matrix.is_inside and checkpoint.quantized_bits is None else "none"
        dtype = checkpoint.dtype(stored)
        return pack_rows(
            read,
            matrix.shape,
            bits,
            dtype=torch.float32 if dtype == torch.float64 else dtype,
            double_quant=self._base.double_quant,
            name=stored,
        )

    def _cast(self, values: Tensor, name: str) -> Tensor:
        out = values.to(self.dtype(name), copy=True)  # a view would keep a whole matrix
        if out.dtype == torch.float16 and not bool(torch.isfinite(out).all()):
            raise UserError(f"--dtype: {name} holds values that fp16 cannot; allowed: bf16, float32")
        return out

    def _check_shape(self, stored: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if tuple(got) != tuple(wanted):
            raise UserError(
                f"{self.folder}: tensor {stored} has shape {tuple(got)}, but the configuration wants "
                f"{tuple(wanted)}"
            )

    # ---------------------------------------------------------------------------- what there is

    def _collect(self) -> None:
        """Where each parameter of the module comes from. Raises `UserError` if something does not fit."""
        check_heads(
            self._changes.files[-1], self._changes.heads, self._base.kind, str(self._module.base_model_prefix)
        )
        inside = find_blocks(self._module).prefix + "."
        linears = {
            f"{name}.weight": (name, layer)
            for name, layer in self._module.named_modules()
            if isinstance(layer, nn.Linear | Conv1D)
        }
        parameters = dict(self._module.named_parameters(remove_duplicate=False))
        tied_to: dict[str, str] = {}  # stored name of each parameter that need not be written while tied
        for parameter in self._module.state_dict():
            stored = self._names.find(parameter)
            name = self._written_name(parameter, stored)
            tuned = parameter in linears and linears[parameter][0] in self._changes.linears
            tied = self._names.find_tied(parameter) if tuned else None
            if tied is not None:  # a head, which has rows of its own by now
                stored, self._untied = stored or tied, True
            if parameter in self._changes.heads:
                self._add_head(name, parameter, parameters[parameter])
            elif stored is None:
                self._check_may_lack(parameter, parameters)
                if parameter in parameters:
                    tied_to[name] = str(self._names.find_tied(parameter))
            elif parameter in linears and (
                tuned or parameter.startswith(inside) or self._names.beside(stored)
            ):
                linear, layer = linears[parameter]
                first, second = layer.weight.shape
                transposed = isinstance(layer, Conv1D)
                shape = (second, first) if transposed else (first, second)
                is_inside = parameter.startswith(inside)
                self._matrices[name] = _Matrix(linear, stored, shape, transposed, is_inside)
            elif self._is_copy_of_tied(parameter, stored):
                tied_to[name] = stored
            else:
                self._copied[name] = stored
        if self._untied:  # then nothing is tied: BERT's head has a bias, too
            self._copied |= tied_to
        self._refuse_unknown(parameters)

    def _refuse_unknown(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """UserError if something was tuned that the model does not have."""
        here = {matrix.linear for matrix in self._matrices.values()}
        unknown = sorted((self._changes.linears - here) | (set(self._changes.heads) - set(parameters)))
        if unknown:
            raise UserError(
                f"{self._changes.files[0].parent}: does not fit {self.folder}; first of {len(unknown)} names "
                f"that the model's blocks and head lack: {unknown[0]!r}"
            )

    def _written_name(self, parameter: str, stored: str | None) -> str:
        prefix = self._names.prefix + "."
        if stored is None or not self._names.in_trunk(parameter) or stored.startswith(prefix):
            return stored or parameter
        return prefix + stored

    def _add_head(self, name: str, parameter: str, wanted: Tensor) -> None:
        value = self._changes.heads[parameter]
        check_head(self._changes.files[-1], parameter, value, wanted)
        self._heads[name] = value

    def _check_may_lack(self, parameter: str, parameters: dict[str, nn.Parameter]) -> None:
        """Buffers compute themselves, and a tied parameter is stored under the other's name."""
        if parameter in parameters and self._names.find_tied(parameter) is None:
            raise UserError(
                f"{self.folder}: {parameter} is neither in the checkpoint nor in what was tuned; a merged "
                "model would begin with random values there"
            )

    def _is_copy_of_tied(self, parameter: str, stored: str) -> bool:
        """Whether a stored tensor need not be written: the one it is tied to is the same."""
        checkpoint = self._base.checkpoint
        ties: dict[str, str] = getattr(self._module, "all_tied_weights_keys", None) or {}
        source = self._names.find(ties[parameter]) if parameter in ties else None
        if source is None or source == stored or checkpoint.shape(source) != checkpoint.shape(stored):
            return False
        shape = checkpoint.shape(stored)
        for start, stop in row_chunks(shape[0], math.prod(shape[1:]), multiple=1):
            one, other = (checkpoint.read_rows(name, start, stop) for name in (stored, source))
            if not torch.equal(one.float(), other.float()):
                self._untied = True  # as our loader, which keeps them apart
                return False
        return True

    def _describe(self, config: Any) -> dict[str, Any]:
        """config.json: the base's, for the model as it is now."""
        base, content = self._base, dict(self._base.checkpoint.config)
        content.pop("quantization_config", None)
        content.pop("torch_dtype", None)
        content["architectures"] = [type(self._module).__name__]
        content["dtype"] = str(self._dtype).removeprefix("torch.")
        if self._untied:
            content["tie_word_embeddings"] = False
        if base.kind == "classifier":
            labels = content.get("id2label") or {}
            if len(labels) != config.num_labels:
                names = [f"LABEL_{label}" for label in range(config.num_labels)]
                content["id2label"] = {str(label): name for label, name in enumerate(names)}
                content["label2id"] = {name: label for label, name in enumerate(names)}
            tokenizer = build.read_tokenizer(self.folder)
            if config.pad_token_id is None and tokenizer is not None:  # as `setup.make_encoder`
                content["pad_token_id"] = pad_id(tokenizer, build.vocabulary_of(config))
        content["hizoo_lite"] = {
            "merged": self._changes.space,
            "base_bits": base.bits,
            "base_double_quant": base.double_quant,
        }
        return content


def _build(base: _Base, changes: Changes) -> tuple[Any, nn.Module]:
    """Configuration and empty module, with as many labels as the classifier that was tuned has."""
    folder = base.checkpoint.folder
    config = build.read_config(folder, base.kind, num_labels=2)
    module = build.build(config, base.kind)
    if base.kind != "classifier":
        return config, module
    trunk = str(module.base_model_prefix) + "."
    last = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and not n.startswith(trunk)][-1]
    stored = Names(base.checkpoint.names(), module).find(f"{last}.weight")
    if f"{last}.weight" in changes.heads:
        labels = changes.heads[f"{last}.weight"].shape[0]
    elif stored is not None:
        labels = base.checkpoint.shape(stored)[0]
    else:
        return config, module
    config = build.read_config(folder, base.kind, num_labels=labels)
    return config, build.build(config, base.kind)
