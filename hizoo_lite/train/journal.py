"""journal.bin: one checksummed record of fixed size a step, from which the trained state can be rebuilt.

A step is a pure function of its record: z comes from (seed, step, name), so that the losses' few numbers are
all that a run learns from its data, and the gradient of a head if that is exact. With the initial state they
give every later one, without the model (`replay.py`); MeZO (2305.17333, section 2.1) notes the same of seeds
and projected gradients.

The file, little-endian: a header of 32 bytes (magic, version, branches, size of a record, checksum), then the
records. A record's CRC-32 continues the one before it, so that one that is lost, doubled or moved is seen
too. The journal is forced to the disk with every checkpoint only: a power failure may leave zeros where many
records were. So it holds up to the first record that is not valid, and what is behind that is dropped.

Nothing but the standard library is imported: `hizoo_lite.edge` writes the same file.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from hizoo_lite.errors import StorageError, UserError

MAGIC = b"HIZOOJNL"
#: 4 holds exact gradients, 3 several directions a step, 2 says of every curvature where it is from; in 1 it
#: was from losses. All are read, and gone on with.
VERSION = 4
VERSIONS = (1, 2, 3, VERSION)
#: magic, version, branches, bytes of a record, directions (0 before version 3, which had one), values of the
#: exact gradients (0 before version 4, which had none), nothing, CRC-32 of what is before it
_HEADER = struct.Struct("<8sHHIHI6sI")
#: step, seed, data position, losses, halvings, flags, nothing, coefficient, curvature, smoothing, lr, decay;
#: the losses follow, then coefficient and curvature of each further direction, then exact gradients, float32
_FIXED = struct.Struct("<QQQBBB5sddddd")
_CHECKSUM = struct.Struct("<I4s")
#: Losses of a step: a record counts them in a byte.
MOST_BRANCHES = 255
_SKIPPED, _CLIPPED, _CURVED, _PREDICTED = 1, 2, 4, 8
_MASK = (1 << 64) - 1
_WITHOUT = (
    "move it away: --resume then goes on from the newest checkpoint, and earlier steps cannot be replayed"
)


class Record(NamedTuple):
    """The scalars of one step."""

    step: int
    seed: int  # of the run
    position: int  # examples that earlier steps have drawn: where in the data's order this step begins
    losses: tuple[float, ...]  # mean loss of each branch, as `Estimator.release` gives them; none of a secret
    coefficients: tuple[float, ...]  # of each direction, after clipping; none in a skipped step
    curvatures: tuple[float, ...] | None  # along each; None if it was not measured
    smoothing: float  # weight of that observation
    lr: float  # 0.0 in a skipped step
    decay: float  # of the weights, already times lr
    skipped: bool = False  # a loss was not finite: nothing was changed
    clipped: bool = False  # a coefficient was cut to the limit
    chunk_halvings: int = 0  # of the chunks that the losses were computed in
    predicted: bool = False  # the curvature is from predictions, not from losses
    exact: bytes = b""  # `Losses.exact` over the batch, float32, little-endian; nothing in a skipped step


class Form(NamedTuple):
    """What the records of a journal hold."""

    branches: int  # at most
    directions: int
    exact: int = 0  # values


def record_bytes(branches: int, directions: int = 1, exact: int = 0) -> int:
    """Bytes of a record of a step with at most so many branches, along so many directions."""
    return _FIXED.size + 8 * branches + 16 * max(0, directions - 1) + 4 * exact + _CHECKSUM.size


class Journal:
    """The journal of a run that is going on: `append` once a step. A context manager."""

    def __init__(self, path: Path, branches: int, directions: int = 1, exact: int = 0) -> None:
        """Open `path` for steps of at most `branches` branches, which it must have been made for; or make it.

        What does not hold at its end is cut off. Raises `UserError` if it is another kind of journal, or
        for more branches than a record counts, `StorageError` if it cannot be written.
        """
        if branches > MOST_BRANCHES:
            raise UserError(
                f"estimator: got {branches} branches a step, a journal holds up to {MOST_BRANCHES} "
                f"(--directions: up to {MOST_BRANCHES - 1})"
            )
        self.path, self.form, self.version = path, Form(branches, directions, exact), VERSION
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror}") from error
        try:
            self._checksum, self._end = self._prepare()
        except BaseException:
            os.close(self._file)
            raise

    def _prepare(self) -> tuple[int, int]:
        """The checksum to go on from, and where."""
        found_form = _form(self.path)
        if found_form is None:
            header = _header(self.form)
            self._cut(0)
            self._write(header, 0)
            return zlib.crc32(header), len(header)
        self.version, form = found_form
        if form != self.form:
            raise UserError(
                f"{self.path}: was made for {_described(form)}, this run has {_described(self.form)}"
            )
        found = scan(self.path)
        end = _HEADER.size + len(found.records) * record_bytes(*form)
        self._cut(end)
        return found.checksum, end

    def append(self, record: Record) -> None:
        """Add a record. It is in the file when this returns, or not at all: then `StorageError`."""
        data, checksum = _packed(record, self.form, self._checksum)
        try:
            self._write(data, self._end)
        except StorageError:
            with suppress(StorageError):  # the next record overwrites it, a reader drops it
                self._cut(self._end)
            raise
        self._end, self._checksum = self._end + len(data), checksum

    def truncate(self, steps: int) -> None:
        """Drop the records from step number `steps` on."""
        kept = [record for record in read(self.path) if record.step < steps]
        header = _header(self.form, self.version)
        self._checksum = zlib.crc32(header)
        for record in kept:
            _, self._checksum = _packed(record, self.form, self._checksum)
        self._end = len(header) + len(kept) * record_bytes(*self.form)
        self._cut(self._end)

    def sync(self) -> None:
        """Force what was appended to the disk: it then outlives a power failure too."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written: {error.strerror}") from error

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cut(self, size: int) -> None:
        try:
            os.ftruncate(self._file, size)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written: {error.strerror}") from error

    def _write(self, data: bytes, offset: int) -> None:
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self._file, data[done:], offset + done)
            except OSError as error:
                raise StorageError(f"{self.path}: cannot be written: {error.strerror}") from error


