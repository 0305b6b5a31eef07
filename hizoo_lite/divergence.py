"""How far apart the predictions of two branches are: the symmetric Kullback-Leibler divergence.

    KL(p || q) + KL(q || p) = sum_i (p_i - q_i) (log p_i - log q_i)

Every term is positive, or zero, in floating point too. For p and q at theta +- mu d it is (2 mu)^2 d' G d to
leading order, with G the Gauss-Newton matrix of the loss, which for a log-likelihood is the Fisher matrix
(Martens, arXiv 1412.1193, section 9): curvature from first differences of predictions, where losses would take
a second difference. One formula for torch and for numpy, on the host and in a traced graph.
"""

from __future__ import annotations

from typing import Any

from hizoo_lite.base import Array


def divergence_terms(log_p: Array, log_q: Array, xp: Any) -> Array:
    """The terms of the sum, from log-probabilities of one shape, float64.

    xp: torch or numpy. An outcome that is impossible under both (-inf) adds nothing.
    """
    terms = (xp.exp(log_p) - xp.exp(log_q)) * (log_p - log_q)
    return xp.where(log_p == log_q, xp.zeros_like(terms), terms)


def directional_curvature(divergence: float, distance: float) -> float:
    """d' G d from the mean divergence of two points on the line along d.

    distance: between them, in units of d: 2 mu for a pair at +-mu d. For a one-sided point at mu d and theta
    itself it is mu: 2 KL(p0 || p) / mu^2 has the same leading term, this one treats both alike.
    """
    return divergence / (distance * distance)
