"""How far apart the predictions of two branches are: the symmetric Kullback-Leibler divergence.

    KL(p || q) + KL(q || p) = sum_i (p_i - q_i) (log p_i - log q_i)

No term is negative, not even by rounding. For p and q at theta +- mu d the sum is (2 mu)^2 d' G d to leading
order, with G the Gauss-Newton matrix of the loss, which for a log-likelihood is the Fisher matrix (Martens,
arXiv 1412.1193, section 9): curvature from first differences of predictions, where losses would take a
second difference. The same lines run here and in a traced training graph, but for a graph's answer losses.
"""

from __future__ import annotations

import torch
from torch import Tensor


def divergence_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The terms of the sum, from log-probabilities of one shape, float64.

    An outcome that is impossible under both (-inf) adds nothing.
    """
    terms = (log_p.exp() - log_q.exp()) * (log_p - log_q)
    return torch.where(log_p == log_q, torch.zeros_like(terms), terms)
