"""Training weights inside the blocks: the branches, the update that waits, and what is saved."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hizoo_lite import curvature as curvatures
from hizoo_lite import estimators
from hizoo_lite.base import Curvature, trainable
from hizoo_lite.branches import Branches, Point
from hizoo_lite.curvature import Factored, Grouped, NoCurvature
from hizoo_lite.engine.traversal import Losses, Traversal
from hizoo_lite.errors import UserError
from hizoo_lite.model.model import Model
from hizoo_lite.noise import TorchUniform, tile_normal, tile_rounding
from hizoo_lite.optimizers.step_size import FixedRate, Schedule
from hizoo_lite.quant import FourBitWeight, ResidualWeight
from hizoo_lite.spaces import Dense, LoRA, Scales
from hizoo_lite.spaces.inplace import InPlaceSpace
from hizoo_lite.spaces.weights import TILE_ELEMENTS, tiles
from hizoo_lite.tensors import TorchArrays
from hizoo_lite.train.step import Stepper
from tests import reference
from tests.architectures import save_tiny
from tests.batches import tiny_task_batch
from tests.tables import covering
from tests.weights_reference import (
    Streamed,
    changes,
    decoded,
    loss,
    moved,
    same,
    slope_and_bend,
    state,
    tiny,
    twin,
    whole_z,
)

SEED, MU = 7, 1e-3
#: float32 sums in another order, activations of order 10, over two layers, in a loss of order 5.
FLOAT32_ROUNDING = 2e-5

Requantized = functools.partial(Dense, update="requantize")

#: Every kind of training in the weights: the space and the bits it is tested with.
KINDS: dict[str, tuple[Callable[[], InPlaceSpace], str]] = {
    "dense nf4": (Requantized, "nf4"),
    "dense fp4": (Requantized, "fp4"),
    "dense int8": (Requantized, "int8"),
    "dense none": (Requantized, "none"),
    "residual nf4": (lambda: Dense(update="residual"), "nf4"),
    "residual int8": (lambda: Dense(update="residual"), "int8"),
    "scales nf4": (Scales, "nf4"),
    "scales int8": (Scales, "int8"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def attached(folder: Path, kind: str, model_kind: str = "causal", compute: str = "float32"):
    """(model, space) of a kind, on a tiny Llama."""
    make, bits = KINDS[kind]
    if not (folder / "config.json").exists():
        save_tiny("llama", folder, kind=model_kind)
    model, space = tiny(folder, bits, model_kind, compute), make()
    space.attach(model, seed=0)
    return model, space


def make_stepper(
    model: Model,
    space: InPlaceSpace | LoRA,
    curvature: Curvature | None = None,
    estimator: str = "hizoo",
    lr: float = 1e-3,
    mu: float = MU,
    **options: float,
) -> Stepper:
    """Curvature as published, where there is any: what the references here compute."""
    made = {"curvature_from": "losses"} if estimator == "hizoo" else {}
    return Stepper(
        Traversal(model),
        TorchArrays(model.device),
        space,
        estimators.get(estimator, **made),
        curvature or NoCurvature(),
        FixedRate(Schedule("constant", lr, 0, 100)),
        seed=SEED,
        mu=mu,
        smoothing=Schedule("constant", 0.05, 0, 100),
        **options,
    )


def learnt(make: Callable[[], Curvature], shapes: dict[str, torch.Size]) -> Curvature:
    """A curvature whose Sigma is far from the identity everywhere."""
    curvature = make()
    curvature.start(shapes, TorchArrays())
    generator = torch.Generator().manual_seed(3)
    saved = {k: v.clone() for k, v in curvature.state_dict().items()}
    for name, value in saved.items():
        if name == "moments":
            value.copy_(torch.tensor([1.0, 0.0, 1.0, 10.0]))
        elif name != "covariance":
            value.copy_(0.5 + 4 * torch.rand(value.shape, generator=generator))
    curvature.load_state_dict(saved)
    return curvature


SIGMAS: dict[str, Callable[[], Curvature]] = {
    "none": NoCurvature,
    "grouped tensor": Grouped,
    "grouped row": lambda: Grouped("row"),
    "factored": Factored,
}


# ------------------------------------------------------------------------------------------- branches


@pytest.mark.parametrize(("kind", "sigma"), covering(tuple(KINDS), tuple(SIGMAS)))
def test_losses_equal_those_of_plain_models_with_perturbed_weights(
    kind: str, sigma: str, tmp_path: Path
) -> None:
    model, space = attached(tmp_path, kind)
    batch, plain = tiny_task_batch("causal"), twin(tmp_path, model)
    curvature = learnt(SIGMAS[sigma], trainable(space))
    along = changes(space, SEED, 4, curvature)
    mu = 1e-2
    expected = {sign: loss(moved(plain, along, sign * mu), batch) for sign in (0, 1, -1, 0.5, -0.5, 2, -2)}
    assert max(abs(expected[sign] - expected[0]) for sign in (1, -1)) > 20 * FLOAT32_ROUNDING
    assert space.weights is not None
    own = Branches((Point(0, 0.5), Point(0, -0.5), Point(0, -2.0), Point(0, 2.0)))
    for branches in (Branches.of(True, 1), Branches.of(False, 1), Branches.of(True, 2), own):
        space.weights.begin(SEED, 4, curvature, measured=False)
        got = Traversal(model).losses(batch, branches, mu).mean()
        wanted = torch.tensor([expected[point.offset] for point in branches.points], dtype=torch.float64)
        torch.testing.assert_close(got, wanted, rtol=0, atol=FLOAT32_ROUNDING)
    assert Traversal(model).losses(batch).mean().item() == pytest.approx(expected[0], abs=FLOAT32_ROUNDING)


@pytest.mark.parametrize(
    ("kind", "compute"),
    covering(("dense nf4", "residual nf4", "scales nf4", "scales int8"), ("bf16", "fp16")),
)
def test_sixteen_bit_products_keep_the_projected_gradient_and_the_curvature(
    kind: str, compute: str, tmp_path: Path
) -> None:
    model, space = attached(tmp_path, kind, compute=compute)
    batch = tiny_task_batch("causal")
    errors = []
    for seed in range(7):
        stepper = make_stepper(model, space)
        stepper.noise.close()
        curvature = stepper.curvature
        assert space.weights is not None
        space.weights.begin(seed, 0, curvature, measured=False)
        losses = Traversal(model).losses(batch, Branches.of(), MU).mean().numpy()
        estimate = stepper.estimator.estimate(0, losses, np.zeros(1), MU)
        slope, bend = slope_and_bend(twin(tmp_path, model), batch, changes(space, seed, 0, curvature))
        assert estimate.curvature is not None
        errors.append((abs(estimate.projected_grad / slope - 1), abs(estimate.curvature / bend - 1)))
    grad, curve = (statistics.median(column) for column in zip(*errors, strict=True))
    assert grad < 0.05
    assert curve < 0.15


def test_tiles_cover_a_weight_once_and_end_where_blocks_do() -> None:
    for shape in [(4096, 11008), (11008, 4096), (7, 33), (70_000, 33), (5, 96), (1, 1), (300, 3_000_001)]:
        for device, elements in TILE_ELEMENTS.items():
            found = tiles(shape, 1, device)
            assert [t.first for t in found] == [0, *np.cumsum([t.rows for t in found])[:-1]]
            assert sum(t.rows for t in found) == shape[0]
            assert all(t.first * shape[1] % 64 == 0 for t in found)
            assert len(found) == 1 or found[0].rows * shape[1] <= max(elements, 64 * shape[1])
    assert all(t.first % 128 == 0 for t in tiles((9000, 32), 128, "cpu"))


def test_losses_do_not_depend_on_the_size_of_any_scratch_tile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hizoo_lite.model import linear

    results = []
    for size in (8 << 20, 1):
        monkeypatch.setitem(linear.TILE_BYTES, "cpu", size)
        model, space = attached(tmp_path, "dense nf4")
        stepper = make_stepper(model, space)
        for step in range(2):
            record = stepper.step(step, tiny_task_batch("causal"))
        results.append((record.losses, state(model)))
        stepper.close()
    assert results[0][0] == pytest.approx(results[1][0], abs=FLOAT32_ROUNDING)


def test_a_weight_of_many_tiles_is_perturbed_like_one_of_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TILE_ELEMENTS, "cpu", 1 << 10)
    model, space = attached(tmp_path, "dense nf4")
    assert space.weights is not None
    assert max(len(part.tiles) for part in space.weights.parts) > 4
    curvature = learnt(Factored, trainable(space))
    batch, plain = tiny_task_batch("causal"), twin(tmp_path, model)
    along = changes(space, SEED, 0, curvature)
    space.weights.begin(SEED, 0, curvature, measured=False)
    got = Traversal(model).losses(batch, Branches.of(), 1e-2).mean()
    wanted = [loss(moved(plain, along, sign * 1e-2), batch) for sign in (0, 1, -1)]
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=FLOAT32_ROUNDING)


def test_tile_noise_is_a_pure_function_of_its_arguments() -> None:
    def draw(*arguments: int | str) -> Tensor:
        return tile_normal(*arguments, out=torch.empty(8, 33))  # type: ignore[arg-type]

    first = draw(1, 2, "a", 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    assert torch.equal(first, draw(1, 2, "a", 64))
    torch.set_num_threads(threads)
    for other in ((2, 2, "a", 64), (1, 3, "a", 64), (1, 2, "b", 64), (1, 2, "a", 0)):
        assert not torch.equal(first, draw(*other))
    rounding = tile_rounding(1, 2, "a", 64, torch.device("cpu"))
    assert isinstance(rounding, TorchUniform)
    assert not torch.equal(first, torch.empty(8, 33).normal_(generator=rounding.generator))


# --------------------------------------------------------------------------------------------- update


def plain_descent(plain, space, shapes, sigma: str, steps: int, lr: float, mu: float) -> list[list[float]]:
    """HiZOO on whole float64 matrices: losses by separate forwards, Sigma by the papers' formulas."""
    rows = {name: np.ones(shape[0]) for name, shape in shapes.items()}
    columns = {name: np.ones(shape[1]) for name, shape in shapes.items()}
    batch, found = tiny_task_batch("causal"), []
    for step in range(steps):
        z = {p.name: whole_z(p, SEED, step).double().numpy() for p in space.weights.parts}
        inverse = {n: reference.factored_inverse(rows[n], columns[n]) for n in z}
        along = {n.removesuffix(".weight"): torch.from_numpy(z[n] / np.sqrt(inverse[n])) for n in z}
        losses = [loss(moved(plain, along, sign * mu), batch) for sign in (0, 1, -1)]
        grad, c = reference.hizoo_scalars(losses, mu)
        if sigma == "factored":
            for n in z:
                rows[n], columns[n] = reference.factored_step(rows[n], columns[n], z[n], c, 0.05)
        plain = moved(plain, along, -lr * grad)
        found.append(losses)
    return found


