"""Plain float64 references of the family's estimators, a function each, written from the papers' formulas.

They share no code with the package. `loss` is of a whole parameter vector; `z` has a row for each direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Loss = Callable[[np.ndarray], float]


def mezo(theta: np.ndarray, loss: Loss, z: np.ndarray, mu: float, lr: float, step: int) -> np.ndarray:
    """n-SPSA of arXiv 2305.17333, definition 1 and the remark behind it."""
    total = np.zeros_like(theta)
    for row in z:
        total += (loss(theta + mu * row) - loss(theta - mu * row)) / (2 * mu) * row
    return theta - lr * total / len(z)


def kerzoo(
    theta: np.ndarray, loss: Loss, z: np.ndarray, mu: float, lr: float, radii: np.ndarray
) -> np.ndarray:
    """arXiv 2505.18886: r uniform in [-1, 1], K(r) = 15/4 r (5 - 7 r^2)."""
    total = np.zeros_like(theta)
    for row, r in zip(z, radii, strict=True):
        rise = (loss(theta + mu * r * row) - loss(theta - mu * r * row)) / (2 * mu)
        total += rise * (15 / 4) * (5 * r - 7 * r**3) * row
    return theta - lr * total / len(z)


def fzoo(theta: np.ndarray, loss: Loss, u: np.ndarray, mu: float, lr: float, step: int) -> np.ndarray:
    """arXiv 2506.09034: l_i - l_0 over the standard deviation of l_1 .. l_n, along Rademacher directions."""
    base, others = loss(theta), [loss(theta + mu * row) for row in u]
    mean = sum(others) / len(others)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in others) / (len(others) - 1))
    total = np.zeros_like(theta)
    for row, value in zip(u, others, strict=True):
        total += (value - base) * row
    return theta - lr * total / (len(others) * deviation)


def lozo_direction(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """U V' of arXiv 2410.07698, algorithm 1, in units where its values have a variance of one. u: (m, r)."""
    out = np.zeros((len(u), len(v)))
    for row in range(len(u)):
        for column in range(len(v)):
            out[row, column] = sum(u[row] * v[column]) / math.sqrt(u.shape[1])
    return out


def lozo_m(
    n: np.ndarray, u: np.ndarray, v: np.ndarray, v_old: np.ndarray, slope: float, momentum: float
) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 2: N, which is projected on another V first, and N V' as the direction of the move."""
    if v is not v_old:
        n = n @ v_old.T @ v / len(v)
    n = momentum * n + (1 - momentum) * slope * u
    return n, lozo_direction(n, v)


def subzero_direction(u: np.ndarray, z: np.ndarray, v: np.ndarray) -> np.ndarray:
    """U Z V' of arXiv 2410.08989, algorithm 1, times sqrt(m n) / r."""
    return u @ z @ v.T * math.sqrt(len(u) * len(v)) / len(z)