class Found(NamedTuple):
    """What a journal holds."""

    records: list[Record]  # up to the first that does not hold, in order
    lost_bytes: int  # behind them
    checksum: int  # which the next record continues


def read(path: Path) -> list[Record]:
    """The records up to the first that does not hold, in order. `UserError` if the file is no journal."""
    return scan(path).records


def scan(path: Path) -> Found:
    """The records up to the first that does not hold, and what is behind. `UserError` as for `read`."""
    found_form = _form(path)
    try:
        data = memoryview(path.read_bytes())[_HEADER.size :]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if found_form is None:
        return Found([], len(data), 0)
    version, form = found_form
    found: list[Record] = []
    size, checksum = record_bytes(*form), zlib.crc32(_header(form, version))
    for begin in range(0, len(data) - size + 1, size):
        record, after = _unpacked(bytes(data[begin : begin + size]), form, checksum)
        if record is None or (found and record.step <= found[-1].step):
            break
        found.append(record)
        checksum = after
    return Found(found, len(data) - len(found) * size, checksum)


def _described(form: Form) -> str:
    exact = f" and {form.exact} exact values" if form.exact else ""
    return f"{form.branches} branches a step along {form.directions}{exact}"


def _header(form: Form, version: int = VERSION) -> bytes:
    directions = form.directions if version >= 3 else 0
    known = MAGIC, version, form.branches, record_bytes(*form), directions, form.exact
    data = _HEADER.pack(*known, bytes(6), 0)[:-4]
    return data + struct.pack("<I", zlib.crc32(data))


