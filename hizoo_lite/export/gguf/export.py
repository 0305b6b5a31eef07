"""`hizoo-lite export RUN --to gguf`: an adapter or, with `--merge`, the whole tuned model for llama.cpp.

Of an adapter A and B are written as they are, float32; llama.cpp multiplies by alpha / rank. Of a model the
values are those of `merged.py`: what the quantized base stands for, with what was tuned. Matrices are written
in 16 or 32 bits (llama-quantize makes fewer of them), everything else in float32, as llama.cpp wants it.
Tensors are made when they are written, one at a time. A `Modelfile` beside it tells Ollama what to load.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from hizoo_lite.base import Bits
from hizoo_lite.checkpoints.adapter import scaling
from hizoo_lite.errors import UserError
from hizoo_lite.export import card
from hizoo_lite.export.gguf import architectures, vocabulary
from hizoo_lite.export.gguf.architectures import Names
from hizoo_lite.export.merged import Dtype, open_merged
from hizoo_lite.export.peft import has_tied_head, open_adapter
from hizoo_lite.export.place import check_new, find_place, workplace
from hizoo_lite.extras import need
from hizoo_lite.files import check_space, write_text
from hizoo_lite.model import build
from hizoo_lite.quant.rows import row_chunks
from hizoo_lite.tasks import chat_templates
from hizoo_lite.train import provenance
from hizoo_lite.train.progress import Progress

ADAPTER, MODEL, MODELFILE = "adapter.gguf", "model.gguf", "Modelfile"

_TYPES = {"bf16": ("BF16", torch.bfloat16), "fp16": ("F16", torch.float16), "float32": ("F32", torch.float32)}


class Written(NamedTuple):
    """What an export made."""

    path: Path  # the GGUF file
    architecture: str  # llama.cpp's name
    tensors: int
    nbytes: int


class _Entry(NamedTuple):
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    is_matrix: bool
    source: str  # what it is read by


def export_gguf(
    run: Path | str,
    out: Path | str,
    *,
    merge: bool = False,
    dtype: Dtype | None = None,
    base_bits: Bits | None = None,
    model: str | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write `out` with a GGUF file, a Modelfile and a model card, from a run's folder or an adapter's.

    merge: the whole model in place of the adapter, its matrices in `dtype` (bf16 by default). base_bits,
    model: as of `merged.prepare`. Raises `UserError` for architectures and tokenizers that llama.cpp does not
    know or computes otherwise, for options of the other form, and unless `out` is a new or empty folder.
    """
    need("gguf", "gguf", "--to gguf")
    place, progress = find_place(out), progress or Progress()
    check_new(place)
    for flag, value in (("--dtype", dtype), ("--base-bits", base_bits)):
        if value is not None and not merge:
            raise UserError(f"{flag}: got {value!r}, which an adapter has not; allowed with --merge")
    if dtype is not None and dtype not in _TYPES:
        raise UserError(f"--dtype: got {dtype!r}, allowed: {', '.join(_TYPES)}")
    work = _Model(run, model, base_bits, dtype or "bf16") if merge else _Adapter(run, model, out)
    check_space(place, sum(_nbytes(entry, work.dtype) for entry in work.entries))
    with workplace(place) as beside:
        folder = beside / "export"
        folder.mkdir()
        _write(folder / work.file, work, progress)
        write_text(folder / MODELFILE, work.modelfile())
        write_text(folder / card.FILE, _card(run, work))
        folder.replace(place)
    path = Path(out) / work.file
    return Written(path, work.writer.arch, len(work.entries), path.stat().st_size)


class _Work:
    """What both forms have: a writer that has all keys, tensors to be written, a Modelfile."""

    file: str
    dtype: str = "float32"
    entries: list[_Entry]

    def __init__(self, base: Path, config: Any, kind: str) -> None:
        if kind != "causal":
            raise UserError(f"--to: got gguf for a {kind} model; allowed: causal ones, or --to onnx, merged")
        gguf = need("gguf", "gguf", "--to gguf")
        self.base, self.config, self.base_name = base, config, ""
        self.architecture = architectures.find(config)
        self.names = Names(config, self.architecture)
        arch = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[self.architecture.name]]
        self.writer = gguf.GGUFWriter(None, arch)

    def array(self, entry: _Entry) -> np.ndarray:
        """A tensor's values as they are written."""
        raise NotImplementedError

    def describe(self, run: Path | str, base: str) -> None:
        """Names of what this is and of what it was made of."""
        self.base_name = base
        self.writer.add_name(Path(run).resolve().name)
        self.writer.add_base_model_count(1)
        self.writer.add_base_model_name(0, Path(base).name)
        if card.HUB_ID.fullmatch(base):
            self.writer.add_base_model_organization(0, base.partition("/")[0])
            self.writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")

    def modelfile(self) -> str:
        raise NotImplementedError

    def _stops(self) -> str:
        """Ollama's parameters for the tokens that end a text; how to prompt is in the GGUF file."""
        tokenizer = build.read_tokenizer(self.base)
        if tokenizer is None:
            return ""
        ends = [tokenizer.eos_token_id]
        if (self.base / "generation_config.json").is_file():
            found = GenerationConfig.from_pretrained(self.base).eos_token_id
            ends += found if isinstance(found, list) else [found]
        texts = dict.fromkeys(tokenizer.convert_ids_to_tokens(end) for end in ends if end is not None)
        known = [text for text in texts if text is not None]  # the model may have more ids than the tokenizer
        return "".join(map(_stop, known))


