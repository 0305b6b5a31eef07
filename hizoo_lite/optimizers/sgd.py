"""Plain stochastic gradient descent, as MeZO and HiZOO have it: theta <- theta - lr g."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hizoo_lite.arrays import Array, Arrays, Shape
from hizoo_lite.base import Piece
from hizoo_lite.errors import UserError
from hizoo_lite.optimizers.decay import apply_decay


class SGD:
    """theta <- (1 - decay) theta - lr g, as in MeZO and HiZOO; nothing is kept from one step to the next.

    Example:
        >>> import numpy as np
        >>> from hizoo_lite.arrays import NumpyArrays
        >>> from hizoo_lite.base import Piece
        >>> optimizer, theta = SGD(), {"w": np.ones(2, "float32")}
        >>> optimizer.start({"w": (2,)}, NumpyArrays())
        >>> optimizer.update(theta, [Piece({"w": np.array([1.0, -1.0], "float32")}, 0.5)], lr=0.5, decay=0.0)
        >>> theta["w"]
        array([0.75, 1.25], dtype=float32)
    """

    name = "sgd"
    streams = True

    def start(self, shapes: Mapping[str, Shape], arrays: Arrays) -> None:
        """See `Optimizer.start`."""
        self._arrays = arrays

    def update(
        self, parameters: Mapping[str, Array], pieces: Sequence[Piece], lr: float, decay: float
    ) -> None:
        """See `Optimizer.update`."""
        apply_decay(parameters, decay)
        for values, coefficient in pieces:
            moved = [parameters[name] for name in values]
            self._arrays.add_all(moved, list(values.values()), -lr * coefficient)

    def state_dict(self) -> dict[str, Array]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """See `Optimizer.load_state_dict`. UserError if the saved run's optimizer had a state."""
        if state:
            raise UserError(f"optimizer sgd: keeps nothing, the saved state has {', '.join(sorted(state))}")