@pytest.mark.parametrize("sigma", ["none", "factored"])
def test_hizoo_on_float32_weights_follows_a_plain_float64_run(sigma: str, tmp_path: Path) -> None:
    model, space = attached(tmp_path, "dense none")
    plain, mu, lr = twin(tmp_path, model), 1e-2, 1e-3
    expected = plain_descent(plain, space, trainable(space), sigma, 5, lr, mu)
    stepper = make_stepper(model, space, curvatures.get(sigma), lr=lr, mu=mu)
    got = [stepper.step(step, tiny_task_batch("causal")).losses for step in range(5)]
    stepper.close()
    assert abs(expected[0][0] - expected[-1][0]) > 0.02  # it does move
    np.testing.assert_allclose(got, expected, rtol=0, atol=FLOAT32_ROUNDING)


@every_kind
def test_the_update_moves_the_weights_along_the_direction_that_was_measured(
    kind: str, tmp_path: Path
) -> None:
    model, space = attached(tmp_path, kind)
    curvature = learnt(Factored, trainable(space))
    assert space.weights is not None
    space.weights.begin(SEED, 0, curvature, measured=False)
    before = {p.linear.name: decoded(p.linear.weight) for p in space.weights.parts}
    along = changes(space, SEED, 0, curvature)
    space.weights.update(1e-3, 0.1)
    assert all(torch.equal(decoded(model.linears[n].weight), w) for n, w in before.items())  # it waits
    space.weights.flush()
    exact = kind in ("dense none", "scales nf4", "scales int8")
    for name, weight in before.items():
        wanted = 0.9 * weight.double() - 1e-3 * along[name]
        got = decoded(model.linears[name].weight).double()
        if exact:
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
        else:  # the mean over the weights of an unbiased rounding, along the update: five standard errors
            error, step = got - wanted, wanted - weight.double()
            margin = 5 * float((error * step).square().sum().sqrt())
            assert abs(float((error * step).sum())) < margin
            assert not torch.equal(decoded(model.linears[name].weight), weight)


