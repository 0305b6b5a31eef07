"""Every member of every axis, a line each: the settings of a run that `test_members.py` holds to all laws.

A new member is a line here. `toy_space.py` and `test_members_estimator.py` have members of the tests' own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from hizoo_lite.registry import CURVATURES, ESTIMATORS, OBJECTIVES, SPACES, Line, Registry


class Case(NamedTuple):
    """A run with a member, and what can be made of it."""

    settings: dict[str, Any]
    exports: tuple[str, ...] = ("peft", "merged")  # the other forms are refused
    writes: bool = False  # of a task whose answers are texts
    grid: bool = False  # runs with `-m grid`: another case has nearly all of it


_WEIGHTS = ("merged",)
MEMBERS: dict[str, Case] = {
    "lora": Case({"space": "lora", "targets": "all-linear", "blocks": "all", "smoothing_schedule": "linear"}),
    "lora, train_a": Case({"space": "lora", "train_a": True, "alpha": 3.0, "rslora": True}),
    "lora, exact blocks": Case({"space": "lora", "targets": "all-linear", "exact_blocks": "all"}),
    "lora, some exact": Case({"space": "lora", "exact_blocks": 1, "blocks": 3, "train_a": True}),
    "dense": Case({"space": "dense", "lr": 1e-4, "weight_decay": 0.1, "curvature": "factored"}, _WEIGHTS),
    "dense, requantize": Case(
        {"space": "dense", "dense_update": "requantize", "bits": "int8", "lr": 1e-4}, _WEIGHTS
    ),
    "lowrank": Case({"space": "lowrank", "noise_every": 3}, _WEIGHTS, grid=True),
    "lowrank, momentum": Case(
        {
            "space": "lowrank",
            "estimator": "mezo",
            "lr": 1e-4,
            "momentum": 0.9,
            "noise_every": 3,
            "bits": "int8",
        },
        _WEIGHTS,
    ),
    "subspace": Case({"space": "subspace", "noise_rank": 4, "noise_every": 3}, _WEIGHTS),
    "subspace, requantize": Case(
        {"space": "subspace", "estimator": "mezo", "lr": 1e-4, "dense_update": "requantize"},
        _WEIGHTS,
        grid=True,
    ),
    "small": Case({"space": "small", "bits": "int8"}, _WEIGHTS),
    "small, requantize": Case(
        {"space": "small", "estimator": "mezo", "lr": 1e-4, "dense_update": "requantize", "small_share": 0.5},
        _WEIGHTS,
        grid=True,
    ),
    "sparse": Case({"space": "sparse", "sparse_share": 0.01, "head": "none"}, _WEIGHTS),
    "sparse, magnitude": Case(
        {"space": "sparse", "sparse_by": "magnitude", "directions": 2, "weight_decay": 0.1, "bits": "int8"},
        _WEIGHTS,
        grid=True,
    ),
    "mazo": Case({"space": "mazo", "sparse_share": 0.05, "head": "none"}, _WEIGHTS),
    "mazo, int8": Case(
        {"space": "mazo", "mazo_greedy": 0.0, "mazo_size": 2.0, "weight_decay": 0.1, "bits": "int8"},
        _WEIGHTS,
        grid=True,
    ),
    "scales": Case({"space": "scales", "lr": 1e-4, "curvature_per": "row"}, _WEIGHTS),
    "gains": Case({"space": "gains", "lr": 1e-2}, ()),
    "hizoo": Case({"estimator": "hizoo", "directions": 2, "lr_schedule": "cosine", "warmup_steps": 2}),
    "hizoo, losses": Case({"estimator": "hizoo", "curvature_from": "losses", "curvature_every": 2}),
    "mezo": Case({"estimator": "mezo", "lr": 1e-2, "weight_decay": 0.1}),
    "mezo, directions": Case({"estimator": "mezo", "lr": 1e-2, "directions": 2}, grid=True),
    "kerzoo": Case({"estimator": "kerzoo", "lr": 1e-2, "directions": 2, "targets": "all-linear"}),
    "fzoo": Case({"estimator": "fzoo", "lr": 1e-4, "directions": 3, "weight_decay": 0.1}),
    "grzo": Case({"estimator": "grzo", "lr": 1e-3, "groups": 3, "targets": "all-linear"}),
    "dp": Case(
        {
            "estimator": "dp",
            "directions": 3,
            "lr": 1e-2,
            "weight_decay": 0.1,
            "dp_noise": 0.5,
            "lr_schedule": "stages",
        }
    ),
    "dp, laplace": Case(
        {"estimator": "dp", "dp_mechanism": "laplace", "space": "dense", "lr": 1e-4}, _WEIGHTS, grid=True
    ),
    "loss": Case({"objective": "loss", "head": "none"}),
    "accuracy": Case({"objective": "accuracy", "targets": "all-linear", "directions": 2, "mu": 0.3}),
    "f1": Case({"objective": "f1", "targets": "all-linear", "blocks": "all", "mu": 1.0}, writes=True),
    "f1, dense": Case({"objective": "f1", "space": "dense", "mu": 0.03}, _WEIGHTS, writes=True),
    "grouped": Case({"curvature": "grouped", "curvature_per": "row", "smoothing": 0.5}),
    "factored": Case({"curvature": "factored", "lr": 1e-2, "clip": 0.01, "smoothing": 0.1}),
    "diagonal": Case({"curvature": "diagonal", "lr": 1e-2, "weight_decay": 0.1, "smoothing": 0.1}),
    "diagonal, reference": Case({"curvature": "diagonal", "curvature_mode": "reference", "lr": 1e-3}),
    "none": Case({"curvature": "none", "lr": 1e-2}),
}
#: Members of the tests' own, by axis.
TOYS: tuple[tuple[Registry[Any], str, Line], ...] = (
    (
        SPACES,
        "gains",
        Line("tests.toy_space:Gains", "a gain for each row", takes=("targets", "blocks")),
    ),
)
AXES: tuple[Registry[Any], ...] = (SPACES, ESTIMATORS, OBJECTIVES, CURVATURES)
