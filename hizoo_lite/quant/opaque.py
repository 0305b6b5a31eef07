"""A module that stands where a layer's matrix was, and says so to code that takes it for the matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch import Tensor, nn

from hizoo_lite.errors import UserError


class NotTheMatrix(UserError, AttributeError):
    """A model computes with a layer's weight itself. For `hasattr` there is no such attribute."""


class Opaque(nn.Module):
    """Gives the product of its layer alone: MobileBERT's head, say, computes with `decoder.weight.t()`."""

    layer: str = ""  # the layer's name, once it is in a model

    def __getattr__(self, name: str) -> Any:
        """As of any module; a tensor's attributes are refused with `NotTheMatrix`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not hasattr(Tensor, name):
                raise
        self._refuse(name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> NoReturn:
        """Called for every function of torch that is given one of these in place of a tensor."""
        given = next((value for value in (*args, *(kwargs or {}).values()) if isinstance(value, cls)), None)
        name = getattr(func, "__name__", "a function")
        if given is None:
            raise NotTheMatrix(f"model: {name} of a layer's weight itself is asked for; {_WHY}")
        given._refuse(name)

    def _refuse(self, name: str) -> NoReturn:
        raise NotTheMatrix(f"model: {name} of {self.layer}.weight itself is asked for; {_WHY}")


_WHY = "this architecture, which computes with weights outside of their layers, is not supported"
