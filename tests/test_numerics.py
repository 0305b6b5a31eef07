"""bf16 products in the even/odd basis keep the scalars of a step; branch by branch they do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench_numerics import STORIES, measure, random_llama

from hizoo_lite.noise import generator


@pytest.mark.parametrize(
    ("name", "seeds"),
    [
        ("random_llama", 3),
        pytest.param("random_llama", 10, marks=pytest.mark.grid),
        pytest.param("stories260K", 10, marks=pytest.mark.grid),
    ],
)
def test_bf16_products_keep_projected_gradient_and_curvature(name: str, seeds: int, tmp_path: Path) -> None:
    if name == "stories260K" and not STORIES.is_dir():
        pytest.skip(
            "the trained tiny model is not part of the repository: shared/models/stories260K is absent"
        )
    source = STORIES if name == "stories260K" else random_llama(tmp_path)
    ids = torch.from_numpy(generator(1, "tokens").integers(3, 500, (4, 32)))
    errors = measure(source, "none", ids, seeds=seeds)
    gradient, curvature = errors["even/odd bf16 products"]
    assert gradient <= 0.05
    assert curvature <= 0.15
    branchwise_gradient, branchwise_curvature = errors["bf16 branch by branch"]
    assert branchwise_gradient > 3 * gradient
    assert branchwise_curvature > 100 * curvature
    exact_gradient, exact_curvature = errors["float32 products"]
    assert exact_gradient <= 1e-4
    assert exact_curvature <= 1e-2