class _Adapter(_Work):
    """A and B of each layer."""

    file = ADAPTER

    def __init__(self, run: Path | str, model: str | None, out: Path | str) -> None:
        """`out`: for the command that is proposed where an adapter cannot be written."""
        merging = ["hizoo-lite", "export", str(run), "--to", "gguf", "--merge", "--out", str(out)]
        instead = f"--merge, as in: {shlex.join(merging + ([] if model is None else ['--model', model]))}"
        adapter = open_adapter(run, model, "gguf", instead)
        super().__init__(adapter.base, adapter.module.config, adapter.kind)
        if has_tied_head(adapter):
            raise UserError(
                "--to: got gguf, but the adapter has rows of the output matrix, which this model shares with "
                f"its embeddings; llama.cpp has no adapter of that; allowed: {instead}"
            )
        keys, config = need("gguf", "gguf", "--to gguf").Keys, adapter.config
        self._changes = adapter.changes
        self.writer.add_type("adapter")
        self.writer.add_string(keys.Adapter.TYPE, "lora")
        self.writer.add_float32(keys.Adapter.LORA_ALPHA, scaling(config) * config["r"])
        self.describe(run, str(config["base_model_name_or_path"]))
        self.entries = []
        for linear in sorted(self._changes.linears):
            name = self.names.of(f"{linear}.weight")
            a, b = self._changes.pair(linear)
            self.entries.append(_Entry(f"{name}.lora_a", tuple(a.shape), True, linear))
            self.entries.append(_Entry(f"{name}.lora_b", tuple(b.shape), True, linear))

    def array(self, entry: _Entry) -> np.ndarray:
        a, b = self._changes.pair(entry.source)
        if entry.name.endswith("lora_a"):
            return a.numpy()
        rows = self.names.rows(f"{entry.source}.weight")
        return b.numpy() if rows is None else b.numpy()[rows]

    def modelfile(self) -> str:
        """The base is another file, which the user has."""
        name = Path(self.base_name).name
        return (
            f"# base.gguf: {name}, which the adapter was tuned on, as GGUF; or its name in Ollama\n"
            f"FROM ./base.gguf\nADAPTER ./{ADAPTER}\n{self._stops()}"
        )


