"""safetensors files without the library are those of the library."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors.torch import save_file

from hizoo_lite.checkpoints import tensorfile
from hizoo_lite.errors import UserError

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "turned": np.arange(6, dtype=np.float64).reshape(2, 3).T,
    "half": np.array([1.5, -2], dtype=np.float16),
    "none": np.empty((0, 3), dtype=np.int64),
    "scalar": np.array(7, dtype=np.int8),
    "bits": np.array([True, False]),
}


def test_what_is_written_the_library_reads(tmp_path: Path) -> None:
    tensorfile.save(tmp_path / "x.safetensors", TENSORS, {"format": "pt"})
    found = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert set(found) == set(TENSORS)
    for name, value in TENSORS.items():
        assert np.array_equal(found[name], value)
        assert found[name].dtype == value.dtype
    with safetensors.safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    values = {name: np.ascontiguousarray(value) for name, value in TENSORS.items()}
    safetensors.numpy.save_file(values, tmp_path / "x.safetensors")
    found = tensorfile.load(tmp_path / "x.safetensors")
    for name, value in values.items():
        assert np.array_equal(found[name], value)
        assert found[name].dtype == value.dtype
        assert found[name].flags.writeable


def test_a_dtype_that_numpy_lacks_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="tensor x: dtype 'BF16'; allowed are F64, F32"):
        tensorfile.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}, "takes 16 bytes, its offsets give 8"),
        ({"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, "must be integers >= 0"),
        ({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, "truncated"),
        ({"x": {"dtype": "F32"}}, "dtype, shape and data_offsets wanted"),
        ([], "not a JSON object"),
    ],
)
def test_a_header_that_lies_is_refused(header: object, message: str, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    with pytest.raises(UserError, match=message):
        tensorfile.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.safetensors: cannot be read: No such file"):
        tensorfile.load(tmp_path / "x.safetensors")
