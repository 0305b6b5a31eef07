"""No preconditioning: Sigma is the identity, as in MeZO (arXiv 2305.17333).

With the hizoo estimator the measured curvature still drives the automatic learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping

from hizoo_lite.arrays import Array, Arrays, Shape
from hizoo_lite.base import Curvature
from hizoo_lite.curvature.state import check_smoothing, check_state


class NoCurvature(Curvature):
    """Sigma = I for good: no preconditioning, as in MeZO (arXiv 2305.17333)."""

    name = "none"
    sees = False

    def start(self, shapes: Mapping[str, Shape], arrays: Arrays) -> None:
        """Nothing to lay out; the names are kept to answer for them alone."""
        self._names, self._arrays = frozenset(shapes), arrays

    def scale(self, name: str) -> Array:
        """One, as a 0-dim float32 tensor; KeyError if `name` was not given to `start`."""
        if name not in self._names:
            raise KeyError(name)
        xp = self._arrays.xp
        return xp.ones((), dtype=xp.float32)

    def see(self, name: str, z: Array, first_row: int = 0) -> None:
        """Nothing is made of it."""

    def observe(self, curvature: float, smoothing: float) -> None:
        """Ignore everything but an impossible smoothing, which is an error here as elsewhere."""
        check_smoothing(smoothing)

    def state_dict(self) -> dict[str, Array]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Accept an empty state only."""
        check_state(state, {}, self.name, self._arrays)