@every_kind
def test_an_update_is_applied_once_before_whatever_comes_next(kind: str, tmp_path: Path) -> None:
    results = []
    for what in ("evaluate", "save", "flush", "second update", "release"):
        model, space = attached(tmp_path / "model", kind)
        assert space.weights is not None
        curvature = NoCurvature()
        curvature.start(trainable(space), TorchArrays())
        space.weights.begin(SEED, 0, curvature, measured=False)
        start = {n: decoded(linear.weight) for n, linear in model.linears.items()}
        space.weights.update(1e-2, 0.0)
        if what == "evaluate":
            Traversal(model).losses(tiny_task_batch("causal"))
        elif what == "save":
            space.save(tmp_path / "saved")
        elif what == "flush":
            space.weights.flush()
        elif what == "second update":
            space.weights.update(0.0, 0.0)
        else:
            space.detach()
        results.append({n: decoded(linear.weight) for n, linear in model.linears.items()})
        assert not same(start, results[-1])
        Traversal(model).losses(tiny_task_batch("causal"))  # nothing waits any more
        assert same(results[-1], {n: decoded(linear.weight) for n, linear in model.linears.items()})
    assert all(same(results[0], other) for other in results)


def test_a_broken_traversal_leaves_each_block_updated_once(tmp_path: Path) -> None:
    whole, space = attached(tmp_path, "dense nf4")
    stepper = make_stepper(whole, space)
    stepper.step(0, tiny_task_batch("causal"))
    wanted = state(whole)
    stepper.close()
    broken, space = attached(tmp_path, "dense nf4")
    stepper = make_stepper(broken, space)
    stepper.step(0, tiny_task_batch("causal"))

    def stop(*_: object) -> None:
        raise InterruptedError

    hook = broken.blocks[1].block[0].register_forward_pre_hook(stop)  # type: ignore[index]
    with pytest.raises(InterruptedError):
        Traversal(broken).losses(tiny_task_batch("causal"))
    hook.remove()
    stepper.close()
    assert same(state(broken), wanted)


