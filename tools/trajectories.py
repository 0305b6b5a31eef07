"""Trajectories on three two-dimensional functions, and what each curvature learns on a quadratic.

    python tools/trajectories.py --out trajectories.png [--json FILE] [--quick] [--seeds N]

First table: forwards until the distance to the minimum is a hundredth of the start's, median over the seeds.
`mezo` has, for each function, the learning rate of a grid (LR_GRID, as multiples of the inverse of the
largest curvature at the minimum or start) that needs fewest; `hizoo` runs grouped curvature with `--lr auto`
and no setting of its own; `hizoo, kappa tuned` takes the best kappa of KAPPA_GRID, as mezo its rate;
`hizoo, Sigma = I` is hizoo's automatic rate without a preconditioner. hizoo pays three forwards a step, mezo
two. A run that does not get there within the budget counts as the budget, shown with a ">".

Second table: log-correlation between the learnt and the true curvature on a noise-free quadratic, 20 groups
with curvatures from 1 to 1000. The functions are those of HiZOO (arXiv 2402.15173); starts are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reporting import make_parser, publish

from hizoo_lite.base import Curvature, Estimator, StepSize
from hizoo_lite.curvature import Diagonal, Grouped, NoCurvature
from hizoo_lite.estimators import HiZOO, MeZO
from hizoo_lite.optimizers.step_size import FROM_LOSSES, AutoRate, FixedRate, Schedule
from hizoo_lite.tensors import TorchArrays

MU = 1e-3
SMOOTHING = 0.01
LR_GRID = tuple(2.0**k for k in range(-5, 2))
KAPPA_GRID = (0.03, 0.1, 0.3)
CLOSE = 0.01
RECOVERY_STEPS = 320


@dataclass(frozen=True)
class Function:
    """A test function with its minimum, the start of every run, and its largest curvature."""

    label: str
    value: Callable[[float, float], float]
    minimum: tuple[float, float]
    start: tuple[float, float]
    largest_curvature: float


FUNCTIONS = (
    Function(
        "8(x-1)^2(1.3x^2+2x+1) + 0.5(y-4)^2",
        lambda x, y: 8 * (x - 1) ** 2 * (1.3 * x * x + 2 * x + 1) + 0.5 * (y - 4) ** 2,
        (1.0, 4.0),
        (0.5, 0.0),
        68.8,
    ),
    Function("10000x^2 + y^2", lambda x, y: 10000 * x * x + y * y, (0.0, 0.0), (1.0, 1.0), 20000.0),
    # No curvature away from the axes: the grid is in units of a length, 1/50 of the start's distance.
    Function("|x| + |y|", lambda x, y: abs(x) + abs(y), (0.0, 0.0), (2.0, 1.0), 20.0),
)


@dataclass(frozen=True)
class Run:
    """One trajectory: points (steps + 1, 2), and forwards until close (None within the budget)."""

    points: np.ndarray
    forwards: int | None
    broke: bool  # not finite, or ten times further from the minimum than the start


@dataclass(frozen=True)
class Method:
    """How to make the parts of one run; they carry state, so each run makes its own."""

    estimator: Callable[[], Estimator]
    curvature: Callable[[], Curvature]
    step_size: Callable[[], StepSize]


def mezo(lr: float) -> Method:
    """MeZO with a constant learning rate."""
    return Method(MeZO, NoCurvature, lambda: FixedRate(Schedule(peak=lr)))


def hizoo(kappa: float = 0.03, curvature: Callable[[], Curvature] = Grouped) -> Method:
    """HiZOO as published, with an automatic learning rate: these functions predict nothing."""
    settings = {**FROM_LOSSES, "kappa": kappa}
    return Method(lambda: HiZOO(curvature_from="losses"), curvature, lambda: AutoRate(**settings))


def descend(function: Function, method: Method, seed: int, budget: int, go_on: bool = False) -> Run:
    """One run of at most `budget` forwards, ended when close unless `go_on`. x and y are a tensor each."""
    generator = np.random.default_rng(seed)
    estimator, curvature, step_size = method.estimator(), method.curvature(), method.step_size()
    curvature.start({"x": torch.Size([1]), "y": torch.Size([1])}, TorchArrays())
    point, minimum = np.array(function.start), np.array(function.minimum)
    far = math.dist(function.start, function.minimum)
    points, spent, step, reached = [point], 0, 0, None
    while spent < budget and (go_on or reached is None):
        drawn = generator.standard_normal(2)
        direction = drawn * np.array([float(curvature.scale(name)) for name in ("x", "y")])
        evaluated = estimator.points(step)
        losses = [function.value(*(point + offset * MU * direction)) for _, offset in evaluated]
        estimate = estimator.estimate(step, np.array(losses), np.zeros(1), MU)
        if estimate.curvature is not None:
            noise = {"x": torch.tensor(drawn[:1]), "y": torch.tensor(drawn[1:])}
            for name, value in noise.items():
                curvature.see(name, value)
            curvature.observe(estimate.curvature, SMOOTHING)
        point = point - step_size.rate(step, estimate) * estimate.projected_grad * direction
        points.append(point)
        spent, step = spent + len(evaluated), step + 1
        distance = float(np.hypot(*(point - minimum)))
        if not distance < 10 * far:
            return Run(np.array(points), None, True)
        if reached is None and distance <= CLOSE * far:
            reached = spent
    return Run(np.array(points), reached, False)


def median_forwards(
    function: Function, method: Method, seeds: Sequence[int], budget: int
) -> tuple[float, int]:
    """Median forwards until close (infinite where a run broke, the budget where it was slow), and breaks."""
    runs = [descend(function, method, seed, budget) for seed in seeds]
    counts = [math.inf if run.broke else float(run.forwards or budget) for run in runs]
    return float(np.median(counts)), sum(run.broke for run in runs)


def best(
    function: Function, choices: Sequence[tuple[float, Method]], seeds: Sequence[int], budget: int
) -> tuple[float, float, int, Method]:
    """(setting, median forwards, broken runs, method) of the setting with the fewest forwards."""
    found = [
        (setting, *median_forwards(function, method, seeds, budget), method) for setting, method in choices
    ]
    return min(found, key=lambda entry: entry[1])


def compare(
    function: Function, seeds: Sequence[int], budget: int
) -> dict[str, tuple[float, float, int, Method]]:
    """Every method on one function: its setting, median forwards, broken runs, and itself."""
    rates = [factor / function.largest_curvature for factor in LR_GRID]
    auto = hizoo()
    plain = hizoo(curvature=NoCurvature)
    return {
        "mezo, best lr": best(function, [(lr, mezo(lr)) for lr in rates], seeds, budget),
        "hizoo, lr auto": (0.03, *median_forwards(function, auto, seeds, budget), auto),
        "hizoo, kappa tuned": best(function, [(k, hizoo(k)) for k in KAPPA_GRID], seeds, budget),
        "hizoo, Sigma = I": (0.03, *median_forwards(function, plain, seeds, budget), plain),
    }


def recover(curvature: Curvature, size: int, steps: int, seed: int = 0, groups: int = 20) -> float:
    """Correlation of log(1/sigma) with log(true curvature) over the coordinates of a quadratic of `size`."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.logspace(0, 3, groups, dtype=torch.float64)[torch.randperm(groups, generator=generator)]
    shapes = {f"group{i:02d}": torch.Size([size // groups]) for i in range(groups)}
    curvature.start(shapes, TorchArrays())
    for _ in range(steps):
        z = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        squares = torch.stack([(curvature.scale(k) * z[k]).double().square().sum() for k in z])
        for name, value in z.items():
            curvature.see(name, value)
        curvature.observe(float(truth @ squares), SMOOTHING)
    learnt = torch.stack([-2 * curvature.scale(k).double().log().expand(shapes[k]) for k in shapes])
    return float(
        torch.corrcoef(torch.stack([truth.log()[:, None].expand_as(learnt).flatten(), learnt.flatten()]))[
            0, 1
        ]
    )


def plot(results: dict[str, dict[str, tuple[float, float, int, Method]]], budget: int, out: Path) -> None:
    """One panel a function: contours, and the trajectory of seed 0 of mezo and of both hizoo runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(FUNCTIONS), figsize=(5 * len(FUNCTIONS), 4.6), constrained_layout=True
    )
    for function, axes in zip(FUNCTIONS, panels, strict=True):
        lines = results[function.label]
        for label, color in (
            ("mezo, best lr", "tab:red"),
            ("hizoo, lr auto", "tab:blue"),
            ("hizoo, kappa tuned", "tab:green"),
        ):
            _, median, _, method = lines[label]
            points = descend(function, method, 0, budget).points
            count = f"> {median:.0f}" if median >= budget else f"{median:.0f}"
            axes.plot(*points.T, color=color, lw=1.0, alpha=0.8, label=f"{label}: {count} forwards")
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        xs, ys = np.linspace(left, right, 200), np.linspace(bottom, top, 200)
        heights = np.vectorize(function.value)(*np.meshgrid(xs, ys))
        axes.contour(xs, ys, np.log1p(heights), levels=20, colors="0.8", linewidths=0.6, zorder=0)
        axes.plot(*function.start, "ko", ms=5)
        axes.plot(*function.minimum, "k*", ms=12)
        axes.set(title=function.label, xlabel="x", ylabel="y", xlim=(left, right), ylim=(bottom, top))
        axes.legend(fontsize=8)
    figure.suptitle(
        "From the start (dot) to a hundredth of its distance to the minimum (star); seed 0, median counts"
    )
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, help="write the plot to this PNG")
    parser.add_argument("--seeds", type=int, default=11, help="seeds a setting (default 11)")
    options = parser.parse_args(arguments)
    seeds = range(3 if options.quick else options.seeds)
    budget = 4_000 if options.quick else 200_000
    results = {function.label: compare(function, seeds, budget) for function in FUNCTIONS}
    rows: list[list[Any]] = []
    for label, lines in results.items():
        for method, (setting, median, broken, _) in lines.items():
            late = median >= budget
            rows.append(
                [
                    label,
                    method,
                    "any" if late and "best" in method else setting,
                    f"> {budget}" if late else median,
                    broken,
                ]
            )
    figures: dict[str, Any] = {
        "seeds": len(seeds),
        "budget": budget,
        "trajectories": {
            label: {m: {"setting": s, "forwards": f, "broken": b} for m, (s, f, b, _) in lines.items()}
            for label, lines in results.items()
        },
    }
    sizes = (2_000,) if options.quick else (2_000, 20_000)
    recovered = {str(size): recoveries(size) for size in sizes}
    figures["recovery"] = recovered
    columns = ["function", "method", "lr or kappa", "forwards", "broken runs"]
    title = f"Forwards to a hundredth of the start's distance, {len(seeds)} seeds, mu {MU}"
    publish(title, columns, rows, figures, options)
    print(f"\nLog-correlation with the true curvature after {RECOVERY_STEPS} steps, curvatures 1 to 1000")
    for size, found in recovered.items():
        print(f"{size} parameters: " + ", ".join(f"{label} {value:.3f}" for label, value in found.items()))
    if options.out:
        plot(results, budget, options.out)


def recoveries(size: int) -> dict[str, float]:
    """`recover` for each way to keep the curvature."""
    members = {
        "grouped": Grouped(),
        "diagonal paper": Diagonal(),
        "diagonal reference": Diagonal("reference"),
    }
    return {label: recover(member, size, RECOVERY_STEPS) for label, member in members.items()}


if __name__ == "__main__":
    main()
