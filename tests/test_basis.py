"""The even/odd basis: rebuilding inverts splitting, and bf16 keeps the differences that matter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hizoo_lite.branches import EVALUATION, THETA, Branches, Point
from hizoo_lite.model.basis import gains, rebuild, split

LAYOUTS = [
    *(Branches.of(True, 1), Branches.of(False, 1), Branches.of(True, 2), Branches.of(False, 3)),
    *(Branches.of(True, 0, 2), Branches.of(True, 1, 1), EVALUATION),
]


def branched(branches: Branches, mu: float = 1e-3) -> Tensor:
    """(branches, 5, 8) activations whose odd parts are of order mu and even parts of order mu^2."""
    draw = torch.Generator().manual_seed(3)
    base = torch.randn(5, 8, generator=draw)
    rows = [base] if branches.base else []
    for _ in range(branches.pairs):
        odd, even = mu * torch.randn(5, 8, generator=draw), mu**2 * torch.randn(5, 8, generator=draw)
        rows += [base + even + odd, base + even - odd]
    rows += [base + mu * torch.randn(5, 8, generator=draw) for _ in range(branches.one_sided)]
    return torch.stack(rows)


def product(x: Tensor, weight: Tensor, branches: Branches, dtype: torch.dtype, mu: float = 1e-3) -> Tensor:
    """x W' through the basis, as a layer does it."""
    operands = torch.empty(x.shape, dtype=dtype)
    gain = gains(dtype, mu)
    split(x, operands, branches, gain)
    parts = (operands.view(-1, x.shape[-1]) @ weight.to(dtype).t()).view(*x.shape[:-1], -1)
    out = torch.empty(*x.shape[:-1], weight.shape[0])
    rebuild(parts, out, branches, gain)
    return out


@pytest.mark.parametrize("branches", LAYOUTS, ids=str)
def test_rebuild_inverts_split_in_float32(branches: Branches) -> None:
    x = branched(branches)
    out = product(x, torch.eye(8), branches, torch.float32)
    # three float32 roundings of values below 4
    torch.testing.assert_close(out, x, rtol=0, atol=3 * 2.0**-22)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "branches",
    [Branches.of(True, 1), Branches.of(False, 1), Branches.of(True, 2), Branches.of(True, 0, 2)],
    ids=str,
)
def test_differences_survive_short_products(branches: Branches, dtype: torch.dtype) -> None:
    x = branched(branches)
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(4))
    weight = weight.bfloat16().float()  # so that the weight itself is exact in every dtype
    exact = x.double() @ weight.double().t()
    got = product(x, weight, branches, dtype)
    one, other = branches.compared[-1].tolist()
    odd, true_odd = got[one] - got[other], exact[one] - exact[other]
    # operands and result are rounded to 8 (bf16) or 11 bits of the difference, not of the value
    tolerance = 2e-2 if dtype == torch.bfloat16 else 5e-3
    assert (odd.double() - true_odd).norm() < tolerance * true_odd.norm()
    branchwise = (x.to(dtype) @ weight.to(dtype).t()).float()
    lost = branchwise[one] - branchwise[other]
    assert (lost.double() - true_odd).norm() > 3 * (odd.double() - true_odd).norm()


def test_gains_are_powers_of_two_and_only_for_fp16() -> None:
    assert gains(torch.bfloat16, 1e-3) == gains(torch.float32, 1e-3) == (1.0, 1.0)
    lift = gains(torch.float16, 1e-3)
    assert lift == (512.0, 512.0)
    assert gains(torch.float16, 1e-5) == lift


def test_points_are_in_the_folded_order() -> None:
    assert Branches.of(True, 2).points == ((0, 0), (0, 1), (0, -1), (1, 1), (1, -1))
    assert Branches.of(False, 1).points == ((0, 1), (0, -1))
    assert EVALUATION.points == ((0, 0),)
    assert Branches.of(True, 1, 2).points == ((0, 0), (0, 1), (0, -1), (1, 1), (2, 1))
    assert Branches.of(True, 1, 2).compared.tolist() == [[1, 2], [3, 0], [4, 0]]


def test_opposite_offsets_along_one_direction_are_a_pair() -> None:
    found = Branches((Point(0, -0.3), Point(0, 0.3), Point(1, 2.0), Point(1, -2.0)))
    assert (found.base, found.pairs, found.one_sided, found.directions) == (False, 2, 0, 2)
    assert found.compared.tolist() == [[0, 1], [2, 3]]
    found = Branches((THETA, Point(0, 0.5), Point(1, -0.5), Point(0, 2.0)))
    assert (found.base, found.pairs, found.one_sided, found.directions) == (True, 0, 3, 2)
    assert found.compared.tolist() == [[1, 0], [2, 0]]
    assert found.reach == 2.0


def test_a_second_pair_along_a_direction_is_not_what_is_compared() -> None:
    found = Branches((Point(0, 1.0), Point(0, -1.0), Point(0, 2.0), Point(0, -2.0)))
    assert (found.pairs, found.directions, found.compared.tolist()) == (2, 1, [[0, 1]])


def test_branches_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one point"):
        Branches.of(base=False, pairs=0)
    with pytest.raises(ValueError, match="need a base"):
        Branches.of(base=False, pairs=1, one_sided=1)
    with pytest.raises(ValueError, match="without gaps"):
        Branches((THETA, Point(1, 1.0)))
