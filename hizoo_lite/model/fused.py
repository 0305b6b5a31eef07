"""`split` and `rebuild` of the even/odd basis as one operation each: what a linear layer calls.

As torch operations one after the other they read and write every element several times, which on a GPU takes
as long as the products. There each is an operator of torch, `hizoo_lite::split` and `hizoo_lite::rebuild`:
a kernel of Triton if that can be used, with the same bits, else `basis.py` itself. Triton comes with
torch for CUDA on Linux, and is imported for such a device only. On a CPU `basis.py` is called directly.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hizoo_lite.branches import Branches
from hizoo_lite.device import gpu_of, is_gpu
from hizoo_lite.model import basis
from hizoo_lite.model.basis import Gains

#: From this on the GPU casts bf16 itself, and Triton is written for it.
_LEAST_CAPABILITY = (8, 0)
_EAGER = ("cpu", "meta")
_BRANCHES = "bool base, int pairs, int one_sided, float odd, float even"
_log = logging.getLogger(__name__)

_library = torch.library.Library("hizoo_lite", "DEF")
_library.define(f"split(Tensor x, Tensor(a!) out, {_BRANCHES}) -> ()")
_library.define(
    f"rebuild(Tensor product, Tensor(a!) out, {_BRANCHES}, Tensor? scale=None, Tensor? bias=None) -> ()"
)


def split(x: Tensor, out: Tensor, branches: Branches, gain: Gains) -> None:
    """See `basis.split`."""
    if x.device.type in _EAGER:
        basis.split(x, out, branches, gain)
    else:
        torch.ops.hizoo_lite.split(x, out, *_form(branches, gain))


def rebuild(
    product: Tensor,
    out: Tensor,
    branches: Branches,
    gain: Gains,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """See `basis.rebuild`."""
    if out.device.type in _EAGER:
        basis.rebuild(product, out, branches, gain, scale, bias)
    else:
        torch.ops.hizoo_lite.rebuild(product, out, *_form(branches, gain), scale, bias)


def _form(branches: Branches, gain: Gains) -> tuple[bool, int, int, float, float]:
    """As operators take them."""
    return branches.base, branches.pairs, branches.one_sided, gain.odd, gain.even


def launch_all(device: torch.device, compute: torch.dtype) -> None:
    """Launch both once on a GPU, for the branches of a step, while there is memory for their kernels."""
    if not is_gpu(device):
        return
    branches, gain = Branches.of(), Gains()
    x = torch.zeros(branches.count, 1, 16, device=device)
    operands = torch.empty(x.shape, dtype=compute, device=device)
    split(x, operands, branches, gain)
    rebuild(operands, x, branches, gain)


# ---------------------------------------------------------------------------------- the operators


def _split_plainly(x: Tensor, out: Tensor, *form: Any) -> None:
    basis.split(x, out, Branches.of(*form[:3]), Gains(*form[3:]))


def _rebuild_plainly(product: Tensor, out: Tensor, *form: Any) -> None:
    basis.rebuild(product, out, Branches.of(*form[:3]), Gains(*form[3:5]), *form[5:])


def _split_on_cuda(x: Tensor, *more: Any) -> None:
    kernels = _kernels(x.device)
    with gpu_of(x.device).on(x.device):
        (_split_plainly if kernels is None else kernels.split)(x, *more)


def _rebuild_on_cuda(product: Tensor, *more: Any) -> None:
    kernels = _kernels(product.device)
    with gpu_of(product.device).on(product.device):
        (_rebuild_plainly if kernels is None else kernels.rebuild)(product, *more)


_library.impl("split", _split_plainly, "CompositeExplicitAutograd")
_library.impl("rebuild", _rebuild_plainly, "CompositeExplicitAutograd")
_library.impl("split", _split_on_cuda, "CUDA")
_library.impl("rebuild", _rebuild_on_cuda, "CUDA")


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The kernels, if they can be used on this GPU: Triton compiles at first use and needs what does so."""
    if gpu_of(device).capability(device) < _LEAST_CAPABILITY:
        return None
    try:
        from hizoo_lite.model import kernels

        with gpu_of(device).on(device):
            kernels.probe(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no Triton, no C compiler, no headers of Python, ...: whatever it raises
        _log.warning("no kernels of the even/odd basis for %s, computing it in torch: %s", device, error)
        return None
    return kernels