def test_a_step_with_a_loss_that_is_not_finite_leaves_nothing_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, space = attached(tmp_path, "dense nf4")
    stepper = make_stepper(model, space, Grouped())
    before = state(model)
    bad = Losses(
        torch.tensor([[1.0], [torch.nan], [1.0]], dtype=torch.float64), torch.zeros(3, 1), torch.ones(1, 1)
    )
    monkeypatch.setattr(stepper.traversal, "losses", lambda *_: bad)
    assert stepper.step(0, tiny_task_batch("causal")).skipped
    stepper.close()
    assert same(before, state(model))


# ------------------------------------------------------------------------------------------ curvature


class Recorder(NoCurvature):
    """Notes what it is shown."""

    sees = True

    def start(self, shapes, arrays=None) -> None:
        super().start(shapes, arrays)
        self.seen: dict[str, list[tuple[int, Tensor]]] = {}

    def see(self, name: str, z: Tensor, first_row: int = 0) -> None:
        self.seen.setdefault(name, []).append((first_row, z.clone()))


@pytest.mark.parametrize("kind", ["dense nf4", "scales nf4", "scales int8"])
def test_curvature_sees_every_z_once_and_only_where_it_is_measured(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TILE_ELEMENTS, "cpu", 1 << 12)
    model, space = attached(tmp_path, kind)
    curvature = Recorder()
    stepper = make_stepper(model, space, curvature)
    stepper.step(0, tiny_task_batch("causal"))
    assert space.weights is not None
    for part in space.weights.parts:
        whole = torch.cat([z for _, z in curvature.seen[part.name]])
        assert torch.equal(whole, whole_z(part, SEED, 0))
        starts = [first for first, _ in curvature.seen[part.name]]
        assert starts == [part.rows(tile).start for tile in part.tiles]
    curvature.seen.clear()
    Traversal(model).losses(tiny_task_batch("causal"), Branches.of(), MU)  # a second chunk of the same step
    assert not curvature.seen
    stepper.close()
    stepper = make_stepper(model, space, curvature, estimator="mezo")
    stepper.step(1, tiny_task_batch("causal"))
    stepper.close()
    assert not curvature.seen


