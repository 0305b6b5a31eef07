"""The kernels of the even/odd basis have the bits of the plain code: in Triton's interpreter, without GPU."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hizoo_lite.branches import Branches
from hizoo_lite.model import basis
from hizoo_lite.model.basis import Gains

FORMS = [
    *(
        Branches.of(True, 0),
        Branches.of(True, 1),
        Branches.of(False, 1),
        Branches.of(True, 3),
        Branches.of(False, 3),
    ),
    *(Branches.of(True, 0, 1), Branches.of(True, 0, 3), Branches.of(True, 2, 2)),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GAINS = (Gains(), Gains(64.0, 256.0))
TOKENS, FEATURES = 3, 1030  # more than a program's


def drawn(seed: int, *shape: int) -> Tensor:
    """Values of very different sizes, whose sums and casts round."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw) * torch.exp(4 * torch.randn(shape, generator=draw))


def cases() -> Iterator[tuple[Branches, torch.dtype, Gains]]:
    for branches, dtype, gain in itertools.product(FORMS, DTYPES, GAINS):
        if dtype == torch.float16 or gain == Gains():  # others need no gain
            yield branches, dtype, gain


def compare() -> None:
    """Every case by both; in a process of its own, where Triton interprets."""
    from hizoo_lite.model import kernels

    _round_casts()
    compared = 0
    for branches, dtype, gain in cases():
        form = branches.base, branches.pairs, branches.one_sided, gain.odd, gain.even
        count = branches.count
        # as a layer is given it, and as the slices of an MLP give it; and with the features apart
        wide = drawn(1, count, TOKENS + 2, FEATURES)
        apart = drawn(2, count, FEATURES, TOKENS).transpose(1, 2)
        for x in (wide[:, :TOKENS].contiguous(), wide[:, 1 : 1 + TOKENS], apart):
            there, here = torch.empty(2, count, TOKENS, FEATURES, dtype=dtype)
            kernels.split(x, there, *form)
            basis.split(x, here, branches, gain)
            assert same(there, here), (branches, dtype, gain, "split")
        product = drawn(3, count, TOKENS, FEATURES).to(dtype)
        row_scale, bias = drawn(4, 2, FEATURES)
        for scale, added in itertools.product((None, row_scale), (None, bias)):
            there, here = torch.full((2, count, TOKENS, FEATURES + 7), 5.0)
            kernels.rebuild(product, there[..., 4 : 4 + FEATURES], *form, scale, added)
            basis.rebuild(product, here[..., 4 : 4 + FEATURES], branches, gain, scale, added)
            assert same(there, here), (branches, dtype, gain, "rebuild", scale is None, added is None)
        compared += 1
    nothing = torch.empty(3, 0, 4)
    kernels.split(nothing, nothing, True, 1, 0, 1.0, 1.0)
    kernels.probe(torch.device("cpu"))
    print(compared, "compared")


def _round_casts() -> None:
    """Have the interpreter round to bf16, as every GPU does (see `compile_all`), where it cuts off."""
    from triton import language
    from triton.runtime import interpreter

    plain = interpreter._convert_float

    def convert(values: Any, given: Any, wanted: Any, rounding: Any) -> Any:
        if (given, wanted) != (language.float32, language.bfloat16):
            return plain(values, given, wanted, rounding)
        return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view("uint16")

    interpreter._convert_float = convert


def compile_all() -> None:
    """For a GPU that need not be there: every operation rounded by itself, to nearest even."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hizoo_lite.model import kernels

    types = {"odd": "fp32", "even": "fp32", "single": "fp32", "scale": "*fp32", "bias": "*fp32"}
    fixed = {"BASE": 1, "PAIRS": 1, "ONE_SIDED": 1, "SCALED": 1, "BIASED": 1, "BLOCK": 1024}
    for name, dtype in (("bf16", "bf16"), ("f16", "fp16")):
        for kernel, pointers in (
            (kernels._split, {"x": "*fp32", "out": f"*{dtype}"}),
            (kernels._rebuild, {"product": f"*{dtype}", "out": "*fp32"}),
        ):
            known = {**types, **pointers, **dict.fromkeys(fixed, "constexpr")}
            signature = {argument: known.get(argument, "i32") for argument in kernel.arg_names}
            source = ASTSource(kernel, signature, {key: fixed[key] for key in fixed if key in signature})
            options = {"enable_fp_fusion": False}
            ptx = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]
            assert "fma." not in ptx
            casts = {cast for cast in re.findall(r"cvt\.[\w.]+", ptx) if ".f32" in cast}
            assert casts == ({f"cvt.rn.{name}.f32"} if kernel is kernels._split else {f"cvt.f32.{name}"})
    print("compiled")


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit."""
    integers = torch.int32 if one.dtype == torch.float32 else torch.int16
    return torch.equal(one.view(integers), other.view(integers))


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: it comes with torch for CUDA on Linux, or with pip install triton",
)


def run_with_triton(work: str, **settings: str) -> list[str]:
    """What `work`, a function of this module, prints in a process of its own."""
    command = [sys.executable, "-c", f"from tests.test_fused import {work}; {work}()"]
    found = subprocess.run(
        command, env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.split()


@needs_triton
def test_kernels_have_the_bits_of_the_plain_code() -> None:
    count = len(list(cases()))
    assert run_with_triton("compare", TRITON_INTERPRET="1") == [str(count), "compared"]


@needs_triton
def test_kernels_compile_to_operations_that_round_as_the_plain_code(tmp_path: Path) -> None:
    assert run_with_triton("compile_all", TRITON_CACHE_DIR=str(tmp_path)) == ["compiled"]


@pytest.mark.parametrize("branches", FORMS, ids=str)
def test_operators_are_the_plain_code_where_there_is_no_kernel(branches: Branches) -> None:
    from hizoo_lite.model import fused  # noqa: F401 - has the operators

    form = branches.base, branches.pairs, branches.one_sided, 1.0, 1.0
    x, scale = drawn(1, branches.count, TOKENS, 8), drawn(2, 8)
    there, here = torch.empty(2, *x.shape, dtype=torch.bfloat16)
    torch.ops.hizoo_lite.split(x, there, *form)
    basis.split(x, here, branches, Gains())
    assert same(there, here)
    there, here = torch.empty(2, *x.shape)
    torch.ops.hizoo_lite.rebuild(x, there, *form, scale, scale)
    basis.rebuild(x, here, branches, Gains(), scale, scale)
    assert same(there, here)


def test_triton_is_not_imported_without_a_gpu() -> None:
    """Libraries may, where there is one."""
    command = (
        "import sys, torch, transformers, bitsandbytes; before = 'triton' in sys.modules; "
        "import hizoo_lite.model.linear as own; "
        "assert ('triton' in sys.modules) == before and 'hizoo_lite.model.kernels' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", command]).returncode == 0
