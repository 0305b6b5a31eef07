"""What noisy sums over random batches cost in privacy, as the library dp-accounting has it."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

from hizoo_lite.errors import UserError

Mechanism = Literal["gaussian", "laplace"]


class Accountant:
    """Of steps that are alike: epsilon at `delta`, for data sets that differ by one example more or less.

    Upper bounds: by Renyi differential privacy for Gaussian noise (Mironov et al., arXiv 1908.10530), by the
    privacy loss distribution for Laplace noise (Doroshenko et al., arXiv 2207.04380).
    """

    def __init__(self, mechanism: Mechanism, probability: float, noise: float, delta: float) -> None:
        """`UserError` if the library is not installed.

        probability: with which each example is in a batch, independently of the others.
        noise: standard deviation of a sum's noise, or its Laplace scale, over the most one example may add.
        """
        try:
            import dp_accounting as library
            from dp_accounting import pld, rdp
        except ImportError as error:
            raise UserError(
                "--estimator: differential privacy is accounted for by dp-accounting, which is not installed "
                "here; allowed: another estimator, or pip install 'hizoo-lite[dp]'"
            ) from error
        made: dict[Mechanism, tuple[Any, Any]] = {
            "gaussian": (library.GaussianDpEvent, rdp.RdpAccountant),
            "laplace": (library.LaplaceDpEvent, pld.PLDAccountant),
        }
        event, self._kind = made[mechanism]
        self._event = library.PoissonSampledDpEvent(probability, event(noise))
        self.delta = delta

    def epsilon(self, steps: int) -> float:
        """Of `steps` steps together."""
        if steps == 0:
            return 0.0
        return _epsilon(self._kind, self._event, steps, self.delta)

    def most_steps(self, budget: float, steps: int) -> int:
        """How many of `steps` steps have an epsilon of at most `budget`."""
        return bisect_right(range(1, steps + 1), budget, key=self.epsilon)


@cache
def _epsilon(kind: Any, event: Any, steps: int, delta: float) -> float:
    """Of a mechanism that is composed with itself: a tenth of a second or more in the library."""
    with _told_errors_alone():
        return float(kind().compose(event, steps).get_epsilon(delta))


@contextmanager
def _told_errors_alone() -> Iterator[None]:
    """The library warns of each Renyi order that it leaves out, which only makes the bound less tight."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
