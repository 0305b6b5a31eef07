"""No preconditioning: Sigma is the identity, as in MeZO (arXiv 2305.17333).

With the hizoo estimator the measured curvature still drives the automatic learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hizoo_lite.base import Curvature
from hizoo_lite.curvature.state import check_smoothing, check_state


class NoCurvature(Curvature):
    """Sigma = I for good."""

    name = "none"

    def start(self, shapes: Mapping[str, torch.Size]) -> None:
        """Nothing to lay out; the names are kept to answer for them alone."""
        self._names = frozenset(shapes)

    def scale(self, name: str) -> Tensor:
        """One, as a 0-dim float32 tensor; `KeyError` for a name that was not given to `start`."""
        if name not in self._names:
            raise KeyError(name)
        return torch.ones((), dtype=torch.float32)

    def see(self, name: str, z: Tensor, first_row: int = 0) -> None:
        """Nothing is made of it."""

    def observe(self, curvature: float, smoothing: float) -> None:
        """Ignore everything but an impossible smoothing, which is an error here as elsewhere."""
        check_smoothing(smoothing)

    def state_dict(self) -> dict[str, Tensor]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Accept an empty state only."""
        check_state(state, {}, self.name)