def _form(path: Path) -> tuple[int, Form] | None:
    """Version and form of the records, from the header; None if that never reached the disk."""
    try:
        with path.open("rb") as file:
            data = file.read(_HEADER.size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) < _HEADER.size or not any(data):  # killed, or the power failed, before it was whole
        return None
    if data[:8] != MAGIC:
        raise UserError(f"{path}: is not a journal; {_WITHOUT}")
    _, version, branches, _, directions, exact, _, _ = _HEADER.unpack(data)
    if version not in VERSIONS:
        known = ", ".join(map(str, VERSIONS))
        raise UserError(f"{path}: version: got {version}, this program reads {known}; {_WITHOUT}")
    form = Form(int(branches), int(directions) if version >= 3 else 1, int(exact))
    sound = data[-4:] == struct.pack("<I", zlib.crc32(data[:-4])) and record_bytes(*form) < 1 << 32
    is_some = form.directions > 0 or form.exact > 0  # a step moves along something
    if not sound or not is_some or data != _header(form, version):
        raise UserError(f"{path}: its header is damaged; {_WITHOUT}")
    return int(version), form


def _packed(record: Record, form: Form, checksum: int) -> tuple[bytes, int]:
    """A record's bytes, and their checksum."""
    if len(record.losses) > form.branches:
        raise ValueError(f"journal: {len(record.losses)} losses in a record of {form.branches}")
    flags = _SKIPPED * record.skipped | _CLIPPED * record.clipped
    flags |= _CURVED * (record.curvatures is not None) | _PREDICTED * record.predicted
    nothing = (math.nan,) * max(1, form.directions)
    coefficients, curvatures = record.coefficients or nothing, record.curvatures or nothing
    losses = (*record.losses, *[math.nan] * (form.branches - len(record.losses)))
    data = _FIXED.pack(
        record.step,
        record.seed & _MASK,
        record.position,
        len(record.losses),
        record.chunk_halvings,
        flags,
        bytes(5),
        coefficients[0],
        curvatures[0],
        record.smoothing,
        record.lr,
        record.decay,
    )
    data += struct.pack(f"<{form.branches}d", *losses)
    data += b"".join(
        struct.pack("<2d", *along) for along in zip(coefficients[1:], curvatures[1:], strict=True)
    )
    data += record.exact or bytes(4 * form.exact)
    if len(data) + _CHECKSUM.size != record_bytes(*form):
        raise ValueError(f"journal: {len(record.exact)} bytes of exact gradients, {4 * form.exact} wanted")
    checksum = zlib.crc32(data, checksum)
    return data + _CHECKSUM.pack(checksum, bytes(4)), checksum


def _unpacked(data: bytes, form: Form, checksum: int) -> tuple[Record | None, int]:
    """The inverse of `_packed`; None if the checksum is not that of the bytes."""
    body = data[: -_CHECKSUM.size]
    checksum = zlib.crc32(body, checksum)
    if data[-_CHECKSUM.size :] != _CHECKSUM.pack(checksum, bytes(4)):
        return None, checksum
    step, seed, position, count, chunk_halvings, flags, _, coefficient, curvature, smoothing, lr, decay = (
        _FIXED.unpack(body[: _FIXED.size])
    )
    if count > form.branches:
        return None, checksum
    end = len(body) - 4 * form.exact
    further_values = 2 * max(0, form.directions - 1)
    values = struct.unpack(f"<{form.branches + further_values}d", body[_FIXED.size : end])
    losses, further = values[:count], values[form.branches :]
    skipped = bool(flags & _SKIPPED)
    record = Record(
        step,
        seed,
        position,
        losses,
        () if skipped or not form.directions else (coefficient, *further[::2]),
        (curvature, *further[1::2]) if flags & _CURVED else None,
        smoothing,
        lr,
        decay,
        skipped,
        bool(flags & _CLIPPED),
        chunk_halvings,
        bool(flags & _PREDICTED),
        b"" if skipped else body[end:],
    )
    return record, checksum
