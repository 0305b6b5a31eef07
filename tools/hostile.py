"""Hostile content for files: a valid one damaged, its values replaced, documents of any shape, extremes.

`contents(form, valid)` is a hypothesis strategy of bytes. Forms: "json", "jsonl", "toml", "table" (csv, tsv,
text), "journal" (checksums made right again half of the time, so that what is behind them is reached),
"safetensors" (its header is a document too).
"""

from __future__ import annotations

import copy
import json
import math
import re
import struct
import tomllib
import zlib
from random import Random
from typing import Any, Literal

from hypothesis import strategies as st

Form = Literal["json", "jsonl", "toml", "table", "journal", "safetensors"]

_NUMBERS = (0, 1, -1, 2**31, 2**63, -(2**63) - 1, 2**64, 10**30, 10**400, 10**4200)
_FLOATS = (0.5, -0.0, 1e308, -1e308, 1e-320, math.nan, math.inf, -math.inf)
_PATHS = ("..", ".", "/", "../x", "a/../../x", "/etc/passwd", "C:\\x", "~/x", "a\0b", "x" * 5000)
_TEXTS = (
    "",
    " ",
    "\ud800",
    "{",
    "{a.b}",
    "{0}",
    "-1",
    "NaN",
    "1e999",
    "24GiB",
    "9" * 400 + "GiB",
    "\U0001f642",
)
_EMPTY: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": None}, [{}])
_LEAVES = st.sampled_from((*_NUMBERS, *_FLOATS, *_PATHS, *_TEXTS, *_EMPTY)) | st.text(max_size=6)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=5,
)
_SEEDS = st.integers(0, 2**63 - 1)  # of the standard library's generator: much faster than drawn choices
_DEEP = 100_000
_EXTREMES: dict[Form, tuple[bytes, ...]] = {
    "json": (b"[" * _DEEP, b'{"a":' * _DEEP, b"9" * 5000, b'{"a": ' + b"9" * 5000 + b"}"),
    "jsonl": (b"[" * _DEEP, b'{"a":' * _DEEP, b'{"a": ' + b"9" * 5000 + b"}\n"),
    "toml": (
        b"a = " + b"[" * 10_000,
        b"a = " + b"{a = " * 10_000,
        b"a." * 2000 + b"a = 1",
        b"[" + b"a." * 2000 + b"a]",
        b"a = " + b"9" * 5000,
        b"a = 1979-13-99",
    ),
    "table": (
        b'"' * 9999,
        b'a\n"' + b"\n" * 9999,
        b"\t" * _DEEP,
        b"a\r" * 999,
        b"," * 200_000,
        b'a\n"' + b"x" * 200_000,
    ),
    "journal": (b"HIZOOJNL" * 99, bytes(32)),
    "safetensors": (
        struct.pack("<Q", _DEEP) + b"[" * _DEEP,
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 2) + b"{}",
    ),
}
_COMMON = (b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"null", b"{}", b"[]", b"\n" * 999)
_PIECES = (
    b"\t",
    b",",
    b'"',
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b"=",
    b"\\",
    b"-",
    b"e9",
)


def contents(form: Form, valid: bytes) -> st.SearchStrategy[bytes]:
    """What may be in a file of this form. `valid`: what is, where nothing is wrong."""
    found = [
        st.sampled_from((*_COMMON, *_EXTREMES[form])),
        st.binary(max_size=100),
        st.builds(_damaged, st.just(valid), _SEEDS),
    ]
    if form == "journal":
        found += [st.builds(lambda seed: _signed(_damaged(valid, seed)), _SEEDS)] * 2
    elif form != "table":
        found += [st.builds(_rewritten, st.just(form), st.just(valid), _VALUES, _SEEDS)] * 3
        found.append(
            st.builds(_written, st.just(form), st.dictionaries(st.text(max_size=4), _VALUES, max_size=3))
        )
    return st.integers(0, 39).flatmap(lambda which: found[0 if which == 0 else 1 + which % (len(found) - 1)])


def _damaged(valid: bytes, seed: int) -> bytes:
    """Some bits, bytes, slices or numbers of a file changed; or it ends too early."""
    random, data = Random(seed), bytearray(valid)
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(data) + 1)
        end = min(len(data), at + random.choice((1, 2, 8, 64, 512)))
        match random.randrange(7):
            case 0 if at < len(data):
                data[at] ^= 1 << random.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at:end]
            case 3:
                data[at:at] = data[at:end]
            case 4:
                data[at:end] = random.randbytes(end - at)
            case 5:
                data[at:at] = random.choice(_PIECES)
            case _:
                numbers = list(re.finditer(rb"-?\d+(\.\d+)?", data))
                if numbers:
                    start, stop = random.choice(numbers).span()
                    data[start:stop] = str(random.choice((*_NUMBERS, *_FLOATS))).encode()
    return bytes(data)


def _rewritten(form: Form, valid: bytes, value: Any, seed: int) -> bytes:
    """A valid document with a value or a key somewhere in it replaced, removed or added."""
    random = Random(seed)
    if form == "jsonl":
        lines = valid.splitlines()
        at = random.randrange(len(lines))
        lines[at] = _written("json", _changed(json.loads(lines[at]), value, random))
        return b"\n".join(lines) + b"\n"
    if form == "safetensors":
        length = struct.unpack("<Q", valid[:8])[0]
        header = _written("json", _changed(json.loads(valid[8 : 8 + length]), value, random))
        return struct.pack("<Q", len(header)) + header + valid[8 + length :]
    document = tomllib.loads(valid.decode()) if form == "toml" else json.loads(valid)
    return _written(form, _changed(document, value, random))


def _changed(document: Any, value: Any, random: Random) -> Any:
    document = copy.deepcopy(document)
    for _ in range(random.randint(1, 2)):
        places = _places(document)
        if not places:
            return copy.deepcopy(value)
        holder, key = random.choice(places)
        match random.randrange(6):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[random.choice((*_PATHS, *_TEXTS))] = holder.pop(key)
            case 1:
                holder.append(copy.deepcopy(holder[key]))
            case _:
                holder[key] = copy.deepcopy(value)
    return document


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    found = []
    for key, value in items:
        found.append((document, key))
        if isinstance(value, dict | list):
            found += _places(value)
    return found


def _written(form: Form, value: Any) -> bytes:
    if form == "toml":
        pairs = value.items() if isinstance(value, dict) else [("a", value)]
        text = "".join(f"{_toml(key)} = {_toml(item)}\n" for key, item in pairs)
        return text.encode("utf-8", "surrogatepass")
    text = json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64) if form == "safetensors" else text


def _toml(value: Any) -> str:
    """A value in a line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(str(key))} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value or 0)


def _signed(data: bytes) -> bytes:
    """A journal with every checksum as it should be."""
    if len(data) < 32:
        return data
    size = int.from_bytes(data[12:16], "little")
    head = data[:28]
    if not 8 < size < len(data):  # its own size is damaged: the records are left as they are
        return head + struct.pack("<I", zlib.crc32(head)) + data[32:]
    signed = head + struct.pack("<I", zlib.crc32(head))
    checksum, rest = zlib.crc32(signed), data[32:]
    for start in range(0, len(rest) - size + 1, size):
        body = rest[start : start + size - 8]
        checksum = zlib.crc32(body, checksum)
        signed += body + struct.pack("<I4x", checksum)
    return signed + rest[len(rest) // size * size :]
