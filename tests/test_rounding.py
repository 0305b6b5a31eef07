"""Rounding to a grid has no bias, inside the grid and beyond it, and leaves what is on it as it was."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hizoo_lite.noise import TorchUniform
from hizoo_lite.quant import FourBitWeight, ResidualWeight, pack
from hizoo_lite.quant.packed import PackedWeight
from hizoo_lite.quant.rounding import GROWTH, Levels, grow, round_to_dtype, round_to_levels

KINDS = ["nf4", "fp4", "int8", "float32", "bfloat16", "float16", "residual"]
#: Odd numbers of rows and columns, blocks over row ends, a last block that is not full, an odd element.
SHAPES = [(96, 80), (64, 128), (7, 33), (5, 63), (129, 65), (1, 1), (3, 200)]
ROUNDINGS = 4000


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(seed: int = 1) -> TorchUniform:
    return TorchUniform(generator(seed))


def packed(kind: str, shape: tuple[int, int], seed: int = 0) -> PackedWeight:
    """A weight of normal values, with a row of zeros where it has several."""
    weight = torch.randn(shape, generator=generator(seed)) * 0.02
    if shape[0] > 3:
        weight[3] = 0
    if kind in ("float32", "bfloat16", "float16"):
        return pack(weight.to(getattr(torch, kind)), "none")
    if kind == "residual":
        return ResidualWeight(pack(weight, "nf4", double_quant=False))
    return pack(weight, kind, double_quant=False)


def values(weight: PackedWeight) -> Tensor:
    return weight.values(torch.empty(weight.shape))


def buffers(weight: PackedWeight) -> dict[str, Tensor]:
    return {f"{id(s.owner)}.{s.name}": s.tensor.clone() for s in weight.stored()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_that_were_decoded_are_stored_bit_identically(kind: str, shape: tuple[int, int]) -> None:
    weight = packed(kind, shape)
    before = buffers(weight)
    for seed in range(5):
        weight.store(values(weight), 0, uniform(seed))
    assert all(torch.equal(before[name], tensor) for name, tensor in buffers(weight).items())


class Refusing(TorchDispatchMode):
    """Refuses the memory of operation number `at`, counted among those that make a tensor."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (func._schema.is_mutable or func.is_view):
            self.left -= 1
            if self.left < 0:
                raise MemoryError
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("shape", [(96, 80), (5, 63)])
@pytest.mark.parametrize("kind", KINDS)
def test_where_memory_is_refused_nothing_is_changed(kind: str, shape: tuple[int, int]) -> None:
    weight = packed(kind, shape)
    before = buffers(weight)
    target = values(weight) + 0.004 * torch.randn(shape, generator=generator(7))
    for at in range(1000):
        try:
            with Refusing(at):
                weight.store(target.clone(), 0, uniform(1))
        except MemoryError:
            assert all(torch.equal(before[name], tensor) for name, tensor in buffers(weight).items()), at
        else:
            break
    assert at > 0
    assert not all(torch.equal(before[name], tensor) for name, tensor in buffers(weight).items())


@pytest.mark.parametrize("kind", KINDS)
def test_true_values_are_those_of_the_product(kind: str) -> None:
    weight = packed(kind, (40, 96))
    unpacked = weight.unpack(torch.empty(weight.shape))
    if weight.row_scale is not None:
        unpacked = unpacked * weight.row_scale[:, None]
    assert torch.equal(values(weight), unpacked)
    assert torch.equal(weight.values(torch.empty(8, 96), 16), unpacked[16:24])


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in ("nf4", "int8", "residual") else [pytest.mark.grid])
        for kind in KINDS
    ],
)
def test_rounding_has_no_bias_within_the_absmax_and_beyond_it(kind: str) -> None:
    weight = packed(kind, (24, 80))
    before = [(s.tensor, s.tensor.clone()) for s in weight.stored()]
    # updates of a fifth of a weight: most blocks have values beyond their absmax, the zeros become nonzero
    target = values(weight) + 0.004 * torch.randn(weight.shape, generator=generator(7))
    rounding, total, squares = uniform(), torch.zeros(24, 80, dtype=torch.float64), 0.0
    largest = torch.zeros(())
    for _ in range(ROUNDINGS):
        for tensor, kept in before:
            tensor.copy_(kept)
        weight.store(target.clone(), 0, rounding)
        error = values(weight).double() - target.double()
        total += error
        squares = squares + error.square()
        largest = torch.maximum(largest, error.abs().max())
    mean, variance = total / ROUNDINGS, squares / ROUNDINGS
    # Per element: 5.5 standard errors (1 920 elements; 7e-5 of a run of correct code fails) plus twelve times
    # what one rounding to the far neighbour contributes, where that is too rare to show in the variance.
    bound = 5.5 * (variance / ROUNDINGS).sqrt() + 12 * largest / ROUNDINGS + 1e-9
    assert (mean.abs() <= bound).all()
    if kind == "float32":
        assert torch.equal(values(weight), target)
        return
    # All together: the sum of independent errors (blocks that grow share one draw; 5 allows for that).
    z = float(mean.sum() / (variance.sum() / ROUNDINGS).sqrt())
    assert abs(z) < 5
    towards = float((mean * target.sign()).sum() / (variance.sum() / ROUNDINGS).sqrt())
    assert abs(towards) < 5