@pytest.mark.parametrize("sigma", ["grouped tensor", "grouped row", "factored"])
def test_curvature_of_tiles_equals_that_of_the_whole(sigma: str) -> None:
    shapes = {"w": torch.Size([40, 24]), "v": torch.Size([50])}
    generator = torch.Generator().manual_seed(0)
    by_tile, whole = learnt(SIGMAS[sigma], shapes), learnt(SIGMAS[sigma], shapes)
    for _ in range(4):
        z = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for name, value in z.items():
            whole.see(name, value)
            by_tile.see(name, 100 * value[:7])  # of a pass that was broken off
            for first in range(0, len(value), 7):
                by_tile.see(name, value[first : first + 7], first)
        whole.observe(40.0, 0.1)
        by_tile.observe(40.0, 0.1)
    for name in shapes:
        torch.testing.assert_close(by_tile.scale(name), whole.scale(name), rtol=1e-6, atol=0)
        rows, columns = whole.factors(name)
        product = rows if columns is None else rows * columns
        assert torch.equal(product.expand(shapes[name]), whole.scale(name).expand(shapes[name]))


def test_a_value_for_every_weight_is_refused(tmp_path: Path) -> None:
    model, space = attached(tmp_path, "dense nf4")
    with pytest.raises(UserError, match="--curvature: diagonal keeps a value for every weight"):
        make_stepper(model, space, curvatures.get("diagonal"))


# ------------------------------------------------------------------------------------ clip and heads


def test_the_projected_gradient_is_clipped_and_recorded_as_such(tmp_path: Path) -> None:
    model, space = attached(tmp_path, "dense none")
    stepper = make_stepper(model, space, clip=1e-3)
    record = stepper.step(0, tiny_task_batch("causal"))
    stepper.close()
    assert abs(record.projected_grad) == 1e-3
    assert record.clipped


@pytest.mark.parametrize("kind", ["dense nf4", "scales int8"])
def test_a_classification_head_is_trained_in_memory_beside(kind: str, tmp_path: Path) -> None:
    model, space = attached(tmp_path / "model", kind, "classifier")
    lora = LoRA(rank=2)
    assert list(space.parameters) == ["score.weight"]
    stepper = make_stepper(model, space, Grouped())
    head = space.parameters["score.weight"].clone()
    for step in range(2):
        stepper.step(step, tiny_task_batch("classifier"))
    stepper.close()
    assert not torch.equal(space.parameters["score.weight"], head)
    space.save(tmp_path / "saved")
    other, again = attached(tmp_path / "model", kind, "classifier")
    again.load(tmp_path / "saved")
    assert same(state(model), state(other))
    assert torch.equal(again.parameters["score.weight"], space.parameters["score.weight"])
    batch = tiny_task_batch("classifier")
    assert torch.equal(Traversal(model).losses(batch).scores, Traversal(other).losses(batch).scores)
    lora.attach(other, seed=0)
    assert other.pending is None
    assert "score.weight" in lora.parameters


