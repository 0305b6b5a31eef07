"""The members of an axis by name: estimators, curvatures, spaces.

A member says which settings of a run are its own: `settings`, from the argument of its constructor (and the
attribute of the same name) to the field of `TrainConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from hizoo_lite.config import TrainConfig
from hizoo_lite.errors import UserError

Member = TypeVar("Member")


class Registry(Mapping[str, Callable[..., Member]], Generic[Member]):
    """Constructors by name. `axis` is the field of `TrainConfig` that names one."""

    def __init__(self, axis: str, members: Mapping[str, Callable[..., Member]]) -> None:
        self.axis, self._members = axis, dict(members)

    def __getitem__(self, name: str) -> Callable[..., Member]:
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def make(self, name: str, **options: Any) -> Member:
        """The member called `name`, made with `options`. UserError for an unknown name or option."""
        if name not in self._members:
            allowed = ", ".join(sorted(self._members))
            raise UserError(f"--{self.axis}: unknown name {name!r}, allowed are {allowed}")
        try:
            return self._members[name](**options)
        except TypeError as error:
            raise UserError(f"--{self.axis} {name}: {error}") from error

    def configured(self, config: TrainConfig, **options: Any) -> Member:
        """The member that a configuration names, with its settings; "auto" leaves one to the member."""
        name = getattr(config, self.axis)
        fields = getattr(self._members.get(name), "settings", {})
        given = {argument: getattr(config, field) for argument, field in fields.items()}
        return self.make(name, **{k: v for k, v in given.items() if v != "auto"} | options)


def settings_of(part: Any) -> dict[str, Any]:
    """What a member that was made by hand says, by the fields of `TrainConfig`; None is nothing said."""
    said = {field: getattr(part, name) for name, field in getattr(part, "settings", {}).items()}
    return {field: value for field, value in said.items() if value is not None}
