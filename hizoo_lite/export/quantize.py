"""Quantize a checkpoint once, file by file, so that later runs only read.

Every tensor is read a few rows at a time; beside the packed form of one matrix nothing large is held. The
files are made one after the other and each is whole or not there, so a killed call goes on where it
stopped: a small progress file says what was asked for and which files are done.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hizoo_lite.base import Bits, ModelKind
from hizoo_lite.checkpoints import hub
from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.checkpoints.fingerprint import pieces, sha256_of
from hizoo_lite.checkpoints.tensors import TensorFile
from hizoo_lite.checkpoints.writer import (
    HASHED_CHUNK_BYTES,
    Form,
    ShardWriter,
    file_bytes,
    named_errors,
    write_json,
)
from hizoo_lite.errors import UserError
from hizoo_lite.export import shards
from hizoo_lite.files import check_space, read_json, temporary_path, write_text
from hizoo_lite.model import build
from hizoo_lite.quant.fourbit import BLOCKSIZE
from hizoo_lite.quant.packing import pack_rows
from hizoo_lite.quant.rows import RowReader, row_chunks

PROGRESS_FILE = "quantize-progress.json"
METADATA = {"format": "pt"}  # what transformers asks of every file

_ALLOWED: tuple[Bits, ...] = ("nf4", "fp4", "int8")
_COPIED_BYTES = 4_000_000  # of a tensor, at a time
_LONGEST = -1.2345678901234567e-100  # as many characters as a float takes in JSON
_SAMPLES, _SAMPLE_BYTES = 64, 256  # of a file, to tell it from another of the same size
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

#: Told how many more bytes of the result are written.
Progress = Callable[[int], None]


class Tensors(Protocol):
    """What a conversion asks of its source: a `Checkpoint`, or one whose values are made when they are read.

    `read` and `read_rows` give the dtype that `dtype` says, or float32 for a matrix that is quantized from
    more than that.
    """

    folder: Path  # whose tokenizer and licence go along
    config: dict[str, Any]

    def __iter__(self) -> Iterator[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> Tensor: ...

    def read_rows(self, name: str, start: int, stop: int) -> Tensor: ...

    def files(self) -> list[Path]:
        """All that the values depend on, beside `config`."""
        ...


class Quantization:
    """One conversion: what is asked for, how far it is, and the work itself.

    `total_bytes` is the size of the result's files, `done_bytes` of those that an earlier call finished.
    """

    def __init__(
        self,
        source: str | Path | Tensors,
        out: str | Path,
        *,
        kind: ModelKind,
        bits: Bits,
        double_quant: bool = True,
        revision: str | None = None,
        beside: Mapping[str, str] | None = None,
        usual_names: bool = False,
    ) -> None:
        """Look at source and target, touching nothing. Raises `UserError` if the work cannot begin.

        beside: texts of further files, by name, in place of the source's own. usual_names: files are called
        model-00001-of-00003.safetensors and so on, not by their blocks.

        A source that is no folder and no Hub id may be written as it is, with `bits="none"`.
        """
        allowed = _ALLOWED if isinstance(source, str | Path) else (*_ALLOWED, "none")
        if bits not in allowed:
            raise UserError(f"--bits: got {bits!r}, allowed: {', '.join(allowed)}")
        self.out, self.kind, self._beside = Path(out), kind, beside or {}
        self.bits, self.double_quant = bits, double_quant and bits in ("nf4", "fp4")
        self.checkpoint: Tensors = _open(source, revision) if isinstance(source, str | Path) else source
        self.job = {
            "source": _identity(self.checkpoint),
            "bits": self.bits,
            "double_quant": self.double_quant,
        }
        self._config = build.read_config(self.checkpoint.folder, kind, num_labels=2)
        shapes = {name: self.checkpoint.shape(name) for name in self.checkpoint}
        module = build.build(self._config, kind)
        layout = shards.lay_out(shapes, module, kind, self.checkpoint.folder)
        self.layout = layout.called_as_usual() if usual_names else layout
        if bits != "none" and not self.layout.linears:
            raise UserError(
                f"{type(module).__name__}: no linear layers in its blocks; this architecture is not supported"
            )
        self._packed = {} if bits == "none" else self.layout.linears  # by the checkpoint's name
        self._check_dtypes()
        self.complete = self._is_complete()
        self._done = {} if self.complete else self._finished_shards()
        sizes = {shard: self._planned_bytes(shard) for shard in self.layout.shards}
        self.total_bytes = sum(sizes.values())
        self.done_bytes = sum(sizes[shard] for shard in self._done)
        if not self.complete:
            self._check_space()

    @property
    def files_done(self) -> int:
        """How many files are finished."""
        return len(self._done)

    def run(self, progress: Progress | None = None) -> None:
        """Write what is missing. Raises `UserError`, naming the file, if the disk refuses.

        After that, or after an interrupt, the finished files stay and the same call goes on behind them.
        """
        if self.complete:
            return
        with named_errors(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        self._note()
        for shard in self.layout.shards:
            if shard not in self._done:
                self._done[shard] = self._write_shard(shard, progress or _ignore)
                self._note()
        self._copy_small_files()
        self._write_config()
        self._write_index()
        with named_errors(self.out):
            (self.out / PROGRESS_FILE).unlink()
        self.complete = True

    # ------------------------------------------------------------------------------ what is there

    def _is_complete(self) -> bool:
        if not (self.out / hub.INDEX_FILE).is_file():
            return False
        there = read_json(self.out / hub.INDEX_FILE, "an index of weights").get("metadata")
        job = there.get("quantize") if isinstance(there, dict) else None
        if not isinstance(job, dict):
            raise UserError(f"--out: {self.out} holds another checkpoint; allowed: a new or empty folder")
        self._check_same(job, "holds a finished checkpoint")
        Checkpoint.open(self.out)  # that no file is missing or cut
        (self.out / PROGRESS_FILE).unlink(missing_ok=True)
        return True

    def _finished_shards(self) -> dict[str, str]:
        """The files of an earlier call that are what it noted: name -> sha256."""
        if not self.out.exists():
            return {}
        if not self.out.is_dir():
            raise UserError(f"--out: {self.out} is a file; allowed: a new or empty folder")
        note = self.out / PROGRESS_FILE
        if not note.is_file():
            if any(path != temporary_path(note) for path in self.out.iterdir()):
                raise UserError(f"--out: {self.out} is not empty; allowed: a new or empty folder")
            return {}
        content = read_json(note, "what hizoo-lite quantize writes")
        job, finished = content.get("job"), content.get("shards")
        if not isinstance(job, dict) or not isinstance(finished, dict):
            raise UserError(f"{note}: not written by hizoo-lite quantize; remove {self.out} to begin anew")
        self._check_same(job, "holds an unfinished call")
        buffer = bytearray(HASHED_CHUNK_BYTES)
        kept = (shard for shard in self.layout.shards if (self.out / shard).is_file() and shard in finished)
        return {s: finished[s] for s in kept if _whole(self.out / s, buffer) == finished[s]}

    def _check_same(self, job: dict[str, Any], state: str) -> None:
        here = json.loads(json.dumps(self.job))
        different = [key for key in here if job.get(key) != here[key]]
        if not different:
            return
        parts = [
            "of another model" if key == "source" else f"with {key} {job.get(key)!r}, not {here[key]!r}"
            for key in different
        ]
        raise UserError(
            f"--out: {self.out} {state} {', '.join(parts)}; allowed: a new or empty folder, or the same call"
        )

    def _check_dtypes(self) -> None:
        for name in self.layout.linears:
            if self.checkpoint.dtype(name) not in _FLOATS:
                raise UserError(
                    f"{self.checkpoint.folder}: tensor {name} is stored as {self.checkpoint.dtype(name)}; "
                    "allowed are 16/32-bit floats"
                )

    def _check_space(self) -> None:
        needed = self.total_bytes - self.done_bytes + sum(p.stat().st_size for p in self._small_files())
        left_over = self.out.glob(".*.tmp")  # of a killed call; written over
        check_space(self.out, needed - sum(path.stat().st_size for path in left_over))

    # ---------------------------------------------------------------------------------- the files

    def _planned_bytes(self, shard: str) -> int:
        """The file's size; up to a few bytes more for each double-quantized matrix."""
        return file_bytes(self._forms(shard, {}), METADATA)

    def _forms(self, shard: str, states: dict[str, bytes]) -> dict[str, Form]:
        """Every tensor of a file. Descriptions that are not in `states` count at their largest size."""
        forms: dict[str, Form] = {}
        for name in self.layout.shards[shard]:
            linear = self._packed.get(name)
            if linear is None:
                forms[name] = Form(self.checkpoint.dtype(name), self.checkpoint.shape(name))
                continue
            state = states.get(name) or self._state(linear, _LONGEST if self.double_quant else None)
            forms |= shards.linear_forms(linear, self.bits, self.double_quant, state)
        return forms

    def _write_shard(self, shard: str, progress: Progress) -> str:
        linears = [self._packed[n] for n in self.layout.shards[shard] if n in self._packed]
        states = {linear.stored: self._state(linear, self._offset(linear)) for linear in linears}
        forms = self._forms(shard, states)
        progress(self._planned_bytes(shard) - sum(form.nbytes for form in forms.values()))  # the header
        with ShardWriter(self.out / shard, forms, METADATA) as writer:
            for linear in linears:
                weight = pack_rows(
                    self._reader(linear),
                    linear.shape,
                    self.bits,
                    dtype=torch.float32,
                    double_quant=self.double_quant,
                    name=linear.stored,
                )
                tensors = shards.linear_tensors(linear, weight, states[linear.stored])
                del weight
                for name, tensor in tensors.items():
                    writer.write(name, tensor)
                    progress(tensor.numel() * tensor.element_size())
            for name in self.layout.shards[shard]:
                if name not in self._packed:
                    for rows in self._rows(name):
                        writer.write_rows(name, rows) if rows.ndim else writer.write(name, rows)
                        progress(rows.numel() * rows.element_size())
        return writer.sha256

    def _rows(self, name: str) -> Iterator[Tensor]:
        """A stored tensor, a few rows at a time."""
        shape = self.checkpoint.shape(name)
        if not shape:
            yield self.checkpoint.read(name)
            return
        row_bytes = max(1, math.prod(shape[1:]) * self.checkpoint.dtype(name).itemsize)
        height = max(1, _COPIED_BYTES // row_bytes)
        for start in range(0, shape[0], height):
            yield self.checkpoint.read_rows(name, start, min(start + height, shape[0]))

    def _reader(self, linear: shards.Linear) -> RowReader:
        """Rows of a matrix, (out, in), as they are stored; float32 for float64."""
        whole = self.checkpoint.read(linear.stored).t() if linear.transposed else None

        def read(start: int, stop: int) -> Tensor:
            rows = (
                self.checkpoint.read_rows(linear.stored, start, stop) if whole is None else whole[start:stop]
            )
            return rows.float() if rows.dtype == torch.float64 else rows

        return read

    def _offset(self, linear: shards.Linear) -> float | None:
        """The mean of absmax, which stands in the header's part of the file: read ahead of the codes."""
        if not self.double_quant:
            return None
        rows, columns = linear.shape
        absmax = torch.empty(-(-rows * columns // BLOCKSIZE), dtype=torch.float32)
        read, done = self._reader(linear), 0
        whole = BLOCKSIZE // math.gcd(BLOCKSIZE, columns)
        for start, stop in row_chunks(rows, columns, multiple=whole):
            flat = read(start, stop).reshape(-1)
            full = flat.numel() // BLOCKSIZE * BLOCKSIZE
            parts = [flat[:full].view(-1, BLOCKSIZE).abs().amax(dim=1)]
            if full < flat.numel():
                parts.append(flat[full:].abs().amax().clamp(min=1e-38).view(1))
            for part in parts:
                absmax[done : done + part.numel()] = part
                done += part.numel()
        return float(absmax.mean())

    def _state(self, linear: shards.Linear, offset: float | None) -> bytes:
        if self.bits == "int8":
            return b""
        return shards.quant_state(self.bits, linear.shape, self._dtype(linear.stored), offset)

    def _dtype(self, name: str) -> torch.dtype:
        """What a matrix is quantized from: its stored dtype, float32 for float64."""
        stored = self.checkpoint.dtype(name)
        return torch.float32 if stored == torch.float64 else stored

    # ------------------------------------------------------------------------------- around them

    def _note(self) -> None:
        write_json(self.out / PROGRESS_FILE, {"job": self.job, "shards": self._done})

    def _small_files(self) -> list[Path]:
        """Tokenizer, generation settings, licence."""
        left_out = {"config.json", hub.INDEX_FILE, PROGRESS_FILE}
        patterns = (*hub.SMALL_FILES, "LICENSE*", "NOTICE*")
        found = {path for pattern in patterns for path in self.checkpoint.folder.glob(pattern)}
        return sorted(p for p in found if p.is_file() and p.name not in left_out)

    def _copy_small_files(self) -> None:
        for path in self._small_files():
            target = self.out / path.name
            with named_errors(target):
                shutil.copyfile(path, temporary_path(target))
                temporary_path(target).replace(target)
        for name, text in self._beside.items():
            with named_errors(self.out / name):
                write_text(self.out / name, text)

    def _write_config(self) -> None:
        first = next(iter(self.layout.linears), None)
        dtype = self._dtype(first) if first else torch.float32
        modules = [name.removesuffix(".weight") for name in self.layout.linears]
        content = shards.quantized_config(
            self.checkpoint.config, self._config, self.kind, modules, self.bits, self.double_quant, dtype
        )
        write_json(self.out / "config.json", content)

    def _write_index(self) -> None:
        names, total = {}, 0
        for shard in self.layout.shards:
            forms = TensorFile(self.out / shard).entries
            names[shard] = list(forms)
            total += sum(entry.nbytes for entry in forms.values())
        sha256 = {shard: self._done[shard] for shard in names}
        shards.write_index(self.out, names, total, sha256, {"quantize": self.job})


def _open(source: str | Path, revision: str | None) -> Checkpoint:
    checkpoint = Checkpoint.open(source, revision=revision)
    if checkpoint.quantized_bits is not None:
        raise UserError(
            f"--model: {source} is quantized already, to {checkpoint.quantized_bits}; "
            "allowed: a checkpoint in 16 or 32 bits"
        )
    return checkpoint


def _identity(checkpoint: Tensors) -> dict[str, Any]:
    """What tells one source from another: its configuration, its files' names, sizes and samples."""
    config = json.dumps(checkpoint.config, sort_keys=True).encode()
    files = {}
    for path in checkpoint.files():
        inside = path.parent == checkpoint.folder
        name = path.name if inside else f"{path.parent.name}/{path.name}"
        files[name] = [path.stat().st_size, _sample(path)]
    return {"config": hashlib.sha256(config).hexdigest(), "files": files}


def _whole(path: Path, buffer: bytearray) -> str:
    with named_errors(path, "read"):
        return sha256_of(path, buffer)


def _sample(path: Path) -> str:
    """SHA-256 of pieces spread evenly over a file."""
    found = hashlib.sha256()
    with named_errors(path, "read"), open(path, "rb", buffering=0) as file:
        for piece in pieces(file, 0, path.stat().st_size, -1, _SAMPLES, _SAMPLE_BYTES):
            found.update(piece)
    return found.hexdigest()


def _ignore(_: int) -> None:
    pass
