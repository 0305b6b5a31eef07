"""The members of every axis, a line each: all that is said of them outside their folders.

A line has where a member's class is, what it is in a few words, which settings are its own, and what must be
known of it without torch: flags, help and the checks of a configuration are made of lines. Taking a member
imports its module. Everything else that is asked of a member is an attribute of its class (`base.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from hizoo_lite.errors import UserError

if TYPE_CHECKING:
    from hizoo_lite.base import Curvature, Estimator, Objective, Optimizer, Space

Member = TypeVar("Member")


@dataclass(frozen=True)
class Line:
    """What is known of a member before its module is imported.

    Attributes:
        path: its class; "module:class" where the module is not the one of the member's name in the folder.
        help: what it is, in a few words.
        settings: from the argument of its constructor (and the attribute of the same name) to the field of
            `TrainConfig`.
        in_weights: of a space: it trains weights inside the blocks. Their scales are float32, steps have one
            direction, and a replay needs the model.
        of_scales: of a space: it has nothing to train where weights are not quantized.
    """

    path: str
    help: str
    settings: Mapping[str, str] = field(default_factory=dict)
    in_weights: bool = False
    of_scales: bool = False


def _own(*same: str, **others: str) -> dict[str, str]:
    """Settings: those whose argument has the field's name, and others by argument."""
    return {name: name for name in same} | others


class Registry(Mapping[str, type[Member]], Generic[Member]):
    """Classes by name, the default one first. `axis` is the field of `TrainConfig` that names one."""

    def __init__(self, axis: str, folder: str, **lines: Line) -> None:
        self.axis, self.folder, self.lines = axis, folder, lines

    def __getitem__(self, name: str) -> type[Member]:
        module, _, attribute = self.lines[name].path.rpartition(":")
        return getattr(import_module(module or f"{self.folder}.{name}"), attribute)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self.lines

    def __iter__(self) -> Iterator[str]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)

    def make(self, name: str, **options: Any) -> Member:
        """The member called `name`, made with `options`. UserError for an unknown name or option."""
        if name not in self:
            raise UserError(f"--{self.axis}: unknown name {name!r}, allowed are {', '.join(sorted(self))}")
        make: Any = self[name]
        try:
            return make(**options)
        except TypeError as error:
            raise UserError(f"--{self.axis} {name}: {error}") from error

    def configured(self, config: Any, **options: Any) -> Member:
        """The member that a `TrainConfig` names, with its settings; "auto" leaves one to the member."""
        name = getattr(config, self.axis)
        member: Any = self[name]
        given = {argument: getattr(config, field) for argument, field in self.lines[name].settings.items()}
        left = member.left_open(config) if "auto" in given.values() and hasattr(member, "left_open") else {}
        return self.make(name, **left | {k: v for k, v in given.items() if v != "auto"} | options)

    def said_by(self, part: Member | None) -> dict[str, Any]:
        """What an object in place of a name says, by the fields of `TrainConfig`; None is nothing said."""
        if part is None:
            return {}
        name: str = part.name  # type: ignore[attr-defined]
        fields = self.lines[name].settings if name in self else {}
        said = {field: getattr(part, argument) for argument, field in fields.items()}
        return {self.axis: name} | {field: value for field, value in said.items() if value is not None}

    def having(self, field: str) -> list[str]:
        """The members that a setting is of."""
        return [name for name, line in self.lines.items() if field in line.settings.values()]


SPACES: Registry[Space] = Registry(
    "space",
    "hizoo_lite.spaces",
    lora=Line(
        "LoRA",
        "adapters",
        _own("rank", "alpha", "rslora", "train_a", "targets", "blocks", "exact_blocks", "head"),
    ),
    dense=Line(
        "Dense", "the weights", _own("targets", "blocks", "head", update="dense_update"), in_weights=True
    ),
    scales=Line(
        "Scales",
        "only their absmax (QZO)",
        _own("targets", "blocks", "head"),
        in_weights=True,
        of_scales=True,
    ),
)

ESTIMATORS: Registry[Estimator] = Registry(
    "estimator",
    "hizoo_lite.estimators",
    hizoo=Line("HiZOO", "slope and curvature", _own("curvature_from", "directions", every="curvature_every")),
    mezo=Line("MeZO", "the slope alone"),
)

OBJECTIVES: Registry[Objective] = Registry(
    "objective",
    "hizoo_lite.objectives",
    loss=Line("Loss", "the task's own"),
    accuracy=Line("Accuracy", "whether the gold answer or class scores highest, of tasks with choices"),
    f1=Line("F1", "of the greedy answer, of tasks that write: a generation for each point"),
)

CURVATURES: Registry[Curvature] = Registry(
    "curvature",
    "hizoo_lite.curvature",
    grouped=Line("Grouped", "a value for each tensor or row", _own(per="curvature_per")),
    factored=Line("Factored", "one for each row and column (HiZOO-L)"),
    diagonal=Line("Diagonal", "one for each parameter, as published", _own(mode="curvature_mode")),
    none=Line("NoCurvature", "Sigma is the identity"),
)

OPTIMIZERS: Registry[Optimizer] = Registry(
    "optimizer", "hizoo_lite.optimizers", sgd=Line("SGD", "moves along the gradient")
)