class _Model(_Work):
    """Every tensor of the tuned model."""

    file = MODEL

    def __init__(self, run: Path | str, model: str | None, base_bits: Bits | None, dtype: str) -> None:
        self._merged, settings = open_merged(run, model, base_bits, None, dtype=torch.float32)
        base, self.dtype = self._merged.folder, dtype
        super().__init__(base, build.read_config(base, self._merged.kind, 2), self._merged.kind)
        if self.architecture.tied_only and not self._merged.config.get("tie_word_embeddings", True):
            raise UserError(
                f"--to: got gguf, but the head was tuned, and of a {self.config.model_type} model llama.cpp "
                "takes the embeddings for it; allowed: --to merged, onnx"
            )
        template = None if settings is None else settings.chat_template
        tokenizer = build.read_tokenizer(base)
        if tokenizer is None:
            raise UserError(f"--to: got gguf, but {base} has no tokenizer, which a GGUF file holds")
        words = vocabulary.read(
            tokenizer, base, self.config.vocab_size, template and chat_templates.read(template)
        )
        gguf = need("gguf", "gguf", "--to gguf")
        self.writer.add_type("model")
        self.describe(run, provenance.base_of(run, model))
        kind = _TYPES[dtype][0]
        file_type = "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"
        self.writer.add_file_type(gguf.LlamaFileType[file_type])
        self.writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        architectures.write_parameters(self.writer, self.config, self.architecture)
        vocabulary.write(self.writer, words)
        self._factors = architectures.rope_factors(self.config)
        self.entries = list(self._entries())

    def _entries(self) -> Iterator[_Entry]:
        for name in self._merged:
            shape = self._merged.shape(name)
            shape = shape[::-1] if self._is_transposed(name) else shape
            yield _Entry(self.names.of(name), shape, len(shape) > 1, name)
        if self._factors is not None:
            yield _Entry("rope_freqs.weight", self._factors.shape, False, "")

    def _is_transposed(self, name: str) -> bool:
        """GPT-2's matrices are stored as (in_features, out_features)."""
        return self.config.model_type == "gpt2" and ".h." in name and len(self._merged.shape(name)) == 2

    def array(self, entry: _Entry) -> np.ndarray:
        if not entry.source:
            assert self._factors is not None
            return self._factors
        values = self._read(entry)
        if entry.source.endswith("norm.weight"):
            values += self.architecture.norm_offset
        array = _bytes(values)
        rows = self.names.rows(entry.source)
        return array if rows is None else array[rows]

    def _read(self, entry: _Entry) -> Tensor:
        """In the dtype of the file; beside it a few rows in float32."""
        if not entry.is_matrix:
            return self._merged.read(entry.source)
        if self._is_transposed(entry.source):
            return _cast(self._merged.read(entry.source).t(), self.dtype, entry.name).contiguous()
        values = torch.empty(entry.shape, dtype=_TYPES[self.dtype][1])
        for start, stop in row_chunks(entry.shape[0], math.prod(entry.shape[1:]), multiple=1):
            rows = self._merged.read_rows(entry.source, start, stop)
            values[start:stop] = _cast(rows, self.dtype, entry.name)
        return values

    def modelfile(self) -> str:
        return f"FROM ./{MODEL}\n{self._stops()}"


def _stop(text: str) -> str:
    """A stop text as Ollama reads it (its parser/parser.go), or a note that there is one.

    It knows no escapes: it takes the outer quotes off, one or three of them, and drops what is not printable.
    A text in one quote ends at a quote before a line's end.
    """
    odd = [sign for sign in text if not sign.isprintable() and sign not in "\t\n\r"]
    if odd or '"""' in text:
        return f"# not said here, a Modelfile cannot hold it: stop {text!a}\n"
    quote = '"""' if '"' in text else '"'
    return f"PARAMETER stop {quote}{text}{quote}\n"


def _card(run: Path | str, work: _Work) -> str:
    is_adapter, name = isinstance(work, _Adapter), Path(work.base_name).name
    start = f"llama-cli -m base.gguf --lora {ADAPTER}" if is_adapter else f"llama-cli -m {MODEL}"
    how = f"```sh\n{start}\nollama create NAME -f {MODELFILE}\n```\n"
    if is_adapter:
        how += f"\n`base.gguf` is {name} as GGUF, as near as can be to the form that it was tuned in.\n"
    return card.write(
        run,
        title=f"{'LoRA adapter for' if is_adapter else 'Tuned'} {name}, for llama.cpp",
        about="Tuned by hizoo-lite.",
        base=work.base_name,
        base_folder=work.base,
        kind="causal",
        library="gguf",
        tags="gguf, hizoo, lora" if is_adapter else "gguf, hizoo",
        how=how,
    )


def _cast(rows: Tensor, dtype: str, name: str) -> Tensor:
    out = rows.to(_TYPES[dtype][1])
    if dtype == "fp16" and not bool(torch.isfinite(out).all()):
        raise UserError(f"--dtype: {name} holds values that fp16 cannot; allowed: bf16, float32")
    return out


def _bytes(values: Tensor) -> np.ndarray:
    """As numpy has it; bfloat16, which it lacks, as bytes."""
    if values.dtype == torch.bfloat16:
        return values.contiguous().view(torch.uint8).numpy()
    return values.numpy()


def _nbytes(entry: _Entry, dtype: str) -> int:
    size = _TYPES[dtype][1].itemsize if entry.is_matrix else 4
    return math.prod(entry.shape) * size


def _write(path: Path, work: _Work, progress: Progress) -> None:
    """The file, tensor by tensor."""
    gguf, writer = need("gguf", "gguf", "--to gguf"), work.writer
    for entry in work.entries:
        kind = gguf.GGMLQuantizationType[_TYPES[work.dtype][0] if entry.is_matrix else "F32"]
        # the dtype is named, so that numpy's is not asked for it
        writer.add_tensor_info(
            entry.name, entry.shape, np.dtype(np.float32), _nbytes(entry, work.dtype), kind
        )
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        progress.phase("write, tensors", len(work.entries))
        for entry in work.entries:
            writer.write_tensor_data(np.ascontiguousarray(work.array(entry)))
            progress.advanced(1)
    finally:
        progress.finish()
        writer.close()