# ----------------------------------------------------------------------------- streaming and saving


@every_kind
def test_streamed_steps_equal_resident_ones_bitwise(kind: str, tmp_path: Path) -> None:
    results = []
    for streamed in (False, True):
        model, space = attached(tmp_path / "model", kind)
        residency = Streamed(model) if streamed else None
        stepper = make_stepper(model, space, Grouped())
        records = [stepper.step(step, tiny_task_batch("causal")) for step in range(3)]
        stepper.close()
        space.save(tmp_path / f"saved-{streamed}")
        results.append((records, state(model)))
        assert residency is None or residency.kept == 3 * len(model.blocks)
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])
    model, space = attached(tmp_path / "model", kind)
    Streamed(model)
    space.load(tmp_path / "saved-True")
    assert same(state(model), results[0][1])


def test_scales_in_eight_bits_are_made_float32_unless_they_are_offloaded(tmp_path: Path) -> None:
    from hizoo_lite.engine.load import load

    save_tiny("llama", tmp_path)
    model = load(tmp_path, bits="nf4", compute_dtype="float32", device="cpu")
    before = {n: decoded(linear.weight) for n, linear in model.linears.items()}
    Requantized().attach(model, seed=0)
    assert same(before, {n: decoded(linear.weight) for n, linear in model.linears.items()})
    assert not any(lin.weight.double_quant for lin in model.linears.values() if lin.weight.bits == "nf4")
    for space in (Requantized(), Scales()):
        model = load(tmp_path, bits="nf4", compute_dtype="float32", device="cpu")
        Streamed(model)
        with pytest.raises(
            UserError, match="scales in 8 bits that are not in memory; quantize the model again"
        ):
            space.attach(model, seed=0)


def test_a_residual_can_be_attached_to_blocks_that_are_offloaded(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    results = []
    for first in (True, False):
        model, space = tiny(tmp_path, "nf4"), Dense(update="residual")
        if first:
            Streamed(model)
        space.attach(model, seed=0)
        stepper = make_stepper(model, space)
        for step in range(2):
            stepper.step(step, tiny_task_batch("causal"))
        stepper.close()
        assert all(isinstance(model.linears[n].weight, ResidualWeight) for n in space.target_names)
        results.append(state(model))
    assert same(*results)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dense-update: got 'new', allowed are requantize, residual"):
        Dense(update="new")  # type: ignore[arg-type]
    model, space = attached(tmp_path / "model", "residual nf4")
    with pytest.raises(UserError, match="has a residual already; load the model anew"):
        Requantized().attach(model, seed=0)
    with pytest.raises(UserError, match=r"--space scales: .* has no scales to train"):
        Scales().attach(tiny(tmp_path / "model", "none"), seed=0)
    model, space = attached(tmp_path / "model", "dense nf4")
    space.save(tmp_path / "saved")
    _, other = attached(tmp_path / "model", "residual nf4")
    with pytest.raises(UserError, match="update: it has 'requantize', this run 'residual'"):
        other.load(tmp_path / "saved")
    narrow = Requantized(targets="q_proj")
    narrow.attach(tiny(tmp_path / "model", "nf4"), seed=0)
    with pytest.raises(UserError, match="targets: it has"):
        narrow.load(tmp_path / "saved")
    with pytest.raises(UserError, match=r"hizoo_space.json: no such file"):
        space.load(tmp_path / "missing")
    (tmp_path / "saved/block-00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"block-00001.safetensors: cannot be read"):
        space.load(tmp_path / "saved")


def test_only_the_chosen_layers_change(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model, space = tiny(tmp_path, "nf4"), Requantized(targets="q_proj,down_proj")
    space.attach(model, seed=0)
    before = state(model)
    stepper = make_stepper(model, space, lr=1e-2)
    stepper.step(0, tiny_task_batch("causal"))
    stepper.close()
    after = state(model)
    changed = {name.rsplit(".", 1)[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(space.target_names)
    assert all(isinstance(model.linears[name].weight, FourBitWeight) for name in changed)
