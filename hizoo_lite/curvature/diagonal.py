"""HiZOO's full diagonal Hessian: one float32 value for every trainable parameter (arXiv 2402.15173).

With h = Sigma^-1 (ones at the start), d = z / sqrt(h), c the directional curvature, s the smoothing:

- mode "paper" (algorithm 1):  h <- (1 - s) h + s |c/2 * h (z^2 - 1)|. The update runs along the d that
  perturbed, because d is the direction whose derivative was measured: with any other factor, the
  expectation of g * d is no longer Sigma times the gradient.
- mode "reference" (published code, trainer.py 475-516):  h <- (1 - s) h + s |c|/2 * h z^2, without the
  minus-one term, and the update is z / sqrt(h_new).

Deviations: h is float32 whatever the dtype of the parameters (in float16, 1 - 1e-8 rounds to 1 and h never
moves), and is kept in [floor, ceiling], because zero curvature would otherwise let h decay until the
perturbation explodes. Both exist for parity: one value per coordinate cannot be learnt from one
scalar a step (tools/trajectories.py prints how far it gets); `grouped` is the default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from hizoo_lite.arrays import Array, Arrays, Shape
from hizoo_lite.base import Curvature
from hizoo_lite.curvature.state import check_smoothing, check_state, is_usable
from hizoo_lite.errors import UserError


class Diagonal(Curvature):
    """HiZOO's full diagonal: one value for each trainable value (arXiv 2402.15173, algorithm 1).

    With h = Sigma^-1, c = d' H d and s the smoothing:

        h <- (1 - s) h + s |c/2 h (z^2 - 1)|         "paper"
        h <- (1 - s) h + s |c|/2 h z^2               "reference", the published code

    Kept for comparison: one value a coordinate cannot be learnt from one scalar a step. h is float32, 4 bytes
    a value (twice that inside a step); that and its bounds are our deviations.
    """

    name = "diagonal"
    sees_tiles = False

    def __init__(
        self, mode: Literal["paper", "reference"] = "paper", floor: float = 1e-3, ceiling: float = 1e8
    ) -> None:
        """Check the arguments: 0 < floor <= 1 <= ceiling.

        Args:
            mode: "paper", whose update uses the Sigma that perturbed; or "reference", which divides by the
                new one.
            floor: the least that an entry of Sigma^-1 becomes; they start at 1.
            ceiling: the most.

        Raises:
            UserError: if an argument is out of range.
        """
        if mode not in ("paper", "reference"):
            raise UserError(f"curvature diagonal: mode must be paper or reference, got {mode!r}")
        if not 0.0 < floor <= 1.0 <= ceiling < float("inf"):
            raise UserError(
                "curvature diagonal: 0 < floor <= 1 <= ceiling wanted, "
                f"got floor={floor!r}, ceiling={ceiling!r}"
            )
        self.mode = mode
        self.updates_with_new_scale = mode == "reference"
        self.floor = floor
        self.ceiling = ceiling
        self._h: dict[str, Array] = {}
        self._drawn: dict[str, Array] = {}  # the h behind the last `scale`; freed at the next one
        self._z: dict[str, Array] = {}

    def start(self, shapes: Mapping[str, Shape], arrays: Arrays) -> None:
        """Sigma = I."""
        self._arrays = arrays
        xp = self._arrays.xp
        self._h = {name: xp.ones(tuple(shape), dtype=xp.float32) for name, shape in shapes.items()}
        self._drawn, self._z = {}, {}

    def held_bytes(self, shapes: Mapping[str, Shape]) -> int:
        """As large as the parameters."""
        return 4 * sum(math.prod(shape) for shape in shapes.values())

    def scale(self, name: str) -> Array:
        """Sigma^(1/2), float32 of the shape of parameter `name`."""
        self._drawn[name] = self._h[name]
        return self._arrays.rsqrt(self._h[name])

    def update_scale(self, name: str) -> Array:
        """paper: what `scale` last returned; reference: from the newest Sigma^-1."""
        if self.mode == "reference":
            return self._arrays.rsqrt(self._h[name])
        return self._arrays.rsqrt(self._drawn.get(name, self._h[name]))

    def see(self, name: str, z: Array, first_row: int = 0) -> None:
        """Keep z, all rows of it, until `observe`."""
        assert first_row == 0
        assert z.shape == self._h[name].shape
        self._z[name] = z

    def observe(self, curvature: float, smoothing: float) -> None:
        """Take in c = d' H d; an unusable c is ignored, a smoothing outside (0, 1] is a `UserError`."""
        weight = check_smoothing(smoothing)
        seen, self._z = self._z, {}
        if not is_usable(curvature):
            return
        arrays = self._arrays
        for name, old in self._h.items():
            factor = arrays.wide(seen[name])
            factor *= factor
            if self.mode == "paper":
                factor = abs(factor - 1.0)
            factor *= weight * abs(curvature) / 2.0
            drawn = self._drawn.get(name, old)
            if drawn is not old:  # a further direction of a step, drawn with the same Sigma as the first
                factor *= drawn / old
            factor += 1.0 - weight
            factor *= old
            # A new tensor: `_drawn` may still hold the old one for this step's update.
            self._h[name] = arrays.narrow(arrays.xp.clip(factor, self.floor, self.ceiling))

    def state_dict(self) -> dict[str, Array]:
        """Sigma^-1 by parameter name."""
        return dict(self._h)

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """The inverse of `state_dict`, after `start` with the same shapes."""
        self._h = check_state(state, self._h, self.name, self._arrays)
        self._drawn = {}