@pytest.mark.parametrize("excess", [0.001, 0.05, GROWTH, 0.5])
def test_a_range_grows_without_bias_and_as_rarely_as_it_can(excess: float) -> None:
    groups = 200_000
    rows = torch.tensor([[0.3, -1.0 - excess, 1.0 + excess / 2, 1.0]]).repeat(groups, 1)
    inside, top = grow(rows, torch.ones(groups, 1), uniform())
    chance = min(1.0, excess / GROWTH)
    grown = float((top > 1).double().mean())
    assert grown == pytest.approx(chance, abs=5 * (chance * (1 - chance) / groups) ** 0.5 + 1e-6)
    assert (inside.abs() <= top).all()
    # every mean is of values within GROWTH + excess of each other: five standard errors of at most half that
    margin = 5 * 0.5 * (GROWTH + excess) / groups**0.5 + 1e-6
    torch.testing.assert_close(inside.double().mean(0), rows[0].double(), rtol=0, atol=margin)
    assert torch.equal(inside[:, [0, 3]], rows[:, [0, 3]])


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "residual"])
def test_tiles_stored_alone_leave_all_other_rows_as_they_are(kind: str) -> None:
    weight = packed(kind, (200, 33))
    before = values(weight)
    first, rows = weight.tile_rows, min(weight.tile_rows, 100)
    tile = before[first : first + rows] * 1.5
    weight.store(tile.contiguous(), first, uniform())
    after = values(weight)
    assert torch.equal(after[:first], before[:first])
    assert torch.equal(after[first + rows :], before[first + rows :])
    assert not torch.equal(after[first : first + rows], before[first : first + rows])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_same_generator_stores_the_same_bits(kind: str) -> None:
    left, right = packed(kind, (24, 80)), packed(kind, (24, 80))
    target = values(left) * 1.01
    left.store(target.clone(), 0, uniform(3))
    right.store(target.clone(), 0, uniform(3))
    assert torch.equal(values(left), values(right))
    assert torch.equal(left.get_buffer("codes"), right.get_buffer("codes"))
    right.store(target.clone(), 0, uniform(4))
    assert not torch.equal(values(left), values(right))


def test_a_group_of_zeros_can_become_anything() -> None:
    for kind in ("nf4", "fp4", "int8"):
        weight = pack(torch.zeros(2, 64), kind, double_quant=False)
        target = torch.linspace(-1, 1, 128).view(2, 64)
        weight.store(target.clone(), 0, uniform())
        step = 0.34 if kind != "int8" else 0.01  # the widest gap between neighbours
        assert (values(weight) - target).abs().max() <= step
        weight.store(torch.zeros(2, 64), 0, uniform())
        assert torch.equal(values(weight), torch.zeros(2, 64))


@pytest.mark.parametrize("bits", ["nf4", "fp4"])
def test_every_value_is_rounded_to_one_of_its_two_neighbours(bits: str) -> None:
    weight = pack(torch.randn(1, 64), bits, double_quant=False)
    assert isinstance(weight, FourBitWeight)
    levels = Levels.of(weight.table)
    assert levels.values.tolist() == sorted(set(weight.table.tolist()))
    fine = torch.linspace(-1, 1, 64 * 1001).view(1001, 64)
    chosen = round_to_levels(fine, torch.ones(1001, 1), levels, uniform()).view(-1)
    for value, index in zip(fine.view(-1).tolist(), chosen.tolist(), strict=True):
        grid = levels.values.tolist()
        below = max(g for g in grid if g <= value)
        above = min(g for g in grid if g >= value)
        assert grid[index] in (below, above)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_floats_are_neighbours_of_the_value(dtype: torch.dtype) -> None:
    sizes = torch.logspace(-10, 6, 4000, dtype=torch.float64).float()
    both = torch.cat((sizes, -sizes, torch.zeros(2)))
    largest = torch.finfo(dtype).max
    for seed, sign in itertools.product(range(3), (1, -1)):
        rounded = round_to_dtype(sign * both, dtype, uniform(seed)).float()
        wanted = (sign * both).clamp(-largest, largest)
        gap = wanted.abs() * torch.finfo(dtype).eps + (2.0**-24 if dtype == torch.float16 else 0.0)
        assert torch.isfinite(rounded).all()
        assert ((rounded - wanted).abs() <= gap).all()


@pytest.mark.parametrize("bits", ["nf4", "fp4"])
def test_double_quantization_is_undone_exactly(bits: str) -> None:
    weight = pack(torch.randn(300, 200, generator=generator()), bits)
    assert isinstance(weight, FourBitWeight)
    before = values(weight)
    weight.undo_double_quant()
    weight.undo_double_quant()
    assert weight.absmax.dtype == torch.float32
    assert torch.equal(values(weight), before)
    assert [s.name for s in weight.stored()] == ["codes", "absmax"]
    offloaded = pack(torch.randn(4, 64), bits)
    offloaded.absmax = offloaded.absmax.to("meta")
    with pytest.raises(ValueError, match="absmax is not here"):
        offloaded.undo_double_quant()


def test_a_residual_holds_what_the_codes_cannot() -> None:
    base = pack(torch.randn(40, 96, generator=generator()) * 0.02, "nf4", double_quant=False)
    codes, start = base.codes.clone(), values(base)
    weight = ResidualWeight(base)
    assert torch.equal(values(weight), start)
    target = start + 1e-4 * torch.randn(40, 96, generator=generator(2))
    weight.store(target.clone(), 0, uniform(3))
    # bf16 keeps the difference to one part in 128, whatever the size of the weight beside it
    assert ((values(weight) - target).abs() <= (target - start).abs() / 128 + 1e-8).all()
    assert torch.equal(base.codes, codes)
    assert torch.equal(weight.unpack(torch.empty(40, 96, dtype=torch.bfloat16)), values(weight).bfloat16())
    assert weight.ready(torch.float32) is None
    assert [(s.name, s.key) for s in weight.stored()][-1] == ("residual", None)
    assert weight.nbytes() == base.nbytes() + 2 * 40 * 96
    assert ResidualWeight(base.to("meta")).residual.is_meta
