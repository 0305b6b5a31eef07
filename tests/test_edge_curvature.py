"""The curvatures are written once: over numpy they are what they are over torch, to rounding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from hizoo_lite.arrays import NumpyArrays
from hizoo_lite.base import Curvature
from hizoo_lite.curvature import Diagonal, Factored, Grouped, NoCurvature
from hizoo_lite.errors import UserError
from hizoo_lite.noise import StepNoise, drawn
from hizoo_lite.tensors import TorchArrays

SHAPES = {"a": (6, 40), "b": (30, 6), "bias": (7,), "one": ()}
MEMBERS: dict[str, Callable[[], Curvature]] = {
    "none": NoCurvature,
    "diagonal paper": Diagonal,
    "diagonal reference": lambda: Diagonal("reference"),
    "grouped tensor": Grouped,
    "grouped row": lambda: Grouped("row"),
    "factored": Factored,
}
#: Both libraries round float32 once an operation; the filter's float64 sums differ in their order.
ROUNDING = {"rtol": 2e-6, "atol": 1e-12}
members = pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS)


def observe(curvature: Curvature, steps: int, first: int = 0) -> None:
    """Directional curvatures of a quadratic function whose Hessian differs between the parameters."""
    arrays = curvature._arrays  # type: ignore[attr-defined]
    for step in range(first, first + steps):
        total = 0.0
        for weight, (name, shape) in enumerate(SHAPES.items(), start=1):
            z = arrays.from_numpy(np.asarray(drawn(3, step, name, shape)))
            direction = np.asarray(curvature.scale(name) * z)
            total += weight**3 * float((direction**2).sum())
            half = shape[0] // 2 if shape and curvature.sees_tiles else 0
            if half:
                curvature.see(name, z[:half])
                curvature.see(name, z[half:], half)
            else:
                curvature.see(name, z)
        curvature.observe(total, 0.05)


@members
def test_numpy_and_torch_learn_the_same_sigma(member: Callable[[], Curvature]) -> None:
    over_numpy, over_torch = member(), member()
    over_numpy.start(SHAPES, NumpyArrays())
    over_torch.start(SHAPES, TorchArrays())
    observe(over_numpy, 60)
    observe(over_torch, 60)
    for name in SHAPES:
        for factor in ("scale", "update_scale"):
            got, want = getattr(over_numpy, factor)(name), getattr(over_torch, factor)(name)
            assert isinstance(got, np.ndarray | np.generic)
            assert isinstance(want, torch.Tensor)
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, want.numpy(), **ROUNDING)
    if not isinstance(over_torch, NoCurvature):
        scales = [float(np.mean(over_numpy.scale(name))) for name in SHAPES]
        assert max(scales) > 1.05 * min(scales)  # something was learnt


@members
def test_a_state_goes_from_one_library_to_the_other(member: Callable[[], Curvature]) -> None:
    over_torch, over_numpy, resumed = member(), member(), member()
    over_torch.start(SHAPES, TorchArrays())
    observe(over_torch, 30)
    over_numpy.start(SHAPES, NumpyArrays())
    over_numpy.load_state_dict({name: value.numpy() for name, value in over_torch.state_dict().items()})
    resumed.start(SHAPES, NumpyArrays())
    resumed.load_state_dict(over_numpy.state_dict())
    for curvature in (over_numpy, resumed):
        observe(curvature, 10, first=30)
    observe(over_torch, 10, first=30)
    for name in SHAPES:
        np.testing.assert_allclose(over_numpy.scale(name), over_torch.scale(name).numpy(), **ROUNDING)
        assert np.array_equal(resumed.scale(name), over_numpy.scale(name))


def test_a_state_of_other_shapes_is_refused() -> None:
    factored, other = Factored(), Factored()
    factored.start(SHAPES, NumpyArrays())
    other.start({**SHAPES, "a": (6, 41)}, NumpyArrays())
    with pytest.raises(UserError, match=r"saved a/1 is \(41,\) float32, this run needs \(40,\) float32"):
        factored.load_state_dict(other.state_dict())


def test_noise_is_the_same_in_both_libraries() -> None:
    over_numpy, over_torch = StepNoise(5, SHAPES, NumpyArrays()), StepNoise(5, SHAPES, TorchArrays())
    for step in (0, 1, 7):
        got, want = over_numpy(step), over_torch(step)
        assert all(np.array_equal(got[name], want[name].numpy()) for name in SHAPES)
    over_numpy.close()
    over_torch.close()
