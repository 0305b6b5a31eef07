"""Plain stochastic gradient descent, as MeZO and HiZOO have it: theta <- theta - lr g."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hizoo_lite.arrays import Array, Arrays, Shape
from hizoo_lite.base import Piece
from hizoo_lite.errors import UserError
from hizoo_lite.optimizers.decay import apply_decay


class SGD:
    """Moves along each piece of the gradient in turn; nothing is kept from one step to the next."""

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
        """`UserError` if the saved run's optimizer had a state."""
        if state:
            raise UserError(f"optimizer sgd: keeps nothing, the saved state has {', '.join(sorted(state))}")
